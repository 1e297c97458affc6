"""What stands and moves on a street: trees, poles, lights, signs, people, bicycles, cars."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from segadapt.trainables.core.data.streets import sprites
from segadapt.trainables.core.data.streets.config import POLE, VEGETATION
from segadapt.trainables.core.data.streets.domains import Floats, floats
from segadapt.trainables.core.data.streets.noise import noise_table, read_noise
from segadapt.trainables.core.data.streets.palette import pick
from segadapt.trainables.core.data.streets.scene import BODY, LEAF, Lamp, Scene
from segadapt.trainables.core.data.streets.sprites import PART_NAMES, Sprite


def _coloured(scene: Scene, sprite: Sprite, materials: dict[str, str] | None = None) -> Floats:
    """Draw a colour for each part of a sprite, (K, 3).

    `materials` names the material of a part, where the two are not called the same.
    """
    colours = np.zeros((len(PART_NAMES), 3), np.float32)
    for part in sprite.shown:
        material = (materials or {}).get(part, part)
        colours[PART_NAMES.index(part)] = pick(scene.rng, material, scene.domain.content.unseen)
    return colours


def _one_of(scene: Scene, common: Sequence[str], unseen: Sequence[str]) -> str:
    """Draw a variant, perhaps one that the source never shows."""
    variants = unseen if scene.rng.random() < scene.domain.content.unseen else common
    return variants[int(scene.rng.integers(len(variants)))]


def shade_ground(scene: Scene, across: float, z: float, half_width: float, depth: float) -> None:
    """Darken the ground below and beside an object: all light is kept out below it, the sun's beside it."""
    shadow = scene.domain.rendering.shadow
    column, _, scale = scene.camera.project(across, z)
    far, near = scene.camera.project(across, z + depth)[1], scene.camera.project(across, max(z - 0.4, 1.5))[1]
    reach = 0.0 if scene.conditions.dusk else -scene.conditions.sun_side * min(1.4 / scene.conditions.sun_slope, 4.0)
    for shift, factor in ((0.0, 1 - 0.5 * max(shadow, 0.3)), (reach if shadow > 0 else 0.0, 1 - shadow)):
        left, right = column - half_width * scale, column + half_width * scale
        left, right = min(left, left + shift * scale), max(right, right + shift * scale)
        rows, columns = scene.window(left, right, far, near)
        if rows.start >= rows.stop or columns.start >= columns.stop:
            continue
        x, y = (left + right) / 2, (far + near) / 2
        half_x, half_y = max((right - left) / 2, 1), max((near - far) / 2, 1)
        inside = ((scene.rows[rows] - np.float32(y)) / np.float32(half_y)) ** 2 + (
            (scene.columns[:, columns] - np.float32(x)) / np.float32(half_x)
        ) ** 2 < 1
        # Only what lies on the ground is shaded: surfaces behind the object are further than the ground here.
        flat = inside & (scene.distance[rows, columns] < z + depth + 6) & (scene.labels[rows, columns] < 2)
        scene.colours[:, rows, columns] *= np.where(flat, np.float32(factor), np.float32(1))


def _paint_bar(scene: Scene, box: tuple[float, float, float, float], colour: Floats, label: int, z: float) -> None:
    """Paint an upright or lying bar, as a cylinder: lighter in its middle where objects are shaded."""
    rows, columns = scene.window(*box)
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    scene.colours[:, rows, columns] = colour[:, None, None]
    scene.labels[rows, columns] = label
    scene.distance[rows, columns] = z
    scene.materials[rows, columns] = BODY


def paint_tree(scene: Scene, across: float, z: float) -> None:
    """Paint a tree: round in the source, also conical, tall or bushy ones in the target."""
    rng = scene.rng
    shade_ground(scene, across, z, 1.6, 2.5)
    column, ground, scale = scene.camera.project(across, z)
    size = rng.uniform(0.8, 1.25) * scale
    shape = _one_of(scene, ("round",), ("cone", "column", "wide", "bush"))
    half_width, half_height, middle = {
        "round": (2.0, 1.8, 4.3),
        "cone": (1.7, 3.0, 4.0),
        "column": (1.0, 2.9, 4.0),
        "wide": (3.2, 1.7, 5.2),
        "bush": (1.7, 1.2, 1.2),
    }[shape]
    unseen = scene.domain.content.unseen
    half_trunk = max(rng.uniform(0.1, 0.2) * size, 0.5)
    trunk = pick(rng, "trunk", unseen)
    _paint_bar(scene, (column - half_trunk, column + half_trunk, ground - middle * size, ground), trunk, VEGETATION, z)
    half_x, half_y, y = half_width * size, half_height * size, ground - middle * size
    rows, columns = scene.window(column - 1.3 * half_x, column + 1.3 * half_x, y - 1.3 * half_y, y + 1.3 * half_y)
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    dx = (scene.columns[:, columns] - np.float32(column)) / np.float32(half_x)
    dy = (scene.rows[rows] - np.float32(y)) / np.float32(half_y)
    u = (scene.columns[:, columns] - np.float32(column)) / np.float32(scale) + np.float32(64 + rng.uniform(0, 64))
    v = (scene.rows[rows] - np.float32(y)) / np.float32(scale) + 64
    ragged = np.float32(0.12 + 0.26 * min(scene.domain.rendering.texture, 1))
    edge = 1 + ragged * read_noise(noise_table(32, 4), u * 9, v * 9)
    width = np.clip(0.5 + 0.5 * dy, 0.02, 1) if shape == "cone" else np.float32(1)
    inside = (dx / width) ** 2 + dy * dy < edge
    leaf = pick(rng, "leaf", unseen)
    depth = np.clip(1 - 0.28 * dy - 0.12 * np.float32(scene.conditions.sun_side) * -dx, 0.5, 1.35)
    np.copyto(scene.colours[:, rows, columns], leaf[:, None, None] * depth, where=inside)
    np.copyto(scene.labels[rows, columns], np.uint8(VEGETATION), where=inside)
    np.copyto(scene.distance[rows, columns], np.float32(z), where=inside)
    np.copyto(scene.materials[rows, columns], np.uint8(LEAF), where=inside)
    np.copyto(scene.texture_u[rows, columns], u, where=inside)
    np.copyto(scene.texture_v[rows, columns], v, where=inside)


def _paint_post(scene: Scene, across: float, z: float, height: float) -> tuple[float, float, float, Floats]:
    """Paint the post that carries something; return its column, the row of its top, pixels per metre and its colour."""
    rng = scene.rng
    column, ground, scale = scene.camera.project(across, z)
    half = max(rng.uniform(0.06, 0.1) * scale, 0.7 * scene.pixel)
    metal = pick(rng, "metal", scene.domain.content.unseen)
    _paint_bar(scene, (column - half, column + half, ground - height * scale, ground), metal, POLE, z)
    return column, ground - height * scale, scale, metal


def paint_pole(scene: Scene, across: float, z: float) -> None:
    """Paint a street lamp with an arm over the road, or a mast with wires' cross-arms or a bollard in the target."""
    rng = scene.rng
    kind = _one_of(scene, ("lamp",), ("lantern", "mast", "bollard"))
    height = {"lamp": rng.uniform(5, 7), "lantern": rng.uniform(3, 4), "mast": rng.uniform(7, 9), "bollard": 1.0}[kind]
    column, top, scale, metal = _paint_post(scene, across, z, height)
    inwards = -1.0 if across > 0 else 1.0
    thick = max(0.1 * scale, 0.8 * scene.pixel)
    if kind == "lamp":
        reach = column + inwards * 1.6 * scale
        _paint_bar(scene, (min(column, reach), max(column, reach), top, top + thick), metal, POLE, z)
        head = (reach - 0.35 * scale, reach + 0.35 * scale, top, top + 1.5 * thick)
        _paint_bar(scene, head, pick(rng, "lamp"), POLE, z)
        _glow(scene, reach, top + thick, 0.5 * scale)
    elif kind == "lantern":
        head = (column - 0.22 * scale, column + 0.22 * scale, top - 0.5 * scale, top)
        _paint_bar(scene, head, pick(rng, "lamp"), POLE, z)
        _glow(scene, column, top - 0.25 * scale, 0.5 * scale)
    elif kind == "mast":
        for level in (0.3, 0.9):
            arm = (column - 0.9 * scale, column + 0.9 * scale, top + level * scale, top + level * scale + thick)
            _paint_bar(scene, arm, metal, POLE, z)


def _glow(scene: Scene, column: float, row: float, radius: float) -> None:
    if scene.conditions.dusk:
        scene.lamps.append(Lamp(column, row, max(radius, 2 * scene.pixel), floats((1.0, 0.86, 0.6))))


def paint_light(scene: Scene, across: float, z: float) -> None:
    """Paint a traffic light on its post; in the target some hang over the road."""
    rng = scene.rng
    stack = _one_of(scene, ("upright",), ("lying", "pedestrian", "upright"))
    height = rng.uniform(2.6, 3.4) if stack != "lying" else 5.0
    column, top, scale, metal = _paint_post(scene, across, z, height)
    sprite = sprites.traffic_light(stack)
    if stack == "lying":
        thick = max(0.1 * scale, 0.8 * scene.pixel)
        reach = column + (-3.0 if across > 0 else 3.0) * scale
        _paint_bar(scene, (min(column, reach), max(column, reach), top, top + thick), metal, POLE, z)
        column = reach
    lens = ("red", "green", "amber")[int(rng.integers(3))]
    enlarged = max(1.25, 3.0 * scene.pixel / (sprite.width * scale))
    half, tall = 0.5 * enlarged * sprite.width * scale, enlarged * sprite.height * scale
    box = (column - half, column + half, top - 0.5 * tall, top + 0.5 * tall)
    colours = _coloured(scene, sprite, {"lens": lens})
    scene.paste(sprite, box, colours, z)
    if scene.domain.weather.dusk > 0:
        scene.lamps.append(Lamp(column, top, max(0.2 * scale, scene.pixel), colours[PART_NAMES.index("lens")]))


def paint_sign(scene: Scene, across: float, z: float) -> None:
    """Paint a traffic sign on its post."""
    shape = _one_of(scene, ("round", "triangle", "square"), ("octagon", "diamond", "wide"))
    column, top, scale, _ = _paint_post(scene, across, z, scene.rng.uniform(2.1, 2.8))
    sprite = sprites.sign(shape)
    enlarged = max(1.15, 4.0 * scene.pixel / (sprite.width * scale))
    half, tall = 0.5 * enlarged * sprite.width * scale, enlarged * sprite.height * scale
    scene.paste(sprite, (column - half, column + half, top - 0.3 * tall, top + 0.7 * tall), _coloured(scene, sprite), z)


_MATERIALS = {"bicycle tyre": "tyre"}


def _stand(scene: Scene, sprite: Sprite, across: float, z: float, size: float) -> None:
    """Paint a sprite that stands on the ground."""
    colours = _coloured(scene, sprite, _MATERIALS)
    column, ground, scale = scene.camera.project(across, z)
    half, tall = 0.5 * sprite.width * size * scale, sprite.height * size * scale
    mirrored = bool(scene.rng.random() < 0.5)
    scene.paste(sprite, (column - half, column + half, ground - tall, ground), colours, z, mirrored)


def paint_person(scene: Scene, across: float, z: float) -> None:
    """Paint somebody on foot."""
    stance = _one_of(scene, ("standing", "walking"), ("carrying", "coat", "child"))
    shade_ground(scene, across, z, 0.3, 0.5)
    _stand(scene, sprites.person(stance), across, z, scene.rng.uniform(0.94, 1.1))


def paint_cyclist(scene: Scene, across: float, z: float) -> None:
    """Paint somebody on a bicycle."""
    view = _one_of(scene, ("back", "side"), ("side",))
    shade_ground(scene, across, z, 0.5, 0.6)
    _stand(scene, sprites.bicycle(view, ridden=True), across, z, 1.05)


def paint_bicycle(scene: Scene, across: float, z: float) -> None:
    """Paint a parked bicycle."""
    shade_ground(scene, across, z, 0.7, 0.4)
    _stand(scene, sprites.bicycle("side", ridden=False), across, z, 1.05)


def paint_parked_car(scene: Scene, across: float, z: float) -> None:
    """Paint a parked car from behind."""
    _paint_car(scene, across, z, front=False, lamps=False)


def paint_driving_car(scene: Scene, across: float, z: float) -> None:
    """Paint a driving car: those on the left come towards the camera."""
    if scene.rng.random() < 0.25 * scene.domain.content.unseen:  # it crosses
        shape = ("saloon", "van", "suv")[int(scene.rng.integers(3))]
        shade_ground(scene, across, z, 2.2, 1.5)
        _stand(scene, sprites.car_flank(shape), across, z, 1.0)
        return
    _paint_car(scene, across, z, front=across < 0, lamps=True)


def _paint_car(scene: Scene, across: float, z: float, *, front: bool, lamps: bool) -> None:
    """Paint a car with its visible flank: the same shape a length further on, and all between the two."""
    camera = scene.camera
    shape = _one_of(scene, ("saloon", "hatchback"), ("suv", "van", "pickup", "truck"))
    sprite, inside = sprites.car(shape, "front" if front else "back"), sprites.car(shape, "slice")
    length = {"van": 4.8, "truck": 6.0}.get(shape, 3.8)
    shade_ground(scene, across, z, 0.55 * sprite.width, length)
    colours = _coloured(scene, sprite)
    flank = colours.copy()
    flank[PART_NAMES.index("car")] *= np.float32(0.78)
    near, far = camera.project(across, z), camera.project(across, z + length)
    edges = abs(near[0] - far[0]) + 0.5 * sprite.width * (near[2] - far[2])
    slices = min(12, max(2, math.ceil(edges / (2 * scene.pixel))))
    for step in range(slices, -1, -1):
        column, ground, scale = camera.project(across, z + length * step / slices)
        half, tall = 0.5 * sprite.width * scale, sprite.height * scale
        # The wheels of both axles show, not all along the flank.
        shown = sprite if step in (0, slices - 1) else inside
        scene.paste(shown, (column - half, column + half, ground - tall, ground), flank if step else colours, z)
    if lamps and scene.conditions.dusk:
        column, ground, scale = near
        colour = floats((1.0, 0.95, 0.82)) if front else floats((1.0, 0.15, 0.1))
        for side in (-1, 1):
            place = column + side * 0.36 * sprite.width * scale
            scene.lamps.append(Lamp(place, ground - 0.7 * scale, max(0.28 * scale, scene.pixel), colour, floods=front))


Painter = Callable[[Scene, float, float], None]
