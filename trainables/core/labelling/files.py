"""The files that hold the pseudo labels of target images.

A stage's labels are a folder::

    provenance.json                  how they were made, by which network, and sha256 of the other files; written last
    labels-00000-of-00002.parquet    rows of one worker: `COLUMNS`; the provenance again, as metadata `PROVENANCE_KEY`

B images of H x W pixels, C classes.
"""

import io
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.distributed import barrier, rank, sum_over_workers, world_size
from segadapt.trainables.core.journal import note
from segadapt.trainables.core.method import StageData
from segadapt.trainables.core.training.checkpoint import file_hash

PROVENANCE = "provenance.json"
"""Says how a folder of pseudo labels was made. Written last: its presence means that the folder is complete."""

PROVENANCE_KEY = b"segadapt.provenance"
"""Metadata of each Parquet file: the provenance as JSON."""

COLUMNS = ("id", "height", "width", "kept", "label")
"""`kept`: share of the pixels that have a label; `label`: classes as an 8-bit PNG, 255 = ignore."""

_ROWS_PER_GROUP = 256


class PseudoLabelWriter:
    """Writes the labels of a stage, whole or not at all: a folder without its mark is not read.

    Every worker opens one, writes its share of the images and finishes it. What an earlier attempt left is replaced.

    Args:
        data: What the stage knows: where to write, the images' ids, and what made the labels.
        num_classes: C.
    """

    def __init__(self, data: StageData, num_classes: int) -> None:
        from pyarrow import parquet

        self._data = data
        self._name = f"labels-{rank():05d}-of-{world_size():05d}.parquet"
        self._partial = data.folder / f".{self._name}.partial"
        self._pixels = torch.zeros(num_classes + 1, dtype=torch.int64)  # of each class, and without label
        data.folder.mkdir(parents=True, exist_ok=True)
        if rank() == 0:
            (data.folder / PROVENANCE).unlink(missing_ok=True)
            for old in (*data.folder.glob("labels-*.parquet"), *data.folder.glob(".labels-*.partial")):
                old.unlink()
        barrier()
        self._writer = parquet.ParquetWriter(self._partial, _schema(), compression="none", use_dictionary=False)
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> "PseudoLabelWriter":
        """Write within the context."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file; unless `finish` was called, it is not read."""
        self._writer.close()

    def write(self, indices: Tensor, labels: Tensor) -> None:
        """Add images.

        Args:
            indices: Positions of the images among the target ids, (B,).
            labels: Labels of the images, (B, H, W) uint8, 255 = ignore.
        """
        for index, label in zip(indices.tolist(), labels.cpu(), strict=True):
            counts = torch.bincount(label.flatten(), minlength=IGNORE_INDEX + 1)
            self._pixels[:-1] += counts[: len(self._pixels) - 1]
            self._pixels[-1] += counts[IGNORE_INDEX]
            height, width = label.shape
            values = (self._data.target_ids[index], height, width, 1 - counts[IGNORE_INDEX].item() / label.numel())
            self._rows.append(dict(zip(COLUMNS, (*values, _encoded(label)), strict=True)))
        if len(self._rows) >= _ROWS_PER_GROUP:
            self._flush()

    def finish(self, provenance: Mapping[str, Any]) -> None:
        """Complete the labels; call once, on every worker, after its last image.

        Args:
            provenance: Rule and thresholds, the same on every worker. Who made the labels, the share of all pixels that
                has one and the share of each class among them are added.
        """
        pixels = sum_over_workers(self._pixels)
        labelled = max(1, int(pixels[:-1].sum()))
        complete = {
            **self._data.made_by,
            **provenance,
            "images": len(self._data.target_ids),
            "labelled_share": pixels[:-1].sum().item() / max(1, int(pixels.sum())),
            "class_shares": [count / labelled for count in pixels[:-1].tolist()],
        }
        self._flush()
        self._writer.add_key_value_metadata({PROVENANCE_KEY: json.dumps(complete, sort_keys=True).encode()})
        self._writer.close()
        self._partial.replace(self._data.folder / self._name)
        barrier()
        if rank() == 0:
            self._mark(complete)
            self._note(complete)
        barrier()

    def _note(self, provenance: Mapping[str, Any]) -> None:
        share, images = provenance["labelled_share"], provenance["images"]
        note(
            "pseudo_labels",
            f"Labelled {share:.1%} of the pixels of {images} target images by the rule '{provenance.get('rule')}'.",
            stage=self._data.folder.name,
            images=images,
            labelled_share=share,
            class_shares=provenance["class_shares"],
        )

    def _flush(self) -> None:
        import pyarrow

        if self._rows:
            self._writer.write_table(pyarrow.Table.from_pylist(self._rows, schema=_schema()))
            self._rows = []

    def _mark(self, provenance: Mapping[str, Any]) -> None:
        folder = self._data.folder
        files = {path.name: file_hash(path) for path in sorted(folder.glob("labels-*.parquet"))}
        partial = folder / f".{PROVENANCE}.partial"
        partial.write_text(json.dumps({**provenance, "files": files}, indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / PROVENANCE)


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return how a finished folder of pseudo labels was made."""
    content: dict[str, Any] = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    return content


def _schema() -> Any:
    import pyarrow

    types = (pyarrow.string(), pyarrow.int32(), pyarrow.int32(), pyarrow.float64(), pyarrow.binary())
    return pyarrow.schema(list(zip(COLUMNS, types, strict=True)))


def _encoded(label: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(label.numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


class PseudoLabelFolder:
    """Pseudo labels on disk, read by image id; the encoded labels of the whole set are held in memory.

    Args:
        folder: Where a `PseudoLabelWriter` wrote.
        image_ids: Target images that must have a label.

    Attributes:
        provenance: How the labels were made.
        files: sha256 of each file.

    Raises:
        ValueError: If the completion mark is missing, a file is not what was written, or an image has no label.
    """

    def __init__(self, folder: Path, image_ids: Sequence[str]) -> None:
        self.folder = folder
        mark = folder / PROVENANCE
        if not mark.is_file():
            raise ValueError(
                f"A finished folder of pseudo labels must hold {PROVENANCE}, but {folder} does not: writing it was "
                "interrupted. Delete the folder to rebuild it."
            )
        self.provenance: dict[str, Any] = json.loads(mark.read_text(encoding="utf-8"))
        self.files: dict[str, str] = self.provenance.pop("files")
        for name, digest in self.files.items():
            path = folder / name
            if not path.is_file() or file_hash(path) != digest:
                raise ValueError(f"{path} must be as it was written, but is missing or changed. Delete {folder}.")
        missing = [image_id for image_id in image_ids if image_id not in self._labels]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(image_ids)} target images have no pseudo label, e.g. {missing[0]}. "
                f"Delete the folder {folder} to rebuild it."
            )

    @cached_property
    def _labels(self) -> dict[str, bytes]:
        from pyarrow import parquet

        tables = [parquet.read_table(self.folder / name, columns=["id", "label"]) for name in self.files]
        return {row["id"]: row["label"] for table in tables for row in table.to_pylist()}

    def read(self, image_id: str) -> Tensor:
        """Return the labels of an image, (H, W) uint8, 255 = ignore."""
        with Image.open(io.BytesIO(self._labels[image_id])) as image:
            return torch.from_numpy(np.array(image))
