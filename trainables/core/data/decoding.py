"""Decoding of images and labels, so that a broken file says what is wrong with it."""

import errno
import io
import os
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from segadapt.trainables.core.data.class_lists import UNKNOWN_COLOR, LabelValues

Result = TypeVar("Result")

Stored = NDArray[np.uint8] | NDArray[np.uint16]
"""Values as a label stores them, (H, W)."""

_EIGHT_BIT_MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "CMYK", "YCbCr", "1")

_GREY, _TRUE_COLOR, _PALETTE = 0, 2, 3  # colour types of PNG

_COLOR_TYPES = {0: "grey", 2: "RGB", 3: "with a palette", 4: "grey with alpha", 6: "RGB with alpha"}


_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)
"""Of the file, which is gone, a folder or not ours to read; other errors are of the disk."""


class UnreadableError(ValueError):
    """A file is not a whole image."""


class LabelFormatError(ValueError):
    """A label is a whole image, but does not store classes as its dataset does."""


BROKEN_FILE_ADVICE = "Replace it, or leave such files out with data.skip_bad=true."


def not_whole_text(path: Path, reason: object) -> str:
    """Say that a file is broken, why, and what to do."""
    return f"An image file must be whole, but {path} is not: {reason}. {BROKEN_FILE_ADVICE}"


def read_file(path: Path) -> bytes:
    """Return what a file holds.

    Raises:
        UnreadableError: If there is none, as where a link leads nowhere, or it is a folder or a pipe.
        OSError: If the disk does not answer.
    """
    check_is_file(path)  # to open a pipe would wait for ever
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        raise UnreadableError(f"{error.strerror}".lower()) from error


def check_is_file(path: Path) -> None:
    """Raise an UnreadableError where `read_file` would, without opening the file."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        gone = "it is a link to a file that is not there" if path.is_symlink() else "there is no such file"
        raise UnreadableError(gone if error.errno == errno.ENOENT else f"{error.strerror}".lower()) from error
    if not stat.S_ISREG(mode):
        raise UnreadableError(f"it is {'a folder' if stat.S_ISDIR(mode) else 'no file, but a pipe or a device'}")
    if not os.access(path, os.R_OK):
        raise UnreadableError("it may not be read by this user")


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


# Pictures are turned as their EXIF data ask, as viewers and labelling tools show them. Sizes are read from headers, so
# that only what stands before the pixels can count; a PNG that asks to be turned after them is refused.


def _orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation that stands before an image's pixels: 1 is upright, 5 to 8 swap the sides."""
    if picture.format == "TIFF":  # turned by PIL itself
        return 1
    try:
        # Not the PNG's own method, which would decode all pixels to look behind them.
        orientation = Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, struct.error):  # damaged: viewers show it as it is
        return 1
    return orientation if orientation in range(1, 9) else 1


def _size(picture: Image.Image) -> tuple[int, int]:
    """Return (H, W) of an opened image once it is turned."""
    return (picture.width, picture.height) if _orientation(picture) >= 5 else (picture.height, picture.width)


def _upright(picture: Image.Image, data: bytes) -> Image.Image:
    """Decode an opened image, and turn it as its EXIF data ask."""
    orientation, before = _orientation(picture), set(picture.info)
    picture = _loaded(picture, data)
    if set(picture.info) - before and _orientation(picture.crop((0, 0, 1, 1))) != orientation:
        raise UnreadableError(
            "its EXIF data, which follow the pixels, ask to turn it, as not all programs do. Save it upright"
        )
    return picture if orientation == 1 else ImageOps.exif_transpose(picture)


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Return an RGB image, (H, W, 3), of an encoded one, turned as its EXIF data ask.

    Raises:
        UnreadableError: If it is not a whole image of 8 bits per channel.
    """
    picture = _opened(data)
    if picture.mode not in _EIGHT_BIT_MODES:
        raise UnreadableError(
            f"an image must have 8 bits per channel, but this one has PIL's mode {picture.mode}. Convert it to RGB"
        )
    picture = _upright(picture, data)
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB")).copy()


def read_image(path: Path) -> NDArray[np.uint8]:
    """Return an RGB image, (H, W, 3).

    Raises:
        UnreadableError: If the file is not a whole image; names it.
        OSError: If it is gone, or the disk does not answer: it was there at the start, and may come back.
    """
    data = path.read_bytes()
    try:
        return decode_image(data)
    except UnreadableError as error:
        raise UnreadableError(not_whole_text(path, error)) from error


def image_size(path: Path) -> tuple[int, int]:
    """Return (H, W) of what `read_image` returns, from the file's header.

    Raises:
        UnreadableError: If it has none; names the file.
        OSError: As `read_image` does.
    """
    try:
        return _from_header(path, _size)
    except UnreadableError as error:
        raise UnreadableError(not_whole_text(path, error)) from error


def header_size(path: Path) -> tuple[int, int]:
    """Return (H, W) of what `decode_image` makes of a file, from its header.

    Raises:
        UnreadableError: If it has none.
        OSError: If the disk does not answer.
    """
    check_is_file(path)
    return _from_header(path, _size)


def is_turned(path: Path) -> bool:
    """Return whether an image's EXIF data ask to show it otherwise than it is stored.

    Raises:
        UnreadableError: If the file has no image's header.
        OSError: If it cannot be read.
    """
    return _from_header(path, lambda picture: _orientation(picture) != 1)


def turned_text(turned: bool) -> str:
    """Return what follows an image's size where it is turned."""
    return " once it is turned as its EXIF data ask" if turned else ""


def _from_header(path: Path, read: Callable[[Image.Image], Result]) -> Result:
    with path.open("rb") as file:
        try:
            with Image.open(file) as picture:
                return read(picture)
        except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the image
                raise
            file.seek(0)
            raise UnreadableError(_reason(error, file.read(1))) from error


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
        return np.array(_upright(_opened(data), data))
    if (color_type, depth) == (_TRUE_COLOR, 8) and values.colors:
        return _ids_of_colors(np.array(_upright(_opened(data), data)), values)
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
