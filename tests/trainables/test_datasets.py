"""Datasets on disk: what streets writes in a dataset's exact format is read back, and every fault names itself."""

import re
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from segadapt.trainables.core.data import class_lists
from segadapt.trainables.core.data.batch import ClassList, DomainData, EvaluationData, LabelledImages
from segadapt.trainables.core.data.checking import DatasetReport, check_dataset
from segadapt.trainables.core.data.class_lists import SUBSETS, match
from segadapt.trainables.core.data.dataset import FileImages, FileTargetImages
from segadapt.trainables.core.data.datasets import KINDS, DataConfig, load_data, open_dataset
from segadapt.trainables.core.data.decoding import UnreadableError, decode_first_channel, encode_png16
from segadapt.trainables.core.data.readers.cityscapes import write_cityscapes
from segadapt.trainables.core.data.readers.folder import write_folder
from segadapt.trainables.core.data.readers.gta5 import write_gta5
from segadapt.trainables.core.data.readers.synthia import write_synthia
from segadapt.trainables.core.data.streets import StreetsConfig, load_streets
from segadapt.trainables.core.data.streets.v1.classes import CLASSES_V1 as CLASSES

CONFIG = StreetsConfig(edition=1, height=32, width=64, train_images=8, val_images=3)
STREETS, STREETS_EVALUATION = load_streets(CONFIG)
TARGET_TRAIN = load_streets(CONFIG, oracle=True)[0].source


@pytest.fixture
def gta5(tmp_path: Path) -> Path:
    write_gta5(tmp_path / "gta5", STREETS.source, CLASSES.names)
    return tmp_path / "gta5"


@pytest.fixture
def synthia(tmp_path: Path) -> Path:
    write_synthia(tmp_path / "synthia", STREETS.source, CLASSES.names)
    return tmp_path / "synthia"


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    write_cityscapes(tmp_path / "cityscapes", TARGET_TRAIN, STREETS_EVALUATION.target, CLASSES.names)
    return tmp_path / "cityscapes"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "folder", STREETS.source, STREETS_EVALUATION.source, CLASSES)
    return tmp_path / "folder"


def load(source: str, target: str, **settings: object) -> tuple[DomainData, EvaluationData]:
    """Load afresh: the folder may have changed since."""
    return load_data.__wrapped__(DataConfig(source=source, target=target, **settings))  # type: ignore[arg-type]


def images_of(kind: str, root: Path, split: str = "train", names: tuple[str, ...] = CLASSES.names) -> FileImages:
    dataset = open_dataset(kind, str(root))
    return FileImages(dataset.splits[split], dataset.format, names)


def assert_same_images(read: LabelledImages, written: LabelledImages) -> None:
    assert len(read) == len(written)
    for index in range(len(written)):
        assert torch.equal(read.image(index), written.image(index))
        assert torch.equal(read.label(index), written.label(index))


def train_ids_beside(label_ids: Path) -> Path:
    """Write `labelTrainIds` beside `labelIds` as cityscapesscripts does."""
    table = np.full(256, 255, np.uint8)
    for train_id, name in enumerate(class_lists.CITYSCAPES.names):
        table[class_lists.CITYSCAPES_IDS[name]] = train_id
    path = label_ids.with_name(label_ids.name.replace("labelIds", "labelTrainIds"))
    Image.fromarray(table[np.array(Image.open(label_ids))]).save(path)
    return path


# --- Class lists -----------------------------------------------------------------------------------------------------


def test_cityscapes_labels_are_those_of_its_own_scripts() -> None:
    from cityscapesscripts.helpers.labels import labels

    trained = sorted((label for label in labels if 0 <= label.trainId < 255), key=lambda label: label.trainId)
    assert class_lists.CITYSCAPES.names == tuple(label.name for label in trained)
    assert class_lists.CITYSCAPES.colors == tuple(label.color for label in trained)
    assert {label.name: label.id for label in trained} == class_lists.CITYSCAPES_IDS
    assert class_lists.CITYSCAPES_LABEL_IDS.known == {label.id % 256 for label in labels}
    for label in labels:
        first = next(other for other in labels if other.color == label.color)
        assert class_lists.GTA5.colors[label.color] == first.id


def test_label_maps_are_those_of_the_papers() -> None:
    """SDCA specification, section 8.3."""
    gta5 = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14}
    gta5 |= {28: 15, 31: 16, 32: 17, 33: 18}
    synthia = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 1: 9, 10: 10, 17: 11, 8: 12, 19: 13, 12: 14}
    synthia |= {11: 15}
    for values, names, expected in (
        (class_lists.GTA5, SUBSETS["19"], gta5),
        (class_lists.CITYSCAPES_LABEL_IDS, SUBSETS["19"], gta5),
        (class_lists.SYNTHIA, SUBSETS["16"], synthia),
    ):
        table = values.table(names)
        assert {value: int(table[value]) for value in range(1 << 16) if table[value] != 255} == expected


def test_the_subsets_are_those_of_the_benchmarks() -> None:
    assert set(SUBSETS["19"]) - set(SUBSETS["16"]) == {"terrain", "truck", "train"}
    assert set(SUBSETS["16"]) - set(SUBSETS["13"]) == {"wall", "fence", "pole"}
    assert [len(names) for names in SUBSETS.values()] == [19, 16, 13]


def test_classes_are_matched_by_name_in_the_order_of_the_target() -> None:
    source = ClassList(("Sky", "traffic_light", "tree"), ((1, 1, 1), (2, 2, 2), (3, 3, 3)))
    target = ClassList(("traffic light", "car", "sky"), ((4, 4, 4), (5, 5, 5), (6, 6, 6)))
    matching = match(source, target)
    assert matching.classes == ClassList(("traffic light", "sky"), ((4, 4, 4), (6, 6, 6)))
    assert str(matching) == (
        "2 classes are trained: traffic light, sky; ignored in the source: tree; ignored in the target: car."
    )
    with pytest.raises(ValueError, match="must have classes in common, but the source has tree and the target car"):
        match(ClassList(("tree",), ((0, 0, 0),)), ClassList(("car",), ((0, 0, 0),)))
    with pytest.raises(ValueError, match="must have two classes or more in common, but have tree alone: a network of"):
        match(ClassList(("Tree", "sky"), ((0, 0, 0), (1, 1, 1))), ClassList(("car", "tree"), ((0, 0, 0), (1, 1, 1))))


@pytest.mark.parametrize(("classes", "names"), [("auto", SUBSETS["16"]), (16, SUBSETS["16"]), (13, SUBSETS["13"])])
def test_synthia_to_cityscapes_trains_what_both_have(
    synthia: Path, cityscapes: Path, classes: Any, names: tuple[str, ...]
) -> None:
    data, evaluation = load(f"synthia:{synthia}", f"cityscapes:{cityscapes}", classes=classes)
    assert data.classes.names == evaluation.classes.names == names
    assert "ignored in the target: " in data.notes[0]
    assert "terrain" in data.notes[0]
    source_index = int(data.source.ids[0])
    named = np.array([*names, "ignored"])
    for labels, truth in (
        (data.source.label(0), STREETS.source.label(source_index)),
        (evaluation.target.label(0), STREETS_EVALUATION.target.label(0)),
    ):
        read = named[labels.numpy().clip(max=len(names))]
        written = np.array(CLASSES.names)[truth.numpy()]
        np.testing.assert_array_equal(read, np.where(np.isin(written, names), written, "ignored"))


def test_gta5_to_cityscapes_trains_all_nineteen(gta5: Path, cityscapes: Path) -> None:
    data, _ = load(f"gta5:{gta5}", f"cityscapes:{cityscapes}", classes=19)
    assert data.classes == class_lists.CITYSCAPES
    assert data.notes[0].startswith("19 classes are trained: road, sidewalk")
    assert "ignored" not in data.notes[0]


def test_a_subset_that_a_domain_lacks_is_refused(synthia: Path, cityscapes: Path) -> None:
    with pytest.raises(ValueError, match=r"data.classes=19 must be .* the source lacks terrain, truck, train"):
        load(f"synthia:{synthia}", f"cityscapes:{cityscapes}", classes=19)


# --- Formats ---------------------------------------------------------------------------------------------------------


def test_own_data_reads_back_bit_by_bit(folder: Path) -> None:
    assert_same_images(images_of("folder", folder), STREETS.source)
    assert_same_images(images_of("folder", folder, "val"), STREETS_EVALUATION.source)
    assert open_dataset("folder", str(folder)).classes == CLASSES


def test_synthia_reads_back_bit_by_bit(synthia: Path) -> None:
    assert_same_images(images_of("synthia", synthia), STREETS.source)


def test_cityscapes_reads_back_bit_by_bit(cityscapes: Path) -> None:
    assert_same_images(images_of("cityscapes", cityscapes), TARGET_TRAIN)
    assert_same_images(images_of("cityscapes", cityscapes, "val"), STREETS_EVALUATION.target)
    assert open_dataset("cityscapes", str(cityscapes)).splits["val"].ids[1] == "streets-val_000001_000019"


def as_colors(label: Path) -> None:
    with Image.open(label) as picture:
        assert picture.mode == "P"
        picture.convert("RGB").save(label)


@pytest.mark.parametrize("colored", [False, True])
def test_gta5_reads_back_with_its_odd_sizes(gta5: Path, colored: bool) -> None:
    if colored:
        for path in (gta5 / "labels").iterdir():
            as_colors(path)
    read = images_of("gta5", gta5)
    for index in range(len(read)):
        image, label = STREETS.source.image(index), STREETS.source.label(index)
        if index % 4 == 1:
            image, label = image[:, :26], label[:26]
        if index % 4 == 3:
            assert read.image(index).shape == (3, 26, 64)
            shrunk = Image.fromarray(label.numpy()).resize((64, 26), Image.Resampling.NEAREST)
            label = torch.from_numpy(np.array(shrunk))
        else:
            assert torch.equal(read.image(index), image)
        assert torch.equal(read.label(index), label)


def test_own_data_may_be_jpeg_with_labels_in_colours(folder: Path) -> None:
    text = (folder / "classes.yaml").read_text().replace("ignore: [255]", "ignore: [255, [1, 2, 3]]")
    (folder / "classes.yaml").write_text(text)
    colors = np.array(CLASSES.colors, np.uint8)
    for index, image in enumerate(sorted((folder / "train" / "images").iterdir())):
        Image.open(image).save(image.with_suffix(".JPG"), quality=95)
        image.unlink()
        painted = colors[STREETS.source.label(index).numpy()]
        painted[:4] = (1, 2, 3)
        Image.fromarray(painted).save(folder / "train" / "labels" / image.name)
    read = images_of("folder", folder)
    assert len(read) == 8
    assert float((read.image(0).float() - STREETS.source.image(0).float()).abs().mean()) < 8
    assert torch.equal(read.label(0)[4:], STREETS.source.label(0)[4:])
    assert (read.label(0)[:4] == 255).all()


def test_train_ids_are_read_if_all_labels_have_them(cityscapes: Path) -> None:
    label_ids = sorted((cityscapes / "gtFine").rglob("*_labelIds.png"))
    by_label_ids = images_of("cityscapes", cityscapes, names=SUBSETS["16"])
    written = [train_ids_beside(path) for path in label_ids]
    dataset = open_dataset("cityscapes", str(cityscapes))
    assert dataset.format.values is class_lists.CITYSCAPES_TRAIN_IDS
    assert_same_images(images_of("cityscapes", cityscapes, names=SUBSETS["16"]), by_label_ids)

    written[0].unlink()
    dataset = open_dataset("cityscapes", str(cityscapes))
    assert dataset.format.values is class_lists.CITYSCAPES_LABEL_IDS
    assert dataset.notes == ("labelTrainIds are missing for 1 of 11 labels, so that labelIds are read for all.",)
    for path in label_ids:
        path.unlink()
    assert open_dataset("cityscapes", str(cityscapes)).format.values is class_lists.CITYSCAPES_TRAIN_IDS


def test_void_and_license_plates_are_ignored(cityscapes: Path) -> None:
    label = sorted((cityscapes / "gtFine" / "train").rglob("*_labelIds.png"))[0]
    Image.fromarray(np.array([[0, 7, 4, 33], [255, 29, 26, 11]], np.uint8).repeat(16, 0).repeat(16, 1)).save(label)
    read = images_of("cityscapes", cityscapes, names=SUBSETS["19"]).label(0)
    assert read[::16, ::16].tolist() == [[255, 0, 255, 18], [255, 255, 13, 2]]


# --- The sixteen-bit trap --------------------------------------------------------------------------------------------


def filtered_png16(channels: NDArray[np.uint16]) -> bytes:
    """Encode (H, W, 3) with the PNG specification's five row filters in turn; an encoder of its own."""
    height, width, _ = channels.shape
    rows = channels.astype(">u2").reshape(height, -1).view(np.uint8).astype(np.int32)
    body, above = b"", np.zeros(width * 6, np.int32)
    for number, row in enumerate(rows):
        left, upper_left = (np.concatenate([np.zeros(6, np.int32), values[:-6]]) for values in (row, above))
        estimate = left + above - upper_left
        to_left, to_above, to_corner = (abs(estimate - value) for value in (left, above, upper_left))
        paeth = np.where(
            (to_left <= to_above) & (to_left <= to_corner), left, np.where(to_above <= to_corner, above, upper_left)
        )
        guess = (np.zeros_like(row), left, above, (left + above) // 2, paeth)[number % 5]
        body += bytes([number % 5]) + ((row - guess) % 256).astype(np.uint8).tobytes()
        above = row
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(body)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part)) for name, part in chunks
    )


@pytest.mark.parametrize("encode", [encode_png16, filtered_png16])
def test_all_sixteen_bits_of_a_label_are_read(encode: Callable[[NDArray[np.uint16]], bytes], tmp_path: Path) -> None:
    channels = np.random.default_rng(0).integers(0, 1 << 16, (33, 50, 3), dtype=np.uint16)
    channels[:20, :, 0] = 21
    data = encode(channels)
    np.testing.assert_array_equal(decode_first_channel(data), channels[..., 0])
    from torchvision.io import ImageReadMode, decode_png

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        judge = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    np.testing.assert_array_equal(judge[0].numpy(), channels[..., 0])


def test_pil_alone_reads_every_class_as_zero(synthia: Path) -> None:
    """The trap: were this to change, `decode_first_channel` could go."""
    label = sorted((synthia / "GT" / "LABELS").iterdir())[0]
    assert not np.array(Image.open(label))[..., 0].any()
    assert images_of("synthia", synthia).label(0).any()


def test_a_synthia_label_of_eight_bits_is_refused(synthia: Path) -> None:
    label = sorted((synthia / "GT" / "LABELS").iterdir())[0]
    Image.open(label).convert("RGB").save(label)
    with pytest.raises(ValueError, match=f"{label.name}.*16-bit RGB PNG with the class in .* is 8-bit RGB"):
        images_of("synthia", synthia).label(0)


# --- Domains ---------------------------------------------------------------------------------------------------------


def test_training_has_no_way_to_a_target_label(gta5: Path, cityscapes: Path) -> None:
    data, _ = load(f"gta5:{gta5}", f"cityscapes:{cityscapes}")
    assert type(data.target) is FileTargetImages
    assert not hasattr(data.target, "label")
    assert "gtFine" not in repr(vars(data.target))
    with_labels = data.fingerprint
    shutil.rmtree(cityscapes / "gtFine" / "train")
    without, _ = load(f"gta5:{gta5}", f"cityscapes:{cityscapes}")
    assert without.fingerprint == with_labels
    with pytest.raises(ValueError, match="Every image of target train must have a label, but 8 of 8 do not"):
        load(f"gta5:{gta5}", f"cityscapes:{cityscapes}", oracle=True)


def test_the_oracle_trains_on_the_labelled_target(gta5: Path, cityscapes: Path) -> None:
    data, evaluation = load(f"gta5:{gta5}", f"cityscapes:{cityscapes}", oracle=True)
    adapted, _ = load(f"gta5:{gta5}", f"cityscapes:{cityscapes}")
    assert data.source.ids == data.target.ids
    assert torch.equal(data.source.image(2), TARGET_TRAIN.image(2))
    assert len(evaluation.source) == 1
    assert data.fingerprint != adapted.fingerprint


def test_a_domain_without_validation_split_sets_images_aside_by_their_id(gta5: Path, cityscapes: Path) -> None:
    data, evaluation = load(f"gta5:{gta5}", f"cityscapes:{cityscapes}")
    assert len(evaluation.source) == 1, "at most a fifth"
    assert sorted([*data.source.ids, *evaluation.source.ids]) == [f"{number:05d}" for number in range(1, 9)]
    assert "1 of 8 source images are set aside for validation." in data.notes
    assert len(evaluation.target) == 3
    assert not any("target images" in note for note in data.notes)

    for path in [gta5 / "images" / "00009.png", gta5 / "labels" / "00009.png"]:
        shutil.copy(path.with_name("00005.png"), path)
    more, more_evaluation = load(f"gta5:{gta5}", f"cityscapes:{cityscapes}")
    assert set(more_evaluation.source.ids) <= {*evaluation.source.ids, "00009"}
    assert len(more.source) == 8


def test_the_fingerprint_follows_the_content_and_not_the_place(synthia: Path, folder: Path, tmp_path: Path) -> None:
    def fingerprint(root: Path) -> str:
        return load(f"synthia:{root}", f"folder:{folder}")[0].fingerprint

    first = fingerprint(synthia)
    moved = synthia.rename(tmp_path / "moved")
    assert fingerprint(moved) == first
    victim = moved / "GT" / "LABELS" / "0000000.png"
    victim.write_bytes((moved / "GT" / "LABELS" / "0000001.png").read_bytes())
    second = fingerprint(moved)
    (folder / "val" / "labels" / "streets_source_val_000000.png").write_bytes(
        (folder / "val" / "labels" / "streets_source_val_000001.png").read_bytes()
    )
    assert len({first, second, fingerprint(moved)}) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "gta5:/x"}, "data.source and data.target must be given together"),
        ({"source": "/data/gta5", "target": "cityscapes:/x"}, "data.source must be KIND:ROOT with KIND one of gta5"),
        ({"source": "gta5:/x", "target": "kitti:/x"}, "data.target must be KIND:ROOT"),
        ({"source": "gta5:", "target": "folder:/x"}, "data.source must be KIND:ROOT"),
        ({"classes": "16"}, "data.classes must be auto with streets"),
        ({"holdout": 0}, "data.holdout must be at least 1"),
    ],
)
def test_a_bad_setting_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        DataConfig(**settings)  # type: ignore[arg-type]


def test_experiments_are_named_after_the_pair() -> None:
    assert DataConfig().name == "streets"
    assert DataConfig(source="gta5:/a", target="cityscapes:/b").name == "gta5-cityscapes"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "'NoneType' object"),
        ("classes: []", "it names no class"),
        ("classes: [{name: road, id: 0}]", "it has no 'color'"),
        ("classes: [{name: road, id: 300, color: [1, 2, 3]}]", "whole numbers in [0, 255], but got 300"),
        ("classes: [{name: road, id: 255, color: [1, 2, 3]}]", "ids must differ from each other and from those"),
        (
            "classes: [{name: road, id: 0, color: [1, 2, 3]}, {name: Road, id: 1, color: [1, 2, 4]}]",
            "names must differ, but Road came twice",
        ),
        ("classes: [{name: a, id: 0, color: [1, 2, 3]}, {name: b, id: 1, color: [1, 2, 3]}]", "colors must differ"),
        ("classes: {", "while parsing"),
    ],
)
def test_a_malformed_class_list_says_how_it_must_be(folder: Path, content: str, reason: str) -> None:
    (folder / "classes.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"classes.yaml must list the classes as") as error:
        open_dataset("folder", str(folder))
    assert reason in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_or_missing_folder_is_refused(kind: str, tmp_path: Path, gta5: Path) -> None:
    with pytest.raises(ValueError, match="must be an existing folder"):
        open_dataset(kind, str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"must hold .* but .*empty has 0|classes.yaml must list"):
        load(f"gta5:{gta5}", f"{kind}:{tmp_path / 'empty'}")


# --- Broken files ----------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 255
    path.write_bytes(content)


def without_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("break_file", [truncate, empty, corrupt, without_end])
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_file_names_itself(
    kind: str, break_file: Callable[[Path], None], request: pytest.FixtureRequest
) -> None:
    images = images_of(kind, request.getfixturevalue(kind))
    image, label = images.files()[0], images.files()[len(images)]
    break_file(label)
    with pytest.raises(UnreadableError, match=f"{label.name} is not: .*data.skip_bad=true"):
        images.label(0)
    break_file(image)
    with pytest.raises(UnreadableError, match=f"{image.name} is not: .*data.skip_bad=true"):
        images.image(0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_changed_byte_of_a_label_goes_unnoticed(kind: str, request: pytest.FixtureRequest) -> None:
    images = images_of(kind, request.getfixturevalue(kind))
    label = images.files()[len(images)]
    content = label.read_bytes()
    for place in range(0, len(content), 3):
        label.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        with pytest.raises(ValueError, match=label.name):
            images.label(0)


def test_a_file_that_is_gone_is_an_error_of_the_disk(gta5: Path) -> None:
    """Ray may try again after such an error, not after a broken file."""
    images = images_of("gta5", gta5)
    for path in images.files():
        path.unlink()
    with pytest.raises(FileNotFoundError):
        images.image(0)
    with pytest.raises(FileNotFoundError):
        images.label(0)


def test_own_labels_must_be_known_and_fit_their_image(folder: Path) -> None:
    images = images_of("folder", folder)
    label = images.files()[len(images)]
    Image.fromarray(np.full((32, 64), 8, np.uint8)).save(label)
    with pytest.raises(ValueError, match=f"{label.name}: A label must hold known ids alone, but holds 8"):
        images.label(0)
    Image.fromarray(np.full((30, 64), 0, np.uint8)).save(label)
    with pytest.raises(ValueError, match=f"{label.name} is 64x30 and .* is 64x32"):
        images.label(0)
    Image.fromarray(np.full((32, 64), 0, np.uint16)).save(label)
    with pytest.raises(ValueError, match=r"8-bit grey or palette PNG of class ids.* is 16-bit grey"):
        images.label(0)
    Image.fromarray(np.zeros((32, 64, 3), np.uint8)).save(label, format="JPEG")
    with pytest.raises(ValueError, match="A label must be a PNG"):
        images.label(0)


def test_bad_files_are_left_out_if_asked_for(synthia: Path, cityscapes: Path) -> None:
    places = f"synthia:{synthia}", f"cityscapes:{cityscapes}"
    _, evaluation = load(*places)
    held_out = evaluation.source.ids[0]
    bad_image, bad_label = [f"{n:07d}" for n in range(8) if f"{n:07d}" != held_out][:2]
    truncate(synthia / "RGB" / f"{bad_image}.png")
    truncate(synthia / "GT" / "LABELS" / f"{bad_label}.png")
    truncate(sorted((cityscapes / "leftImg8bit" / "val").rglob("*.png"))[0])
    truncate(sorted((cityscapes / "gtFine" / "train").rglob("*.png"))[0])  # no concern of training

    kept, evaluation = load(*places, skip_bad=True)
    assert kept.notes[2:] == (
        f"2 of 7 images of source train are left out as bad: {bad_image}.png, {bad_label}.png.",
        "1 of 3 images of target val are left out as bad: streets-val_000000_000019_leftImg8bit.png.",
    )
    assert (len(kept.source), len(kept.target), len(evaluation.target)) == (5, 8, 2)
    for images in (kept.source, evaluation.target):
        for index in range(len(images)):
            assert images.image(index).shape[1:] == images.label(index).shape

    for path in (synthia / "RGB").iterdir():
        truncate(path)
    with pytest.raises(ValueError, match="source train must hold a file that can be decoded, but none of 7 can"):
        load(*places, skip_bad=True)


# --- The checker -----------------------------------------------------------------------------------------------------


def faults_of(report: DatasetReport) -> list[tuple[str, str]]:
    return sorted((fault.problem, Path(fault.path).name) for fault in report.faults)


@pytest.mark.parametrize("kind", KINDS)
def test_what_streets_writes_is_sound(kind: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(kind)
    seen: list[tuple[int, int]] = []
    report = check_dataset(kind, str(root), lambda done, total: seen.append((done, total)))
    assert report.faults == ()
    train = report.splits["train"]
    assert (train.images, train.labels, sum(train.sizes.values())) == (8, 8, 8)
    shown = {name for name, pixels in train.pixels.items() if pixels}
    assert shown == set(CLASSES.names)
    assert seen == [(1, sum(split.images for split in report.splits.values()))] * len(seen)
    written = list(root.rglob("*.png"))
    assert sum(split.packed_bytes for split in report.splits.values()) == sum(path.stat().st_size for path in written)


def test_the_histogram_counts_pixels_and_labels(synthia: Path) -> None:
    train = check_dataset("synthia", str(synthia)).splits["train"]
    labels = torch.stack([STREETS.source.label(index) for index in range(8)])
    for index, name in enumerate(CLASSES.names):
        assert train.pixels[name] == int((labels == index).sum())
        assert train.images_with[name] == int((labels == index).flatten(1).any(1).sum())
    assert train.pixels["ignored"] == 0


def test_every_fault_of_gta5_is_reported(gta5: Path) -> None:
    names = [f"{number:05d}.png" for number in range(1, 9)]
    (gta5 / "labels" / names[0]).unlink()
    (gta5 / "images" / names[1]).unlink()
    truncate(gta5 / "images" / names[2])
    corrupt(gta5 / "labels" / names[3])
    Image.fromarray(np.full((32, 64), 40, np.uint8)).save(gta5 / "labels" / names[4])
    Image.fromarray(np.full((32, 64, 3), 9, np.uint8)).save(gta5 / "labels" / names[5])
    Image.fromarray(np.zeros((32, 64, 4), np.uint8)).save(gta5 / "labels" / names[6])
    empty(gta5 / "images" / names[7])
    report = check_dataset("gta5", str(gta5))
    assert faults_of(report) == [
        ("image without a label", names[0]),
        ("label of the wrong kind", names[6]),
        ("label with unknown ids", names[4]),
        ("label with unknown ids", names[5]),
        ("label without an image", names[1]),
        ("unreadable image", names[2]),
        ("unreadable image", names[7]),
        ("unreadable label", names[3]),
    ]
    details = {Path(fault.path).name: fault.detail for fault in report.faults}
    assert details[names[4]] == "A label must hold known ids alone, but holds 40."
    assert details[names[5]] == "A label must hold known ids alone, but holds a colour of no class."
    assert details[names[7]] == "it is empty"


def test_sizes_of_gta5_that_differ_are_noted_and_no_fault(gta5: Path) -> None:
    report = check_dataset("gta5", str(gta5))
    assert report.splits["train"].sizes == {"64x32": 4, "64x26": 4}
    assert "Labels of train that differ in size from their image and are resized to it: 2." in report.notes


def test_every_fault_of_synthia_is_reported(synthia: Path) -> None:
    labels = sorted((synthia / "GT" / "LABELS").iterdir())
    Image.open(labels[0]).convert("RGB").save(labels[0])
    Image.fromarray(np.zeros((32, 64), np.uint8)).save(labels[1])
    labels[2].write_bytes(encode_png16(np.full((32, 64, 3), 3 + 256, np.uint16)))
    labels[3].write_bytes(encode_png16(np.full((30, 64, 3), 3, np.uint16)))
    truncate(labels[4])
    labels[5].unlink()
    report = check_dataset("synthia", str(synthia))
    assert faults_of(report) == [
        ("image without a label", labels[5].name),
        ("label and image differ in size", labels[3].name),
        ("label of the wrong kind", labels[0].name),
        ("label of the wrong kind", labels[1].name),
        ("label with unknown ids", labels[2].name),
        ("unreadable label", labels[4].name),
    ]


def test_every_fault_of_cityscapes_is_reported(cityscapes: Path) -> None:
    images = sorted((cityscapes / "leftImg8bit").rglob("*.png"))
    labels = sorted((cityscapes / "gtFine").rglob("*.png"))
    labels[0].unlink()
    Image.fromarray(np.full((32, 64), 34, np.uint8)).save(labels[1])
    Image.fromarray(np.full((16, 32), 7, np.uint8)).save(labels[2])
    Image.fromarray(np.full((32, 64), 7, np.uint16)).save(labels[3])
    truncate(images[-1])
    report = check_dataset("cityscapes", str(cityscapes))
    assert faults_of(report) == [
        ("image without a label", images[0].name),
        ("label and image differ in size", labels[2].name),
        ("label of the wrong kind", labels[3].name),
        ("label with unknown ids", labels[1].name),
        ("unreadable image", images[-1].name),
    ]
    assert report.splits["val"].labels == 3


def test_every_fault_of_own_data_is_reported(folder: Path) -> None:
    images = sorted((folder / "train" / "images").iterdir())
    shutil.copy(images[0], images[0].with_suffix(".jpeg"))
    shutil.copy(folder / "train" / "labels" / images[0].name, folder / "val" / "labels" / "nobody.png")
    Image.fromarray(np.full((32, 64), 254, np.uint8)).save(folder / "train" / "labels" / images[1].name)
    assert faults_of(check_dataset("folder", str(folder))) == [
        ("label with unknown ids", images[1].name),
        ("label without an image", "nobody.png"),
        ("two images of one name", images[0].name),
    ]
    with pytest.raises(ValueError, match="Files of source train must differ in name"):
        load(f"folder:{folder}", f"folder:{folder}")


def test_a_target_of_own_data_needs_no_training_labels(folder: Path, synthia: Path) -> None:
    shutil.rmtree(folder / "train" / "labels")
    assert check_dataset("folder", str(folder)).faults == ()
    data, _ = load(f"synthia:{synthia}", f"folder:{folder}")
    assert data.classes == CLASSES
    assert len(data.target) == 8


@pytest.mark.parametrize("kept", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "cityscapes"])
def test_a_target_may_have_labels_for_none_or_some_of_its_validation_images(
    kind: str, kept: int, folder: Path, cityscapes: Path, synthia: Path
) -> None:
    root, places = {"folder": (folder, "{}/labels/*"), "cityscapes": (cityscapes, "gtFine/{}/*/*")}[kind]
    _, complete = load(f"synthia:{synthia}", f"{kind}:{root}")
    train, val = (sorted(root.glob(places.format(split))) for split in ("train", "val"))
    for path in [*train, *val[: len(val) - kept]]:
        path.unlink()
    report = check_dataset(kind, str(root))
    assert report.faults == ()
    data, evaluation = load(f"synthia:{synthia}", f"{kind}:{root}", skip_bad=True)
    assert (len(data.target), len(evaluation.scored), len(evaluation.target)) == (8, 3, kept)
    assert not hasattr(evaluation.scored, "label")
    if not kept:
        assert "11 images without labels: fine for adaptation, nothing to evaluate with." in report.notes
        assert "None of the 3 validation images of the target has a label: its mIoU will be unknown." in data.notes
        return
    assert "1 of 3 images of val without labels: fine for adaptation, 2 to evaluate with." in report.notes
    assert "2 of 3 validation images of the target have a label: its mIoU will be that of these." in data.notes
    for index in range(2):
        assert torch.equal(evaluation.target.image(index), complete.target.image(index + 1))
        assert torch.equal(evaluation.target.label(index), complete.target.label(index + 1))
    truncate(val[-1])
    data, evaluation = load(f"synthia:{synthia}", f"{kind}:{root}", skip_bad=True)
    assert (len(evaluation.scored), len(evaluation.target)) == (2, 1)
    assert any("1 of 3 images of target val are left out as bad" in note for note in data.notes)


def test_a_source_must_have_every_label(folder: Path, cityscapes: Path) -> None:
    label = sorted((folder / "val" / "labels").iterdir())[0]
    label.unlink()
    (fault,) = check_dataset("folder", str(folder)).faults
    assert (fault.problem, Path(fault.path).name) == ("image without a label", label.name)
    assert fault.detail == "A source must have it; a target may do without."
    with pytest.raises(ValueError, match="Every image of source val must have a label, but 1 of 3 do not"):
        load(f"folder:{folder}", f"cityscapes:{cityscapes}")


@pytest.mark.parametrize("kind", ["gta5", "synthia", "cityscapes"])
def test_a_folder_with_another_layout_is_a_fault(kind: str, folder: Path) -> None:
    (fault,) = check_dataset(kind, str(folder)).faults
    assert fault.problem == "no training images"
    assert "must hold" in fault.detail


def test_ids_are_sorted_and_differ(cityscapes: Path) -> None:
    for split in open_dataset("cityscapes", str(cityscapes)).splits.values():
        assert all(first < second for first, second in pairwise(split.ids))
