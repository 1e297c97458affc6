"""Sky, road and sidewalks, and the shadows that lie on them."""

import numpy as np

from segadapt.trainables.core.data.streets.config import ROAD, SIDEWALK
from segadapt.trainables.core.data.streets.domains import Floats, Mask, floats
from segadapt.trainables.core.data.streets.fronts import Fronts
from segadapt.trainables.core.data.streets.noise import noise_table, read_noise
from segadapt.trainables.core.data.streets.palette import pick
from segadapt.trainables.core.data.streets.scene import ASPHALT, FAR, PAVING, Scene


def paint_sky(scene: Scene) -> None:
    """Paint a gradient, and clouds as the weather has them."""
    rng, camera = scene.rng, scene.camera
    top, bottom = pick(rng, "sky"), pick(rng, "horizon")
    grey = np.float32(min(1.0, scene.domain.weather.clouds * rng.random()))
    top = top + grey * (np.float32(0.92) * bottom - top)
    if scene.conditions.dusk:
        top, bottom = top * floats((0.3, 0.33, 0.45)), bottom * floats((0.62, 0.5, 0.5))
    part = np.clip(scene.rows / np.float32(max(camera.horizon, 1)), 0, 1)
    scene.colours[:] = top[:, None, None] + part * (bottom - top)[:, None, None]
    clouds = np.float32(scene.domain.weather.clouds * rng.uniform(0, 0.4))
    if clouds > 0:
        stretch = np.float32(60) / (camera.horizon + 20 * scene.pixel - np.minimum(scene.rows, camera.horizon))
        u = (scene.columns - camera.centre) * (stretch / scene.pixel) + 4096
        noise = read_noise(noise_table(8, 4), u, stretch * 90 + np.float32(rng.uniform(0, 256)))
        scene.colours += clouds * np.clip(noise, -1, 1) * (bottom - top + np.float32(0.1))[:, None, None]


def paint_ground(scene: Scene, road_half: float, fronts: Fronts) -> None:
    """Paint the road with its marks, paved sidewalks, side streets and the shadows of houses."""
    rng, camera = scene.rng, scene.camera
    below = np.maximum(scene.rows - np.float32(camera.horizon), np.float32(0.25))
    z = np.minimum(np.float32(camera.height * camera.focal) / below, np.float32(FAR))  # (H, 1)
    x = (scene.columns - np.float32(camera.centre)) * (z / np.float32(camera.focal))  # (H, W)
    across = x - np.float32(camera.offset) - np.float32(camera.bend) * z * z
    ground = np.broadcast_to(scene.rows > camera.horizon, x.shape)
    place = (z, across + 512, z)

    unseen = scene.domain.content.unseen
    scene.surface(ground, pick(rng, "paving", unseen), SIDEWALK, PAVING, place)
    tiles = ((z % 1.2) < 0.1) & (z < 14) | ((across % 1.2) < 0.08) & (z < 14)
    scene.darken(ground & tiles, 0.9)
    beside = np.abs(across)
    scene.surface(ground & (beside < road_half + 0.25), pick(rng, "kerb"), SIDEWALK, PAVING, place)
    asphalt = pick(rng, "asphalt", unseen)
    on_road = ground & ((beside < road_half) | fronts.open_at(across, z))
    scene.surface(on_road, asphalt, ROAD, ASPHALT, place)
    _paint_wear(scene, on_road, across, z, asphalt)
    _paint_marks(scene, on_road, across, z, road_half)
    shadow = np.float32(scene.domain.rendering.shadow)
    if shadow > 0 and not scene.conditions.dusk:
        lit = fronts.lit(across, z, scene.conditions)
        scene.colours *= np.where(ground & ~lit, 1 - shadow, np.float32(1))


def _paint_wear(scene: Scene, on_road: Mask, across: Floats, z: Floats, asphalt: Floats) -> None:
    """Paint what clutters a road: mended patches and manhole covers."""
    rng = scene.rng
    for _ in range(rng.poisson(5 * scene.domain.content.clutter)):
        start, x = rng.uniform(4, 26), rng.uniform(-4, 4)
        length, width = rng.uniform(0.6, 5), rng.uniform(0.4, 2)
        if rng.random() < 0.3:
            patch = (z - start) ** 2 + (across - x) ** 2 < 0.16
        else:
            patch = (z > start) & (z < start + length) & (np.abs(across - x) < width)
        scene.tint(on_road & patch, asphalt * np.float32(rng.uniform(0.68, 1.18)))


def _paint_marks(scene: Scene, on_road: Mask, across: Floats, z: Floats, road_half: float) -> None:
    """Paint dashes along the axis, and sometimes edges and a zebra crossing."""
    rng = scene.rng
    dashes = ((z + rng.uniform(0, 8)) % 8 < 4) & (np.abs(across) < 0.12)
    edges = np.abs(np.abs(across) - road_half + 0.4) < 0.08
    marks = dashes | edges if rng.random() < 0.6 else dashes
    if rng.random() < 0.35:
        start = rng.uniform(7, 22)
        marks = marks | (z > start) & (z < start + 3.5) & (across % 1.1 < 0.55) & (np.abs(across) < road_half)
    worn = scene.domain.rendering.texture
    if worn > 0:
        marks = marks & (read_noise(noise_table(32, 3), across * 20 + 4096, z * 20) < np.float32(2.4 - 1.6 * worn))
    scene.tint(on_road & marks, pick(rng, "paint"))
