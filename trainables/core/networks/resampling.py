"""Antialiased resizing as products with a matrix per side, which can be exported and has a gradient that repeats."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Interpolation = Literal["bilinear", "bicubic"]


def resampling(before: int, after: int, interpolation: Interpolation, device: torch.device) -> Tensor:
    """Return the weight of each of the pixels `before` in each of the pixels `after`, (after, before) float32."""
    scale = torch.full((1,), before / after, device=device)  # `max` on a number asks whether images shrink
    centres = (torch.arange(after, device=device) + 0.5) * scale
    distance = torch.arange(before, device=device) + 0.5 - centres[:, None]
    weights = _kernel((distance / scale.clamp(min=1)).abs(), interpolation)
    return weights / weights.sum(1, keepdim=True)


def _kernel(x: Tensor, interpolation: Interpolation) -> Tensor:
    """Return the weight at the distance `x`: a triangle, or the cubic of PIL (a = -0.5)."""
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def resampled(maps: Tensor, size: Sequence[int], interpolation: Interpolation) -> Tensor:
    """Return maps, (..., H, W), antialiased at another size, (..., *size), as `F.interpolate` does up to rounding."""
    with torch.autocast(maps.device.type, enabled=False):
        height, width = (
            resampling(before, after, interpolation, maps.device).to(maps.dtype)
            for before, after in zip(maps.shape[-2:], size, strict=True)
        )
        return height @ (maps @ width.T)


class RepeatableResizing(TorchFunctionMode):
    """Within it, antialiased resizing is a product: PyTorch's own has no gradient that repeats on GPUs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace antialiased resizing; do all else."""
        kwargs = kwargs or {}
        if func is F.interpolate and kwargs.get("antialias"):
            return resampled(args[0], kwargs["size"], kwargs["mode"])
        return func(*args, **kwargs)
