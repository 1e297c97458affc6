"""Strong augmentation of whole batches on their device: colour jitter and blur that a label must survive."""

# B images of H x W pixels.

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_SIGMA = 0.15
"""Least deviation of a blur, in pixels."""


@dataclass(frozen=True)
class Change:
    """How the colours of an image are changed, and how it is blurred."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    """In turns of the colour circle."""
    sigma: float
    """In pixels."""


def draw_change(generator: torch.Generator, *, jitter: float, hue: float, blur: float) -> Change:
    """Draw a change; the generator is always advanced by the same number of draws.

    Args:
        generator: On the CPU.
        jitter: Brightness, contrast and saturation are each multiplied by U(1 - jitter, 1 + jitter). Paper: 0.2.
        hue: Hue is shifted by U(-hue, hue) turns. Paper: 0.2.
        blur: Sigma is U(0.15, blur) pixels. Paper: 1.15.

    Source:
        Tranheden et al., DACS, WACV 2021; lhoyer/MIC@2f932a9, mmseg/models/utils/dacs_transforms.py.
    """
    brightness, contrast, saturation, turn, width = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    return Change(
        brightness=1 + jitter * (2 * brightness - 1),
        contrast=1 + jitter * (2 * contrast - 1),
        saturation=1 + jitter * (2 * saturation - 1),
        hue=hue * (2 * turn - 1),
        sigma=LEAST_SIGMA + (blur - LEAST_SIGMA) * width,
    )


def jittered(images: Tensor, changes: Sequence[Change | None]) -> Tensor:
    """Return images with other brightness, contrast, saturation and hue, in this order.

    Args:
        images: RGB in [0, 1], (B, 3, H, W).
        changes: One for each image; None leaves it as it is.
    """
    import torchvision.transforms.v2.functional as tvf  # costs seconds to import; not every trial augments

    result = images.clone()
    for image, change in zip(result, changes, strict=True):
        if change is None:
            continue
        changed = tvf.adjust_brightness(image.clamp(0, 1), change.brightness)
        changed = tvf.adjust_contrast(changed, change.contrast)
        changed = tvf.adjust_saturation(changed, change.saturation)
        image.copy_(_turned(changed, change.hue))
    return result


def _turned(image: Tensor, hue: float) -> Tensor:
    """Return an image, RGB in [0, 1], (3, H, W), with its hue shifted, in turns.

    torchvision's `adjust_hue` would send a table to the device for each image.
    """
    value, least = image.amax(0), image.amin(0)
    chroma = value - least
    red, green, blue = image / chroma.clamp(min=torch.finfo(image.dtype).tiny)
    brightest = image == value
    sixths = torch.where(brightest[0], green - blue, torch.where(brightest[1], blue - red + 2, red - green + 4))
    sixths = torch.where(chroma > 0, sixths, 0.0) + 6 * hue
    phases = torch.stack([(offset + sixths) % 6 for offset in (5, 3, 1)])
    return value - chroma * torch.minimum(phases, 4 - phases).clamp(0, 1)


def blurred(images: Tensor, changes: Sequence[Change | None]) -> Tensor:
    """Return images blurred by a separable Gaussian kernel of 4 sigma on each side, mirrored at the border.

    The released code takes kernels of a tenth of the image; the weights beyond 4 sigma sum to less than 1e-4.

    Args:
        images: Of any range, (B, 3, H, W).
        changes: One for each image; None leaves it as it is.
    """
    result = images.clone()
    for image, change in zip(result, changes, strict=True):
        if change is not None:
            image.copy_(_smoothed(_smoothed(image, change.sigma), change.sigma, rows=True))
    return result


def _smoothed(image: Tensor, sigma: float, *, rows: bool = False) -> Tensor:
    """Blur an image, (3, H, W), over its columns, or over its rows."""
    along = image.transpose(-1, -2) if rows else image
    reach = min(math.ceil(4 * sigma), along.shape[-1] - 1)
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-reach, reach + 1)]
    padded = F.pad(along, (reach, reach), mode="reflect")
    total = sum(weights)
    smoothed = cast(Tensor, sum(w / total * part for w, part in zip(weights, _shifted(padded, reach), strict=True)))
    return smoothed.transpose(-1, -2) if rows else smoothed


def _shifted(padded: Tensor, reach: int) -> list[Tensor]:
    width = padded.shape[-1] - 2 * reach
    return [padded[..., start : start + width] for start in range(2 * reach + 1)]
