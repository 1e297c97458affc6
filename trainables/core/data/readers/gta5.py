"""GTA5 (Playing for Data): `images/*.png` and `labels/*.png` of the same name, one training set without validation.

Labels are palette PNGs whose index is a Cityscapes id, or RGB PNGs of the palette's colours. Images differ in size, and
some labels are of another size than their image: they are brought to it, as the papers' codes do.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from segadapt.trainables.core.data.batch import LabelledImages
from segadapt.trainables.core.data.class_lists import GTA5
from segadapt.trainables.core.data.dataset import Dataset, LabelFormat, files_in, pair
from segadapt.trainables.core.data.decoding import decode_ids

_ODD_ROWS = 6
"""1914x1052 is GTA5's usual size, 1914x1046 the most frequent other."""


def open_gta5(root: Path) -> Dataset:
    """List the files of GTA5 in a folder."""
    images = [(path.stem, path) for path in files_in(root / "images")]
    labels = [(path.stem, path) for path in files_in(root / "labels")]
    return Dataset(
        kind="gta5",
        root=root,
        splits={"train": pair(images, labels)},
        format=LabelFormat(GTA5, decode_ids, resizes=True),
        layout="images/*.png and labels/*.png",
    )


def write_gta5(root: Path, train: LabelledImages, names: tuple[str, ...]) -> None:
    """Write images as GTA5 stores them, with the traits that trip readers.

    Every fourth image, the second first, is cut to an odd height; every fourth, the fourth first, is resized to it
    while its label keeps its size.

    Args:
        root: A new or empty folder.
        train: What to write.
        names: Classes of the images; all must be Cityscapes classes.
    """
    palette = np.zeros((256, 3), np.uint8)
    for color, label_id in GTA5.colors.items():
        palette[label_id] = color
    for label_id, color in ((18, (153, 153, 153)), (34, (0, 0, 142))):  # share their colour with pole and car
        palette[label_id] = color
    stored = np.zeros(256, np.uint8)
    stored[: len(names)] = [GTA5.ids[name] for name in names]
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for index in range(len(train)):
        image = Image.fromarray(train.image(index).permute(1, 2, 0).contiguous().numpy())
        label = Image.fromarray(stored[train.label(index).numpy()])
        odd_size = (image.width, image.height - _ODD_ROWS)
        if index % 4 == 1:
            image, label = image.crop((0, 0, *odd_size)), label.crop((0, 0, *odd_size))
        elif index % 4 == 3:
            image = image.resize(odd_size, Image.Resampling.BILINEAR)
        label.putpalette(palette.tobytes())
        name = f"{index + 1:05d}.png"
        image.save(root / "images" / name)
        label.save(root / "labels" / name)
