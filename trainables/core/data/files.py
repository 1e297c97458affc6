"""Datasets in files: which image belongs to which label, how both are decoded, and how a broken file names itself."""

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from segadapt.trainables.core.data.batch import ClassList, LabelledImages, TargetImages
from segadapt.trainables.core.data.class_lists import UNKNOWN_COLOR, LabelValues

Stored = NDArray[np.uint8] | NDArray[np.uint16]
"""Values as a label stores them, (H, W)."""

_EIGHT_BIT_MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "CMYK", "YCbCr", "1")
_GREY, _TRUE_COLOR, _PALETTE = 0, 2, 3  # colour types of PNG
_TAIL_BYTES = 4096
_COLOR_TYPES = {0: "grey", 2: "RGB", 3: "with a palette", 4: "grey with alpha", 6: "RGB with alpha"}

Item = TypeVar("Item")
Result = TypeVar("Result")


class UnreadableError(ValueError):
    """A file is not a whole image."""


class LabelFormatError(ValueError):
    """A label is a whole image, but does not store classes as its dataset does."""


@dataclass(frozen=True)
class Fault:
    """Something wrong with a dataset."""

    problem: str
    """What kind of fault it is, the same text for all files that have it."""
    path: str
    detail: str = ""


@dataclass(frozen=True)
class Split:
    """The files of one part of a dataset, in the order of their paths."""

    ids: tuple[str, ...]
    images: tuple[Path, ...]
    labels: tuple[Path | None, ...]
    """None where an image has no label."""
    stray_labels: tuple[Path, ...] = ()
    """Labels without an image."""

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, indices: Sequence[int]) -> "Split":
        """Return the samples at `indices`."""
        return Split(
            tuple(self.ids[index] for index in indices),
            tuple(self.images[index] for index in indices),
            tuple(self.labels[index] for index in indices),
        )

    def missing_labels(self) -> list[Fault]:
        """Return a fault for each image without a label."""
        return [
            Fault("image without a label", str(image))
            for image, label in zip(self.images, self.labels, strict=True)
            if label is None
        ]

    def repeated_ids(self) -> list[Fault]:
        """Return a fault for each image whose id another image has."""
        first: dict[str, Path] = {}
        return [
            Fault("two images of one name", str(image), f"as {first[name].name}")
            for name, image in zip(self.ids, self.images, strict=True)
            if first.setdefault(name, image) != image
        ]


def pair(images: Iterable[tuple[str, Path]], labels: Mapping[str, Path]) -> Split:
    """Bring images and labels of the same id together."""
    listed = sorted(images)
    ids = tuple(name for name, _ in listed)
    known = set(ids)
    stray = sorted(path for name, path in labels.items() if name not in known)
    return Split(ids, tuple(path for _, path in listed), tuple(labels.get(name) for name in ids), tuple(stray))


def files_in(folder: Path, suffixes: tuple[str, ...] = (".png",)) -> list[Path]:
    """Return the files with one of the suffixes, in any case, in a folder that may be missing."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    return [folder / name for name in names if name.lower().endswith(suffixes)]


_ADVICE = "Replace it, or leave such files out with data.skip_bad=true."


@dataclass(frozen=True)
class LabelFormat:
    """How a dataset's labels are read."""

    values: LabelValues
    decode: Callable[[bytes, LabelValues], Stored]
    resizes: bool = False
    """Labels may differ in size from their images, and are brought to it."""

    def read(self, path: Path) -> Stored:
        """Return the stored values of a label.

        Raises:
            ValueError: If it is broken or of another kind; names the file.
        """
        data = path.read_bytes()
        try:
            return self.decode(data, self.values)
        except UnreadableError as error:
            raise UnreadableError(_not_whole(path, error)) from error
        except LabelFormatError as error:
            raise LabelFormatError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Dataset:
    """One domain on disk."""

    kind: str
    root: Path | str
    splits: Mapping[str, Split]
    format: LabelFormat
    layout: str
    """Where its images must lie, for messages."""
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> ClassList:
        """The classes that its labels name."""
        return self.format.values.classes

    def unlabelled(self, split: Split) -> TargetImages:
        """Return a split's images without a way to its labels."""
        return FileTargetImages(split)

    def labelled(self, split: Split, names: Sequence[str]) -> LabelledImages:
        """Return a split's images with labels of the classes `names`; all must have one."""
        return FileImages(split, self.format, names)

    def content(self, split: Split, *, labels: bool) -> bytes:
        """Return a hash of names, sizes and last bytes of a split's files: PNGs end in the checksum of their pixels."""
        root = Path(self.root)

        def content(path: Path) -> bytes:
            size = path.stat().st_size
            with path.open("rb") as file:
                file.seek(max(0, size - _TAIL_BYTES))
                return hashlib.sha256(f"{path.relative_to(root)}\0{size}\0".encode() + file.read()).digest()

        files = [*split.images, *(label for label in split.labels if labels and label is not None)]
        return hashlib.sha256(b"".join(in_threads(content, files))).digest()


class FileTargetImages:
    """Unlabelled images in files, decoded when asked for. They keep no path to a label."""

    def __init__(self, split: Split) -> None:
        self.ids: Sequence[str] = split.ids
        self._images = split.images

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Tensor:
        """Return an RGB image, (3, H, W) uint8.

        Raises:
            ValueError: If the file is not a whole image; names it.
        """
        return torch.from_numpy(read_image(self._images[index])).permute(2, 0, 1)

    def files(self) -> list[Path]:
        """Return the files read, in order."""
        return list(self._images)


class FileImages(FileTargetImages):
    """Images with labels in files, decoded when asked for.

    Args:
        split: Every image must have a label.
        label_format: How its labels are read.
        names: The trained classes; pixels of all others are ignored.
    """

    def __init__(self, split: Split, label_format: LabelFormat, names: Sequence[str]) -> None:
        super().__init__(split)
        self._labels = [label for label in split.labels if label is not None]
        self._format = label_format
        self._names = tuple(names)

    def label(self, index: int) -> Tensor:
        """Return class indices, (H, W) uint8, 255 = ignore, of the size of the image.

        Raises:
            ValueError: If the file is broken, of another kind, or does not fit its image; names it.
        """
        path = self._labels[index]
        stored = self._format.read(path)
        if self._format.values.strict and not self._known[stored].all():
            unknown = sorted(set(np.unique(stored).tolist()) - self._format.values.known)
            raise LabelFormatError(f"{path}: {unknown_text(unknown)}")
        label = looked_up(stored, self._table)
        size = image_size(self._images[index])
        if label.shape != size:
            if not self._format.resizes:
                raise LabelFormatError(
                    f"A label must have the size of its image, but {path} is {size_text(label.shape)} and "
                    f"{self._images[index]} is {size_text(size)}. {_ADVICE}"
                )
            label = resize_nearest(label, size)
        return torch.from_numpy(label)

    def files(self) -> list[Path]:
        """Return the files read, in order."""
        return [*self._images, *self._labels]

    @cached_property
    def _table(self) -> NDArray[np.uint8]:
        return self._format.values.table(self._names)

    @cached_property
    def _known(self) -> NDArray[np.bool_]:
        known = np.zeros(1 << 16, np.bool_)
        known[list(self._format.values.known)] = True
        return known


def looked_up(stored: Stored, table: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return `table[stored]`, (H, W), for values of eight bits in less than half of numpy's time."""
    if stored.dtype == np.uint8:
        return np.frombuffer(bytearray(stored).translate(table[:256].tobytes()), np.uint8).reshape(stored.shape)
    return np.take(table, stored)


def _not_whole(path: Path, reason: object) -> str:
    return f"An image file must be whole, but {path} is not: {reason}. {_ADVICE}"


def unknown_text(values: Sequence[int]) -> str:
    """Say which stored values of a label are not expected."""
    shown = ", ".join("a colour of no class" if value == UNKNOWN_COLOR else str(value) for value in values[:10])
    return f"A label must hold known ids alone, but holds {shown}{' and more' if len(values) > 10 else ''}."


def size_text(size: Sequence[int]) -> str:
    """Return a size (H, W) as people write it: width x height."""
    return f"{size[1]}x{size[0]}"


def resize_nearest(label: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize (H, W) as the papers' codes do: PIL's nearest, the input pixel under the centre of the output's."""
    height, width = size
    return np.array(Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST))


# --- Decoding --------------------------------------------------------------------------------------------------------
#
# PIL, not torchvision: torchvision 0.29 ends the whole process on a PNG with a wrong checksum. PIL does not look at the
# checksums of pixels, so that some damage would go unseen: they are verified here, at a thirtieth of decoding's cost.

_PNG_START = b"\x89PNG\r\n\x1a\n"


def _verify_png(data: bytes) -> None:
    """Follow the chunks of a PNG to its end.

    Raises:
        UnreadableError: If one is cut off or has a wrong checksum.
    """
    view, place, name = memoryview(data), len(_PNG_START), b""
    while name != b"IEND":
        if place + 12 > len(data):
            raise UnreadableError("it is cut off")
        end = place + 8 + int.from_bytes(view[place : place + 4], "big")
        name = bytes(view[place + 4 : place + 8])
        if end + 4 > len(data):
            raise UnreadableError("it is cut off")
        if zlib.crc32(view[place + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise UnreadableError(f"its bytes {place} to {end + 4} have a wrong checksum")
        place = end + 4


def _opened(data: bytes) -> Image.Image:
    if data.startswith(_PNG_START):
        _verify_png(data)
    try:
        return Image.open(io.BytesIO(data))
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise UnreadableError(_reason(error, data)) from error


def _loaded(picture: Image.Image, data: bytes) -> Image.Image:
    try:
        picture.load()
    except (OSError, SyntaxError, ValueError, IndexError, struct.error, zlib.error) as error:
        raise UnreadableError(_reason(error, data)) from error
    return picture


def _reason(error: Exception, data: bytes) -> str:
    if not data:
        return "it is empty"
    if isinstance(error, UnidentifiedImageError):
        return "it is no image, or cut off in its header"
    return str(error) or type(error).__name__


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Return an RGB image, (H, W, 3), of an encoded one.

    Raises:
        UnreadableError: If it is not a whole image of 8 bits per channel.
    """
    picture = _opened(data)
    if picture.mode not in _EIGHT_BIT_MODES:
        raise UnreadableError(f"an image must have 8 bits per channel, but this one has PIL's mode {picture.mode}")
    picture = _loaded(picture, data)
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB")).copy()


def read_image(path: Path) -> NDArray[np.uint8]:
    """Return an RGB image, (H, W, 3).

    Raises:
        UnreadableError: If the file is not a whole image; names it.
    """
    data = path.read_bytes()
    try:
        return decode_image(data)
    except UnreadableError as error:
        raise UnreadableError(_not_whole(path, error)) from error


def image_size(path: Path) -> tuple[int, int]:
    """Return (H, W) from the file's header.

    Raises:
        UnreadableError: If it has none; names the file.
    """
    with path.open("rb") as file:
        try:
            with Image.open(file) as picture:
                return picture.height, picture.width
        except (OSError, SyntaxError, ValueError, struct.error) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the image
                raise
            raise UnreadableError(_not_whole(path, error)) from error


def png_type(data: bytes) -> tuple[int, int]:
    """Return bits per channel and colour type (0 grey, 2 RGB, 3 palette) of an encoded PNG.

    Raises:
        UnreadableError: If the header is cut off.
        LabelFormatError: If it is no PNG.
    """
    if len(data) < 26:
        raise UnreadableError("it is empty" if not data else "it is cut off in its header")
    if not data.startswith(_PNG_START):
        raise LabelFormatError("A label must be a PNG: other formats, JPEG above all, change its values.")
    return data[24], data[25]


def decode_ids(data: bytes, values: LabelValues) -> Stored:
    """Return what an 8-bit label stores: grey values, indices in its palette, or the ids of its colours.

    Args:
        data: An encoded PNG.
        values: Gives colours their ids, if labels may be coded by colour.

    Returns:
        (H, W). `UNKNOWN_COLOR` where a colour is no class's.

    Raises:
        UnreadableError: If it is not a whole image.
        LabelFormatError: If it is of another kind.
    """
    depth, color_type = png_type(data)
    if color_type == _PALETTE or (color_type, depth) == (_GREY, 8):
        return np.array(_loaded(_opened(data), data))
    if (color_type, depth) == (_TRUE_COLOR, 8) and values.colors:
        return _ids_of_colors(np.array(_loaded(_opened(data), data)), values)
    expected = "8-bit grey or palette PNG of class ids" + (
        ", or an 8-bit RGB PNG of their colours" * bool(values.colors)
    )
    raise LabelFormatError(f"A label must be an {expected}, but this one is {_kind(data)}. Convert it.")


def _kind(data: bytes) -> str:
    depth, color_type = png_type(data)
    return f"{depth}-bit {_COLOR_TYPES.get(color_type, 'of an unknown kind')}"


def _ids_of_colors(picture: NDArray[np.uint8], values: LabelValues) -> NDArray[np.uint16]:
    packed = picture.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    colors = sorted((red << 16 | green << 8 | blue, value) for (red, green, blue), value in values.colors.items())
    codes = np.array([code for code, _ in colors], np.uint32)
    ids = np.array([value for _, value in colors], np.uint16)
    places = np.searchsorted(codes, packed).clip(max=len(codes) - 1)
    return np.where(codes[places] == packed, ids[places], np.uint16(UNKNOWN_COLOR))


def decode_first_channel(data: bytes) -> NDArray[np.uint16]:
    """Return the first channel of a 16-bit RGB PNG, (H, W); PIL alone reads the upper half of the bits.

    Raises:
        UnreadableError: If it is not a whole image.
        LabelFormatError: If it is of another kind.
    """
    if png_type(data) != (16, _TRUE_COLOR):
        raise LabelFormatError(
            f"A label must be a 16-bit RGB PNG with the class in its first channel, but this one is {_kind(data)}. A "
            "tool that cannot read 16-bit PNGs has rewritten it and may have lost the classes; take the original."
        )
    # PNG stores the upper byte first. PIL's unpacker for that order keeps the first of two bytes, the one for the
    # other order the second.
    upper, lower = (_unpacked(data, mode)[..., 0] for mode in ("RGB;16B", "RGB;16L"))
    return upper.astype(np.uint16) << np.uint16(8) | lower.astype(np.uint16)


def _unpacked(data: bytes, raw_mode: str) -> NDArray[np.uint8]:
    picture = _opened(data)
    assert isinstance(picture, ImageFile.ImageFile)
    picture.tile = [tile._replace(args=raw_mode) for tile in picture.tile]
    return np.asarray(_loaded(picture, data))


# --- Threads and selections ------------------------------------------------------------------------------------------


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], progress: Callable[[int], None] | None = None
) -> list[Result]:
    """Apply `function` to all items, in order, in as many threads as decoding gains from.

    Args:
        function: Called once per item.
        items: What to work on.
        progress: Called with the number of items just done.
    """
    results = []
    with ThreadPoolExecutor(max_workers=min(32, (os.cpu_count() or 1) + 2)) as pool:
        try:
            for result in pool.map(function, items):
                results.append(result)
                if progress is not None:
                    progress(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def encode_png16(channels: NDArray[np.uint16]) -> bytes:
    """Return a 16-bit RGB PNG of (H, W, 3); PIL writes none."""
    height, width, _ = channels.shape
    rows = np.zeros((height, 1 + width * 6), np.uint8)  # each row starts with its filter: 0, none
    rows[:, 1:] = channels.astype(">u2").reshape(height, -1).view(np.uint8)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, _TRUE_COLOR, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.tobytes())),
        (b"IEND", b""),
    )
    return _PNG_START + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
