"""The photograph of a scene: grain, haze, light, blur, noise."""

import numpy as np

from segadapt.trainables.core.data.streets.v1.domains import Bytes, Floats, Optics, Palette
from segadapt.trainables.core.data.streets.v1.scene import Scene

_TEXTURE = np.array([0.02, 0.03, 0.03, 0.02, 0.11, 0.0, 0.03, 0.02], np.float32)
"""Standard deviation of the grain of each class's surface."""


def photograph(rng: np.random.Generator, scene: Scene, optics: Optics, palette: Palette) -> Bytes:
    """Return the scene as the domain's camera sees it, (3, H, W): grain, haze, light, blur, noise."""
    height, width = scene.labels.shape
    grain = rng.standard_normal((height, width), np.float32) * (2 * optics.texture * _TEXTURE)[scene.labels]
    haze = palette["haze"][0]
    clear = np.exp(np.float32(-optics.haze * rng.uniform(0.7, 1.3)) * scene.distance)
    picture = haze + clear * (scene.colours * (1 + grain) - haze)

    radius = (scene.rows / height - 0.5) ** 2 + (scene.columns / width - 0.5) ** 2
    gain = optics.gain * (1 + optics.gain_spread * rng.standard_normal())
    exposure = np.float32(gain) * (1 - np.float32(2 * optics.vignette) * radius)
    contrast = np.float32(optics.contrast)
    picture = (contrast * picture + 0.5 * (1 - contrast)) * exposure * palette["light"][0]
    grey = picture.mean(axis=0)
    picture = grey + np.float32(optics.saturation) * (picture - grey)

    picture = _blur(picture, optics.blur * height / 64)
    picture += np.float32(optics.noise) * rng.standard_normal(picture.shape, np.float32)
    developed: Bytes = np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)
    return developed


def _blur(picture: Floats, sigma: float) -> Floats:
    """Blur (3, H, W) with a Gaussian of `sigma` pixels; the border repeats its edge."""
    reach = int(np.ceil(2 * sigma))
    if reach == 0:
        return picture
    _, height, width = picture.shape
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    padded = np.pad(picture, [(0, 0), (reach, reach), (reach, reach)], mode="edge")
    upright = np.zeros_like(padded[:, :height])
    for start, weight in enumerate(weights):
        upright += weight * padded[:, start : start + height]
    blurred = np.zeros_like(picture)
    for start, weight in enumerate(weights):
        blurred += weight * upright[:, :, start : start + width]
    return blurred
