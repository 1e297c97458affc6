"""Drawing a scene by chance and painting it, from far to near."""

from collections.abc import Callable

import numpy as np

from segadapt.trainables.core.data.streets import objects
from segadapt.trainables.core.data.streets.domains import Domain
from segadapt.trainables.core.data.streets.fronts import Fronts, draw_fronts, paint_fronts, paint_street_end
from segadapt.trainables.core.data.streets.ground import paint_ground, paint_sky
from segadapt.trainables.core.data.streets.scene import Camera, Conditions, Scene


def paint_street(rng: np.random.Generator, domain: Domain, height: int, width: int) -> Scene:
    """Paint one scene: sky, ground, the two street sides, then everything on the street from far to near."""
    scene = Scene(rng, domain, _draw_camera(rng, domain, height, width), _draw_conditions(rng, domain), height, width)
    road_half = domain.geometry.road_half_width * rng.uniform(0.85, 1.15)
    left_walk, right_walk = domain.geometry.sidewalk_width * rng.uniform(0.7, 1.3, 2)
    fronts = draw_fronts(scene, (-road_half - float(left_walk), road_half + float(right_walk)))
    paint_sky(scene)
    paint_street_end(scene)
    paint_ground(scene, road_half, fronts)
    paint_fronts(scene, fronts)
    _paint_objects(scene, road_half, fronts)
    return scene


def _draw_camera(rng: np.random.Generator, domain: Domain, height: int, width: int) -> Camera:
    geometry = domain.geometry

    def spread(value: float, share: float) -> float:
        return value * (1 + share * rng.uniform(-1, 1))

    return Camera(
        centre=width * (0.5 + geometry.swing * rng.uniform(-1, 1)),
        horizon=height * (geometry.horizon + geometry.horizon_spread * rng.uniform(-1, 1)),
        focal=width * spread(geometry.focal, geometry.focal_spread),
        height=spread(geometry.camera_height, geometry.camera_height_spread),
        offset=rng.uniform(-2.2, 0.4),  # the camera drives on the right
        bend=geometry.curvature * rng.uniform(-1, 1),
    )


def _draw_conditions(rng: np.random.Generator, domain: Domain) -> Conditions:
    weather, chance = domain.weather, rng.random()
    dusk = bool(chance < weather.dusk)
    low_sun = bool(not dusk and chance < weather.dusk + weather.low_sun)
    return Conditions(
        fog=weather.fog * rng.uniform(0.05, 1) ** 2 * 2.7,
        wet=min(1.0, domain.rendering.wet * 2 * rng.random()) * (not low_sun),
        dusk=dusk,
        low_sun=low_sun,
        sun_side=-1.0 if rng.random() < 0.5 else 1.0,
        sun_slope=rng.uniform(0.5, 0.9) if low_sun else rng.uniform(0.9, 2.0),
    )


def _paint_objects(scene: Scene, road_half: float, fronts: Fronts) -> None:
    """Draw how many objects there are, and where, and paint them from far to near."""
    rng, content = scene.rng, scene.domain.content
    walks = [float(abs(across)) - road_half for across in fronts.across]

    def beside(side: float) -> float:
        return side * (road_half + rng.uniform(0.15, 0.8) * walks[side > 0])

    on_the_walk = content.persons * (1 - content.crossing_share)
    crossing = content.persons * content.crossing_share
    kinds: list[tuple[objects.Painter, float, tuple[float, float], Callable[[float], float]]] = [
        (objects.paint_tree, content.trees, (9, 60), lambda side: side * (road_half + 0.85 * walks[side > 0])),
        (objects.paint_pole, content.poles, (6, 45), lambda side: side * (road_half + 0.5)),
        (objects.paint_light, content.lights, (7, 26), lambda side: side * (road_half + 0.4)),
        (objects.paint_sign, content.signs, (6, 26), lambda side: side * (road_half + 0.5)),
        (objects.paint_person, on_the_walk, (6, 26), beside),
        (objects.paint_person, crossing, (6, 22), lambda side: side * rng.uniform(0, road_half)),
        (objects.paint_cyclist, content.cyclists, (6, 22), lambda side: side * rng.uniform(0.6, 0.95) * road_half),
        (objects.paint_bicycle, content.parked_bicycles, (6, 20), beside),
        (objects.paint_parked_car, content.parked_cars, (7, 45), lambda side: side * (road_half - 1.05)),
        (objects.paint_driving_car, content.driving_cars, (7, 50), lambda side: side * 0.4 * road_half),
    ]
    drawn: list[tuple[float, float, objects.Painter]] = []
    for painter, mean, (nearest, farthest), place in kinds:
        for _ in range(rng.poisson(mean)):
            side = -1.0 if rng.random() < 0.5 else 1.0
            # Uniform in the picture rather than on the street: z is drawn on a reciprocal scale.
            z = 1 / rng.uniform(1 / farthest, 1 / nearest)
            drawn.append((z, place(side), painter))
    for z, across, painter in sorted(drawn, key=lambda item: -item[0]):
        painter(scene, across, z)
