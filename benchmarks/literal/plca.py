"""PLCA's losses the way the paper writes them, without regard to time or memory.

The reference that the tests compare with and the benchmark measures against. Plain torch, differentiated by autograd.
"""

# N images, D channels, C classes, L1 source pixels, L2 target pixels.

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = 255


def pixels_first(maps: Tensor) -> Tensor:
    """Return (N, D, h, w) as one row per pixel, (N, h * w, D)."""
    return maps.flatten(2).transpose(1, 2)


def standardised_softmax(similarities: Tensor, factor: float = 1.0) -> Tensor:
    """Return the softmax of each row, less its mean and over its unbiased deviation, both constants."""
    mean = similarities.mean(dim=2, keepdim=True).detach()
    if similarities.shape[2] == 1:
        return similarities * 0 + 1
    deviation = similarities.std(dim=2, keepdim=True).detach()
    return ((similarities - mean) / (factor * deviation + 1e-10)).softmax(dim=2)


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine of each pair of rows, (N, L1, L2)."""
    return torch.bmm(F.normalize(first, dim=2), F.normalize(second, dim=2).transpose(1, 2))


def negative_divergences(first: Tensor, second: Tensor, floor: float = 1e-10) -> Tensor:
    """Return -KL(first || second) of each pair of rows, (N, L1, L2)."""
    own = (first * (first + floor).log()).sum(dim=2, keepdim=True)
    return torch.bmm(first, (second + floor).log().transpose(1, 2)) - own


def aggregate_features(rows: Tensor, weight: float, factor: float = 1.0) -> Tensor:
    """Return the mix of each row with the average of its image, (N, L, D)."""
    return (1 - weight) * rows + weight * torch.bmm(standardised_softmax(cosines(rows, rows), factor), rows)


def aggregate_probabilities(rows: Tensor, weight: float, floor: float = 1e-10) -> Tensor:
    """Return the mix of each row with the average of its image, (N, L, C)."""
    return (1 - weight) * rows + weight * torch.bmm(negative_divergences(rows, rows, floor).softmax(dim=2), rows)


def cycle_loss(out: Tensor, back: Tensor, labels: Tensor) -> Tensor:
    """Return the mean negative log probability of the valid cycles of the batch.

    Args:
        out: Hop probabilities from source to target, (N, L1, L2).
        back: From target to source, (N, L2, L1).
        labels: (N, L1), 255 = ignore.
    """
    best_out, middle = out.max(dim=2)
    best_back, end = back.max(dim=2)
    returned = labels.gather(1, end.gather(1, middle))
    valid = (labels != IGNORE_INDEX) & (returned == labels)
    if not valid.any():
        return (out.sum() + back.sum()) * 0
    return -(best_out.log() + best_back.gather(1, middle).log())[valid].mean()


def feature_association(
    source: Tensor, target: Tensor, labels: Tensor, *, aggregation_weight: float = 0.5, temperature_factor: float = 1.0
) -> Tensor:
    """Return the cycle loss of features (N, D, h, w) compared by cosine; labels (N, h, w)."""
    source_rows, target_rows = pixels_first(source), pixels_first(target)
    if aggregation_weight > 0:
        target_rows = aggregate_features(target_rows, aggregation_weight, temperature_factor)
    similarities = cosines(source_rows, target_rows)
    return cycle_loss(
        standardised_softmax(similarities, temperature_factor),
        standardised_softmax(similarities.transpose(1, 2), temperature_factor),
        labels.flatten(1),
    )


def output_association(
    source_logits: Tensor,
    target_logits: Tensor,
    labels: Tensor,
    *,
    aggregation_weight: float = 0.5,
    temperature_factor: float = 1.0,
    floor: float = 1e-10,
) -> Tensor:
    """Return the cycle loss of logits (N, C, h, w) compared by divergence; labels (N, h, w)."""
    source_rows, target_rows = (pixels_first(logits).softmax(dim=2) for logits in (source_logits, target_logits))
    if aggregation_weight > 0:
        target_rows = aggregate_probabilities(target_rows, aggregation_weight, floor)
    return cycle_loss(
        standardised_softmax(negative_divergences(source_rows, target_rows, floor), temperature_factor),
        standardised_softmax(negative_divergences(target_rows, source_rows, floor), temperature_factor),
        labels.flatten(1),
    )


def overconfidence_regulariser(logits: Tensor, level: float = 10.0) -> Tensor:
    """Return the mean of (h / level - 1) h, with h the mean negative log probability and the bracket a constant."""
    negative_log = -logits.log_softmax(dim=1).mean(dim=1)
    return ((negative_log / level - 1).detach() * negative_log).mean()
