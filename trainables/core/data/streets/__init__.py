"""Streets: the embedded benchmark, a procedural generator of driving scenes in two looks.

The source domain is a clean, sunny render. The target domain has another palette, weather, camera and street plan:
haze, blur, sensor noise, narrower roads, taller houses, more people. `StreetsConfig.shift` scales the distance between
the two. An image depends on the seed, its domain, split and index, the size and the shift, and on nothing else.

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
