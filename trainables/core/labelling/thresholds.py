"""Confidences of predictions, thresholds on them, and the labels they leave."""

# B images, C classes, h x w cells of the logits, H x W pixels of a label map.

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.distributed import sum_over_workers

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


BOUNDARY = 1e-6
"""Added to a confidence before the comparison, so that the cell which set a threshold passes in any precision."""


def share_thresholds(counts: Tensor, values: Tensor, *, share: float = 0.5, cap: float = 0.9) -> Tensor:
    """Return the confidence from which on a prediction belongs to the most confident share of its class.

    With the n confidences of a class sorted descending, the threshold is the smaller of `cap` and element number
    max(1, floor(share * n)), counted from 1; `cap` for a class without any.

    Args:
        counts: How often each confidence was predicted for each class, (C, V): integers, or floating weights, of which
            `share` is then taken without rounding.
        values: The confidences, (V,), in any order.
        share: Share of each class's confidences, in [0, 1].
        cap: Largest threshold, in [0, 1].

    Returns:
        (C,) float64.

    Source:
        Zou et al., Class-Balanced Self-Training, ECCV 2018; with half of a class and a cap of 0.9, the common rule of
        two-stage self-training.
    """
    order = values.argsort(descending=True)
    reached = _cumulative(counts[:, order].double())
    total = reached[:, -1:]
    share_count = share * total if counts.is_floating_point() else (share * total).floor()
    first = ((reached >= share_count) & (reached > 0)).int().argmax(dim=1)
    return torch.where(total[:, 0] > 0, values.double()[order][first].clamp(max=cap), cap)


def _cumulative(counts: Tensor) -> Tensor:
    """Return the sums up to each entry of the rows of (C, V) float64.

    As a product where results are to repeat: older versions of PyTorch then refuse their own sum of floats on GPUs.
    """
    if not (counts.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return counts.cumsum(dim=1)
    return counts @ torch.ones(counts.shape[1], counts.shape[1], dtype=counts.dtype, device=counts.device).triu()


def confidence_at(probabilities: Tensor, size: tuple[int, int], *, align_corners: bool = True) -> tuple[Tensor, Tensor]:
    """Interpolate class probabilities bilinearly and return the largest one of each pixel and its class.

    Args:
        probabilities: (B, C, h, w), float32 or float64.
        size: (H, W).
        align_corners: Corner rule of the interpolation.

    Returns:
        Confidence, (B, H, W), and class indices, (B, H, W) int64: the lowest of equal ones.
    """
    with torch.autocast(probabilities.device.type, enabled=False):
        upsampled = F.interpolate(probabilities, size=size, mode="bilinear", align_corners=align_corners)
    confidence, prediction = upsampled.max(dim=1)
    return confidence, prediction


def keep_confident(confidence: Tensor, prediction: Tensor, thresholds: Tensor) -> Tensor:
    """Keep predictions whose confidence + 1e-6 reaches the threshold of their class; 255 elsewhere.

    Args:
        confidence: (B, H, W).
        prediction: Class indices, (B, H, W) int64.
        thresholds: (C,) float64.

    Returns:
        Labels, (B, H, W) int64.
    """
    kept = confidence + BOUNDARY >= thresholds.to(confidence.device)[prediction]
    return prediction.masked_fill(~kept, IGNORE_INDEX)


def pixels_per_class(labels: Tensor, num_classes: int) -> Tensor:
    """Return the pixels of each class, (C,) int64; 255 is left out."""
    return torch.bincount(labels.flatten(), minlength=IGNORE_INDEX + 1)[:num_classes]


def kept_shares(predicted: Tensor, kept: Tensor) -> list[float | None]:
    """Return which share of the pixels predicted as each class, both (C,) int64, was kept; None without any."""
    return [part / whole if whole else None for part, whole in zip(kept.tolist(), predicted.tolist(), strict=True)]
