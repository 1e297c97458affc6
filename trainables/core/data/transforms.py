"""Augmentations of one sample, drawn from the sample's own generator."""

from dataclasses import dataclass

import torch
from torch import Tensor

from segadapt.trainables.core.validation import check


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """How training images are varied. Which domain and stage receives what is the method's choice."""

    jitter: float = 0.5
    """Brightness, contrast and saturation are each multiplied by U(1 - jitter, 1 + jitter). Paper (SDCA): 0.5."""
    hue: float = 0.2
    """Hue is shifted by U(-hue, hue) turns. Paper (SDCA): 0.2."""
    grey: float = 0.2
    """Probability of a grey image. Paper (SDCA): 0.2."""
    blur: float = 2.0
    """Gaussian blur 3x3 with sigma U(0.1, blur) pixels; 0 turns it off. Paper (SDCA): 2."""
    flip: float = 0.5
    """Probability of a horizontal flip, in stages that flip. Paper (SDCA, self-training): 0.5."""

    def __post_init__(self) -> None:
        check(0 <= self.jitter <= 1, "augmentation.jitter must lie in [0, 1]", self.jitter)
        check(0 <= self.hue <= 0.5, "augmentation.hue must lie in [0, 0.5]", self.hue)
        check(0 <= self.grey <= 1, "augmentation.grey must lie in [0, 1]", self.grey)
        check(self.blur == 0 or self.blur > 0.1, "augmentation.blur must be 0 or above 0.1", self.blur)
        check(0 <= self.flip <= 1, "augmentation.flip must lie in [0, 1]", self.flip)


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def vary_color(image: Tensor, config: AugmentationConfig, generator: torch.Generator) -> Tensor:
    """Jitter, grey and blur an image (SDCA §8.2).

    Args:
        image: (3, H, W) uint8.
        config: Strengths and probabilities.
        generator: The sample's own; always advanced by the same number of draws.

    Returns:
        (3, H, W) uint8.
    """
    import torchvision.transforms.v2.functional as tvf  # costs seconds to import; not every trial augments

    low, high = 1 - config.jitter, 1 + config.jitter
    brightness, contrast, saturation = (_uniform(low, high, generator) for _ in range(3))
    hue = _uniform(-config.hue, config.hue, generator)
    grey = _uniform(0, 1, generator) < config.grey
    sigma = _uniform(0.1, max(config.blur, 0.1), generator)
    if config.jitter > 0:
        image = tvf.adjust_brightness(image, brightness)
        image = tvf.adjust_contrast(image, contrast)
        image = tvf.adjust_saturation(image, saturation)
    if config.hue > 0:
        image = tvf.adjust_hue(image, hue)
    if grey:
        image = tvf.rgb_to_grayscale(image, num_output_channels=3)
    if config.blur > 0:
        image = tvf.gaussian_blur(image, kernel_size=[3, 3], sigma=[sigma, sigma])
    return image


def flips(config: AugmentationConfig, generator: torch.Generator) -> bool:
    """Draw whether the sample is flipped."""
    return _uniform(0, 1, generator) < config.flip
