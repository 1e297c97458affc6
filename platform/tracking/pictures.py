"""Pictures of evaluations."""

import uuid
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

_CELL = 40
"""Pixels of a cell of a confusion matrix."""

_NAME = 40
"""Characters of a class's name that are shown at most."""
_SMALL_SIDE = 256
"""Pixels of the longer side of a gallery as MLflow's page shows it among others."""


def gallery_stem(names: Collection[str], step: int, timestamp: int) -> str:
    """Return how the names of a step's gallery begin in MLflow, which names pictures at random.

    Args:
        names: The pictures that the run has; what is there of the step's is gone on with.
        step: The training step.
        timestamp: When it was recorded, in Unix milliseconds.
    """
    for name in sorted(names):
        if name.startswith(f"gallery+step+{step}+"):
            return name.removesuffix(".webp").removesuffix(".png").removesuffix("+compressed")
    return f"gallery+step+{step}+timestamp+{timestamp}+{uuid.uuid4()}"


def gallery_pictures(gallery: Path, folder: Path, stem: str) -> list[Path]:
    """Write a gallery into a folder as MLflow's page wants it, whole and small; returns both files.

    `log_image` would name them anew each time, and a repeat after a broken connection would leave another picture.
    """
    from PIL import Image

    whole, small = folder / f"{stem}.png", folder / f"{stem}+compressed.webp"
    with Image.open(gallery) as image:
        image.save(whole)
        factor = _SMALL_SIDE / max(image.size)
        image.resize((max(1, int(image.width * factor)), max(1, int(image.height * factor)))).save(small)
    return [whole, small]


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
