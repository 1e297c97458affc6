"""The camera and the picture that a street is painted into."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segadapt.trainables.core.data.streets.v1.classes import SKY
from segadapt.trainables.core.data.streets.v1.domains import Floats, Palette


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks along the street."""

    centre: float  # column of the vanishing point
    horizon: float  # its row
    focal: float  # pixels
    height: float

    def project(self, x: float, z: float) -> tuple[float, float, float]:
        """Return the column and row of a point on the ground, and the pixels per metre there."""
        scale = self.focal / z
        return self.centre + x * scale, self.horizon + self.height * scale, scale


class Scene:
    """A picture that is painted from far to near, with the class and distance of each pixel."""

    def __init__(self, height: int, width: int) -> None:
        self.rows = np.arange(height, dtype=np.float32)[:, None] + 0.5
        self.columns = np.arange(width, dtype=np.float32)[None, :] + 0.5
        self.colours = np.zeros((3, height, width), np.float32)
        self.labels = np.full((height, width), SKY, np.uint8)
        self.distance = np.full((height, width), 150.0, np.float32)

    @property
    def pixel(self) -> float:
        """Size of a pixel of a 64-pixel-high image, the smallest of a detail."""
        return len(self.rows) / 64

    def surface(self, mask: NDArray[np.bool_], colours: Floats, label: int, distance: Floats) -> None:
        """Paint a mask of the whole picture; colours and distance broadcast against it."""
        np.copyto(self.colours, colours, where=mask)
        np.copyto(self.distance, distance, where=mask)
        np.copyto(self.labels, np.uint8(label), where=mask)

    def tint(self, mask: NDArray[np.bool_], colour: Floats) -> None:
        """Change the colour of a mask of the whole picture."""
        np.copyto(self.colours, colour, where=mask)

    def darken(self, mask: NDArray[np.bool_], factor: float) -> None:
        """Multiply the colours of a mask of the whole picture."""
        np.multiply(self.colours, np.float32(factor), out=self.colours, where=mask)

    def box(self, left: float, right: float, top: float, bottom: float, colour: Floats, label: int, z: float) -> None:
        """Paint a rectangle that faces the camera."""
        rows = slice(int(max(top + 0.5, 0)), int(max(bottom + 0.5, 0)))
        columns = slice(int(max(left + 0.5, 0)), int(max(right + 0.5, 0)))
        self.colours[:, rows, columns] = colour
        self.labels[rows, columns] = label
        self.distance[rows, columns] = z

    def ellipse(
        self, x: float, y: float, half_width: float, half_height: float, colour: Floats, label: int, z: float
    ) -> None:
        """Paint an ellipse that faces the camera."""
        rows = slice(max(int(y - half_height), 0), max(int(y + half_height) + 1, 0))
        columns = slice(max(int(x - half_width), 0), max(int(x + half_width) + 1, 0))
        inside = ((self.rows[rows] - y) / half_height) ** 2 + ((self.columns[:, columns] - x) / half_width) ** 2 < 1
        np.copyto(self.colours[:, rows, columns], colour, where=inside)
        np.copyto(self.labels[rows, columns], np.uint8(label), where=inside)
        np.copyto(self.distance[rows, columns], np.float32(z), where=inside)


def pick(rng: np.random.Generator, palette: Palette, material: str, spread: float = 0.04) -> Floats:
    """Draw a colour, (3, 1, 1), of a material, with a little variation in brightness."""
    colours = palette[material]
    colour: Floats = colours[int(rng.random() * len(colours))]
    return colour * np.float32(1 + spread * rng.standard_normal())
