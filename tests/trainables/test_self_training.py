"""Promises of self-training in rounds: killed anywhere it gives the same bytes; its rules, its restart, its teacher."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import Reports, keeping_losses, toy_config, toy_trainer

from segadapt.platform.deployment.deployed import load_deployed
from segadapt.platform.errors import UsageError
from segadapt.platform.experiment.finishing import finish_settings
from segadapt.platform.settings.config import TrialConfig, flatten, resolve
from segadapt.platform.storage.checkpoints import CONFIG
from segadapt.platform.trial.training import build_method
from segadapt.trainables import METHODS, method_class
from segadapt.trainables.core.data.batch import DomainBatch
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.labelling.files import PseudoLabelFolder, PseudoLabelWriter
from segadapt.trainables.core.method import trained_parameters
from segadapt.trainables.core.training import reporting
from segadapt.trainables.core.training.checkpoint import MANIFEST, file_hash, load_state, tensors_hash
from segadapt.trainables.core.training.trainer import Trainer
from segadapt.trainables.self_training import SelfTraining

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["segadapt.trainables.self_training", "segadapt.platform.trial.training", "toy"])

KEEPABLE = ("sdca", "bicl", "drsl", "clst", "plca")
RULES = ("quantile", "fixed", "global_local", "self_paced", "ensemble")


def rounds_trainer(folder: Path, **values: Any) -> tuple[Trainer, Reports]:
    """Two rounds from random weights, without the warm-up."""
    config = toy_config("self_training", **{"method__rounds": 2, "trainer__steps": 4, **values})
    plan = SelfTraining.plan(config.method)[1:]
    return toy_trainer(config, folder, plan)


def killing(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """Return the function, except that the process is killed within its call number `calls`."""
    left = calls

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return counted


def session(folder: Path, killed_in: str | None) -> None:
    """Start, or go on from the last whole checkpoint; the process kills itself in the second round."""
    torch.set_num_threads(1)
    trainer, reports = rounds_trainer(folder, trainer__eval_batch_size=4)
    done = len(list(reports.folder.glob(f"*/{MANIFEST}")))
    reports.metrics = [{}] * done
    if killed_in == "labelling":
        PseudoLabelWriter.write = killing(PseudoLabelWriter.write, 5)  # type: ignore[method-assign]
    if killed_in == "training":
        trainer.method.after_step = killing(trainer.method.after_step, 3)  # type: ignore[method-assign]
    if killed_in == "evaluation":
        reporting.label_free_scores = killing(reporting.label_free_scores, 2)
    trainer.run(reports.checkpoint(done - 1) if done else None)


def run_session(folder: Path, killed_in: str | None) -> None:
    process = PROCESSES.Process(target=session, args=(folder, killed_in))
    process.start()
    process.join(120)
    assert process.exitcode == (0 if killed_in is None else -signal.SIGKILL)


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of the last state and of everything that the rounds wrote."""
    files = [path for path in (folder / "artifacts").rglob("*") if path.is_file()]
    last = max((folder / "checkpoints").iterdir())
    return {str(path.relative_to(folder)): file_hash(path) for path in [*files, last / "state.pt"]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_session(folder, None)
    found = hashes(folder)
    assert sum(name.endswith(".parquet") for name in found) == 2
    return found


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["labelling", "training", "evaluation"])
def test_killed_in_any_phase_it_gives_the_same_bytes(phase: str, undisturbed: dict[str, str], tmp_path: Path) -> None:
    run_session(tmp_path, phase)
    assert not list((tmp_path / "checkpoints").glob("001")), "killed in the second round"
    run_session(tmp_path, None)
    assert hashes(tmp_path) == undisturbed


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_labels_every_round_and_says_how(rule: str, tmp_path: Path) -> None:
    trainer, reports = rounds_trainer(tmp_path, method__rule=rule, method__confidence_cap=0.12, trainer__steps=2)
    first = tensors_hash(trainer.method.segmenter.state_dict())
    trainer.run()
    found = [PseudoLabelFolder(trainer.folder / f"round_{n}", trainer.data.target.ids).provenance for n in (1, 2)]
    assert [made["rule"] for made in found] == [rule, rule]
    assert [made["stage"] for made in found] == ["round_1", "round_2"]
    assert found[0]["network"] == first
    assert found[1]["network"] == tensors_hash(network_of(reports, 0)), "that of the checkpoint before"
    for made in found:
        assert made["data"] == trainer.data.fingerprint
        assert 0 < made["labelled_share"] <= 1
        assert sum(made["class_shares"]) == pytest.approx(1)


def network_of(reports: Reports, index: int) -> dict[str, torch.Tensor]:
    state = load_state(reports.checkpoint(index))
    prefix = state["deployed"] + "."
    return {name.removeprefix(prefix): t for name, t in state["state"].items() if name.startswith(prefix)}


def test_a_restart_trains_the_first_weights_on_labels_of_the_trial(tmp_path: Path) -> None:
    config = toy_config("self_training", method__restart=True, trainer__evaluate_start=True, trainer__steps=2)
    trainer, reports = toy_trainer(config, tmp_path, SelfTraining.plan(config.method)[1:])
    first = tensors_hash(trainer.method.segmenter.state_dict())
    trial = build_method(replace(config, seed=7), len(load_data(config.data)[0].classes))
    trainer.method.segmenter.load_state_dict(trial.segmenter.state_dict())
    trainer.run()
    labels = PseudoLabelFolder(trainer.folder / "round_1", trainer.data.target.ids)
    assert labels.provenance["network"] == tensors_hash(trial.segmenter.state_dict()) != first
    assert tensors_hash(network_of(reports, 0)) == first, "evaluated before the first step"


def test_the_average_of_the_weights_labels_the_rounds_after_the_first(tmp_path: Path) -> None:
    trainer, reports = rounds_trainer(tmp_path, method__teacher=True, method__teacher_momentum=0.5)
    first = tensors_hash(trainer.method.segmenter.state_dict())
    trainer.run()
    state = load_state(reports.checkpoint(0))["state"]
    prefix = "teacher.network."
    teacher = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    made = [PseudoLabelFolder(trainer.folder / f"round_{n}", trainer.data.target.ids).provenance for n in (1, 2)]
    assert [found["network"] for found in made] == [first, tensors_hash(teacher)]
    assert tensors_hash(teacher) != tensors_hash(network_of(reports, 0))


def test_resuming_with_restart_and_teacher_is_bit_exact(tmp_path: Path) -> None:
    values = {"method__restart": True, "method__teacher": True, "trainer__eval_every": 1}
    whole, reports = rounds_trainer(tmp_path, **values)
    whole.run()
    last = tensors_hash(load_state(reports.checkpoint(3))["state"])
    for index in (1, 2):  # the end of the first round, the middle of the second
        trainer, _ = rounds_trainer(tmp_path / str(index), **values)
        trainer.folder = whole.folder
        trainer.run(reports.checkpoint(index))
        assert tensors_hash(trainer.method.state_dict()) == last


def test_without_source_weight_only_the_target_trains(tmp_path: Path) -> None:
    trainer, reports = rounds_trainer(tmp_path, method__source_weight=0.0, trainer__steps=2)
    trainer.run()
    assert {name for name in reports.metrics[-1] if name.startswith("loss/")} == {
        "loss/target_cross_entropy",
        "loss/total",
    }


@pytest.mark.parametrize("name", [method.name for method in METHODS])
def test_every_method_has_a_rule(name: str) -> None:
    settings = method_class(name).labelling(toy_config(name).method)
    config = toy_config("self_training", **{f"method__{key}": value for key, value in settings.items()})
    assert config.method.rule in RULES


@dataclass(frozen=True)
class Kept:
    """A trial, and a finish of it that keeps its losses."""

    trial: TrialConfig
    config: TrialConfig
    start: Path
    last: dict[str, Any]
    """What the trial reported last."""
    trainer: Trainer
    reports: Reports

    def begun(self, folder: Path) -> Trainer:
        """Return the finish before its first step."""
        trainer, _ = toy_trainer(self.config, folder, SelfTraining.plan(self.config.method)[1:])
        trainer.start_from(self.start)
        return trainer


@pytest.fixture(scope="module", params=KEEPABLE)
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp(request.param)
    own = {
        "bicl": {"method__rounds": 1},
        "drsl": {"method__rounds": 1},
        "clst": {"method__rounds": 1, "method__projection": 4},
    }
    trial = toy_config(
        request.param, warmup__steps=1, trainer__steps=3, trainer__eval_every=3, **own.get(request.param, {})
    )
    trained, found = toy_trainer(trial, folder / "trial")
    trained.run()
    config = keeping_losses(trial, trainer__eval_every=1, trainer__evaluate_start=True, method__target_weight=0.5)
    trainer, reports = toy_trainer(config, folder / "finish", SelfTraining.plan(config.method)[1:])
    start = found.checkpoint(len(found.metrics) - 1)
    trainer.start_from(start)
    trainer.run()
    return Kept(trial, config, start, found.metrics[-1], trainer, reports)


def test_kept_losses_go_on_from_the_whole_state_of_the_trial(kept: Kept, tmp_path: Path) -> None:
    begun = kept.begun(tmp_path).method
    assert isinstance(begun, SelfTraining)
    assert begun.kept is not None
    assert tensors_hash(begun.kept.state_dict()) == tensors_hash(load_state(kept.start)["state"])
    first = kept.reports.metrics[0]
    for name in ("target_val/miou", "source_val/miou"):
        assert first[name] == kept.last[name], "evaluated before the first step"


def test_kept_losses_are_those_of_the_method_and_of_the_round_s_labels(kept: Kept, tmp_path: Path) -> None:
    begun = kept.begun(tmp_path)
    trial = build_method(kept.trial, 8)
    trial.load_state_dict(load_state(kept.start)["state"])
    images = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(2 * 32 * 64).reshape(2, 32, 64) // 97 % 8
    batch = DomainBatch(images, labels, images.flip(0), torch.tensor([3, 1]), labels.flip(1))
    found = begun.method.train()(batch, 0)
    expected = trial.to(memory_format=torch.channels_last).train()(batch, 0)
    expected["target_cross_entropy"] = 0.5 * expected["target_cross_entropy"]
    assert found.keys() == expected.keys()
    for name, term in expected.items():
        assert term.requires_grad
        torch.testing.assert_close(found[name], term, msg=name)
    reported = kept.reports.metrics[-1]
    assert {f"loss/{name}" for name in expected} | {"loss/total"} == {n for n in reported if n.startswith("loss/")}
    assert reported["loss/target_cross_entropy"] > 0


def test_kept_losses_train_what_the_method_trains_and_move_its_state(kept: Kept) -> None:
    before = load_state(kept.start)["state"]
    assert isinstance(kept.trainer.method, SelfTraining)
    assert kept.trainer.method.kept is not None
    after = kept.trainer.method.kept.state_dict()
    moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    own = {
        "sdca": {"feature_statistics", "output_statistics"},
        "bicl": {"source_stem", "calibration"},
        "drsl": {"embedding", "modes"},
        "clst": {"projection", "source_centroids"},
        "plca": {"aggregating_segmenter"},
    }
    assert moved == {"segmenter"} | own[kept.trial.method_name]


def test_resuming_with_kept_losses_is_bit_exact(kept: Kept, tmp_path: Path) -> None:
    last = tensors_hash(kept.trainer.method.state_dict())
    for index in (2, 3):  # the end of the first round, the middle of the second
        trainer, _ = toy_trainer(kept.config, tmp_path / str(index), kept.trainer.plan)
        trainer.folder = kept.trainer.folder
        trainer.run(kept.reports.checkpoint(index))
        assert tensors_hash(trainer.method.state_dict()) == last


def test_a_finish_that_kept_losses_is_deployed_as_its_method_is(kept: Kept) -> None:
    checkpoint = kept.reports.checkpoint(len(kept.reports.metrics) - 1)
    (checkpoint / CONFIG).write_text(json.dumps(kept.config.as_dict()))
    found = load_deployed(checkpoint, {}, torch.device("cpu"))
    images = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    assert isinstance(kept.trainer.method, SelfTraining)
    assert kept.trainer.method.kept is not None
    expected = kept.trainer.method.kept.deployed.eval()
    assert type(found.network) is type(expected)
    assert torch.equal(found.network(images).logits, expected(images).logits)


def test_kept_losses_leave_alone_what_none_of_them_uses() -> None:
    config = keeping_losses(toy_config("drsl", method__metric_weight=0.0))
    stage = SelfTraining.plan(config.method)[1]
    parts = {".".join(name.split(".")[:2]) for name, _ in trained_parameters(build_method(config, 8), stage)}
    assert parts == {"segmenter.backbone", "segmenter.head", "kept.embedding"}


@pytest.mark.parametrize("name", KEEPABLE)
def test_a_finish_has_the_settings_of_its_trial(name: str) -> None:
    trial = toy_config(name, seed=3, trainer__precision="fp32")
    trained = dict(flatten(json.loads(json.dumps(trial.as_dict()))))
    for keep_losses in (False, True):
        config = resolve("self_training", finish_settings(name, trained, {"method.rounds": 2}, keep_losses=keep_losses))
        again = resolve("self_training", dict(flatten(json.loads(json.dumps(config.as_dict())) | {"method_name": {}})))
        assert again == config, "as a checkpoint keeps it"
        assert (config.seed, config.data, config.trainer.precision) == (3, trial.data, "fp32")
        method = build_method(config, 8)
        assert method.deployed.align_corners == build_method(trial, 8).deployed.align_corners
        assert isinstance(method, SelfTraining)
        assert (method.kept is not None) == keep_losses
        if method.kept is not None:
            assert (method.kept.name, asdict(method.kept.config)) == (name, asdict(trial.method))


@pytest.mark.parametrize(
    ("trial", "values", "message"),
    [
        ("source_only", {}, "losses of its own on the target, but got 'source_only'. Leave out --keep-losses"),
        ("self_training", {}, "losses of its own on the target, but got 'self_training'"),
        ("sdca", {"method__restart": True}, "method.restart must be false: sdca's state is of the trained network"),
        ("bicl", {"method__split_stem": True}, "method.split_stem must be false: bicl has its own layers"),
        ("sdca", {"method__source_weight": 0.0}, "method.source_weight must stay 1.0: sdca weighs its own losses"),
        ("plca", {"method__lovasz_weight": 0.5}, "method.lovasz_weight must stay 0.75: plca weighs"),
        ("sdca", {"method__kept_settings": {"tau": 1.0}}, r"settings of sdca, but got \['tau'\]"),
        ("sdca", {"method__kept_settings": {"temperature": 0.0}}, "method.temperature must be positive"),
        ("clst", {"method__kept_settings": {"target_weight": 0}}, "method.target_weight of clst must be positive"),
    ],
)
def test_losses_that_cannot_be_kept_are_refused_with_the_reason(
    trial: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        keeping_losses(toy_config(trial), **values)


@pytest.mark.parametrize("found", [{"method": "sdca", "stage": "source_only"}, {"method": "clst", "stage": "round_1"}])
def test_losses_are_not_kept_from_the_warm_up_or_another_method(found: dict[str, str]) -> None:
    method = build_method(keeping_losses(toy_config("sdca")), 8)
    with pytest.raises(ValueError, match=r"kept_method=sdca must start from .* `segadapt finish --keep-losses`"):
        method.take_over(found)
