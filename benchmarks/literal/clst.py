"""CLST's losses, state and pseudo labels the way their definitions read, without regard to time or memory.

The reference that the tests compare with and the benchmark measures against. Plain torch and Python loops,
differentiated by autograd.
"""

# B images, D feature channels, C classes, h x w cells of the feature map, H x W pixels of a label map.

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = 255


def update_centroids(
    features: Tensor, labels: Tensor, centroids: Tensor, seen: Tensor, *, momentum: float
) -> tuple[Tensor, Tensor]:
    """Return centroids and seen classes after a batch, with one masked copy of the features for each class.

    Args:
        features: (B, D, h, w).
        labels: (B, h, w), 255 = ignore.
        centroids: (C, D).
        seen: (C,) bool.
        momentum: Share of a centroid that stays.
    """
    centroids, seen = centroids.clone(), seen.clone()
    for index in range(len(centroids)):
        mask = labels == index
        if not mask.any():
            continue
        mean = (features.detach() * mask.unsqueeze(1)).sum(dim=(0, 2, 3)) / mask.sum()
        centroids[index] = momentum * centroids[index] + (1 - momentum) * mean if seen[index] else mean
        seen[index] = True
    return centroids, seen


def centroid_contrast(
    features: Tensor, labels: Tensor, centroids: Tensor, seen: Tensor, *, temperature: float = 0.1, min_cells: int = 1
) -> Tensor:
    """Return the contrast averaged over pairs of image and class, with one masked copy of the image for each pair.

    Args:
        features: (B, D, h, w).
        labels: (B, h, w), 255 = ignore.
        centroids: (C, D).
        seen: (C,) bool.
        temperature: > 0.
        min_cells: Smallest number of cells of a pair.
    """
    losses = anchor_losses(features, labels, centroids, seen, temperature=temperature, min_cells=min_cells)
    return torch.stack([loss for _, _, loss in losses]).mean() if losses else 0.0 * features.sum()


def anchor_losses(
    features: Tensor, labels: Tensor, centroids: Tensor, seen: Tensor, *, temperature: float = 0.1, min_cells: int = 1
) -> list[tuple[int, int, Tensor]]:
    """Return image, class and loss of each pair that takes part; arguments as in `centroid_contrast`."""
    losses = []
    valid = [index for index in range(len(centroids)) if seen[index]]
    for image in range(len(features)):
        for index in valid:
            mask = labels[image] == index
            if mask.sum() < min_cells:
                continue
            mean = (features[image] * mask).sum(dim=(1, 2)) / mask.sum()
            direction = mean / mean.norm().clamp(min=1e-12)
            similarities = [
                (direction * centroids[other] / centroids[other].norm().clamp(min=1e-12)).sum() / temperature
                for other in valid
            ]
            own = similarities[valid.index(index)]
            losses.append((image, index, torch.stack(similarities).logsumexp(dim=0) - own))
    return losses


def average_predictions(probabilities: Tensor, stored: Tensor | None, momentum: float) -> Tensor:
    """Return what a round stores for an image, number by number.

    Args:
        probabilities: (C, h, w).
        stored: Of the round before, (C, h, w) uint8.
        momentum: Share of the average that stays.

    Returns:
        (C, h, w) uint8.
    """
    classes, rows, columns = probabilities.shape
    levels = torch.zeros(classes, rows, columns, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            for index in range(classes):
                average = probabilities[index, row, column].item()
                if stored is not None:
                    before = stored[:, row, column].tolist()
                    average = momentum * before[index] / sum(before) + (1 - momentum) * average
                levels[index, row, column] = min(max(math.floor(255 * average + 0.5), 0), 255)
    return levels


def decode(stored: Tensor) -> Tensor:
    """Return the probabilities of (..., C, h, w) uint8 as float64."""
    return stored.double() / stored.double().sum(dim=-3, keepdim=True)


def thresholds(images: Sequence[Tensor], *, share: float, cap: float) -> list[float]:
    """Return each class's threshold by sorting all confidences.

    Args:
        images: Stored predictions, (C, h, w) uint8 each.
        share: Of a class's cells.
        cap: Largest threshold.
    """
    classes = len(images[0])
    confidences: list[list[float]] = [[] for _ in range(classes)]
    for image in images:
        for cell in decode(image).flatten(1).T.tolist():
            best = max(cell)
            confidences[cell.index(best)].append(best)
    found = []
    for own in confidences:
        own.sort(reverse=True)
        number = max(1, math.floor(share * len(own)))
        found.append(min(cap, own[number - 1]) if own else cap)
    return found


def label(stored: Tensor, limits: Sequence[float], size: tuple[int, int]) -> Tensor:
    """Return an image's labels, pixel by pixel, (H, W) int64.

    Args:
        stored: (C, h, w) uint8.
        limits: Threshold of each class.
        size: (H, W).
    """
    upsampled = F.interpolate(decode(stored)[None], size=size, mode="bilinear", align_corners=True)[0]
    labels = torch.full(size, IGNORE_INDEX)
    for row in range(size[0]):
        for column in range(size[1]):
            pixel = upsampled[:, row, column].tolist()
            index = pixel.index(max(pixel))
            if pixel[index] + 1e-6 >= limits[index]:
                labels[row, column] = index
    return labels
