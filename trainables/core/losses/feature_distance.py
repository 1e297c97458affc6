"""Distance of source features to those of the network as it was pretrained, on cells of things."""

# B batch, D feature channels, h x w cells, H x W pixels, C classes.

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.distributed import global_mean

CITYSCAPES_THINGS = (6, 7, 11, 12, 13, 14, 15, 16, 17, 18)
"""Train ids of Cityscapes' countable classes, from traffic light and sign to person and vehicles."""


def pure_labels(labels: Tensor, size: tuple[int, int], num_classes: int, *, purity: float = 0.75) -> Tensor:
    """Label each cell with the class that fills at least the share `purity` of its pixels.

    Args:
        labels: (B, H, W) int64, 255 = ignore. Ignored pixels count as pixels of the cell.
        size: Cells, (h, w). A cell is s x s pixels with s = W // w; rows and columns beyond s h, s w are dropped.
        num_classes: C.
        purity: In (0, 1]. Paper: 0.75.

    Returns:
        (B, h, w) int64; 255 where no class is pure enough.
    """
    side = labels.shape[-1] // size[1]
    part = labels[:, : side * size[0], : side * size[1]]
    shown = F.one_hot(torch.where(part == IGNORE_INDEX, num_classes, part), num_classes + 1)[..., :num_classes]
    counts = shown.reshape(len(labels), size[0], side, size[1], side, num_classes).sum((2, 4))
    most, winners = counts.max(-1)
    return torch.where(most >= purity * side * side, winners, IGNORE_INDEX)


def feature_distance(
    features: Tensor,
    pretrained: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    things: Sequence[int] = CITYSCAPES_THINGS,
    purity: float = 0.75,
) -> Tensor:
    """Keep the features of things near those that the network had before.

    Args:
        features: Last map of the encoder on source images, (B, D, h, w).
        pretrained: That of a frozen copy with the pretrained weights, (B, D, h, w), a constant.
        labels: Source labels, (B, H, W) int64, 255 = ignore.
        num_classes: C.
        things: Classes whose cells count.
        purity: See `pure_labels`.

    Returns:
        Scalar: the mean over the cells of things, in the whole batch of all workers, of the Euclidean distance of their
        features. 0 with zero gradient where there is none. A cell whose features agree gives no gradient.

    Source:
        Hoyer et al., DAFormer, CVPR 2022, Eq. 7; lhoyer/MIC@2f932a9, mmseg/models/uda/dacs.py.
        Differs: no cell of a thing gives 0, there NaN.
    """
    cells = pure_labels(labels, (features.shape[-2], features.shape[-1]), num_classes, purity=purity)
    counts = torch.zeros_like(cells, dtype=torch.bool)
    for thing in things:  # a tensor of them would have to be copied to a GPU, and waited for
        counts |= cells == thing
    exact = torch.promote_types(features.dtype, torch.float32)
    squared = (features.to(exact) - pretrained.detach().to(exact)).square().sum(1)
    distant = counts & (squared > 0)  # the root has no gradient at 0
    distances = torch.where(distant, squared, 1.0).sqrt() * distant
    return global_mean(distances.sum(), counts.sum())
