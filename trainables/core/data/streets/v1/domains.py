"""The two domains of streets: street plan, light, camera and colours."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

Bytes = NDArray[np.uint8]

Palette = Mapping[str, Floats]


@dataclass(frozen=True, kw_only=True)
class Layout:
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
class Optics:
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


SOURCE_LAYOUT = Layout(
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

TARGET_LAYOUT = Layout(
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

SOURCE_OPTICS = Optics(
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

TARGET_OPTICS = Optics(
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


def _colours(*hexadecimal: str) -> Floats:
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


def blend_palettes(shift: float) -> Palette:
    """Move each colour by `shift` times the way to the target's."""
    return {
        name: np.clip(colours + np.float32(shift) * (_TARGET_PALETTE[name] - colours), 0, 1)
        for name, colours in _SOURCE_PALETTE.items()
    }


_Statistics = TypeVar("_Statistics", Layout, Optics)


def blend(source: _Statistics, target: _Statistics, shift: float) -> _Statistics:
    """Move each statistic by `shift` times the way to the target; beyond it, values stay positive."""
    pairs = {field.name: (getattr(source, field.name), getattr(target, field.name)) for field in fields(source)}
    return type(source)(
        **{name: max(start + shift * (end - start), 0.25 * min(start, end)) for name, (start, end) in pairs.items()}
    )
