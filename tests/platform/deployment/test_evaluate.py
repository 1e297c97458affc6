"""Evaluating a run: its own number again, the published subsets, and the same counts as the public evaluation code."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official  # noqa: N813
from conftest import TINY
from mlflow import MlflowClient
from PIL import Image
from torch import nn

import segadapt as api
from segadapt.platform.cli.main import main
from segadapt.platform.deployment import evaluation as evaluating
from segadapt.platform.deployment.deployed import AGGREGATION, _untrained, load_deployed
from segadapt.platform.deployment.evaluation import (
    Deployed,
    Submission,
    evaluate_target,
    protocol_of,
    target_images,
)
from segadapt.platform.errors import UsageError
from segadapt.platform.results.leaderboard import Leaderboard, Row, pick_run
from segadapt.platform.settings.config import resolve
from segadapt.platform.storage.folders import Place
from segadapt.platform.trial.training import build_method
from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.data.class_lists import CITYSCAPES, CITYSCAPES_IDS, SUBSETS
from segadapt.trainables.core.evaluation.evaluate import score
from segadapt.trainables.core.evaluation.inference import Inference
from segadapt.trainables.core.evaluation.metrics import confusion_matrix
from segadapt.trainables.core.networks import NetworkConfig, Segmenter, SegmenterOutput
from segadapt.trainables.core.training.checkpoint import save_state

CPU = torch.device("cpu")
NAMES = CITYSCAPES.names


def tracked(folder: Path) -> Any:
    """The MLflow run of the trial, and a client to ask about it."""
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    (row,) = api.runs("tiny", place=Place(str(folder / "runs"))).rows
    return client, client.get_run(row.run_id)


def command_line(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["segadapt", "evaluate", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


def test_the_best_run_gives_its_tracked_number_again(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command_line(monkeypatch, trained, "best", "--search", "tiny")
    shown = capsys.readouterr().out
    assert "source_only at step" in shown
    assert "on 6 target images: auto, single scale, no flip, no aggregation" in shown
    _, run = tracked(trained)
    best = run.data.metrics["best/target_val/miou"]
    assert f"target_val/miou {best:.4f}    in MLflow: evaluation/auto/target_val/miou" in shown
    assert run.data.metrics["evaluation/auto/target_val/miou"] == pytest.approx(best, abs=1e-12)
    assert "evaluation/auto/target_val/iou/road" in run.data.metrics


def test_scales_flip_and_predictions_are_stated_and_tracked_apart(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["source_only", "--search", "tiny", "--scales", "0.75", "1.0", "1.25", "--flip", "--json"]
    command_line(monkeypatch, trained, *words, "--save-predictions", str(tmp_path / "predictions"))
    result = json.loads(capsys.readouterr().out)
    assert result["how"] == "scales 0.75 1 1.25, flip, no aggregation"
    client, run = tracked(trained)
    name = "evaluation/auto-scales-0.75-1-1.25-flip"
    assert run.data.metrics[f"{name}/target_val/miou"] == result["metrics"]["target_val/miou"]
    assert f"{name}.json" in {entry.path for entry in client.list_artifacts(run.info.run_id, "evaluation")}

    config = resolve("source_only", TINY)
    images, _ = target_images(config, result["classes"])
    counts = torch.zeros(8, 8, dtype=torch.int64)
    own_index = torch.full((256,), IGNORE_INDEX)
    own_index[[CITYSCAPES_IDS[name] for name in result["classes"]]] = torch.arange(8)
    for index, image_id in enumerate(images.ids):
        with Image.open(tmp_path / "predictions" / f"{image_id}.png") as picture:
            assert (picture.mode, picture.size) == ("L", (64, 32))
            counts += confusion_matrix(own_index[torch.from_numpy(np.array(picture)).long()], images.label(index), 8)
    assert counts.tolist() == result["confusion"]


def test_an_image_may_be_shown_in_windows(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for window in ("[32,64]", "[16,24]"):
        words = ["source_only", f"trainer.eval_window={window}", "--search", "tiny", "--json"]
        command_line(monkeypatch, trained, *words)
        found[window] = json.loads(capsys.readouterr().out)
    whole, windows = found.values()
    assert whole["how"] == "single scale, no flip, windows of 32x64, no aggregation"
    _, run = tracked(trained)
    miou = whole["metrics"]["target_val/miou"]
    assert miou == pytest.approx(run.data.metrics["best/target_val/miou"], abs=1e-12)
    assert miou != windows["metrics"]["target_val/miou"] == run.data.metrics[f"{windows['tracked']}/target_val/miou"]
    words = ["source_only", "trainer.eval_window=[16,24]", "trainer.eval_stride=[4,6]", "--search", "tiny", "--json"]
    command_line(monkeypatch, trained, *words)
    closer = json.loads(capsys.readouterr().out)
    assert closer["how"] == "single scale, no flip, windows of 16x24 every 4x6, no aggregation"
    assert closer["tracked"] != windows["tracked"]
    assert closer["confusion"] != windows["confusion"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run": "nonesuch"}, "RUN must be `best` or a trial or finish of 'tiny'.*Those are: source_only"),
        ({"search": "nonesuch"}, "There must be a search 'nonesuch'"),
        ({"protocol": "cityscapes-20"}, "--protocol must be one of auto, cityscapes-19, cityscapes-16, cityscapes-13"),
        ({"protocol": "cityscapes-13"}, "lacks traffic light, traffic sign, rider, bus, motorcycle, bicycle: the netw"),
        ({"aggregation": 0.5}, "--aggregation must be left out for a network that was trained by source_only"),
        ({"scales": (1.0, 1.0)}, "scales must differ"),
        ({"settings": {"trainer.steps": 4}}, r"must start with one of data\., .*, but got trainer.steps"),
        ({"settings": {"data.oracel": True}}, "Did you mean 'data.oracle'"),
        ({"save_predictions": "."}, "must be new or empty"),
    ],
)
def test_wrong_usage_is_refused(
    trained: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(trained)
    arguments: dict[str, Any] = {"run": "best", "settings": {}, "search": "tiny", **options}
    with pytest.raises(UsageError, match=message):
        api.evaluate(**arguments)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--scales", "big"), "Numbers must follow --scales, and only numbers, but got big"),
        (("--scales", "0.75,big"), "but got big"),
        (("0.75", "1.25"), "Numbers must follow --scales, and only numbers, but got 0.75 1.25"),
        (("--scales", "nan"), "a scale must lie in [0.1, 10]"),
        (("flip",), "A setting must be written KEY=VALUE"),
    ],
)
def test_wrong_words_are_refused_by_the_command(
    words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["segadapt", "evaluate", "best", "--search", "tiny", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_damaged_or_missing_checkpoint_names_itself(trained: Path, tmp_path: Path) -> None:
    (row,) = api.runs("tiny", place=Place(str(trained / "runs"))).rows
    assert row.checkpoint is not None
    copy = shutil.copytree(row.checkpoint, tmp_path / "copy")
    (copy / "state.pt").write_bytes(b"cut short")
    with pytest.raises(UsageError, match=r"The hash of .*copy/state.pt must be"):
        load_deployed(copy, {}, CPU)
    with pytest.raises(UsageError, match=r"must lie in .*absent, but cannot be read"):
        load_deployed(tmp_path / "absent", {}, CPU)


def test_the_weights_that_training_started_from_are_not_needed(trained: Path, tmp_path: Path) -> None:
    (row,) = api.runs("tiny", place=Place(str(trained / "runs"))).rows
    assert row.checkpoint is not None
    copy = shutil.copytree(row.checkpoint, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["network"]["weights"] = "/gone/imagenet.pth"
    (copy / "config.json").write_text(json.dumps(config))
    assert load_deployed(copy, {}, CPU).names == tuple(json.loads((copy / "evaluation.json").read_text())["classes"])


def write_checkpoint(folder: Path, method: str, **values: Any) -> Path:
    """The checkpoint of an untrained method on streets' 8 classes."""
    config = resolve(method, {**TINY, **values})
    built = build_method(config, 8)
    deployed = next(name for name, module in built.named_children() if module is built.deployed)
    folder.mkdir()
    save_state(folder, {"method": method, "deployed": deployed, "state": built.state_dict()})
    (folder / "config.json").write_text(json.dumps(config.as_dict()))
    (folder / "evaluation.json").write_text(json.dumps({"classes": SUBSETS["13"][:8], "metrics": {"step": 8}}))
    return folder


def test_aggregation_is_switched_on_for_networks_that_offer_it(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "plca", "plca")
    plain, aggregating = (load_deployed(checkpoint, settings, CPU) for settings in ({}, {AGGREGATION: 0.5}))
    images = plain.network.normalise(torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8))
    with torch.no_grad():
        features = [deployed.network(images).features for deployed in (plain, aggregating)]
    assert not torch.allclose(*features)
    assert evaluating.aggregation_text(plain.config) == "no aggregation"
    assert evaluating.aggregation_text(aggregating.config) == "aggregation 0.5"
    with pytest.raises(UsageError, match=r"must lie in \[0, 1\]"):
        load_deployed(checkpoint, {AGGREGATION: 1.5}, CPU)


def test_a_network_keeps_the_kind_of_norm_it_was_trained_with(tmp_path: Path) -> None:
    for frozen in (True, False):
        settings = {"network.name": "lraspp_mobilenet_v3_large", "network.freeze_norm": frozen}
        checkpoint = write_checkpoint(tmp_path / str(frozen), "source_only", **settings)
        config = json.loads((checkpoint / "config.json").read_text())
        config["network"] |= {"freeze_norm": None, "weights": "/gone/imagenet.pth" if frozen else None}
        (checkpoint / "config.json").write_text(json.dumps(config))
        backbone = load_deployed(checkpoint, {}, CPU).network.backbone
        assert any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules()) != frozen


def test_finishes_are_found_by_name_and_best_is_a_trial() -> None:
    def row(name: str, kind: str, best: float) -> Row:
        return Row(name, "sdca", kind, "finished", best, 8, best, {}, f"id-{name}", f"/{name}", None)

    board = Leaderboard("s", "target_val/miou", [row("finish-a", "finish", 0.9), row("a", "trial", 0.8)], None)
    kinds = ("trial", "finish")
    assert [pick_run(board, name, kinds).name for name in ("best", "finish-a", "id-a")] == ["a", "finish-a", "a"]
    with pytest.raises(UsageError, match="Those are: a"):
        pick_run(board, "finish-a")


class NearestColor(Segmenter):
    """Answers with the class of the nearest display colour, at a quarter of the size: often right, often wrong."""

    def __init__(self) -> None:
        head = nn.Conv2d(3, len(NAMES), 1)
        super().__init__(nn.AvgPool2d(4), head, feature_channels=3, num_classes=len(NAMES))
        colors = self.normalise(torch.tensor(CITYSCAPES.colors, dtype=torch.uint8)[:, :, None, None])
        head.weight.data = 2 * colors
        head.bias.data = -colors.square().sum((1, 2, 3))

    def forward(self, images: torch.Tensor) -> SegmenterOutput:
        features = self.backbone(images)
        return SegmenterOutput(self.head(features), features)


def write_labels(root: Path, *, without: tuple[str, ...] = ()) -> None:
    """Random Cityscapes validation labels of all ids, in blocks, a part of them void, and images beside them."""
    random = np.random.default_rng(0)
    colors = np.zeros((34, 3), int)
    colors[[CITYSCAPES_IDS[name] for name in NAMES]] = CITYSCAPES.colors
    for index, (height, width) in enumerate([(64, 128), (64, 128), (80, 96)]):
        city = ("aachen", "ulm")[index % 2]
        ids = random.integers(0, 34, (height // 8, width // 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        ids[:5] = 3
        image = np.clip(colors[ids] + random.integers(-60, 60, (height, width, 3)), 0, 255).astype(np.uint8)
        ids[np.isin(ids, [CITYSCAPES_IDS[name] for name in without])] = 0
        for split in ("train", "val"):
            for part, suffix, content in (("leftImg8bit", "leftImg8bit", image), ("gtFine", "gtFine_labelIds", ids)):
                folder = root / part / split / city
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(folder / f"{city}_{index:06d}_000019_{suffix}.png")


def judged(root: Path, predictions: Path) -> dict[str, Any]:
    """What cityscapesscripts says, having looked for the predictions in its own way."""
    arguments = official.CArgs()
    options = {"evalInstLevelScore": False, "JSONOutput": False, "quiet": True}
    vars(arguments).update(vars(official.args), **options, predictionPath=str(predictions), predictionWalk=None)
    truths = sorted(str(path) for path in root.glob("gtFine/val/*/*_gtFine_labelIds.png"))
    found = [official.getPrediction(arguments, truth) for truth in truths]
    result: dict[str, Any] = official.evaluateImgLists(found, truths, arguments)
    return result


def test_counts_and_iou_equal_those_of_cityscapesscripts(tmp_path: Path) -> None:
    root, narrow = tmp_path / "cityscapes", tmp_path / "without"
    write_labels(root)
    write_labels(narrow, without=("terrain", "truck", "train"))
    config = resolve("source_only", {"data.source": f"cityscapes:{root}", "data.target": f"cityscapes:{root}"})
    deployed = Deployed(NearestColor().eval(), config, NAMES, 0)
    images, labelled = target_images(config, NAMES)
    assert labelled == list(NAMES)
    submission = Submission(tmp_path / "predictions", NAMES)
    counts = evaluate_target(deployed, images, Inference(), CPU, submission).confusion

    expected = judged(root, tmp_path / "predictions")
    ids = [CITYSCAPES_IDS[name] for name in NAMES]
    assert counts.tolist() == np.array(expected["confMatrix"])[np.ix_(ids, ids)].tolist()
    assert counts.sum() > 10_000
    ours = score(counts, NAMES, protocol_of("cityscapes-19", NAMES, labelled))
    assert ours.iou == {name: expected["classScores"][name] for name in NAMES}
    assert ours.miou == expected["averageScoreClasses"]
    assert 0.1 < ours.miou < 0.9

    # It knows no subsets: give it labels without the classes that SYNTHIA lacks, and average what it says of the rest.
    expected = judged(narrow, tmp_path / "predictions")
    for size in ("16", "13"):
        subset = protocol_of(f"cityscapes-{size}", NAMES, labelled)
        ours = score(counts, NAMES, subset)
        values = {name: expected["classScores"][name] for name in SUBSETS[size]}
        assert subset.metric == f"miou_{size}"
        assert ours.iou == values
        assert ours.miou == sum(values.values()) / int(size)


def test_labels_are_numbered_as_the_network_numbers_its_classes(tmp_path: Path) -> None:
    root = tmp_path / "cityscapes"
    write_labels(root)
    config = resolve("source_only", {"data.source": f"cityscapes:{root}", "data.target": f"cityscapes:{root}"})
    whole, _ = target_images(config, NAMES)
    names = ("Traffic_Light", "unicorn", "road")
    own, labelled = target_images(config, names)
    assert labelled == ["road", "Traffic_Light"]
    for before, after in ((NAMES.index("traffic light"), 0), (NAMES.index("road"), 2)):
        assert torch.equal(whole.label(0) == before, own.label(0) == after)
    assert set(own.label(0).unique().tolist()) <= {0, 2, IGNORE_INDEX}
    assert protocol_of("auto", names, labelled).averaged == {"road", "Traffic_Light"}
    with pytest.raises(UsageError, match="The data must share classes with the network, which has unicorn"):
        target_images(config, ["unicorn"])


def test_sixteen_classes_are_enough_for_synthia_and_not_for_gta5() -> None:
    names = SUBSETS["16"]
    assert protocol_of("cityscapes-16", names, names).averaged == set(names)
    thirteen = protocol_of("cityscapes-13", names, names)
    assert thirteen.averaged == set(SUBSETS["13"])
    assert thirteen.counted == set(names), "wall, fence and pole are misses still"
    with pytest.raises(UsageError, match="lacks terrain, truck, train: the network was trained for 16 classes"):
        protocol_of("cityscapes-19", names, names)
    with pytest.raises(UsageError, match="lacks train: the data label 18 classes"):
        protocol_of("cityscapes-19", NAMES, [name for name in NAMES if name != "train"])


def test_predictions_of_other_classes_have_no_label_id(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it also has unicorn"):
        Submission(tmp_path / "predictions", ["road", "unicorn"])
    assert not (tmp_path / "predictions").exists()


def test_the_configuration_of_the_network_is_otherwise_kept() -> None:
    network = NetworkConfig(name="compact", align_corners=False)
    assert _untrained(network, ["backbone.stem.0.weight"]) == dataclasses.replace(network, freeze_norm=False)
