"""The training function of a trial; every data-parallel worker calls it."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segadapt.platform.settings.config import TrialConfig, Values
from segadapt.platform.storage.checkpoints import read_metrics, write_configuration
from segadapt.platform.storage.stage_keys import split_plan, stage_keys
from segadapt.platform.storage.stages import longest_prefix, publishing
from segadapt.platform.trial.environment import machine
from segadapt.platform.trial.spec import TrialSpec
from segadapt.trainables import method_class
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.journal import note
from segadapt.trainables.core.method import Method
from segadapt.trainables.core.networks import build_segmenter
from segadapt.trainables.core.training import interruption as preemption
from segadapt.trainables.core.training.config import TrainerSettings
from segadapt.trainables.core.training.reporting import Report
from segadapt.trainables.core.training.trainer import Trainer

if TYPE_CHECKING:
    from segadapt.platform.trial.machine_use import MachineUse


def build_method(config: TrialConfig, num_classes: int) -> Method:
    """Build the networks and heads of a trial, equal for equal seeds."""
    import torch

    torch.manual_seed(config.seed)
    network = config.network
    segmenter = build_segmenter(num_classes=num_classes, **vars(network))
    return method_class(config.method_name)(segmenter, config.method, config.warmup)


def train(spec: TrialSpec, trial_id: str, values: Values, report: Report, resume: Path | None) -> None:
    """Run one trial in this process (every data-parallel worker calls this).

    Args:
        spec: What the trial shares with its experiment.
        trial_id: Names the folder for what stages write.
        values: The trial's searched values.
        report: Receives every evaluation, and the checkpoint on the first worker.
        resume: Checkpoint folder of this trial to go on from.
    """
    import torch

    from segadapt.platform.trial.machine_use import MachineUse

    torch.set_num_threads(max(1, int(spec.resources.cpus)))
    config = spec.config(values)
    _note_start(spec, config, values, resume)
    data, evaluation = load_data(config.data)
    use = MachineUse()
    report = _describing(report, config, data.fingerprint, use)
    method = build_method(config, len(data.classes))
    shared_config = spec.shared_config(config.method_name, config.seed)
    keys = stage_keys(shared_config, data.fingerprint, spec.code)
    done = longest_prefix(spec.storage, keys)
    if spec.shared_stages:
        plan = tuple(key.stage for key in keys[len(done) :])
        report = publishing(spec.storage, keys, shared_config, spec.experiment, report)
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
        folder=spec.artifacts(trial_id),
    )
    if resume is not None and spec.shared_stages and read_metrics(resume)["stage"] not in {s.name for s in plan}:
        resume = None  # it belongs to a stage that was finished and published since
    if resume is None:
        start = spec.start or (done[-1] if done else None)
        if start is None and keys and not spec.shared_stages:
            raise RuntimeError(
                f"The shared stage '{keys[-1].stage.name}' must have been computed, but {spec.storage.stages} lacks "
                f"{keys[-1].hash}. Start the search again."
            )
        if start is not None:
            trainer.start_from(start)
    else:
        report(read_metrics(resume), None)  # once more: the driver may have been killed before it heard
    with preemption.training(), use:
        trainer.run(resume)
    note("trained", "All stages are trained.")


def _note_start(spec: TrialSpec, config: TrialConfig, values: Values, resume: Path | None) -> None:
    """Log where the trial runs, with what, and from where on."""
    import ray
    import torch

    found, resources = machine(), spec.resources
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
        workers=resources.workers,
        method=config.method_name,
        seed=config.seed,
        values=dict(values),
        resumed_from=str(resume) if resume is not None else None,
        python=found["python"],
        versions=found["packages"] | ({"cuda": torch.version.cuda} if cuda else {}),
    )


def _describing(report: Report, config: TrialConfig, fingerprint: str, use: "MachineUse") -> Report:
    """Return a `report` that adds the data's fingerprint and the machine's use, and to checkpoints the settings."""

    def wrapped(metrics: dict[str, Any], write: Callable[[Path], None] | None) -> None:
        def write_described(folder: Path) -> None:
            assert write is not None
            write_configuration(folder, config.as_dict())
            write(folder)

        report({**metrics, **use.take(), "fingerprint": fingerprint}, write_described if write is not None else None)

    return wrapped
