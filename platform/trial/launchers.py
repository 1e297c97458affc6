"""Tune's functions for a trial: in its own process, or in Ray Train workers."""

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from segadapt.platform.settings.reported import End, Reported
from segadapt.platform.storage.checkpoints import TRAIN_FOLDER, newest_checkpoint, removed_metrics
from segadapt.platform.storage.retries import STORAGE_PATIENCE_S, retry
from segadapt.platform.trial.log import logged
from segadapt.platform.trial.spec import Trial, TrialSpec
from segadapt.platform.trial.training import train
from segadapt.trainables.core.training.gradients import InfeasibleError, noted_micro_batch
from segadapt.trainables.core.training.interruption import PreemptedError, noted_preemptions


@contextlib.contextmanager
def _reporting_failure(report: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Tell the driver why a trial fails before the error ends it; an error of storage or a machine may be retried."""
    from ray.exceptions import RayActorError

    try:
        yield
    except (OSError, RayActorError):  # the latter if the process died that watches Ray Train's workers
        raise
    except Exception as error:
        report(_ending(error).as_result())
        raise


def _ending(error: Exception) -> Reported:
    """Return what to report of an error that ends a trial's process, or of a Ray Train worker's if that caused it."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    summary = lines[-1] if lines else ""
    summary = summary if failures else f"{type(error).__name__}: {summary}"
    for kind, end in ((InfeasibleError, End.INFEASIBLE), (PreemptedError, End.PREEMPTED)):
        _, name, text = summary.partition(f"{kind.__name__}: ")
        if name:
            return Reported(end=end, reason=text)
    return Reported(end=End.FAILED, reason=summary)


def _had_ended(spec: TrialSpec, trial_id: str) -> bool:
    """Report once more what a trial reached last if it ended and its checkpoints were removed.

    The driver was killed before it saved that the trial had ended: there is nothing to go on from, and nothing to do.
    """
    from ray import tune

    metrics = removed_metrics(spec.folder, trial_id)
    if metrics is not None:
        tune.report(Reported.from_result(metrics).as_result())
    return metrics is not None


def run_in_process(values: dict[str, Any], spec: TrialSpec) -> None:
    """Tune's function for a trial that trains in its own, reused process."""
    from ray import tune

    trial_id = tune.get_context().get_trial_id()

    def deliver(reported: Reported, write: Callable[[Path], None] | None) -> None:
        if write is None:
            tune.report(reported.as_result())
            return
        retry(lambda: deliver_checkpoint(reported, write), OSError, STORAGE_PATIENCE_S)

    def deliver_checkpoint(reported: Reported, write: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory(prefix="segadapt-") as folder:
            write(Path(folder))
            tune.report(reported.as_result(), checkpoint=tune.Checkpoint.from_directory(folder))

    if _had_ended(spec, trial_id):
        return
    with _reporting_failure(tune.report), logged(spec.artifacts(trial_id), "rank-0", trial_id, rank=0):
        # Not Tune's checkpoint: its state may be older than the last one, or name one that was replaced since.
        train(spec.trial(trial_id, values), deliver, newest_checkpoint(spec.folder, trial_id))


def run_with_ray_train(values: dict[str, Any], spec: TrialSpec) -> None:
    """Tune's function for a trial whose workers are Ray Train's; this process starts and watches them."""
    import ray.train
    from ray import tune

    from segadapt.platform.ray_internals.train import PreemptibleTorchConfig, forget_damaged_list, trainer_in_trial

    trial_id = tune.get_context().get_trial_id()
    if _had_ended(spec, trial_id):
        return
    resources = spec.resources
    per_worker = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})

    trainer, report_callback = trainer_in_trial(_with_checkpoint)

    def fit(trial: Trial, max_failures: int) -> Any:
        return trainer(
            train_worker,
            torch_config=PreemptibleTorchConfig(),
            train_loop_config={"trial": trial},
            scaling_config=ray.train.ScalingConfig(
                num_workers=resources.workers, use_gpu=resources.gpus > 0, resources_per_worker=per_worker
            ),
            run_config=ray.train.RunConfig(
                name=trial_id,  # the same name makes every kind of restart go on from the last checkpoint
                storage_path=str(spec.folder / TRAIN_FOLDER),
                callbacks=[report_callback],
                checkpoint_config=ray.train.CheckpointConfig(
                    num_to_keep=1, checkpoint_score_attribute=spec.objective.keeps, checkpoint_score_order="max"
                ),
                failure_config=ray.train.FailureConfig(max_failures=max_failures),
            ),
        ).fit()

    forget_damaged_list(spec.folder / TRAIN_FOLDER / trial_id)
    with _reporting_failure(tune.report), logged(spec.artifacts(trial_id), "train", trial_id):
        trial = spec.trial(trial_id, values)
        result = _again_if_not_at_fault(partial(fit, trial), trial.artifacts, spec.tolerance.max_failures)
        if result.metrics:  # what Tune missed, if the trial had ended when the driver was killed
            tune.report(result.metrics)


def _with_checkpoint(result: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """Return a worker's result with the folder of its checkpoint, which Tune is not handed."""
    return dataclasses.replace(Reported.from_result(result), checkpoint=Path(checkpoint)).as_result()


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
            if _ending(error).end is End.INFEASIBLE:
                raise
            if noted_micro_batch(folder) != micro_batch:
                continue
            max_failures = noted_preemptions(folder) - left - 1  # of its restarts and this one, so many were no failure
            if max_failures < 0:
                raise


def train_worker(loop: dict[str, Any]) -> None:
    """Ray Train's function: one data-parallel worker of a trial."""
    import ray.train

    trial: Trial = loop["trial"]

    def deliver(reported: Reported, write: Callable[[Path], None] | None) -> None:
        if write is None:
            ray.train.report(reported.as_result())
            return
        with retry(lambda: _written(write), OSError, STORAGE_PATIENCE_S) as folder:
            ray.train.report(
                reported.as_result(),
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_upload_fn=uploading_to(trial.spec.folder / TRAIN_FOLDER / trial.trial_id),
            )

    rank = ray.train.get_context().get_world_rank()
    with logged(trial.artifacts, f"rank-{rank}", trial.trial_id, rank):
        # Not Ray Train's checkpoint, which may have been damaged; all workers find the same: nobody writes meanwhile.
        train(trial, deliver, newest_checkpoint(trial.spec.folder, trial.trial_id))


def uploading_to(folder: Path) -> Callable[[Any, str], Any]:
    """Return what uploads a checkpoint by its name to the folder of a trial of Ray Train, with patience.

    To report once more would not do: all workers take part in a report, and it is the upload alone that fails.
    """
    import ray.train

    def upload(checkpoint: Any, name: str) -> Any:
        def copy() -> None:
            shutil.copytree(checkpoint.path, folder / name, dirs_exist_ok=True)

        retry(copy, OSError, STORAGE_PATIENCE_S)
        return ray.train.Checkpoint.from_directory(str(folder / name))

    return upload


def _written(write: Callable[[Path], None]) -> "tempfile.TemporaryDirectory[str]":
    """Return a temporary folder that `write` has filled, or none."""
    folder = tempfile.TemporaryDirectory(prefix="segadapt-")
    try:
        write(Path(folder.name))
    except BaseException:
        folder.cleanup()
        raise
    return folder
