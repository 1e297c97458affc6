"""Contrast of pixels with the class prototypes of the other domain, from target to source and back."""

# B images per domain, image b of one domain paired with image b of the other; D feature channels, C classes;
# H x W pixels of a label map, h x w cells of a feature map, P = h * w. Sizes may differ between the domains.

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.distributed import global_mean
from segadapt.trainables.core.labelling.features import count_values, labels_at_features

SMALLEST_NORM = 1e-12
ABSENT_SIMILARITY = -1.0
"""Takes the place of a similarity that is exactly zero, above all with the zero prototype of an absent class."""
_CHANNELS_PER_BLOCK = 64


class PrototypeContrast(NamedTuple):
    """The two directions of the contrast, scalars in nats."""

    forward: Tensor  # target pixels against source prototypes
    backward: Tensor  # source pixels against target prototypes


def prototype_contrast(
    source_features: Tensor,
    source_labels: Tensor,
    target_features: Tensor,
    target_labels: Tensor,
    *,
    num_classes: int,
    temperature: float = 0.1,
    dynamic_labels: Tensor | None = None,
) -> PrototypeContrast:
    """Classify the pixels of each image by their cosine similarity with the class prototypes of its partner.

    A prototype r_k is the mean feature of the cells of class k of one image, 0 without any; labels are brought to the
    feature grid by nearest sampling. With s_{k,p} the similarity of cell p and the partner's prototype of class k (see
    `prototype_similarity`), t the temperature and n_{k,p} the number of pixels with label k whose nearest cell is p,
    over the classes k that have cells in both images:

        loss = Σ_p Σ_k n_{k,p} (log Σ_j exp(s_{j,p} / t) - s_{k,p} / t) / Σ_p Σ_k n_{k,p}

    That is the mean over labelled full-resolution pixels of a cross entropy, without anything of size (C, H, W). All C
    classes are in the inner sum; those without a prototype have similarity -1. Gradients flow into the features
    directly and through the prototypes.

    Args:
        source_features: (B, D, h, w), any scale and floating type; computed in float32 or wider, also under autocast.
        source_labels: Class indices, (B, H, W), int64. IGNORE_INDEX (255) leaves a pixel out.
        target_features: Features of the target, like the source's.
        target_labels: Pseudo labels of the target, like the source's labels.
        num_classes: C.
        temperature: Divides the similarities; > 0, no unit. Smaller is sharper.
        dynamic_labels: Labels of the target's cells, (B, h, w) int64, that stand in where `target_labels` has 255.
            None in the variant `released`; in `full` from `PrototypeCalibration`.

    Returns:
        Both directions, each averaged over the labelled pixels of an image, then over the pairs of the whole batch, all
        data-parallel workers included. A pair without common class gives zero, with zero gradient.

    Raises:
        ValueError: If channel sizes differ or `temperature` is not positive.

    Source:
        Lee et al., Bi-directional Contrastive Learning for Domain Adaptive Semantic Segmentation (BiCL), ECCV 2022,
        arXiv 2207.10892, forward and backward contrast; cvlab-yonsei/DASS@f544686.
        Differs: a pair without common class gives 0, there NaN.
    """
    _refuse_bad_arguments(source_features, target_features, temperature)
    precise = torch.promote_types(source_features.dtype, torch.float32)
    source_features, target_features = source_features.to(precise), target_features.to(precise)
    source_cells, source_counts, _ = _cells_and_counts(source_labels, source_features, num_classes)
    target_cells, target_counts, unlabelled = _cells_and_counts(target_labels, target_features, num_classes)
    if dynamic_labels is not None:
        target_counts = target_counts + _one_hot(dynamic_labels, num_classes) * unlabelled
        target_cells = fuse_labels(target_cells, dynamic_labels)
    forward, backward = _ContrastSums.apply(
        *(source_features, target_features),
        *(_one_hot(source_cells, num_classes).to(precise), _one_hot(target_cells, num_classes).to(precise)),
        *(source_counts, target_counts, temperature),
    )
    pairs = torch.full((), len(source_features), device=source_features.device)
    return PrototypeContrast(global_mean(forward, pairs).to(precise), global_mean(backward, pairs).to(precise))


def _refuse_bad_arguments(source_features: Tensor, target_features: Tensor, temperature: float) -> None:
    if source_features.shape[:2] != target_features.shape[:2]:
        raise ValueError(
            "`source_features` and `target_features` must share the batch size B and the channel size D, but got "
            f"{tuple(source_features.shape)} and {tuple(target_features.shape)} (B, D, h, w)."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, but got {temperature}.")


def _cells_and_counts(labels: Tensor, features: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return labels at the cells of the features, (B, h, w), and the pixels of each class, (B, C, P), and of none."""
    grid = grid_of(features)
    counts = label_counts(labels, grid, num_classes)
    return labels_at_features(labels, grid), counts[:, :-1], counts[:, -1:]


def class_prototypes(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Average the features of each class in each image.

    Args:
        features: (B, D, h, w), float32 or float64, with gradient.
        labels: Class indices of the cells, (B, h, w), int64. IGNORE_INDEX (255) leaves a cell out.
        num_classes: C.

    Returns:
        Means, (B, C, D), zero for a class without cells, and the number of cells, (B, C), of the features' type.
    """
    return _pooled(features, _one_hot(labels, num_classes).to(features.dtype))


@torch.no_grad()
def cosine_similarity(features: Tensor, prototypes: Tensor) -> Tensor:
    """Return the cosine of the angle between each cell and each prototype, (B, C, P), without gradient.

    Norms below 1e-12 count as 1e-12.

    Args:
        features: (B, D, h, w), float32 or float64.
        prototypes: (B, C, D), of the same type.
    """
    return _cosines(features, prototypes)[0]


@torch.no_grad()
def prototype_similarity(features: Tensor, prototypes: Tensor) -> Tensor:
    """Return the cosine similarities, (B, C, P), with every exact zero replaced by the constant -1; without gradient.

    Zeros come from absent classes, whose prototype is zero: they stay in the contrast as fixed, far negatives.

    Args:
        features: (B, D, h, w), float32 or float64.
        prototypes: (B, C, D), of the same type.

    Source:
        cvlab-yonsei/DASS@f544686. A pair that happens to be orthogonal is treated alike there and here.
    """
    similarity = cosine_similarity(features, prototypes)
    return similarity.masked_fill(similarity == 0, ABSENT_SIMILARITY)


@torch.no_grad()
def label_counts(labels: Tensor, grid: tuple[int, int], num_classes: int) -> Tensor:
    """Count the pixels of each label in each cell of the feature map.

    A pixel belongs to the cell that nearest up-sampling of the feature map would show there.

    Args:
        labels: (B, H, W), int64, 255 = ignore.
        grid: Cells of the feature map, (h, w).
        num_classes: C.

    Returns:
        (B, C + 1, P), int64; the last column counts ignored pixels.
    """
    height, width = _size_of(labels)
    rows = labels_at_features(torch.arange(grid[0], device=labels.device).view(1, -1, 1), (height, 1))[0]
    columns = labels_at_features(torch.arange(grid[1], device=labels.device).view(1, 1, -1), (1, width))[0]
    cell_of_pixel = rows.int() * grid[1] + columns.int()
    cells, bins = grid[0] * grid[1], (num_classes + 1) * grid[0] * grid[1]
    # Image by image and in narrow integers, which bounds the temporaries.
    counts = [
        count_values(label.byte().clamp_(max=num_classes).int().mul_(cells).add_(cell_of_pixel), bins)
        for label in labels
    ]
    return torch.stack(counts).view(len(labels), num_classes + 1, cells)


def fuse_labels(fixed: Tensor, dynamic: Tensor) -> Tensor:
    """Fill unlabelled pixels with the label of their cell.

    Args:
        fixed: (B, H, W), int64, 255 = unlabelled; at any size, that of the feature map included.
        dynamic: Labels of the cells, (B, h, w), int64, 255 = unlabelled.

    Returns:
        (B, H, W), int64.
    """
    return torch.where(fixed == IGNORE_INDEX, labels_at_features(dynamic, _size_of(fixed)), fixed)


def grid_of(features: Tensor) -> tuple[int, int]:
    """Return the cells of a feature map (B, D, h, w) as (h, w)."""
    return features.shape[-2], features.shape[-1]


class _ContrastSums(torch.autograd.Function):
    """Both directions: sums over the pairs, of means over counted pixels, float64. The backward pass is in closed form.

    Features are (B, D, h, w) in float32 or float64; one-hot labels of the cells and pixel counts are (B, C, P).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        source_features: Tensor,
        target_features: Tensor,
        source_cells: Tensor,
        target_cells: Tensor,
        source_counts: Tensor,
        target_counts: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        source_prototypes, source_sizes = _pooled(source_features, source_cells)
        target_prototypes, target_sizes = _pooled(target_features, target_cells)
        shared = (source_sizes > 0) & (target_sizes > 0)
        forward, *of_target = _direction(target_features, source_prototypes, target_counts, shared, temperature)
        backward, *of_source = _direction(source_features, target_prototypes, source_counts, shared, temperature)
        ctx.save_for_backward(
            *(source_features, source_cells, source_prototypes, source_sizes, *of_source),
            *(target_features, target_cells, target_prototypes, target_sizes, *of_target),
        )
        return forward, backward

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, of_forward: Tensor, of_backward: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # type: ignore[attr-defined]
        source_features, source_cells, source_prototypes, source_sizes, source_slopes, source_along = saved[:6]
        target_features, target_cells, target_prototypes, target_sizes, target_slopes, target_along = saved[6:]
        source_scale, target_scale = of_backward.to(source_slopes.dtype), of_forward.to(source_slopes.dtype)
        source_rows = (
            _prototype_gradient(source_prototypes, source_sizes, target_features, target_slopes) * target_scale
        )
        target_rows = (
            _prototype_gradient(target_prototypes, target_sizes, source_features, source_slopes) * source_scale
        )
        # Scales enter the small factors of the matrix products.
        of_source = _feature_gradient(
            *(source_features, source_cells, source_slopes, source_along * source_scale),
            *(_directions(target_prototypes) * source_scale, source_rows),
        )
        of_target = _feature_gradient(
            *(target_features, target_cells, target_slopes, target_along * target_scale),
            *(_directions(source_prototypes) * target_scale, target_rows),
        )
        return of_source, of_target, *(None,) * 5


def _direction(
    features: Tensor, prototypes: Tensor, counts: Tensor, shared: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return one direction's sum and its derivatives.

    Args:
        features: (B, D, h, w).
        prototypes: Prototypes of the other domain, (B, C, D).
        counts: Pixels of each label, (B, C, P).
        shared: Classes whose pixels enter, (B, C) bool.
        temperature: > 0.

    Returns:
        The sum, float64; its derivative by the dot products of features with unit prototypes, (B, C, P), zero where the
        similarity is replaced; and what each feature must lose of itself because its length does not matter, (B, 1, P).
    """
    logits, inverse_norms = _cosines(features, prototypes)
    zero = logits == 0
    logits.masked_fill_(zero, ABSENT_SIMILARITY).div_(temperature)
    pixels = (counts.sum(dim=2) * shared).sum(dim=1).clamp(min=1)
    weights = counts.to(logits.dtype).mul_((shared / pixels.to(logits.dtype)[:, None]).unsqueeze(2))
    log_softmax = logits.log_softmax(dim=1)
    total = -(weights * log_softmax).sum(dim=2).sum(dtype=torch.float64)

    # A replaced similarity has slope 0, so `logits * temperature` may stand for the similarities.
    slopes = log_softmax.exp_().mul_(weights.sum(dim=1, keepdim=True)).sub_(weights).masked_fill_(zero, 0.0)
    along = (slopes * logits).sum(dim=1, keepdim=True) * inverse_norms.square()
    along.masked_fill_(inverse_norms >= 1 / SMALLEST_NORM, 0.0)
    return total, slopes.mul_(inverse_norms / temperature), along


def _prototype_gradient(prototypes: Tensor, sizes: Tensor, features: Tensor, slopes: Tensor) -> Tensor:
    """Return what each cell of a class receives through its prototype, (B, C, D).

    Args:
        prototypes: (B, C, D).
        sizes: Cells of each class, (B, C).
        features: Features that the prototypes are compared with, (B, D, h, w).
        slopes: Derivative by the dot products of `features` with unit prototypes, (B, C, P).
    """
    with torch.autocast(features.device.type, enabled=False):
        gradient = torch.bmm(features.flatten(2), slopes.transpose(1, 2)).transpose(1, 2)
    norms = prototypes.norm(dim=2, keepdim=True)
    directions = _directions(prototypes)
    radial = (gradient * directions).sum(dim=2, keepdim=True).masked_fill_(norms < SMALLEST_NORM, 0.0)
    scale: Tensor = norms.clamp(min=SMALLEST_NORM) * sizes.clamp(min=1).unsqueeze(2)
    tangential: Tensor = gradient - directions * radial
    return tangential / scale


def _feature_gradient(
    features: Tensor, cells: Tensor, slopes: Tensor, along: Tensor, directions: Tensor, rows: Tensor
) -> Tensor:
    """Return the gradient of the features, (B, D, h, w): as compared with prototypes, and through their own.

    Args:
        features: (B, D, h, w).
        cells: One-hot labels of the cells, (B, C, P).
        slopes: Derivative by the dot products with unit prototypes, (B, C, P).
        along: What each feature loses of itself, (B, 1, P).
        directions: Unit prototypes of the other domain, (B, C, D).
        rows: What each cell of a class receives through its prototype, (B, C, D).
    """
    vectors = torch.cat([directions, rows], dim=1).transpose(1, 2)
    with torch.autocast(features.device.type, enabled=False):
        gradient = torch.bmm(vectors, torch.cat([slopes, cells], dim=1))
    return gradient.addcmul_(features.flatten(2), along, value=-1).view_as(features)


def _pooled(features: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Return class means, (B, C, D), and sizes, (B, C), for one-hot labels of the cells, (B, C, P)."""
    sizes = cells.sum(dim=2)
    with torch.autocast(features.device.type, enabled=False):
        sums = torch.bmm(features.flatten(2), cells.transpose(1, 2)).transpose(1, 2)
    return sums / sizes.clamp(min=1).unsqueeze(2), sizes


def _cosines(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines, (B, C, P), and inverse norms of the features, (B, 1, P)."""
    flat = features.flatten(2)
    squares = flat.new_zeros(len(flat), 1, flat.shape[2])
    for block in torch.split(flat, _CHANNELS_PER_BLOCK, dim=1):  # bounds the temporaries
        squares += block.square().sum(dim=1, keepdim=True)
    inverse_norms = squares.sqrt_().clamp_(min=SMALLEST_NORM).reciprocal_()
    with torch.autocast(features.device.type, enabled=False):
        return torch.bmm(_directions(prototypes), flat).mul_(inverse_norms), inverse_norms


def _directions(prototypes: Tensor) -> Tensor:
    return F.normalize(prototypes, dim=2, eps=SMALLEST_NORM)


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Return which class each cell has, (B, C, P) bool, for labels (B, h, w)."""
    classes = torch.arange(num_classes, device=labels.device)
    return labels.flatten(1).unsqueeze(1) == classes[:, None]


def _size_of(labels: Tensor) -> tuple[int, int]:
    return labels.shape[-2], labels.shape[-1]
