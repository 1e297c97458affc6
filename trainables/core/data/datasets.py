"""Which images a trial uses."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

from segadapt.trainables.core.data.batch import DomainData, EvaluationData, LabelledDomains
from segadapt.trainables.core.data.class_lists import SUBSETS, match
from segadapt.trainables.core.data.dataset import Dataset, Fault, Split
from segadapt.trainables.core.data.decoding import LabelFormatError, UnreadableError
from segadapt.trainables.core.data.readers.cityscapes import open_cityscapes, write_cityscapes
from segadapt.trainables.core.data.readers.folder import open_folder, write_both_folders
from segadapt.trainables.core.data.readers.gta5 import open_gta5, write_gta5
from segadapt.trainables.core.data.readers.shard_format import Location, is_uri, read_manifest
from segadapt.trainables.core.data.readers.shards import SHARDS, open_shards
from segadapt.trainables.core.data.readers.synthia import open_synthia, write_synthia
from segadapt.trainables.core.data.streets import StreetsConfig, load_streets
from segadapt.trainables.core.data.threads import decoding_threads, in_threads
from segadapt.trainables.core.validation import check


@dataclass(frozen=True)
class Kind:
    """A kind of dataset in files."""

    open: Callable[[Path], Dataset]
    """Lists the files in a dataset's folder."""
    write: Callable[[Path, LabelledDomains], None]
    """Writes images to a new or empty folder as datasets of the kind are stored."""
    written: str
    """What `write` writes of the images of both domains, for people."""


KINDS: Mapping[str, Kind] = {
    "gta5": Kind(
        open_gta5,
        lambda root, images: write_gta5(root, images.source_train, images.classes.names),
        "the source's training set",
    ),
    "synthia": Kind(
        open_synthia,
        lambda root, images: write_synthia(root, images.source_train, images.classes.names),
        "the source's training set",
    ),
    "cityscapes": Kind(
        open_cityscapes,
        lambda root, images: write_cityscapes(root, images.target_train, images.target_val, images.classes.names),
        "the target",
    ),
    "folder": Kind(open_folder, write_both_folders, "both domains"),
}
"""All kinds of datasets in files, by their names in KIND:ROOT."""

READABLE = (*KINDS, SHARDS)
"""All kinds that can be read, packed ones too."""

_NAMED = 20  # files that a note names at most


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Source, target and how they are read."""

    source: str | None = None
    """Labelled domain as KIND:ROOT, e.g. gta5:/data/GTA5; or synthia, cityscapes, folder, shards. None: streets."""
    target: str | None = None
    """Unlabelled domain as KIND:ROOT, e.g. cityscapes:/data/cityscapes; given with `source`. None: streets."""
    classes: Literal["auto", 19, 16, 13] = "auto"
    """Trained classes: `auto` trains all that both domains name; a number trains that subset of Cityscapes' 19."""
    holdout: int = 100
    """Images set aside for validation, at most a fifth, of a domain that has no validation split of its own."""
    skip_bad: bool = False
    """Decode every file at the start, and leave out those that cannot be. Otherwise such a file ends the trial."""
    oracle: bool = False
    """Train on the labelled target training set in place of the source: the upper bound, never a method's result."""
    streets: StreetsConfig = field(default_factory=StreetsConfig)

    def __post_init__(self) -> None:
        check(
            (self.source is None) == (self.target is None),
            "data.source and data.target must be given together, or neither for streets",
            {"data.source": self.source, "data.target": self.target},
        )
        for name, value in (("data.source", self.source), ("data.target", self.target)):
            if value is not None:
                split_location(value, name)
        check(
            self.classes == "auto" or self.source is not None,
            "data.classes must be auto with streets, whose classes are fixed",
            self.classes,
        )
        check(self.holdout >= 1, "data.holdout must be at least 1", self.holdout)

    @property
    def name(self) -> str:
        """Name of the pair, such as gta5-cityscapes."""
        if self.source is None or self.target is None:
            return "streets"
        return "-".join(split_location(value, "")[0] for value in (self.source, self.target))


def split_location(text: str, name: str) -> tuple[str, str]:
    """Split KIND:ROOT.

    Raises:
        ValueError: If it is not written so, or the kind is not known; says that `name` must be.
    """
    kind, separator, root = text.partition(":")
    check(
        bool(separator and root) and kind in READABLE,
        f"{name} must be KIND:ROOT with KIND one of {', '.join(READABLE)}",
        text,
        f"Example: {name}=gta5:/data/GTA5",
    )
    return kind, root


def open_dataset(kind: str, root: str) -> Dataset:
    """List the files of a dataset.

    Raises:
        ValueError: If the kind is not known, the folder does not exist or its class list is malformed.
    """
    check(kind in READABLE, f"The kind of a dataset must be one of {', '.join(READABLE)}", kind)
    if kind == SHARDS and (is_uri(root) or Path(root).is_dir()):
        return open_shards(root)
    if not Path(root).is_dir():
        raise ValueError(
            f"The root of a {kind} dataset must be an existing folder, but got {root!r}. "
            f"`segadapt data {'pack' if kind == SHARDS else f'make FOLDER --format {kind}'}` writes one."
        )
    return KINDS[kind].open(Path(root))


def packed_size(location: object) -> tuple[int, int] | None:
    """Return the height and width that the training images of packed shards were resized to; None for anything else.

    Args:
        location: A value of `data.source` or `data.target`, as it was given.
    """
    kind, _, root = str(location).partition(":")
    if kind != SHARDS:
        return None
    try:
        return read_manifest(Location(root)).size
    except ValueError:  # it is no packed dataset, which `load_data` says
        return None


@lru_cache(maxsize=4)
def load_data(config: DataConfig) -> tuple[DomainData, EvaluationData]:
    """Return what training may use and what evaluation alone may use.

    Raises:
        ValueError: If the data is missing or malformed; names what must be there.
    """
    if config.source is None or config.target is None:
        return load_streets(config.streets, oracle=config.oracle)
    source = open_dataset(*split_location(config.source, "data.source"))
    target = open_dataset(*split_location(config.target, "data.target"))
    matching = match(source.classes, target.classes, None if config.classes == "auto" else SUBSETS[str(config.classes)])
    notes = [str(matching), *(f"{dataset.root}: {note}" for dataset in (source, target) for note in dataset.notes)]
    source_train, source_val = _parts("source", source, config, not config.oracle, notes)
    target_train, target_val = _parts("target", target, config, config.oracle, notes)
    notes += _notes_on_labels(target_val)

    names = matching.classes.names
    trained, trained_split = (target, target_train) if config.oracle else (source, source_train)
    digest = hashlib.sha256(repr((config.name, config.oracle, matching.classes)).encode())
    for dataset in (source, target):
        digest.update(repr(sorted(dataset.format.values.ids.items())).encode())
    for dataset, split, labels in (
        (trained, trained_split, True),
        (target, target_train, False),
        (source, source_val, True),
        (target, target_val, True),
    ):
        digest.update(dataset.content(split, labels=labels))
    labelled, unlabelled = trained.labelled(trained_split, names), target.unlabelled(target_train)
    data = DomainData(labelled, unlabelled, matching.classes, digest.hexdigest(), tuple(notes))
    return data, EvaluationData(
        source=source.labelled(source_val, names),
        target=target.labelled(target_val.with_labels(), names),
        scored=target.unlabelled(target_val),
        classes=matching.classes,
    )


def _parts(
    domain: str, dataset: Dataset, config: DataConfig, train_labels: bool, notes: list[str]
) -> tuple[Split, Split]:
    """Return the training and the validation part of a domain, checked; adds to the notes.

    Held out, where there is no validation split, are the training images whose hashed ids come first: the same ones
    wherever the dataset lies.
    """
    train, val = dataset.splits["train"], dataset.splits.get("val", Split((), (), ()))
    least = 1 if len(val) else 2
    if len(train) < least:
        raise ValueError(
            f"A {dataset.kind} dataset must hold {dataset.layout}, with at least {least} training images, but "
            f"{dataset.root} has {len(train)}. {dataset.check_command} says more."
        )
    if not len(val):
        by_hash = sorted(range(len(train)), key=lambda index: hashlib.sha256(train.ids[index].encode()).digest())
        held_out = set(by_hash[: min(config.holdout, max(1, len(train) // 5))])
        notes.append(f"{len(held_out)} of {len(train)} {domain} images are set aside for validation.")
        val = train.subset(sorted(held_out))
        train = train.subset([index for index in range(len(train)) if index not in held_out])
    parts = []
    val_labels = domain == "source"  # those of a target are for judging alone: all, some or none may be there
    for name, split, needed in ((f"{domain} train", train, train_labels), (f"{domain} val", val, val_labels)):
        is_val = split is val
        if config.skip_bad:
            split = _without_lost(split, dataset, name, notes)
        _refuse(split.repeated_ids(), f"Files of {name} must differ in name", split, dataset)
        if needed:
            _refuse(split.missing_labels(), f"Every image of {name} must have a label", split, dataset)
        if config.skip_bad:
            split = _without_bad(split, dataset, name, notes, labels=needed or is_val)
        parts.append(split)
    return parts[0], parts[1]


def _notes_on_labels(validation: Split) -> list[str]:
    """Return what the target's scores will be of, where not every validation image has a label."""
    labelled, total = len(validation.with_labels()), len(validation)
    if labelled == total:
        return []
    if labelled == 0:
        return [f"None of the {total} validation images of the target has a label: its mIoU will be unknown."]
    return [f"{labelled} of {total} validation images of the target have a label: its mIoU will be that of these."]


def _refuse(faults: Sequence[Fault], requirement: str, split: Split, dataset: Dataset) -> None:
    if faults:
        raise ValueError(
            f"{requirement}, but {len(faults)} of {len(split)} do not, e.g. {faults[0].path}. "
            f"{dataset.check_command} lists all."
        )


def _without_lost(split: Split, dataset: Dataset, name: str, notes: list[str]) -> Split:
    """Leave out samples whose image or label is no file, such as a link that leads nowhere, and say which."""
    reasons = list(in_threads(partial(dataset.lost_file, split), range(len(split)), decoding_threads()))
    kept = [index for index, reason in enumerate(reasons) if reason is None]
    lost = [reason for reason in reasons if reason is not None]
    if not kept:
        raise ValueError(f"{name} must hold a file that can be decoded, but none of {len(split)} can: {lost[0]}")
    if lost:
        shown = "; ".join(lost[:_NAMED]) + (f"; and {len(lost) - _NAMED} more" if len(lost) > _NAMED else "")
        notes.append(
            f"{len(lost)} of {len(split)} images of {name} are left out as gone, or as their label is: {shown}."
        )
    return split.subset(kept)


def _without_bad(split: Split, dataset: Dataset, name: str, notes: list[str], *, labels: bool) -> Split:
    """Leave out samples whose image or label cannot be decoded, and say which.

    Args:
        split: What to scan.
        dataset: The dataset of the split.
        name: Name of the split, for people.
        notes: Receives what was left out.
        labels: Whether labels are decoded as well, where there are any.
    """
    images = dataset.unlabelled(split)
    labelled = dataset.labelled(split.with_labels(), ())
    with_labels = [index for index, label in enumerate(split.labels) if labels and label is not None]
    place_of = {index: place for place, index in enumerate(with_labels)}

    def fault_of(index: int) -> str | None:
        try:
            images.image(index)
            if index in place_of:
                labelled.label(place_of[index])
        except (UnreadableError, LabelFormatError) as error:
            return str(error)
        return None

    faults = list(in_threads(fault_of, range(len(split)), decoding_threads()))
    kept = [index for index, fault in enumerate(faults) if fault is None]
    if not kept:
        raise ValueError(f"{name} must hold a file that can be decoded, but none of {len(split)} can: {faults[0]}")
    if len(kept) < len(split):
        bad = [split.images[index].name for index, fault in enumerate(faults) if fault is not None]
        shown_names = ", ".join(bad[:_NAMED]) + (f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")
        notes.append(f"{len(bad)} of {len(split)} images of {name} are left out as bad: {shown_names}.")
    return split.subset(kept)
