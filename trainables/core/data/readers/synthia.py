"""SYNTHIA (RAND-CITYSCAPES): `RGB/*.png` and `GT/LABELS/*.png` of the same name, one training set without validation.

Labels are 16-bit RGB PNGs: the class in the first channel, the instance in the second.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segadapt.trainables.core.data.batch import LabelledImages
from segadapt.trainables.core.data.class_lists import SYNTHIA, LabelValues
from segadapt.trainables.core.data.dataset import Dataset, LabelFormat, files_in, pair
from segadapt.trainables.core.data.decoding import decode_first_channel, encode_png16


def open_synthia(root: Path) -> Dataset:
    """List the files of RAND-CITYSCAPES in a folder."""
    images = [(path.stem, path) for path in files_in(root / "RGB")]
    labels = [(path.stem, path) for path in files_in(root / "GT" / "LABELS")]
    return Dataset(
        kind="synthia",
        root=root,
        splits={"train": pair(images, labels)},
        format=LabelFormat(SYNTHIA, _decode),
        layout="RGB/*.png and GT/LABELS/*.png",
    )


def _decode(data: bytes, values: LabelValues) -> NDArray[np.uint16]:
    return decode_first_channel(data)


def write_synthia(root: Path, train: LabelledImages, names: tuple[str, ...]) -> None:
    """Write images as SYNTHIA stores them.

    Args:
        root: A new or empty folder.
        train: What to write.
        names: Classes of the images; all must be SYNTHIA classes.
    """
    stored = np.zeros(256, np.uint16)
    stored[: len(names)] = [SYNTHIA.ids[name] for name in names]
    for folder in ("RGB", "GT/LABELS"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for index in range(len(train)):
        name = f"{index:07d}.png"
        Image.fromarray(train.image(index).permute(1, 2, 0).contiguous().numpy()).save(root / "RGB" / name)
        classes = stored[train.label(index).numpy()]
        instances = 256 * classes + 1  # any numbers, beyond eight bits as the real ones
        (root / "GT" / "LABELS" / name).write_bytes(
            encode_png16(np.stack([classes, instances, np.zeros_like(classes)], axis=-1))
        )
