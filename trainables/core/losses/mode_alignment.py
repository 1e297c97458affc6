"""Modes of classes on the unit sphere: the margin between them, and the alignment of two domains within each.

Also DRSL's regulariser of confident pseudo-labelled pixels.
"""

# B images, D embedding channels, C classes, M modes per class, h x w cells of the feature map, P = h * w. The modes of
# all classes are numbered k * M + m: "mode" without more is such a number, G = C * M of them. R rows are picked cells.

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from segadapt.trainables.core.data.batch import IGNORE_INDEX, to_device
from segadapt.trainables.core.distributed import (
    gather_over_workers,
    global_mean,
    rank,
    sum_over_workers,
    world_size,
)
from segadapt.trainables.core.labelling.features import count_values

SMALLEST_NORM = 1e-12


class ModeMargin(NamedTuple):
    """The margin loss, and by the way the mode each cell belongs to."""

    loss: Tensor
    """Scalar."""
    nearest: Tensor
    """Nearest mode of the cell's own class, (B, h, w) int64; -1 for ignored cells. Without gradient."""


def mode_margin(embeddings: Tensor, labels: Tensor, modes: Tensor, *, margin: float = 0.5) -> ModeMargin:
    """Pull each labelled cell to the nearest mode of its class and push it away from the nearest one of the others.

    With e and r the embedding and a mode, both divided by their Euclidean norm, d = ‖e - r‖² = 2 - 2 e·r in [0, 4] and
    y the cell's class:

        excess_p = [min_m d(p; y, m) - min_{k≠y, m} d(p; k, m) + margin]_+
        loss = mean over the classes present of the mean excess of their cells

    So a class may spread over several modes, and a frequent class weighs no more than a rare one. The gradient flows
    into the embedding and into the two modes that were chosen, not through the choice.

    Nothing of size (cells, G, D) is formed: one product of embeddings and modes gives all distances, and the backward
    pass is in closed form. Autograd keeps the embeddings and a few numbers per cell. Autocast has no effect.

    Args:
        embeddings: (B, D, h, w), any scale and floating type; normalised here in float32 or wider.
        labels: Class indices of the cells, (B, h, w), int64. IGNORE_INDEX (255) leaves a cell out.
        modes: (C, M, D), any scale; normalised here.
        margin: Demanded difference of the two squared distances; >= 0, no unit.

    Returns:
        The loss, averaged over the classes present in the whole batch, and over the cells of each: all data-parallel
        workers are joined, each returns its own cells' part times the number of workers. Zero, with zero gradient,
        when all cells are ignored or there is but one class. Ties go to the mode with the lowest number.

    Raises:
        ValueError: If channel sizes differ or `margin` is negative.

    Source:
        Iqbal et al., Distribution Regularized Self-Supervised Learning (DRSL), arXiv 2206.09683, names a distance
        metric loss of multi-modal classes over pseudo labels; no code of it was public. The form is that of Karlinsky
        et al., RepMet, CVPR 2019. The average over classes is ours: RepMet trains on balanced regions.
        An embedding or mode shorter than 1e-12 counts as zero and has no gradient.
    """
    if embeddings.shape[1] != modes.shape[2]:
        raise ValueError(
            f"`embeddings` and `modes` must share the channel size D, but got {tuple(embeddings.shape)} (B, D, h, w) "
            f"and {tuple(modes.shape)} (C, M, D)."
        )
    if not margin >= 0:
        raise ValueError(f"`margin` must not be negative, but got {margin}.")
    precise = _precise(embeddings)
    unit = _unit(modes.flatten(0, 1), torch.float64)
    # Only differences between distances count, which what all modes have in common does not change.
    centred = (unit - unit.mean(dim=0)).to(precise)
    weights = _balanced_weights(labels, len(modes))
    loss, nearest = _MarginSum.apply(embeddings, labels, centred, weights, modes.shape[1], margin)
    return ModeMargin(loss.to(precise), nearest)


@torch.no_grad()
def mode_scores(embeddings: Tensor, modes: Tensor, *, width: float = 0.5) -> Tensor:
    """Score each class by the nearest of its modes: max_m exp(-d / (2 width²)), d as in `mode_margin`.

    A diagnostic and a soft assignment; no loss uses it.

    Args:
        embeddings: (B, D, h, w), any scale and floating type; computed in float32 or wider.
        modes: (C, M, D), any scale.
        width: Deviation of each mode's Gaussian; > 0, in distances on the unit sphere.

    Returns:
        (B, C, h, w) in (0, 1], without gradient; the classes of a cell do not sum to 1.

    Source:
        As `mode_margin`; the posterior of RepMet.
    """
    cosines, _ = _cosines(embeddings, _unit(modes.flatten(0, 1), _precise(embeddings)))
    batch, _, rows, columns = embeddings.shape
    nearest = cosines.view(batch, *modes.shape[:2], rows, columns).amax(dim=2)
    return torch.exp((nearest - 1.0) / width**2)


def mode_alignment(
    source: Tensor,
    source_modes: Tensor,
    target: Tensor,
    target_modes: Tensor,
    *,
    num_modes: int,
    stop_source: bool = True,
) -> Tensor:
    """Pull together the cells of both domains that belong to the same mode.

    With t and s the unit embeddings of the target and source cells of a mode, over the modes that both domains have:

        loss = mean over modes of the mean of ‖t - s‖² over all pairs = mean over modes of 2 - 2 mean(t)·mean(s)

    Exactly the expectation of `sampled_mode_alignment`, in value and gradient, at a cost linear in the cells and
    without noise. The means of unit vectors are not normalised again. Autocast has no effect.

    Args:
        source: Source embeddings, (B, D, h, w), any scale and floating type; normalised here in float32 or wider.
        source_modes: Mode of each source cell, (B, h, w) int64; -1 leaves it out. See `ModeMargin.nearest`.
        target: Target embeddings, (B', D, h', w').
        target_modes: Mode of each target cell, (B', h', w') int64.
        num_modes: G = C * M.
        stop_source: Whether source embeddings are constants.

    Returns:
        Scalar in [0, 4], averaged over the modes that both domains have in the whole batch, all data-parallel workers
        joined; averaging over the workers gives value and gradient of the joined batch. Zero, with zero gradient, when
        there is no such mode.

    Source:
        Iqbal et al., DRSL, arXiv 2206.09683, names stochastic mode alignment without formula; this form is ours. So is
        the constant source: true labels anchor it, noisy target labels should not move it.
    """
    source = source.detach() if stop_source else source
    counts = sum_over_workers(torch.stack([_mode_counts(cells, num_modes) for cells in (source_modes, target_modes)]))
    shared = (counts > 0).all(dim=0)
    weights = shared.double() / shared.sum().clamp(min=1)
    source_means, target_means = (
        _UnitSums.apply(embeddings, cells, num_modes) / count.clamp(min=1).unsqueeze(1)
        for embeddings, cells, count in ((source, source_modes, counts[0]), (target, target_modes, counts[1]))
    )
    return _weighted_distance(source_means, target_means, weights)


def draw_pairs(
    source_modes: Tensor, target_modes: Tensor, *, num_modes: int, pairs: int, generator: torch.Generator
) -> Tensor:
    """Draw pairs of a target and a source cell, uniformly with replacement, in each mode that both domains have.

    Args:
        source_modes: Mode of each source cell, (B, h, w) int64; -1 for none.
        target_modes: Mode of each target cell, (B', h', w') int64.
        num_modes: G = C * M.
        pairs: Pairs per mode, >= 1.
        generator: On the CPU, in the same state on every worker.

    Returns:
        (G * pairs, 3) int64, the same on every worker: the mode, then the target and the source cell, each as its
        number among the cells of that mode in the joined batch of all workers, in order of image, row and column. The
        mode is -1 in rows of modes that a domain lacks: to leave them out, a GPU would have to be waited for.
    """
    counts = sum_over_workers(torch.stack([_mode_counts(cells, num_modes) for cells in (target_modes, source_modes)]))
    shared = (counts > 0).all(dim=0)
    drawn = to_device(torch.rand(2 * num_modes * pairs, generator=generator, dtype=torch.float64), counts.device)
    # The first numbers are dealt to the shared modes in order, a domain at a time.
    first = places_among(shared) * pairs + (torch.arange(2, device=counts.device) * shared.sum() * pairs).unsqueeze(1)
    positions = drawn[first.unsqueeze(2) + torch.arange(pairs, device=counts.device)]
    available = counts.clamp(min=1).unsqueeze(2)
    cells = (positions * available).long().minimum(available - 1)
    modes = torch.where(shared, torch.arange(num_modes, device=counts.device), -1)
    return torch.cat([modes.repeat_interleave(pairs).unsqueeze(1), cells.flatten(1).T], dim=1)


def places_among(chosen: Tensor) -> Tensor:
    """Return the number of each true entry of `chosen`, (n,), among them; what stands at the others is below n."""
    return (chosen.cumsum(0) - 1).clamp(min=0)


def sampled_mode_alignment(
    source: Tensor,
    source_modes: Tensor,
    target: Tensor,
    target_modes: Tensor,
    pairs: Tensor,
    *,
    num_modes: int,
    stop_source: bool = True,
) -> Tensor:
    """Pull together drawn pairs of cells: the mean over modes of the mean of ‖t - s‖² over the pairs of each.

    Args:
        source: Source embeddings, (B, D, h, w), any scale and floating type; normalised here in float32 or wider.
        source_modes: Mode of each source cell, (B, h, w) int64; -1 for none.
        target: Target embeddings, (B', D, h', w').
        target_modes: Mode of each target cell, (B', h', w') int64.
        pairs: (R, 3) int64 from `draw_pairs`; rows of mode -1 count for nothing.
        num_modes: G = C * M.
        stop_source: Whether source embeddings are constants.

    Returns:
        Scalar in [0, 4], with the averages of `mode_alignment`. Zero, with zero gradient, without pairs.

    Source:
        As `mode_alignment`.
    """
    source = source.detach() if stop_source else source
    groups, target_cells, source_cells = pairs.unbind(dim=1)
    drawn = _mode_counts(groups, num_modes)
    weights = torch.where(groups < 0, 0.0, 1.0 / (drawn[groups.clamp(min=0)] * (drawn > 0).sum()).double())
    return _weighted_distance(
        pick_unit_vectors(source, source_modes, groups, source_cells, num_groups=num_modes),
        pick_unit_vectors(target, target_modes, groups, target_cells, num_groups=num_modes),
        weights,
    )


def confidence_regulariser(logits: Tensor, labels: Tensor) -> Tensor:
    """Pull the predictions of labelled pixels towards the uniform distribution: -(1 / C) Σ_k log q_k.

    Args:
        logits: Class scores at label size, (B, C, H, W), any floating type; computed in float32 or wider.
        labels: Class indices, (B, H, W), int64. IGNORE_INDEX (255) leaves a pixel out.

    Returns:
        Scalar in nats, at least log C, averaged over the labelled pixels of the whole batch, all data-parallel workers
        included. Zero, with zero gradient, when all are ignored.

    Source:
        Zou et al., Confidence Regularized Self-Training, ICCV 2019, model regularisation by Kullback-Leibler
        divergence; yzou2/CRST.
    """
    uniform = -logits.to(_precise(logits)).log_softmax(dim=1).mean(dim=1)
    valid = labels != IGNORE_INDEX
    return global_mean((uniform * valid).sum(dtype=torch.float64), valid.sum()).to(uniform.dtype)


def pick_unit_vectors(
    embeddings: Tensor, cell_groups: Tensor, groups: Tensor, cells: Tensor, *, num_groups: int
) -> Tensor:
    """Return this worker's part of picked cells' unit embeddings; the sum over the workers has every row.

    Args:
        embeddings: (B, D, h, w), any scale and floating type; normalised here in float32 or wider.
        cell_groups: Group of each cell, (B, h, w) int64; negative for none.
        groups: Group of each picked cell, (R,) int64, the same on every worker; negative picks none.
        cells: Number of each picked cell among the cells of its group in the joined batch of all workers, in order of
            image, row and column, (R,) int64, the same on every worker.
        num_groups: Groups are below this.

    Returns:
        (R, D) with gradient; zero rows for cells of other workers and for none.
    """
    flat = cell_groups.flatten()
    counts = _mode_counts(cell_groups, num_groups)
    before = gather_over_workers(counts.unsqueeze(0))[: rank()].sum(dim=0)
    picks_none, groups = groups < 0, groups.clamp(min=0)
    cells = cells - before[groups]
    on_this_worker = (cells >= 0) & (cells < counts[groups]) & ~picks_none
    order = flat.argsort(stable=True)  # cells without group come first
    starts = (flat < 0).sum() + counts.cumsum(0) - counts
    places = order[(starts[groups] + cells).clamp(0, len(flat) - 1)]
    grid = cell_groups[0].numel()
    picked = _unit(embeddings.flatten(2)[places // grid, :, places % grid], _precise(embeddings))
    # Every row is read and the others are set to zero: to read some, a GPU would have to be waited for.
    return torch.where(on_this_worker.unsqueeze(1), picked, 0.0)


class _MarginSum(torch.autograd.Function):
    """Weighted sum of the excess, float64, and the nearest own modes; weights go by label.

    Unit modes are (G, D), less a vector that is the same for all.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        embeddings: Tensor,
        labels: Tensor,
        unit: Tensor,
        weights: Tensor,
        modes_per_class: int,
        margin: float,
    ) -> tuple[Tensor, Tensor]:
        cosines, inverse_norm = _cosines(embeddings, unit)
        cell_labels = labels.flatten(1).unsqueeze(1)
        ignored = cell_labels == IGNORE_INDEX
        first = cell_labels.masked_fill(ignored, 0) * modes_per_class
        own_modes = first + torch.arange(modes_per_class, device=labels.device).unsqueeze(1)
        own_cosine, own_mode = cosines.gather(1, own_modes).max(dim=1, keepdim=True)
        own_mode += first
        other_cosine, other_mode = cosines.scatter_(1, own_modes, -torch.inf).max(dim=1, keepdim=True)
        difference = other_cosine - own_cosine

        # A single class has no other mode: its difference is -inf, and where() keeps that out of every product.
        excess = 2.0 * difference + margin
        active = (excess > 0) & ~ignored
        cell_weights = torch.where(active, weights.to(excess.dtype)[cell_labels], 0.0)
        loss = (torch.where(active, excess, 0.0).double() * cell_weights).sum()
        slope = 2.0 * cell_weights * inverse_norm
        radial = slope * torch.where(active, difference, 0.0) * inverse_norm
        nearest = own_mode.masked_fill(ignored, -1).view_as(labels)
        ctx.save_for_backward(embeddings, unit, own_mode, other_mode, slope, radial)
        ctx.mark_non_differentiable(nearest)
        return loss, nearest

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        embeddings, unit, own_mode, other_mode, slope, radial = ctx.saved_tensors  # type: ignore[attr-defined]
        slope, radial = (values * grad_loss.to(values.dtype) for values in (slope, radial))
        flat = embeddings.flatten(2).to(unit.dtype)
        slopes_of_modes = slope.new_zeros(len(flat), len(unit), flat.shape[2]).scatter_(1, other_mode, slope)
        slopes_of_modes.scatter_add_(1, own_mode, -slope)
        with torch.autocast(embeddings.device.type, enabled=False):
            unit_gradient = torch.bmm(slopes_of_modes, flat.transpose(1, 2)).sum(dim=0)
            gradient = torch.bmm(unit.T.expand(len(flat), -1, -1), slopes_of_modes).addcmul_(flat, radial, value=-1.0)
        return gradient.to(embeddings.dtype).view_as(embeddings), None, unit_gradient, None, None, None


class _UnitSums(torch.autograd.Function):
    """Sum of the unit embeddings of each group of cells, (num_groups, D)."""

    @staticmethod
    def forward(ctx: FunctionCtx, embeddings: Tensor, cell_groups: Tensor, num_groups: int) -> Tensor:
        flat = embeddings.flatten(2).to(_precise(embeddings))
        inverse_norm = _inverse_norm(flat)
        ctx.num_groups = num_groups  # type: ignore[attr-defined]
        ctx.save_for_backward(embeddings, cell_groups, inverse_norm)
        with torch.autocast(embeddings.device.type, enabled=False):
            return torch.bmm(_membership(cell_groups, inverse_norm, num_groups), flat.transpose(1, 2)).sum(dim=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_sums: Tensor) -> tuple[Tensor | None, None, None]:
        embeddings, cell_groups, inverse_norm = ctx.saved_tensors  # type: ignore[attr-defined]
        membership = _membership(cell_groups, inverse_norm, ctx.num_groups)  # type: ignore[attr-defined]
        flat = embeddings.flatten(2).to(grad_sums.dtype)
        with torch.autocast(embeddings.device.type, enabled=False):
            along = torch.bmm(grad_sums.expand(len(flat), -1, -1), flat).mul_(membership).sum(dim=1, keepdim=True)
            gradient = torch.bmm(grad_sums.T.expand(len(flat), -1, -1), membership)
        gradient.addcmul_(flat, along * inverse_norm.square(), value=-1.0)
        return gradient.to(embeddings.dtype).view_as(embeddings), None, None


def _weighted_distance(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Return Σ weights (2 - 2 x·y) over rows x and y, the sums of all workers' parts `first` and `second`, (R, D).

    Every worker's result has the gradient of its own parts, times the number of workers; their average is the value.
    """
    weights = weights.to(first.dtype)
    first_total, second_total = sum_over_workers(first), sum_over_workers(second)
    with_own_parts = (first * second_total).sum(dim=1) + (second * first_total).sum(dim=1)
    products = (first_total * second_total).sum(dim=1)
    return (weights * (2.0 - 2.0 * (world_size() * with_own_parts - products))).sum()


def _balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """Return the weight of a cell by its label, (256,) float64: 1 / (classes present * cells of its class)."""
    counts = sum_over_workers(count_values(labels, IGNORE_INDEX + 1)[:classes])
    weights = torch.zeros(IGNORE_INDEX + 1, dtype=torch.float64, device=labels.device)
    present = counts > 0
    weights[:classes] = torch.where(present, world_size() / (present.sum() * counts).double(), 0.0)
    return weights


def _cosines(embeddings: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines with the unit modes, (B, G, P), and inverse norms, (B, 1, P), 0 for a zero embedding."""
    flat = embeddings.flatten(2).to(unit.dtype)
    inverse_norm = _inverse_norm(flat)
    with torch.autocast(embeddings.device.type, enabled=False):
        products = torch.bmm(unit.expand(len(flat), -1, -1), flat)
    return products.mul_(inverse_norm), inverse_norm


def _membership(cell_groups: Tensor, inverse_norm: Tensor, num_groups: int) -> Tensor:
    """Return the inverse norm of each cell at its group, 0 elsewhere, (B, num_groups, P)."""
    cells = cell_groups.flatten(1).unsqueeze(1)
    inside = inverse_norm.masked_fill(cells < 0, 0.0)
    return inverse_norm.new_zeros(len(cells), num_groups, cells.shape[2]).scatter_(1, cells.clamp(min=0), inside)


def _mode_counts(cell_modes: Tensor, num_modes: int) -> Tensor:
    """Return this worker's cells of each mode, (num_modes,) int64; negative ones are left out."""
    return count_values(cell_modes + 1, num_modes + 1)[1:]


def _unit(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return F.normalize(rows.to(dtype), dim=1, eps=SMALLEST_NORM)


def _inverse_norm(flat: Tensor) -> Tensor:
    """Return (B, 1, P) from (B, D, P); 0 for a zero embedding."""
    norm = flat.square().sum(dim=1, keepdim=True).sqrt()
    return torch.where(norm < SMALLEST_NORM, 0.0, 1.0 / norm)


def _precise(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
