"""Packed datasets: Parquet shards of encoded images and labels, read by position from a folder or a bucket."""

import hashlib
import os
import shlex
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX, ClassList
from segadapt.trainables.core.data.class_lists import LabelValues
from segadapt.trainables.core.data.dataset import Dataset, LabelFormat, Split, looked_up, size_text
from segadapt.trainables.core.data.decoding import LabelFormatError, UnreadableError, decode_ids, decode_image
from segadapt.trainables.core.data.readers.shard_format import (
    Index,
    Location,
    Manifest,
    Shard,
    read_index,
    read_manifest,
)

SHARDS = "shards"
"""The kind of a packed dataset in KIND:ROOT."""

_CACHED_GROUPS = 4

_OPEN_SHARDS = 256


# --- Reading by position ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=_OPEN_SHARDS)
def _opened(root: str, shard: Shard) -> tuple[Any, Any]:
    """Return a shard's file and footer, shared by all sets of this process.

    Raises:
        UnreadableError: If the file has not the size of the one that was packed, or no footer.
    """
    from pyarrow import ArrowException, parquet

    location = Location(root)
    file = location.open(shard.name)
    if file.size() != shard.bytes:  # a mapped file that is too short would end the process when it is read
        raise UnreadableError(_damaged(location, shard, f"it has {file.size()} bytes and not {shard.bytes}"))
    try:
        return file, parquet.read_metadata(file)
    except (ArrowException, OSError) as error:
        raise UnreadableError(_damaged(location, shard, error)) from error


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_opened.cache_clear)  # connections do not survive a fork


def _damaged(location: Location, shard: Shard, reason: object) -> str:
    return (
        f"A shard must be as it was packed, but {shard.name} in {location} is not: {reason}. "
        f"`segadapt data check shards {shlex.quote(str(location))}` lists all that are damaged; fetch or pack them "
        "anew."
    )


class _Group:
    """A row group's values of one column, read by the first thread that needs them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: Any = None


class Column:
    """The values of one binary column by row, from any thread. Pickles without what it has read.

    Every page read is verified against its checksum in the file. The last few row groups read are kept.

    Args:
        location: Address of the packed dataset.
        manifest: Manifest of the dataset.
        name: Name of the column; no other can be reached from here.
    """

    def __init__(self, location: Location, manifest: Manifest, name: str) -> None:
        self._location = location
        self._shards = manifest.shards
        self._rows_per_group = manifest.rows_per_group
        self._name = name
        self._starts = np.cumsum([0, *(shard.rows for shard in manifest.shards)]).tolist()
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_groups")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[int, int], _Group] = OrderedDict()

    def __getitem__(self, row: int) -> bytes:
        """Return the value in a row.

        Raises:
            UnreadableError: If the shard is damaged; names it.
            OSError: If the filesystem does not answer.
        """
        shard = bisect_right(self._starts, row) - 1
        number, place = divmod(row - self._starts[shard], self._rows_per_group)
        with self._lock:
            group = self._groups.setdefault((shard, number), _Group())
            self._groups.move_to_end((shard, number))
            if len(self._groups) > _CACHED_GROUPS:
                self._groups.popitem(last=False)
        with group.lock:
            if group.values is None:
                group.values = self._read(self._shards[shard], number)
            value: bytes = group.values[place].as_py()  # copies this image, so that no group outlives its turn
        return value

    def _read(self, shard: Shard, number: int) -> Any:
        from pyarrow import ArrowException, parquet

        file, footer = _opened(self._location.root, shard)
        try:
            # A reader of its own: pyarrow promises no more than that a file may be read by several threads.
            reader = parquet.ParquetFile(file, metadata=footer, page_checksum_verification=True)
            values = reader.read_row_group(number, columns=[self._name], use_threads=False)[self._name].chunk(0)
            if len(values) != min(self._rows_per_group, shard.rows - number * self._rows_per_group):
                raise IndexError(f"its row group {number} has {len(values)} rows")
            return values
        except (ArrowException, OSError, KeyError, IndexError) as error:  # the last two: of a damaged footer
            if isinstance(error, OSError) and not self._location.local and "CRC" not in str(error):
                raise  # of the network, not of the shard
            raise UnreadableError(_damaged(self._location, shard, error)) from error


class ShardTargetImages:
    """Unlabelled images in shards, decoded when asked for. They read no column but the images'.

    Memory, whatever the size of the dataset's images: 4 row groups, 16 encoded images as packed, beside those that
    threads are decoding; 32 bytes a row of `rows`; and, once per process, the footers of 256 shards at most.

    Args:
        location: Address of the packed dataset.
        manifest: Manifest of the dataset.
        rows: Rows of the dataset that make up the set.
        ids: Ids of these images.
    """

    def __init__(self, location: Location, manifest: Manifest, rows: Sequence[int], ids: Sequence[str]) -> None:
        self.ids = ids
        self._rows = rows
        self._location = location
        self._images = Column(location, manifest, "image")

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> Tensor:
        """Return an RGB image, (3, H, W) uint8.

        Raises:
            UnreadableError: If its shard is damaged; names it.
        """
        try:
            picture = decode_image(self._images[self._rows[index]])
        except UnreadableError as error:
            raise UnreadableError(f"{self.ids[index]}: {error}") from error
        return torch.from_numpy(picture).permute(2, 0, 1)


class ShardImages(ShardTargetImages):
    """Images with labels in shards, decoded when asked for; twice the memory of `ShardTargetImages`.

    Args:
        location: Address of the packed dataset.
        manifest: Manifest of the dataset.
        rows: Rows of the dataset that make up the set; all must have a label.
        ids: Ids of these images.
        values: Values that the dataset's labels hold.
        names: The trained classes; pixels of all others are ignored.
        histograms: Pixels of each of the dataset's classes in each image of the set, (N, C).
    """

    def __init__(
        self,
        location: Location,
        manifest: Manifest,
        rows: Sequence[int],
        ids: Sequence[str],
        values: LabelValues,
        names: Sequence[str],
        histograms: NDArray[np.int64],
    ) -> None:
        super().__init__(location, manifest, rows, ids)
        self._labels = Column(location, manifest, "label")
        self._values = values
        self._table = values.table(names)
        self._histograms = histograms

    def label(self, index: int) -> Tensor:
        """Return class indices, (H, W) uint8, 255 = ignore.

        Raises:
            UnreadableError: If its shard is damaged; names it.
        """
        try:
            stored = decode_ids(self._labels[self._rows[index]], self._values)
        except (UnreadableError, LabelFormatError) as error:
            raise UnreadableError(f"Label of {self.ids[index]}: {error}") from error
        return torch.from_numpy(looked_up(stored, self._table))

    def class_counts(self, num_classes: int) -> Tensor:
        """Return the pixels of each trained class in each image, (N, num_classes) int64; reads nothing."""
        counts = torch.zeros(len(self), num_classes, dtype=torch.int64)
        for class_index, trained in enumerate(self._table[: self._histograms.shape[1]].tolist()):
            if trained < num_classes:
                counts[:, trained] = torch.from_numpy(self._histograms[:, class_index])
        return counts


# --- As a dataset ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardDataset(Dataset):
    """A packed domain. The paths in its splits are SPLIT/ID, names of rows and not of files."""

    location: Location = field(kw_only=True)
    manifest: Manifest = field(kw_only=True)
    index: Index = field(kw_only=True)
    rows: Mapping[Path, int] = field(kw_only=True)

    def unlabelled(self, split: Split) -> ShardTargetImages:
        """Return a split's images without a way to its labels."""
        return ShardTargetImages(self.location, self.manifest, self._rows_of(split), split.ids)

    def labelled(self, split: Split, names: Sequence[str]) -> ShardImages:
        """Return a split's images with labels of the classes `names`."""
        rows = self._rows_of(split)
        histograms = self.index.histograms[rows]
        return ShardImages(self.location, self.manifest, rows, split.ids, self.format.values, names, histograms)

    def lost_file(self, split: Split, index: int) -> str | None:
        """Return None: rows are no files."""
        return None

    def content(self, split: Split, *, labels: bool) -> bytes:
        """Return a hash of a split's content, read from the index."""
        digest = hashlib.sha256()
        for row in self._rows_of(split):
            digest.update(f"{self.index.ids[row]}\0".encode() + self.index.image_digests[row])
            if labels:
                digest.update(self.index.label_digests[row] or b"")
        return digest.digest()

    def _rows_of(self, split: Split) -> list[int]:
        return [self.rows[path] for path in split.images]


def open_shards(root: str) -> ShardDataset:
    """Open a packed dataset: reads its manifest and its index, no shard.

    Raises:
        ValueError: If it was not packed to its end, or is damaged.
    """
    location = Location(root)
    manifest = read_manifest(location)
    index = read_index(location, manifest)
    paths = [Path(split) / name for split, name in zip(index.splits, index.ids, strict=True)]
    splits = {}
    for name in ("train", "val"):
        chosen = [row for row, split in enumerate(index.splits) if split == name]
        images = tuple(paths[row] for row in chosen)
        labels = tuple(paths[row] if index.labelled[row] else None for row in chosen)
        splits[name] = Split(tuple(index.ids[row] for row in chosen), images, labels)
    return ShardDataset(
        kind=SHARDS,
        root=root,
        splits=splits,
        format=LabelFormat(label_values(manifest.classes), decode_ids),
        layout="a packed split `train`",
        notes=_notes(manifest),
        location=location,
        manifest=manifest,
        index=index,
        rows={path: row for row, path in enumerate(paths)},
    )


def label_values(classes: ClassList) -> LabelValues:
    """Return what packed labels hold: indices of the classes, and 255."""
    ids = {name: index for index, name in enumerate(classes.names)}
    return LabelValues(classes, ids, frozenset({IGNORE_INDEX}), strict=True)


def _notes(manifest: Manifest) -> tuple[str, ...]:
    changes = [f"resized to {size_text(manifest.size)} for training"] if manifest.size else []
    changes += ["images compressed as JPEG"] if manifest.image_format == "jpeg" else []
    return (f"packed from {manifest.kind}, {' and '.join(changes)}.",) if changes else ()
