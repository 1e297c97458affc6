"""The checkpoints that trials left on storage."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segadapt.trainables.core.training.checkpoint import MANIFEST, is_whole

EVALUATION = "evaluation.json"
"""File in a checkpoint folder with the evaluation at its step."""

TRAIN_FOLDER = "train"
"""Sub-folder of an experiment in which Ray Train keeps the trials it runs; in-process trials lie beside it."""

REMOVED = "removed"
"""Folder of an experiment with a record for each trial whose checkpoints were not kept: what they had reached."""

_AWAY = ".removed_"
"""How the name of a checkpoint folder begins that is about to be deleted."""


@dataclass(frozen=True)
class TrialCheckpoint:
    """One evaluation of a trial with the checkpoint it left."""

    path: Path
    metrics: dict[str, Any]
    kept: bool = True
    """False once its files were removed."""


def read_metrics(checkpoint: Path) -> dict[str, Any]:
    """Return the metrics reported with a checkpoint."""
    metrics: dict[str, Any] = json.loads((checkpoint / EVALUATION).read_text())["metrics"]
    return metrics


def iou_table(checkpoint: Path) -> dict[str, Any]:
    """Return the target IoU of each class at a checkpoint, as MLflow shows tables; None for one without pixels."""
    summary = json.loads((checkpoint / EVALUATION).read_text())
    iou = {name: summary["metrics"].get(f"target_val/iou/{name}") for name in summary["classes"]}
    return {"columns": ["class", "target_val_iou"], "data": list(iou.items())}


def label_table(checkpoint: Path) -> dict[str, Any] | None:
    """Return how good pseudo labels of each class were at a checkpoint, as MLflow shows tables; None without any."""
    found = json.loads((checkpoint / EVALUATION).read_text()).get("pseudo_labels")
    if found is None:
        return None
    rows = [[name, quality["kept"], quality["accuracy"]] for name, quality in found.items()]
    return {"columns": ["class", "kept", "accuracy"], "data": rows}


def checkpoints(experiment: Path, trial_id: str) -> Iterator[TrialCheckpoint]:
    """Yield what is kept of a trial, oldest first; folders whose small files are missing or damaged are passed over."""
    for parent in _folders(experiment, trial_id):
        for folder in sorted(parent.glob("checkpoint_*")):
            if (folder / MANIFEST).is_file() and (metrics := readable_metrics(folder)) is not None:
                yield TrialCheckpoint(folder, metrics)


def readable_metrics(checkpoint: Path) -> dict[str, Any] | None:
    """Return the metrics reported with a checkpoint, or None if they are missing or damaged."""
    try:
        metrics = read_metrics(checkpoint)
        return metrics if isinstance(metrics["step"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def newest_checkpoint(experiment: Path, trial_id: str) -> Path | None:
    """Return the kept checkpoint with the most steps that is whole; a kill may have cut the very last one short."""
    kept = sorted(checkpoints(experiment, trial_id), key=lambda found: (found.metrics["step"], found.path.name))
    return next((found.path for found in reversed(kept) if is_whole(found.path)), None)


def best_checkpoint(experiment: Path, trial_id: str, metric: str) -> TrialCheckpoint | None:
    """Return the whole checkpoint with the highest metric, the later one of equals; of those removed, what is known."""
    record = _removed(experiment, trial_id)
    if record is not None:
        return TrialCheckpoint(Path(record["path"]), record["best"], kept=False)
    kept = [found for found in checkpoints(experiment, trial_id) if isinstance(found.metrics.get(metric), int | float)]
    kept.sort(key=lambda found: (found.metrics[metric], found.metrics["step"]), reverse=True)
    return next((found for found in kept if is_whole(found.path)), None)


def removed_metrics(experiment: Path, trial_id: str) -> dict[str, Any] | None:
    """Return the last metrics of a trial whose checkpoints were removed; None for any other."""
    record = _removed(experiment, trial_id)
    return None if record is None else dict(record["newest"])


def put_away(experiment: Path, trial_id: str, metric: str) -> None:
    """Take the checkpoints of an ended trial out of sight, each in one step, having noted what they had reached.

    `delete` then removes them. A kill in between is made good by doing both again.

    Args:
        experiment: Its folder.
        trial_id: Of a trial that has a checkpoint, or whose checkpoints were put away before.
        metric: Decides which was the best.
    """
    best = best_checkpoint(experiment, trial_id, metric)
    assert best is not None
    if best.kept:
        newest = max(checkpoints(experiment, trial_id), key=lambda found: (found.metrics["step"], found.path.name))
        record = experiment / REMOVED / f"{trial_id}.json"
        record.parent.mkdir(exist_ok=True)
        partial = record.with_name(f".{record.name}")
        content = {"path": str(best.path), "best": best.metrics, "newest": newest.metrics}
        partial.write_text(json.dumps(content))
        partial.replace(record)
    for parent in _folders(experiment, trial_id):
        for folder in parent.glob("checkpoint_*"):
            folder.rename(parent / f"{_AWAY}{folder.name}")


def delete(experiment: Path, trial_id: str) -> None:
    """Delete what was put away of a trial."""
    for parent in _folders(experiment, trial_id):
        for folder in parent.glob(f"{_AWAY}*"):
            shutil.rmtree(folder)


def _folders(experiment: Path, trial_id: str) -> tuple[Path, Path]:
    return experiment / trial_id, experiment / TRAIN_FOLDER / trial_id


def _removed(experiment: Path, trial_id: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads((experiment / REMOVED / f"{trial_id}.json").read_text())
    except FileNotFoundError:
        return None
    return record


CONFIG = "config.json"
"""File in a checkpoint folder with the configuration of its trial."""

GALLERY = "gallery.png"
