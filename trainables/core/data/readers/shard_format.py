"""Files of a packed dataset, read from a folder or a bucket.

`segadapt data pack` writes them (`data.packing`). A packed dataset is a folder::

    manifest.json         kind, classes, splits, resizing, encoding, and sha256 and size of every other file
    index.parquet         id, split, size, histogram, and sha256 of image and label of every row: all but the pixels
    train-00000.parquet   rows of one split in order: `COLUMNS`; groups of `rows_per_group` rows, without compression

The folder is a path or a URI of `pyarrow.fs` (s3://, gs://, hdfs://, file://). Files of a path are mapped into memory.
"""

import hashlib
import json
import os
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from numpy.typing import NDArray

from segadapt.trainables.core.data.batch import ClassList

MANIFEST = "manifest.json"

INDEX = "index.parquet"

FORMAT_VERSION = 1

_ANSWER_S = 10.0
"""Seconds in which the server of a bucket must answer."""

COLUMNS = ("id", "split", "height", "width", "histogram", "image", "label")
"""`histogram`: pixels of each class of the manifest; null, as is `label`, where the image has no label."""


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of a file beside it."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard(FileRecord):
    """What the manifest says of a shard."""

    split: str
    rows: int


@dataclass(frozen=True)
class Manifest:
    """What a packed dataset holds and how it was made."""

    kind: str
    """Kind of the dataset that was packed."""
    classes: ClassList
    splits: Mapping[str, Mapping[str, int]]
    """`images` and `labels` of each split."""
    size: tuple[int, int] | None
    """(H, W) the training split was resized to."""
    image_format: str
    rows_per_group: int
    index: FileRecord
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Index:
    """What is known of every row without its pixels, in the order of the shards."""

    ids: list[str]
    splits: list[str]
    sizes: NDArray[np.int64]  # (N, 2): height and width
    labelled: NDArray[np.bool_]  # (N,)
    histograms: NDArray[np.int64]  # (N, C), 0 where there is no label
    image_digests: list[bytes]
    label_digests: list[bytes | None]


def is_uri(root: str) -> bool:
    """Return whether a root names a filesystem of `pyarrow.fs`, and not a folder."""
    return "://" in root


class Location:
    """A folder, or a prefix of a bucket, whose files are read. Connects when needed; pickles as its address.

    Args:
        root: A path or a URI; options of the filesystem follow a `?`, as in s3://bucket/path?region=eu-central-1.
    """

    def __init__(self, root: str) -> None:
        self.root = root

    def __getstate__(self) -> str:
        return self.root

    def __setstate__(self, state: str) -> None:
        self.root = state

    def __str__(self) -> str:
        return self.root

    @property
    def local(self) -> bool:
        """Whether files are mapped into memory."""
        return not is_uri(self.root)

    def open(self, name: str) -> Any:
        """Return a file as a `pyarrow.NativeFile`, whose reads at a position may run in several threads.

        Raises:
            OSError: If there is none, or the filesystem does not answer.
            ValueError: If the address is malformed.
        """
        if self.local:
            import pyarrow

            return pyarrow.memory_map(str(Path(self.root) / name))
        filesystem, folder = self._filesystem
        return filesystem.open_input_file(f"{folder.rstrip('/')}/{name}")

    def read(self, name: str) -> bytes:
        """Return the content of a file; raises as `open` does."""
        with self.open(name) as file:
            content: bytes = file.read()
            return content

    def sha256(self, name: str) -> str:
        """Return the checksum of a file; raises as `open` does."""
        digest = hashlib.sha256()
        with self.open(name) as file:
            while part := file.read(1 << 22):
                digest.update(part)
        return digest.hexdigest()

    @cached_property
    def _filesystem(self) -> tuple[Any, str]:
        from pyarrow import fs

        _check_server(self.root)
        filesystem, folder = fs.FileSystem.from_uri(self.root)
        return filesystem, folder


def _check_server(uri: str) -> None:
    """Make sure that the server of a bucket answers, if one is named: pyarrow would ask it for minutes.

    Args:
        uri: Names it by `endpoint_override`, or else the environment may by AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL.

    Raises:
        OSError: If it does not.
    """
    parts = urlsplit(uri)
    options = parse_qs(parts.query)
    variables = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if parts.scheme == "s3" else ()
    named = [*options.get("endpoint_override", ()), *(os.environ.get(name, "") for name in variables)]
    server = next(filter(None, named), None)
    if server is None:
        return
    scheme = server.partition("://")[0] if "://" in server else options.get("scheme", ["https"])[0]
    protocol = HTTPConnection if scheme == "http" else HTTPSConnection
    connection = protocol(server.rpartition("://")[2].rstrip("/"), timeout=_ANSWER_S)
    try:
        connection.request("HEAD", "/")
        connection.getresponse()
    except (ssl.SSLError, HTTPException):  # it answers; what it says, pyarrow judges
        pass
    except OSError as error:
        raise OSError(f"the server {server} does not answer: {error}") from error
    finally:
        connection.close()


def read_manifest(location: Location) -> Manifest:
    """Return what a packed dataset holds.

    Raises:
        ValueError: If there is no manifest, or none that this version can read.
    """
    try:
        content = json.loads(location.read(MANIFEST))
    except FileNotFoundError as error:
        raise ValueError(
            f"The root of packed shards must hold {MANIFEST}, which `segadapt data pack` writes last, but {location} "
            "does not. If packing was interrupted, run the same command again."
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{MANIFEST} in {location} must be readable, but is not: {error}") from error
    try:
        version = content["version"]
        if version != FORMAT_VERSION:
            raise ValueError(
                f"Packed shards must have version {FORMAT_VERSION} of the format, but {location} has {version}. "
                "Pack the dataset anew, or use the version of segadapt that packed it."
            )
        _check_names(location, [content["index"]["name"], *(shard["name"] for shard in content["shards"])], parts=1)
        resize = content["resize"]
        return Manifest(
            kind=content["kind"],
            classes=ClassList(
                tuple(entry["name"] for entry in content["classes"]),
                tuple((red, green, blue) for red, green, blue in (entry["color"] for entry in content["classes"])),
            ),
            splits=content["splits"],
            size=(resize["size"][0], resize["size"][1]) if resize else None,
            image_format=content["encoding"]["image"],
            rows_per_group=content["rows_per_group"],
            index=FileRecord(**content["index"]),
            shards=tuple(Shard(**entry) for entry in content["shards"]),
        )
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{MANIFEST} in {location} must be as `segadapt data pack` wrote it, but is not: {error!r}. Pack anew."
        ) from error


def read_index(location: Location, manifest: Manifest) -> Index:
    """Return what is known of every row.

    Raises:
        ValueError: If the index is missing, or not the one that the manifest names.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        content = location.read(INDEX)
    except OSError as error:
        raise ValueError(f"{INDEX} in {location} must be readable, but is not: {error}. Pack anew.") from error
    if hashlib.sha256(content).hexdigest() != manifest.index.sha256:
        raise ValueError(f"{INDEX} in {location} must have the checksum in {MANIFEST}, but has not. Pack anew.")
    table = parquet.read_table(pyarrow.BufferReader(content), use_threads=False)
    _check_names(location, table["id"].to_pylist())
    nothing = [0] * len(manifest.classes)
    histograms = table["histogram"].to_pylist()
    rows, classes = table.num_rows, len(manifest.classes)
    return Index(
        ids=table["id"].to_pylist(),
        splits=table["split"].to_pylist(),
        sizes=np.stack([table["height"].to_numpy(), table["width"].to_numpy()], axis=1).astype(np.int64),
        labelled=np.array([histogram is not None for histogram in histograms], np.bool_),
        histograms=np.array([histogram or nothing for histogram in histograms], np.int64).reshape(rows, classes),
        image_digests=table["image_sha256"].to_pylist(),
        label_digests=table["label_sha256"].to_pylist(),
    )


def _check_names(location: Location, names: Sequence[str], parts: int | None = None) -> None:
    """Make sure that the names of files and images stay in their folder: whoever packed the data chose them.

    Args:
        location: Where they are from.
        names: May have several parts, as paths have.
        parts: How many they must have; None takes any number.

    Raises:
        ValueError: If a name leads elsewhere.
    """
    for name in names:
        path = PurePosixPath(name)
        stays = not path.is_absolute() and ".." not in path.parts and (parts is None or len(path.parts) == parts)
        if name != str(path) or not stays:
            raise ValueError(
                f"Names of files and images must be relative and stay in their folder, but {location} has {name!r}. "
                "Pack the dataset anew, or do not use it."
            )
