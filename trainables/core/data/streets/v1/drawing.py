"""Drawing images of the first edition."""

from collections.abc import Callable

import numpy as np

from segadapt.trainables.core.data.streets.v1.domains import (
    SOURCE_LAYOUT,
    SOURCE_OPTICS,
    TARGET_LAYOUT,
    TARGET_OPTICS,
    Bytes,
    blend,
    blend_palettes,
)
from segadapt.trainables.core.data.streets.v1.painting import paint_street
from segadapt.trainables.core.data.streets.v1.photography import photograph


def drawing_v1(shift: float, height: int, width: int) -> Callable[[np.random.Generator], tuple[Bytes, Bytes]]:
    """Return what draws an image, (3, H, W), and its labels, (H, W), of a domain from a random stream.

    Args:
        shift: Distance of the domain from the source, which is 0.
        height: Of the image in pixels.
        width: Of the image in pixels.
    """
    layout = blend(SOURCE_LAYOUT, TARGET_LAYOUT, shift)
    optics = blend(SOURCE_OPTICS, TARGET_OPTICS, shift)
    palette = blend_palettes(shift)

    def draw(rng: np.random.Generator) -> tuple[Bytes, Bytes]:
        scene = paint_street(rng, layout, palette, height, width)
        return photograph(rng, scene, optics, palette), scene.labels

    return draw
