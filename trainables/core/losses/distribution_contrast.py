"""Contrast of pixels with class distributions: the closed-form bound of infinitely many Gaussian pairs."""

# B batch, D feature channels, C classes, h x w cells of the feature map, P = h * w.

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.distributed import global_mean

SMALLEST_NORM = 1e-12
_SMALL_LOGIT = 0.5
_CHANNELS_PER_BLOCK = 128


def distribution_contrast(
    features: Tensor,
    labels: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    temperature: float = 100.0,
    covariance_factor: float = 1.0,
) -> Tensor:
    """Pull each labelled pixel towards the Gaussian of its class and push it away from those of all others.

    With f the pixel's feature, a_c and v_c the mean and the variance vector of class c, all three divided by their
    Euclidean norm, and t the temperature:

        logit_c = f·a_c / t + (f∘f)·v_c / (2 t²)        loss = log Σ_c exp(logit_c) - f·a_y / t

    A class whose mean and variance are zero, because it was never seen, has logit 0 and stays in the sum. At large
    temperatures the loss is ln C plus a small signal; watch `loss - ln C`.

    Neither f nor any (pixels, C, D) tensor is formed: a channel block at a time is cast to float32 (float64 stays) and
    multiplied with the class vectors, and the backward pass is in closed form. Temporaries hold one channel block,
    autograd keeps the features and 2 C + 1 numbers per pixel. Autocast has no effect.

    Args:
        features: Pixel features, (B, D, h, w), any scale and floating type; normalised here. Alone receives a gradient.
        labels: Class indices at feature resolution, (B, h, w), int64. IGNORE_INDEX (255) leaves a pixel out.
        mean: Class means, (C, D), any scale.
        variance: Class variances per channel, (C, D), any scale.
        temperature: Divides the linear part once and the quadratic part squared; > 0, no unit.
        covariance_factor: Multiplies the quadratic part; >= 0, no unit. 0 leaves the class means alone.

    Returns:
        Scalar in nats, averaged over the labelled pixels of the whole batch, all data-parallel workers included:
        local sum over global count, see `global_mean`. Zero, with zero gradient, when all are ignored.

    Raises:
        ValueError: If channel sizes differ or `temperature` is not positive.

    Source:
        Li et al., Semantic Distribution-aware Contrastive Adaptation for Semantic Segmentation (SDCA), arXiv
        2105.05013, the upper bound with diagonal covariance; BIT-DA/SDCA@d00e7ba. The factor: BIT-DA/SePiCo.
        Differs: as in that code, means and variances are normalised, which the derivation does not ask for. An empty
        selection gives 0, there NaN. A feature shorter than 1e-12 counts as zero and has no gradient.
    """
    if not features.shape[1] == mean.shape[1] == variance.shape[1]:
        raise ValueError(
            f"`features`, `mean` and `variance` must share the channel size D, but got {tuple(features.shape)} "
            f"(B, D, h, w), {tuple(mean.shape)} (C, D) and {tuple(variance.shape)} (C, D)."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, but got {temperature}.")
    precise = torch.promote_types(features.dtype, torch.float32)
    directions = F.normalize(mean.detach().double(), dim=1, eps=SMALLEST_NORM)
    # A vector taken from all means leaves the loss as it is, and of large features with a common offset, whose
    # directions nearly agree, it takes the part that would cancel.
    linear = ((directions - directions.mean(dim=0)) / temperature).to(precise)
    quadratic = F.normalize(variance.detach().double(), dim=1, eps=SMALLEST_NORM)
    quadratic = (quadratic * (covariance_factor / (2.0 * temperature**2))).to(precise)
    total: Tensor = _ContrastSum.apply(features, labels, linear, quadratic)
    return global_mean(total, (labels != IGNORE_INDEX).sum()).to(precise)


class _ContrastSum(torch.autograd.Function):
    """Sum of the loss over the labelled pixels, float64, given class vectors scaled by the temperature."""

    @staticmethod
    def forward(ctx: FunctionCtx, features: Tensor, labels: Tensor, linear: Tensor, quadratic: Tensor) -> Tensor:
        # A row of ones beside the variances: forward it sums the squares, backward it carries the radial part.
        quadratic = torch.cat([quadratic, torch.ones_like(quadratic[:1])])
        linear_part, quadratic_part, inverse_norm = _project(features, linear, quadratic)

        valid = (labels != IGNORE_INDEX).flatten(1).unsqueeze(1)
        classes = torch.arange(len(linear), device=labels.device)
        own_class = labels.flatten(1).unsqueeze(1) == classes[:, None]
        logits = linear_part + quadratic_part
        excess = _excess_over_uniform(logits) - (linear_part * own_class).sum(dim=1, keepdim=True)
        total = ((excess.double() + math.log(len(linear))) * valid).sum()

        # Derivative by the normalised feature f: linear^T pull + 2 f ∘ quadratic^T push; minus its part along f.
        push = logits.softmax(dim=1) * valid
        pull = push - own_class.to(push.dtype)
        along = (pull * linear_part + 2.0 * push * quadratic_part).sum(dim=1, keepdim=True)
        slopes = torch.cat([2.0 * push, -along], dim=1) * inverse_norm.square()
        ctx.save_for_backward(features, linear, quadratic, pull * inverse_norm, slopes)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        features, linear, quadratic, pull, slopes = ctx.saved_tensors  # type: ignore[attr-defined]
        scale = grad_output.to(pull.dtype)
        pull, slopes = pull * scale, slopes * scale
        flat = features.flatten(2)
        gradient = torch.empty_like(flat)
        with torch.autocast(features.device.type, enabled=False):
            for block in _channel_blocks(flat):
                values = torch.matmul(quadratic[:, block].T, slopes)
                values.mul_(flat[:, block]).baddbmm_(linear[:, block].T.expand(len(flat), -1, -1), pull)
                gradient[:, block] = values
        return gradient.view_as(features), None, None, None


def _project(features: Tensor, linear: Tensor, quadratic: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply normalised features and their squares with the class vectors.

    Args:
        features: (B, D, h, w).
        linear: (C, D).
        quadratic: (C + 1, D), the last row all ones.

    Returns:
        Linear parts (B, C, P), quadratic parts (B, C, P) and inverse feature norms (B, 1, P), 0 for a zero feature.
    """
    flat = features.flatten(2)
    batch, _, pixels = flat.shape
    products = linear.new_zeros(batch, len(linear), pixels)
    square_products = linear.new_zeros(batch, len(quadratic), pixels)
    with torch.autocast(features.device.type, enabled=False):
        for block in _channel_blocks(flat):
            values = flat[:, block].to(linear.dtype)
            products += torch.matmul(linear[:, block], values)
            square_products += torch.matmul(quadratic[:, block], values.square())
    norm = square_products[:, -1:].sqrt()
    inverse_norm = torch.where(norm < SMALLEST_NORM, 0.0, 1.0 / norm)
    return products * inverse_norm, square_products[:, :-1] * inverse_norm.square(), inverse_norm


def _excess_over_uniform(logits: Tensor) -> Tensor:
    """Return log mean_c exp(logits), (B, 1, P), which keeps its relative accuracy where all logits are near zero."""
    near_zero = logits.expm1().mean(dim=1, keepdim=True).log1p()
    anywhere = logits.logsumexp(dim=1, keepdim=True) - math.log(logits.shape[1])
    return torch.where(logits.abs().amax(dim=1, keepdim=True) < _SMALL_LOGIT, near_zero, anywhere)


def _channel_blocks(flat: Tensor) -> Iterator[slice]:
    for start in range(0, flat.shape[1], _CHANNELS_PER_BLOCK):
        yield slice(start, start + _CHANNELS_PER_BLOCK)
