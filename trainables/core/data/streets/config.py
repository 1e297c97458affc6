"""Classes and settings of the streets benchmark."""

from dataclasses import dataclass
from typing import Literal

from segadapt.trainables.core.data.batch import ClassList

CLASSES = ClassList(
    names=(
        "road",
        "sidewalk",
        "building",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
        "sky",
        "person",
        "car",
        "bicycle",
    ),
    colors=(
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (153, 153, 153),
        (250, 170, 30),
        (220, 220, 0),
        (107, 142, 35),
        (70, 130, 180),
        (220, 20, 60),
        (0, 0, 142),
        (119, 11, 32),
    ),
)
"""Eleven Cityscapes classes in the order of their train ids, with the Cityscapes colours."""

ROAD, SIDEWALK, BUILDING, POLE, LIGHT, SIGN, VEGETATION, SKY, PERSON, CAR, BICYCLE = range(len(CLASSES))

_SIZES = {"height": {1: 64, 2: 128}, "width": {1: 128, 2: 256}, "val_images": {1: 60, 2: 400}}
"""What is filled in for each edition where nothing is given."""

PARTS = ("geometry", "rendering", "content", "weather")
"""The parts of the second edition's shift, each a setting."""


@dataclass(frozen=True, kw_only=True)
class StreetsConfig:
    """Edition, size, amount, seed and difficulty of the generated benchmark."""

    edition: Literal[1, 2] = 1
    """1: streets_v1, eight classes, mostly a shift of colour. 2: streets_v2, eleven, a shift no colour map removes."""
    height: int | None = None
    """Image height in pixels; a multiple of 8, at least 32. Null: 64, in edition 2 128."""
    width: int | None = None
    """Image width in pixels; a multiple of 8, at least 32. Null: 128, in edition 2 256."""
    train_images: int = 160
    """Training images per domain."""
    val_images: int | None = None
    """Validation images per domain. Null: 60, in edition 2 400."""
    seed: int = 0
    """Seed of all scenes; not negative."""
    shift: float = 1.0
    """Distance of the target from the source: 0 = same statistics, 1 = default, at most 2."""
    geometry: float = 1.0
    """Strength of camera and street plan in the shift, times `shift`; 0 = as in the source. Edition 2 alone."""
    rendering: float = 1.0
    """Strength of textures, shadows, wet roads, blur, noise and JPEG, times `shift`. Edition 2 alone."""
    content: float = 1.0
    """Strength of class balance, unseen variants and clutter, times `shift`. Edition 2 alone."""
    weather: float = 1.0
    """Strength of fog, low sun, dusk and clouds, times `shift`. Edition 2 alone."""

    def __post_init__(self) -> None:
        for name, of_editions in _SIZES.items():
            if getattr(self, name) is None:  # what was chosen is what configurations show and records keep
                object.__setattr__(self, name, of_editions[self.edition])
        problems = [
            f"{name} must be a multiple of 8 and at least 32, but got {size}; use {max(32, round(size / 8) * 8)}"
            for name, size in (("height", self.height), ("width", self.width))
            if size is not None and (size % 8 or size < 32)
        ]
        problems += [
            f"{name} must be at least {least}, but got {value}; raise it to {least} or more"
            for name, value, least in (
                ("train_images", self.train_images, 1),
                ("val_images", self.val_images, 1),
                ("seed", self.seed, 0),
            )
            if value is not None and value < least
        ]
        if not 0 <= self.shift <= 2:
            problems.append(f"shift must lie in [0, 2], but got {self.shift}; 1 is the default benchmark")
        for part in PARTS:
            strength = getattr(self, part)
            if not 0 <= strength * self.shift <= 2:
                problems.append(f"{part} times shift must lie in [0, 2], but got {strength} times {self.shift}")
            if self.edition == 1 and strength != 1:
                problems.append(f"{part} must stay 1 in edition 1, which has shift alone, but got {strength}")
        if problems:
            raise ValueError(f"StreetsConfig: {'. '.join(problems)}.")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        assert self.height is not None
        assert self.width is not None
        return self.height, self.width

    def count(self, split: str) -> int:
        """Return how many images `train` or `val` has in each domain."""
        count = self.train_images if split == "train" else self.val_images
        assert count is not None
        return count

    def strength(self, part: str) -> float:
        """Return the target's strength of a part of the shift."""
        return float(self.shift * getattr(self, part))
