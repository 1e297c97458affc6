"""What a plan makes of the data: labels that an objective needs, the size of packed images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import segadapt
from segadapt.platform.errors import UsageError
from segadapt.platform.experiment.planning import TrainRequest, plan_training
from segadapt.platform.settings.objective import LABEL_FREE
from segadapt.platform.storage.folders import Place

SMALL = {
    "data.streets.height": 32,
    "data.streets.width": 64,
    "data.streets.train_images": 6,
    "data.streets.val_images": 2,
}


@pytest.fixture
def town(tmp_path: Path) -> dict[str, str]:
    """Settings that name streets in files, in `town`."""
    root = segadapt.data_make(str(tmp_path / "town"), SMALL)
    return {f"data.{domain}": f"folder:{root / domain}" for domain in ("source", "target")}


def planned(settings: dict[str, Any], tmp_path: Path, **choices: Any) -> Any:
    place = Place(tmp_path / "runs")
    return next(iter(segadapt.plan("sdca", settings, place=place, **choices).record.configs.values()))


def trained(settings: dict[str, Any], tmp_path: Path, objective: str | None = None) -> Any:
    request = TrainRequest(method="sdca", settings=settings, objective=objective)
    return plan_training(request, Place(tmp_path / "runs"))


def blank(labels: Path) -> None:
    for path in labels.glob("*.png"):
        Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)


def remove(labels: Path) -> None:
    for path in labels.glob("*.png"):
        path.unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (remove, "none of the 2 target validation images in folder:.*/town/target has one"),
        (blank, "no pixel of the 2 target validation labels in folder:.*/town/target is of a trained class"),
    ],
)
def test_an_objective_that_needs_target_labels_is_refused_without_and_a_label_free_one_is_not(
    change: Callable[[Path], None], said: str, town: dict[str, str], tmp_path: Path
) -> None:
    change(tmp_path / "town" / "target" / "val" / "labels")
    for refused in (
        lambda: planned(town, tmp_path),
        lambda: planned(town, tmp_path, objective="score/entropy,target_val/miou"),
        lambda: trained(town, tmp_path),
    ):
        with pytest.raises(UsageError, match=f"must find labels of the target, but {said}") as error:
            refused()
        assert all(goal in str(error.value) for goal in LABEL_FREE), "it says what can be asked instead"
    assert planned(town, tmp_path, objective="score/entropy")
    assert trained(town, tmp_path, "score/entropy").objective == "score/entropy"
    assert not (tmp_path / "runs").exists()


def test_one_labelled_target_image_is_enough(town: dict[str, str], tmp_path: Path) -> None:
    next((tmp_path / "town" / "target" / "val" / "labels").glob("*.png")).unlink()
    assert trained(town, tmp_path).objective == "target_val/miou"


@pytest.mark.parametrize(("split", "name"), [("train", "6 train"), ("val", "2 validation")])
def test_source_labels_without_a_trained_class_are_refused(
    split: str, name: str, town: dict[str, str], tmp_path: Path
) -> None:
    blank(tmp_path / "town" / "source" / split / "labels")
    said = rf"Labels of the source must show a trained class \(road, .*\), but every pixel of the {name} labels in"
    for plan in (lambda: planned(town, tmp_path), lambda: trained(town, tmp_path, "score/entropy")):
        with pytest.raises(UsageError, match=said):
            plan()


def test_one_class_in_common_is_refused(town: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "town" / "target" / "classes.yaml"
    content = yaml.safe_load(path.read_text())
    for entry in content["classes"][1:]:
        entry["name"] = f"other {entry['name']}"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UsageError, match="must have two classes or more in common, but have road alone"):
        planned(town, tmp_path)


@pytest.mark.parametrize("value", [5, ["shards:a"], "shards:", "shards:/nowhere", "shards:s3:/x", ""])
def test_data_that_are_none_are_refused_by_name(value: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.(source|target)|packed shards|root of a shards dataset"):
        planned({"data.source": value, "data.target": value}, tmp_path)


def test_the_size_of_packed_images_is_that_of_evaluation(town: dict[str, str], tmp_path: Path) -> None:
    for size in ((16, 32), (24, 48)):
        out = str(tmp_path / f"packed{size[0]}")
        segadapt.data_pack("folder", str(tmp_path / "town" / "target"), out, size=size)
    packed = {"data.source": town["data.source"], "data.target": f"shards:{tmp_path}/packed16"}
    shown = planned(packed, tmp_path).augmentation
    assert (shown.source_size, shown.target_size) == (None, (16, 32))
    assert next(iter(trained(packed, tmp_path).configs.values())).augmentation.target_size == (16, 32)
    both = planned({"data.source": f"shards:{tmp_path}/packed24", "data.target": packed["data.target"]}, tmp_path)
    assert (both.augmentation.source_size, both.augmentation.target_size) == ((24, 48), (16, 32))
    for asked in (None, [20, 40]):
        config = planned({**packed, "augmentation.target_size": asked}, tmp_path)
        assert config.augmentation.target_size == (None if asked is None else (20, 40)), "what is asked for holds"

    place = Place(tmp_path / "runs")
    segadapt.plan("sdca", packed, name="small", place=place).record.save(place.folders)
    for target, size in ((f"shards:{tmp_path}/packed24", (24, 48)), (town["data.target"], None)):
        forked = segadapt.plan(settings={"data.target": target}, fork="small", place=place).record
        assert forked.configs["sdca"].augmentation.target_size == size, "the size follows the data"


@pytest.mark.parametrize(
    ("settings", "smaller"),
    [
        ({"augmentation.crop": [15, 40]}, r"augmentation\.crop .* but got \[15, 40\]"),
        ({"augmentation.target_size": [32, 8]}, r"augmentation\.target_size .* but got \[32, 8\]"),
        ({"trainer.eval_window": [8, 8]}, r"trainer\.eval_window .* but got \[8, 8\]"),
        ({"network.input_scale": 0.1}, r"data\.streets\.height, .* at least 160 pixels.* but got \[32, 64\]"),
    ],
)
def test_what_shows_a_network_less_than_a_patch_is_refused(
    settings: dict[str, Any], smaller: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=smaller + r"\. Show larger images, or choose a network of smaller patches\."):
        planned(SMALL | {"network.name": "timm:test_vit", **settings}, tmp_path)
    planned(SMALL | {"network.name": "timm:test_convnext", **settings}, tmp_path)


def test_images_that_are_smaller_than_a_patch_are_refused(town: dict[str, str], tmp_path: Path) -> None:
    settings = {**town, "network.name": "timm:test_vit", "network.input_scale": 0.4}
    with pytest.raises(UsageError, match=r"the first source image must .* at least 40 pixels.* but got \[32, 64\]"):
        planned(settings, tmp_path)
    planned({**settings, "augmentation.source_size": [40, 80], "augmentation.crop": [40, 40]}, tmp_path)
