"""Labels at feature resolution: the ground truth sampled down, and the network's own confident predictions."""

# B batch, C classes, H x W pixels of the label map, h x w cells of the feature map.

import torch
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX


def labels_at_features(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Sample a label map down to the feature grid: cell row j reads label row floor(j * H / h), columns alike.

    Args:
        labels: Class indices, (B, H, W), int64; 255 is passed through.
        size: Cells of the feature map, (h, w).

    Returns:
        (B, h, w), int64. Equal to `torch.nn.functional.interpolate(mode="nearest")`, which rejects integers: the ratio
        is rounded to float32, which decides cells whose product falls on a row boundary.

    Source:
        Li et al., Semantic Distribution-aware Contrastive Adaptation, arXiv 2105.05013; BIT-DA/SDCA@d00e7ba.
    """
    rows, columns = (
        _nearest_indices(full, cells, labels.device) for full, cells in zip(labels.shape[-2:], size, strict=True)
    )
    return labels[..., rows[:, None], columns]


def count_values(values: Tensor, bins: int) -> Tensor:
    """Count how often each integer occurs, as `torch.bincount` does, which on a GPU waits for the largest value.

    Args:
        values: Integers in [0, bins), int32 or int64, any shape.
        bins: Length of the result.

    Returns:
        (bins,) int64.
    """
    flat = values.flatten()
    one = torch.ones((), dtype=torch.int64, device=flat.device)
    return torch.zeros(bins, dtype=torch.int64, device=flat.device).index_add_(0, flat, one.expand(len(flat)))


@torch.no_grad()
def confident_labels(logits: Tensor, threshold: float) -> Tensor:
    """Label each pixel with the predicted class where its probability reaches the threshold.

    Args:
        logits: Class scores, (B, C, h, w), any floating type; computed in float32 or wider.
        threshold: Smallest probability that is kept, inclusive; in [0, 1].

    Returns:
        Class indices, (B, h, w), int64, without gradient; 255 where the network is less confident, which may be
        everywhere.

    Source:
        Li et al., Semantic Distribution-aware Contrastive Adaptation, arXiv 2105.05013; BIT-DA/SDCA@d00e7ba.
    """
    precise = logits if logits.dtype == torch.float64 else logits.float()
    confidence, predicted = precise.softmax(dim=1).max(dim=1)
    return predicted.masked_fill(confidence < threshold, IGNORE_INDEX)


def _nearest_indices(full: int, cells: int, device: torch.device) -> Tensor:
    scale = torch.full((), full / cells, dtype=torch.float32, device=device)  # a copy from the host would wait
    positions = torch.arange(cells, dtype=torch.float32, device=device) * scale
    return positions.long().clamp(max=full - 1)
