"""The two sides of the street: houses, hedges and open plots along a road that may bend."""

from dataclasses import dataclass

import numpy as np

from segadapt.trainables.core.data.streets.config import BUILDING, VEGETATION
from segadapt.trainables.core.data.streets.domains import Floats, Mask, floats
from segadapt.trainables.core.data.streets.noise import noise_table, read_noise
from segadapt.trainables.core.data.streets.palette import pick
from segadapt.trainables.core.data.streets.scene import GLASS, LEAF, WALL, Conditions, Scene

STREET_END = 80.0

_PLOTS = 12  # of each side

OPEN, HEDGE, HOUSE = range(3)


@dataclass(frozen=True, eq=False)
class Fronts:
    """Plots of both sides, left first; `across` is negative on the left."""

    across: Floats  # (2,), metres from the road's axis
    ends: Floats  # (2, P), z at which each plot ends
    kinds: Floats  # (2 * P,)
    tops: Floats  # (2 * P,), metres
    styles: Floats  # (2 * P, 6): storey height, bay width, window width and height, sill, brick or plaster

    def plot_at(self, side: int, z: Floats) -> Floats:
        """Return the index of the plot at each z, of 2 * P."""
        plots: Floats = np.minimum(np.searchsorted(self.ends[side], z), _PLOTS - 1) + _PLOTS * side
        return plots

    def open_at(self, across: Floats, z: Floats) -> Mask:
        """Return where the ground beyond a front belongs to an open plot; z is (H, 1)."""
        left, right = (self.kinds[self.plot_at(side, z)] == OPEN for side in (0, 1))
        mask: Mask = (across < self.across[0]) & left | (across > self.across[1]) & right
        # A side street is narrower than its plot: its mouth is cut into the sidewalk.
        return mask

    def lit(self, across: Floats, z: Floats, conditions: Conditions) -> Mask:
        """Return where the sun reaches the ground between the houses."""
        side = int(conditions.sun_side > 0)
        away = np.abs(self.across[side] - across)
        # The light comes obliquely along the street: the house that shades lies half as far ahead as it is away.
        z_shading = np.clip((z + np.float32(0.5) * away) * 2, 0, 2 * STREET_END).astype(np.intp)
        metres: Floats = np.arange(int(2 * STREET_END) + 1, dtype=np.float32) / np.float32(2)
        plots = self.plot_at(side, metres)
        heights = np.where(self.kinds[plots] == OPEN, np.float32(0), self.tops[plots])
        mask: Mask = heights[z_shading] < away * np.float32(conditions.sun_slope)
        return mask


def draw_fronts(scene: Scene, across: tuple[float, float]) -> Fronts:
    """Draw the plots of both sides."""
    rng, content = scene.rng, scene.domain.content
    ends = np.cumsum(rng.uniform(6, 15, (2, _PLOTS)), axis=1).astype(np.float32) - np.float32(4)
    chance = rng.random(2 * _PLOTS)
    gaps = scene.domain.geometry.gap_share
    house = gaps + (1 - gaps) * (1 - content.built_share)
    kinds = np.where(chance < gaps, OPEN, np.where(chance < house, HEDGE, HOUSE))
    storeys = np.maximum(rng.poisson(content.storeys, 2 * _PLOTS), 1)
    hedges = rng.uniform(1.4, 3.6, 2 * _PLOTS)
    styles = np.tile(floats((3.0, 3.0, 1.5, 1.6, 0.8, 0.0)), (2 * _PLOTS, 1))
    other = rng.random(2 * _PLOTS) < content.unseen
    drawn = np.stack(
        [
            rng.uniform(2.7, 3.8, 2 * _PLOTS),
            rng.choice((1.8, 2.4, 4.0, 6.0), 2 * _PLOTS),
            rng.uniform(0.4, 0.9, 2 * _PLOTS),
            rng.uniform(1.0, 2.5, 2 * _PLOTS),
            rng.uniform(0.2, 1.0, 2 * _PLOTS),
            rng.integers(0, 2, 2 * _PLOTS),
        ],
        axis=1,
    ).astype(np.float32)
    drawn[:, 2] *= drawn[:, 1]
    styles[other] = drawn[other]
    tops = np.where(kinds == HOUSE, np.float32(0.6) + styles[:, 0] * (1 + storeys), hedges).astype(np.float32)
    return Fronts(floats(across), ends, kinds.astype(np.float32), tops, styles)


def paint_street_end(scene: Scene) -> None:
    """Close the street with a far row of houses and trees."""
    rng, camera = scene.rng, scene.camera
    _, ground, scale = camera.project(0, STREET_END)
    count = scene.width // 8 + 1
    built = np.repeat(rng.random(count) < 0.5, 8)[: scene.width]
    steps = np.repeat(rng.uniform(5, 11, count), 8)[: scene.width]
    wood = 6 + 1.2 * read_noise(noise_table(16, 4), scene.columns[0] * 2, floats(rng.uniform(0, 256)))
    top = ground - np.float32(scale) * np.where(built, steps, wood).astype(np.float32)[None, :]
    mask = (scene.rows < ground) & (scene.rows > top)
    place = (floats(STREET_END), scene.columns / floats(scale), scene.rows / floats(scale))
    scene.surface(mask & ~built, pick(rng, "leaf"), VEGETATION, LEAF, place)
    scene.surface(mask & built, pick(rng, "wall"), BUILDING, WALL, place)


def paint_fronts(scene: Scene, fronts: Fronts) -> None:
    """Paint both sides, the walls that close open plots first."""
    _paint_end_walls(scene, fronts)
    depths = [_depth(scene, float(across)) for across in fronts.across]
    nearest = np.argmin([depth.min() for depth in depths])
    for side in (1 - int(nearest), int(nearest)):
        _paint_side(scene, fronts, side, depths[side])


def _depth(scene: Scene, across: float) -> Floats:
    """Return the z at which each column's ray meets a front, (W,); beyond the street's end where it does not."""
    camera = scene.camera
    slope = (scene.columns[0] - np.float32(camera.centre)) / np.float32(camera.focal)
    offset = np.float32(across + camera.offset)
    # offset + bend z² = slope z, solved without dividing by the bend, which may be 0.
    root = np.sqrt(np.maximum(slope * slope - 4 * np.float32(camera.bend) * offset, 0))
    met = slope * slope - 4 * np.float32(camera.bend) * offset >= 0
    tiny = np.float32(1e-6)
    first, second = 2 * offset / (slope + root + tiny), 2 * offset / (slope - root + tiny)
    beyond = np.float32(1e4)
    first, second = (np.where(met & (z > 0.5), z, beyond) for z in (first, second))
    nearest: Floats = np.minimum(first, second)
    return nearest


def _paint_end_walls(scene: Scene, fronts: Fronts) -> None:
    """Paint the walls that face the camera where a house or hedge stands behind an open plot, from far to near."""
    camera = scene.camera
    walls = []
    for side in (0, 1):
        for plot in range(1, _PLOTS):
            index = plot + _PLOTS * side
            if fronts.kinds[index] != OPEN and fronts.kinds[index - 1] == OPEN:
                walls.append((float(fronts.ends[side, plot - 1]), side, index))
    for z, side, index in sorted(walls, key=lambda wall: -wall[0]):
        if not 2 < z < STREET_END:
            continue
        column, ground, scale = camera.project(float(fronts.across[side]), z)
        further, _, _ = camera.project(float(fronts.across[side]) + (-14 if side == 0 else 14), z)
        rows, columns = scene.window(
            min(column, further), max(column, further), ground - fronts.tops[index] * scale, ground
        )
        mask = np.zeros((scene.height, scene.width), np.bool_)
        mask[rows, columns] = True
        house = fronts.kinds[index] == HOUSE
        colour = pick(scene.rng, "wall" if house else "leaf", scene.domain.content.unseen) * np.float32(0.85)
        place = (
            floats(z),
            (scene.columns - np.float32(column)) / np.float32(scale) + 512,
            (np.float32(ground) - scene.rows) / np.float32(scale),
        )
        scene.surface(mask, colour, BUILDING if house else VEGETATION, WALL if house else LEAF, place)


def _paint_side(scene: Scene, fronts: Fronts, side: int, z: Floats) -> None:
    """Paint the front of one side; z of each column is (W,)."""
    rng, camera, content = scene.rng, scene.camera, scene.domain.content
    scale = np.float32(camera.focal) / z  # pixels per metre
    level = np.float32(camera.height) + (np.float32(camera.horizon) - scene.rows) / scale  # (H, W), above the ground
    shown = fronts.plot_at(side, z)
    kinds, top = fronts.kinds[shown], fronts.tops[shown]
    lit_side = (side == 0) == (scene.conditions.sun_side > 0)
    light = np.float32(1.0 if lit_side else 0.84)
    hedge_top = top + floats(0.35) * read_noise(noise_table(32, 3), z * 12, floats(side * 40)) * (kinds == HEDGE)
    visible = (z < STREET_END) & (level > 0) & (level < hedge_top) & (kinds != OPEN)
    walls = (
        np.stack(
            [
                pick(rng, "wall" if kind == HOUSE else "leaf", content.unseen)
                for kind in fronts.kinds[_PLOTS * side : _PLOTS * (side + 1)]
            ]
        )
        * light
    )
    colours = walls[shown - _PLOTS * side].T.astype(np.float32)[:, None]  # (3, 1, W)
    place = (z, z + 64, level)
    scene.surface(visible & (kinds == HEDGE), colours, VEGETATION, LEAF, place)
    houses = visible & (kinds == HOUSE)
    scene.surface(houses, colours, BUILDING, WALL, place)
    _paint_facade(scene, fronts.styles[shown].T, houses, z, level, top)
    if not lit_side and scene.domain.rendering.shadow > 0 and not scene.conditions.dusk:
        scene.darken(visible, 1 - 0.5 * scene.domain.rendering.shadow)


def _paint_facade(scene: Scene, styles: Floats, houses: Mask, z: Floats, level: Floats, top: Floats) -> None:
    """Paint the ground floor, windows, eaves and a roof, and what clutters a front."""
    rng, content = scene.rng, scene.domain.content
    storey_height, bay_width, window_width, window_height, sill, bricks = styles
    along = (z + np.float32(rng.uniform(0, 3))) % bay_width
    pane = (along > 0.5 * (bay_width - window_width)) & (along < 0.5 * (bay_width + window_width)) & (z < 55)
    above = level - np.float32(0.6)
    storey = above % storey_height
    upstairs = (above > storey_height) & (level < top - 0.5)
    ground_floor = above < storey_height
    shops = ground_floor & (read_noise(noise_table(16, 1), z * 1.2, floats(rng.uniform(0, 200))) > 0)
    scene.tint(houses & shops, pick(rng, "shop", content.unseen))
    windows = pane & (storey > sill) & (storey < sill + window_height) & (upstairs | ground_floor & (level > 0.6))
    glass = pick(rng, "glass")
    scene.tint(houses & windows, glass, GLASS)
    if content.clutter > 0:
        # Reflections of the sky in some panes, curtains in others.
        panes = read_noise(noise_table(128, 1), np.floor(z / bay_width) * 7 + 40, np.floor(above / storey_height) * 11)
        scene.tint(houses & windows & (panes > 0.7), pick(rng, "horizon") * np.float32(0.85))
        scene.tint(houses & windows & (panes < -0.9), pick(rng, "plate") * np.float32(0.8))
        balconies = houses & upstairs & (storey < 0.9) & (bay_width > 3.5) & (bricks > 0)
        scene.tint(balconies & ((z % 0.3) < 0.16), pick(rng, "metal", content.unseen))
        if rng.random() < 0.7 * content.clutter:
            boards = houses & shops & (above > storey_height - 0.7) & (z % 9 < 5)
            scene.tint(boards, pick(rng, ("awning", "board", "top")[int(rng.integers(3))], content.unseen))
    frames = houses & windows & ((along % (0.5 * window_width + 0.01)) < 0.07) & (z < 25)
    scene.tint(frames, pick(rng, "plate") * np.float32(0.9))
    scene.darken(houses & (level > top - 0.35), 0.72)
