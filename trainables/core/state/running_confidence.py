"""Confidences of the recent batches, from which thresholds follow while training."""

# B images, C classes, h x w cells of the logits.

import torch
from torch import Tensor, nn

from segadapt.trainables.core.distributed import sum_over_workers
from segadapt.trainables.core.labelling.features import count_values
from segadapt.trainables.core.labelling.thresholds import share_thresholds


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
