"""Running mean of the features of each class."""

# B images, D feature channels, C classes, h x w cells of the feature map.

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from segadapt.trainables.core.distributed import sum_over_workers
from segadapt.trainables.core.losses.centroid_contrast import class_sums


class ClassCentroids(nn.Module):
    """A slowly moving mean feature per class. Workers share their sums, so that all hold the same centroids.

    Args:
        num_classes: C.
        channels: D.

    Attributes:
        centroids: (C, D), float64, in which small moves are not lost; zero for a class never seen.
        seen: Which classes have been seen, (C,) bool. A class that has not is to be left out, not to enter as zero.

    Source:
        Marsden et al., Contrastive Learning and Self-Training for Unsupervised Domain Adaptation in Semantic
        Segmentation (CLST), arXiv 2105.02001, names category-wise centroids; the rule that moves them is ours.
    """

    centroids: Tensor
    seen: Tensor

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("centroids", torch.zeros(num_classes, channels, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, *, momentum: float = 0.99) -> None:
        """Move the centroids towards the class means of a batch, of all workers: every worker must call this.

        With m the mean over the cells of class k in the whole batch:

            centroid <- m at first sight, afterwards momentum * centroid + (1 - momentum) * m

        Args:
            features: (B, D, h, w), any floating type, used without gradient; computed in float32 or wider.
            labels: Class indices at feature resolution, (B, h, w), int64. IGNORE_INDEX (255) leaves a cell out.
                Classes absent from the batch keep their centroid; nothing changes when all cells are ignored.
            momentum: Share of the centroid that stays, in [0, 1].
        """
        means, present = self._means(*self._sums(features, labels))
        moved = momentum * self.centroids + (1 - momentum) * means
        self._replace(torch.where(self.seen.unsqueeze(1), moved, means), present)

    @torch.no_grad()
    def fill(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Set the centroids to the class means over many batches, of all workers, whatever their order and size.

        Args:
            batches: Features and labels as in `update`. Workers may have unequally many, or none, but all must call
                this. Classes that occur nowhere keep their centroid.
        """
        sums = torch.zeros_like(self.centroids)
        counts = self.seen.new_zeros(self.seen.shape, dtype=torch.int64)
        for features, labels in batches:
            batch_sums, batch_counts = self._sums(features, labels)
            sums += batch_sums
            counts += batch_counts
        self._replace(*self._means(sums, counts))

    def _sums(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return this worker's sums, (C, D) float64, and numbers of cells, (C,) int64."""
        sums, counts = class_sums(features, labels, len(self.seen))
        return sums.sum(dim=0, dtype=torch.float64), counts.sum(dim=0)

    def _means(self, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class means over all workers, (C, D) float64, and which classes have any cell, (C,) bool."""
        counts = sum_over_workers(counts)
        return sum_over_workers(sums) / counts.clamp(min=1).unsqueeze(1), counts > 0

    def _replace(self, centroids: Tensor, present: Tensor) -> None:
        self.centroids.copy_(torch.where(present.unsqueeze(1), centroids, self.centroids))
        self.seen.logical_or_(present)
