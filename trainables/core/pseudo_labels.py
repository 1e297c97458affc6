"""Pseudo labels of target images: class-balanced selection by confidence, and the folder that holds them.

B images of H x W pixels, C classes.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.distributed import barrier, rank, sum_over_workers
from segadapt.trainables.core.method import StageData

PROVENANCE = "provenance.json"
"""Says how a folder of pseudo labels was made. Written last: its presence means that the folder is complete."""

_HALF = 1 << 16


def confidence_and_prediction(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest softmax probability of each pixel and its class.

    Args:
        logits: Already up-sampled to the label size, (B, C, H, W).

    Returns:
        Confidence, (B, H, W) float32 in (0, 1], and class indices, (B, H, W) int64.

    Raises:
        ValueError: If a logit is NaN or +inf.
    """
    confidence, prediction = logits.float().softmax(1).max(1)
    if confidence.isnan().any():
        raise ValueError("`logits` must be finite, but the network returned NaN. Lower the learning rate.")
    return confidence, prediction


class ConfidenceHistogram:
    """Counts float32 confidences per class by one half of their bits, which sort like the numbers they encode.

    Args:
        num_classes: C.
        upper: None counts by the upper 16 bits. Otherwise each class's upper half, (C,) int64: only confidences that
            start with it are counted, by their lower 16 bits.
    """

    def __init__(self, num_classes: int, upper: Tensor | None = None) -> None:
        self.upper = upper
        self.counts = torch.zeros(num_classes, _HALF, dtype=torch.int64)

    def update(self, confidence: Tensor, prediction: Tensor) -> None:
        """Add pixels: confidences, float32 in [0, 1], and the classes predicted there, int64, of the same shape."""
        bits = confidence.flatten().view(torch.int32).long()
        classes = prediction.flatten()
        half = bits >> 16
        if self.upper is not None:
            inside = half == self.upper.to(classes.device)[classes]
            half, classes = bits[inside] & (_HALF - 1), classes[inside]
        counts = torch.bincount(classes * _HALF + half, minlength=self.counts.numel())
        self.counts = self.counts.to(counts.device) + counts.view_as(self.counts)

    def reduce(self) -> None:
        """Sum the counts over the workers; call once, after the last update, on every worker."""
        self.counts = sum_over_workers(self.counts).cpu()

    def locate(self, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the half that holds each class's element number `ranks`, and the element's number within it, (C,)."""
        cumulative = self.counts.cumsum(1)
        half = torch.searchsorted(cumulative, ranks[:, None] + 1).clamp(max=_HALF - 1)
        below = cumulative.gather(1, half) - self.counts.gather(1, half)
        return half[:, 0], ranks - below[:, 0]


def class_thresholds(
    batches: Callable[[], Iterable[Tensor]], num_classes: int, *, quantile: float = 0.5, cap: float = 0.9
) -> Tensor:
    """Return the confidence below which a predicted pixel gets no label, per class.

    With the n confidences of all pixels predicted as a class sorted ascending, q = element number
    `round(quantile * n)`, counted from 0, halves rounded to even, the last element at most; 0 for a class never
    predicted. The threshold is min(q, cap). q is exact, in 0.5 MB per class whatever the size of the set: the first
    pass counts by the upper half of the float's bits, the second by the lower half.

    Args:
        batches: Starts a pass over this worker's share of the set: up-sampled logits, (B, C, H, W). Called twice;
            every worker calls this function.
        num_classes: C.
        quantile: Share of a class's pixels below its q, in [0, 1].
        cap: Largest threshold, in [0, 1].

    Returns:
        (C,) float64 on the CPU, the same on every worker.

    Source:
        Li et al., SDCA, arXiv 2105.05013; BIT-DA/SDCA@d00e7ba.
        Differs: the original sorts all confidences in memory.
    """
    upper = ConfidenceHistogram(num_classes)
    for logits in batches():
        upper.update(*confidence_and_prediction(logits))
    upper.reduce()
    predicted = upper.counts.sum(1)
    ranks = torch.tensor([max(0, min(round(quantile * n), n - 1)) for n in predicted.tolist()])
    high, ranks = upper.locate(ranks)

    lower = ConfidenceHistogram(num_classes, high)
    for logits in batches():
        lower.update(*confidence_and_prediction(logits))
    lower.reduce()
    low, _ = lower.locate(ranks)
    elements = (high * _HALF + low).int().view(torch.float32).double()
    return torch.where(predicted > 0, elements, 0.0).clamp(max=cap)


def select(confidence: Tensor, prediction: Tensor, thresholds: Tensor) -> Tensor:
    """Keep the predictions that reach the threshold of their class; 255 elsewhere.

    Args:
        confidence: (B, H, W) float32.
        prediction: Class indices, (B, H, W) int64.
        thresholds: (C,) float64.

    Returns:
        Labels, (B, H, W) uint8.
    """
    kept = confidence >= thresholds.to(confidence.device)[prediction]
    return torch.where(kept, prediction, IGNORE_INDEX).to(torch.uint8)


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

    if rank() == 0:  # the sums of `class_thresholds` make the others wait for this
        (data.folder / PROVENANCE).unlink(missing_ok=True)
    thresholds = class_thresholds(logits, num_classes, quantile=quantile, cap=cap)
    counts = torch.zeros(2, num_classes, dtype=torch.int64)  # pixels predicted, pixels kept
    for images, indices in data.target_batches():
        confidence, prediction = confidence_and_prediction(predict(images))
        labels = select(confidence, prediction, thresholds)
        counts = counts.to(labels.device) + torch.stack([_count(prediction, num_classes), _count(labels, num_classes)])
        for index, label in zip(indices.tolist(), labels.cpu(), strict=True):
            write_pseudo_label(data.folder, data.target_ids[index], label)
    predicted, kept = sum_over_workers(counts).tolist()
    barrier()
    if rank() == 0:
        provenance = {
            "quantile": quantile,
            "cap": cap,
            "thresholds": thresholds.tolist(),
            "kept_share": [part / whole if whole else None for part, whole in zip(kept, predicted, strict=True)],
        }
        write_provenance(data.folder, provenance)
    barrier()


def _count(labels: Tensor, num_classes: int) -> Tensor:
    """Return the pixels of each class, (C,) int64; 255 is left out."""
    return torch.bincount(labels.flatten(), minlength=IGNORE_INDEX + 1)[:num_classes]


def write_pseudo_label(folder: Path, image_id: str, labels: Tensor) -> None:
    """Write one image's labels, (H, W) uint8 with 255 = ignore, as a PNG; a reader never sees half of it."""
    path = _label_path(folder, image_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    Image.fromarray(labels.numpy()).save(partial, format="PNG")
    partial.replace(path)


def write_provenance(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Mark the folder as complete and say how it was made; call once, after every worker's last label."""
    partial = folder / f".{PROVENANCE}.{os.getpid()}.partial"
    partial.write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / PROVENANCE)


class PseudoLabelFolder:
    """Pseudo labels on disk, read by image id.

    Args:
        folder: Where `label_target` wrote.
        image_ids: Target images that must have a label.

    Attributes:
        provenance: How the labels were made.

    Raises:
        ValueError: If a label is missing, or the completion mark.
    """

    def __init__(self, folder: Path, image_ids: Sequence[str]) -> None:
        self.folder = folder
        missing = [image_id for image_id in image_ids if not _label_path(folder, image_id).is_file()]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(image_ids)} target images have no pseudo label, e.g. {missing[0]}. "
                f"Delete the folder {folder} to rebuild it."
            )
        mark = folder / PROVENANCE
        if not mark.is_file():
            raise ValueError(
                f"A finished folder of pseudo labels must hold {PROVENANCE}, but {folder} does not: writing it was "
                "interrupted. Delete the folder to rebuild it."
            )
        self.provenance: dict[str, Any] = json.loads(mark.read_text(encoding="utf-8"))

    def read(self, image_id: str) -> Tensor:
        """Return the labels of an image, (H, W) uint8, 255 = ignore."""
        with Image.open(_label_path(self.folder, image_id)) as image:
            return torch.from_numpy(np.array(image))


def _label_path(folder: Path, image_id: str) -> Path:
    return folder / f"{image_id}.png"
