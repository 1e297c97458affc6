"""A contact sheet of datasets: images beside their labels, in the colours of their classes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from segadapt.trainables.core.data.batch import ClassList
from segadapt.trainables.core.data.dataset import Dataset
from segadapt.trainables.core.data.datasets import DataConfig, open_dataset, split_location
from segadapt.trainables.core.data.streets import load_streets

SAMPLES = 6
"""Rows of a sheet at most."""

_SIDE = 320
"""Longer side of a picture on the sheet."""

_GAP, _CAPTION = 4, 16


@dataclass(frozen=True)
class Panel:
    """Images of one dataset: two columns of a sheet."""

    title: str
    pictures: Sequence[tuple[Tensor, Tensor | None]]
    """Images (3, H, W) uint8, each with its class indices (H, W) uint8, or None where it has no label."""
    classes: ClassList


def panels_of_config(config: DataConfig) -> list[Panel]:
    """Return the two domains that a configuration names, by their validation images where there are any.

    Raises:
        ValueError: If there is no such dataset, it holds no image, or a file of it is broken.
    """
    if config.source is None or config.target is None:
        # An image does not depend on how many are generated.
        shown = replace(config.streets, train_images=1, val_images=min(SAMPLES, config.streets.count("val")))
        _, data = load_streets(shown)
        return [
            Panel(
                domain,
                [(images.image(index), images.label(index)) for index in range(min(SAMPLES, len(images)))],
                data.classes,
            )
            for domain, images in (("source", data.source), ("target", data.target))
        ]
    panels = []
    for domain, location in (("source", config.source), ("target", config.target)):
        dataset = open_dataset(*split_location(location, f"data.{domain}"))
        panels.append(_panels(dataset, domain)[-1])
    return panels


def panels_of_dataset(kind: str, root: str) -> list[Panel]:
    """Return the splits of a dataset that hold images.

    Raises:
        ValueError: As `panels_of_config` does.
    """
    return _panels(open_dataset(kind, root), kind)


def _panels(dataset: Dataset, title: str) -> list[Panel]:
    panels = []
    for name, split in dataset.splits.items():
        if not len(split):
            continue
        chosen = sorted({round(place) for place in np.linspace(0, len(split) - 1, min(SAMPLES, len(split)))})
        pictures = []
        for index in chosen:
            sample = split.subset([index])
            labelled = sample.labels[0] is not None
            label = dataset.labelled(sample, dataset.classes.names).label(0) if labelled else None
            pictures.append((dataset.unlabelled(sample).image(0), label))
        panels.append(Panel(f"{title} {name}", pictures, dataset.classes))
    if not panels:
        raise ValueError(
            f"A {dataset.kind} dataset must hold {dataset.layout}, but {dataset.root} has no image. "
            f"{dataset.check_command} says more."
        )
    return panels


def contact_sheet(panels: Sequence[Panel], path: Path) -> None:
    """Write a PNG: a row per sample, and for each panel an image beside its label; ignored pixels are black.

    Args:
        panels: What to show, left to right.
        path: Where the PNG goes; the folder must exist.
    """
    columns = [
        (f"{panel.title} {what}", cells)
        for panel in panels
        for what, cells in zip(("image", "label"), zip(*_cells(panel), strict=True), strict=True)
    ]
    height = max(cell.height for _, cells in columns for cell in cells) + _GAP
    rows = max(len(cells) for _, cells in columns)
    size = (_GAP + len(columns) * (_SIDE + _GAP), _CAPTION + _GAP + rows * height)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for column, (title, cells) in enumerate(columns):
        left = _GAP + column * (_SIDE + _GAP)
        pen.text((left, 3), title, fill="black", font=font)
        for row, cell in enumerate(cells):
            sheet.paste(cell, (left, _CAPTION + _GAP + row * height))
    sheet.save(path, format="PNG")


def _cells(panel: Panel) -> list[tuple[Image.Image, Image.Image]]:
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(panel.classes)] = panel.classes.colors
    return [
        (_fitted(image.permute(1, 2, 0).numpy()), _no_label() if label is None else _fitted(colors[label.numpy()]))
        for image, label in panel.pictures
    ]


def _fitted(pixels: NDArray[np.uint8]) -> Image.Image:
    """Return a picture whose longer side has `_SIDE` pixels; each has the colour of one of `pixels`, as labels need."""
    height, width = pixels.shape[:2]
    factor = _SIDE / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.NEAREST)


def _no_label() -> Image.Image:
    picture = Image.new("RGB", (_SIDE, 2 * _CAPTION), "lightgrey")
    ImageDraw.Draw(picture).text((_GAP, _GAP), "no label", fill="black", font=ImageFont.load_default())
    return picture
