"""Classes and settings of the streets benchmark."""

from dataclasses import dataclass

from segadapt.trainables.core.data.batch import ClassList

CLASSES = ClassList(
    names=("road", "sidewalk", "building", "pole", "vegetation", "sky", "person", "car"),
    colors=(
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (153, 153, 153),
        (107, 142, 35),
        (70, 130, 180),
        (220, 20, 60),
        (0, 0, 142),
    ),
)
"""Eight Cityscapes classes in the order of their train ids, with the Cityscapes colours."""

ROAD, SIDEWALK, BUILDING, POLE, VEGETATION, SKY, PERSON, CAR = range(len(CLASSES))


@dataclass(frozen=True, kw_only=True)
class StreetsConfig:
    """Size, amount, seed and difficulty of the generated benchmark."""

    height: int = 64
    """Image height in pixels; a multiple of 8, at least 32."""
    width: int = 128
    """Image width in pixels; a multiple of 8, at least 32."""
    train_images: int = 160
    """Training images per domain."""
    val_images: int = 60
    """Validation images per domain."""
    seed: int = 0
    """Seed of all scenes; not negative."""
    shift: float = 1.0
    """Distance of the target's look and layout from the source's: 0 = same statistics, 1 = default, at most 2."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be a multiple of 8 and at least 32, but got {size}; use {max(32, round(size / 8) * 8)}"
            for name, size in (("height", self.height), ("width", self.width))
            if size % 8 or size < 32
        ]
        problems += [
            f"{name} must be at least {least}, but got {value}; raise it to {least} or more"
            for name, value, least in (
                ("train_images", self.train_images, 1),
                ("val_images", self.val_images, 1),
                ("seed", self.seed, 0),
            )
            if value < least
        ]
        if not 0 <= self.shift <= 2:
            problems.append(f"shift must lie in [0, 2], but got {self.shift}; 1 is the default benchmark")
        if problems:
            raise ValueError(f"StreetsConfig: {'. '.join(problems)}.")
