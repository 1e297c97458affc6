"""Segmentation metrics from one count matrix over a whole set: sums first, division last. C classes."""

import torch
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.distributed import sum_over_workers

_LABELS = IGNORE_INDEX + 1
"""Values that a label may take."""


def confusion_matrix(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count pixels by true and predicted class.

    Args:
        predictions: Class indices in [0, C), any shape.
        labels: Class indices of the same shape; 255 leaves a pixel out.
        num_classes: C.

    Returns:
        (C, C) int64 on the labels' device; rows are the truth, columns the prediction.

    Raises:
        ValueError: If the shapes differ, or a label is neither a class index nor 255.
    """
    if predictions.shape != labels.shape:
        raise ValueError(
            f"`predictions` and `labels` must have the same shape, but got {tuple(predictions.shape)} and "
            f"{tuple(labels.shape)}. Upsample the logits to the label size first."
        )
    # A row for each of the 256 labels: counting the ignored pixels too is faster than picking out the others.
    narrow = torch.int16 if _LABELS * num_classes <= torch.iinfo(torch.int16).max else torch.int32
    pairs = labels.to(narrow) * num_classes + predictions.to(narrow)
    rows = torch.bincount(pairs.flatten(), minlength=_LABELS * num_classes).view(_LABELS, num_classes)
    if rows[num_classes:IGNORE_INDEX].any():
        unknown = rows[num_classes:IGNORE_INDEX].any(1).nonzero().flatten() + num_classes
        raise ValueError(
            f"Labels must be class indices below {num_classes} or {IGNORE_INDEX}, but got {unknown.tolist()}. "
            "Check the class map of the data."
        )
    return rows[:num_classes]


def intersection_over_union(counts: Tensor) -> Tensor:
    """Return intersection over union per class, (C,) float64, of counts (C, C).

    NaN for an absent class: one that is neither true nor predicted anywhere, so that its union is empty. A class
    that is predicted where it never is scores 0.
    """
    hits = counts.diagonal().double()
    return hits / (counts.sum(0) + counts.sum(1) - hits)


class ConfusionMatrix:
    """Accumulates `confusion_matrix` over batches and workers; higher scores are better.

    Attributes:
        counts: (C, C) int64; rows are the truth, columns the prediction.
    """

    def __init__(self, num_classes: int) -> None:
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add the pixels of a batch; see `confusion_matrix`."""
        batch = confusion_matrix(predictions, labels, len(self.counts))
        self.counts = self.counts.to(batch.device) + batch

    def reduce(self) -> None:
        """Sum the counts over the workers; call once, after the last update, on every worker."""
        self.counts = sum_over_workers(self.counts)

    def iou(self) -> Tensor:
        """Return `intersection_over_union` of the counts."""
        return intersection_over_union(self.counts)

    def miou(self) -> float:
        """Return the mean of `iou` over the classes that are not absent; NaN if all are."""
        return float(self.iou().nanmean())

    def accuracy(self) -> Tensor:
        """Return the share of each class's true pixels that is predicted right, (C,) float64; NaN without any."""
        return self.counts.diagonal().double() / self.counts.sum(1)
