"""ClassMix: source pixels of some classes pasted on target images."""

# B images of H x W pixels each of source and target.

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX

ClassesOf = Literal["image", "batch"]


class Mixed(NamedTuple):
    """Target images with pasted source pixels, their labels and weights."""

    images: Tensor  # (B, 3, H, W)
    labels: Tensor  # (B, H, W) int64
    weights: Tensor  # (B, H, W) float


def draw_classes(
    labels: Tensor, generator: torch.Generator, *, classes_of: ClassesOf = "image", paste_ignored: bool = False
) -> list[Tensor]:
    """Draw half of the classes, rounded up, uniformly and without replacement, for each image.

    Args:
        labels: Source labels, (B, H, W) int64, on the CPU: what is drawn must not wait for a GPU.
        generator: On the CPU.
        classes_of: Whether an image's classes are drawn from its own, or from those of the batch, as in the released
            code, where a drawn class may be absent from the image.
        paste_ignored: Whether 255 is drawn as a class, as in the released code.

    Returns:
        For each image the drawn label values, (K,) int64; none for an image without labels.

    Source:
        Olsson et al., ClassMix, WACV 2021; lhoyer/MIC@2f932a9, mmseg/models/utils/dacs_transforms.py.
    """
    present = [_values(labels if classes_of == "batch" else label, paste_ignored) for label in labels]
    return [
        values[torch.randperm(len(values), generator=generator)[: math.ceil(len(values) / 2)]] for values in present
    ]


def class_masks(labels: Tensor, classes: list[Tensor]) -> Tensor:
    """Return where an image shows one of its drawn classes, (B, H, W) bool.

    Args:
        labels: Source labels, (B, H, W) int64.
        classes: For each image the drawn label values.
    """
    chosen = torch.zeros(len(labels), IGNORE_INDEX + 1, dtype=torch.bool)
    for row, values in zip(chosen, classes, strict=True):
        row[values.cpu()] = True
    if labels.device.type == "cuda":
        chosen = chosen.pin_memory()
    table = chosen.to(labels.device, non_blocking=True)
    return torch.gather(table, 1, labels.flatten(1)).view_as(labels)


def class_mix(
    masks: Tensor,
    source_images: Tensor,
    source_labels: Tensor,
    target_images: Tensor,
    target_labels: Tensor,
    target_weights: Tensor,
    *,
    ignored_weight: float = 1.0,
) -> Mixed:
    """Paste the source pixels of `masks` on the target images, with their labels.

    Args:
        masks: Which source pixels are pasted, (B, H, W) bool.
        source_images: (B, 3, H, W).
        source_labels: (B, H, W) int64, 255 = ignore.
        target_images: (B, 3, H, W).
        target_labels: Pseudo labels, (B, H, W) int64.
        target_weights: Weights of these, (B, H, W). A pasted pixel weighs 1.
        ignored_weight: Weight of a pasted pixel without label, which gives no loss either way: 1 as in DACS, 0 as in
            VFM-UDA.

    Returns:
        What is trained on: x = M x_S + (1 - M) x_T, labels likewise, w = M + (1 - M) q.
    """
    pasted = torch.where(source_labels == IGNORE_INDEX, ignored_weight, 1.0).to(target_weights.dtype)
    return Mixed(
        torch.where(masks[:, None], source_images, target_images),
        torch.where(masks, source_labels, target_labels),
        torch.where(masks, pasted, target_weights),
    )


def _values(labels: Tensor, paste_ignored: bool) -> Tensor:
    values = labels.unique()
    return values if paste_ignored else values[values != IGNORE_INDEX]
