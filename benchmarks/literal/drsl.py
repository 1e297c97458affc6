"""DRSL's losses and pseudo-label rule the way the specification writes them, without regard to time or memory.

The reference that the tests compare with and the benchmark measures against. Plain torch, differentiated by autograd.
"""

# N cells, D channels, C classes, M modes per class; modes are numbered k * M + m.

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = 255


def cells_first(maps: Tensor) -> Tensor:
    """Return (B, D, h, w) as one row per cell, (B * h * w, D)."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def mode_distances(rows: Tensor, modes: Tensor) -> Tensor:
    """Return the squared distances of unit embeddings and unit modes, (N, C, M), from all their differences."""
    unit_modes = F.normalize(modes, dim=2)
    differences = F.normalize(rows, dim=1)[:, None, None, :] - unit_modes[None]
    return (differences**2).sum(dim=3)


def mode_margin(embeddings: Tensor, labels: Tensor, modes: Tensor, *, margin: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return the class-balanced hinge and each cell's nearest own mode.

    Args:
        embeddings: (B, D, h, w).
        labels: (B, h, w), 255 = ignore; at least one cell is labelled.
        modes: (C, M, D), at least two classes.
        margin: Added to the difference of distances.
    """
    kept = labels.reshape(-1) != IGNORE_INDEX
    targets = labels.reshape(-1)[kept]
    distances = mode_distances(cells_first(embeddings)[kept], modes)
    is_own = F.one_hot(targets, len(modes)).bool()[:, :, None].expand_as(distances)
    own = distances.masked_fill(~is_own, math.inf).flatten(1).min(dim=1)
    other = distances.masked_fill(is_own, math.inf).flatten(1).min(dim=1)
    hinge = (own.values - other.values + margin).clamp(min=0)
    class_losses = [hinge[targets == index].mean() for index in targets.unique().tolist()]
    nearest = torch.full_like(labels.reshape(-1), -1)
    nearest[kept] = own.indices
    return torch.stack(class_losses).mean(), nearest.view_as(labels)


def mode_scores(embeddings: Tensor, modes: Tensor, *, width: float = 0.5) -> Tensor:
    """Return the largest Gaussian score of each class's modes, (B, C, h, w)."""
    scores = torch.exp(-mode_distances(cells_first(embeddings), modes) / (2 * width**2)).amax(dim=2)
    batch, _, rows, columns = embeddings.shape
    return scores.view(batch, rows, columns, -1).permute(0, 3, 1, 2)


def mode_alignment(
    source: Tensor,
    source_modes: Tensor,
    target: Tensor,
    target_modes: Tensor,
    *,
    num_modes: int,
    stop_source: bool = True,
) -> Tensor:
    """Return the mean over shared modes of the mean squared distance of all pairs of a target and a source cell."""
    sources = F.normalize(cells_first(source.detach() if stop_source else source), dim=1)
    targets = F.normalize(cells_first(target), dim=1)
    losses = []
    for mode in range(num_modes):
        own, others = targets[target_modes.reshape(-1) == mode], sources[source_modes.reshape(-1) == mode]
        if len(own) and len(others):
            losses.append(((own[:, None, :] - others[None]) ** 2).sum(dim=2).mean())
    return torch.stack(losses).mean() if losses else (source.sum() + target.sum()) * 0


def sampled_mode_alignment(
    source: Tensor,
    source_modes: Tensor,
    target: Tensor,
    target_modes: Tensor,
    pairs: Tensor,
    *,
    stop_source: bool = True,
) -> Tensor:
    """Return the mean over modes of the mean squared distance of the pairs (mode, target cell, source cell)."""
    sources = F.normalize(cells_first(source.detach() if stop_source else source), dim=1)
    targets = F.normalize(cells_first(target), dim=1)
    losses: dict[int, list[Tensor]] = {}
    for mode, own, other in pairs.tolist():
        difference = targets[target_modes.reshape(-1) == mode][own] - sources[source_modes.reshape(-1) == mode][other]
        losses.setdefault(mode, []).append((difference**2).sum())
    return torch.stack([torch.stack(of_mode).mean() for of_mode in losses.values()]).mean()


def self_paced_thresholds(probabilities: Tensor, portion: float) -> list[float]:
    """Return each class's threshold from sorted lists of every fourth confidence; probabilities are (B, C, H, W)."""
    classes = probabilities.shape[1]
    confidences: list[list[float]] = [[] for _ in range(classes)]
    for image in probabilities:
        confidence, prediction = image.max(dim=0)
        for index in range(classes):
            confidences[index] += confidence[prediction == index][::4].tolist()
    thresholds = []
    for values in confidences:
        rank = math.floor(len(values) * portion)
        thresholds.append(sorted(values, reverse=True)[rank - 1] if rank >= 1 else 1.0)
    return thresholds


def self_paced_labels(probabilities: Tensor, thresholds: list[float]) -> Tensor:
    """Return the class of the largest ratio of probability and threshold, 255 where it is below 1, (B, H, W)."""
    ratios = probabilities / torch.tensor(thresholds, dtype=probabilities.dtype)[:, None, None]
    largest, classes = ratios.max(dim=1)
    return torch.where(largest >= 1, classes, IGNORE_INDEX)
