"""Shapes of cars, people, bicycles, signs and traffic lights, drawn once as maps of their parts."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from segadapt.trainables.core.data.streets.config import BICYCLE, CAR, LIGHT, PERSON, POLE, SIGN
from segadapt.trainables.core.data.streets.domains import Bytes

_PART_CLASSES = {
    "nothing": 255,
    "skin": PERSON,
    "hair": PERSON,
    "top": PERSON,
    "legs": PERSON,
    "bag": PERSON,
    "frame": BICYCLE,
    "bicycle tyre": BICYCLE,
    "car": CAR,
    "glass": CAR,
    "trim": CAR,
    "tyre": CAR,
    "tail": CAR,
    "head": CAR,
    "number": CAR,
    "metal": POLE,
    "box": LIGHT,
    "lens": LIGHT,
    "rim": SIGN,
    "plate": SIGN,
    "board": SIGN,
}
PART_NAMES = tuple(_PART_CLASSES)
"""Parts by their index in a sprite; 0 is what lies behind it."""

LABELS: Bytes = np.array(list(_PART_CLASSES.values()), np.uint8)
"""Class index of each part."""

_DENSITY = 60  # cells of a sprite per metre


@dataclass(frozen=True, eq=False)
class Sprite:
    """A map of parts, seen from the front."""

    parts: Bytes  # (h, w)
    width: float  # metres
    height: float
    shown: tuple[str, ...]
    """Names of the parts that it has."""


class _Pencil:
    """Draws parts in metres: x from the middle, y above the ground."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.image = Image.new("L", (round(width * _DENSITY), round(height * _DENSITY)), 0)
        self.draw = ImageDraw.Draw(self.image)

    def _at(self, x: float, y: float) -> tuple[int, int]:
        return round((x + self.width / 2) * _DENSITY), round((self.height - y) * _DENSITY)

    def box(self, part: str, left: float, right: float, bottom: float, top: float) -> None:
        self.polygon(part, (left, bottom), (right, bottom), (right, top), (left, top))

    def polygon(self, part: str, *points: tuple[float, float]) -> None:
        self.draw.polygon([self._at(*point) for point in points], fill=PART_NAMES.index(part))

    def oval(self, part: str, x: float, y: float, half_width: float, half_height: float) -> None:
        corners = (*self._at(x - half_width, y + half_height), *self._at(x + half_width, y - half_height))
        self.draw.ellipse(corners, fill=PART_NAMES.index(part))

    def line(self, part: str, thickness: float, *points: tuple[float, float]) -> None:
        width = max(1, round(thickness * _DENSITY))
        self.draw.line([self._at(*point) for point in points], fill=PART_NAMES.index(part), width=width)

    def ring(self, part: str, x: float, y: float, radius: float, thickness: float) -> None:
        corners = (*self._at(x - radius, y + radius), *self._at(x + radius, y - radius))
        self.draw.ellipse(corners, outline=PART_NAMES.index(part), width=max(1, round(thickness * _DENSITY)))

    def sprite(self) -> Sprite:
        parts = np.asarray(self.image).copy()
        parts.flags.writeable = False
        shown = tuple(PART_NAMES[part] for part in np.unique(parts) if part)
        return Sprite(parts, self.width, self.height, shown)


@lru_cache(maxsize=64)
def car(shape: str, view: str) -> Sprite:
    """Draw a car from its `back` or `front`, or a `slice` through it, many of which in a row are its flank.

    Shapes are saloon, hatchback, suv, van, pickup and truck.
    """
    width, height, waist, roof = {
        "saloon": (1.8, 1.42, 0.95, 0.58),
        "hatchback": (1.75, 1.5, 0.95, 0.66),
        "suv": (1.95, 1.8, 1.1, 0.78),
        "van": (2.0, 2.2, 1.15, 0.9),
        "pickup": (1.95, 1.75, 1.05, 0.72),
        "truck": (2.4, 3.1, 1.1, 1.0),
    }[shape]
    pencil, half = _Pencil(width, height), width / 2
    for side in (-1, 1) if view != "slice" else ():
        pencil.box("tyre", side * (half - 0.02) - 0.15, side * (half - 0.18) + 0.06, 0, 0.5)
    pencil.polygon(
        "car", (-half, 0.25), (half, 0.25), (half, waist - 0.12), (half - 0.08, waist), (-half + 0.08, waist)
    )
    pencil.polygon("car", (-half, 0.25), (-half + 0.08, waist), (-half, waist - 0.12))
    top = roof * half
    pencil.polygon("car", (-half + 0.06, waist - 0.05), (half - 0.06, waist - 0.05), (top, height), (-top, height))
    if shape == "truck" and view != "front":
        pencil.box("car", -half, half, 0.7, height)
    elif view == "slice":
        lower, upper = half - 0.06, top + 0.02
        pencil.polygon("glass", (-lower, waist), (lower, waist), (upper, height - 0.14), (-upper, height - 0.14))
    elif shape == "van" and view == "back":
        for side in (-1, 1):
            pencil.box("glass", side * 0.45 - 0.3, side * 0.45 + 0.3, waist + 0.2, height - 0.3)
    else:
        lower, upper = half - 0.18, top - 0.12
        pencil.polygon("glass", (-lower, waist), (lower, waist), (upper, height - 0.14), (-upper, height - 0.14))
    if view != "slice":
        _draw_bumper(pencil, half, waist, view)
    return pencil.sprite()


def _draw_bumper(pencil: _Pencil, half: float, waist: float, view: str) -> None:
    pencil.box("trim", -half, half, 0.2, 0.38)
    for side in (-1, 1):
        middle = side * (half - 0.24)
        pencil.box("head" if view == "front" else "tail", middle - 0.19, middle + 0.19, waist - 0.3, waist - 0.12)
    if view == "front":
        pencil.box("trim", -0.45, 0.45, waist - 0.38, waist - 0.2)
    pencil.box("number", -0.26, 0.26, 0.42, 0.54)


@lru_cache(maxsize=8)
def car_flank(shape: str) -> Sprite:
    """Draw a car from its side."""
    length, height = {"saloon": (4.3, 1.42), "van": (5.0, 2.2), "suv": (4.5, 1.8)}[shape]
    pencil, half = _Pencil(length, height), length / 2
    waist = height * 0.6
    pencil.polygon(
        "car", (-half, 0.3), (half, 0.3), (half, waist - 0.15), (half - 0.9, waist), (-half + 0.1, waist), (-half, 0.7)
    )
    front, back = (0.9, 0.3) if shape == "saloon" else (0.6, 0.05)
    pencil.polygon(
        "car",
        (-half + back, waist - 0.05),
        (half - front, waist - 0.05),
        (half - front - 0.6, height),
        (-half + back + 0.5, height),
    )
    pencil.polygon(
        "glass",
        (-half + back + 0.25, waist + 0.02),
        (half - front - 0.2, waist + 0.02),
        (half - front - 0.7, height - 0.1),
        (-half + back + 0.6, height - 0.1),
    )
    pencil.box("car", -0.08, 0.08, waist, height - 0.05)
    for x in (-half + 0.85, half - 0.85):
        pencil.oval("tyre", x, 0.33, 0.33, 0.33)
        pencil.oval("trim", x, 0.33, 0.17, 0.17)
    pencil.box("head", half - 0.2, half, waist - 0.35, waist - 0.2)
    pencil.box("tail", -half, -half + 0.15, waist - 0.3, waist - 0.12)
    return pencil.sprite()


@lru_cache(maxsize=32)
def person(stance: str) -> Sprite:
    """Draw a person: standing, walking, carrying (a bag), coat, or child."""
    tall = 1.2 if stance == "child" else 1.75
    unit = tall / 1.75
    pencil = _Pencil(0.9, tall)
    stride = {"walking": 0.22, "carrying": 0.14}.get(stance, 0.08) * unit
    for side in (-1, 1):
        foot = (side * stride * 1.2, 0.0)
        pencil.line("legs", 0.16 * unit, (side * 0.08 * unit, 0.9 * unit), (side * stride, 0.45 * unit), foot)
    pencil.polygon(
        "top",
        (-0.2 * unit, 0.82 * unit),
        (0.2 * unit, 0.82 * unit),
        (0.25 * unit, 1.45 * unit),
        (-0.25 * unit, 1.45 * unit),
    )
    if stance == "coat":
        pencil.polygon("top", (-0.3, 0.45), (0.3, 0.45), (0.2, 1.0), (-0.2, 1.0))
    for side in (-1, 1):
        hand = (side * (0.3 + 0.4 * stride) * unit, 0.8 * unit)
        pencil.line("top", 0.11 * unit, (side * 0.23 * unit, 1.4 * unit), hand)
    if stance == "carrying":
        pencil.box("bag", 0.2, 0.45, 0.5, 0.85)
    pencil.oval("hair", 0, 1.64 * unit, 0.12 * unit, 0.11 * unit)
    pencil.oval("skin", 0, 1.58 * unit, 0.1 * unit, 0.12 * unit)
    return pencil.sprite()


@lru_cache(maxsize=8)
def bicycle(view: str, ridden: bool) -> Sprite:
    """Draw a bicycle from its `side` or its `back`, with or without somebody on it, who is a person."""
    pencil = _Pencil(1.8 if view == "side" else 0.7, 1.75 if ridden else 1.1)
    if view == "back":
        pencil.box("bicycle tyre", -0.05, 0.05, 0, 0.68)
        pencil.line("frame", 0.06, (-0.28, 1.0), (0.28, 1.0))
        pencil.line("frame", 0.07, (0, 0.5), (0, 1.0))
        pencil.box("frame", -0.12, 0.12, 0.85, 0.92)
    else:
        for x in (-0.53, 0.53):
            pencil.ring("bicycle tyre", x, 0.34, 0.34, 0.07)
            pencil.line("bicycle tyre", 0.03, (x - 0.3, 0.34), (x + 0.3, 0.34))
        pencil.line("frame", 0.07, (-0.53, 0.34), (-0.2, 0.82), (0.4, 0.82), (0.0, 0.36), (-0.53, 0.34))
        pencil.line("frame", 0.06, (0.53, 0.34), (0.38, 0.95), (0.5, 1.02))
        pencil.line("frame", 0.06, (0.0, 0.36), (-0.25, 0.95))
        pencil.box("frame", -0.36, -0.12, 0.92, 0.99)
    if ridden:
        _draw_rider(pencil, view)
    return pencil.sprite()


def _draw_rider(pencil: _Pencil, view: str) -> None:
    if view == "back":
        for side in (-1, 1):
            pencil.line("legs", 0.15, (side * 0.1, 0.95), (side * 0.15, 0.35))
            pencil.line("top", 0.1, (side * 0.2, 1.35), (side * 0.27, 1.0))
        pencil.polygon("top", (-0.18, 0.9), (0.18, 0.9), (0.24, 1.42), (-0.24, 1.42))
        pencil.oval("hair", 0, 1.6, 0.12, 0.14)
        return
    pencil.line("legs", 0.16, (-0.2, 0.98), (0.14, 0.75), (0.02, 0.25))
    pencil.line("top", 0.28, (-0.18, 1.0), (0.08, 1.38))
    pencil.line("top", 0.1, (0.06, 1.35), (0.42, 1.02))
    pencil.oval("skin", 0.17, 1.58, 0.11, 0.13)
    pencil.oval("hair", 0.14, 1.63, 0.12, 0.1)


@lru_cache(maxsize=16)
def traffic_light(stack: str) -> Sprite:
    """Draw the box of a traffic light: three lenses of which one is lit, `upright` or `lying`, or two, `pedestrian`."""
    if stack == "lying":
        pencil = _Pencil(1.1, 0.42)
        pencil.box("box", -0.55, 0.55, 0, 0.42)
        pencil.oval("lens", -0.33, 0.21, 0.13, 0.13)
        return pencil.sprite()
    lenses = 3 if stack == "upright" else 2
    pencil = _Pencil(0.45, 0.36 * lenses)
    pencil.box("box", -0.225, 0.225, 0, 0.36 * lenses)
    pencil.oval("lens", 0, 0.36 * lenses - 0.18, 0.14, 0.14)
    return pencil.sprite()


@lru_cache(maxsize=16)
def sign(shape: str) -> Sprite:
    """Draw the board of a traffic sign: round, triangle, square, octagon, diamond or wide."""
    wide = shape == "wide"
    pencil = _Pencil(1.8 if wide else 0.8, 0.9 if wide else 0.8)
    if shape == "round":
        pencil.oval("rim", 0, 0.4, 0.39, 0.39)
        pencil.oval("plate", 0, 0.4, 0.27, 0.27)
    elif shape == "triangle":
        pencil.polygon("rim", (-0.4, 0.05), (0.4, 0.05), (0, 0.78))
        pencil.polygon("plate", (-0.22, 0.15), (0.22, 0.15), (0, 0.56))
    elif shape == "square":
        pencil.box("board", -0.36, 0.36, 0.04, 0.76)
        pencil.polygon("plate", (-0.2, 0.18), (0.2, 0.18), (0, 0.6))
    elif shape == "octagon":
        corners = (
            (-0.16, 0),
            (0.16, 0),
            (0.39, 0.24),
            (0.39, 0.56),
            (0.16, 0.79),
            (-0.16, 0.79),
            (-0.39, 0.56),
            (-0.39, 0.24),
        )
        pencil.polygon("rim", *corners)
        pencil.box("plate", -0.28, 0.28, 0.32, 0.48)
    elif shape == "diamond":
        pencil.polygon("plate", (0, 0), (0.39, 0.4), (0, 0.79), (-0.39, 0.4))
        pencil.polygon("board", (0, 0.14), (0.26, 0.4), (0, 0.66), (-0.26, 0.4))
    else:
        pencil.box("board", -0.9, 0.9, 0, 0.9)
        for y in (0.2, 0.55):
            pencil.box("plate", -0.7, 0.5, y, y + 0.14)
    return pencil.sprite()
