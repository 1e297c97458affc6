"""What differs between the two domains of streets: geometry, content, rendering and weather.

The source is at strength 0 of each part, the target at the strengths of the configuration.
"""

from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def floats(values: float | tuple[float, ...]) -> Floats:
    """Return numbers as an array of float32: of no axis, or of one."""
    return np.asarray(values, np.float32)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Camera and street plan; lengths in metres."""

    camera_height: float
    camera_height_spread: float  # share of the height
    horizon: float  # share of the image height above it: the pitch
    horizon_spread: float
    focal: float  # focal length / image width: the field of view
    focal_spread: float
    swing: float  # how far the vanishing point lies from the middle, share of the width
    road_half_width: float
    sidewalk_width: float
    curvature: float  # the road's axis is displaced by up to this times z²
    gap_share: float  # plots that are open: side streets


@dataclass(frozen=True, kw_only=True)
class Content:
    """Mean counts per scene, and how many objects are of a kind that the source never shows."""

    storeys: float  # mean number above the ground floor
    built_share: float  # of the plots that are not open; hedges take the rest
    trees: float
    poles: float
    lights: float
    signs: float
    persons: float
    crossing_share: float  # of the persons, on the road
    cyclists: float
    parked_bicycles: float
    parked_cars: float
    driving_cars: float
    unseen: float  # share of objects of a variant or colour unknown to the source
    clutter: float  # shop signs, awnings, balconies, patches, manhole covers, litter


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """How surfaces and the camera are simulated."""

    texture: float  # strength of procedural texture
    shadow: float  # light that is missing in cast shadows
    shading: float  # light from above on objects, reflections on cars and glass
    wet: float  # mean wetness of the road, which mirrors
    motion: float  # mean motion blur in pixels at 128 pixels of height
    defocus: float  # mean standard deviation of the blur in pixels at 128 pixels of height
    noise: float  # standard deviation of the sensor's
    compression: float  # 0 = none, 1 = JPEG at a quality of about 45


@dataclass(frozen=True, kw_only=True)
class Weather:
    """Light and air, each of which changes parts of a picture."""

    fog: float  # mean density per metre
    low_sun: float  # share of scenes with a low sun that glares
    dusk: float  # share of scenes with a dark sky, lamps and head-lights
    clouds: float


SOURCE_GEOMETRY = Geometry(
    camera_height=1.5,
    camera_height_spread=0.08,
    horizon=0.44,
    horizon_spread=0.025,
    focal=0.8,
    focal_spread=0.03,
    swing=0.08,
    road_half_width=5.0,
    sidewalk_width=3.4,
    curvature=0.0,
    gap_share=0.08,
)
TARGET_GEOMETRY = Geometry(
    camera_height=2.2,
    camera_height_spread=0.25,
    horizon=0.37,
    horizon_spread=0.06,
    focal=0.66,
    focal_spread=0.12,
    swing=0.18,
    road_half_width=3.7,
    sidewalk_width=2.3,
    curvature=0.0028,
    gap_share=0.2,
)

SOURCE_CONTENT = Content(
    storeys=2.0,
    built_share=0.8,
    trees=3.0,
    poles=3.0,
    lights=1.4,
    signs=1.6,
    persons=3.5,
    crossing_share=0.1,
    cyclists=1.2,
    parked_bicycles=0.9,
    parked_cars=2.2,
    driving_cars=1.8,
    unseen=0.0,
    clutter=0.0,
)
TARGET_CONTENT = Content(
    storeys=3.0,
    built_share=0.65,
    trees=4.6,
    poles=4.0,
    lights=1.4,
    signs=1.8,
    persons=4.5,
    crossing_share=0.3,
    cyclists=1.4,
    parked_bicycles=1.1,
    parked_cars=3.6,
    driving_cars=1.6,
    unseen=0.6,
    clutter=1.0,
)

SOURCE_RENDERING = Rendering(
    texture=0.0, shadow=0.0, shading=0.1, wet=0.0, motion=0.0, defocus=0.25, noise=0.004, compression=0.0
)
TARGET_RENDERING = Rendering(
    texture=1.0, shadow=0.5, shading=1.0, wet=0.4, motion=1.2, defocus=0.55, noise=0.022, compression=1.0
)

SOURCE_WEATHER = Weather(fog=0.0005, low_sun=0.0, dusk=0.0, clouds=0.0)
TARGET_WEATHER = Weather(fog=0.012, low_sun=0.3, dusk=0.25, clouds=1.0)


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Everything that scenes of a domain are drawn by."""

    geometry: Geometry
    content: Content
    rendering: Rendering
    weather: Weather


_Part = TypeVar("_Part", Geometry, Content, Rendering, Weather)


def domain_of(geometry: float, content: float, rendering: float, weather: float) -> Domain:
    """Return the domain at a strength of each part: 0 is the source's, 1 the default target's."""
    return Domain(
        geometry=_blend(SOURCE_GEOMETRY, TARGET_GEOMETRY, geometry),
        content=_blend(SOURCE_CONTENT, TARGET_CONTENT, content),
        rendering=_blend(SOURCE_RENDERING, TARGET_RENDERING, rendering),
        weather=_blend(SOURCE_WEATHER, TARGET_WEATHER, weather),
    )


def _blend(source: _Part, target: _Part, strength: float) -> _Part:
    """Move each statistic by `strength` times the way to the target; beyond it, values stay positive."""
    pairs = {field.name: (getattr(source, field.name), getattr(target, field.name)) for field in fields(source)}
    return type(source)(
        **{name: max(start + strength * (end - start), 0.3 * min(start, end)) for name, (start, end) in pairs.items()}
    )
