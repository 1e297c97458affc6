"""Image files as users bring them: turned by EXIF data, of any mode, doubled, gone, or prepared by other scripts."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from segadapt.trainables.core.data.checking import check_dataset
from segadapt.trainables.core.data.class_lists import CITYSCAPES_IDS, GTA5
from segadapt.trainables.core.data.datasets import DataConfig, load_data, open_dataset
from segadapt.trainables.core.data.decoding import UnreadableError, decode_ids, decode_image, image_size, read_image
from segadapt.trainables.core.data.packing import PackConfig, pack
from segadapt.trainables.core.data.readers.cityscapes import write_cityscapes
from segadapt.trainables.core.data.readers.folder import write_folder
from segadapt.trainables.core.data.readers.gta5 import write_gta5
from segadapt.trainables.core.data.readers.synthia import write_synthia
from segadapt.trainables.core.data.streets import StreetsConfig, load_streets
from segadapt.trainables.core.data.streets.v1.classes import CLASSES_V1 as CLASSES

STREETS, EVALUATION = load_streets(StreetsConfig(edition=1, height=32, width=64, train_images=4, val_images=2))
BACK = {  # how a picture is stored that a viewer turns upright
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "folder", STREETS.source, EVALUATION.source, CLASSES)
    return tmp_path / "folder"


def images_of(folder: Path, split: str = "train", part: str = "images") -> list[Path]:
    return sorted((folder / split / part).iterdir())


def turned(picture: Image.Image, orientation: int) -> tuple[Image.Image, Image.Exif]:
    """A picture as a camera stores it that was held another way."""
    exif, back = Image.Exif(), BACK[orientation]
    exif[0x0112] = orientation
    return picture if back is None else picture.transpose(back), exif


def problems(folder: Path, kind: str = "folder") -> list[str]:
    return sorted(fault.problem for fault in check_dataset(kind, str(folder)).faults)


def load(folder: Path, **settings: object) -> list[str]:
    """Load as both domains; returns the notes."""
    root = f"folder:{folder}"
    return list(load_data.__wrapped__(DataConfig(source=root, target=root, **settings))[0].notes)  # type: ignore[arg-type]


# --- EXIF orientation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", BACK)
def test_images_are_read_as_viewers_show_them(orientation: int, suffix: str, tmp_path: Path) -> None:
    stored, exif = turned(Image.fromarray(STREETS.source.image(0).permute(1, 2, 0).contiguous().numpy()), orientation)
    path = tmp_path / f"a{suffix}"
    stored.save(path, exif=exif)
    with Image.open(path) as picture:
        shown = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    assert shown.shape == (32, 64, 3)
    np.testing.assert_array_equal(read_image(path), shown)
    assert image_size(path) == (32, 64)


@pytest.mark.parametrize("orientation", BACK)
def test_images_and_labels_agree_in_training_and_packs_however_the_camera_was_held(
    orientation: int, folder: Path, tmp_path: Path
) -> None:
    for split in ("train", "val"):
        for path in images_of(folder, split):
            stored, exif = turned(Image.open(path).convert("RGB"), orientation)
            stored.save(path, exif=exif)
    assert not problems(folder)
    dataset = open_dataset("folder", str(folder))
    pack(dataset, tmp_path / "packed", PackConfig())
    packed = open_dataset("shards", str(tmp_path / "packed"))
    for read in (dataset, packed):
        images = read.labelled(read.splits["train"], CLASSES.names)
        for index in range(len(images)):
            assert torch.equal(images.image(index), STREETS.source.image(index))
            assert torch.equal(images.label(index), STREETS.source.label(index))


def test_the_check_says_which_images_are_turned_and_names_exif_where_a_label_was_drawn_on_the_stored_one(
    folder: Path,
) -> None:
    image = images_of(folder)[0]
    stored, exif = turned(Image.open(image).convert("RGB"), 6)
    stored.save(image, exif=exif)
    assert "Images of train that are turned as their EXIF data ask" in " ".join(
        check_dataset("folder", str(folder)).notes
    )
    label = folder / "train" / "labels" / image.name
    Image.open(label).transpose(Image.Transpose.ROTATE_90).save(label)
    report = check_dataset("folder", str(folder))
    assert [fault.detail for fault in report.faults] == [
        "The label is 32x64, its image 64x32 once it is turned as its EXIF data ask."
    ]
    dataset = open_dataset("folder", str(folder))
    with pytest.raises(ValueError, match=r"is 32x64 and .* is 64x32 once it is turned as its EXIF data ask"):
        dataset.labelled(dataset.splits["train"], CLASSES.names).label(0)


def test_a_label_is_turned_as_its_own_exif_data_ask(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.uint8).reshape(2, 3)
    stored, exif = turned(Image.fromarray(values), 6)
    stored.save(tmp_path / "label.png", exif=exif)
    np.testing.assert_array_equal(decode_ids((tmp_path / "label.png").read_bytes(), GTA5), values)


def test_a_png_that_asks_to_be_turned_only_after_its_pixels_is_refused_by_name(tmp_path: Path) -> None:
    stored, exif = turned(Image.new("RGB", (3, 2)), 6)
    stored.save(tmp_path / "plain.png")
    data = (tmp_path / "plain.png").read_bytes()
    end = data.rindex(b"IEND") - 4

    def followed_by(chunk: bytes) -> bytes:
        length, checksum = (number.to_bytes(4, "big") for number in (len(chunk) - 4, zlib.crc32(chunk)))
        return data[:end] + length + chunk + checksum + data[end:]

    with pytest.raises(UnreadableError, match="its EXIF data, which follow the pixels, ask to turn it"):
        decode_image(followed_by(b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")))
    assert decode_image(followed_by(b"tEXtComment\0harmless")).shape == (3, 2, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"", b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_damaged_exif_data_turn_nothing(exif: bytes, tmp_path: Path) -> None:
    Image.new("RGB", (3, 2)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (2, 3, 3)
    assert image_size(tmp_path / "a.jpg") == (2, 3)


# --- Modes and odd files ---------------------------------------------------------------------------------------------

RGB = Image.fromarray(STREETS.source.image(0).permute(1, 2, 0).contiguous().numpy())


def with_alpha() -> Image.Image:
    picture = RGB.copy()
    picture.putalpha(120)
    return picture


READABLE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "grey": (".png", lambda path: RGB.convert("L").save(path)),
    "black and white": (".png", lambda path: RGB.convert("1").save(path)),
    "cmyk": (".jpg", lambda path: RGB.convert("CMYK").save(path)),
    "alpha": (".png", lambda path: with_alpha().save(path)),
    "grey with alpha": (".png", lambda path: with_alpha().convert("LA").save(path)),
    "palette with a transparent colour": (".png", lambda path: RGB.quantize(16).save(path, transparency=3)),
    "upper-case suffix": (".PNG", lambda path: RGB.save(path)),
    "webp called png": (".png", lambda path: RGB.save(path, "WEBP")),
    "several pictures in a jpeg": (".jpg", lambda path: RGB.save(path, "MPO", save_all=True, append_images=[RGB])),
    "animated png": (".png", lambda path: RGB.save(path, save_all=True, append_images=[RGB.rotate(180)])),
}
UNREADABLE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "16 bit": (".png", lambda path: Image.new("I;16", (64, 32)).save(path), "8 bits per channel"),
    "16 bit called jpg": (".jpg", lambda path: Image.new("I;16", (64, 32)).save(path, "PNG"), "8 bits per channel"),
    "float": (".png", lambda path: Image.new("F", (64, 32)).save(path, "TIFF"), "8 bits per channel"),
    "empty": (".png", lambda path: path.write_bytes(b""), "it is empty"),
    "no image": (".png", lambda path: path.write_bytes(b"<html>404</html>"), "it is no image"),
    "link that leads nowhere": (".png", lambda path: path.symlink_to("/nonexistent/x.png"), "a link to a file that"),
    "link to itself": (".png", lambda path: path.symlink_to(path), "too many levels of symbolic links"),
    "folder": (".png", lambda path: path.mkdir(), "it is a folder"),
    "pipe": (".png", lambda path: os.mkfifo(path), "it is no file, but a pipe"),
}


@pytest.mark.parametrize("name", READABLE)
def test_images_of_every_mode_that_has_eight_bits_are_read(name: str, folder: Path) -> None:
    first, (suffix, write) = images_of(folder)[0], READABLE[name]
    first.unlink()
    write(first.with_suffix(suffix))
    assert not problems(folder)
    assert read_image(first.with_suffix(suffix)).shape == (32, 64, 3)
    load(folder)


@pytest.mark.parametrize("name", UNREADABLE)
def test_other_files_are_named_by_the_check_and_left_out_if_asked(name: str, folder: Path) -> None:
    first, (suffix, write, reason) = images_of(folder)[0], UNREADABLE[name]
    first.unlink()
    bad = first.with_suffix(suffix)
    write(bad)
    report = check_dataset("folder", str(folder))
    assert [(fault.problem, fault.path) for fault in report.faults] == [("unreadable image", str(bad))]
    assert reason in report.faults[0].detail
    notes = " ".join(load(folder, skip_bad=True))
    assert "1 of 4 images of source train are left out" in notes
    assert bad.name in notes


@pytest.mark.parametrize("name", ["link that leads nowhere", "link to itself", "folder", "pipe"])
def test_what_is_no_file_is_refused_by_name_before_training(name: str, folder: Path) -> None:
    first, (_, write, reason) = images_of(folder)[0], UNREADABLE[name]
    first.unlink()
    write(first)
    with pytest.raises(ValueError, match=f"An image file must be whole, but {first} is not: .*{reason}.*skip_bad"):
        load(folder)


def test_labels_that_lead_nowhere_and_folders_without_a_label_are_left_out_and_named(folder: Path) -> None:
    label = images_of(folder, "train", "labels")[0]
    label.unlink()
    label.symlink_to("/nonexistent/x.png")
    (folder / "val" / "images" / "x.png").mkdir()
    notes = " ".join(load(folder, skip_bad=True))
    assert f"{label}: it is a link to a file that is not there" in notes
    assert f"{folder / 'val' / 'images' / 'x.png'}: it is a folder" in notes


# --- Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".PNG", ".jpg", ".JPEG", ".Png"])
def test_two_images_of_one_stem_are_a_fault(suffix: str, folder: Path) -> None:
    RGB.save(images_of(folder)[0].with_suffix(suffix))
    assert problems(folder) == ["two images of one name"]
    with pytest.raises(ValueError, match="Files of source train must differ in name, but 1 of 5 do not"):
        load(folder)


@pytest.mark.parametrize("split", ["train", "val"])
def test_two_labels_of_one_stem_are_a_fault(split: str, folder: Path, tmp_path: Path) -> None:
    first, second = images_of(folder, split, "labels")[:2]
    first.with_suffix(".PNG").write_bytes(second.read_bytes())
    assert problems(folder) == ["two labels of one name"]
    with pytest.raises(ValueError, match=rf"Files of source {split} must differ in name.*{first.stem}\.png"):
        load(folder)
    with pytest.raises(ValueError, match=f"Files of {split} must differ in name"):
        pack(open_dataset("folder", str(folder)), tmp_path / "packed", PackConfig())


def test_labels_of_one_name_in_two_cities_are_a_fault(tmp_path: Path) -> None:
    write_cityscapes(tmp_path, STREETS.source, EVALUATION.target, CLASSES.names)
    label = next((tmp_path / "gtFine" / "val").rglob("*_labelIds.png"))
    (tmp_path / "gtFine" / "val" / "other").mkdir()
    (tmp_path / "gtFine" / "val" / "other" / label.name).write_bytes(label.read_bytes())
    assert problems(tmp_path, "cityscapes") == ["two labels of one name"]


@pytest.mark.parametrize("kind", ["gta5", "synthia", "cityscapes"])
def test_files_that_the_fields_scripts_write_beside_labels_are_known(kind: str, tmp_path: Path) -> None:
    if kind == "cityscapes":
        write_cityscapes(tmp_path, STREETS.source, EVALUATION.target, CLASSES.names)
    else:
        {"gta5": write_gta5, "synthia": write_synthia}[kind](tmp_path, STREETS.source, CLASSES.names)
    folder = {"gta5": "labels", "synthia": "GT/LABELS", "cityscapes": "gtFine"}[kind]
    train_ids = np.full(256, 255, np.uint8)
    train_ids[list(CITYSCAPES_IDS.values())] = np.arange(19)
    for label in sorted((tmp_path / folder).rglob("*.png")):
        stem = label.stem.removesuffix("_labelIds")
        ids = np.zeros((2, 2), np.uint8) if kind == "synthia" else np.asarray(Image.open(label))
        Image.fromarray(train_ids[ids]).save(label.with_name(f"{stem}_labelTrainIds.png"))
        for extra in ("color", "instanceIds", "instanceTrainIds", *(["gtFine_labelTrainIds"] * (kind == "gta5"))):
            Image.new("RGBA", (2, 2)).save(label.with_name(f"{stem}_{extra}.png"))
        label.with_name(f"{stem}_polygons.json").write_text("{}")
    for name in ("sample_class_stats.json", "samples_with_class.json", "train.txt"):
        (tmp_path / name).write_text("[]")
    assert not problems(tmp_path, kind)
    stray = next((tmp_path / folder).rglob("*_color.png"))
    stray.rename(stray.with_name(stray.name.replace("0", "x", 1)))
    assert problems(tmp_path, kind) == ([] if kind == "cityscapes" else ["label without an image"])
