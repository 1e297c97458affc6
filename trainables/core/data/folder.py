"""Images in a folder, in the layout that `segadapt data make` writes.

::

    classes.json                                 names and colours of the classes, in the order of their indices
    source/train/images/*.png  source/train/labels/*.png
    source/val/images/*.png    source/val/labels/*.png
    target/train/images/*.png
    target/val/images/*.png    target/val/labels/*.png

Images are RGB; labels are single-channel 8-bit PNGs of class indices, 255 = ignore, named as their image.
`target/train/labels` may exist: it is read for `data.oracle=true` alone.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segadapt.trainables.core.data.batch import ClassList, DomainData, EvaluationData, LabelledImages

_TAIL_BYTES = 4096


class FolderTargetImages:
    """Unlabelled images of a folder, decoded when asked for."""

    def __init__(self, folder: Path) -> None:
        self._images = sorted((folder / "images").glob("*.png"))
        if not self._images:
            raise ValueError(
                f"A dataset folder must hold PNG images in {folder / 'images'}, but none is there. "
                "`segadapt data make FOLDER` writes an example of the layout."
            )
        self.ids: Sequence[str] = [path.stem for path in self._images]

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Tensor:
        """Return an RGB image, (3, H, W) uint8."""
        return torch.from_numpy(np.array(_open(self._images[index]).convert("RGB"))).permute(2, 0, 1)

    def files(self) -> list[Path]:
        """Return the files read, in order."""
        return list(self._images)


class FolderImages(FolderTargetImages):
    """Images with labels of a folder, decoded when asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._labels = [folder / "labels" / path.name for path in self._images]
        missing = [path for path in self._labels if not path.is_file()]
        if missing:
            raise ValueError(
                f"Every image must have a label of the same name, but {len(missing)} of {len(self)} have none, "
                f"e.g. {missing[0]}. Add them or remove their images."
            )

    def label(self, index: int) -> Tensor:
        """Return class indices, (H, W) uint8, 255 = ignore."""
        picture = _open(self._labels[index])
        if picture.mode not in ("L", "P"):
            raise ValueError(
                f"A label must be a single-channel 8-bit PNG of class indices, but {self._labels[index]} has mode "
                f"{picture.mode}. Convert it."
            )
        return torch.from_numpy(np.array(picture))

    def files(self) -> list[Path]:
        """Return the files read, in order."""
        return [*self._images, *self._labels]


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.copy()
    except OSError as error:
        raise ValueError(f"An image file must be a whole PNG, but {path} is not: {error}. Replace it.") from error


def _read_classes(path: Path) -> ClassList:
    try:
        entries = json.loads(path.read_text())
        names = tuple(str(entry["name"]) for entry in entries)
        colors = tuple((int(r), int(g), int(b)) for r, g, b in (entry["color"] for entry in entries))
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f'{path} must list the classes as [{{"name": "road", "color": [128, 64, 128]}}, ...], '
            f"but could not be read so: {type(error).__name__}: {error}."
        ) from error
    return ClassList(names, colors)


def _fingerprint(root: Path, files: Sequence[Path], classes: ClassList) -> str:
    """Hash names, sizes and last bytes of all files: PNGs end in the checksum of their last pixels."""
    digest = hashlib.sha256(repr(classes).encode())
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - _TAIL_BYTES))
            digest.update(f"{path.relative_to(root)}\0{size}\0".encode() + file.read())
    return digest.hexdigest()


def load_folder(root: str, *, oracle: bool = False) -> tuple[DomainData, EvaluationData]:
    """Open a dataset folder; see the module for its layout.

    Args:
        root: The folder.
        oracle: Train on the labelled target training set in place of the source.

    Raises:
        ValueError: If the folder or a part of it is missing; names the part.
    """
    base = Path(root)
    if not base.is_dir():
        raise ValueError(
            f"data.root must be an existing folder, but got {root!r}. `segadapt data make {root}` writes an example."
        )
    classes = _read_classes(base / "classes.json")
    source = FolderImages(base / "target" / "train" if oracle else base / "source" / "train")
    target = FolderTargetImages(base / "target" / "train")
    evaluation = EvaluationData(FolderImages(base / "source" / "val"), FolderImages(base / "target" / "val"), classes)
    files = [*source.files(), *target.files()]
    return DomainData(source, target, classes, _fingerprint(base, files, classes)), evaluation


def write_folder(root: Path, data: DomainData, evaluation: EvaluationData, target_labels: LabelledImages) -> None:
    """Write a dataset in the layout of this module.

    Args:
        root: An empty or new folder.
        data: Training images of both domains.
        evaluation: Validation images of both domains.
        target_labels: The target training set with labels, for the oracle.
    """
    parts: dict[str, LabelledImages] = {
        "source/train": data.source,
        "target/train": target_labels,
        "source/val": evaluation.source,
        "target/val": evaluation.target,
    }
    for name, images in parts.items():
        _write_part(root / name, images)
    entries = [
        {"name": name, "color": list(color)}
        for name, color in zip(data.classes.names, data.classes.colors, strict=True)
    ]
    (root / "classes.json").write_text(json.dumps(entries, indent=1))


def _write_part(folder: Path, images: LabelledImages) -> None:
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(images.ids):
        image = images.image(index).permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(image).save(folder / "images" / f"{name}.png")
        Image.fromarray(images.label(index).contiguous().numpy()).save(folder / "labels" / f"{name}.png")
