"""How training images are drawn, resized, cropped and varied in colour; each sample has generators of its own.

An image of H x W pixels is resized and cut in one go (`Geometry`), its label likewise, whatever size the label has:
pseudo labels may be smaller than their image. Labels take the nearest pixel's class, as PIL does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.validation import check

Domain = Literal["source", "target"]
Size = tuple[int, int]
"""Height and width in pixels."""

PAD_COLOR = (124, 116, 104)
"""RGB of padding: ImageNet's mean, about 0 once an image is normalised, by either of the two normalisations."""

_NOT_IN_EVERY_STAGE = ("target_size", "jitter", "jitter_chance", "hue", "grey", "blur", "blur_chance", "flip")


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """How training images are drawn and varied. Which domain and stage gets colour and flips is the method's choice.

    Everything from `source_size` to `class_balanced` acts in every stage, the shared warm-up included, and is off by
    default: images are then taken as they are. Images of one batch must leave with one size.
    """

    source_size: Size | None = None
    """[height, width] source images are resized to, in training, statistics and evaluation; null: as they are.

    Packed shards set it to the size they were packed at. Paper (SDCA): [720, 1280] for GTA5, [760, 1280] for SYNTHIA.
    """
    target_size: Size | None = None
    """[height, width] of target images and their pseudo labels; null: as they are.

    Packed shards set it to the size they were packed at. Paper: SDCA, CLST [512, 1024]; PLCA, BiCL [730, 1460].
    """
    shorter_side: Size | None = None
    """[low, high]: resized in training so that the shorter side is a uniform integer from here, in place of `*_size`.

    Paper: PLCA [760, 988], BiCL [850, 850], CLST [512, 512].
    """
    scale: tuple[float, float] | None = None
    """[low, high]: the size in training is multiplied by U(low, high).

    Paper: CLST [0.75, 2], BiCL [0.8, 1.2], DRSL [0.5, 1.5]; SDCA's self-training [0.5, 1.5] of 2048x1024.
    """
    scale_step: float | None = None
    """Only scales `low + k * scale_step` are drawn; null: any. Paper: BiCL 0.2, DRSL (CRST) 0.1."""
    crop: Size | None = None
    """[height, width] cut out in training at a random place; null: whole images.

    Paper: PLCA, BiCL [730, 730]; CLST, DRSL, SDCA's self-training [512, 1024].
    """
    undersized: Literal["pad", "enlarge"] = "pad"
    """Images smaller than the crop get a margin, ignored in labels, or are enlarged to cover it.

    Paper: CLST pad, BiCL enlarge.
    """
    domains: tuple[Domain, ...] = ("source", "target")
    """Domains that `shorter_side`, `scale` and `crop` act on. Paper (SDCA, self-training): target."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How images are resized, antialiased. Paper: PLCA bilinear; SDCA, BiCL bicubic."""
    rare_crop: float = 0.0
    """Probability that a crop is placed around a rare class, if the (pseudo) label shows one. Paper (DRSL): 0.8."""
    rare_classes: int = 3
    """Number of classes with the fewest labelled pixels that count as rare. Paper (DRSL): 3."""
    class_balanced: bool = False
    """Whether source images are drawn by class, rare ones more often than they occur. Paper (SDCA): true."""
    jitter: float = 0.5
    """Brightness, contrast and saturation are each multiplied by U(1 - jitter, 1 + jitter). Paper (SDCA): 0.5."""
    hue: float = 0.2
    """Hue is shifted by U(-hue, hue) turns. Paper (SDCA): 0.2."""
    jitter_chance: float = 1.0
    """Probability of `jitter` and `hue`. Paper: SDCA 1, CLST 0.8."""
    grey: float = 0.2
    """Probability of a grey image. Paper (SDCA): 0.2."""
    blur: float = 2.0
    """Gaussian blur 3x3 with sigma U(0.1, blur) pixels; 0 turns it off. Paper (SDCA): 2."""
    blur_chance: float = 1.0
    """Probability of `blur`. Paper: SDCA 1, CLST 0.5."""
    flip: float = 0.5
    """Probability of a horizontal flip, in stages that flip. Paper (SDCA, self-training): 0.5."""

    def __post_init__(self) -> None:
        for name in ("source_size", "target_size", "crop"):
            size = getattr(self, name)
            check(size is None or min(size) >= 1, f"augmentation.{name} must be [height, width] in pixels", size)
        for name in ("shorter_side", "scale"):
            limits = getattr(self, name)
            check(
                limits is None or 0 < limits[0] <= limits[1],
                f"augmentation.{name} must be [low, high] with 0 < low <= high",
                limits,
            )
        check(
            self.scale_step is None or (self.scale is not None and self.scale_step > 0),
            "augmentation.scale_step must be positive and comes with augmentation.scale",
            self.scale_step,
        )
        for name in ("jitter_chance", "grey", "blur_chance", "flip", "rare_crop"):
            check(0 <= getattr(self, name) <= 1, f"augmentation.{name} must lie in [0, 1]", getattr(self, name))
        check(
            self.rare_crop == 0 or self.crop is not None,
            "augmentation.rare_crop needs augmentation.crop=[height, width]",
            self.rare_crop,
        )
        check(self.rare_classes >= 1, "augmentation.rare_classes must be at least 1", self.rare_classes)
        check(0 <= self.jitter <= 1, "augmentation.jitter must lie in [0, 1]", self.jitter)
        check(0 <= self.hue <= 0.5, "augmentation.hue must lie in [0, 0.5]", self.hue)
        check(self.blur == 0 or self.blur > 0.1, "augmentation.blur must be 0 or above 0.1", self.blur)

    def size(self, domain: Domain) -> Size | None:
        """Return what images of a domain are resized to, before `scale` in training; None leaves them as they are."""
        return self.source_size if domain == "source" else self.target_size

    def in_every_stage(self) -> dict[str, Any]:
        """Return the settings that also act on the source-only warm-up, where they differ from the defaults."""
        names = [field.name for field in fields(self) if field.name not in _NOT_IN_EVERY_STAGE]
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(type(self), name)}


@dataclass(frozen=True)
class Geometry:
    """Where the pixels of a training image go: resized to `size`, then cut, then padded at the right and the bottom."""

    size: Size
    top: int = 0
    left: int = 0
    crop: Size | None = None
    interpolation: str = "bilinear"

    def cut_image(self, image: Tensor) -> Tensor:
        """Resize and cut an image, (3, H, W) uint8, without padding."""
        return self._cut(resized(image, self.size, self.interpolation))

    def cut_label(self, label: Tensor) -> Tensor:
        """Resize and cut a label of the whole image, (H', W') uint8, without padding."""
        return self._cut(resized_label(label, self.size))

    def pad_image(self, image: Tensor) -> Tensor:
        """Bring a cut image to the size of the crop."""
        height, width = self._size_of(image)
        if (height, width) == image.shape[-2:]:
            return image
        padded = torch.tensor(PAD_COLOR, dtype=image.dtype).view(3, 1, 1).repeat(1, height, width)
        padded[:, : image.shape[-2], : image.shape[-1]] = image
        return padded

    def pad_label(self, label: Tensor) -> Tensor:
        """Bring a cut label to the size of the crop; the margin is ignored."""
        size = self._size_of(label)
        if size == label.shape:
            return label
        padded = torch.full(size, IGNORE_INDEX, dtype=label.dtype)
        padded[: label.shape[0], : label.shape[1]] = label
        return padded

    def _cut(self, picture: Tensor) -> Tensor:
        if self.crop is None:
            return picture
        return picture[..., self.top : self.top + self.crop[0], self.left : self.left + self.crop[1]]

    def _size_of(self, picture: Tensor) -> Size:
        return self.crop or (picture.shape[-2], picture.shape[-1])


def resized(images: Tensor, size: Size | None, interpolation: str = "bilinear") -> Tensor:
    """Return images, (..., 3, H, W) uint8, antialiased at `size`; None leaves them as they are."""
    if size is None or size == images.shape[-2:]:
        return images
    import torchvision.transforms.v2.functional as tvf  # costs seconds to import; not every trial resizes
    from torchvision.transforms import InterpolationMode

    result: Tensor = tvf.resize_image(images, list(size), InterpolationMode(interpolation), antialias=True)
    return result


def resized_label(label: Tensor, size: Size) -> Tensor:
    """Return a label, (H, W) uint8, at `size`: the class of the nearest pixel.

    Pixel centres decide, as in PIL; torchvision's kernel for masks takes the upper left neighbour and is off by up to
    half a pixel against the image.
    """
    if size == label.shape:
        return label
    return torch.nn.functional.interpolate(label[None, None], size, mode="nearest-exact")[0, 0]


def resized_for_network(images: Tensor, config: AugmentationConfig, domain: Domain) -> Tensor:
    """Return un-augmented images, (..., 3, H, W) uint8, at the size the network sees outside training."""
    return resized(images, config.size(domain), config.interpolation)


def draw_geometry(
    shape: Size,
    config: AugmentationConfig,
    domain: Domain,
    generator: torch.Generator,
    *,
    label: Tensor | None = None,
    rare: Sequence[int] = (),
) -> Geometry:
    """Draw how a training image is resized and cut.

    Args:
        shape: Height and width of the image.
        config: What is drawn from.
        domain: Domain of the image.
        generator: Generator of the sample; always advanced by the same number of draws.
        label: Label of the whole image, (H', W') uint8 of any size, where there is one.
        rare: Classes a crop may be placed around, all of them in the label.

    Source:
        The rare-class crop: Zou et al., Confidence Regularized Self-Training, ICCV 2019 (DRSL §6).
        Differs: the pixel is drawn uniformly from its class and lies anywhere in the crop.
    """
    draws = torch.rand(9, generator=generator, dtype=torch.float64).tolist()
    varied = domain in config.domains
    size = config.size(domain) or shape
    if varied:
        size = _drawn_size(shape, size, config, draws[0], draws[1])
    if config.crop is None or not varied:
        return Geometry(size, interpolation=config.interpolation)
    if config.undersized == "enlarge":
        size = _covering(size, config.crop)
    free = [max(full - part, 0) for full, part in zip(size, config.crop, strict=True)]
    places = [_integer(0, room, draw) for room, draw in zip(free, draws[2:4], strict=True)]
    if label is not None and rare and draws[4] < config.rare_crop:
        pixels = (label == rare[_integer(0, len(rare) - 1, draws[5])]).nonzero()
        for axis, inside in enumerate(draws[7:9] if len(pixels) else []):
            pixel = int(pixels[_integer(0, len(pixels) - 1, draws[6]), axis])
            pixel = int((pixel + 0.5) * size[axis] / label.shape[axis])
            places[axis] = min(max(pixel - _integer(0, config.crop[axis] - 1, inside), 0), free[axis])
    return Geometry(size, places[0], places[1], config.crop, config.interpolation)


def _drawn_size(shape: Size, size: Size, config: AugmentationConfig, side: float, scale: float) -> Size:
    """Return the size before cutting of an image of `shape`, from two numbers in [0, 1)."""
    if config.shorter_side is not None:
        factor = _integer(*config.shorter_side, side) / min(shape)
        size = round(shape[0] * factor), round(shape[1] * factor)
    if config.scale is not None:
        factor = _drawn_scale(config.scale, config.scale_step, scale)
        size = max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
    return size


def _drawn_scale(limits: tuple[float, float], step: float | None, draw: float) -> float:
    low, high = limits
    if step is None:
        return low + (high - low) * draw
    return low + step * _integer(0, math.floor((high - low) / step + 1e-6), draw)


def _covering(size: Size, crop: Size) -> Size:
    """Return `size`, enlarged in proportion until it covers `crop`."""
    factor = max(1.0, *(part / full for full, part in zip(size, crop, strict=True)))
    return max(crop[0], round(size[0] * factor)), max(crop[1], round(size[1] * factor))


def _integer(low: int, high: int, draw: float) -> int:
    """Map a number in [0, 1) to the integers from `low` to `high`."""
    return low + int(draw * (high - low + 1))


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _happens(chance: float, generator: torch.Generator) -> bool:
    """Return whether an event of this chance happens; a certain one takes no random number."""
    return chance >= 1 or _uniform(0, 1, generator) < chance


def vary_color(image: Tensor, config: AugmentationConfig, generator: torch.Generator) -> Tensor:
    """Jitter, grey and blur an image (SDCA §8.2).

    Args:
        image: (3, H, W) uint8.
        config: Strengths and probabilities.
        generator: Generator of the sample; always advanced by the same number of draws.

    Returns:
        (3, H, W) uint8.
    """
    import torchvision.transforms.v2.functional as tvf  # costs seconds to import; not every trial augments

    low, high = 1 - config.jitter, 1 + config.jitter
    brightness, contrast, saturation = (_uniform(low, high, generator) for _ in range(3))
    hue = _uniform(-config.hue, config.hue, generator)
    grey = _uniform(0, 1, generator) < config.grey
    sigma = _uniform(0.1, max(config.blur, 0.1), generator)
    jittered, blurred = _happens(config.jitter_chance, generator), _happens(config.blur_chance, generator)
    if jittered and config.jitter > 0:
        image = tvf.adjust_brightness(image, brightness)
        image = tvf.adjust_contrast(image, contrast)
        image = tvf.adjust_saturation(image, saturation)
    if jittered and config.hue > 0:
        image = tvf.adjust_hue(image, hue)
    if grey:
        image = tvf.rgb_to_grayscale(image, num_output_channels=3)
    if blurred and config.blur > 0:
        height, width = image.shape[-2:]
        kernel = [min(3, 2 * side - 1) for side in (width, height)]  # one pixel has no neighbour to blur with
        image = tvf.gaussian_blur(image, kernel_size=kernel, sigma=[sigma, sigma])
    return image


def flips(config: AugmentationConfig, generator: torch.Generator) -> bool:
    """Draw whether the sample is flipped."""
    return _uniform(0, 1, generator) < config.flip
