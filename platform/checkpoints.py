"""The checkpoints that trials left on storage."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segadapt.trainables.core.checkpoint import MANIFEST, is_whole

EVALUATION = "evaluation.json"
"""File in a checkpoint folder with the evaluation at its step."""

TRAIN_FOLDER = "train"
"""Sub-folder of an experiment in which Ray Train keeps the trials it runs; in-process trials lie beside it."""


@dataclass(frozen=True)
class TrialCheckpoint:
    """One evaluation of a trial with the checkpoint it left."""

    path: Path
    metrics: dict[str, Any]


def read_metrics(checkpoint: Path) -> dict[str, Any]:
    """Return the metrics reported with a checkpoint."""
    metrics: dict[str, Any] = json.loads((checkpoint / EVALUATION).read_text())["metrics"]
    return metrics


def iou_table(checkpoint: Path) -> dict[str, Any]:
    """Return the target IoU of each class at a checkpoint, as MLflow shows tables; None for one without pixels."""
    summary = json.loads((checkpoint / EVALUATION).read_text())
    iou = {name: summary["metrics"].get(f"target_val/iou/{name}") for name in summary["classes"]}
    return {"columns": ["class", "target_val_iou"], "data": list(iou.items())}


def checkpoints(experiment: Path, trial_id: str) -> Iterator[TrialCheckpoint]:
    """Yield what is kept of a trial, oldest first; folders whose small files are missing or damaged are passed over."""
    for parent in (experiment / trial_id, experiment / TRAIN_FOLDER / trial_id):
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
    """Return the kept checkpoint that is whole and has the highest metric, the later one of equals."""
    kept = [found for found in checkpoints(experiment, trial_id) if isinstance(found.metrics.get(metric), int | float)]
    kept.sort(key=lambda found: (found.metrics[metric], found.metrics["step"]), reverse=True)
    return next((found for found in kept if is_whole(found.path)), None)
