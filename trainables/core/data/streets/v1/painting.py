"""Painting a street scene, from far to near."""

from collections.abc import Callable

import numpy as np

from segadapt.trainables.core.data.streets.v1.classes import BUILDING, CAR, PERSON, POLE, ROAD, SIDEWALK, VEGETATION
from segadapt.trainables.core.data.streets.v1.domains import Layout, Palette
from segadapt.trainables.core.data.streets.v1.scene import Camera, Scene, pick

_STREET_END = 75.0

_FOCAL_SHARE = 0.8  # focal length / image width


def paint_street(rng: np.random.Generator, layout: Layout, palette: Palette, height: int, width: int) -> Scene:
    """Paint one scene: sky, ground, the two street sides, then everything on the street from far to near."""
    camera = Camera(
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

    scene = Scene(height, width)
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


def _paint_sky(scene: Scene, rng: np.random.Generator, palette: Palette, camera: Camera) -> None:
    top, bottom = pick(rng, palette, "sky"), pick(rng, palette, "horizon")
    blend = np.clip(scene.rows / camera.horizon, 0, 1)
    scene.colours[:] = top + blend * (bottom - top)
    for _ in range(rng.integers(0, 4)):  # clouds: lighter patches
        x, y = rng.uniform(0, scene.columns.size), rng.uniform(0, 0.7) * camera.horizon
        reach = ((scene.columns - x) / (14 * scene.pixel)) ** 2 + ((scene.rows - y) / (3 * scene.pixel)) ** 2
        scene.colours += 0.6 * np.exp(-reach) * (bottom - scene.colours)


def _paint_ground(
    scene: Scene, rng: np.random.Generator, palette: Palette, camera: Camera, kerbs: tuple[float, float]
) -> None:
    """Paint the road with its marks and, outside the kerbs, paved sidewalks."""
    below = np.maximum(scene.rows - camera.horizon, 0.25)
    z = camera.height * camera.focal / below  # (H, 1)
    x = (scene.columns - camera.centre) * (z / camera.focal)  # (H, W)
    ground = np.broadcast_to(scene.rows > camera.horizon, x.shape)
    distance = np.minimum(z, 150.0)
    road_half = (kerbs[1] - kerbs[0]) / 2
    across = x - (kerbs[0] + kerbs[1]) / 2  # from the road's axis

    scene.surface(ground, pick(rng, palette, "paving"), SIDEWALK, distance)
    tiles = ((z % 2.4) < 0.35) & (z < 22) | ((x % 1.5) < 0.12) & (z < 15)
    scene.darken(ground & tiles, 0.86)
    on_road = ground & (np.abs(across) < road_half)
    scene.surface(ground & (np.abs(across) < road_half + 0.25), pick(rng, palette, "kerb"), SIDEWALK, distance)
    scene.surface(on_road, pick(rng, palette, "asphalt"), ROAD, distance)
    wear = np.abs(np.abs(across) - road_half / 2) < 0.8
    scene.darken(on_road & wear, 0.94)

    dashes = ((z + rng.uniform(0, 8)) % 8 < 4) & (np.abs(across) < 0.16)
    edges = np.abs(np.abs(across) - road_half + 0.45) < 0.09
    marks = dashes | edges if rng.random() < 0.6 else dashes
    scene.tint(on_road & marks, pick(rng, palette, "paint"))
    if rng.random() < 0.25:  # a zebra crossing
        start = rng.uniform(9, 22)
        zebra = (z > start) & (z < start + 3.5) & (across % 1.2 < 0.6)
        scene.tint(on_road & zebra, pick(rng, palette, "paint"))


def _paint_street_end(scene: Scene, rng: np.random.Generator, palette: Palette, camera: Camera) -> None:
    """Close the street with a far row of houses or trees."""
    _, ground, scale = camera.project(0, _STREET_END)
    built = rng.random() < 0.5
    columns = scene.columns.size
    steps = np.repeat(rng.uniform(5, 12, columns // 8 + 1), 8)[:columns] if built else rng.uniform(6, 9, columns)
    top = ground - scale * steps.astype(np.float32)[None, :]
    colour = pick(rng, palette, "wall" if built else "leaf")
    mask = (scene.rows < ground) & (scene.rows > top)
    scene.surface(mask, colour, BUILDING if built else VEGETATION, np.float32(_STREET_END) * np.ones_like(top))


def _paint_fronts(
    scene: Scene,
    rng: np.random.Generator,
    layout: Layout,
    palette: Palette,
    camera: Camera,
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
    walls = np.stack([pick(rng, palette, "wall" if house else "leaf") for house in built]) * light[:, None, None, None]

    houses = built[shown]
    ragged = np.abs(0.5 * rng.standard_normal(len(shown)))
    top = np.where(houses, house_tops[shown], hedge_tops[shown] + ragged).astype(np.float32)
    visible = (z < _STREET_END) & (level > 0) & (level < top)
    colours = walls[shown, :, 0, 0].T.astype(np.float32)[:, None]  # (3, 1, W)
    scene.surface(visible & ~houses, colours, VEGETATION, z)
    scene.surface(visible & houses, colours, BUILDING, z)

    bay = (z + rng.uniform(0, 3)) % 3
    panes = (bay > 0.75) & (bay < 2.25) & (z < 48) & houses
    storey = (level - 3.4) % 3
    upstairs = (level > 3.4) & (storey > 0.75) & (storey < 2.4) & (level < top - 0.5)
    scene.tint(visible & houses & (level < 3.2), pick(rng, palette, "shop"))
    scene.tint(visible & panes & (upstairs | (level > 0.7) & (level < 2.6)), pick(rng, palette, "glass"))
    scene.darken(visible & houses & (level > top - 0.5), 0.75)  # the eaves


_Painter = Callable[[Scene, np.random.Generator, Palette, Camera, float, float], None]


def _paint_tree(scene: Scene, rng: np.random.Generator, palette: Palette, camera: Camera, x: float, z: float) -> None:
    column, ground, scale = camera.project(x, z)
    size = rng.uniform(0.8, 1.2) * scale
    half_trunk = max(0.16 * size, 0.75 * scene.pixel)
    trunk = pick(rng, palette, "trunk")
    scene.box(column - half_trunk, column + half_trunk, ground - 2.6 * size, ground, trunk, VEGETATION, z)
    leaf = pick(rng, palette, "leaf")
    crown = ground - 4.2 * size
    for shade, dx, dy, radius in (
        (0.75, 0.2, 0.5, 1.9),
        (0.9, -0.9, 0.1, 1.4),
        (1.0, 0.8, -0.2, 1.4),
        (1.15, -0.1, -0.9, 1.3),
    ):
        centre = column + (dx + 0.3 * rng.standard_normal()) * size, crown + dy * size
        scene.ellipse(*centre, radius * size, 0.85 * radius * size, shade * leaf, VEGETATION, z)


def _paint_pole(scene: Scene, rng: np.random.Generator, palette: Palette, camera: Camera, x: float, z: float) -> None:
    """Paint a street lamp with an arm over the road, or a traffic light."""
    column, ground, scale = camera.project(x, z)
    half = max(0.15 * scale, 1.5 * scene.pixel)
    metal = pick(rng, palette, "metal")
    inwards = -1.0 if x > 0 else 1.0
    if rng.random() < 0.65:
        top = ground - rng.uniform(4.5, 6.5) * scale
        reach = column + inwards * 1.6 * scale
        thickness = max(0.2 * scale, 2.0 * scene.pixel)
        scene.box(min(column, reach), max(column, reach), top, top + thickness, metal, POLE, z)
        lamp = reach - 0.5 * scale, reach + 0.5 * scale
        scene.box(*lamp, top, top + 1.3 * thickness, pick(rng, palette, "lamp"), POLE, z)
    else:
        top = ground - rng.uniform(2.8, 3.6) * scale
        half_box = max(0.32 * scale, 2.5 * scene.pixel)
        scene.box(column - half_box, column + half_box, top, top + 1.2 * scale, 0.5 * metal, POLE, z)
        green = int(rng.integers(2))
        lens = top + (0.2 + 0.5 * green) * scale
        light = palette["signal"][green]
        scene.box(column - 0.5 * half_box, column + 0.5 * half_box, lens, lens + 0.35 * scale, light, POLE, z)
        top += scale
    scene.box(column - half, column + half, top, ground, metal, POLE, z)


def _paint_person(scene: Scene, rng: np.random.Generator, palette: Palette, camera: Camera, x: float, z: float) -> None:
    column, ground, scale = camera.project(x, z)
    size = rng.uniform(0.9, 1.1) * scale
    half = max(0.34 * size, 2.0 * scene.pixel)
    shirt, trousers, skin = (pick(rng, palette, name, 0.08) for name in ("shirt", "trousers", "skin"))
    hip, shoulder = ground - 0.85 * size, ground - 1.5 * size
    stride = rng.uniform(0.3, 1.0) * half
    leg = max(0.4 * half, 0.6 * scene.pixel)
    for foot in (column - stride + leg / 2, column + stride - leg / 2):
        scene.box(foot - leg, foot + leg, hip, ground, trousers, PERSON, z)
    scene.box(column - half, column + half, shoulder, hip, shirt, PERSON, z)
    head = max(0.18 * size, 1.2 * scene.pixel)
    scene.ellipse(column, shoulder - 0.8 * head, head, 1.15 * head, skin, PERSON, z)


def _paint_car(scene: Scene, rng: np.random.Generator, palette: Palette, camera: Camera, x: float, z: float) -> None:
    """Paint a car from behind, with its visible flank."""
    column, ground, scale = camera.project(x, z)
    size = rng.uniform(0.92, 1.15) * scale
    paint, glass = pick(rng, palette, "car", 0.08), pick(rng, palette, "glass")
    tyre, tail_light = pick(rng, palette, "tyre"), pick(rng, palette, "tail_light")
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
            scene.box(middle - half, middle + half, floor - 0.95 * unit, floor - 0.15 * unit, body, CAR, z)
        if 0.1 < step < 0.9:
            scene.box(middle - 0.8 * half, middle + 0.8 * half, floor - 1.45 * unit, floor - 0.9 * unit, body, CAR, z)
            scene.box(
                middle - 0.82 * half, middle + 0.82 * half, floor - 1.36 * unit, floor - 0.95 * unit, glass, CAR, z
            )
    half = 0.9 * size
    scene.box(
        column - half, column + half, ground - 0.05 * size, ground + 0.12 * size, 0.5 * palette["asphalt"][0], ROAD, z
    )
    for wheel in (column - 0.72 * half, column + 0.72 * half):
        scene.box(wheel - 0.2 * half, wheel + 0.2 * half, ground - 0.35 * size, ground, tyre, CAR, z)
    scene.box(column - half, column + half, ground - 0.95 * size, ground - 0.2 * size, paint, CAR, z)
    scene.box(column - half, column + half, ground - 0.35 * size, ground - 0.2 * size, 0.6 * paint, CAR, z)
    for lamp in (column - 0.8 * half, column + 0.8 * half):
        scene.box(lamp - 0.17 * half, lamp + 0.17 * half, ground - 0.8 * size, ground - 0.6 * size, tail_light, CAR, z)
