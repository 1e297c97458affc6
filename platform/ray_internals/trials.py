"""Tune's own record of a trial, in the driver: how often it may fail, its process, its files and its checkpoints."""

import hashlib
import json
from pathlib import Path
from typing import Any

PRIVATE = (
    ("ray.tune.experiment", "Trial.max_failures", "decide how often a trial may be started again"),
    ("ray.tune.experiment", "Trial.storage", "find where Tune writes its state"),
    ("ray.tune.experiment", "Trial.temporary_state", "kill the process of a trial that hangs"),
    ("ray.tune.experiment", "Trial.run_metadata", "begin a trial whose checkpoint was replaced"),
    ("ray.tune.experiment.trial", "_TemporaryTrialState.ray_actor", "kill the process of a trial that hangs"),
    ("ray.tune.experiment.trial", "_TrainingRunMetadata.num_failures", "count how often a trial has failed"),
    ("ray.tune.experiment.trial", "_TrainingRunMetadata.checkpoint_manager", "see which checkpoint Tune would take"),
    (
        "ray.train._internal.checkpoint_manager",
        "_CheckpointManager.latest_checkpoint_result",
        "see which checkpoint Tune would take",
    ),
    (
        "ray.train._internal.checkpoint_manager",
        "_CheckpointManager.checkpoint_config",
        "have Tune forget a checkpoint",
    ),
    (
        "ray.train._internal.storage",
        "StorageContext.experiment_driver_staging_path",
        "find where Tune writes its state",
    ),
)
"""Parts of Ray that are not public: module, name and what they are for."""


HASHES = "state_hashes.json"
"""File beside those of Tune's state, with the sha256 of each: from them alone, damage to a pickle cannot be told."""


def note_hashes(folder: Path) -> None:
    """Write down the hashes of the state files that Tune has just written into a folder, before it copies them."""
    files = [path for path in folder.glob("*-*") if path.suffix in (".json", ".pkl") and path.is_file()]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / HASHES).write_text(json.dumps(hashes))


def staging_folder(trial: Any) -> Path:
    """Return the folder in which Tune writes the state of a trial's experiment before it copies it to storage."""
    return Path(trial.storage.experiment_driver_staging_path)


def allow_failures(trial: Any, failures: int) -> None:
    """Let a trial be started again so many times, whatever it has behind it."""
    trial.max_failures = trial.run_metadata.num_failures + failures


def allow_no_failure(trial: Any) -> None:
    """Let a trial not be started again."""
    trial.max_failures = 0


def forgive_failure(trial: Any) -> None:
    """Leave the next failure of a trial out of the count."""
    trial.max_failures += 1


def kill_process(trial: Any) -> None:
    """Kill the process of a trial; Tune starts it again."""
    import ray

    ray.kill(trial.temporary_state.ray_actor)


def forget_replaced_checkpoint(trial: Any) -> None:
    """Let a trial begin whose checkpoint was replaced after Tune's state was saved; it finds the newest one itself."""
    manager = trial.run_metadata.checkpoint_manager
    latest = manager.latest_checkpoint_result
    if latest is not None and latest.checkpoint is not None and not Path(latest.checkpoint.path).is_dir():
        trial.run_metadata.checkpoint_manager = type(manager)(manager.checkpoint_config)
