"""SDCA's losses and statistics the way the paper writes them, without regard to time or memory.

The reference that the tests compare with and the benchmark measures against. Plain torch, differentiated by autograd.
"""

# N pixels, D channels, C classes, G pixels of one class.

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = 255


def pixels_first(maps: Tensor) -> Tensor:
    """Return (B, D, h, w) as one row per pixel, (B * h * w, D)."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def distribution_contrast(
    features: Tensor,
    labels: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    temperature: float = 100.0,
    covariance_factor: float = 1.0,
) -> Tensor:
    """Return the cross entropy of the Gaussian logits, with the quadratic part of the own class taken out again.

    Args:
        features: (B, D, h, w).
        labels: (B, h, w), 255 = ignore; at least one pixel is labelled.
        mean: (C, D).
        variance: (C, D).
        temperature: > 0.
        covariance_factor: Multiplies the normalised variance.

    Returns:
        Scalar, averaged over the labelled pixels.
    """
    rows, targets = pixels_first(features), labels.reshape(-1)
    kept = targets != IGNORE_INDEX
    rows, targets = F.normalize(rows[kept], dim=1), targets[kept]
    mean = F.normalize(mean, dim=1)
    variance = F.normalize(variance, dim=1) * covariance_factor
    squares = rows**2
    logits = rows @ mean.T / temperature + squares @ variance.T / (2 * temperature**2)
    own_variance = variance[targets]
    correction = (squares * own_variance).sum(dim=1) / (2 * temperature**2)
    return F.cross_entropy(logits, targets) + correction.mean()


def merge_statistics(
    features: Tensor, labels: Tensor, count: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return count, mean and variance after merging a batch, with one copy of the features for each class.

    Args:
        features: (B, D, h, w).
        labels: (B, h, w), 255 = ignore.
        count: (C,) floating.
        mean: (C, D).
        variance: (C, D).
    """
    rows, targets = pixels_first(features.detach()), labels.reshape(-1)
    classes, channels = mean.shape
    membership = (targets[:, None] == torch.arange(classes, device=targets.device)).to(rows.dtype)
    membership = membership[:, :, None].expand(-1, -1, channels)
    per_class = rows[:, None, :] * membership
    batch_count = membership.sum(dim=0)
    divisor = batch_count.clamp(min=1)
    batch_mean = per_class.sum(dim=0) / divisor
    deviations = (per_class - batch_mean) * membership
    batch_variance = (deviations**2).sum(dim=0) / divisor
    total = batch_count + count[:, None]
    weight = batch_count / total.clamp(min=1)
    merged_variance = (
        (1 - weight) * variance + weight * batch_variance + weight * (1 - weight) * (mean - batch_mean) ** 2
    )
    return total[:, 0], (1 - weight) * mean + weight * batch_mean, merged_variance


def segmentation_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean negative log probability of the labelled pixels' classes."""
    rows, targets = pixels_first(logits), labels.reshape(-1)
    kept = targets != IGNORE_INDEX
    log_probabilities = rows[kept].log_softmax(dim=1)
    return -log_probabilities[torch.arange(len(log_probabilities)), targets[kept]].mean()


def lovasz_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the Lovász extension of the Jaccard distance, averaged over present classes, with a loop over pixels."""
    rows, targets = pixels_first(logits), labels.reshape(-1)
    kept = targets != IGNORE_INDEX
    probabilities, targets = rows[kept].softmax(dim=1), targets[kept]
    class_losses = []
    for index in targets.unique().tolist():
        is_class = (targets == index).to(probabilities.dtype)
        errors = (is_class - probabilities[:, index]).abs()
        size = int(is_class.sum())
        seen_class, seen_other, previous, loss = 0, 0, 0.0, errors.new_zeros(())
        for pixel in errors.detach().argsort(descending=True, stable=True).tolist():
            seen_class += int(is_class[pixel])
            seen_other += 1 - int(is_class[pixel])
            distance = 1 - (size - seen_class) / (size + seen_other)
            loss = loss + errors[pixel] * (distance - previous)
            previous = distance
        class_losses.append(loss)
    return torch.stack(class_losses).mean()
