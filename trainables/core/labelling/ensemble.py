"""Running average of the predictions for each target image over rounds, in one byte per class and cell, on disk."""

# B images, C classes, h x w cells of the logits.

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from segadapt.trainables.core.distributed import rank, sum_over_workers
from segadapt.trainables.core.labelling.files import PseudoLabelWriter
from segadapt.trainables.core.labelling.thresholds import (
    confidence_at,
    keep_confident,
    kept_shares,
    pixels_per_class,
    share_thresholds,
)
from segadapt.trainables.core.method import StageData

ENSEMBLE = "ensemble"
"""Folder of the averaged predictions, inside that of the round."""

COMPLETE = "complete.json"
"""Written last: its presence means that every image of the round has been written."""

_LEVELS = 256


def encode_ensemble(probabilities: Tensor) -> Tensor:
    """Round probabilities, (..., C, h, w), to multiples of 1/255: floor(255 p + 1/2), uint8 of the same shape."""
    return (255 * probabilities + 0.5).floor().clamp(0, 255).to(torch.uint8)


def decode_ensemble(stored: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the probabilities that `stored` stands for, divided by their sum over the classes.

    Args:
        stored: (..., C, h, w) uint8, positive for at least one class of every cell.
        dtype: Type of the result.

    Returns:
        (..., C, h, w).
    """
    levels = stored.to(dtype)
    return levels / levels.sum(dim=-3, keepdim=True)


class PredictionEnsemble:
    """The averaged predictions of one round, one file per image.

    A round writes files of its own and reads those of the round before, which stay as they are. So preparing a round
    again, after a kill at any point, gives the same bytes, and a finished round can be gone back to. A file is replaced
    as a whole. Workers write their own images; there is nothing else to share. An image takes C * h * w bytes.

    Args:
        folder: Folder of this round.
        previous: Folder of the round before; None in the first, whose average is the prediction itself.
        momentum: Share of the average that stays from round to round, in [0, 0.9]: more would lose small changes in the
            rounding.

    Raises:
        ValueError: If the round before was not finished.

    Source:
        Laine and Aila, Temporal Ensembling, ICLR 2017, for the average over epochs. Marsden et al., Contrastive
        Learning and Self-Training for Unsupervised Domain Adaptation in Semantic Segmentation (CLST), arXiv 2105.02001,
        names a memory-efficient temporal ensemble; this form of it is ours.
        Differs: no bias correction, since the first round sets the average.
    """

    def __init__(self, folder: Path, *, previous: Path | None = None, momentum: float = 0.6) -> None:
        if previous is not None and not (previous / COMPLETE).is_file():
            raise ValueError(
                f"The ensemble of the round before must be finished, but {previous} has no {COMPLETE}. "
                "Go on from a checkpoint of an earlier round, which makes it anew."
            )
        self.folder = folder
        self.previous = previous if momentum > 0 else None
        self.momentum = momentum

    def begin(self) -> None:
        """Mark the round as unfinished; call once, on one worker."""
        (self.folder / COMPLETE).unlink(missing_ok=True)

    @torch.no_grad()
    def update(self, image_ids: Sequence[str], probabilities: Tensor) -> Tensor:
        """Average the predictions into the stored values of the round before, and store the result.

            E <- momentum * (decoded value of the round before) + (1 - momentum) * p

        Args:
            image_ids: B names; may contain slashes.
            probabilities: p, (B, C, h, w), any floating type; computed in float64.

        Returns:
            What is stored now, (B, C, h, w) uint8.

        Raises:
            ValueError: If the probabilities of a cell do not add up to 1, or the sizes differ from the round before.
        """
        average = probabilities.double()
        if not ((average.sum(dim=1) - 1).abs() < 1e-2).all():
            raise ValueError(
                "The class probabilities of a cell must add up to 1, but the network's do not. If they are NaN, lower "
                "the learning rate."
            )
        if self.previous is not None:
            before = torch.stack([_load(self.previous, image_id) for image_id in image_ids]).to(average.device)
            if before.shape != average.shape:
                raise ValueError(
                    f"Predictions must keep their size from round to round, but got {tuple(average.shape)} after "
                    f"{tuple(before.shape)} (B, C, h, w). Start the rounds again."
                )
            average = self.momentum * decode_ensemble(before, torch.float64) + (1 - self.momentum) * average
        stored = encode_ensemble(average)
        for image_id, levels in zip(image_ids, stored.cpu(), strict=True):
            _write(_path(self.folder, image_id), levels)
        return stored

    def read(self, image_id: str) -> Tensor:
        """Return what is stored for an image, (C, h, w) uint8."""
        return _load(self.folder, image_id)

    def finish(self, images: int) -> None:
        """Mark the round as finished, with its number of images; call once, after every worker's last update."""
        partial = self.folder / f".{COMPLETE}.{os.getpid()}.partial"
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"images": images, "momentum": self.momentum}) + "\n", encoding="utf-8")
        partial.replace(self.folder / COMPLETE)


class EnsembleConfidence:
    """Counts the confidences of stored predictions exactly.

    A confidence is the largest of C bytes over their sum, which rounding leaves within C of 255: a whole target set has
    few different ones. They are counted per class, by byte and sum.

    Args:
        num_classes: C.
        device: Device of the counts.

    Attributes:
        counts: (C, 256 * (2 C + 1)) int64.
        values: The confidences, (256 * (2 C + 1),) float64.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        sums = torch.arange(255 - num_classes, 256 + num_classes, dtype=torch.float64, device=device).clamp(min=1)
        levels = torch.arange(_LEVELS, dtype=torch.float64, device=device)
        self.smallest_sum = 255 - num_classes
        self.values = (levels[:, None] / sums).flatten()
        self.counts = torch.zeros(num_classes, len(self.values), dtype=torch.int64, device=device)

    def update(self, stored: Tensor) -> None:
        """Add images, (B, C, h, w) uint8; of equal classes the lowest is the predicted one."""
        largest, prediction = stored.max(dim=1)
        sums = stored.sum(dim=1, dtype=torch.int64)
        index = largest.long() * (len(self.values) // _LEVELS) + sums - self.smallest_sum
        counts = torch.bincount((prediction * len(self.values) + index).flatten(), minlength=self.counts.numel())
        self.counts += counts.view_as(self.counts)

    def reduce(self) -> None:
        """Sum the counts over the workers; call once, after the last update, on every worker."""
        self.counts = sum_over_workers(self.counts)

    def mean(self) -> Tensor:
        """Return the mean confidence over all cells, scalar float64; 0 without any."""
        return (self.counts * self.values).sum() / self.counts.sum().clamp(min=1)

    def share_thresholds(self, *, share: float = 0.5, cap: float = 0.9) -> Tensor:
        """Return the thresholds of `share_thresholds` for the counted cells, (C,) float64."""
        return share_thresholds(self.counts, self.values, share=share, cap=cap)

    def sqrt_mean_thresholds(self) -> Tensor:
        """Return the square root of the mean confidence for every class, (C,) float64."""
        return self.mean().sqrt().expand(len(self.counts))


def label_ensemble(
    predict: Callable[[Tensor], Tensor],
    data: StageData,
    num_classes: int,
    *,
    previous: Path | None,
    momentum: float = 0.6,
    threshold: Literal["quantile", "sqrt_mean"] = "quantile",
    share: float = 0.5,
    cap: float = 0.9,
    align_corners: bool = True,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Average new predictions into the ensemble of the round before, and label the target set with the result.

    The network passes over the set once. All workers call this for their share.

    Args:
        predict: Maps normalised images, (B, 3, H, W), to logits at the size of the ensemble, (B, C, h, w).
        data: The un-augmented target set and the folder of the round.
        num_classes: C.
        previous: Folder of the round before; None in the first.
        momentum: See `PredictionEnsemble`.
        threshold: Confidence a label needs: a quantile per class, or the root of the mean confidence.
        share: Share of each class's predicted cells above its quantile.
        cap: Largest quantile.
        align_corners: How confidences are up-sampled.
        notes: Further entries of the provenance.
    """
    before = previous / ENSEMBLE if previous is not None else None
    ensemble = PredictionEnsemble(data.folder / ENSEMBLE, previous=before, momentum=momentum)
    with PseudoLabelWriter(data, num_classes) as writer:
        if rank() == 0:
            ensemble.begin()
        confidences, sizes = _average_predictions(predict, data, ensemble, num_classes)
        if threshold == "quantile":
            thresholds = confidences.share_thresholds(share=share, cap=cap)
        else:
            thresholds = confidences.sqrt_mean_thresholds()
        kept_share = _write_labels(data, ensemble, sizes, thresholds, writer, align_corners=align_corners)
        if rank() == 0:
            ensemble.finish(len(data.target_ids))
        provenance = {
            "rule": "ensemble",
            "momentum": momentum,
            "share": share,
            "cap": cap,
            "threshold": threshold,
            "thresholds": thresholds.tolist(),
            "mean_confidence": confidences.mean().item(),
            "kept_share": kept_share,
            **(notes or {}),
        }
        writer.finish(provenance)


def _average_predictions(
    predict: Callable[[Tensor], Tensor], data: StageData, ensemble: PredictionEnsemble, num_classes: int
) -> tuple[EnsembleConfidence, dict[int, tuple[int, int]]]:
    """Average the predictions for this worker's images into the ensemble.

    Returns:
        The confidences of all workers' averages, on the device of the predictions; and the size (H, W) of each of this
        worker's images by its index.
    """
    sizes: dict[int, tuple[int, int]] = {}
    confidences: EnsembleConfidence | None = None
    for images, indices in data.target_batches():
        logits = predict(images)
        confidences = confidences or EnsembleConfidence(num_classes, logits.device)
        names = [data.target_ids[index] for index in indices.tolist()]
        confidences.update(ensemble.update(names, logits.double().softmax(dim=1)))
        sizes.update(dict.fromkeys(indices.tolist(), (images.shape[-2], images.shape[-1])))
    confidences = confidences or EnsembleConfidence(num_classes, torch.device("cpu"))  # fewer images than workers
    confidences.reduce()
    return confidences, sizes


def _write_labels(
    data: StageData,
    ensemble: PredictionEnsemble,
    sizes: Mapping[int, tuple[int, int]],
    thresholds: Tensor,
    writer: PseudoLabelWriter,
    *,
    align_corners: bool,
) -> list[float | None]:
    """Write the labels of this worker's images; return which share of the pixels of each class has its label."""
    num_classes, device = len(thresholds), thresholds.device
    pixels = torch.zeros(2, num_classes, dtype=torch.int64, device=device)  # predicted, kept
    for index, size in sizes.items():
        probabilities = decode_ensemble(ensemble.read(data.target_ids[index]).to(device)).unsqueeze(0)
        confidence, prediction = confidence_at(probabilities, size, align_corners=align_corners)
        labels = keep_confident(confidence, prediction, thresholds)
        pixels += torch.stack([pixels_per_class(prediction, num_classes), pixels_per_class(labels, num_classes)])
        writer.write(torch.tensor([index]), labels.to(torch.uint8))
    return kept_shares(*sum_over_workers(pixels))


def _path(folder: Path, image_id: str) -> Path:
    return folder / f"{image_id}.npy"


def _load(folder: Path, image_id: str) -> Tensor:
    return torch.from_numpy(np.load(_path(folder, image_id), allow_pickle=False))


def _write(path: Path, levels: Tensor) -> None:
    """Replace the file in one step; a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.save(file, levels.numpy(), allow_pickle=False)
    partial.replace(path)
