"""Cityscapes: `leftImg8bit/SPLIT/CITY/*_leftImg8bit.png` and `gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.png`.

`labelTrainIds` are read if every label has them; `labelIds`, which the archives contain, otherwise. Read are
the splits `train` and `val`; the labels of `test` are not public.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from segadapt.trainables.core.data.batch import LabelledImages
from segadapt.trainables.core.data.class_lists import CITYSCAPES_LABEL_IDS, CITYSCAPES_TRAIN_IDS
from segadapt.trainables.core.data.dataset import Dataset, LabelFormat, files_in, pair
from segadapt.trainables.core.data.decoding import decode_ids

_IMAGE = "_leftImg8bit.png"

_LABEL_IDS = "_gtFine_labelIds.png"

_TRAIN_IDS = "_gtFine_labelTrainIds.png"

_SPLITS = ("train", "val")


def open_cityscapes(root: Path) -> Dataset:
    """List the files of Cityscapes in a folder."""
    images = {split: _files_by_id(root / "leftImg8bit" / split, _IMAGE) for split in _SPLITS}
    by_suffix = {
        suffix: {split: _files_by_id(root / "gtFine" / split, suffix) for split in _SPLITS}
        for suffix in (_TRAIN_IDS, _LABEL_IDS)
    }
    with_label_ids, with_train_ids = (
        {name for split in _SPLITS for name, _ in by_suffix[suffix][split]} for suffix in (_LABEL_IDS, _TRAIN_IDS)
    )
    lacking = with_label_ids - with_train_ids
    use_train_ids = bool(with_train_ids) and not lacking
    labels = by_suffix[_TRAIN_IDS if use_train_ids else _LABEL_IDS]
    note = (
        f"labelTrainIds are missing for {len(lacking)} of {len(with_label_ids)} labels, "
        "so that labelIds are read for all."
    )
    return Dataset(
        kind="cityscapes",
        root=root,
        splits={split: pair(images[split], labels[split]) for split in _SPLITS},
        format=LabelFormat(CITYSCAPES_TRAIN_IDS if use_train_ids else CITYSCAPES_LABEL_IDS, decode_ids),
        layout="leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/SPLIT/CITY/*_gtFine_labelIds.png",
        notes=(note,) if with_train_ids and lacking else (),
        may_lack_labels=True,
    )


def _files_by_id(folder: Path, suffix: str) -> list[tuple[str, Path]]:
    """Return the files of all cities with their id, CITY_SEQUENCE_FRAME."""
    cities = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return [
        (path.name[: -len(suffix)], path)
        for city in cities
        for path in files_in(city)
        if path.name.lower().endswith(suffix.lower())
    ]


def write_cityscapes(root: Path, train: LabelledImages, val: LabelledImages, names: tuple[str, ...]) -> None:
    """Write images as Cityscapes stores them, with `labelIds` alone, as its archives have them.

    Args:
        root: A new or empty folder.
        train: The training set with labels.
        val: The validation set.
        names: Classes of both sets; all must be Cityscapes classes.
    """
    stored = np.zeros(256, np.uint8)
    stored[: len(names)] = [CITYSCAPES_LABEL_IDS.ids[name] for name in names]
    for split, images in (("train", train), ("val", val)):
        city = f"streets-{split}"
        image_folder, label_folder = (root / part / split / city for part in ("leftImg8bit", "gtFine"))
        image_folder.mkdir(parents=True, exist_ok=True)
        label_folder.mkdir(parents=True, exist_ok=True)
        for index in range(len(images)):
            name = f"{city}_{index:06d}_000019"
            image = Image.fromarray(images.image(index).permute(1, 2, 0).contiguous().numpy())
            image.save(image_folder / f"{name}{_IMAGE}")
            Image.fromarray(stored[images.label(index).numpy()]).save(label_folder / f"{name}{_LABEL_IDS}")
