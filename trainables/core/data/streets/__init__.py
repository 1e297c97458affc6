"""Streets: the embedded benchmark, a procedural generator of driving scenes in two looks, in two editions.

Streets_v1, the default, has eight classes and a shift that is mostly one of colour; it lies in `v1`. The rest is
streets_v2, the second edition. Its source is a flat-shaded render of a straight street in clear weather. Its target
differs in four parts, each with a strength: geometry (camera and street plan), content (class balance, variants that
the source never shows), rendering (textures, shadows, wet roads, blur, noise, JPEG) and weather (fog, low sun, dusk).

An image depends on the seed, its domain, split and index, the size, the edition and the strengths, and on nothing
else. One of streets_v2 is the same on every processor: what draws it uses sums, products, roots, comparisons and
look-ups alone, none of the functions that processors round differently.

Lengths in the scene are metres; x points right from the camera's axis and z along the street. H x W is the image.
"""

from segadapt.trainables.core.data.streets.config import CLASSES, StreetsConfig
from segadapt.trainables.core.data.streets.images import (
    StreetsImages,
    StreetsTargetImages,
    labelled_streets,
    load_streets,
)

__all__ = [
    "CLASSES",
    "StreetsConfig",
    "StreetsImages",
    "StreetsTargetImages",
    "labelled_streets",
    "load_streets",
]
