"""The photograph of a scene: textures, wet roads, lamps, fog, glare, blur, noise and JPEG."""

import io
import math

import numpy as np
from PIL import Image

from segadapt.trainables.core.data.streets.config import SKY
from segadapt.trainables.core.data.streets.domains import Bytes, Floats, floats
from segadapt.trainables.core.data.streets.noise import noise_table, read_noise
from segadapt.trainables.core.data.streets.scene import FAR, Scene

# By material: sky, asphalt, paving, wall, glass, leaf, body.
_FINE = np.array([0.0, 0.13, 0.11, 0.09, 0.06, 0.26, 0.05], np.float32)
_COARSE = np.array([0.0, 0.10, 0.10, 0.13, 0.10, 0.16, 0.05], np.float32)
_CELLS = np.array([1.0, 24.0, 16.0, 12.0, 10.0, 14.0, 20.0], np.float32)
"""Strength of fine and coarse texture, and cells of the noise per metre."""

_STEPS_PER_METRE = 4

_HAZE = np.array((0.80, 0.83, 0.86), np.float32)


def photograph(scene: Scene) -> Bytes:
    """Return the scene as the domain's camera sees it, (3, H, W)."""
    _texture(scene)
    _wet(scene)
    picture = scene.colours
    if scene.conditions.dusk:
        picture = picture * floats((0.5, 0.5, 0.6))[:, None, None]
        picture = _flood(scene, picture)
    picture = _fog(scene, picture)
    picture = _glare(scene, picture)
    picture = _blurred(scene, picture)
    noise = np.float32(scene.domain.rendering.noise * scene.rng.uniform(0.4, 1.6))
    picture = picture + noise * scene.rng.standard_normal(picture.shape, np.float32)
    developed = np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)
    return _compressed(scene, developed)


def _texture(scene: Scene) -> None:
    """Roughen surfaces, each material by its own grain; far away it averages out."""
    strength = np.float32(scene.domain.rendering.texture)
    if strength == 0:
        return
    cells = _CELLS[scene.materials]
    offset = np.float32(scene.rng.integers(256))
    u, v = scene.texture_u * cells + offset, scene.texture_v * cells + offset
    fade = np.minimum(np.float32(1), np.float32(14) / scene.distance)
    fine = _FINE[scene.materials] * fade * read_noise(noise_table(128, 2), u, v)
    coarse = _COARSE[scene.materials] * read_noise(noise_table(16, 3), u * np.float32(0.4), v * np.float32(0.4))
    scene.colours *= np.clip(1 + strength * (fine + coarse), 0.2, 1.9)


def _wet(scene: Scene) -> None:
    """Mirror in a wet road what stands behind it; puddles mirror more."""
    wet = np.float32(scene.conditions.wet)
    if wet == 0:
        return
    flat = scene.labels < 2
    last = np.maximum.accumulate(np.where(flat, -1, np.arange(scene.height)[:, None]), axis=0)
    mirrored = np.clip(2 * last + 1 - np.arange(scene.height)[:, None], 0, scene.height - 1)
    wave = read_noise(noise_table(32, 2), scene.texture_u * 6, scene.texture_v * 6)
    columns = np.clip(np.arange(scene.width) + (wave * scene.pixel).astype(np.intp), 0, scene.width - 1)
    reflection = scene.colours[:, mirrored, columns]
    puddles = np.clip(read_noise(noise_table(16, 3), scene.texture_u * 5, scene.texture_v * 3) + 0.3, 0, 1)
    grazing = np.clip(scene.distance / 30, 0.15, 1)
    share = np.where(flat, wet * (0.3 * grazing + 0.5 * puddles * (0.4 + 0.6 * grazing)), np.float32(0))
    darkened = scene.colours * (1 - np.float32(0.35) * wet * flat)
    scene.colours = darkened + share * (reflection - darkened)


def _flood(scene: Scene, picture: Floats) -> Floats:
    """Add what lamps light: a cone in front of the camera's car, the lamps themselves and the glow about them."""
    camera = scene.camera
    down = (scene.rows - camera.horizon) / scene.height
    aside = (scene.columns - scene.width / 2) / (scene.width * (0.2 + np.clip(down, 0, 1)))
    cone = np.clip(down * 5, 0, 1) / (1 + aside * aside * aside * aside) / (1 + (scene.distance / 22) ** 2)
    beam = 1 + cone * floats((1.0, 0.95, 0.8))[:, None, None]
    picture = picture * beam.astype(np.float32, copy=False)
    for lamp in scene.lamps:
        reach = 6 * lamp.radius + 6 * scene.pixel
        rows, columns = scene.window(lamp.column - reach, lamp.column + reach, lamp.row - reach, lamp.row + reach)
        square = ((scene.rows[rows] - lamp.row) ** 2 + (scene.columns[:, columns] - lamp.column) ** 2) / lamp.radius**2
        glow = np.clip(np.float32(1.3) / (1 + square) - np.float32(0.035), 0, None)
        picture[:, rows, columns] += glow * lamp.colour[:, None, None]
    return picture


def _fog(scene: Scene, picture: Floats) -> Floats:
    """Hide what is far in fog, the sky least towards its zenith."""
    through = round(math.exp(-scene.conditions.fog / _STEPS_PER_METRE), 9)  # one step of air
    clear = np.cumprod(np.full(int(FAR) * _STEPS_PER_METRE + 1, through)).astype(np.float32)
    seen = clear[(np.minimum(scene.distance, FAR) * _STEPS_PER_METRE).astype(np.intp)]
    zenith = np.clip(scene.rows / max(scene.camera.horizon, 1.0), 0.3, 1)
    seen = np.where(scene.labels == SKY, 1 - zenith * (1 - seen), seen)
    haze = _HAZE * np.float32(0.45 if scene.conditions.dusk else 1.0)
    return haze[:, None, None] + seen * (picture - haze[:, None, None])


def _glare(scene: Scene, picture: Floats) -> Floats:
    """Let a low sun shine into the camera: a halo about it and warm light over its side of the picture."""
    if not scene.conditions.low_sun:
        return picture
    rng = scene.rng
    x = scene.width * (0.5 + scene.conditions.sun_side * rng.uniform(0.1, 0.45))
    y = scene.camera.horizon - scene.height * rng.uniform(0.05, 0.25)
    square = ((scene.columns - x) ** 2 + (scene.rows - y) ** 2) / (scene.height * scene.height)
    halo = (np.float32(rng.uniform(0.5, 0.9)) / (1 + 14 * square) - np.float32(0.04)).astype(np.float32, copy=False)
    warm = floats((1.0, 0.9, 0.7))[:, None, None]
    dazzled: Floats = picture * np.float32(0.88) + np.clip(halo, 0, None) * (warm - np.float32(0.45) * picture)
    return dazzled


def _blurred(scene: Scene, picture: Floats) -> Floats:
    """Blur by defocus everywhere, and by motion away from the vanishing point."""
    rendering, rng = scene.domain.rendering, scene.rng
    picture = _gaussian(picture, rendering.defocus * rng.uniform(0.5, 1.5) * scene.pixel)
    reach = round(rendering.motion * 2 * rng.random() * scene.pixel)
    if reach == 0:
        return picture
    moved = picture.copy()
    for step in range(1, reach + 1):
        moved[:, :, step:] += picture[:, :, :-step]
        moved[:, :, :step] += picture[:, :, :1]
    moved /= np.float32(reach + 1)
    # Things beside the camera pass faster than what lies ahead.
    aside = np.clip(np.abs(scene.columns - scene.camera.centre) / (0.35 * scene.width), 0, 1)
    blurred: Floats = picture + aside * (moved - picture)
    return blurred


def _gaussian(picture: Floats, sigma: float) -> Floats:
    """Blur (3, H, W) with a Gaussian of `sigma` pixels; the border repeats its edge."""
    reach = math.ceil(2 * sigma) if sigma > 0.2 else 0
    if reach == 0:
        return picture
    _, height, width = picture.shape
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-reach, reach + 1)]
    padded = np.pad(picture, [(0, 0), (reach, reach), (reach, reach)], mode="edge")
    upright = np.zeros_like(padded[:, :height])
    for start, weight in enumerate(weights):
        upright += np.float32(round(weight / sum(weights), 6)) * padded[:, start : start + height]
    blurred = np.zeros_like(picture)
    for start, weight in enumerate(weights):
        blurred += np.float32(round(weight / sum(weights), 6)) * upright[:, :, start : start + width]
    return blurred


def _compressed(scene: Scene, picture: Bytes) -> Bytes:
    """Return the picture after JPEG."""
    compression = scene.domain.rendering.compression
    if compression == 0:
        return picture
    quality = int(max(10, 96 - compression * scene.rng.uniform(15, 75)))
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(np.moveaxis(picture, 0, 2))).save(file, "JPEG", quality=quality)
    return np.moveaxis(np.asarray(Image.open(file)), 2, 0)
