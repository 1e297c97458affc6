"""Promises of the trainer that hold for every method."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import toy_config, toy_trainer

from segadapt.trainables import METHODS
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.data.loading import BatchSource
from segadapt.trainables.core.data.sampling import sample_at
from segadapt.trainables.core.data.transforms import AugmentationConfig
from segadapt.trainables.core.method import SOURCE_ONLY
from segadapt.trainables.core.training.checkpoint import CorruptCheckpointError, load_state
from segadapt.trainables.core.training.interruption import PreemptedError, leave_when_terminated, training
from segadapt.trainables.core.training.reporting import NonFiniteLossError

NAMES = [method.name for method in METHODS]


def equal_state(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)  # type: ignore[arg-type]
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal_state(left[key], right[key]) for key in left)  # type: ignore[attr-defined]
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal_state, left, right))  # type: ignore[arg-type]
    return left == right


@pytest.mark.parametrize("name", NAMES)
def test_resuming_from_any_checkpoint_of_any_stage_is_bit_exact(name: str, tmp_path: Path) -> None:
    config = toy_config(name)
    trainer, whole = toy_trainer(config, tmp_path / "whole")
    trainer.run()
    last = load_state(whole.checkpoint(len(whole.metrics) - 1))
    stages = {whole.metrics[-1]["stage"]}
    for index, metrics in enumerate(whole.metrics[:-1]):
        stages.add(metrics["stage"])
        again, resumed = toy_trainer(config, tmp_path / f"resumed_{index}")
        again.folder = trainer.folder  # what stages wrote survives a restart
        again.run(whole.checkpoint(index))
        assert [entry["step"] for entry in resumed.metrics] == [e["step"] for e in whole.metrics[index + 1 :]]
        for mine, theirs in zip(resumed.metrics, whole.metrics[index + 1 :], strict=True):
            assert {k: v for k, v in mine.items() if not k.startswith("time/")} == {
                k: v for k, v in theirs.items() if not k.startswith("time/")
            }
        assert equal_state(load_state(resumed.checkpoint(len(resumed.metrics) - 1)), last)
    assert stages == {stage.name for stage in trainer.plan}


@pytest.mark.parametrize("name", NAMES)
def test_a_trial_that_is_asked_to_leave_after_every_step_is_bit_exact(name: str, tmp_path: Path) -> None:
    config = toy_config(name, trainer__eval_every=3)
    trainer, whole = toy_trainer(config, tmp_path / "whole")
    trainer.run()
    metrics: list[dict[str, Any]] = []
    left, checkpoint = 0, None
    before = signal.getsignal(signal.SIGTERM)
    leave_when_terminated()
    try:
        while not metrics or not metrics[-1]["finished"]:
            again, reports = toy_trainer(config, tmp_path / f"run_{left}")
            again.folder = tmp_path / "artifacts"
            again.method.after_step = _and_then(again.method.after_step, signal.SIGTERM)  # type: ignore[method-assign]
            with training(), contextlib.suppress(PreemptedError):
                again.run(checkpoint)
            metrics += reports.metrics
            checkpoint = reports.checkpoint(len(reports.metrics) - 1) if reports.metrics else checkpoint
            left += 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left == sum(trainer.steps.values()), "it left after every step"
    for mine, theirs in zip(metrics, whole.metrics, strict=True):
        assert {k: v for k, v in mine.items() if not k.startswith("time/")} == {
            k: v for k, v in theirs.items() if not k.startswith("time/")
        }
    assert checkpoint is not None
    assert equal_state(load_state(checkpoint), load_state(whole.checkpoint(len(whole.metrics) - 1)))


def _and_then(after_step: Callable[[int], None], number: signal.Signals) -> Callable[[int], None]:
    def call(step: int) -> None:
        after_step(step)
        signal.raise_signal(number)

    return call


@pytest.mark.parametrize("name", NAMES)
def test_every_term_is_finite_and_every_trained_parameter_learns(name: str, tmp_path: Path) -> None:
    trainer, reports = toy_trainer(toy_config(name, trainer__steps=1, warmup__steps=1), tmp_path)
    before = {key: value.clone() for key, value in trainer.method.state_dict().items()}
    trainer.run()
    losses = [value for metrics in reports.metrics for key, value in metrics.items() if key.startswith("loss/")]
    assert losses
    assert all(value == value and abs(value) < float("inf") for value in losses)
    still = [
        key
        for key, parameter in trainer.method.named_parameters()
        if key in trainer.trainable and torch.equal(parameter, before[key])
    ]
    assert not still


@pytest.mark.parametrize("name", NAMES)
def test_a_step_survives_no_labelled_source_pixel_and_no_confident_target_pixel(name: str, tmp_path: Path) -> None:
    trainer, _ = toy_trainer(toy_config(name), tmp_path)
    trainer.run()
    stage = trainer.plan[-1]
    batch = next(trainer.batches(stage))
    ignored = torch.full_like(batch.source_labels, 255)
    if batch.target_pseudo_labels is not None:
        batch = replace(batch, target_pseudo_labels=torch.full_like(batch.target_pseudo_labels, 255))
    terms = trainer.method(replace(batch, source_labels=ignored), 0)
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    assert torch.isfinite(total)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in trainer.method.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_changed_target_labels_change_no_weight(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_config(name)
    trainer, reports = toy_trainer(config, tmp_path / "true")
    trainer.run()
    _, evaluation = load_data(config.data)
    poisoned, false_reports = toy_trainer(config, tmp_path / "false")
    poisoned.evaluation = replace(evaluation, target=_Poisoned(evaluation.target))
    poisoned.run()
    assert reports.metrics[-1]["target_val/miou"] != false_reports.metrics[-1]["target_val/miou"]
    assert equal_state(trainer.method.state_dict(), poisoned.method.state_dict())


class _Poisoned:
    """Evaluation images whose labels are wrong."""

    def __init__(self, images: object) -> None:
        self._images = images
        self.ids = images.ids  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> torch.Tensor:
        return self._images.image(index)  # type: ignore[attr-defined,no-any-return]

    def label(self, index: int) -> torch.Tensor:
        return (self._images.label(index) + 1) % 8  # type: ignore[attr-defined,no-any-return]


def test_training_data_holds_no_target_label() -> None:
    data, _ = load_data(toy_config("sdca").data)
    assert not hasattr(data.target, "label")
    assert "target" not in "".join(vars(data.target).keys()) or not any("label" in key for key in vars(data.target))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [*([name] for name in NAMES), ["drsl", "finish"], ["sdca", "finish", "lora"], ["bicl", "online"]],
    ids=" ".join,
)
def test_two_workers_equal_one_on_the_joined_batch(words: list[str], tmp_path: Path) -> None:
    name, *added = words
    script = Path(__file__).with_name("two_workers.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), name, str(workers), str(rank), str(tmp_path / f"workers_{workers}"), *added],
            stderr=subprocess.PIPE,
            text=True,
        )
        for workers in (1, 2)
        for rank in range(workers)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    outputs = {workers: load_state(tmp_path / f"workers_{workers}" / "last") for workers in (1, 2)}
    one, two = outputs[1]["state"], outputs[2]["state"]
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=2e-3, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_a_loss_that_is_not_finite_ends_the_trial_and_names_the_term(tmp_path: Path) -> None:
    trainer, _ = toy_trainer(toy_config("source_only", optimizer__lr=1e12), tmp_path)
    with pytest.raises(NonFiniteLossError, match=r"'(cross_entropy|lovasz)' became nan"):
        trainer.run()


def test_a_checkpoint_that_was_changed_is_refused(tmp_path: Path) -> None:
    trainer, reports = toy_trainer(toy_config("source_only"), tmp_path)
    trainer.run()
    state = reports.checkpoint(0) / "state.pt"
    state.write_bytes(state.read_bytes()[:-10])
    with pytest.raises(CorruptCheckpointError, match="changed or cut short"):
        trainer.run(reports.checkpoint(0))


def test_accumulated_micro_batches_equal_one_batch_without_ignored_pixels(tmp_path: Path) -> None:
    whole, _ = toy_trainer(toy_config("source_only", warmup__lovasz_weight=0.0), tmp_path / "whole")
    parts, _ = toy_trainer(
        toy_config("source_only", warmup__lovasz_weight=0.0, trainer__batch_size=2, trainer__accumulate=2),
        tmp_path / "parts",
    )
    for trainer in (whole, parts):
        trainer.run()
    for key, value in whole.method.state_dict().items():
        torch.testing.assert_close(parts.method.state_dict()[key], value, rtol=1e-3, atol=1e-4)


def test_each_parameter_is_in_one_group(tmp_path: Path) -> None:
    for name in NAMES:
        trainer, _ = toy_trainer(toy_config(name), tmp_path / name)
        grouped = [id(p) for group in trainer.method.parameter_groups() for p in group.parameters]
        assert len(grouped) == len(set(grouped))
        trained = {id(p) for key, p in trainer.method.named_parameters() if key in trainer.trainable}
        assert trained <= set(grouped)


def test_an_epoch_visits_every_sample_once_and_epochs_differ() -> None:
    first = [sample_at(position, 7, ("key",)) for position in range(7)]
    second = [sample_at(position, 7, ("key",)) for position in range(7, 14)]
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second


def test_flipped_images_keep_their_labels() -> None:
    data, _ = load_data(toy_config("sdca").data)
    always = replace(AugmentationConfig(), flip=1.0)
    never = replace(AugmentationConfig(), flip=0.0)
    batches = [
        BatchSource(data, config, ("key",), 4, ("source", "target"), (), flipped=True).batch(0)
        for config in (always, never)
    ]
    assert torch.equal(batches[0].source_images, batches[1].source_images.flip(-1))
    assert torch.equal(batches[0].source_labels, batches[1].source_labels.flip(-1))


def test_the_source_only_stage_is_the_same_in_every_method(tmp_path: Path) -> None:
    states = []
    for name in NAMES:
        trainer, reports = toy_trainer(toy_config(name), tmp_path / name, (SOURCE_ONLY,))
        trainer.run()
        state = load_state(reports.checkpoint(len(reports.metrics) - 1))["state"]
        states.append({key: value for key, value in state.items() if key.startswith("segmenter.")})
    assert all(equal_state(states[0], state) for state in states[1:])


@pytest.mark.parametrize("rounds", [1, 2, 3, 7, 11])
def test_the_stages_of_a_trial_take_all_its_steps(rounds: int, tmp_path: Path) -> None:
    config = toy_config("self_training", method__rounds=rounds, trainer__steps=40)
    trainer, _ = toy_trainer(config, tmp_path)
    steps = [trainer.steps[stage.name] for stage in trainer.plan[1:]]
    assert sum(steps) == 40
    assert max(steps) - min(steps) <= 1
