"""Contrast of the mean feature of each class in an image with the running centroids of all classes."""

# B images, D feature channels, C classes, h x w cells of the feature map, P = h * w.

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from segadapt.trainables.core.distributed import global_mean

SMALLEST_NORM = 1e-12
_CHANNELS_PER_BLOCK = 256


def centroid_contrast(
    features: Tensor,
    labels: Tensor,
    centroids: Tensor,
    seen: Tensor,
    *,
    temperature: float = 0.1,
    min_cells: int = 1,
) -> Tensor:
    """Pull the mean feature of each class in each image towards the centroid of its class, away from the others.

    With u_{b,k} the mean feature of the cells of class k in image b and v_j the centroid of class j, both divided by
    their Euclidean norm, V the seen classes and A the pairs (b, k) with k in V and enough cells:

        loss = 1/|A| Σ_{(b,k) in A} (log Σ_{j in V} exp(u_{b,k}·v_j / t) - u_{b,k}·v_k / t)

    Every pair counts once, so a rare class weighs as much as a frequent one.

    Args:
        features: (B, D, h, w), any scale, floating type and memory layout; computed in float32 or wider, also under
            autocast. Alone receives a gradient.
        labels: Class indices at feature resolution, (B, h, w), int64. IGNORE_INDEX (255) leaves a cell out.
        centroids: (C, D), any scale, see `ClassCentroids`.
        seen: Which classes have a centroid, (C,) bool; the others are in no sum.
        temperature: Divides the cosine similarities; > 0, no unit. Smaller is sharper.
        min_cells: Smallest number of cells of a class in an image that takes part; >= 1.

    Returns:
        Scalar in nats, averaged over the pairs of the whole batch, all data-parallel workers included: local sum over
        global count, see `global_mean`. Zero, with zero gradient, when there is no pair.

    Raises:
        ValueError: If channel sizes differ or `temperature` is not positive.

    Source:
        Marsden et al., Contrastive Learning and Self-Training for Unsupervised Domain Adaptation in Semantic
        Segmentation (CLST), arXiv 2105.02001. Its abstract names category-wise centroids and a contrastive loss; this
        form of it is ours.
        Differs: a mean feature shorter than 1e-12 counts as zero and has no gradient, where dividing by 1e-12 would
        give it one beyond all bounds.
    """
    if features.shape[1] != centroids.shape[1]:
        raise ValueError(
            f"`features` and `centroids` must share the channel size D, but got {tuple(features.shape)} (B, D, h, w) "
            f"and {tuple(centroids.shape)} (C, D)."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, but got {temperature}.")
    sums, counts = class_sums(features, labels, len(centroids))
    anchors = F.normalize(centroids.detach().double(), dim=1, eps=SMALLEST_NORM)
    # What all seen centroids have in common changes no loss, and would cancel where their directions nearly agree.
    common = (anchors * seen.unsqueeze(1)).sum(dim=0) / seen.sum().clamp(min=1)
    with torch.autocast(features.device.type, enabled=False):
        means = _direction(sums / counts.clamp(min=1).unsqueeze(2))
        logits = means @ (anchors - common).to(sums.dtype).T / temperature
    valid = (counts >= max(min_cells, 1)) & seen
    # Rows that take no part become zeros, so that no row consists of unseen classes alone.
    logits = torch.where(valid.unsqueeze(2), logits.masked_fill(~seen, -torch.inf), 0.0)
    total = torch.where(valid, _cross_entropy_of_diagonal(logits), 0.0).sum(dtype=torch.float64).to(logits.dtype)
    return global_mean(total, valid.sum())


def _cross_entropy_of_diagonal(logits: Tensor) -> Tensor:
    """Return log Σ_j exp(l_kj) - l_kk, (B, C), of logits (B, C, C), with all digits where it is close to zero."""
    diagonal = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
    excess = logits - logits.diagonal(dim1=1, dim2=2).unsqueeze(2)
    # Not -inf, of which the derivative of a logsumexp over nothing else is NaN.
    others = excess.masked_fill(diagonal, torch.finfo(logits.dtype).min).logsumexp(dim=2)
    return F.softplus(others, threshold=100)


def class_sums(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Add up the features of each class in each image, with one matrix product per image.

    The backward pass copies the gradient of a class's sum to each of its cells. Temporaries hold the one-hot labels,
    and a block of channels where the features are narrower than float32.

    Args:
        features: (B, D, h, w), any floating type, with gradient.
        labels: Class indices at feature resolution, (B, h, w), int64. IGNORE_INDEX (255) leaves a cell out.
        num_classes: C.

    Returns:
        Sums, (B, C, D), float32 or wider, zero for a class without cells; numbers of cells, (B, C), int64.
    """
    sums: Tensor = _ClassSums.apply(features, labels, num_classes)
    return sums, _one_hot(labels, num_classes).sum(dim=2)


class _ClassSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        precise = torch.promote_types(features.dtype, torch.float32)
        one_hot = _one_hot(labels, num_classes).to(precise)
        ctx.save_for_backward(labels)
        ctx.shape, ctx.dtype = features.shape, features.dtype  # type: ignore[attr-defined]
        ctx.channels_last = features.is_contiguous(memory_format=torch.channels_last)  # type: ignore[attr-defined]
        with torch.autocast(features.device.type, enabled=False):
            blocks = _channel_blocks(features.flatten(2), precise)
            return torch.cat([torch.bmm(one_hot, block.transpose(1, 2)) for block in blocks], dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (labels,) = ctx.saved_tensors  # type: ignore[attr-defined]
        batch, channels, rows, columns = ctx.shape  # type: ignore[attr-defined]
        classes = grad_output.shape[1]
        # Row C, of zeros, is the gradient of ignored cells.
        table = F.pad(grad_output.to(ctx.dtype), (0, 0, 0, 1))  # type: ignore[attr-defined]
        index = labels.flatten(1).clamp(max=classes)
        if ctx.channels_last:  # type: ignore[attr-defined]
            index = index + (classes + 1) * torch.arange(batch, device=index.device).unsqueeze(1)
            cells = table.flatten(0, 1).index_select(0, index.flatten())
            return cells.view(batch, rows, columns, channels).permute(0, 3, 1, 2), None, None
        gradient = table.new_empty(batch, channels, rows * columns)
        for image in range(batch):
            torch.index_select(table[image].T.contiguous(), 1, index[image], out=gradient[image])
        return gradient.view(batch, channels, rows, columns), None, None


def _channel_blocks(flat: Tensor, precise: torch.dtype) -> Iterator[Tensor]:
    """Yield (B, D, P) in `precise`: as it is, or cast a block of channels at a time."""
    step = flat.shape[1] if flat.dtype == precise else _CHANNELS_PER_BLOCK
    for start in range(0, flat.shape[1], step):
        yield flat[:, start : start + step].to(precise)


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Return which class each cell has, (B, C, P) bool, for labels (B, h, w)."""
    classes = torch.arange(num_classes, device=labels.device)
    return labels.flatten(1).unsqueeze(1) == classes[:, None]


def _direction(vectors: Tensor) -> Tensor:
    """Divide (..., D) by its norm; a vector shorter than SMALLEST_NORM becomes zero, without gradient."""
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    short = norm < SMALLEST_NORM
    return vectors * torch.where(short, 0.0, 1.0 / torch.where(short, 1.0, norm))
