"""Cycle association of one image pair: both hops, the loss of the valid cycles and its gradient."""

# A map is a matrix with one row per pixel: L1 source rows, L2 target rows, D columns.

from typing import NamedTuple

import torch
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.labelling.features import count_values
from segadapt.trainables.core.losses.pixel_similarity import (
    KERNEL_ENTRIES,
    Comparison,
    chunk_buffer,
    chunk_rows,
    gradient_through_norm_,
    inverse_norms,
    is_worth_keeping,
    most_similar,
    parts,
    products,
    standardise_,
)


class Hop(NamedTuple):
    """Pixels that choose one of the other image, each with its weight in the loss."""

    chooser: Tensor  # (n,) int64, distinct
    chosen: Tensor  # (n,) int64, the most similar pixel
    weight: Tensor  # (n, 1)


class _Direction:
    """One way between two images, in chunks of rows: for similarities that are cheap to form anew, or too many to keep.

    Args:
        query: Rows of the image that hops, (L, D).
        key: Rows of the other image, (M, D).
        factor: Multiplies the deviations.
    """

    def __init__(self, query: Tensor, key: Tensor, factor: float) -> None:
        self.query, self.key, self.factor = query, key, factor

    def best(self, pixels: Tensor) -> Tensor:
        """Return the most similar pixel of each of some pixels."""
        return most_similar(self.query[pixels], self.key)

    def loss(self, hop: Hop, by_query: Tensor, by_key: Tensor, *, needs_gradient: bool) -> Tensor:
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
    """One way between two images by fused kernels, which form similarities twice and keep statistics of rows alone.

    Args:
        query: Rows of the image that hops, (L, D), in the type in which the kernels multiply.
        key: Rows of the other image, (M, D), in the same type.
        factor: Multiplies the deviations.
    """

    def best(self, pixels: Tensor) -> Tensor:
        """Return the most similar pixel of each of some pixels, which are those that may hop later on."""
        from segadapt.trainables.core.losses import kernels

        statistics = kernels.row_statistics(self.query[pixels], self.key, self.factor)
        self.top, self.inverse = (statistics.top.new_zeros(len(self.query)) for _ in range(2))
        self.top[pixels], self.inverse[pixels] = statistics.top, statistics.inverse
        return statistics.best

    def loss(self, hop: Hop, by_query: Tensor, by_key: Tensor, *, needs_gradient: bool) -> Tensor:
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

    def loss(self, out: Hop, back: Hop, *, needs_gradient: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
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

    def loss(self, out: Hop, back: Hop, *, needs_gradient: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
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
        others = _others(out.chooser, len(by_source))
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

    def _loss_back(self, back: Hop) -> tuple[Tensor, Tensor, Tensor]:
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


def associate(
    source: Tensor,
    target: Tensor,
    labels: Tensor,
    comparison: Comparison,
    operand: torch.dtype | None,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Return the loss sum of one image pair, its number of valid cycles and the gradients by source and target rows.

    The loss sum is float64. Only labelled source pixels hop, and only the distinct pixels they reach hop back. On a GPU
    all pixels do, those beside with weight zero: to choose, it would have to be waited for four times.

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
    if source.is_cuda:
        out, back = _weighted_hops(pair, labels, len(target), source.dtype)
        total, slopes = pair.loss(out, back, needs_gradient=needs_gradient)
        return total, out.weight.sum().long(), slopes
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
    out = Hop(labelled[kept], middle[kept], source.new_ones(len(kept), 1))
    back = Hop(reached[passed], end_of_reached[passed], multiplicity.to(source.dtype)[:, None])
    total, slopes = pair.loss(out, back, needs_gradient=needs_gradient)
    return total, count, slopes


def _weighted_hops(
    pair: _WholePair | _ChunkedPair, labels: Tensor, targets: int, dtype: torch.dtype
) -> tuple[Hop, Hop]:
    """Return both hops of all pixels: a source pixel weighs 1 if its cycle is valid, a target pixel as many as pass."""
    sources, all_targets = (torch.arange(length, device=labels.device) for length in (len(labels), targets))
    middle, end = pair.best_targets(sources), pair.best_sources(all_targets)
    valid = (labels != IGNORE_INDEX) & (labels[end[middle]] == labels)
    passing = count_values(middle.masked_fill(~valid, targets), targets + 1)[:-1]
    out = Hop(sources, middle, valid.to(dtype)[:, None])
    return out, Hop(all_targets, end, passing.to(dtype)[:, None])


def _others(pixels: Tensor, count: int) -> Tensor:
    """Return those of `count` pixels that are not among some distinct ones; nothing is read where these are all."""
    if len(pixels) == count:
        return pixels[:0]
    others = torch.ones(count, dtype=torch.bool, device=pixels.device)
    others[pixels] = False
    return others.nonzero().flatten()


def _over_chosen_(scores: Tensor, chosen: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Turn similarities (n, M) in place into hop probabilities over that of the chosen pixel.

    Returns:
        Inverse temperatures and row sums, (n, 1) each. The logarithm of the sum is the loss of the row.
    """
    inverse = standardise_(scores, factor)
    scores.sub_(scores.gather(1, chosen[:, None])).exp_()
    return inverse, scores.sum(dim=1, keepdim=True)
