"""Moving the look of images: what each restyling promises, and how little of streets' shift they remove."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from segadapt.trainables.core.data.appearance import (
    RESTYLINGS,
    Pixels,
    Restyled,
    amplitude_exchange,
    colour_map,
    histogram_match,
    pixels_of,
)
from segadapt.trainables.core.data.streets import StreetsConfig, load_streets

HEIGHT, WIDTH = 24, 40


def images(seed: int, mean: tuple[int, int, int], count: int = 4) -> list[Pixels]:
    """Return images of correlated colours about a mean, away from 0 and 255."""
    rng = np.random.default_rng(seed)
    mixing = np.array([[12.0, 3, 1], [2, 9, 4], [0, 5, 15]])
    noise = np.clip(rng.standard_normal((count, 3, HEIGHT, WIDTH)), -3, 3)
    mixed = np.einsum("ij,njhw->nihw", mixing, noise) + np.array(mean)[:, None, None]
    return list(np.clip(mixed, 0, 255).astype(np.uint8))


def statistics(restyled: list[Pixels]) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.concatenate([image.reshape(3, -1) for image in restyled], axis=1).astype(np.float64)
    return pixels.mean(axis=1), np.cov(pixels)


def test_a_colour_map_gives_images_the_mean_and_covariance_of_the_others() -> None:
    here, there = images(0, (90, 120, 140)), [image[::-1].copy() for image in images(1, (150, 110, 100))]
    restyle = colour_map(here, there)
    mean, spread = statistics([restyle(image, 0) for image in here])
    wanted_mean, wanted_spread = statistics(there)
    np.testing.assert_allclose(mean, wanted_mean, atol=0.5)
    np.testing.assert_allclose(spread, wanted_spread, rtol=0.05, atol=2)


def test_histogram_matching_gives_each_image_the_histogram_of_all_others() -> None:
    here, there = images(0, (90, 120, 140)), images(1, (150, 110, 100))
    matched = histogram_match(here, there)(here[2], 2)
    for channel in range(3):
        wanted = np.percentile(np.stack([image[channel] for image in there]), (10, 50, 90))
        np.testing.assert_allclose(np.percentile(matched[channel], (10, 50, 90)), wanted, atol=1.5)


def test_an_exchange_of_amplitudes_moves_the_mean_and_keeps_the_edges() -> None:
    here, there = images(0, (90, 120, 140)), images(1, (150, 110, 100))
    here[0][:, :, WIDTH // 2 :] += 40
    changed = amplitude_exchange(here, there)(here[0], 0)
    np.testing.assert_allclose(changed.mean(axis=(1, 2)), there[0].mean(axis=(1, 2)), atol=2)
    edges = [np.diff(image.astype(float), axis=2).ravel() for image in (here[0], changed)]
    assert np.corrcoef(*edges)[0, 1] > 0.9


@pytest.mark.parametrize("name", RESTYLINGS)
def test_images_that_look_like_the_others_stay_as_they_are(name: str) -> None:
    same = images(0, (90, 120, 140), count=1)
    restyled = RESTYLINGS[name](same, same)(same[0], 0)
    assert np.abs(restyled.astype(int) - same[0]).max() <= 2


def test_restyled_images_keep_their_labels_and_ids() -> None:
    data, evaluation = load_streets(StreetsConfig(edition=1, height=32, width=64, train_images=2, val_images=2))
    restyled = Restyled(evaluation.target, colour_map(pixels_of(data.target), pixels_of(data.source)))
    assert (len(restyled), restyled.ids) == (2, evaluation.target.ids)
    assert torch.equal(restyled.label(1), evaluation.target.label(1))
    assert restyled.image(1).dtype == torch.uint8
    assert not torch.equal(restyled.image(1), evaluation.target.image(1))


def benchmark() -> ModuleType:
    """Return `benchmarks/shift.py`."""
    path = Path(__file__).parents[2] / "benchmarks" / "shift.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_the_shift", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_no_map_of_colours_removes_the_shift_of_streets() -> None:
    shift = benchmark()
    small = {
        "data.streets.edition": 2,
        "data.streets.height": 64,
        "data.streets.width": 128,
        "data.streets.train_images": 64,
    }
    rows = shift.run_seed(1000, {**small, "data.streets.val_images": 60, "warmup.steps": 120}, False)
    assert rows["oracle"] - rows["source-only"] > 0.07
    for name in RESTYLINGS:
        assert shift.closed(rows, name) < 0.25, name
