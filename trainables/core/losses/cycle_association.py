"""Cycle association of pixels: source to target and back, on features and on class probabilities.

Also the regulariser of overconfident predictions. The aggregation of the target is in `spatial_aggregation`.
"""

# N images per domain, D feature channels, C classes, h x w cells of the source's feature map, h' x w' of the target's.
# Inside, a map is a matrix with one row per pixel: L1 source rows, L2 target rows, D columns.

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.distributed import global_mean
from segadapt.trainables.core.losses.pixel_similarity import (
    KERNEL_ENTRIES,
    PROBABILITY_FLOOR,
    Comparison,
    Kernels,
    chunk_buffer,
    chunk_rows,
    fresh_rows,
    gradient_through_norm_,
    image_rows,
    inverse_norms,
    is_worth_keeping,
    kernel_operands,
    most_similar,
    parts,
    precise,
    products,
    standardise_,
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
        kernels: As in `feature_association`; probabilities are float32.

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
        target: The same of the target, already aggregated, (N, D, h', w').
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
                image_total, image_count, slopes = _associate(
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


class _Hop(NamedTuple):
    """Pixels that choose one of the other image, each with its weight in the loss."""

    chooser: Tensor  # (n,) int64, distinct
    chosen: Tensor  # (n,) int64, the most similar pixel
    weight: Tensor  # (n, 1)


class _Direction:
    """One way between two images, in chunks of rows: for similarities that are cheap to form anew, or too many to keep.

    Args:
        query: Of the image that hops, (L, D).
        key: Of the other, (M, D).
        factor: Multiplies the deviations.
    """

    def __init__(self, query: Tensor, key: Tensor, factor: float) -> None:
        self.query, self.key, self.factor = query, key, factor

    def best(self, pixels: Tensor) -> Tensor:
        """Return the most similar pixel of each of some pixels."""
        return most_similar(self.query[pixels], self.key)

    def loss(self, hop: _Hop, by_query: Tensor, by_key: Tensor, *, needs_gradient: bool) -> Tensor:
        """Return the loss sum of a hop, float64, and write its gradients to `by_query` and `by_key`, zero before."""
        total = torch.zeros((), dtype=torch.float64, device=self.query.device)
        buffer = chunk_buffer(self.query, len(self.key))
        for part in parts(len(hop.chooser), chunk_rows(self.query, len(self.key))):
            chooser, chosen, weight = hop.chooser[part], hop.chosen[part], hop.weight[part]
            rows = self.query[chooser]
            ratios = products(rows, self.key, buffer)
            inverse, sums = _over_chosen_(ratios, chosen, self.factor)
            total += (sums.log() * weight).sum(dtype=torch.float64)
            if needs_gradient:
                ratios.scatter_add_(1, chosen[:, None], -sums)
                slope = weight * inverse / sums
                by_query[chooser] = (ratios @ self.key).mul_(slope)
                by_key.addmm_(ratios.T, rows * slope)
        return total


class _FusedDirection(_Direction):
    """The same by fused kernels: similarities are formed twice, and nothing but statistics of their rows is kept.

    Args:
        query: Of the image that hops, (L, D), in the type in which the kernels multiply.
        key: Of the other, (M, D), likewise.
        factor: Multiplies the deviations.
    """

    def best(self, pixels: Tensor) -> Tensor:
        """Return the most similar pixel of each of some pixels, which are those that may hop later on."""
        from segadapt.trainables.core.losses import kernels

        found = kernels.row_statistics(self.query[pixels], self.key, self.factor)
        self.top, self.inverse = (found.top.new_zeros(len(self.query)) for _ in range(2))
        self.top[pixels], self.inverse[pixels] = found.top, found.inverse
        return found.best

    def loss(self, hop: _Hop, by_query: Tensor, by_key: Tensor, *, needs_gradient: bool) -> Tensor:
        """Return the loss sum of a hop, float64, and write its gradients to `by_query` and `by_key`, zero before."""
        from segadapt.trainables.core.losses import kernels

        total = torch.zeros((), dtype=torch.float64, device=self.query.device)
        size = min(len(hop.chooser), max(1, KERNEL_ENTRIES // len(self.key)))
        buffer = self.key.new_empty(size if needs_gradient else 0, len(self.key))
        for part in parts(len(hop.chooser), size):
            chooser, chosen, weight = hop.chooser[part], hop.chosen[part], hop.weight[part]
            rows, inverse = self.query[chooser], self.inverse[chooser]
            ratios = buffer[: len(rows)] if needs_gradient else None
            sums = kernels.exponentials(rows, self.key, self.top[chooser], inverse, ratios)[:, None]
            total += (sums.log() * weight).sum(dtype=torch.float64)
            if ratios is not None:
                pull = weight * inverse[:, None]
                slope = pull / sums
                push = kernels.multiply_(torch.empty_like(rows, dtype=slope.dtype), ratios, self.key).mul_(slope)
                by_query[chooser] = push.addcmul_(self.key[chosen], pull, value=-1.0)
                kernels.multiply_(by_key, ratios.T, (rows * slope).to(rows.dtype), add=True)
                by_key.index_put_((chosen,), rows * -pull, accumulate=True)  # deterministic on GPUs as well
        return total


class _ChunkedPair:
    """Two images compared in chunks of rows, by kernels where `operand` says in which type they multiply."""

    def __init__(
        self, source: Tensor, target: Tensor, comparison: Comparison, operand: torch.dtype | None = None
    ) -> None:
        self.source, self.target, self.comparison = source, target, comparison
        queries, keys = zip(*(comparison.query_and_key(rows) for rows in (source, target)), strict=True)
        pairs = [(queries[0], keys[1]), (queries[1], keys[0])]
        if operand is None:
            self.out, self.back = (_Direction(query, key, comparison.factor) for query, key in pairs)
        else:
            self.out, self.back = (
                _FusedDirection(query.to(operand), key.to(operand), comparison.factor) for query, key in pairs
            )

    def best_targets(self, pixels: Tensor) -> Tensor:
        """Return the most similar target pixel of some source pixels."""
        return self.out.best(pixels)

    def best_sources(self, pixels: Tensor) -> Tensor:
        """Return the most similar source pixel of some target pixels."""
        return self.back.best(pixels)

    def loss(self, out: _Hop, back: _Hop, *, needs_gradient: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the loss sum of both hops, float64, and its gradient by source and target rows."""
        source_query, source_key = (torch.zeros_like(self.source) for _ in range(2))
        target_query, target_key = (torch.zeros_like(self.target) for _ in range(2))
        total = self.out.loss(out, source_query, target_key, needs_gradient=needs_gradient)
        total += self.back.loss(back, target_query, source_key, needs_gradient=needs_gradient)
        if not needs_gradient:
            return total, None
        return total, (
            self.comparison.gradient_by_rows(self.source, source_query, source_key),
            self.comparison.gradient_by_rows(self.target, target_query, target_key),
        )


class _WholePair:
    """Two images compared by cosine, all similarities kept: for features so wide that forming them costs the most.

    The hop back reads columns of the same matrix. Both hops share the products of the gradient, which leave out the
    columns that no cycle passes for source pixels that start none. Overwrites source and target with their directions.
    """

    def __init__(self, source: Tensor, target: Tensor, comparison: Comparison) -> None:
        self.factor = comparison.factor
        self.source_inverse, self.target_inverse = inverse_norms(source), inverse_norms(target)
        self.source_unit, self.target_unit = source.mul_(self.source_inverse), target.mul_(self.target_inverse)
        self.similarities = self.source_unit @ self.target_unit.T
        self.size = chunk_rows(source, max(self.similarities.shape))

    def best_targets(self, pixels: Tensor) -> Tensor:
        """Return the most similar target pixel of some source pixels."""
        return self.similarities.max(dim=1).indices[pixels]

    def best_sources(self, pixels: Tensor) -> Tensor:
        """Return the most similar source pixel of some target pixels."""
        indices = torch.zeros_like(pixels)
        for part in parts(len(pixels), self.size):
            indices[part] = self._columns(pixels[part]).max(dim=1).indices
        return indices

    def loss(self, out: _Hop, back: _Hop, *, needs_gradient: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the loss sum of both hops, float64, and its gradient by source and target rows."""
        total, scales, slopes_back = self._loss_back(back)
        by_source, by_target = torch.zeros_like(self.source_unit), torch.zeros_like(self.target_unit)
        highest = self.similarities[back.chosen, back.chooser]

        def slopes_of_hop_back(rows: Tensor) -> Tensor:
            passed = rows.index_select(1, back.chooser)
            return passed.sub_(highest).mul_(scales).exp_().mul_(slopes_back)

        for part in parts(len(out.chooser), self.size):
            chooser, chosen, weight = out.chooser[part], out.chosen[part], out.weight[part]
            slopes = self.similarities.index_select(0, chooser)
            passed_slopes = slopes_of_hop_back(slopes) if needs_gradient else None
            inverse, sums = _over_chosen_(slopes, chosen, self.factor)
            total += (sums.log() * weight).sum(dtype=torch.float64)
            if passed_slopes is not None:
                slopes.scatter_add_(1, chosen[:, None], -sums).mul_(weight * inverse / sums)
                slopes.index_add_(1, back.chooser, passed_slopes)
                by_source[chooser] = slopes @ self.target_unit
                by_target.addmm_(slopes.T, self.source_unit[chooser])
        if not needs_gradient:
            return total, None
        passed_unit = self.target_unit[back.chooser]
        by_passed = torch.zeros_like(passed_unit)
        starts_none = torch.ones(len(by_source), dtype=torch.bool, device=by_source.device)
        starts_none[out.chooser] = False
        others = starts_none.nonzero().flatten()
        for part in parts(len(others), self.size):
            slopes = slopes_of_hop_back(self.similarities.index_select(0, others[part]))
            by_source[others[part]] = slopes @ passed_unit
            by_passed.addmm_(slopes.T, self.source_unit[others[part]])
        del self.similarities
        pull = -(back.weight.flatten() * scales)[:, None]
        by_source.index_put_((back.chosen,), passed_unit.mul_(pull), accumulate=True)  # deterministic on GPUs as well
        by_target[back.chooser] += by_passed.addcmul_(pull, self.source_unit[back.chosen])
        return total, (
            gradient_through_norm_(by_source, self.source_unit, self.source_inverse),
            gradient_through_norm_(by_target, self.target_unit, self.target_inverse),
        )

    def _loss_back(self, back: _Hop) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss sum of the hop back and, per target pixel j that hops, what its gradient is made of.

        It is slopes_j exp(scales_j (s_ij - s_ej)) by similarity s_ij, with e the chosen pixel, less its pull at i = e.
        """
        total = torch.zeros((), dtype=torch.float64, device=back.weight.device)
        scales, slopes = torch.empty_like(back.weight[:, 0]), torch.empty_like(back.weight[:, 0])
        for part in parts(len(back.chooser), self.size):
            weight = back.weight[part]
            inverse, sums = _over_chosen_(self._columns(back.chooser[part]), back.chosen[part], self.factor)
            total += (sums.log() * weight).sum(dtype=torch.float64)
            scales[part] = inverse[:, 0]
            slopes[part] = (weight * inverse / sums)[:, 0]
        return total, scales, slopes

    def _columns(self, pixels: Tensor) -> Tensor:
        return self.similarities.index_select(1, pixels).T.contiguous()


def _associate(
    source: Tensor,
    target: Tensor,
    labels: Tensor,
    comparison: Comparison,
    operand: torch.dtype | None,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Return the loss sum of one image pair, its number of valid cycles and the gradients by source and target rows.

    The loss sum is float64. Only labelled source pixels hop, and only the distinct pixels they reach hop back.

    Args:
        source: (L1, D); may be overwritten.
        target: (L2, D), already aggregated; may be overwritten.
        labels: (L1,).
        comparison: How pixels are compared.
        operand: Type in which kernels multiply; None without kernels.
        needs_gradient: Whether gradients are wanted; they are None as well where no cycle is valid.
    """
    whole = operand is None and comparison.floor is None and is_worth_keeping(source, len(target))
    pair = _WholePair(source, target, comparison) if whole else _ChunkedPair(source, target, comparison, operand)
    labelled = (labels != IGNORE_INDEX).nonzero().flatten()
    middle = pair.best_targets(labelled)
    reached, position = torch.unique(middle, return_inverse=True)
    end_of_reached = pair.best_sources(reached)
    valid = labels[end_of_reached[position]] == labels[labelled]
    count = valid.sum()
    kept = valid.nonzero().flatten()
    if len(kept) == 0:
        return torch.zeros((), dtype=torch.float64, device=source.device), count, None
    passed, multiplicity = torch.unique(position[kept], return_counts=True)
    out = _Hop(labelled[kept], middle[kept], source.new_ones(len(kept), 1))
    back = _Hop(reached[passed], end_of_reached[passed], multiplicity.to(source.dtype)[:, None])
    total, slopes = pair.loss(out, back, needs_gradient=needs_gradient)
    return total, count, slopes


def _over_chosen_(scores: Tensor, chosen: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Turn similarities (n, M) in place into hop probabilities over that of the chosen pixel.

    Returns:
        Inverse temperatures and row sums, (n, 1) each. The logarithm of the sum is the loss of the row.
    """
    inverse = standardise_(scores, factor)
    scores.sub_(scores.gather(1, chosen[:, None])).exp_()
    return inverse, scores.sum(dim=1, keepdim=True)


def _full_precision(values: Tensor) -> Tensor:
    return values.to(precise(values.dtype))
