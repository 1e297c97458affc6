"""What labels show: those that are coded otherwise than they are read are told by their class shares."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segadapt.trainables.core.data.checking import check_dataset
from segadapt.trainables.core.data.class_lists import CITYSCAPES_IDS
from segadapt.trainables.core.data.datasets import DataConfig, load_data
from segadapt.trainables.core.data.label_statistics import (
    STREET_SHARES,
    LabelShares,
    label_warnings,
    sampled_shares,
    shows_a_class,
    suspicions,
)
from segadapt.trainables.core.data.readers.cityscapes import write_cityscapes
from segadapt.trainables.core.data.readers.folder import write_folder
from segadapt.trainables.core.data.readers.gta5 import write_gta5
from segadapt.trainables.core.data.readers.synthia import write_synthia
from segadapt.trainables.core.data.streets import StreetsConfig, labelled_streets, load_streets
from segadapt.trainables.core.data.streets.v1.classes import CLASSES_V1 as CLASSES

CONFIG = StreetsConfig(edition=1, height=32, width=64, train_images=10, val_images=8)
STREETS = labelled_streets(CONFIG)

SYNTHIA_SHARES = {
    "sky": 0.069,
    "building": 0.293,
    "road": 0.184,
    "sidewalk": 0.193,
    "fence": 0.003,
    "vegetation": 0.103,
    "pole": 0.010,
    "car": 0.041,
    "person": 0.043,
    "bus": 0.015,
    "rider": 0.005,
}
"""Measured in RAND-CITYSCAPES; m-birke/automotive-segmentation-datasets, synthia_rand_cityscapes.md."""


@pytest.fixture
def gta5(tmp_path: Path) -> Path:
    write_gta5(tmp_path / "gta5", STREETS.source_train, CLASSES.names)
    return tmp_path / "gta5"


def recode(folder: Path, table: dict[int, int]) -> None:
    """Give the values of all labels in a folder other values."""
    values = np.arange(256, dtype=np.uint8)
    values[list(table)] = list(table.values())
    for path in folder.rglob("*.png"):
        Image.fromarray(values[np.array(Image.open(path))]).save(path)


def warnings_of(source: str, target: str) -> list[str]:
    return label_warnings(*load_data.__wrapped__(DataConfig(source=source, target=target)))


def test_labels_that_are_what_they_should_be_are_not_suspected(gta5: Path, tmp_path: Path) -> None:
    write_synthia(tmp_path / "synthia", STREETS.source_train, CLASSES.names)
    write_cityscapes(tmp_path / "city", STREETS.target_train, STREETS.target_val, CLASSES.names)
    for kind, root in (("gta5", gta5), ("synthia", tmp_path / "synthia"), ("cityscapes", tmp_path / "city")):
        assert check_dataset(kind, str(root)).warnings == ()
    assert warnings_of(f"gta5:{gta5}", f"cityscapes:{tmp_path / 'city'}") == []
    assert label_warnings(*load_streets(CONFIG)) == []
    assert suspicions(LabelShares(9400, SYNTHIA_SHARES, 0.04)) == []
    assert suspicions(LabelShares(2975, STREET_SHARES, 0.12)) == []


def test_labels_of_gta5_that_hold_train_ids_are_named(gta5: Path, tmp_path: Path) -> None:
    recode(gta5 / "labels", {label_id: train_id for train_id, label_id in enumerate(CITYSCAPES_IDS.values())})
    (warning,) = check_dataset("gta5", str(gta5)).warnings
    assert "Labels of train may mean other classes than they are read as" in warning
    assert "every value that they store is a train id (0 to 18, 255)" in warning
    assert "they show no road, no vegetation, no sky, no car, which streets have" in warning
    write_cityscapes(tmp_path / "city", STREETS.target_train, STREETS.target_val, CLASSES.names)
    before_training = warnings_of(f"gta5:{gta5}", f"cityscapes:{tmp_path / 'city'}")
    assert before_training[0].startswith("Labels of the source may mean other classes")
    assert "of the target's pixels and absent from the source's" in before_training[1]


def test_a_reordered_palette_is_named(gta5: Path) -> None:
    ids = [CITYSCAPES_IDS[name] for name in CLASSES.names]
    recode(gta5 / "labels", dict(zip(ids, ids[3:] + ids[:3], strict=True)))
    (warning,) = check_dataset("gta5", str(gta5)).warnings
    assert "they show" in warning
    assert (
        "in Cityscapes. Labels that hold train ids in place of ids, or colours of another palette, look so" in warning
    )


def test_own_classes_are_compared_between_the_domains(tmp_path: Path) -> None:
    names = tuple(f"kind {index}" for index in range(8))
    classes = replace(CLASSES, names=names)
    for domain, train, val in (
        ("source", STREETS.source_train, STREETS.source_val),
        ("target", STREETS.target_train, STREETS.target_val),
    ):
        write_folder(tmp_path / domain, train, val, classes)
    places = f"folder:{tmp_path}/source", f"folder:{tmp_path}/target"
    assert warnings_of(*places) == [], "names that are no streets'"
    recode(tmp_path / "source" / "train" / "labels", {0: 2})
    (warning,) = warnings_of(*places)
    assert "kind 0 is" in warning
    assert "of the target's pixels and absent from the source's" in warning
    recode(tmp_path / "target" / "val" / "labels", dict.fromkeys(range(8), 255))
    assert (
        "Labels of the target may mean other classes than they are read as: they leave 100%" in warnings_of(*places)[0]
    )


def test_few_labels_say_nothing() -> None:
    assert suspicions(LabelShares(7, dict.fromkeys(STREET_SHARES, 0.0), 1.0)) == []
    assert len(suspicions(LabelShares(8, dict.fromkeys(STREET_SHARES, 0.0), 1.0))) == 2
    assert suspicions(LabelShares(8, {"cat": 0.0, "dog": 1.0}, 0.0)) == ["they show dog alone"]


def test_a_sample_is_spread_over_the_set() -> None:
    read: list[int] = []

    class Labels:
        ids = tuple(map(str, range(100)))

        def __len__(self) -> int:
            return len(self.ids)

        def label(self, index: int) -> torch.Tensor:
            read.append(index)
            return torch.tensor([[index % 3, 255]], dtype=torch.uint8)

        image = label

    shares = sampled_shares(Labels(), ("a", "b"))
    assert sorted(read) == list(range(0, 100, 4))
    assert (shares.labels, shares.ignored) == (25, pytest.approx(33 / 50))
    assert sum(shares.classes.values()) == pytest.approx(1)
    read.clear()
    assert shows_a_class(Labels(), 2)
    assert read == [0], "no more labels are read than it takes"
    assert not shows_a_class(Labels(), 0)
