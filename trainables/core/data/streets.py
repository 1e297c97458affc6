"""Streets: the embedded benchmark, a procedural generator of driving scenes in two looks.

The source domain is a clean, sunny render. The target domain has another palette, weather, camera and street plan:
haze, blur, sensor noise, narrower roads, taller houses, more people. `StreetsConfig.shift` scales the distance between
the two. An image depends on the seed, its domain, split and index, the size and the shift, and on nothing else.

Lengths in the scene are metres; x points right from the camera's axis and z along the street. H x W is the image.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from segadapt.trainables.core.data.batch import ClassList, DomainData, EvaluationData

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

_ROAD, _SIDEWALK, _BUILDING, _POLE, _VEGETATION, _SKY, _PERSON, _CAR = range(len(CLASSES))

_Floats = NDArray[np.float32]
_Bytes = NDArray[np.uint8]
_Palette = Mapping[str, _Floats]


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


@dataclass(eq=False)
class StreetsImages:
    """Labelled street scenes."""

    ids: Sequence[str]
    images: _Bytes  # (N, 3, H, W)
    labels: _Bytes  # (N, H, W)

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> Tensor:
        """Return an RGB image, (3, H, W) uint8."""
        return torch.tensor(self.images[index])

    def label(self, index: int) -> Tensor:
        """Return its class indices, (H, W) uint8; every pixel has a class."""
        return torch.tensor(self.labels[index])


@dataclass(eq=False)
class StreetsTargetImages:
    """Street scenes whose labels were dropped when they were generated."""

    ids: Sequence[str]
    images: _Bytes  # (N, 3, H, W)

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> Tensor:
        """Return an RGB image, (3, H, W) uint8."""
        return torch.tensor(self.images[index])


def load_streets(config: StreetsConfig, *, oracle: bool = False) -> tuple[DomainData, EvaluationData]:
    """Generate the benchmark, or return it at once if this process has generated it before.

    Args:
        config: Size, amount, seed and shift.
        oracle: Put the *labelled target training set* in the place of the source. A model trained on it without
            adaptation is the upper bound that adaptation is compared with; it is no adaptation result.

    Returns:
        What training may use and what evaluation alone may use.
    """
    return _load(config, oracle)


@lru_cache(maxsize=4)
def _load(config: StreetsConfig, oracle: bool) -> tuple[DomainData, EvaluationData]:
    source_train = _generate(config, "source", "train")
    source_val = _generate(config, "source", "val")
    target_train = _generate(config, "target", "train")
    target_val = _generate(config, "target", "val")

    content = hashlib.sha256(f"streets oracle={oracle} {CLASSES.names}".encode())
    for part in (source_train, source_val, target_train, target_val):
        content.update(f"{part.ids} {part.images.shape}".encode())
        content.update(part.images.tobytes())
        content.update(part.labels.tobytes())

    training = DomainData(
        source=target_train if oracle else source_train,
        target=StreetsTargetImages(target_train.ids, target_train.images),
        classes=CLASSES,
        fingerprint=content.hexdigest(),
    )
    return training, EvaluationData(source=source_val, target=target_val, classes=CLASSES)


def _generate(config: StreetsConfig, domain: str, split: str) -> StreetsImages:
    """Draw all scenes of one domain and split, each from its own random stream."""
    shift = config.shift if domain == "target" else 0.0
    layout = _blend(_SOURCE_LAYOUT, _TARGET_LAYOUT, shift)
    optics = _blend(_SOURCE_OPTICS, _TARGET_OPTICS, shift)
    palette = _blend_palettes(shift)

    count = config.train_images if split == "train" else config.val_images
    images = np.empty((count, 3, config.height, config.width), np.uint8)
    labels = np.empty((count, config.height, config.width), np.uint8)
    for index in range(count):
        rng = np.random.default_rng([config.seed, domain == "target", split == "val", index])
        scene = _paint_street(rng, layout, palette, config.height, config.width)
        images[index] = _photograph(rng, scene, optics, palette)
        labels[index] = scene.labels
    images.flags.writeable = labels.flags.writeable = False
    return StreetsImages(tuple(f"streets_{domain}_{split}_{index:06d}" for index in range(count)), images, labels)


# --- The two domains -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Statistics of the street plan: lengths in metres, and mean counts per scene."""

    camera_height: float
    horizon: float  # share of the image height above it
    road_half_width: float
    sidewalk_width: float
    storeys: float  # mean number above the ground floor
    built_share: float  # of the street side; hedges take the rest
    trees: float
    poles: float
    persons: float
    crossing_share: float  # of the persons, on the road
    parked_cars: float
    driving_cars: float
    shade: float  # light that the side of the street away from the sun lacks


@dataclass(frozen=True, kw_only=True)
class _Optics:
    """Light, air and camera."""

    gain: float  # exposure
    gain_spread: float  # of the exposure between images
    contrast: float
    saturation: float
    haze: float  # per metre
    texture: float
    vignette: float
    blur: float  # standard deviation in pixels at 64 pixels of height
    noise: float  # standard deviation


_SOURCE_LAYOUT = _Layout(
    camera_height=2.2,
    horizon=0.42,
    road_half_width=4.6,
    sidewalk_width=3.0,
    storeys=2.2,
    built_share=0.75,
    trees=3.0,
    poles=3.5,
    persons=4.0,
    crossing_share=0.15,
    parked_cars=2.0,
    driving_cars=1.6,
    shade=0.2,
)
_TARGET_LAYOUT = _Layout(
    camera_height=1.9,
    horizon=0.47,
    road_half_width=4.0,
    sidewalk_width=2.4,
    storeys=3.0,
    built_share=0.6,
    trees=3.8,
    poles=5.0,
    persons=5.0,
    crossing_share=0.3,
    parked_cars=3.2,
    driving_cars=1.2,
    shade=0.1,
)

_SOURCE_OPTICS = _Optics(
    gain=1.0,
    gain_spread=0.08,
    contrast=1.0,
    saturation=1.0,
    haze=0.001,
    texture=1.0,
    vignette=0.0,
    blur=0.0,
    noise=0.01,
)
_TARGET_OPTICS = _Optics(
    gain=0.74,
    gain_spread=0.10,
    contrast=0.9,
    saturation=0.5,
    haze=0.008,
    texture=0.8,
    vignette=0.2,
    blur=0.4,
    noise=0.02,
)


def _colours(*hexadecimal: str) -> _Floats:
    """Return colours, (K, 3, 1, 1) in [0, 1]."""
    values = [[int(text[i : i + 2], 16) / 255 for i in (0, 2, 4)] for text in hexadecimal]
    return np.array(values, np.float32)[:, :, None, None]


# A material has the same number of colours in both domains, so that the shift can move each of them.
_SOURCE_PALETTE = {
    "sky": _colours("4f8fdc", "6aa5e6"),
    "horizon": _colours("c4e0f8", "d9e8f2"),
    "asphalt": _colours("55565c", "626166", "4b4c50"),
    "paint": _colours("f2f2ea"),
    "paving": _colours("b3a99c", "a89f98", "bdb3a2"),
    "kerb": _colours("d4cfc6"),
    "wall": _colours("b5654a", "d2b48a", "a3492f", "c9a27c", "8f6a55"),
    "shop": _colours("6b4a3c", "584d46"),
    "glass": _colours("5a7890", "7090a4"),
    "leaf": _colours("3f8a2e", "5a9a35", "2f7430"),
    "trunk": _colours("6a4a30"),
    "metal": _colours("1c1f24", "2c3036"),
    "lamp": _colours("f6eebc"),
    "signal": _colours("f23328", "33d866"),
    "skin": _colours("e0b08c", "a8714c"),
    "shirt": _colours("d8402e", "e8c02c", "3468c8", "e8e4de", "8a3aa0"),
    "trousers": _colours("24304e", "3a3430"),
    "car": _colours("c81e24", "1f4fb4", "e8e8ea", "2a2c30", "d8a018"),
    "tyre": _colours("141416"),
    "tail_light": _colours("ff3020"),
    "haze": _colours("dce6ee"),
    "light": _colours("ffffff"),
}
_TARGET_PALETTE = {
    "sky": _colours("8cb4e0", "a4c0e0"),
    "horizon": _colours("dce6f0", "e0e4e8"),
    "asphalt": _colours("5c5c60", "68676a", "525255"),
    "paint": _colours("ebeae1"),
    "paving": _colours("aca399", "a19a95", "b6ad9f"),
    "kerb": _colours("c7c2bb"),
    "wall": _colours("a17561", "bdab8f", "8e5a48", "b19a84", "7f6b61"),
    "shop": _colours("62493e", "595049"),
    "glass": _colours("5b7386", "738c9c"),
    "leaf": _colours("40852f", "5a9535", "307031"),
    "trunk": _colours("614732"),
    "metal": _colours("1c1f24", "2c3036"),
    "lamp": _colours("f0e8ba"),
    "signal": _colours("e8382d", "3ace6a"),
    "skin": _colours("daab8a", "a26e4d"),
    "shirt": _colours("c63f30", "dab633", "3662b6", "dbd7d2", "7f3b92"),
    "trousers": _colours("26304a", "393330"),
    "car": _colours("bc2227", "2550aa", "dededf", "2c2e32", "c2962a"),
    "tyre": _colours("161617"),
    "tail_light": _colours("f63323"),
    "haze": _colours("d7dfe5"),
    "light": _colours("fff7ea"),
}


def _blend_palettes(shift: float) -> _Palette:
    """Move each colour by `shift` times the way to the target's."""
    return {
        name: np.clip(colours + np.float32(shift) * (_TARGET_PALETTE[name] - colours), 0, 1)
        for name, colours in _SOURCE_PALETTE.items()
    }


_Statistics = TypeVar("_Statistics", _Layout, _Optics)


def _blend(source: _Statistics, target: _Statistics, shift: float) -> _Statistics:
    """Move each statistic by `shift` times the way to the target; beyond it, values stay positive."""
    pairs = {field.name: (getattr(source, field.name), getattr(target, field.name)) for field in fields(source)}
    return type(source)(
        **{name: max(start + shift * (end - start), 0.25 * min(start, end)) for name, (start, end) in pairs.items()}
    )


# --- The scene -------------------------------------------------------------------------------------------------------

_STREET_END = 75.0
_FOCAL_SHARE = 0.8  # focal length / image width


@dataclass(frozen=True)
class _Camera:
    """A pinhole camera that looks along the street."""

    centre: float  # column of the vanishing point
    horizon: float  # its row
    focal: float  # pixels
    height: float

    def project(self, x: float, z: float) -> tuple[float, float, float]:
        """Return the column and row of a point on the ground, and the pixels per metre there."""
        scale = self.focal / z
        return self.centre + x * scale, self.horizon + self.height * scale, scale


class _Scene:
    """A picture that is painted from far to near, with the class and distance of each pixel."""

    def __init__(self, height: int, width: int) -> None:
        self.rows = np.arange(height, dtype=np.float32)[:, None] + 0.5
        self.columns = np.arange(width, dtype=np.float32)[None, :] + 0.5
        self.colours = np.zeros((3, height, width), np.float32)
        self.labels = np.full((height, width), _SKY, np.uint8)
        self.distance = np.full((height, width), 150.0, np.float32)

    @property
    def pixel(self) -> float:
        """One pixel of a 64-pixel-high image: the smallest size of a detail."""
        return len(self.rows) / 64

    def surface(self, mask: NDArray[np.bool_], colours: _Floats, label: int, distance: _Floats) -> None:
        """Paint a mask of the whole picture; colours and distance broadcast against it."""
        np.copyto(self.colours, colours, where=mask)
        np.copyto(self.distance, distance, where=mask)
        np.copyto(self.labels, np.uint8(label), where=mask)

    def tint(self, mask: NDArray[np.bool_], colour: _Floats) -> None:
        """Change the colour of a mask of the whole picture."""
        np.copyto(self.colours, colour, where=mask)

    def darken(self, mask: NDArray[np.bool_], factor: float) -> None:
        """Multiply the colours of a mask of the whole picture."""
        np.multiply(self.colours, np.float32(factor), out=self.colours, where=mask)

    def box(self, left: float, right: float, top: float, bottom: float, colour: _Floats, label: int, z: float) -> None:
        """Paint a rectangle that faces the camera."""
        rows = slice(int(max(top + 0.5, 0)), int(max(bottom + 0.5, 0)))
        columns = slice(int(max(left + 0.5, 0)), int(max(right + 0.5, 0)))
        self.colours[:, rows, columns] = colour
        self.labels[rows, columns] = label
        self.distance[rows, columns] = z

    def ellipse(
        self, x: float, y: float, half_width: float, half_height: float, colour: _Floats, label: int, z: float
    ) -> None:
        """Paint an ellipse that faces the camera."""
        rows = slice(max(int(y - half_height), 0), max(int(y + half_height) + 1, 0))
        columns = slice(max(int(x - half_width), 0), max(int(x + half_width) + 1, 0))
        inside = ((self.rows[rows] - y) / half_height) ** 2 + ((self.columns[:, columns] - x) / half_width) ** 2 < 1
        np.copyto(self.colours[:, rows, columns], colour, where=inside)
        np.copyto(self.labels[rows, columns], np.uint8(label), where=inside)
        np.copyto(self.distance[rows, columns], np.float32(z), where=inside)


def _pick(rng: np.random.Generator, palette: _Palette, material: str, spread: float = 0.04) -> _Floats:
    """Draw a colour, (3, 1, 1), of a material, with a little variation in brightness."""
    colours = palette[material]
    colour: _Floats = colours[int(rng.random() * len(colours))]
    return colour * np.float32(1 + spread * rng.standard_normal())


def _paint_street(rng: np.random.Generator, layout: _Layout, palette: _Palette, height: int, width: int) -> _Scene:
    """Paint one scene: sky, ground, the two street sides, then everything on the street from far to near."""
    camera = _Camera(
        centre=width * (0.5 + rng.uniform(-0.14, 0.14)),
        horizon=height * (layout.horizon + rng.uniform(-0.06, 0.06)),
        focal=width * _FOCAL_SHARE,
        height=layout.camera_height * rng.uniform(0.9, 1.1),
    )
    offset = rng.uniform(-1.5, 1.5)  # of the road's axis from the camera
    road_half = layout.road_half_width * rng.uniform(0.85, 1.15)
    kerbs = (offset - road_half, offset + road_half)
    left_walk, right_walk = layout.sidewalk_width * rng.uniform(0.75, 1.3, 2)
    fronts = (kerbs[0] - float(left_walk), kerbs[1] + float(right_walk))

    scene = _Scene(height, width)
    _paint_sky(scene, rng, palette, camera)
    _paint_ground(scene, rng, palette, camera, kerbs)
    _paint_street_end(scene, rng, palette, camera)
    _paint_fronts(scene, rng, layout, palette, camera, fronts)

    def beside(side: int) -> float:
        return kerbs[side] + rng.uniform(0.15, 0.85) * (fronts[side] - kerbs[side])

    inwards = (1.0, -1.0)
    on_the_walk = layout.persons * (1 - layout.crossing_share)
    crossing = layout.persons * layout.crossing_share
    kinds: list[tuple[_Painter, float, tuple[float, float], Callable[[int], float]]] = [
        (_paint_tree, layout.trees, (9, 45), lambda side: fronts[side] + 0.8 * inwards[side]),
        (_paint_pole, layout.poles, (8, 18), lambda side: kerbs[side] - 0.5 * inwards[side]),
        (_paint_person, on_the_walk, (7, 13), beside),
        (_paint_person, crossing, (7.5, 13), lambda side: rng.uniform(*kerbs)),
        (_paint_car, layout.parked_cars, (9, 36), lambda side: kerbs[side] + 1.1 * inwards[side]),
        (_paint_car, layout.driving_cars, (9, 36), lambda side: offset - 0.45 * road_half * inwards[side]),
    ]
    objects: list[tuple[float, float, _Painter]] = []
    for painter, mean, (nearest, farthest), place in kinds:
        for _ in range(rng.poisson(mean)):
            side = int(rng.integers(2))
            # Uniform in the picture rather than on the street: z is drawn on a reciprocal scale.
            z = 1 / rng.uniform(1 / farthest, 1 / nearest)
            objects.append((z, place(side), painter))
    for z, x, painter in sorted(objects, key=lambda item: -item[0]):
        painter(scene, rng, palette, camera, x, z)
    return scene


def _paint_sky(scene: _Scene, rng: np.random.Generator, palette: _Palette, camera: _Camera) -> None:
    top, bottom = _pick(rng, palette, "sky"), _pick(rng, palette, "horizon")
    blend = np.clip(scene.rows / camera.horizon, 0, 1)
    scene.colours[:] = top + blend * (bottom - top)
    for _ in range(rng.integers(0, 4)):  # clouds: lighter patches
        x, y = rng.uniform(0, scene.columns.size), rng.uniform(0, 0.7) * camera.horizon
        reach = ((scene.columns - x) / (14 * scene.pixel)) ** 2 + ((scene.rows - y) / (3 * scene.pixel)) ** 2
        scene.colours += 0.6 * np.exp(-reach) * (bottom - scene.colours)


def _paint_ground(
    scene: _Scene, rng: np.random.Generator, palette: _Palette, camera: _Camera, kerbs: tuple[float, float]
) -> None:
    """Paint the road with its marks and, outside the kerbs, paved sidewalks."""
    below = np.maximum(scene.rows - camera.horizon, 0.25)
    z = camera.height * camera.focal / below  # (H, 1)
    x = (scene.columns - camera.centre) * (z / camera.focal)  # (H, W)
    ground = np.broadcast_to(scene.rows > camera.horizon, x.shape)
    distance = np.minimum(z, 150.0)
    road_half = (kerbs[1] - kerbs[0]) / 2
    across = x - (kerbs[0] + kerbs[1]) / 2  # from the road's axis

    scene.surface(ground, _pick(rng, palette, "paving"), _SIDEWALK, distance)
    tiles = ((z % 2.4) < 0.35) & (z < 22) | ((x % 1.5) < 0.12) & (z < 15)
    scene.darken(ground & tiles, 0.86)
    on_road = ground & (np.abs(across) < road_half)
    scene.surface(ground & (np.abs(across) < road_half + 0.25), _pick(rng, palette, "kerb"), _SIDEWALK, distance)
    scene.surface(on_road, _pick(rng, palette, "asphalt"), _ROAD, distance)
    wear = np.abs(np.abs(across) - road_half / 2) < 0.8
    scene.darken(on_road & wear, 0.94)

    dashes = ((z + rng.uniform(0, 8)) % 8 < 4) & (np.abs(across) < 0.16)
    edges = np.abs(np.abs(across) - road_half + 0.45) < 0.09
    marks = dashes | edges if rng.random() < 0.6 else dashes
    scene.tint(on_road & marks, _pick(rng, palette, "paint"))
    if rng.random() < 0.25:  # a zebra crossing
        start = rng.uniform(9, 22)
        zebra = (z > start) & (z < start + 3.5) & (across % 1.2 < 0.6)
        scene.tint(on_road & zebra, _pick(rng, palette, "paint"))


def _paint_street_end(scene: _Scene, rng: np.random.Generator, palette: _Palette, camera: _Camera) -> None:
    """Close the street with a far row of houses or trees."""
    _, ground, scale = camera.project(0, _STREET_END)
    built = rng.random() < 0.5
    columns = scene.columns.size
    steps = np.repeat(rng.uniform(5, 12, columns // 8 + 1), 8)[:columns] if built else rng.uniform(6, 9, columns)
    top = ground - scale * steps.astype(np.float32)[None, :]
    colour = _pick(rng, palette, "wall" if built else "leaf")
    mask = (scene.rows < ground) & (scene.rows > top)
    scene.surface(mask, colour, _BUILDING if built else _VEGETATION, np.float32(_STREET_END) * np.ones_like(top))


def _paint_fronts(
    scene: _Scene,
    rng: np.random.Generator,
    layout: _Layout,
    palette: _Palette,
    camera: _Camera,
    fronts: tuple[float, float],
) -> None:
    """Paint both sides of the street: walls along z at x = `fronts`, divided into houses and hedges."""
    side = (scene.columns[0] > camera.centre).astype(np.intp)  # (W,)
    scale = np.maximum((scene.columns - camera.centre) / np.array(fronts, np.float32)[side], 1e-3)  # pixels per metre
    z = camera.focal / scale  # (1, W)
    level = camera.height + (camera.horizon - scene.rows) / scale  # (H, W), height of the pixel above the ground

    plots = 10
    ends = np.cumsum(rng.uniform(6, 16, (2, plots)), axis=1)
    shown = np.minimum((z > ends[side].T).sum(axis=0), plots - 1) + plots * side  # (W,), the plot in each column
    built = rng.random(2 * plots) < layout.built_share
    house_tops = 3.6 + 3 * np.maximum(rng.poisson(layout.storeys, 2 * plots), 1)
    hedge_tops = camera.height + rng.uniform(0.4, 2.0, 2 * plots)
    light = np.where(np.arange(2 * plots) // plots == rng.integers(2), 1.0, 1 - layout.shade)
    walls = np.stack([_pick(rng, palette, "wall" if house else "leaf") for house in built]) * light[:, None, None, None]

    houses = built[shown]
    ragged = np.abs(0.5 * rng.standard_normal(len(shown)))
    top = np.where(houses, house_tops[shown], hedge_tops[shown] + ragged).astype(np.float32)
    visible = (z < _STREET_END) & (level > 0) & (level < top)
    colours = walls[shown, :, 0, 0].T.astype(np.float32)[:, None]  # (3, 1, W)
    scene.surface(visible & ~houses, colours, _VEGETATION, z)
    scene.surface(visible & houses, colours, _BUILDING, z)

    bay = (z + rng.uniform(0, 3)) % 3
    panes = (bay > 0.75) & (bay < 2.25) & (z < 48) & houses
    storey = (level - 3.4) % 3
    upstairs = (level > 3.4) & (storey > 0.75) & (storey < 2.4) & (level < top - 0.5)
    scene.tint(visible & houses & (level < 3.2), _pick(rng, palette, "shop"))
    scene.tint(visible & panes & (upstairs | (level > 0.7) & (level < 2.6)), _pick(rng, palette, "glass"))
    scene.darken(visible & houses & (level > top - 0.5), 0.75)  # the eaves


_Painter = Callable[[_Scene, np.random.Generator, _Palette, _Camera, float, float], None]


def _paint_tree(
    scene: _Scene, rng: np.random.Generator, palette: _Palette, camera: _Camera, x: float, z: float
) -> None:
    column, ground, scale = camera.project(x, z)
    size = rng.uniform(0.8, 1.2) * scale
    half_trunk = max(0.16 * size, 0.75 * scene.pixel)
    trunk = _pick(rng, palette, "trunk")
    scene.box(column - half_trunk, column + half_trunk, ground - 2.6 * size, ground, trunk, _VEGETATION, z)
    leaf = _pick(rng, palette, "leaf")
    crown = ground - 4.2 * size
    for shade, dx, dy, radius in (
        (0.75, 0.2, 0.5, 1.9),
        (0.9, -0.9, 0.1, 1.4),
        (1.0, 0.8, -0.2, 1.4),
        (1.15, -0.1, -0.9, 1.3),
    ):
        centre = column + (dx + 0.3 * rng.standard_normal()) * size, crown + dy * size
        scene.ellipse(*centre, radius * size, 0.85 * radius * size, shade * leaf, _VEGETATION, z)


def _paint_pole(
    scene: _Scene, rng: np.random.Generator, palette: _Palette, camera: _Camera, x: float, z: float
) -> None:
    """Paint a street lamp with an arm over the road, or a traffic light."""
    column, ground, scale = camera.project(x, z)
    half = max(0.15 * scale, 1.5 * scene.pixel)
    metal = _pick(rng, palette, "metal")
    inwards = -1.0 if x > 0 else 1.0
    if rng.random() < 0.65:
        top = ground - rng.uniform(4.5, 6.5) * scale
        reach = column + inwards * 1.6 * scale
        thickness = max(0.2 * scale, 2.0 * scene.pixel)
        scene.box(min(column, reach), max(column, reach), top, top + thickness, metal, _POLE, z)
        lamp = reach - 0.5 * scale, reach + 0.5 * scale
        scene.box(*lamp, top, top + 1.3 * thickness, _pick(rng, palette, "lamp"), _POLE, z)
    else:
        top = ground - rng.uniform(2.8, 3.6) * scale
        half_box = max(0.32 * scale, 2.5 * scene.pixel)
        scene.box(column - half_box, column + half_box, top, top + 1.2 * scale, 0.5 * metal, _POLE, z)
        green = int(rng.integers(2))
        lens = top + (0.2 + 0.5 * green) * scale
        light = palette["signal"][green]
        scene.box(column - 0.5 * half_box, column + 0.5 * half_box, lens, lens + 0.35 * scale, light, _POLE, z)
        top += scale
    scene.box(column - half, column + half, top, ground, metal, _POLE, z)


def _paint_person(
    scene: _Scene, rng: np.random.Generator, palette: _Palette, camera: _Camera, x: float, z: float
) -> None:
    column, ground, scale = camera.project(x, z)
    size = rng.uniform(0.9, 1.1) * scale
    half = max(0.34 * size, 2.0 * scene.pixel)
    shirt, trousers, skin = (_pick(rng, palette, name, 0.08) for name in ("shirt", "trousers", "skin"))
    hip, shoulder = ground - 0.85 * size, ground - 1.5 * size
    stride = rng.uniform(0.3, 1.0) * half
    leg = max(0.4 * half, 0.6 * scene.pixel)
    for foot in (column - stride + leg / 2, column + stride - leg / 2):
        scene.box(foot - leg, foot + leg, hip, ground, trousers, _PERSON, z)
    scene.box(column - half, column + half, shoulder, hip, shirt, _PERSON, z)
    head = max(0.18 * size, 1.2 * scene.pixel)
    scene.ellipse(column, shoulder - 0.8 * head, head, 1.15 * head, skin, _PERSON, z)


def _paint_car(scene: _Scene, rng: np.random.Generator, palette: _Palette, camera: _Camera, x: float, z: float) -> None:
    """Paint a car from behind, with its visible flank."""
    column, ground, scale = camera.project(x, z)
    size = rng.uniform(0.92, 1.15) * scale
    paint, glass = _pick(rng, palette, "car", 0.08), _pick(rng, palette, "glass")
    tyre, tail_light = _pick(rng, palette, "tyre"), _pick(rng, palette, "tail_light")
    # The flank: the same car one length further on, seen as the strip between the two.
    further, further_ground, further_scale = camera.project(x, z + 3.6)
    shrink = further_scale / scale
    for step in np.linspace(1, 0, 6):
        part = 1 - step * (1 - shrink)
        middle = column + step * (further - column)
        floor = ground + step * (further_ground - ground)
        half, unit = 0.9 * size * part, size * part
        last = step == 0
        body = paint if last else 0.8 * paint
        if not last:
            scene.box(middle - half, middle + half, floor - 0.95 * unit, floor - 0.15 * unit, body, _CAR, z)
        if 0.1 < step < 0.9:
            scene.box(middle - 0.8 * half, middle + 0.8 * half, floor - 1.45 * unit, floor - 0.9 * unit, body, _CAR, z)
            scene.box(
                middle - 0.82 * half, middle + 0.82 * half, floor - 1.36 * unit, floor - 0.95 * unit, glass, _CAR, z
            )
    half = 0.9 * size
    scene.box(
        column - half, column + half, ground - 0.05 * size, ground + 0.12 * size, 0.5 * palette["asphalt"][0], _ROAD, z
    )
    for wheel in (column - 0.72 * half, column + 0.72 * half):
        scene.box(wheel - 0.2 * half, wheel + 0.2 * half, ground - 0.35 * size, ground, tyre, _CAR, z)
    scene.box(column - half, column + half, ground - 0.95 * size, ground - 0.2 * size, paint, _CAR, z)
    scene.box(column - half, column + half, ground - 0.35 * size, ground - 0.2 * size, 0.6 * paint, _CAR, z)
    for lamp in (column - 0.8 * half, column + 0.8 * half):
        scene.box(lamp - 0.17 * half, lamp + 0.17 * half, ground - 0.8 * size, ground - 0.6 * size, tail_light, _CAR, z)


# --- The photograph --------------------------------------------------------------------------------------------------

_TEXTURE = np.array([0.02, 0.03, 0.03, 0.02, 0.11, 0.0, 0.03, 0.02], np.float32)
"""Standard deviation of the grain of each class's surface."""


def _photograph(rng: np.random.Generator, scene: _Scene, optics: _Optics, palette: _Palette) -> _Bytes:
    """Return the scene as the domain's camera sees it, (3, H, W): grain, haze, light, blur, noise."""
    height, width = scene.labels.shape
    grain = rng.standard_normal((height, width), np.float32) * (2 * optics.texture * _TEXTURE)[scene.labels]
    haze = palette["haze"][0]
    clear = np.exp(np.float32(-optics.haze * rng.uniform(0.7, 1.3)) * scene.distance)
    picture = haze + clear * (scene.colours * (1 + grain) - haze)

    radius = (scene.rows / height - 0.5) ** 2 + (scene.columns / width - 0.5) ** 2
    gain = optics.gain * (1 + optics.gain_spread * rng.standard_normal())
    exposure = np.float32(gain) * (1 - np.float32(2 * optics.vignette) * radius)
    contrast = np.float32(optics.contrast)
    picture = (contrast * picture + 0.5 * (1 - contrast)) * exposure * palette["light"][0]
    grey = picture.mean(axis=0)
    picture = grey + np.float32(optics.saturation) * (picture - grey)

    picture = _blur(picture, optics.blur * height / 64)
    picture += np.float32(optics.noise) * rng.standard_normal(picture.shape, np.float32)
    developed: _Bytes = np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)
    return developed


def _blur(picture: _Floats, sigma: float) -> _Floats:
    """Blur (3, H, W) with a Gaussian of `sigma` pixels; the border repeats its edge."""
    reach = int(np.ceil(2 * sigma))
    if reach == 0:
        return picture
    _, height, width = picture.shape
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    padded = np.pad(picture, [(0, 0), (reach, reach), (reach, reach)], mode="edge")
    upright = np.zeros_like(padded[:, :height])
    for start, weight in enumerate(weights):
        upright += weight * padded[:, start : start + height]
    blurred = np.zeros_like(picture)
    for start, weight in enumerate(weights):
        blurred += weight * upright[:, :, start : start + width]
    return blurred


# --- The contact sheet -----------------------------------------------------------------------------------------------


def contact_sheet(config: StreetsConfig, path: Path, samples: int = 6) -> None:
    """Write a PNG that shows both domains: a row per sample, images beside their labels in the class colours.

    Args:
        config: The benchmark to show; its validation images are drawn.
        path: Where the PNG goes; the folder must exist.
        samples: Rows, at most; `config.val_images` if that is fewer.
    """
    _, evaluation = load_streets(config)
    colours = np.array(CLASSES.colors, np.uint8)
    zoom, gap, caption = 2, 4, 16
    cell_width, cell_height = config.width * zoom + gap, config.height * zoom + gap
    rows = min(samples, config.val_images)
    sheet = Image.new("RGB", (4 * cell_width + gap, rows * cell_height + gap + caption), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for place, (domain, images) in enumerate((("source", evaluation.source), ("target", evaluation.target))):
        left = gap + 2 * place * cell_width
        pen.text((left, 3), f"{domain} image", fill="black", font=font)
        pen.text((left + cell_width, 3), f"{domain} label", fill="black", font=font)
        for row in range(rows):
            picture = images.image(row).permute(1, 2, 0).numpy()
            for column, cell in enumerate((picture, colours[images.label(row).numpy()])):
                enlarged = Image.fromarray(cell).resize(
                    (config.width * zoom, config.height * zoom), Image.Resampling.NEAREST
                )
                sheet.paste(enlarged, (left + column * cell_width, caption + gap + row * cell_height))
    sheet.save(path, format="PNG")
