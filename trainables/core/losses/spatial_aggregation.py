"""Spatial aggregation: mix what each pixel shows with what similar pixels of its image show."""

# N images, D feature channels, C classes, h x w cells of the feature map, L = h * w.

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from segadapt.trainables.core.losses.pixel_similarity import (
    KERNEL_ENTRIES,
    PROBABILITY_FLOOR,
    Comparison,
    add_transpose_,
    chunk_buffer,
    chunks,
    fresh_rows,
    gradient_through_norm_,
    image_rows,
    inverse_norms,
    is_worth_keeping,
    parts,
    precise,
    products,
    products_of_all_pairs,
    standardise_,
    write_rows,
)


def aggregate_features(features: Tensor, *, weight: float = 0.5, temperature_factor: float = 1.0) -> Tensor:
    """Mix each pixel's feature with the average of its image, weighted by similarity.

    With z the features, s their cosines (a pixel with itself included), σ_j the unbiased standard deviation of row j (a
    constant) and κ the temperature factor:

        W_jk = softmax_k(s_jk / (κ σ_j + 1e-10))        z'_j = (1 - α) z_j + α Σ_k W_jk z_k

    Gradient flows through values and similarities, not through σ. Used on the target before the association, and by
    the paper on test images as well.

    Args:
        features: (N, D, h, w), any scale and floating type; computed in float32 or wider.
        weight: Share α of the average, in [0, 1].
        temperature_factor: κ, multiplies the deviations; > 0, no unit.

    Returns:
        (N, D, h, w), un-normalised, float32 or wider.

    Raises:
        ValueError: If a setting is out of range.

    Source:
        Kang et al., Pixel-Level Cycle Association: A New Perspective for Domain Adaptive Semantic Segmentation (PLCA),
        NeurIPS 2020, arXiv 2011.00147; kgl-prml/Pixel-Level-Cycle-Association@e01d77a.
    """
    return _aggregated(features, weight, Comparison(None, temperature_factor))


def aggregate_probabilities(probabilities: Tensor, *, weight: float = 0.5, floor: float = PROBABILITY_FLOOR) -> Tensor:
    """Mix each pixel's class probabilities with the average of its image, weighted by similarity.

    As `aggregate_features`, with W the plain softmax of the negative Kullback-Leibler divergence, without deviations:

        W_jk = softmax_k(q_j·log(q_k + ε))        q'_j = (1 - α) q_j + α Σ_k W_jk q_k

    Args:
        probabilities: (N, C, h, w), summing to one over the classes; computed in float32 or wider.
        weight: Share α of the average, in [0, 1].
        floor: ε, added to probabilities before the logarithm; > 0.

    Returns:
        Probabilities, (N, C, h, w), float32 or wider.

    Raises:
        ValueError: If a setting is out of range.

    Source:
        Kang et al., Pixel-Level Cycle Association: A New Perspective for Domain Adaptive Semantic Segmentation (PLCA),
        NeurIPS 2020, arXiv 2011.00147; kgl-prml/Pixel-Level-Cycle-Association@e01d77a.
    """
    return _aggregated(probabilities, weight, Comparison(floor))


def check_weight(weight: float) -> None:
    """Raise a ValueError unless an aggregation weight lies in [0, 1]."""
    if not 0 <= weight <= 1:
        raise ValueError(f"The aggregation weight must lie in [0, 1], but got {weight}.")


def _aggregated(values: Tensor, weight: float, comparison: Comparison) -> Tensor:
    check_weight(weight)
    if torch.compiler.is_exporting():
        return _aggregate_in_one(values, weight, comparison)
    if torch.is_grad_enabled() and values.requires_grad:
        result: Tensor = _AggregationOfImages.apply(values, weight, comparison)
        return result
    return _aggregate_images(values, [Aggregation(image_rows(image), weight, comparison) for image in values])


def _aggregate_in_one(values: Tensor, weight: float, comparison: Comparison) -> Tensor:
    """Aggregate for exported graphs, which cannot walk chunks whose number depends on the size: holds (N, L, L)."""
    rows = values.flatten(2).mT.to(precise(values.dtype))
    query, key = comparison.query_and_key(rows)
    scores = query @ key.mT
    if comparison.floor is None:
        standardise_(scores, comparison.factor)
    mixed = weight * (scores.softmax(dim=-1) @ rows) + (1.0 - weight) * rows
    return mixed.mT.reshape(values.shape)


def _aggregate_images(values: Tensor, images: "list[Aggregation]", *, keep: bool = False) -> Tensor:
    output = torch.empty_like(values, dtype=precise(values.dtype))
    with torch.autocast(values.device.type, enabled=False):
        for result, image in zip(output, images, strict=True):
            write_rows(result, image.forward(keep=keep))
    return output


class Aggregation:
    """Spatial aggregation of one image's rows (L, D), with its backward pass.

    Wide features keep the (L, L) weights for the backward pass. They come from a symmetric product, of which half is
    computed, and give the gradient by query and key in one product. Otherwise the weights are formed anew, in chunks.
    """

    def __init__(self, rows: Tensor, weight: float, comparison: Comparison) -> None:
        self.weight = weight
        self.comparison = comparison
        self.is_whole = comparison.floor is None and is_worth_keeping(rows, len(rows))
        self.rows = rows if self.is_whole else rows.contiguous()
        self._whole: tuple[Tensor, Tensor] | None = None
        self._average: Tensor | None = None

    def forward(self, *, keep: bool) -> Tensor:
        """Return the aggregated rows, (L, D), in memory of their own; `keep` prepares for the backward pass."""
        if self.weight == 0:
            return fresh_rows(self.rows)
        if keep and self.is_whole:
            self._whole = self._whole_weights()
            return (self._whole[0] @ self.rows).mul_(self.weight).add_(self.rows, alpha=1.0 - self.weight)
        average = self._chunked_average()
        self._average = average if keep else None
        return (average * self.weight).add_(self.rows, alpha=1.0 - self.weight)

    def backward(self, gradient: Tensor) -> Tensor:
        """Return the gradient by the rows, given the one by the output, both (L, D)."""
        if self.weight == 0:
            return gradient
        return self._backward_whole(gradient) if self.is_whole else self._backward_chunked(gradient)

    def _whole_weights(self) -> tuple[Tensor, Tensor]:
        """Return the weights (L, L) and the inverse temperatures (L, 1)."""
        unit, _ = self.comparison.query_and_key(self.rows)
        weights, inverse = products_of_all_pairs(unit), unit.new_empty(len(unit), 1)
        for part in chunks(unit, len(unit)):
            inverse[part] = standardise_(weights[part], self.comparison.factor)
            weights[part] = weights[part].softmax(dim=1)
        return weights, inverse

    def _backward_whole(self, gradient: Tensor) -> Tensor:
        weights, inverse = self._whole or self._whole_weights()
        self._whole = None  # becomes the gradient by the similarities, row by row
        by_rows = (weights.T @ gradient).mul_(self.weight).add_(gradient, alpha=1.0 - self.weight)
        for part in chunks(gradient, len(weights)):
            slopes = (gradient[part] @ self.rows.T).mul_(weights[part])
            along = slopes.sum(dim=1, keepdim=True)
            weights[part] = slopes.addcmul_(weights[part], along, value=-1.0).mul_(self.weight * inverse[part])
        add_transpose_(weights)
        inverse = inverse_norms(self.rows)
        unit = self.rows * inverse
        return by_rows.add_(gradient_through_norm_(weights @ unit, unit, inverse))

    def _chunk_weights(self, query: Tensor, key: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return weights up to a factor (n, L) in `buffer`, that factor and the inverse temperatures, (n, 1) each."""
        scores = products(query, key, buffer)
        inverse = None
        if self.comparison.floor is None:
            inverse = standardise_(scores, self.comparison.factor)
            scores.sub_(scores.amax(dim=1, keepdim=True))
        # Else they are expected logarithms of probabilities: at most zero, and not small where a pixel meets itself.
        weights = scores.exp_()
        return weights, 1.0 / weights.sum(dim=1, keepdim=True), inverse

    def _chunked_average(self) -> Tensor:
        query, key = self.comparison.query_and_key(self.rows)
        average, buffer = torch.empty_like(self.rows), chunk_buffer(query, len(key))
        for part in chunks(query, len(key)):
            weights, factor, _ = self._chunk_weights(query[part], key, buffer)
            average[part] = (weights @ self.rows).mul_(factor)
        return average

    def _backward_chunked(self, gradient: Tensor) -> Tensor:
        average = self._average if self._average is not None else self._chunked_average()
        query, key = self.comparison.query_and_key(self.rows)
        by_value, by_query, by_key = gradient * (1.0 - self.weight), torch.empty_like(query), torch.zeros_like(key)
        # A column of ones takes off the part of the gradient that changes all scores of a row alike.
        extended_rows = torch.cat([self.rows, torch.ones_like(self.rows[:, :1])], dim=1)
        buffer, second_buffer = chunk_buffer(query, len(key)), chunk_buffer(query, len(key))
        for part in chunks(query, len(key)):
            weights, factor, inverse = self._chunk_weights(query[part], key, buffer)
            by_average = gradient[part] * (self.weight * factor)
            by_value.addmm_(weights.T, by_average)
            slope = by_average if inverse is None else by_average * inverse
            extended_slope = torch.cat([slope, -(slope * average[part]).sum(dim=1, keepdim=True)], dim=1)
            by_scores = products(extended_slope, extended_rows, second_buffer).mul_(weights)
            by_query[part] = by_scores @ key
            by_key.addmm_(by_scores.T, query[part])
        return by_value.add_(self.comparison.gradient_by_rows(self.rows, by_query, by_key))


class FusedAggregation(Aggregation):
    """Spatial aggregation by fused kernels, which form weights anew, in chunks of rows, and write nothing else.

    Args:
        rows: (L, D) float32.
        weight: Share of the average.
        comparison: How pixels are compared.
        operand: Type in which rows are multiplied; sums are float32.
    """

    def __init__(self, rows: Tensor, weight: float, comparison: Comparison, operand: torch.dtype) -> None:
        super().__init__(rows.contiguous(), weight, comparison)
        self.is_whole = False
        self.operand = operand
        self._statistics: tuple[Tensor, Tensor] | None = None

    def _operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return query, key and values, (L, D) each, and room for a chunk's weights."""
        query, key = self.comparison.query_and_key(self.rows)
        size = max(1, KERNEL_ENTRIES // len(key))
        buffer = torch.empty(min(size, len(key)), len(key), dtype=self.operand, device=key.device)
        return query.to(self.operand), key.to(self.operand), self.rows.to(self.operand), buffer

    def _chunked_average(self) -> Tensor:
        from segadapt.trainables.core.losses import kernels

        query, key, values, buffer = self._operands()
        if self.comparison.floor is None:
            top, inverse = kernels.row_statistics(query, key, self.comparison.factor)[1:]
        else:  # no score is far below zero, see `_chunk_weights`
            top, inverse = query.new_zeros(len(query)), query.new_ones(len(query))
        self._statistics = top, inverse
        average = torch.empty_like(self.rows)
        for part in parts(len(query), len(buffer)):
            weights = buffer[: len(query[part])]
            sums = kernels.exponentials(query[part], key, top[part], inverse[part], weights)
            kernels.multiply_(average[part], weights, values).div_(sums[:, None])
        return average

    def _backward_chunked(self, gradient: Tensor) -> Tensor:
        from segadapt.trainables.core.losses import kernels

        assert self._average is not None
        assert self._statistics is not None
        top, inverse = self._statistics
        query, key, values, buffer = self._operands()
        by_value, by_query, by_key = (torch.zeros_like(self.rows) for _ in range(3))
        for part in parts(len(query), len(buffer)):
            weights = buffer[: len(query[part])]
            sums = kernels.exponentials(query[part], key, top[part], inverse[part], weights)
            slope = gradient[part] * (self.weight / sums)[:, None]
            kernels.multiply_(by_value, weights.T, slope.to(self.operand), add=True)
            slope *= inverse[part, None]
            along = (slope * self._average[part]).sum(dim=1)
            by_scores = kernels.scale_(weights, slope.to(self.operand), values.T, along)
            kernels.multiply_(by_query[part], by_scores, key)
            kernels.multiply_(by_key, by_scores.T, query[part], add=True)
        by_value.add_(gradient, alpha=1.0 - self.weight)
        return by_value.add_(self.comparison.gradient_by_rows(self.rows, by_query, by_key))


class _AggregationOfImages(torch.autograd.Function):
    """The aggregation of each image of a batch."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, weight: float, comparison: Comparison) -> Tensor:
        images = [Aggregation(image_rows(image), weight, comparison) for image in values]
        ctx.images, ctx.dtype = images, values.dtype  # type: ignore[attr-defined]
        return _aggregate_images(values, images, keep=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradient = torch.empty_like(grad_output, dtype=ctx.dtype)  # type: ignore[attr-defined]
        with torch.autocast(grad_output.device.type, enabled=False):
            for result, image, by_output in zip(gradient, ctx.images, grad_output, strict=True):  # type: ignore[attr-defined]
                write_rows(result, image.backward(image_rows(by_output)))
        return gradient, None, None
