"""Own data: one folder per domain, in the layout that `segadapt data make` writes.

::

    classes.yaml
    train/images/*.png|jpg   train/labels/*.png     labels may be absent where the domain is a target
    val/images/*.png|jpg     val/labels/*.png       optional in a source: part of `train` is held out instead

`classes.yaml` lists the classes in the order of their indices, and the values in labels that belong to none::

    classes:
      - {name: road, id: 0, color: [128, 64, 128]}
    ignore: [255]                         # ids, and colours such as [0, 0, 0] where labels are coded by colour

Labels are PNGs named as their image: 8-bit grey or palette PNGs of ids, or 8-bit RGB PNGs of the colours.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from segadapt.trainables.core.data.batch import IGNORE_INDEX, ClassList, LabelledDomains, LabelledImages
from segadapt.trainables.core.data.class_lists import IGNORED_COLOR, Color, LabelValues, duplicates
from segadapt.trainables.core.data.dataset import Dataset, LabelFormat, files_in, pair
from segadapt.trainables.core.data.decoding import decode_ids

CLASSES = "classes.yaml"

_SPLITS = ("train", "val")

_IMAGES = (".png", ".jpg", ".jpeg")


def open_folder(root: Path) -> Dataset:
    """List the files of one domain of own data.

    Raises:
        ValueError: If its class list is missing or malformed.
    """
    splits = {}
    for split in _SPLITS:
        images = [(path.stem, path) for path in files_in(root / split / "images", _IMAGES)]
        splits[split] = pair(images, [(path.stem, path) for path in files_in(root / split / "labels")])
    return Dataset(
        kind="folder",
        root=root,
        splits=splits,
        format=LabelFormat(_read_classes(root / CLASSES), decode_ids),
        layout="train/images/*.png (or .jpg) and train/labels/*.png, val/ alike",
        may_lack_labels=True,
    )


def _read_classes(path: Path) -> LabelValues:
    import yaml  # here alone: `trainables` needs it for own data only

    try:
        return _label_values(yaml.safe_load(path.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} must list the classes as `classes: [{{name: road, id: 0, color: [128, 64, 128]}}, ...]` and, if "
            f"there are any, the ids to ignore as `ignore: [255]`, but could not be read so: {reason}. "
            "`segadapt data make FOLDER` writes an example; `segadapt data adopt ROOT FOLDER` proposes one."
        ) from error


def _label_values(content: Mapping[str, Any]) -> LabelValues:
    entries = content["classes"]
    names = tuple(_name(entry["name"]) for entry in entries)
    ids = [_byte(entry["id"]) for entry in entries]
    colors = tuple(_color(entry["color"]) for entry in entries)
    ignore = content.get("ignore", [IGNORE_INDEX])
    ignored_colors = [_color(value) for value in ignore if isinstance(value, list)]
    ignored = {_byte(value) for value in ignore if not isinstance(value, list)}
    if not names:
        raise ValueError("it names no class")
    if duplicates(names):
        raise ValueError(f"names must differ, but {', '.join(duplicates(names))} came twice")
    if len(set(ids)) < len(ids) or ignored & set(ids):
        raise ValueError(f"ids must differ from each other and from those to ignore, but are {ids} and {[*ignored]}")
    if len({*colors, *ignored_colors}) < len(colors) + len(ignored_colors):
        raise ValueError("colors must differ")
    return LabelValues(
        classes=ClassList(names, colors),
        ids=dict(zip(names, ids, strict=True)),
        ignored=frozenset(ignored | {IGNORED_COLOR}),
        strict=True,
        colors=dict(zip(colors, ids, strict=True)) | dict.fromkeys(ignored_colors, IGNORED_COLOR),
    )


def _name(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):  # YAML reads `no` as false
        raise ValueError(f"names must be text, in quotes where YAML reads something else, but one is {value!r}")
    name = str(value)
    if not name.strip() or not name.isprintable():
        raise ValueError(f"names must be visible text on one line, but one is {name!r}")
    return name


def _color(value: Any) -> Color:
    red, green, blue = (_byte(part) for part in value)
    return red, green, blue


def _byte(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 255:
        raise ValueError(f"ids and parts of colors must be whole numbers in [0, 255], but got {value!r}")
    return value


def write_folder(root: Path, train: LabelledImages, val: LabelledImages, classes: ClassList) -> None:
    """Write one domain in the layout of this module; ids are the class indices.

    Args:
        root: A new or empty folder.
        train: The training set with labels.
        val: The validation set.
        classes: Classes of both sets.
    """
    for split, images in (("train", train), ("val", val)):
        for part in ("images", "labels"):
            (root / split / part).mkdir(parents=True, exist_ok=True)
        for index, name in enumerate(images.ids):
            image = Image.fromarray(images.image(index).permute(1, 2, 0).contiguous().numpy())
            image.save(root / split / "images" / f"{name}.png")
            label = Image.fromarray(images.label(index).contiguous().numpy())
            label.save(root / split / "labels" / f"{name}.png")
    entries = zip(classes.names, range(len(classes)), classes.colors, strict=True)
    (root / CLASSES).write_text(class_list(entries))


def class_list(entries: Iterable[tuple[str, int, Color]]) -> str:
    """Return the text of a class list.

    Args:
        entries: Name, id and colour of each class.
    """
    lines = [
        f"  - {{name: {json.dumps(name, ensure_ascii=False)}, id: {value}, color: {list(color)}}}"
        for name, value, color in entries
    ]
    return "\n".join(["classes:", *lines, f"ignore: [{IGNORE_INDEX}]", ""])


def write_both_folders(root: Path, images: LabelledDomains) -> None:
    """Write both domains, in the folders `source` and `target`."""
    write_folder(root / "source", images.source_train, images.source_val, images.classes)
    write_folder(root / "target", images.target_train, images.target_val, images.classes)
