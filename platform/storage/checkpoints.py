"""The checkpoints that trials left on storage: where they lie, what their files say, which was the best."""

import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from segadapt.platform.errors import UsageError
from segadapt.platform.storage.files import write_whole
from segadapt.platform.storage.folders import Storage, is_name
from segadapt.trainables.core.training.checkpoint import EVALUATION, GALLERY, MANIFEST, STATE, is_whole

CONFIG = "config.json"
"""File in a checkpoint folder with the configuration of its trial."""

TRACKED = (EVALUATION, GALLERY)
"""Files of a checkpoint folder from which its run in MLflow is written."""

TRAIN_FOLDER = "train"
"""Sub-folder of an experiment in which Ray Train keeps the trials it runs; in-process trials lie beside it."""

REMOVED = "removed"
"""Folder of an experiment with a record for each trial whose checkpoints were not kept: what they had reached."""

_AWAY = ".removed_"
"""How the name of a checkpoint folder begins that is about to be deleted."""


# Where a checkpoint lies. Whoever notes it notes its path below the storage folder, which may be moved or mounted
# elsewhere; earlier versions noted absolute paths.


def checkpoint_name(storage: Storage, folder: Path) -> str:
    """Return how a checkpoint folder is noted: its path below the storage folder, such as `ray/x/1/checkpoint_2`."""
    return folder.relative_to(storage.root).as_posix()


def checkpoint_folder(storage: Storage, name: str) -> Path:
    """Return the folder of a checkpoint that was noted as `name`, whether it is still there or not.

    Args:
        storage: The storage folder.
        name: What `checkpoint_name` returned, or the absolute path that earlier versions noted. If that is in another
            folder, from which the storage was moved, its part below `ray/` counts.

    Raises:
        UsageError: If no checkpoint could lie there: whoever may write to MLflow chose it.
    """
    parts = [part for part in _parts_in_storage(storage, PurePosixPath(name)) if _is_of_a_checkpoint(storage, part)]
    if not parts:
        raise UsageError(
            f"A checkpoint must lie in the storage folder {storage.root}, as ray/SEARCH/TRIAL/checkpoint_NUMBER, but "
            f"is noted as {name!r}. Name the --storage it was made in, or another run."
        )
    folders = [storage.root / part for part in parts]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def _parts_in_storage(storage: Storage, path: PurePosixPath) -> list[PurePosixPath]:
    """Return which paths below the storage folder a noted one may mean, the likeliest first."""
    if not path.is_absolute():
        return [path]
    if path.is_relative_to(storage.root):
        return [path.relative_to(storage.root)]
    experiments = [index for index, part in enumerate(path.parts) if part == storage.experiments.name]
    return [PurePosixPath(*path.parts[index:]) for index in reversed(experiments)]


def _is_of_a_checkpoint(storage: Storage, path: PurePosixPath) -> bool:
    """Return whether a checkpoint may lie at a path below the storage folder; no other folder is ever touched."""
    if len(path.parts) not in (4, 5):
        return False
    first, *parents, last = path.parts
    is_in_trial = len(parents) == 2 or parents[1] == TRAIN_FOLDER
    is_checkpoint = first == storage.experiments.name and is_in_trial and last.startswith("checkpoint_")
    return is_checkpoint and all(is_name(part) for part in (*parents, last))


# What the files of a checkpoint folder say.


def read_metrics(checkpoint: Path) -> dict[str, Any]:
    """Return the metrics reported with a checkpoint."""
    metrics: dict[str, Any] = _evaluation(checkpoint)["metrics"]
    return metrics


def readable_metrics(checkpoint: Path) -> dict[str, Any] | None:
    """Return the metrics reported with a checkpoint, or None if they are missing or damaged."""
    try:
        metrics = read_metrics(checkpoint)
        return metrics if isinstance(metrics["step"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def class_names(checkpoint: Path) -> tuple[str, ...]:
    """Return the classes that the network of a checkpoint predicts, in the order of its logits."""
    return tuple(_evaluation(checkpoint)["classes"])


def class_colors(checkpoint: Path) -> tuple[tuple[int, int, int], ...] | None:
    """Return the RGB colours of these classes; None if the checkpoint is older than colours in checkpoints."""
    colors = _evaluation(checkpoint).get("colors")
    return None if colors is None else tuple((red, green, blue) for red, green, blue in colors)


def confusion(checkpoint: Path, domain: str) -> list[list[int]]:
    """Return the pixels of a validation set, `target_val` or `source_val`: rows are the truth, columns the prediction.

    A row or column is a class, in the order of `class_names`.
    """
    counts: list[list[int]] = _evaluation(checkpoint)[domain]["confusion"]
    return counts


def iou_table(checkpoint: Path) -> dict[str, Any]:
    """Return the target IoU of each class at a checkpoint, as MLflow shows tables; None for one without pixels."""
    metrics = read_metrics(checkpoint)
    iou = [[name, metrics.get(f"target_val/iou/{name}")] for name in class_names(checkpoint)]
    return {"columns": ["class", "target_val_iou"], "data": iou}


def label_table(checkpoint: Path) -> dict[str, Any] | None:
    """Return how good pseudo labels of each class were at a checkpoint, as MLflow shows tables; None without any."""
    qualities = _evaluation(checkpoint).get("pseudo_labels")
    if qualities is None:
        return None
    rows = [[name, quality["kept"], quality["accuracy"]] for name, quality in qualities.items()]
    return {"columns": ["class", "kept", "accuracy"], "data": rows}


def configuration(checkpoint: Path) -> dict[str, Any]:
    """Return the configuration of the trial that left a checkpoint, as `TrialConfig.as_dict` made it."""
    content: dict[str, Any] = json.loads((checkpoint / CONFIG).read_text())
    return content


def write_configuration(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the configuration of a trial into a checkpoint folder that is being made."""
    (folder / CONFIG).write_text(json.dumps(content))


def state_hash(checkpoint: Path) -> str:
    """Return the sha256 of the state in a checkpoint, as it was written."""
    digest: str = json.loads((checkpoint / MANIFEST).read_text())["sha256"][STATE]
    return digest


def is_sound(checkpoint: Path) -> bool:
    """Return whether a checkpoint is there and was not cut short. Its end is looked at; loading compares the hash."""
    try:
        state_hash(checkpoint)
        zipfile.ZipFile(checkpoint / STATE).close()  # reads the table at its end
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return False
    return True


def _evaluation(checkpoint: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((checkpoint / EVALUATION).read_text())
    return content


# Those of a trial. `experiment` is the folder of its experiment.


@dataclass(frozen=True)
class TrialCheckpoint:
    """One evaluation of a trial with the checkpoint it left."""

    path: Path
    metrics: dict[str, Any]
    kept: bool = True
    """False once its files were removed."""


def checkpoints(experiment: Path, trial_id: str) -> Iterator[TrialCheckpoint]:
    """Yield what is kept of a trial, oldest first; folders whose small files are missing or damaged are passed over."""
    for parent in _folders(experiment, trial_id):
        for folder in sorted(parent.glob("checkpoint_*")):
            if (folder / MANIFEST).is_file() and (metrics := readable_metrics(folder)) is not None:
                yield TrialCheckpoint(folder, metrics)


def newest_checkpoint(experiment: Path, trial_id: str) -> Path | None:
    """Return the kept checkpoint with the most steps that is whole; a kill may have cut the very last one short."""
    kept = sorted(checkpoints(experiment, trial_id), key=_age)
    return next((checkpoint.path for checkpoint in reversed(kept) if is_whole(checkpoint.path)), None)


def best_checkpoint(experiment: Path, trial_id: str, metric: str) -> TrialCheckpoint | None:
    """Return the whole checkpoint with the highest metric, the later one of equals; of those removed, what is known."""
    record = _removed(experiment, trial_id)
    if record is not None:
        return TrialCheckpoint(checkpoint_folder(_storage_of(experiment), record["path"]), record["best"], kept=False)
    kept = [entry for entry in checkpoints(experiment, trial_id) if isinstance(entry.metrics.get(metric), int | float)]
    kept.sort(key=lambda entry: (entry.metrics[metric], entry.metrics["step"]), reverse=True)
    return next((checkpoint for checkpoint in kept if is_whole(checkpoint.path)), None)


def removed_metrics(experiment: Path, trial_id: str) -> dict[str, Any] | None:
    """Return the last metrics of a trial whose checkpoints were removed; None for any other."""
    record = _removed(experiment, trial_id)
    return None if record is None else dict(record["newest"])


def put_away(experiment: Path, trial_id: str, metric: str) -> None:
    """Take the checkpoints of an ended trial out of sight, each in one step, having noted what they had reached.

    `delete` then removes them. A kill in between is made good by doing both again.

    Args:
        experiment: Its folder.
        trial_id: Id of a trial that has a checkpoint, or whose checkpoints were put away before.
        metric: Decides which was the best.
    """
    best = best_checkpoint(experiment, trial_id, metric)
    assert best is not None
    if best.kept:
        newest = max(checkpoints(experiment, trial_id), key=_age)
        record = _removal(experiment, trial_id)
        record.parent.mkdir(exist_ok=True)
        name = checkpoint_name(_storage_of(experiment), best.path)
        write_whole(record, json.dumps({"path": name, "best": best.metrics, "newest": newest.metrics}))
    for parent in _folders(experiment, trial_id):
        for folder in parent.glob("checkpoint_*"):
            folder.rename(parent / f"{_AWAY}{folder.name}")


def delete(experiment: Path, trial_id: str) -> None:
    """Delete what was put away of a trial."""
    for parent in _folders(experiment, trial_id):
        for folder in parent.glob(f"{_AWAY}*"):
            shutil.rmtree(folder)


def trial_of(checkpoint: str) -> str:
    """Return the id of the trial that a noted checkpoint belongs to."""
    return PurePosixPath(checkpoint).parent.name


def _age(checkpoint: TrialCheckpoint) -> tuple[int, str]:
    return checkpoint.metrics["step"], checkpoint.path.name


def _storage_of(experiment: Path) -> Storage:
    """Return the storage that an experiment's folder lies in."""
    return Storage(experiment.parents[1])


def _folders(experiment: Path, trial_id: str) -> tuple[Path, Path]:
    return experiment / trial_id, experiment / TRAIN_FOLDER / trial_id


def _removal(experiment: Path, trial_id: str) -> Path:
    return experiment / REMOVED / f"{trial_id}.json"


def _removed(experiment: Path, trial_id: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(_removal(experiment, trial_id).read_text())
    except FileNotFoundError:
        return None
    return record
