"""Pretrained weights in the storage folder: found by trials, told with their licence, or refused at once."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, ClassVar

import pytest
import timm
import torch
import torchvision
from conftest import TINY
from huggingface_hub import constants
from mlflow import MlflowClient
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file, save

import segadapt as api
from segadapt.platform.deployment.export import CARD, Origin, load_network
from segadapt.platform.doctor.findings import Examination
from segadapt.platform.doctor.storage import storage_findings
from segadapt.platform.experiment.estimate import weights_notes
from segadapt.platform.settings.config import resolve
from segadapt.platform.storage.folders import Place, Storage
from segadapt.platform.storage.stage_keys import stage_keys
from segadapt.platform.storage.weights import (
    FETCHED,
    WeightsOrigin,
    licence_note,
    weights_hash,
    weights_origin,
    with_stored_weights,
)
from segadapt.platform.tracking.descriptions import origin_of_tags, weights_tags
from segadapt.platform.trial.spec import TrialSpec
from segadapt.platform.trial.training import train
from segadapt.trainables.core.networks import NetworkConfig, TimmBackbone, build_segmenter
from segadapt.trainables.core.networks.hub import full_name, model_card

VIT = "timm:test_vit"
TAGGED = "timm:test_vit.r160_in1k"
PRETRAINED = NetworkConfig(name=VIT, weights="pretrained")

Call = Callable[..., CompletedProcess[str]]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "runs")


def saved(folder: Path, seed: int = 0, model: str = "test_vit", name: str = "vit.pth") -> str:
    """Write random weights of a model as timm names them; returns the file."""
    torch.manual_seed(seed)
    torch.save(timm.create_model(model).state_dict(), folder / name)
    return str(folder / name)


def encoder_of(network: NetworkConfig) -> dict[str, torch.Tensor]:
    backbone = build_segmenter(num_classes=3, **vars(network)).backbone
    assert isinstance(backbone, TimmBackbone)
    return backbone.encoder.state_dict()


def test_a_file_is_kept_by_its_hash_with_its_source_and_licence(place: Place, tmp_path: Path) -> None:
    stored = api.weights_fetch(VIT, saved(tmp_path), licence="cc-by-nc-4.0", place=place)
    path = stored.path(place.folders)
    assert path.name == f"{hashlib.sha256(path.read_bytes()).hexdigest()}.safetensors"
    assert (stored.network, stored.source, stored.licence) == (TAGGED, str(tmp_path / "vit.pth"), "cc-by-nc-4.0")
    assert stored.bytes == path.stat().st_size
    assert api.weights_list(place=place) == [stored]
    state = torch.load(tmp_path / "vit.pth", weights_only=True)
    kept = load_file(path)
    assert kept.keys() == state.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in state.items())
    assert api.weights_fetch(VIT, saved(tmp_path), place=Place(tmp_path / "other")).sha256 == stored.sha256


def test_pretrained_is_what_the_storage_has_wherever_it_lies(place: Place, tmp_path: Path) -> None:
    assert with_stored_weights(PRETRAINED, place.folders) == PRETRAINED
    stored = api.weights_fetch(VIT, saved(tmp_path), place=place)
    published = torch.load(tmp_path / "vit.pth", weights_only=True)
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    (tmp_path / "vit.pth").unlink()
    moved = Storage(tmp_path / "moved")
    for name in (VIT, TAGGED):
        encoder = encoder_of(with_stored_weights(dataclasses.replace(PRETRAINED, name=name), moved))
        assert all(torch.equal(tensor, published[key]) for key, tensor in encoder.items())
    assert weights_hash(PRETRAINED, moved) == stored.sha256
    random = NetworkConfig(name=VIT)
    assert with_stored_weights(random, moved) == random
    assert weights_hash(random, moved) is None


def test_a_trials_process_starts_from_them_and_what_it_deploys_names_them(place: Place, tmp_path: Path) -> None:
    published = timm.create_model("test_resnet")
    for buffer in published.buffers():
        if buffer.is_floating_point():
            buffer.uniform_()
    torch.save(published.state_dict(), tmp_path / "resnet.pth")
    stored = api.weights_fetch("timm:test_resnet", str(tmp_path / "resnet.pth"), licence="cc-by-nc-4.0", place=place)
    settings = {"network.name": "timm:test_resnet", "network.weights": "pretrained", "trainer.steps": 1}
    config = resolve("source_only", {**TINY, **settings})
    checkpoint = tmp_path / "checkpoint"

    def deliver(_reported: Any, write: Callable[[Path], None] | None) -> None:
        assert write is not None
        shutil.rmtree(checkpoint, ignore_errors=True)
        checkpoint.mkdir()
        write(checkpoint)

    train(TrialSpec(place.folders, "test", {"source_only": config}).trial("trial", {}), deliver, None)
    origin = origin_of_tags(weights_tags(weights_origin(config.network, place.folders)))
    assert origin == WeightsOrigin(stored.source, "cc-by-nc-4.0", stored.sha256)
    deployed, card = load_network(Origin(checkpoint, weights=origin), torch.device("cpu"))
    means = {name: tensor for name, tensor in published.state_dict().items() if name.endswith("running_mean")}
    frozen = {name.rpartition("encoder.")[2]: tensor for name, tensor in deployed.state_dict().items()}
    assert len(means.keys() & frozen.keys()) > 5
    for name in means.keys() & frozen.keys():
        assert torch.equal(frozen[name], means[name]), "frozen batch norm keeps what it started from"
    assert (card.weights, card.weights_licence, card.weights_sha256) == (stored.source, "cc-by-nc-4.0", stored.sha256)
    alone = load_network(Origin(checkpoint), torch.device("cpu"))[1]
    assert (alone.weights, alone.weights_licence) == ("timm:test_resnet pretrained", "unknown")


def test_the_papers_networks_start_from_stored_weights_too(place: Place, tmp_path: Path) -> None:
    original = torchvision.models.mobilenet_v3_large(weights=None)
    torch.save(original.state_dict(), tmp_path / "mobile.pth")
    api.weights_fetch("lraspp_mobilenet_v3_large", str(tmp_path / "mobile.pth"), place=place)
    network = NetworkConfig(name="lraspp_mobilenet_v3_large", weights="pretrained")
    segmenter = build_segmenter(num_classes=3, **vars(with_stored_weights(network, place.folders)))
    kept = {tuple(tensor.shape): tensor for tensor in segmenter.backbone.state_dict().values() if tensor.ndim == 4}
    assert any(torch.equal(tensor, original.state_dict()["features.0.0.weight"]) for tensor in kept.values())


def test_a_plan_tells_from_which_weights_its_methods_start(place: Place, tmp_path: Path) -> None:
    stored = api.weights_fetch(VIT, saved(tmp_path), licence="mit", place=place)
    asked = {"network.name": VIT, "network.weights": "pretrained"}
    plan = api.plan(["sdca", "plca"], {f"sdca.{key}": value for key, value in asked.items()}, place=place)
    assert weights_notes(plan.record.configs, place.folders) == [
        f"sdca starts from the weights of {stored.source}, licence mit."
    ]


def test_shared_stages_of_other_weights_have_other_keys() -> None:
    config = resolve("sdca", {"network.name": VIT, "network.weights": "pretrained"})
    keys = [stage_keys(config, "data", weights=weights)[0].hash for weights in (None, "one", "another")]
    assert len(set(keys)) == 3


def test_a_network_has_one_set_of_weights_and_a_licence_that_may_be_told_later(place: Place, tmp_path: Path) -> None:
    first = api.weights_fetch(VIT, saved(tmp_path), place=place)
    assert first.licence == "unknown"
    assert api.weights_fetch(VIT, licence="mit", place=place).licence == "mit"
    assert api.weights_fetch(VIT, saved(tmp_path), place=place).licence == "mit", "once told, it stays"
    assert [stored.licence for stored in api.weights_list(place=place)] == ["mit"]
    with pytest.raises(api.UsageError, match=r"must have one set of weights .* but timm:test_vit\.r160_in1k has those"):
        api.weights_fetch(TAGGED, saved(tmp_path, seed=1), place=place)
    assert [stored.sha256 for stored in api.weights_list(place=place)] == [first.sha256]
    files = sorted(path.name for path in place.folders.weights.iterdir())
    assert files == [".lock", first.path(place.folders).name, "timm-test_vit.r160_in1k.json"]


def test_of_two_that_store_at_once_both_find_the_weights_whole(place: Place, tmp_path: Path) -> None:
    file = saved(tmp_path)
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda _: api.weights_fetch(VIT, file, place=place), range(2))
    (stored,) = api.weights_list(place=place)
    assert first.sha256 == second.sha256 == stored.sha256
    assert hashlib.sha256(stored.path(place.folders).read_bytes()).hexdigest() == stored.sha256


def test_others_may_read_what_one_has_stored(place: Place, tmp_path: Path) -> None:
    path = api.weights_fetch(VIT, saved(tmp_path), place=place).path(place.folders)
    (tmp_path / "usual").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


@pytest.mark.parametrize(
    ("network", "weights", "message"),
    [
        ("timm:test_vot", "FILE", "Near: test_vit"),
        ("vgg19", "FILE", "A network must be one of compact"),
        ("timm:test_resnet", "FILE", "network.weights must be those of timm's 'test_resnet'"),
        ("compact", "FILE", "but fill 2 of its 29 tensors"),
        ("compact", "PART", "must fill the backbone of 'compact', but lack"),
        (
            "compact",
            "pretrained",
            "run `segadapt weights fetch compact WEIGHTS`, where WEIGHTS is a .pth",
        ),
        (
            "deeplabv2_resnet101",
            "pretrained",
            "safetensors file, or one of IMAGENET1K_V1, IMAGENET1K_V2.",
        ),
        (VIT, "absent.pth", "must be an existing file, but there is none at"),
        (VIT, "IMAGENET1K_V1", "must be none, pretrained, or a .pth"),
        (VIT, "", "must be none, pretrained, or a .pth"),
    ],
)
def test_what_cannot_be_stored_is_one_clear_error_and_leaves_nothing(
    network: str, weights: str, message: str, place: Place, tmp_path: Path
) -> None:
    whole = build_segmenter("compact", 2).state_dict()
    torch.save(
        {name: tensor for name, tensor in whole.items() if "stages.context.0" not in name}, tmp_path / "part.pth"
    )
    weights = {"FILE": saved(tmp_path), "PART": str(tmp_path / "part.pth")}.get(weights, weights)
    with pytest.raises(api.UsageError, match=re.escape(message)):
        api.weights_fetch(network, weights, place=place)
    assert not list(tmp_path.glob("runs/weights/*"))


def test_a_licence_without_a_name_is_refused(place: Place, tmp_path: Path) -> None:
    with pytest.raises(api.UsageError, match=r"--licence must name a licence, such as apache-2\.0, but got ' '"):
        api.weights_fetch(VIT, saved(tmp_path), licence=" ", place=place)


def test_damaged_weights_are_refused_before_they_are_used(place: Place, tmp_path: Path) -> None:
    stored = api.weights_fetch(VIT, saved(tmp_path), place=place)
    path = stored.path(place.folders)
    path.write_bytes(path.read_bytes()[:-100])
    for ask in (
        lambda: api.weights_list(place=place),
        lambda: api.plan("sdca", {"network.name": VIT, "network.weights": "pretrained"}, place=place),
    ):
        with pytest.raises(api.UsageError, match=r"those of timm-test_vit\.r160_in1k are not: .* bytes, not .* Remove"):
            ask()


def test_without_weights_and_hub_a_trial_is_refused_at_once_with_what_to_do(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(api.UsageError) as refused:
        api.plan("sdca", {"network.name": VIT, "network.weights": "pretrained"}, place=place)
    assert "the weights of 'test_vit' could not be had: http://127.0.0.1:9 does not answer" in str(refused.value)
    assert f"Run `segadapt weights fetch {VIT}` on a machine with network access" in str(refused.value)
    assert "Retrying" not in caplog.text, "the hub's client tries for 46 s"
    assert not (tmp_path / "runs").exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as a download asks for: one model's file and its card."""

    weights = b""
    asked: ClassVar[list[str]]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        type(self).asked.append(self.path)
        card = {"id": "timm/test_vit.r160_in1k", "gated": "manual", "siblings": [], "tags": [], "downloads": 0}
        content = {
            "/": b"",
            "/timm/test_vit.r160_in1k/resolve/main/model.safetensors": self.weights,
            "/api/models/timm/test_vit.r160_in1k": json.dumps(card).encode(),
        }.get(self.path)
        self.send_response(200 if content is not None else 404)
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if body and content:
            self.wfile.write(content)

    def log_message(self, *_arguments: Any) -> None:
        """Print nothing."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[Hub]]]:
    """A hub on this machine with timm's weights of a tiny transformer; its address and what it was asked."""

    class Served(Hub):
        weights = save(timm.create_model("test_vit").state_dict())
        asked: ClassVar[list[str]] = []

    with ThreadingHTTPServer(("127.0.0.1", 0), Served) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", Served
        server.shutdown()


def test_timms_weights_are_downloaded_with_their_licence_and_then_found_without_the_hub(
    hub: tuple[str, type[Hub]], segadapt: Call, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, served = hub
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    done = segadapt("weights", "fetch", VIT)
    assert done.returncode == 0, done.stderr
    (stored,) = api.weights_list(place=place)
    assert (stored.source, stored.licence) == ("timm/test_vit.r160_in1k", "apache-2.0, gated")
    assert "has terms of its own: read them" in done.stdout
    kept = load_file(stored.path(place.folders))
    assert all(torch.equal(kept[name], tensor) for name, tensor in load_tensors(served.weights).items())

    asked = len(served.asked)
    listed = segadapt("weights", "list", "--json")
    assert json.loads(listed.stdout) == [dataclasses.asdict(stored)]
    assert api.weights_fetch(VIT, place=place) == stored
    assert len(served.asked) == asked, "what is stored is not asked for again"


def test_what_the_hubs_client_has_kept_is_stored_without_the_hub(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    code = f"""
from huggingface_hub import constants
from segadapt.platform.storage.folders import Place
from segadapt.platform.storage.weights import store_pretrained
from segadapt.trainables.core.networks import NetworkConfig, build_segmenter
network = NetworkConfig(name={VIT!r}, weights="pretrained")
build_segmenter(num_classes=3, **vars(network))
constants.ENDPOINT = "http://127.0.0.1:9"
store_pretrained([network, NetworkConfig(), network], Place({str(tmp_path / "runs")!r}).prepared(), print)
"""
    address, served = hub
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_ENDPOINT": address}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"weights of {TAGGED} are kept in {tmp_path / 'runs' / 'weights'}: 1.")
    assert done.stdout.endswith(" MiB, from timm/test_vit.r160_in1k, licence apache-2.0\n")
    (stored,) = api.weights_list(place=Place(tmp_path / "runs"))
    kept = load_file(stored.path(Storage(tmp_path / "runs")))
    assert all(torch.equal(kept[name], tensor) for name, tensor in load_tensors(served.weights).items())


def test_a_licence_is_what_timm_says_and_unknown_is_said_as_such(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    origin = weights_origin(NetworkConfig(name="timm:vit_small_patch16_dinov3", weights="pretrained"), storage)
    assert origin is not None
    assert (origin.source, origin.licence) == ("timm/vit_small_patch16_dinov3.lvd1689m", "dinov3-license")
    assert model_card("dla60_res2net").licence == "unknown"
    assert full_name("vit_base_patch14_dinov2") == "vit_base_patch14_dinov2.lvd142m"
    assert weights_origin(NetworkConfig(), storage) is None
    assert weights_origin(NetworkConfig(weights="none"), storage) is None
    from_file = weights_origin(NetworkConfig(name=VIT, weights="/data/vit.pth"), storage)
    assert from_file is not None
    assert (from_file.source, from_file.licence) == ("/data/vit.pth", "unknown")
    published = weights_origin(NetworkConfig(name="deeplabv2_resnet101", weights="IMAGENET1K_V1"), storage)
    assert published is not None
    assert published.source == "torchvision's resnet101 IMAGENET1K_V1"


@pytest.mark.parametrize(
    ("licence", "said"),
    [
        ("apache-2.0", None),
        ("mit", None),
        ("cc-by-4.0", None),
        ("cc-by-nc-4.0", "forbids commercial use"),
        ("fair-noncommercial-research-license", "forbids commercial use"),
        ("dinov3-license", "terms of its own"),
        ("apache-2.0, gated", "terms of its own"),
        ("unknown", "a licence that is unknown here"),
    ],
)
def test_one_sentence_tells_of_a_licence_that_not_everybody_may_use(licence: str, said: str | None) -> None:
    note = licence_note("timm/x", licence)
    assert (note is None) if said is None else (note is not None and said in note and "timm/x" in note)


def test_doctor_names_damaged_weights_and_removes_what_a_killed_fetch_left(place: Place, tmp_path: Path) -> None:
    stored = api.weights_fetch(VIT, saved(tmp_path), place=place)
    left, in_work = (place.folders.weights / f"{FETCHED}{name}" for name in ("left", "in-work"))
    for folder in (left, in_work):
        folder.mkdir()
        (folder / "whole.safetensors").write_bytes(b"half")
    for path in (left / "whole.safetensors", left):
        os.utime(path, (0, 0))
    what = Examination(place)
    (finding,) = (entry for entry in storage_findings(what) if entry.level == "fault")
    assert left.name in finding.text
    assert finding.mended().repaired
    assert (left.exists(), in_work.exists()) == (False, True)
    assert [entry for entry in storage_findings(what) if entry.level == "fault"] == []
    stored.path(place.folders).unlink()
    (damaged,) = (entry for entry in storage_findings(what) if entry.level == "fault")
    assert "Remove" in damaged.text
    assert "fetch them again" in damaged.text


@pytest.mark.slow
def test_a_licence_travels_from_the_storage_to_runs_report_exported_file_and_registry(
    place: Place, tmp_path: Path, segadapt: Call
) -> None:
    stored = api.weights_fetch(VIT, saved(tmp_path), licence="cc-by-nc-4.0", place=place)
    settings = {**TINY, "network.name": VIT, "network.weights": "pretrained", "trainer.steps": 2, "warmup.steps": 2}
    result = api.search("sdca", settings, trials=1, name="licensed", place=place)
    assert result.failed == 0
    client = MlflowClient(place.tracking_url)
    (experiment,) = client.search_experiments(filter_string="name = 'licensed'")
    runs = client.search_runs([experiment.experiment_id])
    tagged = [run for run in runs if run.data.tags.get("segadapt.weights_licence") == "cc-by-nc-4.0"]
    assert {run.data.tags["segadapt.kind"] for run in tagged} == {"trial", "stage"}
    assert {run.data.tags["segadapt.weights_sha256"] for run in tagged} == {stored.sha256}

    page = api.report("licensed", str(tmp_path / "page.html"), place=place).read_text()
    assert f"Networks began from the weights of {stored.source}, licence cc-by-nc-4.0" in page

    done = segadapt("export", "best", "--search", "licensed", "--out", "exported")
    assert done.returncode == 0, done.stderr
    assert f"Weights from {stored.source} are under cc-by-nc-4.0, which forbids commercial use" in done.stdout
    card = json.loads((tmp_path / "exported" / CARD).read_text())
    assert (card["weights"], card["weights_licence"]) == (stored.source, "cc-by-nc-4.0")
    assert card["weights_sha256"] == stored.sha256
    version = client.get_model_version("licensed", "1")
    assert version.tags["segadapt.weights_licence"] == "cc-by-nc-4.0"
    assert "licence cc-by-nc-4.0" in str(version.description)
