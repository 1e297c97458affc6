"""Is a dataset on disk what its kind promises? Every file is decoded, and every fault is reported."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.data.class_lists import CITYSCAPES_IDS
from segadapt.trainables.core.data.dataset import Dataset, Fault, Split, size_text, unknown_text
from segadapt.trainables.core.data.datasets import open_dataset
from segadapt.trainables.core.data.decoding import (
    LabelFormatError,
    UnreadableError,
    decode_image,
    is_turned,
    read_file,
    turned_text,
)
from segadapt.trainables.core.data.label_statistics import LabelShares, suspicions, warning_text
from segadapt.trainables.core.data.readers.shards import ShardDataset
from segadapt.trainables.core.data.threads import decoding_threads, in_threads

_TRAIN_IDS = {*range(len(CITYSCAPES_IDS)), IGNORE_INDEX}

IGNORED = "ignored"
"""Stands beside the classes in a histogram: pixels of no class."""


@dataclass(frozen=True)
class SplitReport:
    """What a split holds."""

    images: int
    labels: int
    """Images that have a label."""
    sizes: Mapping[str, int]
    """Number of images of each size, WIDTHxHEIGHT."""
    pixels: Mapping[str, int]
    """Labelled pixels of each class, and of none."""
    images_with: Mapping[str, int]
    """Number of labels that show each class."""
    packed_bytes: int
    """Bytes of the files as they are, which is what packing them unchanged takes."""


@dataclass(frozen=True)
class DatasetReport:
    """The answer of `check_dataset`."""

    kind: str
    root: str
    splits: Mapping[str, SplitReport]
    faults: tuple[Fault, ...]
    """Everything that is wrong; empty if the dataset is sound."""
    notes: tuple[str, ...]
    """What is unusual but handled."""
    warnings: tuple[str, ...] = ()
    """What looks wrong, though every file can be read."""


@dataclass(frozen=True)
class _Sample:
    """What was seen of an image and its label."""

    faults: tuple[Fault, ...]
    size: tuple[int, int] | None
    label_size: tuple[int, int] | None
    counts: Mapping[int, int]
    """Pixels of each stored value."""
    bytes: int
    turned: bool
    """Whether the image is turned as its EXIF data ask."""


def check_dataset(
    kind: str, root: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> DatasetReport:
    """Decode every file of a dataset in parallel and report all that is wrong.

    Args:
        kind: One of `KINDS`, or `shards`: files are then compared with the checksums of the manifest, not decoded.
        root: Folder of the dataset.
        progress: Called with the number of samples just done and of all.

    Raises:
        ValueError: If there is no such kind or folder, or its class list cannot be read.
    """
    dataset = open_dataset(kind, root)
    if isinstance(dataset, ShardDataset):
        return _check_shards(dataset, progress)
    total = sum(len(split) for split in dataset.splits.values())
    reports, faults, notes, inspected = {}, [], list(dataset.notes), {}
    for name, split in dataset.splits.items():
        pairs = list(zip(split.images, split.labels, strict=True))
        samples = []
        for sample in in_threads(partial(_inspect, dataset), pairs, decoding_threads()):
            samples.append(sample)
            progress(1, total)
        inspected[name] = samples
        faults += _pairing_faults(split, dataset)
        faults += [fault for sample in samples for fault in sample.faults]
        resized = sum(
            bool(sample.size and sample.label_size and sample.size != sample.label_size) for sample in samples
        )
        if resized and dataset.format.resizes:
            notes.append(f"Labels of {name} that differ in size from their image and are resized to it: {resized}.")
        if turned := sum(sample.turned for sample in samples):
            notes.append(
                f"Images of {name} that are turned as their EXIF data ask, as viewers show them: {turned}. "
                "Their labels must be drawn on the turned image."
            )
        if len({sample.size for sample in samples} - {None}) > 1:
            notes.append(f"Images of {name} differ in size: set augmentation.crop, or a common size.")
        reports[name] = _summary(split, samples, dataset)
    if not len(dataset.splits["train"]):
        faults.append(Fault("no training images", root, f"A {kind} dataset must hold {dataset.layout}."))
    stored = {name: {value for sample in samples for value in sample.counts} for name, samples in inspected.items()}
    if _is_unlabelled(dataset):
        notes += _notes_on_labels(reports)
    return DatasetReport(kind, root, reports, tuple(faults), tuple(notes), _warnings(reports, dataset, stored))


def _check_shards(dataset: ShardDataset, progress: Callable[[int, int], None]) -> DatasetReport:
    """Report what a packed dataset holds, by its index, and the shards that are not as they were packed."""
    manifest, index, location = dataset.manifest, dataset.index, dataset.location
    faults, total = [], len(index.ids)
    for shard in manifest.shards:
        path = f"{location}/{shard.name}"
        try:
            if location.sha256(shard.name) != shard.sha256:
                faults.append(Fault("shard with a wrong checksum", path, f"It holds {shard.rows} images."))
        except OSError as error:
            faults.append(Fault("unreadable shard", path, error.strerror or str(error)))
        progress(shard.rows, total)
    reports = {}
    for name in dataset.splits:
        rows = [row for row, split in enumerate(index.splits) if split == name]
        histograms = index.histograms[rows]
        pixels = dict(zip(dataset.classes.names, histograms.sum(0).tolist(), strict=True))
        ignored = int(index.sizes[rows][index.labelled[rows]].prod(1).sum()) - sum(pixels.values())
        reports[name] = SplitReport(
            images=len(rows),
            labels=int(index.labelled[rows].sum()),
            sizes=dict(Counter(size_text(size) for size in index.sizes[rows].tolist()).most_common()),
            pixels={**pixels, IGNORED: ignored},
            images_with=dict(zip(dataset.classes.names, (histograms > 0).sum(0).tolist(), strict=True)),
            packed_bytes=sum(shard.bytes for shard in manifest.shards if shard.split == name),
        )
    notes = (*dataset.notes, *_notes_on_labels(reports))
    return DatasetReport(dataset.kind, str(location), reports, tuple(faults), notes, _warnings(reports, dataset, {}))


def _is_unlabelled(dataset: Dataset) -> bool:
    """Return whether it can be a target alone, since no training image has a label."""
    return dataset.may_lack_labels and not any(dataset.splits["train"].labels)


def _pairing_faults(split: Split, dataset: Dataset) -> list[Fault]:
    """Return what is wrong with the names of a split's files."""
    faults = split.repeated_ids()
    if not _is_unlabelled(dataset):
        detail = "A source must have it; a target may do without." if dataset.may_lack_labels else ""
        faults += [replace(fault, detail=detail) for fault in split.missing_labels()]
    return faults + [Fault("label without an image", str(path)) for path in split.stray_labels]


def _notes_on_labels(reports: Mapping[str, SplitReport]) -> list[str]:
    """Return what can be done with images that have no label, where that is no fault."""
    images, labels = (sum(getattr(report, of) for report in reports.values()) for of in ("images", "labels"))
    if images and not labels:
        return [f"{images} images without labels: fine for adaptation, nothing to evaluate with."]
    return [
        f"{report.images - report.labels} of {report.images} images of {name} without labels: fine for adaptation"
        + (f", {report.labels} to evaluate with." if name == "val" else ".")
        for name, report in reports.items()
        if report.labels < report.images
    ]


def _warnings(reports: Mapping[str, SplitReport], dataset: Dataset, stored: Mapping[str, set[int]]) -> tuple[str, ...]:
    """Return what looks wrong about the labels of each split.

    Args:
        reports: What the splits hold.
        dataset: Their dataset.
        stored: All values in the labels of each split, as they are stored, where these are known.
    """
    warnings = []
    for name, report in reports.items():
        pixels = {category: count for category, count in report.pixels.items() if category != IGNORED}
        clauses = suspicions(LabelShares.of(report.labels, pixels, report.pixels[IGNORED]))
        if clauses and dataset.format.values.ids == CITYSCAPES_IDS and stored.get(name, {-1}) <= _TRAIN_IDS:
            clauses.insert(0, "every value that they store is a train id (0 to 18, 255)")
        if clauses:
            warnings.append(warning_text(f"Labels of {name}", clauses))
    return tuple(warnings)


def _inspect(dataset: Dataset, files: tuple[Path, Path | None]) -> _Sample:
    image, label = files
    faults: list[Fault] = []
    size = label_size = None
    turned = False
    counts: dict[int, int] = {}
    try:
        height, width, _ = decode_image(read_file(image)).shape
        size, turned = (height, width), is_turned(image)
    except UnreadableError as error:
        faults.append(Fault("unreadable image", str(image), str(error)))
    except OSError as error:
        faults.append(Fault("unreadable image", str(image), error.strerror or str(error)))
    if label is not None:
        try:
            stored = dataset.format.decode(read_file(label), dataset.format.values)
            label_size = stored.shape[0], stored.shape[1]
            pixels = np.bincount(stored.ravel())
            counts = {int(value): int(pixels[value]) for value in np.flatnonzero(pixels)}
        except UnreadableError as error:
            faults.append(Fault("unreadable label", str(label), str(error)))
        except LabelFormatError as error:
            faults.append(Fault("label of the wrong kind", str(label), str(error)))
        except OSError as error:
            faults.append(Fault("unreadable label", str(label), error.strerror or str(error)))
        unknown = sorted(set(counts) - dataset.format.values.known)
        if unknown:
            faults.append(Fault("label with unknown ids", str(label), unknown_text(unknown)))
        if size and label_size and size != label_size and not dataset.format.resizes:
            detail = f"The label is {size_text(label_size)}, its image {size_text(size)}{turned_text(turned)}."
            faults.append(Fault("label and image differ in size", str(label), detail))
    file_bytes = sum(path.stat().st_size for path in (image, label) if path is not None and path.is_file())
    return _Sample(tuple(faults), size, label_size, counts, file_bytes, turned)


def _summary(split: Split, samples: list[_Sample], dataset: Dataset) -> SplitReport:
    names = {value: name for name, value in dataset.format.values.ids.items()}
    pixels = Counter(dict.fromkeys([*dataset.classes.names, IGNORED], 0))
    images_with = Counter(dict.fromkeys(dataset.classes.names, 0))
    for sample in samples:
        for value, count in sample.counts.items():
            pixels[names.get(value, IGNORED)] += count
        images_with.update(names[value] for value in sample.counts if value in names)
    sizes = Counter(size_text(sample.size) for sample in samples if sample.size is not None)
    return SplitReport(
        images=len(split),
        labels=sum(label is not None for label in split.labels),
        sizes=dict(sizes.most_common()),
        pixels=dict(pixels),
        images_with=dict(images_with),
        packed_bytes=sum(sample.bytes for sample in samples),
    )
