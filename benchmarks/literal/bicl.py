"""BiCL's losses, labels and calibration the way the paper and its code write them, without regard to time or memory.

The reference that the tests compare with and the benchmark measures against. Plain torch, differentiated by autograd.
One source/target pair at a time.
"""

# D channels, C classes, H x W pixels of the label map, h x w cells of the feature map.

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = 255
SMALLEST_NORM = 1e-12


def nearest(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample the last two dimensions, up or down, by the framework's own nearest neighbour rule."""
    maps = values.to(torch.promote_types(values.dtype, torch.float32))
    return F.interpolate(maps.reshape(1, -1, *values.shape[-2:]), size=size, mode="nearest").reshape(
        *values.shape[:-2], *size
    )


def shrink(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (H, W) labels at feature resolution, (h, w)."""
    return nearest(labels.float(), size).long()


def class_prototypes(features: Tensor, cells: Tensor, num_classes: int) -> Tensor:
    """Return the mean feature of each class, (C, D), with one masked copy of the features per class present.

    Args:
        features: (D, h, w).
        cells: Labels, (h, w), 255 = ignore.
        num_classes: C.
    """
    prototypes = [features.new_zeros(len(features)) for _ in range(num_classes)]
    for index in cells.unique().tolist():
        if index != IGNORE_INDEX:
            mask = (cells == index).to(features.dtype)
            prototypes[index] = (features * mask).sum(dim=(1, 2)) / mask.sum()
    return torch.stack(prototypes)


def similarity(features: Tensor, prototypes: Tensor) -> Tensor:
    """Return cosine similarities with the prototypes, (C, h, w), exact zeros replaced by -1."""
    cosine = torch.einsum(
        "kd,dhw->khw",
        F.normalize(prototypes, dim=1, eps=SMALLEST_NORM),
        F.normalize(features, dim=0, eps=SMALLEST_NORM),
    )
    return torch.where(cosine == 0, torch.full_like(cosine, -1.0), cosine)


def present_classes(cells: Tensor) -> set[int]:
    return set(cells.unique().tolist()) - {IGNORE_INDEX}


def direction(features: Tensor, prototypes: Tensor, labels: Tensor, overlap: set[int], temperature: float) -> Tensor:
    """Return the cross entropy of full-resolution similarities, over pixels of a shared class; 0 without any.

    Args:
        features: (D, h, w).
        prototypes: Of the other domain, (C, D).
        labels: (H, W), 255 = ignore.
        overlap: Classes with cells in both images.
        temperature: > 0.
    """
    logits = nearest(similarity(features, prototypes), (labels.shape[0], labels.shape[1])) / temperature
    kept_labels = torch.full_like(labels, IGNORE_INDEX)
    for index in overlap:
        kept_labels[labels == index] = index
    if not overlap or bool((kept_labels == IGNORE_INDEX).all()):
        return 0 * logits.sum()
    return F.cross_entropy(logits[None], kept_labels[None], ignore_index=IGNORE_INDEX)


def contrast(
    source_features: Tensor,
    source_labels: Tensor,
    target_features: Tensor,
    target_labels: Tensor,
    *,
    num_classes: int,
    temperature: float = 0.1,
    dynamic_labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return forward and backward contrast of one pair: features (D, h, w), labels (H, W), dynamic labels (h, w)."""
    source_cells = shrink(source_labels, (source_features.shape[1], source_features.shape[2]))
    target_cells = shrink(target_labels, (target_features.shape[1], target_features.shape[2]))
    if dynamic_labels is not None:
        target_cells = torch.where(target_cells == IGNORE_INDEX, dynamic_labels, target_cells)
        dynamic_pixels = shrink(dynamic_labels, (target_labels.shape[0], target_labels.shape[1]))
        target_labels = torch.where(target_labels == IGNORE_INDEX, dynamic_pixels, target_labels)
    source_prototypes = class_prototypes(source_features, source_cells, num_classes)
    target_prototypes = class_prototypes(target_features, target_cells, num_classes)
    overlap = present_classes(source_cells) & present_classes(target_cells)
    return (
        direction(target_features, source_prototypes, target_labels, overlap, temperature),
        direction(source_features, target_prototypes, source_labels, overlap, temperature),
    )


def transfer(
    bias: Tensor,
    source_features: Tensor,
    source_cells: Tensor,
    target_features: Tensor,
    target_cells: Tensor,
    *,
    temperature: float,
    threshold: float,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """Return dynamic labels of one pair, (h, w), and the bias after it, (C, D), with loops over cells and classes."""
    classes = len(bias)
    source = class_prototypes(source_features, source_cells, classes)
    target = class_prototypes(target_features, target_cells, classes)
    source_classes, target_classes = present_classes(source_cells), present_classes(target_cells)
    dynamic = torch.full_like(target_cells, IGNORE_INDEX)
    for row in range(dynamic.shape[0]):
        for column in range(dynamic.shape[1]):
            feature = F.normalize(target_features[:, row, column], dim=0, eps=SMALLEST_NORM)
            scores = torch.full((classes,), -1.0 / temperature, dtype=feature.dtype)
            for index in source_classes:
                calibrated = F.normalize(source[index] + bias[index], dim=0, eps=SMALLEST_NORM)
                scores[index] = calibrated @ feature / temperature
            probabilities = scores.softmax(dim=0)
            if probabilities.max() > threshold:
                dynamic[row, column] = probabilities.argmax()
    moved = bias.clone()
    for index in source_classes & target_classes:
        moved[index] = momentum * bias[index] + (1 - momentum) * (target[index] - source[index])
    return dynamic, moved


def softened_entropy(logits: Tensor) -> Tensor:
    """Return the mean of -Σ q log softmax(q) over pixels, (B, C, H, W) logits."""
    probabilities = logits.softmax(dim=1)
    return -(probabilities * probabilities.log_softmax(dim=1)).sum(dim=1).mean()


def shannon_entropy(logits: Tensor) -> Tensor:
    """Return the mean of -Σ q log q over pixels, (B, C, H, W) logits."""
    probabilities = logits.softmax(dim=1)
    return -torch.special.xlogy(probabilities, probabilities).sum(dim=1).mean()


def class_share_thresholds(logits: list[Tensor], num_classes: int, share: float) -> list[float]:
    """Return the class thresholds from all images' logits, (C, H, W) each, by sorting everything."""
    pooled: list[list[float]] = [[] for _ in range(num_classes)]
    for image in logits:
        confidence, prediction = image.float().softmax(dim=0).max(dim=0)
        for index in range(num_classes):
            pooled[index] += sorted(confidence[prediction == index].tolist())[::5]
    thresholds = []
    for values in pooled:
        descending = sorted(values, reverse=True)
        thresholds.append(descending[int(len(values) * share) - 1] if values else 1.0)
    return thresholds
