"""Running mean and variance of the features of each class."""

# B batch, D feature channels, C classes, h x w cells of the feature map, P = h * w.

import torch
from torch import Tensor, nn

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.distributed import sum_over_workers

_CHANNELS_PER_BLOCK = 128


class ClassStatistics(nn.Module):
    """Mean and diagonal variance of every pixel feature seen so far, per class, without forgetting.

    Merging a batch equals computing the moments of all pixels at once. Sums and counts are reduced over data-parallel
    workers, so that all workers hold the statistics of the joined batches.

    Args:
        classes: Number of classes C.
        channels: Number of feature channels D.
        dtype: Type of the stored moments; merging happens in float64.

    Attributes:
        count: Labelled pixels seen, (C,), int64: float32 counts stop growing at 2^24.
        mean: (C, D); zero for a class never seen.
        variance: (C, D), biased (divided by the count), diagonal only; zero for a class never seen.

    Source:
        Li et al., Semantic Distribution-aware Contrastive Adaptation for Semantic Segmentation (SDCA), arXiv
        2105.05013, online estimation of mean and covariance; BIT-DA/SDCA@d00e7ba.
        Differs: counts are integers and weights float64; workers share their sums, there each kept its own statistics.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, classes: int, channels: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(classes, channels, dtype=dtype))
        self.register_buffer("variance", torch.zeros(classes, channels, dtype=dtype))

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Merge the labelled pixels of a batch, of all workers: every worker must call this equally often.

        With w = batch count / total count, b and q the batch's mean and biased variance of a class:

            variance <- (1 - w) variance + w q + w (1 - w) (mean - b)²        mean <- (1 - w) mean + w b

        Args:
            features: (B, D, h, w), any floating type, used without gradient; computed in float32 or wider.
            labels: Class indices at feature resolution, (B, h, w), int64. IGNORE_INDEX (255) leaves a pixel out.
                Classes absent from the batch keep their statistics; nothing changes when all pixels are ignored.
        """
        counts, batch_mean, batch_variance = _class_moments(features, labels, len(self.count))
        total = self.count + counts
        weight = (counts.double() / total.clamp(min=1).double()).unsqueeze(1)
        difference = batch_mean - self.mean
        variance = (1 - weight) * self.variance + weight * batch_variance + weight * (1 - weight) * difference.square()
        self.variance.copy_(variance)
        self.mean.copy_(self.mean + weight * difference)
        self.count.copy_(total)


def _class_moments(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return counts (C,) int64, means (C, D) and biased variances (C, D) float64 of the joined batch of all workers.

    Absent classes have arbitrary finite moments. Both moments are matrix products with the one-hot labels, one channel
    block at a time. They are taken about the mean of all labelled pixels, so that a common offset does not cancel.
    """
    precise = torch.promote_types(features.dtype, torch.float32)
    flat = features.flatten(2)
    indices = torch.arange(classes, device=labels.device)
    own_class = labels.flatten(1).unsqueeze(1) == indices[:, None]
    one_hot = own_class.to(precise)
    valid = (labels != IGNORE_INDEX).flatten(1).unsqueeze(2).to(precise)
    counts = sum_over_workers(own_class.sum(dim=(0, 2)))
    blocks = [slice(start, start + _CHANNELS_PER_BLOCK) for start in range(0, flat.shape[1], _CHANNELS_PER_BLOCK)]

    with torch.autocast(features.device.type, enabled=False):
        sums = torch.cat([torch.bmm(flat[:, block].to(precise), valid).double().sum(dim=(0, 2)) for block in blocks])
        center = (sum_over_workers(sums) / counts.sum().clamp(min=1)).to(precise)
        moments = torch.empty(2, classes, flat.shape[1], dtype=torch.float64, device=features.device)
        for block in blocks:
            offsets = flat[:, block].to(precise) - center[block, None]
            moments[0, :, block] = torch.bmm(one_hot, offsets.transpose(1, 2)).double().sum(dim=0)
            moments[1, :, block] = torch.bmm(one_hot, offsets.square_().transpose(1, 2)).double().sum(dim=0)
    first, second = sum_over_workers(moments) / counts.clamp(min=1)[:, None]
    return counts, center + first, (second - first.square()).clamp(min=0)
