"""Folders as datasets are distributed are told from what is in them, and become own data that can be trained on."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from PIL import Image

import segadapt as api
from segadapt.platform.errors import UsageError

Call = Callable[..., CompletedProcess[str]]

ROAD, SKY = (128, 64, 128), (128, 128, 128)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((32, 64, 3), 90, np.uint8)).save(path)


def label(path: Path, values: tuple[int, int] | tuple[tuple[int, int, int], tuple[int, int, int]]) -> None:
    """Write a label whose upper half is one class and whose lower half another, as ids or colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = [np.full((16, 64, *np.shape(value)), value, np.uint8) for value in values]
    Image.fromarray(np.concatenate(halves)).save(path)


def camvid(root: Path) -> None:
    for split in ("train", "val"):
        picture(root / split / "0001TP_000010.png")
        label(root / f"{split}_labels" / "0001TP_000010_L.png", (SKY, ROAD))
    (root / "class_dict.csv").write_text("name,r,g,b\nRoad, 128, 64, 128\nSky, 128, 128, 128\n")


def camvid_of_ids(root: Path) -> None:
    for split in ("train", "val"):
        picture(root / split / "0001TP_000010.png")
        label(root / f"{split}annot" / "0001TP_000010.png", (0, 3))


def voc(root: Path) -> None:
    for name in ("2007_000032", "2007_000039"):
        picture(root / "JPEGImages" / f"{name}.jpg")
        label(root / "SegmentationClass" / f"{name}.png", (0, 15))
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n")
    (lists / "val.txt").write_text("2007_000039\n")


def mmsegmentation(root: Path) -> None:
    for split in ("train", "val"):
        picture(root / "img_dir" / split / "a.jpg")
        label(root / "ann_dir" / split / "a.png", (1, 2))


def coco_stuff(root: Path) -> None:
    for split in ("train2017", "val2017"):
        picture(root / "images" / split / "000000000009.jpg")
        label(root / "stuffthingmaps" / split / "000000000009.png", (0, 147))
    (root / "labels.txt").write_text("0: unlabeled\n1: person\n148: road\n")


@pytest.mark.parametrize(
    ("write", "layout", "classes"),
    [
        (camvid, "CamVid", ["Road", "Sky"]),
        (camvid_of_ids, "CamVid", ["class_0", "class_3"]),
        (voc, "PASCAL VOC", ["background", "aeroplane"]),
        (mmsegmentation, "mmsegmentation", ["class_1", "class_2"]),
        (coco_stuff, "COCO-stuff", ["person", "road"]),
    ],
)
def test_a_known_layout_is_told_and_becomes_own_data_without_a_fault(
    write: Callable[[Path], None], layout: str, classes: list[str], tmp_path: Path
) -> None:
    write(tmp_path / "root")
    recognised = api.data_recognise(str(tmp_path / "root"))
    assert (recognised.layout, recognised.kind, sorted(recognised.splits)) == (layout, None, ["train", "val"])
    assert [name for name, _, _ in recognised.classes][: len(classes)] == classes
    api.data_adopt(str(tmp_path / "root"), str(tmp_path / "adopted"))
    report = api.data_check("folder", str(tmp_path / "adopted"))
    assert report.faults == ()
    assert report.splits["val"].labels == 1
    assert sum(pixels > 0 for pixels in report.splits["train"].pixels.values()) == 2


def test_what_the_labels_of_a_class_list_mean_stays(tmp_path: Path) -> None:
    coco_stuff(tmp_path / "coco")
    api.data_adopt(str(tmp_path / "coco"), str(tmp_path / "adopted"))
    pixels = api.data_check("folder", str(tmp_path / "adopted")).splits["train"].pixels
    assert pixels == {"person": 16 * 64, "road": 16 * 64, "ignored": 0}


@pytest.mark.parametrize("kind", ["gta5", "synthia", "cityscapes"])
def test_datasets_that_have_a_reader_are_told_by_its_name(kind: str, tmp_path: Path) -> None:
    few = {"data.streets.train_images": 2, "data.streets.val_images": 1}
    api.data_make(str(tmp_path / kind), few, layout=kind)
    assert api.data_recognise(str(tmp_path / kind)).kind == kind
    with pytest.raises(UsageError, match=f"Read it as {kind}:"):
        api.data_adopt(str(tmp_path / kind), str(tmp_path / "adopted"))
    assert not (tmp_path / "adopted").exists()


def test_the_command_tells_what_is_there_and_missing_and_what_to_do(segadapt: Call, tmp_path: Path) -> None:
    camvid(tmp_path / "my camvid")
    picture(tmp_path / "my camvid" / "train" / "0001TP_000020.png")
    checked = segadapt("data", "check", "my camvid")
    assert checked.returncode == 1, checked.stderr
    assert "my camvid has the layout of CamVid.\ntrain: 2 images, 1 labels\nval: 1 images, 1 labels" in checked.stdout
    assert "2 classes, from class_dict.csv: Road, Sky" in checked.stdout
    assert "1 of 2 images of train have no label, e.g. 0001TP_000020.png" in checked.stdout
    assert "segadapt data adopt 'my camvid' 'my camvid-adopted'" in checked.stdout
    adopted = segadapt("data", "adopt", "my camvid", "my camvid-adopted")
    assert adopted.returncode == 0, adopted.stderr
    assert segadapt("data", "check", "my camvid-adopted").returncode == 1, "a label is missing in train"
    unknown = segadapt("data", "check", ".")
    assert unknown.returncode == 2
    assert "holds my camvid-adopted/, my camvid/" in unknown.stderr
    assert "must be new or empty" in segadapt("data", "adopt", "my camvid", "my camvid-adopted").stderr
