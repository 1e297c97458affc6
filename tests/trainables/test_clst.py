"""Promises of CLST: agreement with reference arrays and with literal forms, state that survives, training that runs.

No official code was found. The arrays `golden/clst_*.npz` come from an independent reference written as plain loops in
float64 from the same formulas. Deviations are relative to the largest entry of the expected array.
"""

import importlib.util
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy import Reports, toy_config

from segadapt.trainables.clst import CENTROIDS, CLST, Round
from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.labelling.ensemble import (
    COMPLETE,
    ENSEMBLE,
    EnsembleConfidence,
    PredictionEnsemble,
    decode_ensemble,
    encode_ensemble,
)
from segadapt.trainables.core.labelling.features import labels_at_features
from segadapt.trainables.core.labelling.files import PseudoLabelFolder
from segadapt.trainables.core.labelling.thresholds import confidence_at, keep_confident, share_thresholds
from segadapt.trainables.core.losses.centroid_contrast import centroid_contrast, class_sums
from segadapt.trainables.core.method import SOURCE_ONLY
from segadapt.trainables.core.networks import build_segmenter
from segadapt.trainables.core.state.class_centroids import ClassCentroids
from segadapt.trainables.core.state.mean_teacher import MeanTeacher
from segadapt.trainables.core.state.running_confidence import RunningConfidence
from segadapt.trainables.core.training.checkpoint import load_state
from segadapt.trainables.core.training.config import TrainerSettings
from segadapt.trainables.core.training.trainer import Trainer

GOLDEN = Path(__file__).parent / "golden"
DTYPES = [torch.float64, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
fast = settings(max_examples=60, deadline=None, derandomize=True)


def load_literal() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "literal" / "clst.py"
    spec = importlib.util.spec_from_file_location("literal_clst", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


literal = load_literal()


# Reference arrays.


class Comparison:
    """Collects deviations from the arrays named `exp_*` and asks that none was left out."""

    def __init__(self, case: str) -> None:
        self.arrays: Any = np.load(GOLDEN / f"{case}.npz")
        self.unread = {name for name in self.arrays.files if name.startswith("exp_")}
        self.deviations: dict[str, float] = {}

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(self.arrays[name]).to(dtype)

    def close(self, name: str, actual: Tensor) -> None:
        expected = self.arrays[name]
        self.unread.remove(name)
        difference = np.abs(actual.detach().double().numpy() - expected).max()
        self.deviations[name] = float(difference) / (float(np.abs(expected).max()) or 1.0)

    def equal(self, name: str, actual: Tensor) -> None:
        self.unread.remove(name)
        np.testing.assert_array_equal(actual.numpy(), self.arrays[name])

    def check(self, dtype: torch.dtype) -> None:
        assert not self.unread, f"expected arrays that were not compared: {sorted(self.unread)}"
        tolerances = {
            name: 1e-9 if dtype == torch.float64 else 1e-5 if self.arrays[name].ndim == 0 else 1e-4
            for name in self.deviations
        }
        assert not {name: value for name, value in self.deviations.items() if value > tolerances[name]}


@dtypes
def test_contrast_agrees_with_the_reference(dtype: torch.dtype) -> None:
    golden = Comparison("clst_1_contrast")
    arrays = golden.arrays
    centroids = ClassCentroids(int(arrays["C"]), arrays["mu_in"].shape[1])
    centroids.centroids.copy_(golden.tensor("mu_in", dtype))
    centroids.seen.copy_(golden.tensor("seen_in", torch.bool))
    features = {domain: golden.tensor(f"feature_{domain}", dtype).requires_grad_() for domain in "st"}
    labels = {domain: labels_at_features(golden.tensor(f"label_{domain}", torch.int64), (6, 7)) for domain in features}
    knobs = {"temperature": float(arrays["tau"]), "min_cells": int(arrays["n_min"])}

    centroids.update(features["s"], labels["s"], momentum=float(arrays["beta"]))
    golden.close("exp_mu_out", centroids.centroids)
    golden.equal("exp_seen_out", centroids.seen.long())
    losses = {}
    for domain, name in (("s", "source"), ("t", "target")):
        golden.equal(f"exp_label_{domain}_small", labels[domain])
        losses[domain] = centroid_contrast(
            features[domain], labels[domain], centroids.centroids, centroids.seen, **knobs
        )
        golden.close(f"exp_loss_{name}", losses[domain])
        _, counts = class_sums(features[domain], labels[domain], int(arrays["C"]))
        anchors = ((counts >= knobs["min_cells"]) & centroids.seen).nonzero()
        golden.equal(f"exp_anchors_{domain}", anchors)
        one_by_one = [
            centroid_contrast(
                features[domain][[image]],
                labels[domain][[image]].masked_fill(labels[domain][[image]] != index, IGNORE_INDEX),
                centroids.centroids,
                centroids.seen,
                **knobs,
            )
            for image, index in anchors.tolist()
        ]
        golden.close(f"exp_anchor_loss_{domain}", torch.stack(one_by_one))
    total = losses["t"] + float(arrays["gamma_s"]) * losses["s"]
    golden.close("exp_loss", total)
    total.backward()
    for domain, feature in features.items():
        assert feature.grad is not None
        golden.close(f"exp_grad_feature_{domain}", feature.grad)
    golden.check(dtype)


@dtypes
def test_ensemble_agrees_with_the_reference(dtype: torch.dtype, tmp_path: Path) -> None:
    golden = Comparison("clst_2_ensemble")
    arrays = golden.arrays
    ids = ["0", "1", "2"]
    stored = []
    previous = None
    for number, logits in enumerate(golden.tensor("logits", dtype)):
        ensemble = PredictionEnsemble(tmp_path / str(number), previous=previous, momentum=float(arrays["alpha"]))
        stored.append(ensemble.update(ids, logits.softmax(dim=1)))
        ensemble.finish(len(ids))
        assert torch.equal(torch.stack([ensemble.read(image_id) for image_id in ids]), stored[-1])
        previous = ensemble.folder
    golden.equal("exp_q", torch.stack(stored))
    decoded = decode_ensemble(stored[-1], dtype)
    golden.close("exp_ensemble", decoded)

    confidences = EnsembleConfidence(int(arrays["C"]), torch.device("cpu"))
    confidences.update(stored[-1])
    thresholds = confidences.share_thresholds(share=float(arrays["rho"]), cap=float(arrays["theta_max"]))
    golden.close("exp_thresholds", thresholds)
    size = arrays["exp_plabel"].shape[-2:]
    confidence, prediction = confidence_at(decoded, (size[0], size[1]))
    golden.unread -= {"exp_conf", "exp_plabel"}
    np.testing.assert_allclose(confidence.numpy(), arrays["exp_conf"], rtol=0, atol=1e-6)  # stored as float32
    labels = keep_confident(confidence, prediction, thresholds).numpy()
    firm = arrays["boundary"] == 0
    np.testing.assert_array_equal(labels[firm], arrays["exp_plabel"][firm])
    golden.check(dtype)


# Literal forms, on random problems.


class Problem(NamedTuple):
    """One batch and centroids; some classes are absent and some unseen."""

    features: Tensor  # (B, D, h, w) float64
    labels: Tensor  # (B, H, W)
    centroids: Tensor  # (C, D)
    seen: Tensor  # (C,)

    @property
    def cells(self) -> Tensor:
        return labels_at_features(self.labels, (self.features.shape[-2], self.features.shape[-1]))


def make_problem(
    batch: int,
    channels: int,
    classes: int,
    grid: tuple[int, int],
    *,
    extra: tuple[int, int] = (0, 0),
    labelled: float,
    seen: float = 0.8,
    seed: int,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    size = (grid[0] + extra[0], grid[1] + extra[1])
    occurring = torch.randint(0, classes, (classes,), generator=generator)  # drawn with repetition: some are absent
    labels = occurring[torch.randint(0, classes, (batch, *size), generator=generator)]
    labels[torch.rand(batch, *size, generator=generator) >= labelled] = IGNORE_INDEX
    is_seen = torch.rand(classes, generator=generator) < seen
    return Problem(
        features=torch.randn(batch, channels, *grid, generator=generator, dtype=torch.float64) + 0.5,
        labels=labels,
        centroids=torch.randn(classes, channels, generator=generator, dtype=torch.float64) * is_seen.unsqueeze(1),
        seen=is_seen,
    )


side = st.integers(1, 5)
problems = st.builds(
    make_problem,
    batch=st.integers(1, 3),
    channels=st.integers(1, 7),
    classes=st.integers(1, 5),
    grid=st.tuples(side, side),
    extra=st.tuples(st.integers(0, 9), st.integers(0, 9)),  # label ratios are seldom integers
    labelled=st.sampled_from([0.0, 0.4, 1.0]),
    seen=st.sampled_from([0.0, 0.7, 1.0]),
    seed=st.integers(0, 2**31),
)


def assert_zero(loss: Tensor, wanted: Tensor) -> None:
    (gradient,) = torch.autograd.grad(loss, wanted)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(wanted))


def assert_same(actual: Tensor, expected: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    gradients = (torch.autograd.grad(loss, wanted)[0] for loss in (actual, expected))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@fast
@given(problem=problems, temperature=st.sampled_from([0.03, 0.1, 1.0]), min_cells=st.sampled_from([1, 2, 5]))
def test_contrast_equals_its_definition(problem: Problem, temperature: float, min_cells: int) -> None:
    features = problem.features.requires_grad_()
    arguments = (features, problem.cells, problem.centroids, problem.seen)
    knobs = {"temperature": temperature, "min_cells": min_cells}
    assert_same(centroid_contrast(*arguments, **knobs), literal.centroid_contrast(*arguments, **knobs), features)


@fast
@given(problem=problems, momentum=st.sampled_from([0.0, 0.9, 1.0]))
def test_centroids_equal_the_literal_update(problem: Problem, momentum: float) -> None:
    state = ClassCentroids(*problem.centroids.shape)
    state.centroids.copy_(problem.centroids)
    state.seen.copy_(problem.seen)
    state.update(problem.features, problem.cells, momentum=momentum)
    centroids, seen = literal.update_centroids(
        problem.features, problem.cells, problem.centroids, problem.seen, momentum=momentum
    )
    torch.testing.assert_close(state.centroids, centroids, rtol=1e-12, atol=1e-12)
    assert torch.equal(state.seen, seen)


def random_probabilities(images: int, classes: int, grid: tuple[int, int], scale: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(images, classes, *grid, generator=generator, dtype=torch.float64)
    return logits.softmax(dim=1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    images=st.integers(1, 3),
    classes=st.integers(1, 6),
    grid=st.tuples(side, side),
    extra=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    scale=st.sampled_from([0.0, 0.3, 3.0, 100.0]),
    momentum=st.sampled_from([0.0, 0.6, 0.9]),
    share=st.sampled_from([0.0, 0.29, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_ensemble_thresholds_and_labels_equal_their_definitions(
    tmp_path_factory: pytest.TempPathFactory,
    images: int,
    classes: int,
    grid: tuple[int, int],
    extra: tuple[int, int],
    scale: float,
    momentum: float,
    share: float,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("ensemble")
    ids = [f"city/{image}" for image in range(images)]
    expected: list[Tensor | None] = [None] * images
    previous = None
    for number in range(2):
        probabilities = random_probabilities(images, classes, grid, scale, seed + number)
        ensemble = PredictionEnsemble(folder / str(number), previous=previous, momentum=momentum)
        stored = ensemble.update(ids, probabilities)
        ensemble.finish(images)
        previous = ensemble.folder
        before = expected if momentum > 0 else [None] * images
        expected = [
            literal.average_predictions(probability, levels, momentum)
            for probability, levels in zip(probabilities, before, strict=True)
        ]
        # Both round the same real number; where it lies on a boundary, they may differ by one.
        wrong = (stored.int() - torch.stack(expected).int()).abs()  # type: ignore[arg-type]
        assert wrong.max() <= 1
        assert (wrong > 0).float().mean() < 0.02
        expected = list(stored)

    confidences = EnsembleConfidence(classes, torch.device("cpu"))
    for levels in stored:
        confidences.update(levels.unsqueeze(0))
    thresholds = confidences.share_thresholds(share=share, cap=0.9)
    assert thresholds.tolist() == literal.thresholds(list(stored), share=share, cap=0.9)
    assert confidences.mean().item() == pytest.approx(literal.decode(stored).amax(dim=1).mean().item())
    size = (grid[0] + extra[0], grid[1] + extra[1])
    labels = keep_confident(*confidence_at(decode_ensemble(stored, torch.float64), size), thresholds)
    for levels, label in zip(stored, labels, strict=True):
        assert torch.equal(label, literal.label(levels, thresholds.tolist(), size))


# The contrast and the centroids.


def test_a_batch_without_labels_costs_nothing_and_leaves_the_centroids_alone() -> None:
    problem = make_problem(2, 4, 3, (3, 3), labelled=0.0, seed=0)
    features = problem.features.requires_grad_()
    assert_zero(centroid_contrast(features, problem.cells, problem.centroids, problem.seen), features)
    state = ClassCentroids(3, 4)
    state.update(features, problem.cells)
    assert not state.seen.any()
    assert not state.centroids.any()


@pytest.mark.parametrize(("separation", "offset"), [(1.0, 0.0), (300.0, 0.0), (1e4, 1e3), (0.1, 1e3)])
def test_float32_keeps_its_digits_near_zero_loss_and_far_from_the_origin(separation: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    means = separation * torch.randn(5, 40, generator=generator) + offset
    cells = torch.randint(0, 5, (2, 12, 15), generator=generator)
    features = means[cells] + torch.randn(2, 12, 15, 40, generator=generator)
    features = features.movedim(3, 1).contiguous().requires_grad_()
    wide = features.detach().double().requires_grad_()
    state = ClassCentroids(5, 40)
    state.update(wide, cells)
    losses = [centroid_contrast(maps, cells, state.centroids, state.seen) for maps in (features, wide)]
    value, expected = (loss.detach().double() for loss in losses)
    torch.testing.assert_close(value, expected, rtol=2e-6, atol=0)
    (gradient,), (expected,) = (torch.autograd.grad(*pair) for pair in zip(losses, (features, wide), strict=True))
    assert (gradient - expected).abs().max() <= 3e-5 * expected.abs().max()


def test_centroids_that_were_saved_in_float32_are_taken_up_and_small_moves_add_up() -> None:
    saved = {"centroids": torch.ones(1, 1), "seen": torch.tensor([True])}
    state = ClassCentroids(1, 1)
    state.load_state_dict(saved)
    for _ in range(100):  # each moves the centroid by less than half the distance to the next float32
        state.update(torch.full((1, 1, 1, 1), 1 + 2.0**-13), torch.zeros(1, 1, 1, dtype=torch.int64), momentum=0.9999)
    assert state.centroids.item() == pytest.approx(1 + 2.0**-13 * (1 - 0.9999**100), abs=1e-10)


def test_classes_without_a_centroid_are_left_out_of_the_sum() -> None:
    problem = make_problem(2, 4, 3, (4, 4), labelled=1.0, seen=1.0, seed=1)
    features = problem.features.requires_grad_()
    cells = problem.cells.masked_fill(problem.cells == 1, IGNORE_INDEX)
    unseen = torch.tensor([True, False, True])
    with_unseen = centroid_contrast(features, cells, problem.centroids, unseen)
    renamed = torch.where(cells == 2, 1, cells)
    assert_same(with_unseen, centroid_contrast(features, renamed, problem.centroids[[0, 2]], unseen[[0, 2]]), features)
    nothing_seen = centroid_contrast(features, cells, problem.centroids, torch.zeros(3, dtype=torch.bool))
    assert_zero(nothing_seen, features)


def test_a_class_counts_the_same_however_many_cells_it_has() -> None:
    features = torch.randn(1, 5, 1, 10, dtype=torch.float64)
    features[..., 2:] = features[..., 1:2]
    centroids, seen = torch.randn(2, 5, dtype=torch.float64), torch.ones(2, dtype=torch.bool)
    labels = torch.tensor([0] + 9 * [1]).view(1, 1, 10)
    torch.testing.assert_close(
        centroid_contrast(features, labels, centroids, seen),
        centroid_contrast(features[..., :2], labels[..., :2], centroids, seen),
    )


def test_a_zero_mean_feature_has_no_gradient() -> None:
    features = torch.randn(1, 4, 1, 2)
    features[..., 0] = 0
    features.requires_grad_()
    labels = torch.tensor([[[0, 1]]])
    loss = centroid_contrast(features, labels, torch.randn(3, 4), torch.ones(3, dtype=torch.bool))
    loss.backward()
    assert loss.isfinite()
    assert features.grad is not None
    assert torch.equal(features.grad[..., 0], torch.zeros(1, 4, 1))
    assert features.grad[..., 1].abs().max() > 0


def test_centroids_receive_no_gradient() -> None:
    problem = make_problem(1, 4, 3, (3, 3), labelled=1.0, seen=1.0, seed=2)
    centroids = problem.centroids.requires_grad_()
    loss = centroid_contrast(problem.features.requires_grad_(), problem.cells, centroids, problem.seen)
    assert torch.autograd.grad(loss, centroids, allow_unused=True) == (None,)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_contrast_works_on_any_memory_layout(layout: str) -> None:
    problem = make_problem(2, 300, 4, (6, 7), labelled=0.6, seed=3)
    features = {
        "contiguous": problem.features,
        "channels_last": problem.features.contiguous(memory_format=torch.channels_last),
        "transposed": problem.features.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout].requires_grad_()
    arguments = (features, problem.cells, problem.centroids, problem.seen)
    assert_same(centroid_contrast(*arguments), literal.centroid_contrast(*arguments), features)
    centroid_contrast(*arguments).backward()
    assert features.grad is not None
    if layout != "transposed":
        assert features.grad.stride() == features.stride()


def test_gradients_match_finite_differences() -> None:
    problem = make_problem(2, 3, 4, (2, 3), labelled=0.8, seen=1.0, seed=4)
    assert torch.autograd.gradcheck(
        lambda x: centroid_contrast(x, problem.cells, problem.centroids, problem.seen, temperature=0.5),
        problem.features.requires_grad_(),
    )


def test_half_precision_features_and_autocast_compute_in_float32() -> None:
    problem = make_problem(1, 600, 5, (6, 6), labelled=0.8, seen=1.0, seed=5)
    centroids = problem.centroids.float()
    half = problem.features.bfloat16().requires_grad_()
    wide = half.detach().float().requires_grad_()
    expected = centroid_contrast(wide, problem.cells, centroids, problem.seen)
    expected.backward()
    inside, outside = ClassCentroids(5, 600), ClassCentroids(5, 600)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = centroid_contrast(half, problem.cells, centroids, problem.seen)
        inside.update(half, problem.cells)
    actual.backward()
    outside.update(wide, problem.cells)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert half.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(half.grad, wide.grad.bfloat16(), rtol=1e-2, atol=1e-7)
    torch.testing.assert_close(inside.centroids, outside.centroids, rtol=1e-6, atol=1e-7)


def test_filling_equals_the_mean_of_all_cells_whatever_the_batches() -> None:
    problem = make_problem(5, 3, 4, (5, 6), labelled=0.7, seed=6)
    parts = ((0, 1), (1, 4), (4, 5)), ((0, 5),)
    states = [ClassCentroids(4, 3) for _ in parts]
    for state, cuts in zip(states, parts, strict=True):
        state.fill((problem.features[start:end], problem.cells[start:end]) for start, end in cuts)
    torch.testing.assert_close(states[0].centroids, states[1].centroids)
    rows, labels = problem.features.movedim(1, -1).reshape(-1, 3), problem.cells.flatten()
    for index in range(4):
        assert states[0].seen[index] == (labels == index).any()
        if states[0].seen[index]:
            torch.testing.assert_close(states[0].centroids[index], rows[labels == index].mean(dim=0))


def test_contrast_names_what_is_wrong() -> None:
    features, labels = torch.ones(1, 4, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 2\) \(B, D, h, w\) and \(3, 5\) \(C, D\)"):
        centroid_contrast(features, labels, torch.ones(3, 5), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="`temperature` must be positive, but got 0"):
        centroid_contrast(features, labels, torch.ones(3, 4), torch.ones(3, dtype=torch.bool), temperature=0)


# The ensemble on disk, thresholds, the teacher.


def run_round(folder: Path, previous: Path | None, seed: int) -> None:
    ensemble = PredictionEnsemble(folder, previous=previous, momentum=0.6)
    ensemble.begin()
    for start in (0, 2):
        ids = [f"city/{number}" for number in range(start, start + 2)]
        ensemble.update(ids, random_probabilities(2, 4, (3, 5), 2.0, seed + start))
    ensemble.finish(4)


def contents(folder: Path) -> dict[str, bytes]:
    """Return what a reader may look at; names that start with a dot are leftovers of a kill."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_round_that_was_killed_anywhere_gives_the_same_bytes_when_prepared_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_round(tmp_path / "first", None, seed=0)
    run_round(tmp_path / "whole", tmp_path / "first", seed=10)
    first, whole = contents(tmp_path / "first"), contents(tmp_path / "whole")
    replace_file = Path.replace
    for writes in range(5):
        remaining = itertools.count(writes, -1)

        def interrupted(path: Path, target: Path, remaining: Iterator[int] = remaining) -> Path:
            if next(remaining) == 0:
                raise KeyboardInterrupt
            return replace_file(path, target)

        folder = tmp_path / f"killed_{writes}"
        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run_round(folder, tmp_path / "first", seed=10)
        left = contents(folder)
        assert len(left) == writes
        assert left.items() <= whole.items()  # no half-written file
        with pytest.raises(ValueError, match="must be finished"):
            PredictionEnsemble(tmp_path / "next", previous=folder)
        run_round(folder, tmp_path / "first", seed=10)
        assert contents(folder) == whole
        run_round(folder, tmp_path / "first", seed=10)
        assert contents(folder) == whole
        assert contents(tmp_path / "first") == first


def test_a_round_begun_again_is_unfinished_until_its_end(tmp_path: Path) -> None:
    run_round(tmp_path, None, seed=0)
    assert (tmp_path / COMPLETE).is_file()
    PredictionEnsemble(tmp_path).begin()
    assert not (tmp_path / COMPLETE).exists()


def test_the_ensemble_refuses_what_it_cannot_average(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lower the learning rate"):
        PredictionEnsemble(tmp_path).update(["0"], torch.full((1, 2, 1, 1), math.nan))
    run_round(tmp_path / "first", None, seed=0)
    with pytest.raises(ValueError, match=r"\(1, 4, 5, 5\) after \(1, 4, 3, 5\)"):
        PredictionEnsemble(tmp_path / "next", previous=tmp_path / "first").update(
            ["city/0"], random_probabilities(1, 4, (5, 5), 1.0, 0)
        )


def test_what_is_stored_takes_one_byte_per_class_and_cell_and_loses_little(tmp_path: Path) -> None:
    probabilities = random_probabilities(1, 19, (65, 129), 3.0, 0)
    stored = PredictionEnsemble(tmp_path).update(["0"], probabilities)
    assert (tmp_path / "0.npy").stat().st_size == 19 * 65 * 129 + 128  # and a header
    assert (decode_ensemble(stored) - probabilities).abs().max() < 0.02
    assert torch.equal(encode_ensemble(decode_ensemble(stored)[:, :0]), stored[:, :0])


def test_the_cell_that_sets_a_threshold_gets_its_label() -> None:
    stored = encode_ensemble(random_probabilities(2, 5, (4, 4), 1.0, 0))
    confidences = EnsembleConfidence(5, torch.device("cpu"))
    confidences.update(stored)
    thresholds = confidences.share_thresholds(share=0.5, cap=1.0)
    for dtype in DTYPES:
        confidence, prediction = decode_ensemble(stored, dtype).max(dim=1)
        labels = keep_confident(confidence, prediction, thresholds)
        for index in prediction.unique().tolist():
            kept, predicted = (labels == index).sum().item(), (prediction == index).sum().item()
            assert kept >= max(1, predicted // 2)


def test_a_class_never_predicted_has_the_cap_for_threshold() -> None:
    counts = torch.tensor([[0, 0, 0], [1, 2, 1]])
    values = torch.tensor([0.2, 0.6, 0.4])
    for rows in (counts, counts.double()):
        assert share_thresholds(rows, values, share=0.5, cap=0.9).tolist() == [0.9, pytest.approx(0.6)]
        assert share_thresholds(rows, values, share=1.0, cap=0.9).tolist() == [0.9, pytest.approx(0.2)]
        assert share_thresholds(rows, values, share=0.0, cap=0.5).tolist() == [0.5, 0.5]


def test_running_thresholds_follow_the_recent_batches() -> None:
    running = RunningConfidence(3)
    assert running.share_thresholds().tolist() == [0.9, 0.9, 0.9]
    assert running.sqrt_mean_thresholds().tolist() == pytest.approx(3 * [math.sqrt(0.9)])
    confidence = torch.linspace(0.4, 0.8, 101).view(1, 1, -1)
    for _ in range(60):
        running.update(confidence, torch.zeros(1, 1, 101, dtype=torch.int64))
    thresholds = running.share_thresholds(share=0.5)
    assert thresholds.tolist() == pytest.approx([0.6, 0.9, 0.9], abs=5e-3)
    assert running.sqrt_mean_thresholds()[0].item() == pytest.approx(math.sqrt(0.6), abs=1e-2)
    for _ in range(1000):
        running.update(torch.full((1, 1, 1), 0.5), torch.ones(1, 1, 1, dtype=torch.int64))
    assert running.share_thresholds(share=0.5)[0] == thresholds[0]  # class 0 stayed away
    running.reset()
    assert running.share_thresholds().tolist() == [0.9, 0.9, 0.9]
    assert running.mean.item() == 0.9


def test_the_teacher_follows_slowly_and_never_trains() -> None:
    student = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    teacher = MeanTeacher(student).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = teacher.network[0].weight.clone()
    with torch.no_grad():
        student[0].weight.add_(1.0)
    student(torch.randn(2, 3, 4, 4))
    teacher.follow(student, momentum=0.9)
    torch.testing.assert_close(teacher.network[0].weight, before + 0.1)
    assert torch.equal(teacher.network[1].running_mean, student[1].running_mean)
    assert not teacher(torch.randn(1, 3, 2, 2)).requires_grad
    teacher.start_from(student)
    assert torch.equal(teacher.network[0].weight, student[0].weight)


# Two workers. Each holds a part of the joined batch; data parallelism averages what they compute.

PARTS = (slice(0, 1), slice(1, 3))
CASES = ("uneven counts", "one worker without labels", "no labels")


def joined_batch(case: str) -> Problem:
    problem = make_problem(3, 6, 4, (4, 5), labelled=0.7, seen=0.6, seed=7)
    problem.labels[2, 1:] = IGNORE_INDEX
    if case == "one worker without labels":
        problem.labels[PARTS[0]] = IGNORE_INDEX
    if case == "no labels":
        problem.labels[:] = IGNORE_INDEX
    return problem


def what_a_worker_computes(case: str, part: slice) -> dict[str, Tensor]:
    problem = joined_batch(case)
    features = problem.features[part].clone().requires_grad_()
    cells = problem.cells[part]
    state, filled = (ClassCentroids(4, 6) for _ in range(2))
    state.centroids.copy_(problem.centroids)
    state.seen.copy_(problem.seen)
    state.update(features, cells, momentum=0.9)
    filled.fill(zip(features.split(1), cells.split(1), strict=True))  # unequally many batches
    loss = centroid_contrast(features, cells, state.centroids, state.seen, temperature=0.3)
    confidence, prediction = random_probabilities(3, 4, (4, 5), 2.0, 0)[part].max(dim=1)
    running = RunningConfidence(4)
    running.update(confidence, prediction)
    counted = EnsembleConfidence(4, torch.device("cpu"))
    counted.update(encode_ensemble(random_probabilities(3, 4, (4, 5), 2.0, 0)[part]))
    counted.reduce()
    return {
        **state.state_dict(),
        **{f"filled {name}": value for name, value in filled.state_dict().items()},
        **running.state_dict(),
        "counts": counted.counts,
        "value": loss.detach(),
        "gradient": torch.autograd.grad(loss, features)[0],
    }


def run_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results = {case: what_a_worker_computes(case, PARTS[rank]) for case in CASES}
    for value in results[CASES[0]].values():  # every buffer can be broadcast, as the trainer does
        dist.broadcast(value.clone(), 0)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_equal_one_on_the_joined_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_worker, args=(str(tmp_path),), nprocs=2)
    workers = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case in CASES:
        for name, expected in what_a_worker_computes(case, slice(None)).items():
            first, second = (worker[case][name] for worker in workers)
            if name == "value":
                actual = (first + second) / 2
            elif name == "gradient":
                actual = torch.cat([first, second]) / 2
            else:
                assert torch.equal(first, second), f"{case}: the workers disagree about {name}"
                actual = first
            torch.testing.assert_close(
                actual, expected, rtol=1e-10, atol=1e-12, msg=lambda text, at=f"{case}, {name}": f"{at}: {text}"
            )


# The method.

VARIANTS: dict[str, dict[str, Any]] = {
    "predictions": {},
    "weights": {"ensemble": "weights", "teacher_momentum": 0.9},
    "projection": {"projection": 8, "threshold": "sqrt_mean", "ensemble_momentum": 0.0},
    "weights by mean": {"ensemble": "weights", "threshold": "sqrt_mean", "source_share": 0.0},
}


def clst_trainer(folder: Path, **values: Any) -> tuple[Trainer, Reports]:
    config = toy_config("self_training")
    data, evaluation = load_data(config.data)
    torch.manual_seed(config.seed)
    segmenter = build_segmenter(num_classes=len(data.classes), **vars(config.network))
    method = CLST(segmenter, CLST.Config(**({"rounds": 2} | values)), config.warmup)
    reports = Reports(folder / "checkpoints")
    trainer = Trainer(
        method,
        CLST.plan(method.config),
        data,
        evaluation,
        TrainerSettings(config.trainer, config.optimizer, config.augmentation, config.seed),
        reports,
        folder / "artifacts",
    )
    return trainer, reports


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_has_finite_terms_and_resumes_exactly(variant: str, tmp_path: Path) -> None:
    trainer, reports = clst_trainer(tmp_path / "whole", **VARIANTS[variant])
    before = {name: value.clone() for name, value in trainer.method.state_dict().items()}
    trainer.run()
    last = reports.metrics[-1]
    names = {"cross_entropy", "target_cross_entropy", "contrast_target", "contrast_source", "total"}
    if "source_share" in VARIANTS[variant]:
        names.remove("contrast_source")
    assert {key.removeprefix("loss/") for key in last if key.startswith("loss/")} == names
    assert all(math.isfinite(last[f"loss/{name}"]) for name in names)
    after = trainer.method.state_dict()
    assert not [name for name in trainer.trainable if torch.equal(after[name], before[name])]

    middle = next(index for index, metrics in enumerate(reports.metrics) if metrics["stage"] == CENTROIDS.name)
    again, resumed = clst_trainer(tmp_path / "again", **VARIANTS[variant])
    again.folder = trainer.folder
    artifacts = contents(trainer.folder)
    again.run(reports.checkpoint(middle))
    assert contents(trainer.folder) == artifacts  # the rounds were prepared again
    assert resumed.metrics[-1]["loss/total"] == last["loss/total"]
    ends = (load_state(r.checkpoint(len(r.metrics) - 1))["state"] for r in (reports, resumed))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_a_round_averages_with_the_one_before_and_labels_from_what_it_stored(tmp_path: Path) -> None:
    trainer, _ = clst_trainer(tmp_path)
    trainer.run()
    plan = trainer.plan
    assert [stage.name for stage in plan] == ["source_only", "centroids", "round_1", "round_2"]
    ids = trainer.data.target.ids
    ensembles = [PredictionEnsemble(trainer.folder / f"round_{number}" / ENSEMBLE) for number in (1, 2)]
    stored = [torch.stack([ensemble.read(image_id) for image_id in ids]) for ensemble in ensembles]
    classes = len(trainer.data.classes)
    for number, levels in enumerate(stored, start=1):
        labels = PseudoLabelFolder(trainer.folder / f"round_{number}", ids)
        limits = literal.thresholds(list(levels), share=0.5, cap=0.9)
        assert labels.provenance["thresholds"] == limits
        assert len(labels.provenance["kept_share"]) == classes
        assert torch.equal(labels.read(ids[0]).long(), literal.label(levels[0], limits, (32, 64)))

    method = trainer.method
    method.eval()
    trainer.folder = tmp_path / "other"
    run_again = [replace(stage, share=0.0) for stage in plan if isinstance(stage, Round)]
    with torch.no_grad():
        for stage in run_again:
            method.prepare_stage(stage, trainer.stage_data(stage))
    first, second = (
        torch.stack([PredictionEnsemble(trainer.folder / stage.name / ENSEMBLE).read(i) for i in ids])
        for stage in run_again
    )
    # The same network twice: the average stays, but for rounding.
    assert (first.int() - second.int()).abs().max() <= 1


def test_centroids_come_from_the_first_source_images_in_their_order(tmp_path: Path) -> None:
    trainer, _ = clst_trainer(tmp_path, centroid_images=3)
    method = trainer.method.eval()
    with torch.no_grad():
        method.prepare_stage(CENTROIDS, trainer.stage_data(CENTROIDS))
        images = method.segmenter.normalise(torch.stack([trainer.data.source.image(index) for index in range(3)]))
        features = method.segmenter(images).features
        labels = torch.stack([trainer.data.source.label(index) for index in range(3)]).long()
    expected = ClassCentroids(method.segmenter.num_classes, method.segmenter.feature_channels)
    expected.fill([(features, labels_at_features(labels, (features.shape[-2], features.shape[-1])))])
    torch.testing.assert_close(method.source_centroids.state_dict(), expected.state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_without_any_label_or_confident_pixel_is_finite_and_has_zero_terms(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = clst_trainer(tmp_path, **VARIANTS[variant])
    trainer.run()
    stage = trainer.plan[-1]
    batch = next(trainer.batches(stage))
    batch = replace(batch, source_labels=torch.full_like(batch.source_labels, IGNORE_INDEX))
    if batch.target_pseudo_labels is not None:
        batch = replace(batch, target_pseudo_labels=torch.full_like(batch.target_pseudo_labels, IGNORE_INDEX))
    else:
        impossible = torch.full((len(trainer.data.classes),), 2.0)
        monkeypatch.setattr(trainer.method, "_thresholds", lambda _: impossible)
    terms = trainer.method(batch, 0)
    assert all(term == 0 for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in trainer.method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


@pytest.mark.parametrize("off", [{"contrast_weight": 0.0}, {"target_weight": 0.0}, {"source_share": 0.0}])
def test_a_weight_of_zero_leaves_its_term_out(off: dict[str, float], tmp_path: Path) -> None:
    trainer, reports = clst_trainer(tmp_path, rounds=1, projection=8, **off)
    trainer.run()
    gone = {
        "contrast_weight": {"contrast_target", "contrast_source"},
        "target_weight": {"target_cross_entropy"},
        "source_share": {"contrast_source"},
    }[next(iter(off))]
    assert not {f"loss/{name}" for name in gone} & set(reports.metrics[-1])
    unused = [name for name, parameter in trainer.method.named_parameters() if parameter.grad is not None]
    assert not unused  # zero_grad cleared all; a projection without a term does not exist
    assert (trainer.method.projection is None) == ("contrast_weight" in off)


def test_the_deployed_network_is_the_segmenter_alone(tmp_path: Path) -> None:
    trainer, _ = clst_trainer(tmp_path, projection=8, ensemble="weights")
    method = trainer.method
    assert method.deployed is method.segmenter
    groups = [id(parameter) for group in method.parameter_groups() for parameter in group.parameters]
    assert len(groups) == len(set(groups))
    trained = {id(p) for name, p in method.named_parameters() if name in trainer.trainable}
    assert trained == set(groups)
    assert not any(name.startswith("teacher") for name in trainer.trainable)


def test_the_plan_follows_the_kind_of_ensemble() -> None:
    rounds = CLST.plan(CLST.Config(rounds=3))
    assert rounds[:2] == (SOURCE_ONLY, CENTROIDS)
    assert sum(stage.share for stage in rounds[1:]) == pytest.approx(1)
    assert all(stage.pseudo_labels for stage in rounds[2:])
    assert [stage.name for stage in CLST.plan(CLST.Config(ensemble="weights"))] == ["source_only", "centroids", "adapt"]


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 0}, {"ensemble_momentum": 0.95}, {"rounds": 0}, {"min_cells": 0}, {"kept_share": 1.5}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(wrong))} must"):
        CLST.Config(**wrong)
