"""Colours of materials: those that both domains show, and those that the source never does."""

from collections.abc import Mapping

import numpy as np

from segadapt.trainables.core.data.streets.domains import Floats


def _colours(hexadecimal: str) -> Floats:
    """Return colours, (K, 3) in [0, 1]."""
    values = [[int(text[i : i + 2], 16) / 255 for i in (0, 2, 4)] for text in hexadecimal.split()]
    return np.array(values, np.float32)


COMMON: Mapping[str, Floats] = {
    "sky": _colours("6aa3dd 85b4e4"),
    "horizon": _colours("cfe2f2 dbe7ee"),
    "asphalt": _colours("5c5d62 66656a 525358"),
    "paint": _colours("e9e9e2"),
    "paving": _colours("a79f95 9f9892 b1a89a"),
    "kerb": _colours("c3beb6"),
    "wall": _colours("b06a52 cdb08c 9c5440 c4a482 8d6d5c"),
    "shop": _colours("66503f 5a5049"),
    "roof": _colours("6e4a40 5c5450"),
    "glass": _colours("566f84 67869a"),
    "leaf": _colours("47862f 5a9440 3a7538"),
    "trunk": _colours("65492f"),
    "metal": _colours("33373d 43474d"),
    "lamp": _colours("efe8bd"),
    "box": _colours("1d2024"),
    "red": _colours("ea2f26"),
    "amber": _colours("e8a41e"),
    "green": _colours("35d06a"),
    "rim": _colours("c8242a"),
    "plate": _colours("f0f0ec"),
    "board": _colours("2452b0"),
    "skin": _colours("dcae8c a5704c"),
    "hair": _colours("3a2a20"),
    "top": _colours("cc4432 dfb632 3a66c2 dcd8d2"),
    "legs": _colours("28324c 3c3632"),
    "bag": _colours("6d3a2c"),
    "frame": _colours("202428 9a2a2a 2a5a9a"),
    "car": _colours("b8262a 2a50a4 dcdcde 33353a"),
    "trim": _colours("1e2023"),
    "tyre": _colours("151517"),
    "tail": _colours("e02a20"),
    "head": _colours("f2efd8"),
    "number": _colours("d8d8cc"),
    "awning": _colours("b03a30 3a7a58"),
}
"""Colours of each material, (K, 3)."""

UNSEEN: Mapping[str, Floats] = {
    "asphalt": _colours("6f6a64 4a4d52 75747a"),
    "paving": _colours("8c8a88 c0aa92 96887e"),
    "wall": _colours("8f9496 d8d2c4 6f7f8e a6b09c 5a5654 d9c25f"),
    "shop": _colours("2e3c4a 8a8478 a03030"),
    "roof": _colours("8a4a36 3d4650"),
    "leaf": _colours("7c8a34 a8862c 2f5e46 6d7f4a a0572a"),
    "trunk": _colours("8a8478"),
    "metal": _colours("8a9094 5e6c5a b8b4a8"),
    "top": _colours("2a2d33 6a7a4a 8a4a8c 50a0b0"),
    "legs": _colours("7a7468 a8b0b8"),
    "hair": _colours("b89048 8a8a8a"),
    "car": _colours("d0a21e 5a6a58 8a8f96 e06a1c 3a8a90"),
    "board": _colours("1f7a3c e0b020"),
    "bag": _colours("2a6a8a"),
    "awning": _colours("d0b040 5a4a8a d8d8d8"),
}
"""Colours that the source never shows."""


def pick(rng: np.random.Generator, material: str, unseen: float = 0.0, spread: float = 0.05) -> Floats:
    """Draw a colour of a material, (3,), with a little variation in brightness.

    Args:
        rng: The scene's random stream.
        material: A key of `COMMON`.
        unseen: Probability of a colour that the source never shows, where the material has such.
        spread: Standard deviation of the brightness, as a share.
    """
    colours = COMMON[material]
    if unseen > 0 and rng.random() < unseen:
        colours = UNSEEN.get(material, colours)
    colour: Floats = colours[int(rng.random() * len(colours))]
    return colour * np.float32(1 + spread * rng.standard_normal())
