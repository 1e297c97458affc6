"""The generated benchmark: reproducible, well formed, and honest about target labels."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segadapt.trainables.core.data.datasets import DataConfig
from segadapt.trainables.core.data.sheet import contact_sheet, panels_of_config
from segadapt.trainables.core.data.streets import (
    CLASSES,
    StreetsConfig,
    StreetsImages,
    StreetsTargetImages,
    load_streets,
)
from segadapt.trainables.core.data.streets.domains import Bytes

SMALL = StreetsConfig(edition=2, height=32, width=64, train_images=5, val_images=3)
FIRST_EDITION = StreetsConfig(edition=1, height=32, width=64, train_images=5, val_images=3)


def train_images(config: StreetsConfig) -> tuple[StreetsImages, StreetsTargetImages]:
    data, _ = load_streets(config)
    assert isinstance(data.source, StreetsImages)
    assert isinstance(data.target, StreetsTargetImages)
    return data.source, data.target


def labelled_target(config: StreetsConfig) -> StreetsImages:
    data, _ = load_streets(config, oracle=True)
    assert isinstance(data.source, StreetsImages)
    return data.source


def test_a_fresh_process_without_vector_instructions_generates_the_same_content() -> None:
    program = (
        "from segadapt.trainables.core.data.streets import StreetsConfig, load_streets;"
        f"print(load_streets({SMALL!r})[0].fingerprint)"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", program],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR AVX2 FMA3 AVX512F AVX512_SKX",
        },
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert fresh.stdout.strip() == load_streets(SMALL)[0].fingerprint


def test_a_process_generates_each_benchmark_once() -> None:
    equal_config = StreetsConfig(edition=2, height=32, width=64, train_images=5, val_images=3)
    assert load_streets(equal_config)[0] is load_streets(SMALL)[0]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"shift": 0.5},
        {"train_images": 6},
        {"width": 72},
        {"edition": 1},
        {"geometry": 0.5},
        {"rendering": 0.5},
        {"content": 0.5},
        {"weather": 0.5},
    ],
)
def test_each_setting_changes_the_fingerprint(change: dict[str, int | float]) -> None:
    changed = StreetsConfig(**{"edition": 2, "height": 32, "width": 64, "train_images": 5, "val_images": 3, **change})  # type: ignore[arg-type]
    assert load_streets(changed)[0].fingerprint != load_streets(SMALL)[0].fingerprint


def test_another_seed_draws_other_scenes() -> None:
    other = StreetsConfig(edition=2, height=32, width=64, train_images=5, val_images=3, seed=1)
    for mine, theirs in zip(train_images(SMALL), train_images(other), strict=True):
        assert all(not torch.equal(mine.image(i), theirs.image(i)) for i in range(5))


def test_an_image_does_not_depend_on_how_many_are_drawn() -> None:
    more = StreetsConfig(edition=2, height=32, width=64, train_images=8, val_images=4)
    for few, many in zip(train_images(SMALL), train_images(more), strict=True):
        np.testing.assert_array_equal(few.images, many.images[:5])
    np.testing.assert_array_equal(labelled_target(SMALL).labels, labelled_target(more).labels[:5])
    np.testing.assert_array_equal(train_images(SMALL)[0].labels, train_images(more)[0].labels[:5])


def test_training_and_validation_scenes_differ() -> None:
    source, _ = train_images(SMALL)
    _, evaluation = load_streets(SMALL)
    for index in range(3):
        assert not torch.equal(source.image(index), evaluation.source.image(index))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 128), (40, 96)])
def test_images_and_labels_have_the_promised_form(height: int, width: int) -> None:
    data, evaluation = load_streets(StreetsConfig(edition=2, height=height, width=width, train_images=2, val_images=2))
    for images in (data.source, evaluation.source, evaluation.target):
        assert len(images) == len(images.ids) == 2
        for index in range(2):
            assert images.image(index).shape == (3, height, width)
            assert images.label(index).shape == (height, width)
            assert images.image(index).dtype == images.label(index).dtype == torch.uint8
            assert int(images.label(index).max()) < len(CLASSES)
    assert data.target.image(1).shape == (3, height, width)


def test_ids_name_dataset_domain_and_split() -> None:
    data, evaluation = load_streets(SMALL)
    assert data.source.ids[4] == "streets_source_train_000004"
    assert data.target.ids[0] == "streets_target_train_000000"
    assert evaluation.source.ids[2] == "streets_source_val_000002"
    assert evaluation.target.ids[1] == "streets_target_val_000001"


def test_both_domains_show_every_class() -> None:
    config = StreetsConfig(edition=2, height=64, width=128, train_images=40, val_images=1)
    for images in (train_images(config)[0], labelled_target(config)):
        assert set(np.unique(images.labels)) == set(range(len(CLASSES)))


def test_classes_are_a_subset_of_cityscapes_in_its_order() -> None:
    cityscapes = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign")
    cityscapes += ("vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle")
    cityscapes += ("bicycle",)
    for config, count in ((SMALL, 11), (FIRST_EDITION, 8)):
        classes = load_streets(config)[0].classes
        assert len(classes) == len(set(classes.colors)) == count
        positions = [cityscapes.index(name) for name in classes.names]
        assert positions == sorted(positions)


def test_thin_classes_are_rare_in_both_domains() -> None:
    config = StreetsConfig(edition=2, height=64, width=128, train_images=40, val_images=1)
    for images in (train_images(config)[0], labelled_target(config)):
        shares = np.bincount(images.labels.ravel(), minlength=len(CLASSES)) / images.labels.size
        for name in ("pole", "traffic light", "traffic sign", "bicycle"):
            assert 0.001 < shares[CLASSES.names.index(name)] < 0.04, name
        assert shares[CLASSES.names.index("road")] > 0.2


def test_the_default_sizes_are_those_of_the_edition() -> None:
    assert (StreetsConfig(edition=2).size, StreetsConfig(edition=2).count("val")) == ((128, 256), 400)
    first = StreetsConfig()
    assert (first.edition, first.height, first.width, first.val_images) == (1, 64, 128, 60)
    assert (first.size, first.count("train"), first.count("val")) == ((64, 128), 160, 60)


def test_the_first_edition_draws_the_scenes_that_its_published_figures_are_of() -> None:
    digest = hashlib.sha256(
        train_images(FIRST_EDITION)[0].labels.tobytes() + labelled_target(FIRST_EDITION).labels.tobytes()
    )
    assert digest.hexdigest()[:16] == "d1bd6095f4d1ebeb"


def test_the_target_training_set_holds_no_labels() -> None:
    _, target = train_images(SMALL)
    hidden = labelled_target(SMALL).labels
    assert not hasattr(target, "label")
    arrays = [value for value in vars(target).values() if isinstance(value, (np.ndarray, torch.Tensor))]
    assert [array.shape for array in arrays] == [(5, 3, 32, 64)]
    assert not any(np.array_equal(plane, hidden) for plane in np.moveaxis(arrays[0], 1, 0))


def test_images_handed_out_are_copies() -> None:
    source, _ = train_images(SMALL)
    untouched = source.image(0)
    source.image(0).zero_()
    source.label(0).zero_()
    torch.testing.assert_close(source.image(0), untouched)
    assert int(source.label(0).max()) > 0


def test_without_shift_the_target_of_the_first_edition_looks_like_the_source() -> None:
    def brightness_gap(shift: float) -> float:
        config = StreetsConfig(edition=1, height=32, width=64, train_images=40, val_images=1, shift=shift)
        source, target = train_images(config)
        return abs(float(source.images.mean() - target.images.mean()))

    assert brightness_gap(0) < 8 < brightness_gap(1) < brightness_gap(2)


def roughness(images: Bytes) -> float:
    """Return the mean difference between neighbours, which texture, noise and edges raise and blur lowers."""
    return float(np.abs(np.diff(images.astype(np.int16), axis=3)).mean())


def test_without_shift_the_target_has_the_statistics_of_the_source() -> None:
    config = StreetsConfig(edition=2, height=64, width=128, train_images=40, val_images=1, shift=0)
    source, target = train_images(config)
    hidden = labelled_target(config).labels
    assert abs(float(source.images.mean()) - float(target.images.mean())) < 6
    assert roughness(target.images) == pytest.approx(roughness(source.images), rel=0.1)
    shares = [np.bincount(labels.ravel(), minlength=11) / labels.size for labels in (source.labels, hidden)]
    np.testing.assert_allclose(*shares, atol=0.04)


def parts(**strengths: float) -> StreetsConfig:
    """Return a benchmark whose target differs in the named parts alone."""
    none = {"geometry": 0.0, "rendering": 0.0, "content": 0.0, "weather": 0.0}
    return StreetsConfig(edition=2, height=64, width=128, train_images=24, val_images=1, **{**none, **strengths})  # type: ignore[arg-type]


def share_of(config: StreetsConfig, name: str) -> float:
    return float((labelled_target(config).labels == CLASSES.names.index(name)).mean())


def test_each_part_of_the_shift_changes_what_it_says() -> None:
    # Geometry: a camera that looks further down sees less sky and more of what lies below.
    assert share_of(parts(geometry=1), "sky") < share_of(parts(), "sky") - 0.01
    # Content: the streets are fuller and greener.
    for name in ("car", "vegetation", "person"):
        assert share_of(parts(content=1), name) > share_of(parts(), name) + 0.002, name
    # Rendering: pixels are rougher.
    plain, rendered = (train_images(parts(rendering=strength))[1].images for strength in (0.0, 1.0))
    assert roughness(rendered) > 1.15 * roughness(plain)
    # Weather: fog and a dusk differ from image to image.
    brightness = [train_images(parts(weather=strength))[1].images.mean(axis=(1, 2, 3)) for strength in (0.0, 1.0)]
    assert brightness[1].std() > 2 * brightness[0].std()


def test_the_shift_leaves_the_source_alone() -> None:
    shifted = StreetsConfig(edition=2, height=32, width=64, train_images=5, val_images=3, shift=2)
    np.testing.assert_array_equal(train_images(SMALL)[0].images, train_images(shifted)[0].images)


def test_the_oracle_trains_on_the_labelled_target() -> None:
    data, evaluation = load_streets(SMALL)
    oracle_data, oracle_evaluation = load_streets(SMALL, oracle=True)
    assert oracle_data.source.ids == data.target.ids
    torch.testing.assert_close(oracle_data.source.image(3), data.target.image(3))
    torch.testing.assert_close(oracle_evaluation.target.label(1), evaluation.target.label(1))
    assert oracle_data.fingerprint != data.fingerprint


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"height": 60}, "height must be a multiple of 8 and at least 32, but got 60; use 64"),
        ({"width": 24}, "width must be a multiple of 8 and at least 32, but got 24; use 32"),
        ({"train_images": 0}, "train_images must be at least 1, but got 0"),
        ({"val_images": -1}, "val_images must be at least 1, but got -1"),
        ({"seed": -1}, "seed must be at least 0, but got -1"),
        ({"shift": 2.5}, "shift must lie in [0, 2], but got 2.5"),
        ({"shift": float("nan")}, "shift must lie in [0, 2], but got nan"),
        ({"weather": -0.5}, "weather times shift must lie in [0, 2], but got -0.5 times 1.0"),
        ({"shift": 1.5, "geometry": 1.5}, "geometry times shift must lie in [0, 2], but got 1.5 times 1.5"),
        ({"edition": 1, "content": 0.5}, "content must stay 1 in edition 1, which has shift alone, but got 0.5"),
    ],
)
def test_a_bad_setting_is_refused_with_a_way_out(values: dict[str, int | float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        StreetsConfig(**values)  # type: ignore[arg-type]


def test_all_bad_settings_are_reported_at_once() -> None:
    with pytest.raises(ValueError, match=r"height.*width.*train_images.*shift"):
        StreetsConfig(edition=2, height=1, width=1, train_images=0, shift=-1)


def test_the_contact_sheet_shows_both_domains_in_the_class_colours(tmp_path: Path) -> None:
    contact_sheet(panels_of_config(DataConfig(streets=SMALL)), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = {tuple(pixel) for pixel in np.asarray(sheet.convert("RGB")).reshape(-1, 3).tolist()}
        width, height = sheet.size
    assert {CLASSES.colors[CLASSES.names.index(name)] for name in ("road", "building", "sidewalk")} <= pixels
    assert width > 4 * 64 * 2
    assert height > SMALL.val_images * 32 * 2
