"""Cycle association of pixels: source to target and back, on features and on class probabilities.

Also the regulariser of overconfident predictions. The aggregation of the target is in `spatial_aggregation`.
"""

# N images per domain, D feature channels, C classes, h x w cells of the source's feature map, h' x w' of the target's.

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.distributed import global_mean
from segadapt.trainables.core.losses.pair_association import associate
from segadapt.trainables.core.losses.pixel_similarity import (
    PROBABILITY_FLOOR,
    Comparison,
    Kernels,
    fresh_rows,
    image_rows,
    kernel_operands,
    most_similar,
    precise,
    write_rows,
)
from segadapt.trainables.core.losses.spatial_aggregation import Aggregation, FusedAggregation, check_weight

Similarity = Literal["cosine", "divergence"]
"""Cosine of features, or negative Kullback-Leibler divergence of class probabilities."""


class Cycles(NamedTuple):
    """Where the two hops of each source pixel lead. Pixels are numbered row by row."""

    middle: Tensor
    """Most similar target pixel of each source pixel, (N, h * w) int64."""
    end: Tensor
    """Most similar source pixel of that target pixel, (N, h * w) int64."""
    valid: Tensor
    """Whether the cycle starts at a labelled pixel and ends in the same class, (N, h * w) bool."""


def feature_association(
    source: Tensor,
    target: Tensor,
    labels: Tensor,
    *,
    aggregation_weight: float = 0.5,
    temperature_factor: float = 1.0,
    kernels: Kernels = "reference",
) -> Tensor:
    """Raise the hop probabilities of cycles that return to their class, on features compared by cosine.

    Source pixel i hops to its most similar target pixel j, which hops to its most similar source pixel e. With s the
    similarities, σ_i the unbiased standard deviation of row i (a constant), κ the temperature factor and y the labels:

        P_ij = softmax_j(s_ij / (κ σ_i + 1e-10))        loss = -mean over {i: y_e = y_i} of log P12_ij + log P21_je

    Both hops have their own rows and deviations. Ignored source pixels start no cycle, but are candidates of the way
    back. The target is first aggregated, see `aggregate_features`. Images are paired in order: a cycle never leaves
    its pair.

    One image pair is worked on at a time and its gradient is taken at once, so that autograd keeps nothing but the
    gradient of the inputs. Wide features hold two matrices of pixel pairs of one image (at most 2 GiB each, else they
    are formed anew in chunks of rows). Autocast has no effect; keep TF32 off, similarities are divided by their small
    deviation.

    Args:
        source: Source features, (N, D, h, w), any scale and floating type; normalised here.
        target: Target features, (N, D, h', w').
        labels: Source class indices at feature resolution, (N, h, w), int64. IGNORE_INDEX (255) starts no cycle.
        aggregation_weight: Share α of the aggregate in the target features, in [0, 1]; 0 skips the aggregation.
        temperature_factor: Multiplies the deviations; > 0, no unit. Smaller is sharper.
        kernels: "triton" works in fused kernels, with no matrix of pixel pairs larger than 2^24 entries. They multiply
            features that come as bfloat16 in that type, others nearly exactly, and sum in float32.

    Returns:
        Scalar in nats, averaged over the valid cycles of the whole batch, all data-parallel workers included: local
        sum over global count, see `global_mean`. Zero, with zero gradient, when no cycle is valid.

    Raises:
        ValueError: If sizes do not fit together, a setting is out of range or the kernels cannot run here.

    Source:
        Kang et al., Pixel-Level Cycle Association: A New Perspective for Domain Adaptive Semantic Segmentation (PLCA),
        NeurIPS 2020, arXiv 2011.00147; kgl-prml/Pixel-Level-Cycle-Association@e01d77a.
        Differs: sums of log-softmax, there binary cross entropy of the product of the two probabilities. A row whose
        deviation is below the rounding of its entries ranks nothing: it counts as uniform and has no gradient, there
        the gradient is multiplied by 1e10. A feature shorter than 1e-12 counts as zero and has no gradient.
    """
    comparison = Comparison(None, temperature_factor)
    return _association(source, target, labels, aggregation_weight, comparison, kernels)


def output_association(
    source_logits: Tensor,
    target_logits: Tensor,
    labels: Tensor,
    *,
    aggregation_weight: float = 0.5,
    temperature_factor: float = 1.0,
    floor: float = PROBABILITY_FLOOR,
    kernels: Kernels = "reference",
) -> Tensor:
    """Raise the hop probabilities of cycles that return to their class, on class probabilities.

    As `feature_association`, with the similarity -KL(own pixel || other pixel) in each direction: the way back is not
    the transpose of the way out. The part of the divergence that is constant along a row cancels, which leaves
    s12 = p·log(q + ε) and s21 = q·log(p + ε). The target probabilities are first aggregated, see
    `aggregate_probabilities`. Similarities are formed in chunks of rows, never whole.

    Args:
        source_logits: Class scores of the source at feature resolution, (N, C, h, w), any floating type.
        target_logits: Class scores of the target, (N, C, h', w').
        labels: Source class indices at feature resolution, (N, h, w), int64. IGNORE_INDEX (255) starts no cycle.
        aggregation_weight: Share α of the aggregate in the target probabilities, in [0, 1]; 0 skips the aggregation.
        temperature_factor: Multiplies the deviations; > 0, no unit. Smaller is sharper.
        floor: ε, added to probabilities before the logarithm; > 0.
        kernels: See `feature_association`; probabilities are float32.

    Returns:
        Scalar in nats, averaged and zero as in `feature_association`.

    Raises:
        ValueError: If sizes do not fit together, a setting is out of range or the kernels cannot run here.

    Source:
        As `feature_association`.
    """
    source, target = (_full_precision(logits).softmax(dim=1) for logits in (source_logits, target_logits))
    comparison = Comparison(floor, temperature_factor)
    return _association(source, target, labels, aggregation_weight, comparison, kernels)


@torch.no_grad()
def find_cycles(
    source: Tensor, target: Tensor, labels: Tensor, *, similarity: Similarity, floor: float = PROBABILITY_FLOOR
) -> Cycles:
    """Follow both hops from every source pixel, ignored ones included.

    Args:
        source: Features or class probabilities, (N, D, h, w).
        target: Features or class probabilities of the target, already aggregated, (N, D, h', w').
        labels: Source class indices at feature resolution, (N, h, w), int64; 255 is never valid.
        similarity: What `source` and `target` are compared by: "cosine" of features, "divergence" of probabilities.
        floor: Added to probabilities before the logarithm; > 0.

    Returns:
        Pixel indices and validity. Which of several equally similar pixels is chosen is arbitrary.
    """
    comparison = Comparison(None if similarity == "cosine" else floor)
    images = []
    for source_image, target_image, own_labels in zip(source, target, labels.flatten(1), strict=True):
        source_query, source_key = comparison.query_and_key(image_rows(source_image))
        target_query, target_key = comparison.query_and_key(image_rows(target_image))
        middle = most_similar(source_query, target_key)
        end = most_similar(target_query, source_key)[middle]
        images.append(Cycles(middle, end, (own_labels != IGNORE_INDEX) & (own_labels[end] == own_labels)))
    return Cycles(*(torch.stack(parts) for parts in zip(*images, strict=True)))


def overconfidence_regulariser(logits: Tensor, *, level: float = 10.0) -> Tensor:
    """Smooth predictions that are too confident and sharpen those that are not confident enough.

    With p the class probabilities and M the level:

        h_i = -(1 / C) Σ_c log p_ic        loss = mean_i (h_i / M - 1) h_i, the bracket a constant

    Descent moves h towards M. The value is negative while h < M, which is the usual case. The paper calls it label
    smoothing; it is not the usual one.

    Args:
        logits: Class scores at feature resolution, (N, C, h, w), any floating type. All pixels take part.
        level: M, where the gradient changes its sign; > 0, nats.

    Returns:
        Scalar in nats, averaged over all pixels of the whole batch, all data-parallel workers included.

    Raises:
        ValueError: If `level` is not positive.

    Source:
        As `feature_association`; there called LSR.
        Differs: that code has a plain mean of h for M <= 0, but never calls it.
    """
    if not level > 0:
        raise ValueError(f"`level` must be positive, but got {level}.")
    uniform_entropy = -_full_precision(logits).log_softmax(dim=1).mean(dim=1)
    terms = (uniform_entropy.detach() / level - 1.0) * uniform_entropy
    count = torch.full((), terms.numel(), device=terms.device)
    return global_mean(terms.sum(dtype=torch.float64), count).to(terms.dtype)


def _association(
    source: Tensor, target: Tensor, labels: Tensor, weight: float, comparison: Comparison, kernels: Kernels
) -> Tensor:
    if source.shape[:2] != target.shape[:2] or labels.shape != (source.shape[0], *source.shape[2:]):
        raise ValueError(
            "Source and target must share N and their channels, and labels must have the source's grid, but got "
            f"{tuple(source.shape)} (N, D, h, w), {tuple(target.shape)} (N, D, h', w') and {tuple(labels.shape)}."
        )
    check_weight(weight)
    needs_gradient = torch.is_grad_enabled() and (source.requires_grad or target.requires_grad)
    operand = kernel_operands(kernels, (source, target))
    total, count = _AssociationSum.apply(source, target, labels, weight, comparison, operand, needs_gradient)
    return global_mean(total, count).to(precise(source.dtype))


class _AssociationSum(torch.autograd.Function):
    """Sum of the loss over the valid cycles, float64, and their number; one image pair and its gradient at a time."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        source: Tensor,
        target: Tensor,
        labels: Tensor,
        weight: float,
        comparison: Comparison,
        operand: torch.dtype | None,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), dtype=torch.float64, device=source.device)
        count = torch.zeros((), dtype=torch.int64, device=source.device)
        gradients = []
        with torch.autocast(source.device.type, enabled=False):
            for image, own_labels in enumerate(labels.flatten(1)):
                source_rows = fresh_rows(image_rows(source[image]))
                target_rows = image_rows(target[image])
                aggregation = (
                    Aggregation(target_rows, weight, comparison)
                    if operand is None
                    else FusedAggregation(target_rows, weight, comparison, operand)
                )
                mixed = aggregation.forward(keep=needs_gradient)
                image_total, image_count, slopes = associate(
                    source_rows, mixed, own_labels, comparison, operand, needs_gradient
                )
                total += image_total
                count += image_count
                if slopes is not None:
                    gradients += [slopes[0], aggregation.backward(slopes[1])]
                elif needs_gradient:
                    gradients += [total.new_zeros((), dtype=source_rows.dtype)] * 2
                del source_rows, mixed, slopes
        ctx.save_for_backward(source, target, *gradients)
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_total: Tensor, grad_count: Tensor) -> tuple[Tensor | None, ...]:
        source, target, *gradients = ctx.saved_tensors  # type: ignore[attr-defined]
        results = []
        for values, kept in ((source, gradients[::2]), (target, gradients[1::2])):
            result = torch.empty_like(values)
            for image, rows in zip(result, kept, strict=True):
                if rows.ndim == 0:  # no valid cycle
                    image.zero_()
                else:
                    write_rows(image, rows * grad_total.to(rows.dtype))
            results.append(result)
        return *results, None, None, None, None, None


def _full_precision(values: Tensor) -> Tensor:
    return values.to(precise(values.dtype))
