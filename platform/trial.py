"""One trial: the same training function in the trial's own process or in Ray Train workers."""

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from segadapt.platform import stages
from segadapt.platform.checkpoints import TRAIN_FOLDER, newest_checkpoint, read_metrics, removed_metrics
from segadapt.platform.config import TrialConfig, Values, resolve
from segadapt.platform.environment import machine
from segadapt.platform.errors import UsageError
from segadapt.platform.objective import Objective
from segadapt.platform.patience import patiently
from segadapt.platform.storage import Storage
from segadapt.platform.trial_log import logged
from segadapt.trainables import method_class
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.journal import note
from segadapt.trainables.core.method import Method
from segadapt.trainables.core.networks import build_segmenter
from segadapt.trainables.core.training import interruption as preemption
from segadapt.trainables.core.training.config import TrainerSettings
from segadapt.trainables.core.training.gradients import InfeasibleError, noted_micro_batch
from segadapt.trainables.core.training.interruption import PreemptedError, noted_preemptions
from segadapt.trainables.core.training.reporting import Report
from segadapt.trainables.core.training.trainer import Trainer

if TYPE_CHECKING:
    from segadapt.platform.machine_use import MachineUse

Launcher = Literal["auto", "train", "inprocess"]

METHOD = "method"
"""Searched value that names a trial's method, where an experiment has several."""

CONFIG = "config.json"
"""File in a checkpoint folder with the configuration of its trial."""

INFEASIBLE = "infeasible:"
"""How the reason of a failure begins when the trial does not fit the device's memory, whatever the micro-batch."""

PREEMPTED = "preempted:"
"""How the reason begins why a trial's process left that was asked to end."""

STORAGE_PATIENCE_S = 600.0
"""How long a trial, or the study, waits for storage that refuses what is written."""


@dataclass(frozen=True)
class Resources:
    """What one trial takes from the cluster."""

    workers: int = 1
    gpus: float = 0.0
    """GPUs of each worker."""
    cpus: float = 1.0
    """CPUs of each worker."""
    launcher: Launcher = "auto"

    @property
    def uses_train(self) -> bool:
        """Whether Ray Train runs the trial: asked for, or by default with several workers or GPUs."""
        return self.launcher == "train" or (self.launcher == "auto" and (self.workers > 1 or self.gpus > 0))


@dataclass(frozen=True)
class Tolerance:
    """How much may go wrong with the machines that a trial runs on before it has failed."""

    max_failures: int = 2
    """How often a trial is started again after its process or node died, or it hung; preemptions do not count."""
    timeout_s: float = 7200.0
    """A trial that reports nothing for so long hangs."""

    def __post_init__(self) -> None:
        if self.max_failures < 0:
            raise UsageError(f"--max-failures must not be negative, but got {self.max_failures}. 0 tries once.")
        if not self.timeout_s > 0:
            raise UsageError(
                f"--trial-timeout must be a positive number of seconds, but got {self.timeout_s:g}. "
                "Take several times what lies between two evaluations."
            )


@dataclass(frozen=True)
class TrialSpec:
    """What is common to the trials of an experiment; travels to the trial's processes."""

    storage: Storage
    experiment: str
    fixed: Mapping[str, Values]
    """The experiment's methods, each with the settings that none of its trials changes."""
    resources: Resources = field(default_factory=Resources)
    objective: Objective = field(default_factory=Objective)
    """By which checkpoints are kept and trials compared."""
    start: Path | None = None
    """Checkpoint folder to begin from; None begins from the shared stages."""
    shared_stages: bool = False
    """Compute the method's shared stages instead of its own."""
    tolerance: Tolerance = field(default_factory=Tolerance)
    code: stages.CodeVersions | None = None
    """Of the shared stages, as the driver found it: an edit while trials run must not hide their stages from them."""

    def method(self, values: Values) -> str:
        """Return the method of the trial with these searched values."""
        return str(values.get(METHOD, next(iter(self.fixed))))

    def config(self, values: Values) -> TrialConfig:
        """Return the configuration of the trial with these searched values."""
        method = self.method(values)
        own = {key: value for key, value in values.items() if key != METHOD}
        return resolve(method, {**self.fixed[method], **own})

    def shared_config(self, method: str, seed: int | None = None) -> TrialConfig:
        """Return the configuration that the shared stages of a method's trials are computed with.

        Args:
            method: Its name.
            seed: Of the trial, where trials differ in it.
        """
        return resolve(method, self.fixed[method] if seed is None else {**self.fixed[method], "seed": seed})

    @property
    def folder(self) -> Path:
        """The experiment's folder."""
        return self.storage.experiment(self.experiment)

    def artifacts(self, trial_id: str) -> Path:
        """Folder for what a trial's stages write."""
        return trial_artifacts(self.folder, trial_id)


def trial_artifacts(experiment: Path, trial_id: str) -> Path:
    """Return the folder for what a trial's stages write, in that of its experiment."""
    return experiment / "artifacts" / trial_id


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

    from segadapt.platform.machine_use import MachineUse

    torch.set_num_threads(max(1, int(spec.resources.cpus)))
    config = spec.config(values)
    _note_start(spec, config, values, resume)
    data, evaluation = load_data(config.data)
    use = MachineUse()
    report = _describing(report, config, data.fingerprint, use)
    method = build_method(config, len(data.classes))
    shared_config = spec.shared_config(config.method_name, config.seed)
    keys = stages.stage_keys(shared_config, data.fingerprint, spec.code)
    done = stages.longest_prefix(spec.storage, keys)
    if spec.shared_stages:
        plan = tuple(key.stage for key in keys[len(done) :])
        report = stages.publishing(spec.storage, keys, shared_config, spec.experiment, report)
    else:
        plan = stages.split_plan(config)[1]
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
            (folder / CONFIG).write_text(json.dumps(config.as_dict()))
            write(folder)

        report({**metrics, **use.take(), "fingerprint": fingerprint}, write_described if write is not None else None)

    return wrapped


@contextlib.contextmanager
def _reporting_failure(report: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Tell the driver why a trial fails before the error ends it; an error of storage or a machine may be retried."""
    from ray.exceptions import RayActorError

    try:
        yield
    except (OSError, RayActorError):  # the latter if the process died that watches Ray Train's workers
        raise
    except Exception as error:
        reason = _reason(error)
        report({"preempted": reason} if reason.startswith(PREEMPTED) else {"failure": reason})
        raise


def _reason(error: Exception) -> str:
    """Return one line that names the error, of a Ray Train worker if one caused it."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    summary = lines[-1] if lines else ""
    summary = summary if failures else f"{type(error).__name__}: {summary}"
    for kind, begins in ((InfeasibleError, INFEASIBLE), (PreemptedError, PREEMPTED)):
        _, name, text = summary.partition(f"{kind.__name__}: ")
        if name:
            return f"{begins} {text}"
    return summary


def _had_ended(spec: TrialSpec, trial_id: str) -> bool:
    """Report once more what a trial reached last if it ended and its checkpoints were removed.

    The driver was killed before it saved that the trial had ended: there is nothing to go on from, and nothing to do.
    """
    from ray import tune

    metrics = removed_metrics(spec.folder, trial_id)
    if metrics is not None:
        tune.report(metrics)
    return metrics is not None


def run_in_process(values: dict[str, Any], spec: TrialSpec) -> None:
    """Tune's function for a trial that trains in its own, reused process."""
    from ray import tune

    trial_id = tune.get_context().get_trial_id()

    def report(metrics: dict[str, Any], write: Any) -> None:
        if write is None:
            tune.report(metrics)
            return
        patiently(lambda: report_checkpoint(metrics, write), OSError, STORAGE_PATIENCE_S)

    def report_checkpoint(metrics: dict[str, Any], write: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory(prefix="segadapt-") as folder:
            write(Path(folder))
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))

    if _had_ended(spec, trial_id):
        return
    with _reporting_failure(tune.report), logged(spec.artifacts(trial_id), "rank-0", trial_id, rank=0):
        # Not Tune's checkpoint: its state may be older than the last one, or name one that was replaced since.
        train(spec, trial_id, values, report, newest_checkpoint(spec.folder, trial_id))


def run_with_ray_train(values: dict[str, Any], spec: TrialSpec) -> None:
    """Tune's function for a trial whose workers are Ray Train's; this process starts and watches them."""
    import ray.train
    from ray import tune

    from segadapt.platform.preemptible import PreemptibleTorchConfig
    from segadapt.platform.workers import ReportToTune, TrialTrainer

    trial_id = tune.get_context().get_trial_id()
    if _had_ended(spec, trial_id):
        return
    resources = spec.resources
    per_worker = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})

    def fit(max_failures: int) -> Any:
        return TrialTrainer(
            train_worker,
            torch_config=PreemptibleTorchConfig(),
            train_loop_config={"spec": spec, "trial_id": trial_id, "values": values},
            scaling_config=ray.train.ScalingConfig(
                num_workers=resources.workers, use_gpu=resources.gpus > 0, resources_per_worker=per_worker
            ),
            run_config=ray.train.RunConfig(
                name=trial_id,  # the same name makes every kind of restart go on from the last checkpoint
                storage_path=str(spec.folder / TRAIN_FOLDER),
                callbacks=[ReportToTune()],  # type: ignore[list-item]
                checkpoint_config=ray.train.CheckpointConfig(
                    num_to_keep=1, checkpoint_score_attribute=spec.objective.keeps, checkpoint_score_order="max"
                ),
                failure_config=ray.train.FailureConfig(max_failures=max_failures),
            ),
        ).fit()

    with _reporting_failure(tune.report), logged(spec.artifacts(trial_id), "train", trial_id):
        result = _again_if_not_at_fault(fit, spec.artifacts(trial_id), spec.tolerance.max_failures)
        if result.metrics:  # what Tune missed, if the trial had ended when the driver was killed
            tune.report(result.metrics)


def _again_if_not_at_fault(fit: Callable[[int], Any], folder: Path, max_failures: int) -> Any:
    """Call `fit` again if its workers left a smaller micro-batch in the folder and failed, or were asked to end.

    Ray Train's own retries are for machines that fail, and too few for a batch that must be halved often. It counts
    workers that left in good order as well: their number is given back.

    Args:
        fit: Runs the workers; takes how often Ray Train may start them again.
        folder: Where the trial notes its micro-batch and preemptions.
        max_failures: How often they may be started again because a machine failed.
    """
    while True:
        micro_batch, left = noted_micro_batch(folder), noted_preemptions(folder)
        try:
            return fit(max_failures)
        except Exception as error:
            if _reason(error).startswith(INFEASIBLE):
                raise
            if noted_micro_batch(folder) != micro_batch:
                continue
            max_failures = noted_preemptions(folder) - left - 1  # of its restarts and this one, so many were no failure
            if max_failures < 0:
                raise


def train_worker(loop: dict[str, Any]) -> None:
    """Ray Train's function: one data-parallel worker of a trial."""
    import ray.train

    def report(metrics: dict[str, Any], write: Any) -> None:
        if write is None:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory(prefix="segadapt-") as folder:
            write(Path(folder))
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    spec, trial_id = loop["spec"], loop["trial_id"]
    rank = ray.train.get_context().get_world_rank()
    with logged(spec.artifacts(trial_id), f"rank-{rank}", trial_id, rank):
        # Not Ray Train's checkpoint, which may have been damaged; all workers find the same: nobody writes meanwhile.
        train(spec, trial_id, loop["values"], report, newest_checkpoint(spec.folder, trial_id))
