"""Running mean and variance of the features of each class."""

# B batch, D feature channels, C classes, h x w cells of the feature map, P = h * w.

import torch
from torch import Tensor, nn

from segadapt.trainables.core.distributed import sum_over_workers

_CHANNELS_PER_BLOCK = 128


class ClassStatistics(nn.Module):
    """Mean and diagonal variance of every pixel feature seen so far, per class, without forgetting.

    Merging a batch equals computing the moments of all pixels at once. Sums and counts are reduced over data-parallel
    workers, so that all workers hold the statistics of the joined batches.

    Args:
        classes: Number of classes C.
        channels: Number of feature channels D.

    Attributes:
        count: Labelled pixels seen, (C,), int64: float32 counts stop growing at 2^24.
        mean: (C, D), float64: a float32 mean stops moving after some 10^5 batches, each of which moves it less than it
            is rounded by. Zero for a class never seen.
        variance: (C, D), float64, biased (divided by the count), diagonal only; zero for a class never seen, and
            exactly zero for a class all of whose pixels are equal, as a single pixel is.

    Source:
        Li et al., Semantic Distribution-aware Contrastive Adaptation for Semantic Segmentation (SDCA), arXiv
        2105.05013, online estimation of mean and covariance; BIT-DA/SDCA@d00e7ba.
        Differs: counts are integers, moments and weights float64; workers share their sums, there each kept its own
        statistics.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(classes, channels, dtype=torch.float64))
        self.register_buffer("variance", torch.zeros(classes, channels, dtype=torch.float64))

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

    Absent classes have mean and variance zero. The images of all workers are merged like batches, about their common
    mean, and sums over pixels are matrix products with the one-hot labels: nothing cancels, however far the classes lie
    from zero and from each other.
    """
    counts, means, squares = _image_moments(features, labels, classes)
    total = sum_over_workers(counts.sum(dim=0))
    sizes, divisor = counts.double().unsqueeze(2), total.clamp(min=1).double().unsqueeze(1)
    mean = sum_over_workers((sizes * means).sum(dim=0)) / divisor
    deviations = squares + sizes * (means - mean).square()
    return total, mean, sum_over_workers(deviations.sum(dim=0)) / divisor


def _image_moments(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each image's counts (B, C) int64, means (B, C, D) and sums of squared deviations (B, C, D), float64.

    Works on a channel block at a time. Pixels are first taken about one pixel of their class, then about their mean:
    the first makes the offsets of equal pixels exactly zero, the second keeps outliers from mattering.
    """
    precise = torch.promote_types(features.dtype, torch.float32)
    flat = features.flatten(2)
    own_class = labels.flatten(1).unsqueeze(1) == torch.arange(classes, device=labels.device)[:, None]
    one_hot = own_class.to(precise)
    counts = own_class.sum(dim=2)
    divisor = counts.clamp(min=1).to(precise).unsqueeze(2)
    first_pixels = own_class.byte().argmax(dim=2).unsqueeze(1)
    references, means, squares = [], [], []
    with torch.autocast(features.device.type, enabled=False):
        for start in range(0, flat.shape[1], _CHANNELS_PER_BLOCK):
            block = slice(start, start + _CHANNELS_PER_BLOCK)
            values = flat[:, block].to(precise)
            references.append(values.gather(2, first_pixels.expand(-1, values.shape[1], -1)))
            offsets = torch.baddbmm(values, references[-1], one_hot, alpha=-1)
            means.append(torch.bmm(one_hot, offsets.transpose(1, 2)) / divisor)
            offsets.baddbmm_(means[-1].transpose(1, 2), one_hot, alpha=-1).square_()
            squares.append(torch.bmm(one_hot, offsets.transpose(1, 2)))
    centers = torch.cat(references, dim=1).transpose(1, 2).double() + torch.cat(means, dim=2)
    return counts, centers, torch.cat(squares, dim=2).double()
