"""The training function of a trial; every data-parallel worker calls it."""

import dataclasses
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segadapt.platform.settings.config import TrialConfig
from segadapt.platform.settings.reported import Reported
from segadapt.platform.storage.checkpoints import read_metrics, write_configuration
from segadapt.platform.storage.stage_keys import StageKey, split_plan, stage_keys
from segadapt.platform.storage.stages import longest_prefix, publishing
from segadapt.platform.storage.weights import weights_hash, with_stored_weights
from segadapt.platform.trial.environment import machine
from segadapt.platform.trial.spec import Trial, TrialSpec
from segadapt.trainables import method_class
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.journal import note
from segadapt.trainables.core.method import Method
from segadapt.trainables.core.networks import build_segmenter
from segadapt.trainables.core.online.config import OnlineConfig
from segadapt.trainables.core.online.terms import OnlineTerms
from segadapt.trainables.core.training import interruption as preemption
from segadapt.trainables.core.training.config import TrainerSettings
from segadapt.trainables.core.training.reporting import Report
from segadapt.trainables.core.training.trainer import Trainer
from segadapt.trainables.core.validation import check

if TYPE_CHECKING:
    from segadapt.platform.trial.machine_use import MachineUse

Deliver = Callable[[Reported, Callable[[Path], None] | None], None]
"""Receives what a trial reports and, on the first worker, a function that writes the checkpoint to a folder."""


def build_method(config: TrialConfig, num_classes: int) -> Method:
    """Build the networks and heads of a trial, equal for equal seeds, with its teacher where it has one.

    Raises:
        ValueError: If parts of the configuration do not fit each other.
    """
    import torch

    torch.manual_seed(config.seed)
    network = config.network
    segmenter = build_segmenter(num_classes=num_classes, **vars(network))
    method = method_class(config.method_name)(segmenter, config.method, config.warmup)
    if config.online.enabled:
        check(
            config.online.feature_distance == 0 or network.weights not in (None, "none"),
            "online.feature_distance keeps features near those of pretrained weights and must be 0 without "
            "network.weights",
            config.online.feature_distance,
        )
        method.online = OnlineTerms(method.deployed, config.online)
    return method


def train(trial: Trial, deliver: Deliver, resume: Path | None) -> None:
    """Run one trial in this process (every data-parallel worker calls this).

    Args:
        trial: The trial.
        deliver: Receives every evaluation, and the checkpoint on the first worker.
        resume: Checkpoint folder of this trial to go on from.
    """
    import torch

    from segadapt.platform.trial.machine_use import MachineUse

    spec, config = trial.spec, trial.config
    if spec.shared_stages:  # they are the same whatever comes after
        config = dataclasses.replace(config, online=OnlineConfig())
    torch.set_num_threads(max(1, int(spec.resources.cpus)))
    _note_start(trial, resume)
    data, evaluation = load_data(config.data)
    use = MachineUse()
    report = _describing(deliver, config, data.fingerprint, use)
    network = with_stored_weights(config.network, spec.storage)
    method = build_method(dataclasses.replace(config, network=network), len(data.classes))
    weights = weights_hash(config.network, spec.storage)
    keys = stage_keys(trial.shared_config, data.fingerprint, spec.code, weights)
    done = longest_prefix(spec.storage, keys)
    if spec.shared_stages:
        plan = tuple(key.stage for key in keys[len(done) :])
        report = publishing(spec.storage, keys, trial.shared_config, spec.experiment, report)
    else:
        plan = split_plan(config)[1]
    trainer = Trainer(
        method=method,
        plan=plan,
        data=data,
        evaluation=evaluation,
        settings=TrainerSettings(
            trainer=config.trainer, optimizer=config.optimizer, augmentation=config.augmentation, seed=config.seed
        ),
        report=report,
        folder=trial.artifacts,
    )
    if resume is not None and spec.shared_stages and _stage_of(resume) not in {stage.name for stage in plan}:
        resume = None  # it belongs to a stage that was finished and published since
    if resume is None:
        start = spec.start or _last_shared_stage(spec, keys, done)
        if start is not None:
            trainer.start_from(start)
    else:
        report(read_metrics(resume), None)  # once more: the driver may have been killed before it heard
    with preemption.training(), use:
        trainer.run(resume)
    note("trained", "All stages are trained.")


def _stage_of(checkpoint: Path) -> str | None:
    return Reported.from_result(read_metrics(checkpoint)).stage


def _last_shared_stage(spec: TrialSpec, keys: Sequence[StageKey], done: Sequence[Path]) -> Path | None:
    """Return the checkpoint that a trial begins from; None if it has, or computes, the first shared stage itself.

    Raises:
        RuntimeError: If it must begin from a stage that is not there.
    """
    if not done and keys and not spec.shared_stages:
        raise RuntimeError(
            f"The shared stage '{keys[-1].stage.name}' must have been computed, but {spec.storage.stages} lacks "
            f"{keys[-1].hash}. Start the search again."
        )
    return done[-1] if done else None


def _note_start(trial: Trial, resume: Path | None) -> None:
    """Log where the trial runs, with what, and from where on."""
    import ray
    import torch

    config, where = trial.config, machine()
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    host = socket.gethostname()
    begins = "begins" if resume is None else f"goes on from {resume.name}"
    note(
        "start",
        f"{config.method_name} {begins} on {host} ({device}).",
        host=host,
        node=ray.get_runtime_context().get_node_id() if ray.is_initialized() else None,
        pid=os.getpid(),
        device=device,
        workers=trial.spec.resources.workers,
        method=config.method_name,
        seed=config.seed,
        values=dict(trial.values),
        resumed_from=str(resume) if resume is not None else None,
        python=where["python"],
        versions=where["packages"] | ({"cuda": torch.version.cuda} if cuda else {}),
    )


def _describing(deliver: Deliver, config: TrialConfig, fingerprint: str, use: "MachineUse") -> Report:
    """Return what hands on the trainer's metrics with the data's fingerprint and the machine's use.

    To checkpoints it adds the settings.
    """

    def report(metrics: dict[str, Any], write: Callable[[Path], None] | None) -> None:
        def write_described(folder: Path) -> None:
            assert write is not None
            write_configuration(folder, config.as_dict())
            write(folder)

        evaluated = Reported.from_result(metrics | use.take())
        reported = dataclasses.replace(evaluated, fingerprint=fingerprint)
        deliver(reported, write_described if write is not None else None)

    return report
