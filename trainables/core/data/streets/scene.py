"""The camera and the picture that a street is painted into, from far to near."""

from dataclasses import dataclass, field

import numpy as np

from segadapt.trainables.core.data.streets.config import SKY
from segadapt.trainables.core.data.streets.domains import Domain, Floats, Mask
from segadapt.trainables.core.data.streets.sprites import LABELS, Sprite

FAR = 150.0
"""Distance of the sky in metres; nothing is further."""

# Materials differ in their texture.
SKIES, ASPHALT, PAVING, WALL, GLASS, LEAF, BODY = range(7)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks along a street which may bend.

    x points right from the camera's axis, z along the street. The axis of the street lies at `offset` + `bend` * z².
    """

    centre: float  # column of the vanishing point
    horizon: float  # its row
    focal: float  # pixels
    height: float
    offset: float
    bend: float

    def project(self, across: float, z: float) -> tuple[float, float, float]:
        """Return the column and row of a point on the ground `across` from the axis, and the pixels per metre there."""
        scale = self.focal / z
        x = across + self.offset + self.bend * z * z
        return self.centre + x * scale, self.horizon + self.height * scale, scale


@dataclass(frozen=True)
class Conditions:
    """What is drawn once per scene: weather and light."""

    fog: float  # per metre
    wet: float
    dusk: bool
    low_sun: bool
    sun_side: float  # -1: light comes from the left, 1: from the right
    sun_slope: float  # height over length of a shadow


@dataclass
class Lamp:
    """A light in the picture."""

    column: float
    row: float
    radius: float  # pixels
    colour: Floats  # (3,)
    floods: bool = False  # head-lights, which also light the road


@dataclass
class Scene:
    """A picture with the class, distance, material and texture coordinates of each pixel."""

    rng: np.random.Generator
    domain: Domain
    camera: Camera
    conditions: Conditions
    height: int
    width: int
    lamps: list[Lamp] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = (self.height, self.width)
        self.rows = np.arange(self.height, dtype=np.float32)[:, None] + np.float32(0.5)
        self.columns = np.arange(self.width, dtype=np.float32)[None, :] + np.float32(0.5)
        self.colours = np.zeros((3, *shape), np.float32)
        self.labels = np.full(shape, SKY, np.uint8)
        self.distance = np.full(shape, FAR, np.float32)
        self.materials = np.zeros(shape, np.uint8)
        self.texture_u = np.zeros(shape, np.float32)  # metres
        self.texture_v = np.zeros(shape, np.float32)

    @property
    def pixel(self) -> float:
        """Size of a pixel of a 128-pixel-high image, the smallest of a detail."""
        return self.height / 128

    def surface(
        self, mask: Mask, colours: Floats, label: int, material: int, place: tuple[Floats, Floats, Floats]
    ) -> None:
        """Paint a mask of the whole picture.

        Args:
            mask: Where, (H, W).
            colours: (3,), or broadcastable to (3, H, W).
            label: Class index.
            material: Index of the material.
            place: Distance and texture coordinates, each broadcastable to (H, W).
        """
        np.copyto(self.colours, colours[:, None, None] if colours.ndim == 1 else colours, where=mask)
        np.copyto(self.labels, np.uint8(label), where=mask)
        np.copyto(self.materials, np.uint8(material), where=mask)
        for buffer, values in zip((self.distance, self.texture_u, self.texture_v), place, strict=True):
            np.copyto(buffer, values, where=mask)

    def tint(self, mask: Mask, colour: Floats, material: int | None = None) -> None:
        """Change the colour, (3,), and perhaps the material of a mask of the whole picture."""
        np.copyto(self.colours, colour[:, None, None], where=mask)
        if material is not None:
            np.copyto(self.materials, np.uint8(material), where=mask)

    def darken(self, mask: Mask, factor: float) -> None:
        """Multiply the colours of a mask of the whole picture."""
        np.multiply(self.colours, np.float32(factor), out=self.colours, where=mask)

    def window(self, left: float, right: float, top: float, bottom: float) -> tuple[slice, slice]:
        """Return the rows and columns whose middles lie in a rectangle, at least one of each unless it is outside."""
        rows = slice(_first(top, self.height), _first(max(bottom, top + 1), self.height))
        columns = slice(_first(left, self.width), _first(max(right, left + 1), self.width))
        return rows, columns

    def paste(
        self,
        sprite: Sprite,
        box: tuple[float, float, float, float],
        colours: Floats,
        z: float,
        mirrored: bool = False,
    ) -> None:
        """Paint a sprite that faces the camera.

        Args:
            sprite: Its parts.
            box: Left, right, top and bottom in pixels.
            colours: Of each part, (K, 3).
            z: Distance in metres.
            mirrored: Exchange left and right.
        """
        left, right, top, bottom = box
        rows, columns = self.window(*box)
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return
        height, width = sprite.parts.shape
        v = (self.rows[rows, 0] - np.float32(top)) / np.float32(max(bottom - top, 1))
        u = (self.columns[0, columns] - np.float32(left)) / np.float32(max(right - left, 1))
        if mirrored:
            u = 1 - u
        at_row = np.clip(v * height, 0, height - 1).astype(np.intp)
        at_column = np.clip(u * width, 0, width - 1).astype(np.intp)
        parts = sprite.parts[at_row[:, None], at_column]
        mask = parts > 0
        shading = np.float32(self.domain.rendering.shading)
        light = 1 + shading * (np.float32(0.16) - np.float32(0.34) * v[:, None] + np.float32(0.14) * u * (1 - u))
        painted = np.moveaxis(colours[parts], 2, 0) * light
        np.copyto(self.colours[:, rows, columns], painted, where=mask)
        np.copyto(self.labels[rows, columns], LABELS[parts], where=mask)
        np.copyto(self.distance[rows, columns], np.float32(z), where=mask)
        np.copyto(self.materials[rows, columns], np.uint8(BODY), where=mask)
        np.copyto(self.texture_u[rows, columns], u * np.float32(sprite.width), where=mask)
        np.copyto(self.texture_v[rows, columns], v[:, None] * np.float32(sprite.height), where=mask)


def _first(edge: float, size: int) -> int:
    """Return the first pixel whose middle is not before an edge, in 0 ... size."""
    return min(max(int(np.ceil(edge - 0.5)), 0), size)
