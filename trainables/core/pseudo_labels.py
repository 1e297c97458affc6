"""Pseudo labels of target images: class-balanced selection by confidence, and the files that hold them.

A stage's labels are a folder::

    provenance.json                  how they were made, by which network, and sha256 of the other files; written last
    labels-00000-of-00002.parquet    rows of one worker: `COLUMNS`; the provenance again, as metadata `PROVENANCE_KEY`

B images of H x W pixels, C classes.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segadapt.trainables.core.checkpoint import file_hash
from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.distributed import barrier, rank, sum_over_workers, world_size
from segadapt.trainables.core.journal import note
from segadapt.trainables.core.method import StageData

PROVENANCE = "provenance.json"
"""Says how a folder of pseudo labels was made. Written last: its presence means that the folder is complete."""

PROVENANCE_KEY = b"segadapt.provenance"
"""Metadata of each Parquet file: the provenance as JSON."""

COLUMNS = ("id", "height", "width", "kept", "label")
"""`kept`: share of the pixels that have a label; `label`: classes as an 8-bit PNG, 255 = ignore."""

_HALF = 1 << 16
_ROWS_PER_GROUP = 256


def confidence_and_prediction(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest softmax probability of each pixel and its class.

    Args:
        logits: Already up-sampled to the label size, (B, C, H, W).

    Returns:
        Confidence, (B, H, W) float32 in (0, 1], and class indices, (B, H, W) int64.

    Raises:
        ValueError: If a logit is NaN or +inf.
    """
    confidence, prediction = logits.float().softmax(1).max(1)
    if confidence.isnan().any():
        raise ValueError("`logits` must be finite, but the network returned NaN. Lower the learning rate.")
    return confidence, prediction


class ConfidenceHistogram:
    """Counts float32 confidences per class by one half of their bits, which sort like the numbers they encode.

    Args:
        num_classes: C.
        upper: None counts by the upper 16 bits. Otherwise each class's upper half, (C,) int64: only confidences that
            start with it are counted, by their lower 16 bits.
    """

    def __init__(self, num_classes: int, upper: Tensor | None = None) -> None:
        self.upper = upper
        self.counts = torch.zeros(num_classes, _HALF, dtype=torch.int64)

    def update(self, confidence: Tensor, prediction: Tensor) -> None:
        """Add pixels: confidences, float32 in [0, 1], and the classes predicted there, int64, of the same shape."""
        bits = confidence.flatten().view(torch.int32).long()
        classes = prediction.flatten()
        half = bits >> 16
        if self.upper is not None:
            inside = half == self.upper.to(classes.device)[classes]
            half, classes = bits[inside] & (_HALF - 1), classes[inside]
        counts = torch.bincount(classes * _HALF + half, minlength=self.counts.numel())
        self.counts = self.counts.to(counts.device) + counts.view_as(self.counts)

    def reduce(self) -> None:
        """Sum the counts over the workers; call once, after the last update, on every worker."""
        self.counts = sum_over_workers(self.counts).cpu()

    def locate(self, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the half that holds each class's element number `ranks`, and the element's number within it, (C,)."""
        cumulative = self.counts.cumsum(1)
        half = torch.searchsorted(cumulative, ranks[:, None] + 1).clamp(max=_HALF - 1)
        below = cumulative.gather(1, half) - self.counts.gather(1, half)
        return half[:, 0], ranks - below[:, 0]


def class_thresholds(
    batches: Callable[[], Iterable[Tensor]], num_classes: int, *, quantile: float = 0.5, cap: float = 0.9
) -> Tensor:
    """Return the confidence below which a predicted pixel gets no label, per class.

    With the n confidences of all pixels predicted as a class sorted ascending, q = element number
    `round(quantile * n)`, counted from 0, halves rounded to even, the last element at most; 0 for a class never
    predicted. The threshold is min(q, cap). q is exact, in 0.5 MB per class whatever the size of the set: the first
    pass counts by the upper half of the float's bits, the second by the lower half.

    Args:
        batches: Starts a pass over this worker's share of the set: up-sampled logits, (B, C, H, W). Called twice;
            every worker calls this function.
        num_classes: C.
        quantile: Share of a class's pixels below its q, in [0, 1].
        cap: Largest threshold, in [0, 1].

    Returns:
        (C,) float64 on the CPU, the same on every worker.

    Source:
        Li et al., SDCA, arXiv 2105.05013; BIT-DA/SDCA@d00e7ba.
        Differs: the original sorts all confidences in memory.
    """
    upper = ConfidenceHistogram(num_classes)
    for logits in batches():
        upper.update(*confidence_and_prediction(logits))
    upper.reduce()
    predicted = upper.counts.sum(1)
    ranks = torch.tensor([max(0, min(round(quantile * n), n - 1)) for n in predicted.tolist()])
    high, ranks = upper.locate(ranks)

    lower = ConfidenceHistogram(num_classes, high)
    for logits in batches():
        lower.update(*confidence_and_prediction(logits))
    lower.reduce()
    low, _ = lower.locate(ranks)
    elements = (high * _HALF + low).int().view(torch.float32).double()
    return torch.where(predicted > 0, elements, 0.0).clamp(max=cap)


def select(confidence: Tensor, prediction: Tensor, thresholds: Tensor) -> Tensor:
    """Keep the predictions that reach the threshold of their class; 255 elsewhere.

    Args:
        confidence: (B, H, W) float32.
        prediction: Class indices, (B, H, W) int64.
        thresholds: (C,) float64.

    Returns:
        Labels, (B, H, W) uint8.
    """
    kept = confidence >= thresholds.to(confidence.device)[prediction]
    return torch.where(kept, prediction, IGNORE_INDEX).to(torch.uint8)


def label_target(
    predict: Callable[[Tensor], Tensor], data: StageData, num_classes: int, *, quantile: float = 0.5, cap: float = 0.9
) -> None:
    """Write the pseudo labels of the whole target set to `data.folder`; every worker calls this for its share.

    The network passes over the set three times: twice for `class_thresholds`, once to label.

    Args:
        predict: Maps normalised images, (B, 3, H, W), to logits of the same size, (B, C, H, W).
        data: The un-augmented target set and the folder.
        num_classes: C.
        quantile: See `class_thresholds`.
        cap: See `class_thresholds`.
    """

    def logits() -> Iterator[Tensor]:
        for images, _ in data.target_batches():
            yield predict(images)

    with PseudoLabelWriter(data, num_classes) as writer:
        thresholds = class_thresholds(logits, num_classes, quantile=quantile, cap=cap)
        _label_above(predict, data, thresholds, writer, {"rule": "quantile", "quantile": quantile, "cap": cap})


def label_fixed(predict: Callable[[Tensor], Tensor], data: StageData, num_classes: int, *, threshold: float) -> None:
    """Write the pseudo labels of the whole target set: predictions whose confidence reaches `threshold`, in [0, 1].

    Every worker calls this for its share; for the other arguments see `label_target`.
    """
    thresholds = torch.full((num_classes,), threshold, dtype=torch.float64)
    with PseudoLabelWriter(data, num_classes) as writer:
        _label_above(predict, data, thresholds, writer, {"rule": "fixed"})


def _label_above(
    predict: Callable[[Tensor], Tensor],
    data: StageData,
    thresholds: Tensor,
    writer: "PseudoLabelWriter",
    notes: Mapping[str, Any],
) -> None:
    """Write the predictions that reach the threshold of their class, (C,) float64."""
    counts = torch.zeros(2, len(thresholds), dtype=torch.int64)  # pixels predicted, pixels kept
    for images, indices in data.target_batches():
        confidence, prediction = confidence_and_prediction(predict(images))
        labels = select(confidence, prediction, thresholds)
        parts = [_count(prediction, len(thresholds)), _count(labels, len(thresholds))]
        counts = counts.to(labels.device) + torch.stack(parts)
        writer.write(indices, labels)
    predicted, kept = sum_over_workers(counts).tolist()
    shares = [part / whole if whole else None for part, whole in zip(kept, predicted, strict=True)]
    writer.finish({**notes, "thresholds": thresholds.tolist(), "kept_share": shares})


def _count(labels: Tensor, num_classes: int) -> Tensor:
    """Return the pixels of each class, (C,) int64; 255 is left out."""
    return torch.bincount(labels.flatten(), minlength=IGNORE_INDEX + 1)[:num_classes]


class PseudoLabelWriter:
    """Writes the labels of a stage, whole or not at all: a folder without its mark is not read.

    Every worker opens one, writes its share of the images and finishes it. What an earlier attempt left is replaced.

    Args:
        data: Of the stage: where to write, the images' ids, and what made the labels.
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
            indices: Of the images among the target ids, (B,).
            labels: (B, H, W) uint8, 255 = ignore.
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
