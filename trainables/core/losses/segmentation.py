"""Supervised losses of up-sampled logits: cross entropy and Lovász-Softmax."""

# B batch, C classes, H x W pixels of the label map, N = B * H * W pixels of this worker.

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.distributed import (
    gather_over_workers,
    global_mean,
    rows_before,
    sum_over_workers,
    world_size,
)


def segmentation_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compare each labelled pixel's class distribution with its label.

    Args:
        logits: Class scores at label size, (B, C, H, W), any floating type; computed in float32 or wider.
        labels: Class indices, (B, H, W), int64. IGNORE_INDEX (255) leaves a pixel out.

    Returns:
        Scalar in nats, averaged over the labelled pixels of the whole batch, all data-parallel workers included:
        local sum over global count, see `global_mean`. Zero, with zero gradient, when all are ignored.
    """
    pixel_losses = _pixel_cross_entropy(logits, labels)
    total = pixel_losses.sum(dtype=torch.float64).to(pixel_losses.dtype)
    return global_mean(total, (labels != IGNORE_INDEX).sum())


def weighted_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, mean_over: Literal["all", "valid"] = "all"
) -> Tensor:
    """Compare each pixel's class distribution with its label, each pixel by its weight.

    Args:
        logits: Class scores at label size, (B, C, H, W), any floating type; computed in float32 or wider.
        labels: Class indices, (B, H, W), int64. IGNORE_INDEX (255) leaves a pixel out.
        weights: (B, H, W), not negative; None weighs all 1.
        mean_over: What the sum is divided by: all pixels, ignored ones too, as mmseg does, so that an image with 30 %
            ignored pixels weighs 30 % less; or those with a label, whatever they weigh.

    Returns:
        Scalar in nats, of the whole batch, all data-parallel workers included. Zero, with zero gradient, when all are
        ignored.

    Source:
        Tranheden et al., DACS, WACV 2021; lhoyer/MIC@2f932a9, mmseg/models/losses/cross_entropy_loss.py.
    """
    pixel_losses = _pixel_cross_entropy(logits, labels)
    if weights is not None:
        pixel_losses = pixel_losses * weights
    total = pixel_losses.sum(dtype=torch.float64).to(pixel_losses.dtype)
    valid = labels != IGNORE_INDEX
    return global_mean(total, (valid if mean_over == "valid" else torch.ones_like(valid)).sum())


def lovasz_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """Bound the mean Jaccard distance (1 - IoU) from above by its Lovász extension.

    For a class with G pixels, the errors |1[y = c] - p_c| of all labelled pixels are sorted descending. Walking down
    the list, the j-th error weighs what the pixel adds to the Jaccard distance when it turns wrong after those before
    it. With I class pixels still right and a union of U pixels after j steps, that is 1 / U for a pixel of the class
    and I / (U (U - 1)) for another one: no difference of nearly equal numbers, no float pixel counts.

    Args:
        logits: Class scores at label size, (B, C, H, W), any floating type; computed in float32 or wider.
        labels: Class indices, (B, H, W), int64. IGNORE_INDEX (255) leaves a pixel out.

    Returns:
        Scalar without unit, averaged over the classes present in the labels. The pixels of the batch are pooled, those
        of all data-parallel workers included: each worker returns its own pixels' part times the number of workers,
        so that averaging over workers gives value and gradient of the joined batch. Zero, with zero gradient, when all
        pixels are ignored.

    Source:
        Berman et al., The Lovász-Softmax loss, CVPR 2018, multi-class surrogate averaged over the present classes, as
        used by Li et al., Semantic Distribution-aware Contrastive Adaptation (SDCA), arXiv 2105.05013;
        BIT-DA/SDCA@d00e7ba.
        Differs: the weights are computed in the closed form above; an empty label map gives zero.
    """
    probabilities = _full_precision(logits).softmax(dim=1)
    slopes, foreground_weight = _lovasz_slopes(probabilities.detach(), labels)
    # Once the order of the errors is fixed, the loss is linear: w (1 - p) on pixels of the class, w p on the others.
    loss = (probabilities * slopes).sum(dtype=torch.float64) + foreground_weight
    return (loss * world_size()).to(probabilities.dtype)


@torch.no_grad()
def _lovasz_slopes(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivative by each probability, (B, C, H, W), and the total weight of this worker's own-class errors.

    Works class by class, so that temporaries stay at a few times the pixels of all workers.
    """
    slopes = torch.zeros_like(probabilities)
    foreground_weight = torch.zeros((), dtype=torch.float64, device=labels.device)
    labels_of_worker = labels.flatten()
    all_labels = gather_over_workers(labels_of_worker)
    start = rows_before(labels_of_worker.numel(), labels.device)
    pixels_of_worker = slice(start, start + labels_of_worker.numel())
    class_sizes = torch.stack([(labels_of_worker == index).sum() for index in range(probabilities.shape[1])])
    present = sum_over_workers(class_sizes) > 0
    number = present.sum()
    for index in range(len(present)):
        foreground = all_labels == index
        errors = (gather_over_workers(probabilities[:, index].flatten()) - foreground.to(probabilities.dtype)).abs()
        # Ignored pixels come last, where no class pixel is left to lose and weights are exactly zero.
        errors = errors.masked_fill(all_labels == IGNORE_INDEX, -1.0)
        # A class that is not present weighs nothing; to leave it out, a GPU would have to be waited for.
        weights = torch.where(present[index], _jaccard_weights(errors, foreground)[pixels_of_worker] / number, 0.0)
        slopes[:, index] = torch.where(foreground[pixels_of_worker], -weights, weights).view_as(labels)
        foreground_weight += (weights * foreground[pixels_of_worker]).sum(dtype=torch.float64)
    return slopes, foreground_weight


def _jaccard_weights(errors: Tensor, foreground: Tensor) -> Tensor:
    """Return each pixel's weight in the Lovász extension of the Jaccard distance, in the pixels' own order.

    Args:
        errors: (N,), not negative, or -1 for a pixel without label.
        foreground: Which pixels belong to the class, (N,) bool. Without any, the weights mean nothing.
    """
    # `errors.argsort(descending=True, stable=True)`: floats are -1 or not negative here and order like their bits, and
    # integers are sorted by radix, on a CPU several times faster.
    bits = errors.view(torch.int64 if errors.dtype == torch.float64 else torch.int32)
    order = (-bits).argsort(stable=True)
    sorted_foreground = foreground[order]
    class_pixels_passed = sorted_foreground.cumsum(0)
    class_size = class_pixels_passed[-1]
    intersection = (class_size - class_pixels_passed).to(errors.dtype)
    union = (class_size + (~sorted_foreground).cumsum(0)).to(errors.dtype)
    sorted_weights = torch.where(sorted_foreground, 1.0 / union, intersection / union / (union - 1.0))
    weights = torch.empty_like(errors)
    weights[order] = sorted_weights
    return weights


def _pixel_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of each pixel, (B, H, W), 0 where it is ignored."""
    precise = _full_precision(logits)
    if not (labels.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return F.cross_entropy(precise, labels, ignore_index=IGNORE_INDEX, reduction="none")
    # PyTorch has no deterministic kernel of it for GPUs; that of picking a value and its gradient there is.
    ignored = labels == IGNORE_INDEX
    picked = precise.log_softmax(dim=1).gather(1, labels.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1)
    return torch.where(ignored, 0.0, -picked)


def _full_precision(values: Tensor) -> Tensor:
    """Return `values` as float32, or as they are when float64."""
    return values if values.dtype == torch.float64 else values.float()
