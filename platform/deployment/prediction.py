"""Label folders of images with a deployed network: files of any size, memory that does not grow with them."""

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from segadapt.platform.deployment.card import LEAST_PART, Card
from segadapt.platform.deployment.export import Predict
from segadapt.platform.errors import UsageError
from segadapt.platform.storage.files import PARTIAL, write_whole
from segadapt.trainables.core.data.decoding import UnreadableError, decode_image, header_size, read_file
from segadapt.trainables.core.data.threads import decoding_threads, in_threads
from segadapt.trainables.core.evaluation.inference import ONCE, Inference

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")

RECORD = "predict.json"
"""File in the folder written, with all that decides its content: the same command goes on in it."""

LABELS, OVERLAYS, CONFIDENCE = "labels", "overlays", "confidence"

_MARGIN_SHARE = 8
"""A part of a large image is looked at with a margin of this fraction of its side, which is then left out."""

_OPACITY = 0.5

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be read."""

    path: str
    reason: str


@dataclass(frozen=True)
class PredictionResult:
    """What was labelled."""

    folder: str
    images: int
    written: int
    skipped: int
    """Written by an earlier, interrupted command."""
    unreadable: tuple[Unreadable, ...]


@dataclass(frozen=True)
class _Item:
    """An image to label; its place in the folders written is `name`.png."""

    path: Path
    name: str


@dataclass(frozen=True)
class Labeller:
    """A network and what it needs to know to label an image of any size."""

    predict: Predict
    card: Card
    inference: Inference = ONCE
    """How `predict` asks the network."""

    @property
    def whole_pixels(self) -> int:
        """Pixels that an image has at most to be predicted whole: fewer where the network sees it enlarged."""
        enlarged = 1.0 if self.card.input_size is not None else max(1.0, *self.inference.scales)
        return max(LEAST_PART**2, int(self.card.whole_pixels / enlarged**2))

    def __call__(self, images: Pixels) -> tuple[Pixels, Pixels]:
        """Return class indices and confidence, 0 to 255, (B, H, W) each, of RGB images, (B, H, W, 3)."""
        height, width = images.shape[1:3]
        if height * width <= self.whole_pixels:
            return self._whole(images)
        if self.card.input_size is not None:
            return self._reduced(images)
        return self._in_parts(images)

    def record(self) -> dict[str, Any]:
        """Return what decides the labels of an image, in JSON's types."""
        return {
            "checkpoint_sha256": self.card.checkpoint_sha256,
            "asked": str(self.inference),
            "input_size": None if self.card.input_size is None else list(self.card.input_size),
            "classes": list(self.card.classes),
            "colors": [list(color) for color in self.card.colors],
        }

    def batch(self, size: tuple[int, int], at_most: int) -> int:
        """Return how many images of a size are predicted at a time."""
        return max(1, min(at_most, self.whole_pixels // (size[0] * size[1])))

    def _whole(self, images: Pixels) -> tuple[Pixels, Pixels]:
        height, width = images.shape[1:3]
        least = self.card.smallest_side
        missing = [(0, 0), (0, max(0, least - height)), (0, max(0, least - width)), (0, 0)]
        shown = torch.from_numpy(np.pad(images, missing, mode="edge")).permute(0, 3, 1, 2).contiguous()
        confidence, labels = self.predict(shown)[..., :height, :width].max(1)
        return labels.byte().cpu().numpy(), (confidence * 255).round().byte().cpu().numpy()

    def _reduced(self, images: Pixels) -> tuple[Pixels, Pixels]:
        """Reduce by a whole factor first, as the network reduces further anyway, and enlarge the labels."""
        height, width = images.shape[1:3]
        factor = math.ceil(math.sqrt(height * width / self.whole_pixels))
        small = np.stack([np.asarray(Image.fromarray(image).reduce(factor)) for image in images])
        labels, confidence = self._whole(small)
        return tuple(  # type: ignore[return-value]  # two
            part.repeat(factor, 1).repeat(factor, 2)[:, :height, :width] for part in (labels, confidence)
        )

    def _in_parts(self, images: Pixels) -> tuple[Pixels, Pixels]:
        height, width = images.shape[1:3]
        labels, confidence = np.empty(images.shape[:3], np.uint8), np.empty(images.shape[:3], np.uint8)
        side = math.isqrt(self.whole_pixels) // LEAST_PART * LEAST_PART
        for seen_rows, rows in spans(height, side):
            for seen_columns, columns in spans(width, side):
                labelled = self._whole(images[:, seen_rows, seen_columns])
                inner = (
                    slice(None),
                    slice(rows.start - seen_rows.start, rows.stop - seen_rows.start),
                    slice(columns.start - seen_columns.start, columns.stop - seen_columns.start),
                )
                labels[:, rows, columns], confidence[:, rows, columns] = (part[inner] for part in labelled)
        return labels, confidence


def spans(length: int, side: int) -> Iterator[tuple[slice, slice]]:
    """Yield what is seen of a side of an image at a time, at most `side` pixels, and what of it is kept.

    What is kept covers the length once. It is a margin away from where another part was cut off.
    """
    margin = side // _MARGIN_SHARE
    for start in range(0, max(1, length - 2 * margin), side - 2 * margin):
        stop = min(start + side, length)
        yield slice(start, stop), slice(start + margin if start else 0, stop - margin if stop < length else stop)


def predict(
    labeller: Labeller,
    images: Path,
    out: Path,
    *,
    batch_size: int,
    overlay: bool,
    confidence: bool,
    progress: Callable[[int, int], None],
) -> PredictionResult:
    """Label an image, or all images below a folder, and go on if that was interrupted.

    Memory holds three batches: one that is predicted and two that are read ahead. A batch has at most
    `card.whole_pixels` pixels, or a single image, of which larger ones are predicted in parts.

    Args:
        labeller: The network.
        images: A file, or a folder that is searched recursively; hidden files are passed over. Images are turned as
            their EXIF data ask, as viewers show them, and so are the labels written.
        out: New, empty, or begun by the same command.
        batch_size: Images predicted at a time at most; they have the same size.
        overlay: Also write the image under its classes' colours.
        confidence: Also write the probability of the predicted class.
        progress: Called with the number of images just done and of all.

    Raises:
        UsageError: If there are no images, two would be written to one place, or `out` holds something else.
    """
    if batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, but got {batch_size}.")
    items = _items(images, out)
    options = {"images": str(images.absolute()), "overlay": overlay, "confidence": confidence}
    _begin(out, {**labeller.record(), **options})
    # A label is written last, and whole or not at all: where it is, everything of its image is.
    missing = [item for item in items if not (out / LABELS / f"{item.name}.png").is_file()]
    progress(len(items) - len(missing), len(items))
    unreadable: list[Unreadable] = []
    batches = list(_batches(missing, labeller, batch_size, unreadable))
    progress(len(unreadable), len(items))
    for batch, read in zip(batches, in_threads(_read, batches, 2, ahead=2), strict=True):
        unreadable += [image for image in read if isinstance(image, Unreadable)]
        whole = [(item, image) for item, image in zip(batch, read, strict=True) if not isinstance(image, Unreadable)]
        if whole:
            labels, sure = labeller(np.stack([image for _, image in whole]))
            for row, (item, image) in enumerate(whole):
                if confidence:
                    _save(out / CONFIDENCE / f"{item.name}.png", Image.fromarray(sure[row]))
                if overlay:
                    _save(out / OVERLAYS / f"{item.name}.png", _overlay(image, labels[row], labeller.card))
                _save(out / LABELS / f"{item.name}.png", _label_picture(labels[row], labeller.card))
        progress(len(batch), len(items))
    written = len(missing) - len(unreadable)
    return PredictionResult(str(out), len(items), written, len(items) - len(missing), tuple(unreadable))


def _items(images: Path, out: Path) -> list[_Item]:
    """Return what is to be labelled, in the order of the paths."""
    if images.is_file():
        return [_Item(images, images.stem)]
    if not images.is_dir():
        raise UsageError(f"IMAGES must be an image or a folder of images, but there is none at {images}.")
    written = out.absolute() if (out / RECORD).is_file() else None  # may lie among the images
    paths = sorted(
        path
        for path in images.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(images).parts)
        and not (written and path.absolute().is_relative_to(written))
        and not path.is_dir()
    )
    if not paths:
        raise UsageError(f"IMAGES must hold images ({', '.join(SUFFIXES)}), but {images} has none.")
    first: dict[str, Path] = {}
    for path in paths:
        name = path.relative_to(images).with_suffix("").as_posix()
        if first.setdefault(name, path) != path:
            raise UsageError(
                f"Images must differ in more than their suffix, since a label is named as its image, but there are "
                f"{first[name]} and {path}. Move one of them."
            )
    return [_Item(path, name) for name, path in first.items()]


def _begin(out: Path, record: Mapping[str, Any]) -> None:
    """Make the folder, or make sure that the same command has begun it."""
    path = out / RECORD
    if path.is_file():
        try:
            known = json.loads(path.read_text())
        except ValueError:
            known = {}
        differing = [key for key, value in record.items() if known.get(key) != value]
        if differing:
            raise UsageError(
                f"OUT must be new, empty, or begun by the same command, but {out} was begun with other "
                f"{', '.join(differing)}. Choose another."
            )
        return
    if out.exists() and (not out.is_dir() or any(entry.suffix != PARTIAL for entry in out.iterdir())):
        raise UsageError(f"OUT must be new, empty, or begun by the same command, but {out} is not. Choose another.")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=1))


def _batches(
    items: Sequence[_Item], labeller: Labeller, batch_size: int, unreadable: list[Unreadable]
) -> Iterator[list[_Item]]:
    """Bring images of equal size together, by their headers; those that have none go to `unreadable`."""
    sizes: dict[_Item, tuple[int, int]] = {}
    for item, size in zip(items, in_threads(_size, items, decoding_threads()), strict=True):
        if isinstance(size, Unreadable):
            unreadable.append(size)
        else:
            sizes[item] = size
    for size, group in groupby(sorted(sizes, key=lambda item: sizes[item]), key=lambda item: sizes[item]):
        same = list(group)
        at_a_time = labeller.batch(size, batch_size)
        yield from (same[start : start + at_a_time] for start in range(0, len(same), at_a_time))


def _size(item: _Item) -> tuple[int, int] | Unreadable:
    try:
        return header_size(item.path)
    except (OSError, UnreadableError) as error:
        return _unreadable(item, error)


def _read(batch: Sequence[_Item]) -> list[Pixels | Unreadable]:
    return [_image(item) for item in batch]


def _image(item: _Item) -> Pixels | Unreadable:
    try:
        return decode_image(read_file(item.path))
    except (OSError, UnreadableError) as error:
        return _unreadable(item, error)


def _unreadable(item: _Item, error: Exception) -> Unreadable:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return Unreadable(str(item.path), reason)


def _label_picture(labels: Pixels, card: Card) -> Image.Image:
    """Return class indices (H, W) as a palette image in the classes' colours."""
    picture = Image.fromarray(labels)
    picture.putpalette([value for color in card.colors for value in color])
    return picture


def _overlay(image: Pixels, labels: Pixels, card: Card) -> Image.Image:
    return Image.blend(Image.fromarray(image), _label_picture(labels, card).convert("RGB"), _OPACITY)


def _save(path: Path, picture: Image.Image) -> None:
    content = io.BytesIO()
    picture.save(content, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())
