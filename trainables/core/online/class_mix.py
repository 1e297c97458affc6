"""ClassMix: source pixels of some classes pasted on target images."""

# B images of H x W pixels each of source and target.

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.distributed import sum_over_workers

ClassesOf = Literal["image", "batch"]


class Mixed(NamedTuple):
    """Target images with pasted source pixels, their labels and weights."""

    images: Tensor  # (B, 3, H, W)
    labels: Tensor  # (B, H, W) int64
    weights: Tensor  # (B, H, W) float


def draw_classes(
    labels: Tensor, draws: Tensor, *, classes_of: ClassesOf = "image", paste_ignored: bool = False
) -> Tensor:
    """Draw half of the classes, rounded up, uniformly and without replacement, for each image.

    Nothing is read from the labels' device: which classes there are stays there.

    Args:
        labels: Source labels, (B, H, W) int64.
        draws: U(0, 1) for each label value, (B, 256), on the labels' device. The values with the smallest are taken.
        classes_of: Whether an image's classes are drawn from its own, or from those of the batch of all workers, as in
            the released code, where a drawn class may be absent from the image.
        paste_ignored: Whether 255 is drawn as a class, as in the released code.

    Returns:
        Which label values are drawn for each image, (B, 256) bool; none for an image without labels.

    Source:
        Olsson et al., ClassMix, WACV 2021; lhoyer/MIC@2f932a9, mmseg/models/utils/dacs_transforms.py.
    """
    present = torch.zeros(draws.shape, dtype=torch.bool, device=labels.device).scatter_(1, labels.flatten(1), True)
    if classes_of == "batch":
        present = (sum_over_workers(present.sum(0)) > 0).expand_as(present)
    if not paste_ignored:
        present = present & (torch.arange(draws.shape[1], device=labels.device) != IGNORE_INDEX)
    ranks = draws.masked_fill(~present, math.inf).argsort(1).argsort(1)
    return present & (2 * ranks < present.sum(1, keepdim=True))


def class_masks(labels: Tensor, drawn: Tensor) -> Tensor:
    """Return where an image shows one of its drawn classes, (B, H, W) bool.

    Args:
        labels: Source labels, (B, H, W) int64.
        drawn: Which label values are drawn for each image, (B, 256) bool.
    """
    return torch.gather(drawn, 1, labels.flatten(1)).view_as(labels)


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
