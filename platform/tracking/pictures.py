"""Pictures of evaluations."""

from collections.abc import Sequence
from typing import Any

_CELL = 40
"""Pixels of a cell of a confusion matrix."""

_NAME = 40
"""Characters of a class's name that are shown at most."""


def confusion_picture(confusion: Sequence[Sequence[int]], classes: Sequence[str], title: str) -> Any:
    """Draw a confusion matrix, each row (true class) as shares of its pixels; returns a PIL image.

    Each trial has two of them: matplotlib would take over ten times as long.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    counts = np.asarray(confusion, dtype=float)
    rows = counts.sum(1, keepdims=True)
    shares = np.divide(counts, rows, out=np.zeros_like(counts), where=rows > 0)
    classes = [name if len(name) <= _NAME else f"{name[: _NAME - 1]}…" for name in classes]
    font, small = ImageFont.load_default(15), ImageFont.load_default(11)
    names = int(max(font.getlength(name) for name in classes))
    left, top, side = names + 50, 40, _CELL * len(classes)
    picture = Image.new("RGB", (max(left + side + 20, 360), top + side + names + 40), "white")
    white, blue = np.array((247, 251, 255)), np.array((8, 48, 107))
    colors = (white + shares[..., None] * (blue - white)).astype(np.uint8)
    picture.paste(Image.fromarray(colors).resize((side, side), Image.Resampling.NEAREST), (left, top))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left - 1, top - 1, left + side, top + side), outline="black")
    draw.text((picture.width / 2, 20), f"{title}: share of each true class", "black", font, anchor="mm")
    draw.text((left + side / 2, picture.height - 15), "prediction", "black", font, anchor="mm")
    picture.paste(_turned("truth", font, 90), (5, top + side // 2 - 20))
    for row, name in enumerate(classes):
        middle = int((row + 0.5) * _CELL)
        draw.text((left - 8, top + middle), name, "black", font, anchor="rm")
        turned = _turned(name, font, 45)
        picture.paste(turned, (left + middle + 8 - turned.width, top + side + 6), ImageOps.invert(turned.convert("L")))
        for column in range(len(classes)):
            share = shares[row, column]
            if share >= 0.005:
                place = left + (column + 0.5) * _CELL, top + middle
                draw.text(place, f"{share:.2f}", "white" if share > 0.5 else "black", small, anchor="mm")
    return picture


def _turned(text: str, font: Any, degrees: int) -> Any:
    """Return an image of a text, turned against the clock."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (int(font.getlength(text)) + 4, 20), "white")
    ImageDraw.Draw(image).text((2, 10), text, "black", font, anchor="lm")
    return image.rotate(degrees, Image.Resampling.BICUBIC, expand=True, fillcolor="white")
