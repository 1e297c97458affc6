"""A run in use: exported, registered, served, and labelling folders of images."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import TINY
from mlflow import MlflowClient
from PIL import Image
from torch import Tensor, nn

import segadapt as api
from segadapt.platform.cli.main import main
from segadapt.platform.deployment import export, registry
from segadapt.platform.deployment.card import Card
from segadapt.platform.deployment.deployed import load_deployed
from segadapt.platform.deployment.evaluation import evaluate_target, target_images
from segadapt.platform.deployment.export import CARD, ONNX, PT2, ExportError, ExportResult, open_exported, write
from segadapt.platform.deployment.prediction import Labeller, predict, spans
from segadapt.platform.errors import UsageError
from segadapt.platform.settings.config import resolve
from segadapt.platform.storage.folders import Place
from segadapt.trainables.core.data.transforms import resized
from segadapt.trainables.core.evaluation.deployed import DeployedNetwork, resized_antialiased, stride
from segadapt.trainables.core.evaluation.inference import Inference
from segadapt.trainables.core.networks import Segmenter, SegmenterOutput, build_segmenter
from segadapt.trainables.core.training.checkpoint import MANIFEST, STATE
from segadapt.trainables.plca import AggregatingSegmenter

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The tiny run in files."""
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    return api.export("best", search="tiny", out=str(folder), place=Place(str(trained / "runs")))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of images of several sizes, one of them smaller than the network takes, and two that are none."""
    folder = tmp_path / "photos"
    (folder / "night").mkdir(parents=True)
    random = np.random.default_rng(0)
    sizes = {"a.png": (32, 64), "b.jpg": (32, 64), "night/a.png": (45, 70), "night/small.bmp": (9, 40)}
    for name, (height, width) in sizes.items():
        blocks = random.integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
        Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)[:height, :width]).save(folder / name)
    (folder / "night" / "cut.png").write_bytes((folder / "a.png").read_bytes()[:-40])
    (folder / "notes.png").write_text("no image")
    (folder / "readme.txt").write_text("passed over")
    return folder


def labels_in(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {
        path.relative_to(folder / "labels").as_posix(): np.array(Image.open(path))
        for path in sorted(folder.glob("labels/**/*.png"))
    }


def test_exported_files_carry_all_that_is_known_of_the_network(trained: Path, exported: ExportResult) -> None:
    (row,) = api.runs("tiny", place=Place(str(trained / "runs"))).rows
    assert row.checkpoint is not None
    checkpoint = Path(row.checkpoint)
    card = json.loads((Path(exported.folder) / CARD).read_text())
    deployed = load_deployed(checkpoint, {}, CPU)
    assert card["classes"] == list(deployed.names)
    assert card["colors"][0] == [128, 64, 128]
    assert card["metrics"]["target_val/miou"] == row.best
    assert "target_val/iou/road" in card["metrics"]
    assert card["run_id"] == row.run_id
    assert card["checkpoint_sha256"] == json.loads((checkpoint / "manifest.json").read_text())["sha256"]["state.pt"]
    assert len(card["data_fingerprint"]) == 64
    assert card["normalisation"]["mean"][0] == pytest.approx(0.485 * 255)
    assert card["config"]["data"]["streets"]["width"] == 64
    assert open_exported(Path(exported.folder) / ONNX)[1] == Card.from_dict(card)
    assert max(exported.differences[name] for name in (ONNX, PT2)) <= 1e-5
    extra = {CARD: ""}
    program = torch.export.load(Path(exported.folder) / PT2, extra_files=extra)
    assert json.loads(extra[CARD]) == card
    assert sum(value.numel() for value in program.parameters()) == sum(
        value.numel() for value in deployed.network.parameters()
    )


def test_a_checkpoint_is_one_version_of_a_registered_model_and_names_its_run(
    trained: Path, exported: ExportResult, tmp_path: Path
) -> None:
    again = api.export("source_only", search="tiny", out=str(tmp_path / "again"), place=Place(str(trained / "runs")))
    assert (again.model, again.version) == (exported.model, exported.version) == ("tiny", "1")
    client = MlflowClient(f"sqlite:///{trained}/runs/mlflow.db")
    version = client.get_model_version("tiny", "1")
    (row,) = api.runs("tiny", place=Place(str(trained / "runs"))).rows
    assert version.run_id == row.run_id
    card = json.loads((Path(exported.folder) / CARD).read_text())
    assert version.tags["segadapt.search"] == "tiny"
    assert version.tags["segadapt.checkpoint_sha256"] == card["checkpoint_sha256"]
    with pytest.raises(UsageError, match="must be new or empty"):
        api.export("best", search="tiny", out=exported.folder, place=Place(str(trained / "runs")))
    with pytest.raises(UsageError, match="--register must be letters"):
        api.export("best", search="tiny", register="a/b", place=Place(str(trained / "runs")))


class AnotherBefore:
    """An MLflow client before whose version of a model another command makes one."""

    def __init__(self, client: MlflowClient, register: Callable[[], str]) -> None:
        self.client, self.register = client, register

    def __getattr__(self, name: str) -> Any:
        if name == "create_model_version":
            self.register()
        return getattr(self.client, name)


def test_two_exports_of_a_checkpoint_at_once_register_one_version(trained: Path, exported: ExportResult) -> None:
    client, folder = MlflowClient(f"sqlite:///{trained}/runs/mlflow.db"), Path(exported.folder)
    card = Card.from_dict(json.loads((folder / CARD).read_text()))
    other = partial(registry.register, client, "twice", card, folder / ONNX)
    assert registry.register(AnotherBefore(client, other), "twice", card, folder / ONNX) == "1"
    assert [str(version.version) for version in client.search_model_versions("name = 'twice'")] == ["1"]


def test_mlflow_serves_the_registered_model(trained: Path, exported: ExportResult, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["-m", "mlflow", "models", "serve", "-m", f"models:/{exported.model}/{exported.version}"]
    words += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # mlflow looks for uvicorn there
    environment = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": f"sqlite:///{trained}/runs/mlflow.db"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, *words], cwd=tmp_path, env=environment, stdout=log, stderr=log, process_group=0
        )
    try:
        images = torch.randint(0, 256, (2, 3, 40, 72), dtype=torch.uint8)
        wait_for(f"http://127.0.0.1:{port}/ping", server, tmp_path / "log")
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"inputs": images.tolist()}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            labels = torch.tensor(json.load(answer)["predictions"])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)
    expected = open_exported(Path(exported.folder) / ONNX)[0](images).argmax(1)
    assert torch.equal(labels, expected)


def wait_for(address: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def test_a_run_its_checkpoint_and_its_file_label_a_folder_alike(
    trained: Path, exported: ExportResult, photos: Path, tmp_path: Path
) -> None:
    found = {}
    (row,) = api.runs("tiny", place=Place(str(trained / "runs"))).rows
    assert row.checkpoint is not None
    brought = shutil.copytree(row.checkpoint, tmp_path / "brought")  # to another machine, without the storage folder
    for source, search in (("best", "tiny"), (f"{exported.folder}/{ONNX}", None), (str(brought), None)):
        out = tmp_path / f"out-{len(found)}"
        where = {"search": search, "place": Place(str(trained / "runs"))} if search else {}
        result = api.predict(source, str(photos), str(out), batch_size=2, **where)
        assert (result.images, result.written, result.skipped) == (6, 4, 0)
        found[source] = labels_in(out)
    run, *files = found.values()
    assert {name: label.shape for name, label in run.items()} == {
        "a.png": (32, 64),
        "b.png": (32, 64),
        "night/a.png": (45, 70),
        "night/small.png": (9, 40),
    }
    for labels in files:
        assert all(np.mean(labels[name] == run[name]) > 0.999 for name in run)


WINDOWS = {"trainer.eval_window": (16, 24), "trainer.eval_stride": (8, 12)}


@pytest.mark.parametrize(
    ("asked", "settings"),
    [(Inference(), {}), (Inference(scales=(0.75, 1.0), flip=True, window=(16, 24), stride=(8, 12)), WINDOWS)],
    ids=["once", "in windows, at scales and mirrored"],
)
def test_labels_equal_those_of_the_evaluation(
    trained: Path, tmp_path: Path, asked: Inference, settings: dict[str, Any]
) -> None:
    (row,) = api.runs("tiny", place=Place(str(trained / "runs"))).rows
    assert row.checkpoint is not None
    deployed = load_deployed(Path(row.checkpoint), {}, CPU)
    images, _ = target_images(deployed.config, deployed.names)
    (tmp_path / "val").mkdir()
    for index, image_id in enumerate(images.ids):
        Image.fromarray(images.image(index).permute(1, 2, 0).numpy()).save(tmp_path / "val" / f"{image_id}.png")
    expected: dict[str, Tensor] = {}
    evaluate_target(deployed, images, asked, CPU, lambda name, label: expected.update({name: label}))  # type: ignore[arg-type]
    where = {"search": "tiny", "place": Place(str(trained / "runs"))}
    shown: dict[str, Any] = {"scales": asked.scales, "flip": asked.flip}
    api.predict("best", str(tmp_path / "val"), str(tmp_path / "out"), settings, **where, **shown)
    with pytest.raises(UsageError, match="was begun with other asked"):
        api.predict("best", str(tmp_path / "val"), str(tmp_path / "out"), settings, **where, scales=(0.5, 1.5))
    labels = labels_in(tmp_path / "out")
    assert len(labels) == len(images)
    for name, label in expected.items():
        assert np.array_equal(labels[f"{name}.png"], label.numpy())


def test_the_command_names_unreadable_images_writes_pictures_and_goes_on_after_an_interruption(
    exported: ExportResult,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def status(*words: str) -> Any:
        monkeypatch.setattr("sys.argv", ["segadapt", "predict", f"{exported.folder}/{ONNX}", "photos", "out", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    monkeypatch.chdir(tmp_path)
    assert status("--confidence") == 1
    shown = capsys.readouterr().out
    assert "unreadable: photos/night/cut.png: it is cut off" in shown
    assert "unreadable: photos/notes.png: it is no image" in shown
    assert "4 images labelled in out, 2 unreadable" in shown
    out = tmp_path / "out"
    card = json.loads((Path(exported.folder) / CARD).read_text())
    with Image.open(out / "labels/night/a.png") as label:
        assert label.mode == "P"
        painted = np.array(label.convert("RGB"))
        assert np.array_equal(painted, np.array(card["colors"], np.uint8)[np.array(label)])
    with Image.open(out / "overlays/night/a.png") as overlay, Image.open(photos / "night/a.png") as photo:
        blend = (np.array(photo).astype(int) + painted) / 2
        assert np.abs(np.array(overlay) - blend).max() <= 1
    with Image.open(out / "confidence/night/a.png") as confidence:
        assert (confidence.mode, confidence.size) == ("L", (70, 45))
        assert np.array(confidence).min() >= 255 // len(card["classes"])

    kept = (out / "labels/a.png").stat().st_mtime_ns
    (out / "labels/b.png").unlink()
    (photos / "notes.png").unlink()
    shutil.copy(photos / "a.png", photos / "night/cut.png")
    assert status("--confidence") == 0
    assert "2 images labelled in out, 3 were before" in capsys.readouterr().out
    assert (out / "labels/a.png").stat().st_mtime_ns == kept
    assert status() == 2
    assert "out was begun with other confidence" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "best"}, "RUN needs --search NAME, a file must end in .onnx and a checkpoint be a folder, but got"),
        ({"source": "photos/model.pt2"}, "a .pt2 file runs what its maker put into it. Name the model.onnx"),
        ({"source": "photos"}, "The checkpoint of the run must lie in photos, but cannot be read"),
        ({"source": ""}, "RUN must be a path, but got ''"),
        ({"images": ""}, "IMAGES must be a path, but got ''"),
        ({"out": ""}, "OUT must be a path, but got ''"),
        ({"source": "absent.onnx"}, "there is none at absent.onnx"),
        ({"source": "photos/a.onnx"}, "must be a whole file that `segadapt export` wrote, but photos/a.onnx is not"),
        ({"images": "absent"}, "must be an image or a folder of images"),
        ({"images": "empty"}, "IMAGES must hold images"),
        ({"out": "photos"}, "OUT must be new, empty, or begun by the same command"),
        ({"images": "twins"}, "Images must differ in more than their suffix"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"flip": True}, r"--scales, --flip and KEY=VALUE need a run .* but got the file .* asked once"),
        ({"settings": {"augmentation.target_size": (32, 64)}}, "--scales, --flip and KEY=VALUE need a run"),
        ({"settings": {"data.target": "x"}}, "Settings of a prediction must start with one of .*, but got data.target"),
        ({"scales": (11.0,)}, r"a scale must lie in \[0\.1, 10\], but got 11"),
    ],
)
def test_wrong_usage_is_refused(
    exported: ExportResult,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(photos.parent)
    (photos / "a.onnx").write_bytes(b"nothing")
    for name in ("empty", "twins"):
        Path(name).mkdir()
    for suffix in ("png", "jpg"):
        shutil.copy(photos / "a.png", f"twins/a.{suffix}")
    arguments = {"source": f"{exported.folder}/{ONNX}", "images": "photos", "out": "out", **options}
    with pytest.raises(UsageError, match=message):
        api.predict(**arguments)
    assert not Path("out").exists()


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx", "checkpoint"])
def test_code_in_what_others_give_is_never_run(name: str, exported: ExportResult, photos: Path, tmp_path: Path) -> None:
    mark, offered, out = tmp_path / "attacked", tmp_path / name, tmp_path / "out"
    torch.save(Attack(mark), tmp_path / "attack.pt")
    attack = (tmp_path / "attack.pt").read_bytes()
    if name == "checkpoint":
        offered.mkdir()
        (offered / STATE).write_bytes(attack)
        (offered / MANIFEST).write_text(json.dumps({"sha256": {STATE: hashlib.sha256(attack).hexdigest()}}))
        (offered / "config.json").write_text("{}")
    else:
        with zipfile.ZipFile(Path(exported.folder) / PT2) as sound, zipfile.ZipFile(offered, "w") as changed:
            for entry in sound.namelist():
                changed.writestr(entry, attack if entry.endswith("sample_inputs/model.pt") else sound.read(entry))
    with pytest.raises(UsageError, match=r"runs what its maker put into it|holds code|must be a whole file"):
        api.predict(str(offered), str(photos), str(out))
    assert not mark.exists()
    assert not out.exists()
    if name == "model.pt2":
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            torch.export.load(offered)
        assert mark.exists(), "loading it would have run it"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"classes": ["road"]}, "classes and .* colours do not fit"),
        ({"colors": [[0, 0, 999]] * 11}, "fit together|of 8 bits"),
        ({"smallest_side": 10**9}, "no image can have"),
        ({"whole_pixels": 0}, "no image can have"),
        ({"whole_pixels": "../../etc"}, "whole_pixels"),
    ],
)
def test_what_a_file_says_of_itself_is_checked(exported: ExportResult, changes: dict[str, Any], reason: str) -> None:
    card = json.loads((Path(exported.folder) / CARD).read_text())
    assert Card.from_dict(card) == Card.from_strings({f"segadapt.{key}": json.dumps(card[key]) for key in card})
    with pytest.raises(ValueError, match=reason):
        Card.from_dict({**card, **changes})


def settled(name: str, *, aggregation: float = 0.0) -> Segmenter:
    """A network of random weights whose batch norm has seen images, so that its logits are of usual size."""
    torch.manual_seed(0)
    network = build_segmenter(name, 5)
    if "resnet" in name:  # the same operations again and again, each of which takes its time to export
        for part in network.backbone.children():
            for name, stage in list(part.named_children()):
                if name.startswith("layer"):
                    setattr(part, name, cast("nn.Sequential", stage)[:2])
    network.train()
    with torch.no_grad():
        for _ in range(5):
            network(network.normalise(torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)))
    return AggregatingSegmenter(network, aggregation, 1.0, 1e-10) if aggregation else network


def a_card(**changes: Any) -> Card:
    fields = dict.fromkeys((field.name for field in dataclasses.fields(Card)), "")
    known: dict[str, Any] = {"classes": ("a", "b"), "colors": ((0, 0, 0), (9, 9, 9)), "smallest_side": 32}
    known |= {"normalisation": {}, "metrics": {}, "unknown": (), "config": {}, "aggregation": 0.0, "step": 0}
    return Card(**{**fields, **known, "whole_pixels": 2**22, "input_size": None, **changes})


@pytest.mark.parametrize(
    ("name", "aggregation", "size"),
    [
        ("compact", 0.5, None),
        pytest.param("deeplabv2_resnet101_caffe", 0.0, None, marks=pytest.mark.slow),
        pytest.param("deeplabv3_resnet50", 0.0, None, marks=pytest.mark.slow),
        pytest.param("lraspp_mobilenet_v3_large", 0.0, (64, 128), marks=pytest.mark.slow),
        pytest.param("timm:test_resnet", 0.0, None, marks=pytest.mark.slow),
        pytest.param("timm:test_convnext", 0.0, None, marks=pytest.mark.slow),
        pytest.param("timm:test_vit", 0.0, None, marks=pytest.mark.slow),
        pytest.param("timm:pvt_v2_b0", 0.0, (96, 128), marks=pytest.mark.slow),
    ],
)
def test_networks_export(name: str, aggregation: float, size: tuple[int, int] | None, tmp_path: Path) -> None:
    original = settled(name, aggregation=aggregation).eval()
    network = DeployedNetwork(original, size, "bicubic")
    differences = write(network, a_card(), tmp_path / "out")
    assert max(differences.values()) < 1e-4
    images = torch.randint(0, 256, (1, 3, 75, 101), dtype=torch.uint8)
    with torch.no_grad():
        shown = resized(images, size, "bicubic")
        logits = original(original.normalise(shown)).logits
        expected = original.upsample(logits, (75, 101)).softmax(1)
    found = open_exported(tmp_path / "out" / ONNX)[0](images)
    # A network of random weights tells rounded pixels from others; torchvision rounds what it resizes.
    torch.testing.assert_close(found, expected, atol=1e-4 if size is None else 2e-2, rtol=0)


class DataDependent(Segmenter):
    """Looks at values to decide what to compute."""

    def forward(self, images: Tensor) -> SegmenterOutput:
        features = self.backbone(images)
        return SegmenterOutput(self.head(features) if features.mean() > 0 else features[:, :2], features)


def test_what_cannot_be_exported_or_differs_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"feature_channels": 3, "num_classes": 2}
    depending = DataDependent(nn.Identity(), nn.Conv2d(3, 2, 1), **options)
    with pytest.raises(UsageError, match=r"must consist of operations that torch\.export takes, but this one does not"):
        write(DeployedNetwork(depending, None), a_card(), tmp_path / "out")
    plain = Segmenter(nn.AvgPool2d(4), nn.Conv2d(3, 2, 1), **options)

    def written_meanwhile(network: object, exported: object) -> float:
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "theirs").touch()
        return 0.0

    monkeypatch.setattr(export, "_difference", written_meanwhile)
    with pytest.raises(UsageError, match=r"must be new or empty, but .*other was written by another command meanwhile"):
        write(DeployedNetwork(plain, None), a_card(), tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["theirs"]
    shutil.rmtree(tmp_path / "other")
    monkeypatch.setattr(export, "_difference", lambda network, exported: float("nan"))
    with pytest.raises(
        ExportError, match=r"must be within 0\.001 of the network's, but those of model\.pt2 differ by nan"
    ):
        write(DeployedNetwork(plain, None), a_card(), tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(64, 96), (200, 300), (131, 173)])
def test_resizing_is_that_of_training_up_to_rounding(interpolation: Any, size: tuple[int, int]) -> None:
    images = torch.randint(0, 256, (1, 3, 131, 173), dtype=torch.uint8)
    difference = resized_antialiased(images, size, interpolation) - resized(images, size, interpolation)
    assert difference.abs().mean() < 0.5
    assert difference.abs().quantile(0.99) <= 1.5


def test_strides_are_found() -> None:
    assert stride(build_segmenter("compact", 2)) == 4
    assert stride(build_segmenter("lraspp_mobilenet_v3_large", 2).eval()) == 8


def brightness(images: Tensor) -> Tensor:
    """Two classes, dark and bright, and how sure that is."""
    bright = images.float().mean(1, keepdim=True) / 255
    return torch.cat([1 - bright, bright], 1)


@pytest.mark.parametrize("size", [(100, 900), (331, 257), (128, 128)])
def test_large_images_are_labelled_in_parts_without_seams(size: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8)
    whole = Labeller(brightness, a_card())(images)
    parts = Labeller(brightness, a_card(whole_pixels=128 * 128))(images)
    for expected, found in zip(whole, parts, strict=True):
        assert np.array_equal(expected, found)


def test_images_that_are_seen_enlarged_are_predicted_fewer_at_a_time_and_in_smaller_parts() -> None:
    enlarged = Inference(scales=(1.0, 2.0))
    labeller = Labeller(brightness, a_card(), enlarged)
    assert labeller.batch((1024, 1024), 8) == 1 < Labeller(brightness, a_card()).batch((1024, 1024), 8) == 4
    images = np.random.default_rng(0).integers(0, 256, (1, 300, 200, 3), np.uint8)
    seen = []

    def looking(shown: Tensor) -> Tensor:
        seen.append(shown.shape[-2] * shown.shape[-1])
        return brightness(shown)

    parts = Labeller(looking, a_card(whole_pixels=256 * 256), enlarged)(images)
    assert max(seen) <= 128 * 128
    assert np.array_equal(parts[0], Labeller(brightness, a_card())(images)[0])


def test_large_images_that_the_network_reduces_are_reduced_before() -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (1, 33, 41, 3), np.uint8)
    images = blocks.repeat(8, 1).repeat(8, 2)[:, :260, :325]
    seen = []

    def looking(shown: Tensor) -> Tensor:
        seen.append(shown.shape[-2:])
        return brightness(shown)

    labels, confidence = Labeller(looking, a_card(whole_pixels=100 * 100, input_size=(32, 32)))(images)
    assert seen == [(87, 109)]
    assert labels.shape == confidence.shape == (1, 260, 325)
    assert np.mean(labels == Labeller(brightness, a_card())(images)[0]) > 0.85


def test_odd_images_are_labelled_as_viewers_show_them_or_named(tmp_path: Path) -> None:
    photos, out, exif = tmp_path / "photos", tmp_path / "out", Image.Exif()
    photos.mkdir()
    exif[0x0112] = 6
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60), np.uint8))
    grey.save(photos / "turned.jpg", exif=exif)
    written = {"turned": (60, 40), "line": (1, 500), "column": (300, 1), "pixel": (1, 1)}
    for name, (height, width) in written.items():
        if name != "turned":
            Image.new("RGB", (width, height)).save(photos / f"{name}.png")
    for name, mode in {
        "grey.jpg": "L",
        "cmyk.jpg": "CMYK",
        "a b.png": "RGBA",
        "a.b.c.png": "RGB",
        "bit.tif": "1",
    }.items():
        grey.convert(mode).save(photos / name)
        written[Path(name).stem] = (40, 60)
    grey.quantize(8).save(photos / "Straße_ü.PNG", transparency=1)
    grey.save(photos / "pages.tiff", save_all=True, append_images=[grey])
    written |= {"Straße_ü": (40, 60), "pages": (40, 60)}
    (photos / "empty.png").write_bytes(b"")
    (photos / "gone.png").symlink_to("nowhere")
    os.mkfifo(photos / "pipe.png")
    Image.new("I;16", (4, 4)).save(photos / "sixteen.png")
    Image.new("F", (4, 4)).save(photos / "float.tiff")
    (photos / "._pixel.png").write_bytes(b"hidden")
    (photos / "folder.png").mkdir()

    def done(*_: int) -> None: ...

    labeller = Labeller(brightness, a_card())
    result = predict(labeller, photos, out, batch_size=4, overlay=True, confidence=True, progress=done)
    assert {Path(image.path).name: image.reason.split(",")[0] for image in result.unreadable} == {
        "empty.png": "it is empty",
        "gone.png": "it is a link to a file that is not there",
        "pipe.png": "it is no file",
        "sixteen.png": "an image must have 8 bits per channel",
        "float.tiff": "an image must have 8 bits per channel",
    }
    sizes = {path.stem: np.asarray(Image.open(path)).shape for path in (out / "labels").iterdir()}
    assert sizes == written
    shown = np.asarray(Image.open(photos / "turned.jpg").transpose(Image.Transpose.ROTATE_270), int)
    sure = np.abs(shown - 127.5) > 1
    assert np.array_equal(np.asarray(Image.open(out / "labels" / "turned.png"))[sure], (shown > 127)[sure])


def test_parts_cover_a_side_once() -> None:
    for length in range(1, 700):
        covered = np.zeros(length, int)
        for seen, kept in spans(length, 128):
            assert seen.stop - seen.start <= 128
            assert seen.start <= kept.start < kept.stop <= seen.stop
            covered[kept] += 1
        assert (covered == 1).all()


def test_streets_settings_are_those_of_the_card(exported: ExportResult) -> None:
    card = json.loads((Path(exported.folder) / CARD).read_text())
    assert card["config"] == json.loads(json.dumps(resolve("source_only", TINY).as_dict()))
