"""Which dataset a folder holds, told from its names in seconds, and how its images may be read as own data."""

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.data.class_lists import Color
from segadapt.trainables.core.data.dataset import files_in
from segadapt.trainables.core.data.readers.folder import CLASSES, class_list

_IMAGES = (".png", ".jpg", ".jpeg")

_LOOKED_AT = 50
"""Labels of a split in which classes are looked for where no list names them."""

_PAIRS: Mapping[str, Sequence[Mapping[str, tuple[str, str]]]] = {
    "CamVid": (
        {"train": ("train", "train_labels"), "val": ("val", "val_labels")},
        {"train": ("train", "trainannot"), "val": ("val", "valannot")},
        {"train": ("701_StillsRaw_full", "LabeledApproved_full")},
    ),
    "mmsegmentation": (
        {"train": ("img_dir/train", "ann_dir/train"), "val": ("img_dir/val", "ann_dir/val")},
        {
            "train": ("images/training", "annotations/training"),
            "val": ("images/validation", "annotations/validation"),
        },
    ),
    "COCO-stuff": (
        {
            "train": ("images/train2017", "stuffthingmaps/train2017"),
            "val": ("images/val2017", "stuffthingmaps/val2017"),
        },
        {"train": ("train2017", "stuffthingmaps/train2017"), "val": ("val2017", "stuffthingmaps/val2017")},
    ),
    "images and labels": (
        {"train": ("images/train", "labels/train"), "val": ("images/val", "labels/val")},
        {"train": ("images/train", "masks/train"), "val": ("images/val", "masks/val")},
        {"train": ("train/images", "train/masks"), "val": ("val/images", "val/masks")},
        {"train": ("train/images", "train/labels"), "val": ("val/images", "val/labels")},
        {"train": ("images", "masks")},
        {"train": ("images", "labels")},
    ),
}
"""Folders of images and labels by split, by the layout that they are of; the first of a layout that is there counts."""

_ENDINGS = re.compile(r"(_L|_labels?|_masks?|_gt|_gtFine_labelIds|_labelTrainIds)$")
"""What the names of labels have behind those of their images."""

_VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""Classes of PASCAL VOC in the order of their ids (Everingham et al., IJCV 2010)."""

_Pair = tuple[Path, Path | None]


@dataclass(frozen=True)
class Recognised:
    """What a folder holds."""

    layout: str
    """Name of the dataset whose layout it has."""
    kind: str | None
    """Kind by which it can be read as it is; None if `adopt` has to bring it into the layout of own data."""
    splits: Mapping[str, Sequence[_Pair]] = field(default_factory=dict)
    """Images with their labels by split, where it must be adopted."""
    classes: Sequence[tuple[str, int, Color]] = ()
    """Name, id and colour of each class."""
    source: str = ""
    """Where the classes are from."""
    missing: Sequence[str] = ()
    """What is not as it should be, each in a sentence."""


def recognise(root: Path) -> Recognised:
    """Return what a folder holds; its files are listed, and a few labels looked at.

    Raises:
        ValueError: If there is no such folder, or its layout is none that is known.
    """
    if not root.is_dir():
        raise ValueError(f"The root of a dataset must be an existing folder, but got {str(root)!r}.")
    for kind, is_kind in _KINDS.items():
        if is_kind(root):
            return Recognised(kind, kind)
    layout, splits = _voc(root) or _paired(root)
    labels = [label for pairs in splits.values() for _, label in pairs if label is not None]
    classes, source = _classes(root, layout, labels)
    missing = [
        f"{len(unlabelled)} of {len(pairs)} images of {split} have no label, e.g. {unlabelled[0]}"
        for split, pairs in splits.items()
        if (unlabelled := [image.name for image, label in pairs if label is None])
    ]
    if not labels:
        missing.append("there is no label: it can be a target, never a source")
    if "val" not in splits:
        missing.append("there is no split val: a part of train is set aside for validation")
    if source.startswith("the labels"):
        missing.append("no list names the classes: give them their names in classes.yaml")
    return Recognised(layout, None, splits, classes, source, missing)


def adopt(root: Path, out: Path) -> Recognised:
    """Write a folder of own data that links to the images and labels of another one, and the class list it proposes.

    Args:
        root: Folder of the dataset.
        out: A new or empty folder.

    Returns:
        What the folder holds.

    Raises:
        ValueError: If it is not recognised, or can be read as it is.
    """
    recognised = recognise(root)
    if recognised.kind is not None:
        raise ValueError(
            f"A dataset to adopt must be of a layout that has no reader, but {root} is one of the kind "
            f"{recognised.kind}. Read it as {recognised.kind}:{root}."
        )
    for split, pairs in recognised.splits.items():
        for part in ("images", "labels"):
            (out / split / part).mkdir(parents=True, exist_ok=True)
        for image, label in pairs:
            (out / split / "images" / image.name).symlink_to(image.absolute())
            if label is not None:
                (out / split / "labels" / f"{image.stem}{label.suffix}").symlink_to(label.absolute())
    head = f"# Proposed from {recognised.source}. Names decide what is matched with the other domain: correct them.\n"
    (out / CLASSES).write_text(head + class_list(recognised.classes))
    return recognised


def _is_gta5(root: Path) -> bool:
    names = [path.stem for path in files_in(root / "images", (".png",))[:_LOOKED_AT]]
    return bool(names) and all(re.fullmatch(r"\d{5}", name) for name in names) and (root / "labels").is_dir()


_KINDS: Mapping[str, Callable[[Path], bool]] = {
    "folder": lambda root: (root / CLASSES).is_file(),
    "shards": lambda root: (root / "manifest.json").is_file(),
    "cityscapes": lambda root: (root / "leftImg8bit").is_dir(),
    "synthia": lambda root: (root / "RGB").is_dir() and (root / "GT").is_dir(),
    "gta5": _is_gta5,
}
"""How the layouts are told that have a reader."""


def _voc(root: Path) -> tuple[str, dict[str, list[_Pair]]] | None:
    """Return the images of PASCAL VOC's layout by split, of which lists tell."""
    if not (root / "JPEGImages").is_dir() or not (root / "SegmentationClass").is_dir():
        return None
    pairs = dict(_pairs(root / "JPEGImages", root / "SegmentationClass"))
    splits = {}
    for split in ("train", "val"):
        path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        names = path.read_text().split() if path.is_file() else []
        listed = [(image, label) for image, label in pairs.items() if image.stem in set(names)]
        if listed:
            splits[split] = listed
    return "PASCAL VOC", splits or {"train": list(pairs.items())}


def _paired(root: Path) -> tuple[str, dict[str, list[_Pair]]]:
    """Return the name of a folder's layout, and its images with labels by split.

    Raises:
        ValueError: If it is of none.
    """
    for layout, alternatives in _PAIRS.items():
        for folders in alternatives:
            images, labels = (root / part for part in folders["train"])
            if images.is_dir() and labels.is_dir():
                splits = {split: _pairs(root / first, root / second) for split, (first, second) in folders.items()}
                if splits["train"]:
                    return layout, {split: pairs for split, pairs in splits.items() if pairs}
    entries = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())[:12]
    raise ValueError(
        "A dataset must have a known layout (gta5, synthia, cityscapes, own data, shards, "
        f"{', '.join(_PAIRS)}, PASCAL VOC), but {root} holds {', '.join(entries) or 'nothing'}. Put its images and "
        "labels into train/images and train/labels, val/ alike; `segadapt data make FOLDER` writes an example."
    )


def _pairs(images: Path, labels: Path) -> list[_Pair]:
    """Return the images of a folder with their labels, which have the same name but for a known ending."""
    by_name = {_ENDINGS.sub("", path.stem): path for path in files_in(labels)}
    return [(image, by_name.get(image.stem)) for image in files_in(images, _IMAGES)]


def _classes(root: Path, layout: str, labels: Sequence[Path]) -> tuple[list[tuple[str, int, Color]], str]:
    """Return the classes of a dataset, and where they are from."""
    for name, read in _LISTS.items():
        path = root / name
        if path.is_file() and (named := list(read(path.read_text(), layout))):
            return named, name
    if layout == "PASCAL VOC":
        return [(name, number, _color(number)) for number, name in enumerate(_VOC)], "PASCAL VOC's own list"
    return _seen(labels), f"the labels, of which {min(len(labels), _LOOKED_AT)} were looked at"


def _class_dict(text: str, layout: str) -> Iterable[tuple[str, int, Color]]:
    """Read `name,r,g,b` with a line of headings, as CamVid's class_dict.csv."""
    rows = [row for row in csv.reader(text.splitlines()) if len(row) >= 4 and row[1].strip().isdecimal()]
    for number, (name, red, green, blue, *_) in enumerate(rows):
        yield name.strip(), number, (int(red), int(green), int(blue))


def _label_colors(text: str, layout: str) -> Iterable[tuple[str, int, Color]]:
    """Read `r g b name` by line, as CamVid's label_colors.txt."""
    lines = [re.fullmatch(r"\s*(\d+)\s+(\d+)\s+(\d+)\s+(.+?)\s*", line) for line in text.splitlines()]
    for number, match in enumerate(match for match in lines if match):
        yield match[4], number, (int(match[1]), int(match[2]), int(match[3]))


def _labels_text(text: str, layout: str) -> Iterable[tuple[str, int, Color]]:
    """Read `id: name` by line, as COCO-stuff's labels.txt, whose PNGs hold the id less one and 255 for none."""
    for line in text.splitlines():
        number, colon, name = line.partition(":")
        if colon and number.strip().isdecimal():
            value = int(number) - (layout == "COCO-stuff")
            if 0 <= value < IGNORE_INDEX:
                yield name.strip(), value, _color(value)


_LISTS: Mapping[str, Callable[[str, str], Iterable[tuple[str, int, Color]]]] = {
    "class_dict.csv": _class_dict,
    "label_colors.txt": _label_colors,
    "labels.txt": _labels_text,
}
"""Files that list classes, and how they are read."""


def _seen(labels: Sequence[Path]) -> list[tuple[str, int, Color]]:
    """Return a class for each value, or colour, in some labels."""
    values: set[int] = set()
    colors: set[Color] = set()
    for path in labels[:_LOOKED_AT]:
        with Image.open(path) as label:
            if label.mode in ("RGB", "RGBA"):
                pixels = np.asarray(label.convert("RGB")).reshape(-1, 3)
                colors.update((int(red), int(green), int(blue)) for red, green, blue in np.unique(pixels, axis=0))
            else:
                values.update(int(value) for value in np.unique(np.asarray(label)) if value < IGNORE_INDEX)
    if colors:
        return [("color_{}_{}_{}".format(*color), number, color) for number, color in enumerate(sorted(colors))]
    return [(f"class_{value}", value, _color(value)) for value in sorted(values)]


def _color(number: int) -> Color:
    """Return the colour of a class in PASCAL VOC's palette: the bits of its number, spread over the channels."""
    channels = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            channels[channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
    return channels[0], channels[1], channels[2]
