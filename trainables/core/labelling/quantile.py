"""Pseudo labels above one threshold per class: a quantile of the class's confidences, or a fixed one."""

# B images of H x W pixels, C classes.

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from segadapt.trainables.core.distributed import sum_over_workers
from segadapt.trainables.core.labelling.files import PseudoLabelWriter
from segadapt.trainables.core.labelling.thresholds import (
    class_thresholds,
    confidence_and_prediction,
    kept_shares,
    pixels_per_class,
    select,
)
from segadapt.trainables.core.method import StageData


def label_target(
    predict: Callable[[Tensor], Tensor], data: StageData, num_classes: int, *, quantile: float = 0.5, cap: float = 0.9
) -> None:
    """Write the pseudo labels of the whole target set to `data.folder`; every worker calls this for its share.

    The network passes over the set three times: twice for `class_thresholds`, once to label.

    Args:
        predict: Maps normalised images, (B, 3, H, W), to logits of the same size, (B, C, H, W).
        data: The un-augmented target set and the folder.
        num_classes: C.
        quantile: See `class_thresholds`.
        cap: See `class_thresholds`.
    """

    def logits() -> Iterator[Tensor]:
        for images, _ in data.target_batches():
            yield predict(images)

    with PseudoLabelWriter(data, num_classes) as writer:
        thresholds = class_thresholds(logits, num_classes, quantile=quantile, cap=cap)
        _label_above(predict, data, thresholds, writer, {"rule": "quantile", "quantile": quantile, "cap": cap})


def label_fixed(predict: Callable[[Tensor], Tensor], data: StageData, num_classes: int, *, threshold: float) -> None:
    """Write the pseudo labels of the whole target set: predictions whose confidence reaches `threshold`, in [0, 1].

    Every worker calls this for its share; for the other arguments see `label_target`.
    """
    thresholds = torch.full((num_classes,), threshold, dtype=torch.float64)
    with PseudoLabelWriter(data, num_classes) as writer:
        _label_above(predict, data, thresholds, writer, {"rule": "fixed"})


def _label_above(
    predict: Callable[[Tensor], Tensor],
    data: StageData,
    thresholds: Tensor,
    writer: "PseudoLabelWriter",
    notes: Mapping[str, Any],
) -> None:
    """Write the predictions that reach the threshold of their class, (C,) float64."""
    counts = torch.zeros(2, len(thresholds), dtype=torch.int64)  # pixels predicted, pixels kept
    for images, indices in data.target_batches():
        confidence, prediction = confidence_and_prediction(predict(images))
        labels = select(confidence, prediction, thresholds)
        parts = [pixels_per_class(prediction, len(thresholds)), pixels_per_class(labels, len(thresholds))]
        counts = counts.to(labels.device) + torch.stack(parts)
        writer.write(indices, labels)
    shares = kept_shares(*sum_over_workers(counts))
    writer.finish({**notes, "thresholds": thresholds.tolist(), "kept_share": shares})
