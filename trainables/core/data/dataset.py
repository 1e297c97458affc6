"""Datasets in files: which image belongs to which label, and how both are read."""

import hashlib
import os
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from segadapt.trainables.core.data.batch import ClassList, LabelledImages, TargetImages
from segadapt.trainables.core.data.class_lists import UNKNOWN_COLOR, LabelValues
from segadapt.trainables.core.data.decoding import (
    BROKEN_FILE_ADVICE,
    LabelFormatError,
    Stored,
    UnreadableError,
    check_is_file,
    image_size,
    is_turned,
    not_whole_text,
    read_image,
    turned_text,
)
from segadapt.trainables.core.data.threads import decoding_threads, in_threads

_TAIL_BYTES = 4096

Item = TypeVar("Item")

Result = TypeVar("Result")


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
    doubled_labels: tuple[tuple[Path, Path], ...] = ()
    """Labels that have the id of another, which comes second here."""

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, indices: Sequence[int]) -> "Split":
        """Return the samples at `indices`."""
        return Split(
            tuple(self.ids[index] for index in indices),
            tuple(self.images[index] for index in indices),
            tuple(self.labels[index] for index in indices),
            doubled_labels=self.doubled_labels,
        )

    def with_labels(self) -> "Split":
        """Return the samples that have a label."""
        return self.subset([index for index, label in enumerate(self.labels) if label is not None])

    def missing_labels(self) -> list[Fault]:
        """Return a fault for each image without a label."""
        return [
            Fault("image without a label", str(image))
            for image, label in zip(self.images, self.labels, strict=True)
            if label is None
        ]

    def repeated_ids(self) -> list[Fault]:
        """Return a fault for each image or label whose id another one has."""
        first: dict[str, Path] = {}
        faults = [
            Fault("two images of one name", str(image), f"as {first[name].name}")
            for name, image in zip(self.ids, self.images, strict=True)
            if first.setdefault(name, image) != image
        ]
        doubled = self.doubled_labels
        return faults + [Fault("two labels of one name", str(path), f"as {other.name}") for path, other in doubled]


_DERIVED = tuple(
    f"{prefix}_{content}"
    for prefix in ("", "_gtFine", "_gtCoarse")
    for content in ("color", "labelIds", "labelTrainIds", "instanceIds", "instanceTrainIds")
)
"""How the names of files end that the field's scripts write beside labels."""


def pair(images: Iterable[tuple[str, Path]], labels: Iterable[tuple[str, Path]]) -> Split:
    """Bring images and labels of the same id together.

    Files that the field's scripts write beside labels, such as `00001_labelTrainIds.png`, are passed over.

    Args:
        images: Ids and paths of the images.
        labels: Ids and paths of the labels.
    """
    sorted_images = sorted(images)
    ids = tuple(name for name, _ in sorted_images)
    image_ids = set(ids)
    label_of: dict[str, Path] = {}
    stray, doubled = [], []
    for name, path in sorted(labels):
        if name not in image_ids:
            if not is_derived(name, image_ids):
                stray.append(path)
        elif label_of.setdefault(name, path) != path:
            doubled.append((path, label_of[name]))
    return Split(
        ids,
        tuple(path for _, path in sorted_images),
        tuple(label_of.get(name) for name in ids),
        tuple(stray),
        tuple(doubled),
    )


def is_derived(name: str, ids: Collection[str]) -> bool:
    """Return whether a label's name is one that scripts of DAFormer, MMSegmentation or Cityscapes derive from an id."""
    return any(name.endswith(suffix) and name.removesuffix(suffix) in ids for suffix in _DERIVED)


def files_in(folder: Path, suffixes: tuple[str, ...] = (".png",)) -> list[Path]:
    """Return the files with one of the suffixes, in any case, in a folder that may be missing."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    return [folder / name for name in names if name.lower().endswith(suffixes)]


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
            raise UnreadableError(not_whole_text(path, error)) from error
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
    may_lack_labels: bool = False
    """Whether it may be a target, of which no label is needed."""

    @property
    def classes(self) -> ClassList:
        """The classes that its labels name."""
        return self.format.values.classes

    @property
    def check_command(self) -> str:
        """The command that says all that is wrong with it, as a shell takes it."""
        return f"`segadapt data check {self.kind} {shlex.quote(str(self.root))}`"

    def unlabelled(self, split: Split) -> TargetImages:
        """Return a split's images without a way to its labels."""
        return FileTargetImages(split)

    def labelled(self, split: Split, names: Sequence[str]) -> LabelledImages:
        """Return a split's images with labels of the classes `names`; all must have one."""
        return FileImages(split, self.format, names)

    def lost_file(self, split: Split, index: int) -> str | None:
        """Return why the image or label of a sample is no file, such as a link that leads nowhere; None if it is."""
        for path in (split.images[index], split.labels[index]):
            try:
                if path is not None:
                    check_is_file(path)
            except UnreadableError as error:
                return f"{path}: {error}"
        return None

    def content(self, split: Split, *, labels: bool) -> bytes:
        """Return a hash of names, sizes and last bytes of a split's files: PNGs end in the checksum of their pixels."""
        root = Path(self.root)

        def content(path: Path) -> bytes:
            try:
                check_is_file(path)
            except UnreadableError as error:
                raise UnreadableError(not_whole_text(path, error)) from error
            size = path.stat().st_size
            with path.open("rb") as file:
                file.seek(max(0, size - _TAIL_BYTES))
                return hashlib.sha256(f"{path.relative_to(root)}\0{size}\0".encode() + file.read()).digest()

        files = [*split.images, *(label for label in split.labels if labels and label is not None)]
        return hashlib.sha256(b"".join(in_threads(content, files, decoding_threads()))).digest()


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
                    f"{self._images[index]} is {size_text(size)}{turned_text(is_turned(self._images[index]))}. "
                    f"{BROKEN_FILE_ADVICE}"
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
