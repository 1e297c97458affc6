"""Writes a dataset in files as Parquet shards (`readers.shard_format`), which are read several times faster.

A killed run leaves finished shards and `packing.json`, what it was asked for; the same call goes on with the missing
shards. Which rows a shard holds, and its bytes, follow from the dataset and the settings alone.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from segadapt.trainables.core.data.dataset import Dataset, Split
from segadapt.trainables.core.data.readers.shard_format import (
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    FileRecord,
    Location,
    Manifest,
    Shard,
    read_manifest,
)
from segadapt.trainables.core.data.threads import in_threads
from segadapt.trainables.core.data.transforms import Size, resized, resized_label
from segadapt.trainables.core.validation import check

PLAN = "packing.json"
"""What an unfinished folder is being packed from, and how."""

ROWS_PER_SHARD = 128
ROWS_PER_GROUP = 4
"""A row group is what one read takes: a few images, since training reads rows in any order."""

_MAGIC = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff"}
_MEANING = {"kind": "the kind", "encoding": "--format or --quality", "resize": "--size", "splits": "--split"}


@dataclass(frozen=True)
class PackConfig:
    """How images are stored."""

    size: Size | None = None
    """(H, W) that the split `train` is resized to, images and labels; the split `val` keeps its size."""
    image_format: Literal["png", "jpeg"] = "png"
    """png: without loss. jpeg: several times smaller, and faster to decode."""
    quality: int = 95
    """Quality of JPEG; colours are stored at full resolution."""

    def __post_init__(self) -> None:
        check(self.size is None or min(self.size) >= 1, "--size must be HEIGHT WIDTH in pixels", self.size)
        check(self.image_format in _MAGIC, "--format must be png or jpeg", self.image_format)
        check(1 <= self.quality <= 100, "--quality must lie in [1, 100]", self.quality)

    def size_in(self, split: str) -> Size | None:
        """Return what images of a split are resized to."""
        return self.size if split == "train" else None

    def encode(self, image: Tensor) -> bytes:
        """Return an image, (3, H, W) uint8, as stored."""
        picture, buffer = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), io.BytesIO()
        if self.image_format == "png":
            picture.save(buffer, "PNG")
        else:
            picture.save(buffer, "JPEG", quality=self.quality, subsampling=0)
        return buffer.getvalue()

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as the manifest has them."""
        encoding: dict[str, Any] = {"image": self.image_format, "label": "png"}
        if self.image_format == "jpeg":
            encoding |= {"quality": self.quality, "subsampling": "4:4:4"}
        resize = {
            "size": list(self.size or ()),
            "splits": ["train"],
            "image": "bilinear, antialiased",
            "label": "nearest",
        }
        return {"encoding": encoding, "resize": resize if self.size else None}


def pack(
    dataset: Dataset,
    out: Path,
    config: PackConfig,
    *,
    splits: Sequence[str] | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write a dataset as shards, or go on with it.

    Args:
        dataset: What to pack, in files. An image that has the format asked for and is not resized is stored as it is.
        out: A new or empty folder, or one in which the same was packed before, to its end or not.
        config: How images are stored.
        splits: Names of the splits to pack; None packs all that hold images.
        threads: Number of threads that decode and encode; None for one per core. Each holds two images more in memory.
        progress: Called with the number of images just done and of all.

    Returns:
        The manifest, which is also written.

    Raises:
        ValueError: If an image or label cannot be read, a split has none, or the folder holds something else.
    """
    chosen = _chosen(dataset, splits)
    plan = _plan(dataset, chosen, config)
    total = sum(len(split) for split in chosen.values())
    with _exclusively(out, plan):
        if (out / MANIFEST).exists():
            progress(total, total)
            return read_manifest(Location(str(out)))
        missing = [part for part in _parts(chosen) if not (out / part.name).exists()]
        progress(total - sum(len(part.split) for part in missing), total)
        rows = in_threads(
            lambda item: _row(dataset, config, *item),
            [(part, index) for part in missing for index in range(len(part.split))],
            threads or os.cpu_count() or 1,
        )
        for part in missing:
            with _replacing(out / part.name) as path:
                _write_shard(path, rows, len(part.split), lambda: progress(1, total))
        _conclude(out, plan, [(part.name, part.split_name) for part in _parts(chosen)])
        return read_manifest(Location(str(out)))


@dataclass(frozen=True)
class _Part:
    """The rows of one shard."""

    name: str
    split_name: str
    split: Split


def _chosen(dataset: Dataset, names: Sequence[str] | None) -> dict[str, Split]:
    with_images = [name for name, split in dataset.splits.items() if len(split)]
    unknown = [name for name in names or () if name not in with_images]
    if unknown or not with_images:
        raise ValueError(
            f"--split must be one of {', '.join(with_images)}, but got {', '.join(unknown)}."
            if with_images
            else f"A {dataset.kind} dataset must hold {dataset.layout}, but {dataset.root} has none. "
            f"{dataset.check_command} says more."
        )
    chosen = {name: dataset.splits[name] for name in with_images if names is None or name in names}
    for name, split in chosen.items():
        if faults := split.repeated_ids():
            raise ValueError(
                f"Files of {name} must differ in name, but {len(faults)} do not, e.g. {faults[0].path}. "
                f"{dataset.check_command} lists all."
            )
    return chosen


def _parts(splits: Mapping[str, Split]) -> list[_Part]:
    return [
        _Part(f"{name}-{first // ROWS_PER_SHARD:05d}.parquet", name, split.subset(range(len(split))[first:last]))
        for name, split in splits.items()
        for first in range(0, len(split), ROWS_PER_SHARD)
        for last in (first + ROWS_PER_SHARD,)
    ]


# --- The folder ------------------------------------------------------------------------------------------------------


def _plan(dataset: Dataset, splits: Mapping[str, Split], config: PackConfig) -> dict[str, Any]:
    """Return all that decides what is written."""
    source = hashlib.sha256(repr(sorted(dataset.format.values.ids.items())).encode())
    for split in splits.values():
        source.update(dataset.content(split, labels=True))
    classes = zip(dataset.classes.names, dataset.classes.colors, strict=True)
    return {
        "version": FORMAT_VERSION,
        "kind": dataset.kind,
        "classes": [{"name": name, "color": list(color)} for name, color in classes],
        "splits": {
            name: {"images": len(split), "labels": sum(label is not None for label in split.labels)}
            for name, split in splits.items()
        },
        **config.as_dict(),
        "rows_per_shard": ROWS_PER_SHARD,
        "rows_per_group": ROWS_PER_GROUP,
        "source": {"fingerprint": source.hexdigest()},
    }


@contextlib.contextmanager
def _exclusively(out: Path, plan: Mapping[str, Any]) -> Iterator[None]:
    """Keep a folder for this process, having seen that it is new or of the same plan."""
    if (out / MANIFEST).exists():  # nothing is written any more
        _refuse_other_plan(out, json.loads((out / MANIFEST).read_text()), plan)
        yield
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"The folder to pack into must be a folder, but {out} is a file. Choose another.")
    is_begun = (out / PLAN).exists() or (out / MANIFEST).exists()
    if not is_begun and out.exists() and any(path.suffix != _PARTIAL for path in out.iterdir()):
        raise ValueError(f"The folder to pack into must be new, empty or begun, but {out} is not. Choose another.")
    out.mkdir(parents=True, exist_ok=True)
    with (out / _LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the system, however this process ends
        except BlockingIOError as error:
            raise ValueError(f"A folder must be packed by one process at a time, but another packs {out}.") from error
        begun = next((path for path in (out / MANIFEST, out / PLAN) if path.exists()), None)  # now nobody writes it
        if begun is not None:
            _refuse_other_plan(out, json.loads(begun.read_text()), plan)
        else:
            _write_json(out / PLAN, plan)
        yield
        (out / _LOCK).unlink(missing_ok=True)  # all is written: whoever has opened it finds the manifest


def _refuse_other_plan(out: Path, earlier_plan: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    differing = [name for name, value in plan.items() if earlier_plan.get(name) != value]
    if differing:
        what = ", ".join(_MEANING[name] for name in differing if name in _MEANING)
        raise ValueError(
            f"A folder in which a dataset was packed must be given the same dataset and settings, but "
            f"{what or 'the content of the dataset or the version of segadapt'} differs from what {out} was begun "
            "with. Choose another folder, or delete this one."
        )


_PARTIAL = ".partial"

_LOCK = f".lock{_PARTIAL}"
"""File in a folder that is being packed, locked by the process that packs."""


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a name to write to, and give it to `path` once its content is on the disk."""
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    yield partial
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def _write_json(path: Path, content: object) -> None:
    with _replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


# --- Rows ------------------------------------------------------------------------------------------------------------


def _row(dataset: Dataset, config: PackConfig, part: _Part, index: int) -> dict[str, Any]:
    """Return one image and its label as a row of a shard."""
    one = part.split.subset([index])
    size = config.size_in(part.split_name)
    path = one.images[0]
    original = dataset.unlabelled(one).image(0)
    image = resized(original, size)
    unchanged = path.read_bytes() if image is original else b""
    encoded = unchanged if unchanged.startswith(_MAGIC[config.image_format]) else config.encode(image)
    histogram = label_data = None
    if one.labels[0] is not None:
        label = dataset.labelled(one, dataset.classes.names).label(0)
        label = resized_label(label, (image.shape[1], image.shape[2]))
        buffer = io.BytesIO()
        Image.fromarray(label.contiguous().numpy()).save(buffer, "PNG")
        label_data = buffer.getvalue()
        histogram = torch.bincount(label.flatten(), minlength=256)[: len(dataset.classes)].tolist()
    return {
        "id": one.ids[0],
        "split": part.split_name,
        "height": image.shape[1],
        "width": image.shape[2],
        "histogram": histogram,
        "image": encoded,
        "label": label_data,
    }


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("split", pa.string(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("histogram", pa.list_(pa.int64())),
            pa.field("image", pa.binary(), nullable=False),
            pa.field("label", pa.binary()),
        ]
    )


def _write_shard(path: Path, rows: Iterator[dict[str, Any]], count: int, written: Callable[[], None]) -> None:
    """Write the next `count` rows, a row group at a time."""
    import pyarrow as pa
    from pyarrow import parquet

    settings = {"compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    with parquet.ParquetWriter(path, _schema(), **settings) as writer:
        for first in range(0, count, ROWS_PER_GROUP):
            group = []
            for row in islice(rows, min(ROWS_PER_GROUP, count - first)):
                group.append(row)
                written()
            writer.write_table(pa.Table.from_pylist(group, schema=_schema()))


def _conclude(out: Path, plan: Mapping[str, Any], shards: Sequence[tuple[str, str]]) -> None:
    """Write index and manifest, from what the shards hold."""
    import pyarrow as pa
    from pyarrow import parquet

    tables = [_index_of(out / name) for name, _ in shards]
    with _replacing(out / INDEX) as partial:
        parquet.write_table(pa.concat_tables(tables), partial, compression="zstd", write_statistics=False)
    location = Location(str(out))

    def record(name: str) -> dict[str, Any]:
        return asdict(FileRecord(name, (out / name).stat().st_size, location.sha256(name)))

    records = [
        asdict(Shard(**record(name), split=split, rows=table.num_rows))
        for (name, split), table in zip(shards, tables, strict=True)
    ]
    versions = {name: version(name) for name in ("segadapt", "pyarrow", "pillow", "torchvision")}
    _write_json(out / MANIFEST, {**plan, "written_with": versions, "index": record(INDEX), "shards": records})
    (out / PLAN).unlink()


def _index_of(shard: Path) -> Any:
    """Return a shard's rows with checksums in place of images and labels."""
    import pyarrow as pa
    from pyarrow import parquet

    def digests(values: Any) -> Any:
        checksums_of_values = [
            hashlib.sha256(value.as_buffer()).digest() if value.is_valid else None for value in values
        ]
        return pa.array(checksums_of_values, pa.binary(32))

    parts = []
    with parquet.ParquetFile(shard, page_checksum_verification=True) as reader:
        for group in range(reader.num_row_groups):
            table = reader.read_row_group(group)
            for column in ("image", "label"):
                checksums = digests(table[column])
                table = table.drop_columns([column]).append_column(f"{column}_sha256", checksums)
            parts.append(table)
    return pa.concat_tables(parts)
