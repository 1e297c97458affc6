"""Thresholds on the confidence of predictions, per class or common, and the labels they leave."""

# B images, C classes, h x w cells of the logits, H x W pixels of a label map.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.distributed import sum_over_workers
from segadapt.trainables.core.labels import count_values

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
        share: In [0, 1].
        cap: In [0, 1].

    Returns:
        (C,) float64.

    Source:
        Zou et al., Class-Balanced Self-Training, ECCV 2018; with half of a class and a cap of 0.9, the common rule of
        two-stage self-training.
    """
    order = values.argsort(descending=True)
    reached = counts[:, order].double().cumsum(dim=1)
    total = reached[:, -1:]
    wanted = share * total if counts.is_floating_point() else (share * total).floor()
    first = ((reached >= wanted) & (reached > 0)).int().argmax(dim=1)
    return torch.where(total[:, 0] > 0, values.double()[order][first].clamp(max=cap), cap)


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


class RunningConfidence(nn.Module):
    """Confidences of the recent batches, for thresholds while training.

    The histogram of a class decays only when the class is predicted: a class that stays away keeps its threshold.

    Args:
        num_classes: C.
        bins: V, of equal width over [0, 1]; a threshold is the lower end of a bin.
        momentum: Share of the old that stays at an update.

    Attributes:
        histogram: (C, V) float64.
        mean: Running mean confidence over all classes, scalar float64; starts at 0.9.

    Source:
        mariodoebler/test-time-adaptation, GTTA, for the running mean, its momentum 0.9 and start 0.9. The histogram is
        ours.
    """

    histogram: Tensor
    mean: Tensor

    def __init__(self, num_classes: int, *, bins: int = 1000, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("histogram", torch.zeros(num_classes, bins, dtype=torch.float64))
        self.register_buffer("mean", torch.tensor(0.9, dtype=torch.float64))

    def reset(self) -> None:
        """Forget all batches."""
        self.histogram.zero_()
        self.mean.fill_(0.9)

    @torch.no_grad()
    def update(self, confidence: Tensor, prediction: Tensor) -> None:
        """Add a batch of all workers: every worker must call this equally often.

        Args:
            confidence: (B, h, w), in [0, 1].
            prediction: Class indices, (B, h, w) int64.
        """
        classes, bins = self.histogram.shape
        index = prediction * bins + (confidence * bins).long().clamp(0, bins - 1)
        counts = sum_over_workers(count_values(index, classes * bins)).view(classes, bins)
        total = sum_over_workers(confidence.sum(dtype=torch.float64))
        moved = self.momentum * self.histogram + (1 - self.momentum) * counts
        self.histogram.copy_(torch.where(counts.sum(dim=1, keepdim=True) > 0, moved, self.histogram))
        self.mean.copy_(self.momentum * self.mean + (1 - self.momentum) * total / counts.sum())

    def share_thresholds(self, *, share: float = 0.5, cap: float = 0.9) -> Tensor:
        """Return the thresholds of `share_thresholds` for the recent batches, (C,) float64."""
        bins = self.histogram.shape[1]
        values = torch.arange(bins, dtype=torch.float64, device=self.histogram.device) / bins
        return share_thresholds(self.histogram, values, share=share, cap=cap)

    def sqrt_mean_thresholds(self) -> Tensor:
        """Return the square root of the running mean confidence for every class, (C,) float64."""
        return self.mean.sqrt().expand(len(self.histogram))
