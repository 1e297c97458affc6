"""Promises of the supervised losses, the distribution contrast, the class statistics and the labels they use.

The references are the literal forms in `benchmarks/literal/sdca.py`.
"""

import importlib.util
import math
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from simulated_device import SimulatedDevice
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.labelling.features import confident_labels, labels_at_features
from segadapt.trainables.core.losses.distribution_contrast import distribution_contrast
from segadapt.trainables.core.losses.segmentation import (
    lovasz_softmax,
    segmentation_cross_entropy,
    weighted_cross_entropy,
)
from segadapt.trainables.core.state.class_statistics import ClassStatistics


def load_literal() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "literal" / "sdca.py"
    spec = importlib.util.spec_from_file_location("literal_sdca", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


literal = load_literal()
fast = settings(max_examples=60, deadline=None, derandomize=True)


class Problem(NamedTuple):
    """Pixels of one batch and class distributions; some classes are absent and some never seen."""

    features: Tensor  # (B, D, h, w) float64
    logits: Tensor  # (B, C, h, w) float64
    labels: Tensor  # (B, h, w)
    mean: Tensor  # (C, D)
    variance: Tensor  # (C, D)

    @property
    def all_ignored(self) -> bool:
        return bool((self.labels == IGNORE_INDEX).all())


def make_problem(
    batch: int, channels: int, classes: int, size: tuple[int, int], *, labelled: float, seed: int
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    occurring = torch.randint(0, classes, (classes,), generator=generator)  # drawn with repetition: some are absent
    labels = occurring[torch.randint(0, classes, (batch, *size), generator=generator)]
    labels[uniform(batch, *size) >= labelled] = IGNORE_INDEX
    seen = uniform(classes, 1) < 0.8
    return Problem(
        features=normal(batch, channels, *size) + 0.5,
        logits=3 * normal(batch, classes, *size),
        labels=labels,
        mean=normal(classes, channels) * seen,
        variance=uniform(classes, channels) * seen,
    )


side = st.integers(1, 5)
problems = st.builds(
    make_problem,
    batch=st.integers(1, 3),
    channels=st.integers(1, 7),
    classes=st.integers(1, 5),
    size=st.tuples(side, side),
    labelled=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 2**31),
)


def value_and_gradient(loss: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss, wanted)[0]


def assert_zero(loss: Tensor, wanted: Tensor) -> None:
    value, gradient = value_and_gradient(loss, wanted)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(wanted))


def assert_same(actual: Tensor, expected: Tensor, wanted: Tensor) -> None:
    for ours, theirs in zip(value_and_gradient(actual, wanted), value_and_gradient(expected, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@fast
@given(problem=problems)
def test_cross_entropy_equals_its_definition(problem: Problem) -> None:
    logits = problem.logits.requires_grad_()
    loss = segmentation_cross_entropy(logits, problem.labels)
    if problem.all_ignored:
        assert_zero(loss, logits)
    else:
        assert_same(loss, literal.segmentation_cross_entropy(logits, problem.labels), logits)


def test_cross_entropy_by_kernels_that_repeat_is_the_same() -> None:
    logits = torch.randn(2, 5, 6, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (2, 6, 7))
    labels[0, :3] = IGNORE_INDEX
    weights = torch.rand(2, 6, 7, dtype=torch.float64)
    losses = [segmentation_cross_entropy(logits, labels), weighted_cross_entropy(logits, labels, weights)]
    expected = [*losses, *(torch.autograd.grad(loss, logits)[0] for loss in losses)]
    device = SimulatedDevice()
    device.put(logits, labels, weights)
    torch.use_deterministic_algorithms(True)
    try:
        with device:
            losses = [segmentation_cross_entropy(logits, labels), weighted_cross_entropy(logits, labels, weights)]
            found = [*losses, *(torch.autograd.grad(loss, logits)[0] for loss in losses)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert not device.unrepeatable
    torch.testing.assert_close(found, expected)


@fast
@given(problem=problems)
def test_lovasz_equals_its_definition(problem: Problem) -> None:
    logits = problem.logits.requires_grad_()
    loss = lovasz_softmax(logits, problem.labels)
    if problem.all_ignored:
        assert_zero(loss, logits)
    else:
        assert_same(loss, literal.lovasz_softmax(logits, problem.labels), logits)


@fast
@given(
    problem=problems,
    temperature=st.sampled_from([0.05, 0.5, 2.0, 100.0]),
    covariance_factor=st.sampled_from([0.0, 1.0, 20.0]),
)
def test_distribution_contrast_equals_its_definition(
    problem: Problem, temperature: float, covariance_factor: float
) -> None:
    features = problem.features.requires_grad_()
    arguments = (features, problem.labels, problem.mean, problem.variance)
    knobs = {"temperature": temperature, "covariance_factor": covariance_factor}
    loss = distribution_contrast(*arguments, **knobs)
    if problem.all_ignored:
        assert_zero(loss, features)
    else:
        assert_same(loss, literal.distribution_contrast(*arguments, **knobs), features)


@fast
@given(problem=problems, earlier=st.integers(0, 50))
def test_class_statistics_equal_the_literal_merge(problem: Problem, earlier: int) -> None:
    classes, channels = problem.mean.shape
    statistics = ClassStatistics(classes, channels)
    statistics.count.fill_(earlier)
    statistics.mean.copy_(problem.mean)
    statistics.variance.copy_(problem.variance)

    statistics.update(problem.features, problem.labels)

    count, mean, variance = literal.merge_statistics(
        problem.features, problem.labels, torch.full((classes,), float(earlier)), problem.mean, problem.variance
    )
    torch.testing.assert_close(statistics.count.double(), count.double())
    torch.testing.assert_close(statistics.mean, mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(statistics.variance, variance, rtol=1e-10, atol=1e-12)
    if problem.all_ignored:
        assert torch.equal(statistics.mean, problem.mean)
        assert torch.equal(statistics.variance, problem.variance)


def test_merging_batches_equals_the_moments_of_all_pixels() -> None:
    batches = [make_problem(2, 3, 4, (5, 6), labelled=0.7, seed=seed) for seed in range(4)]
    statistics = ClassStatistics(4, 3)
    for batch in batches:
        statistics.update(batch.features, batch.labels)
    pixels = torch.cat([batch.features.movedim(1, -1).reshape(-1, 3) for batch in batches])
    labels = torch.cat([batch.labels.flatten() for batch in batches])
    for index in range(4):
        own = pixels[labels == index]
        assert statistics.count[index] == len(own)
        torch.testing.assert_close(statistics.mean[index], own.mean(dim=0))
        torch.testing.assert_close(statistics.variance[index], own.var(dim=0, correction=0))


class FarApart(NamedTuple):
    """Pixels of deviation 1 about class means that lie far from zero and from each other."""

    features: Tensor  # (2, D, 4, 5) float32
    labels: Tensor  # (2, 4, 5); the last class has a single pixel, the next one equal pixels
    classes: int


def make_far_apart(channels: int, classes: int, *, separation: float, offset: float, seed: int) -> FarApart:
    generator = torch.Generator().manual_seed(seed)
    means = separation * torch.randn(classes, channels, generator=generator) + offset
    labels = torch.randint(0, classes - 1, (2, 4, 5), generator=generator)
    labels[1, 3, 4] = classes - 1
    deviations = torch.randn(2, 4, 5, channels, generator=generator) * (labels < classes - 2).unsqueeze(3)
    return FarApart((means[labels] + deviations).movedim(3, 1).contiguous(), labels, classes)


@fast
@given(
    problem=st.builds(
        make_far_apart,
        channels=st.integers(4, 20),
        classes=st.integers(3, 6),
        separation=st.sampled_from([0.1, 1.0, 30.0, 300.0, 1e4]),
        offset=st.sampled_from([0.0, -30.0, 1e3]),
        seed=st.integers(0, 2**31),
    ),
    temperature=st.sampled_from([0.3, 2.0, 100.0]),
)
@example(problem=make_far_apart(8, 4, separation=1.0, offset=0.0, seed=0), temperature=0.3)
@example(problem=make_far_apart(8, 4, separation=300.0, offset=0.0, seed=0), temperature=0.3)
@example(problem=make_far_apart(8, 4, separation=0.1, offset=1e3, seed=0), temperature=100.0)
def test_float32_keeps_its_digits_however_far_apart_classes_are(problem: FarApart, temperature: float) -> None:
    features = problem.features.requires_grad_()
    channels = features.shape[1]
    statistics = ClassStatistics(problem.classes, channels)
    exact = (torch.zeros(problem.classes, dtype=torch.float64), *torch.zeros(2, problem.classes, channels).double())
    for shift in (0.0, 3.0):  # two batches: the class of one pixel gets a variance by the second
        statistics.update(features + shift, problem.labels)
        exact = literal.merge_statistics((features + shift).double(), problem.labels, *exact)
        torch.testing.assert_close(statistics.mean, exact[1], rtol=2e-7, atol=2e-6)
        torch.testing.assert_close(statistics.variance, exact[2], rtol=1e-5, atol=0)

        loss = distribution_contrast(
            features, problem.labels, statistics.mean, statistics.variance, temperature=temperature
        )
        wide = features.detach().double().requires_grad_()
        expected = literal.distribution_contrast(wide, problem.labels, *exact[1:], temperature=temperature)
        value, gradient = value_and_gradient(loss, features)
        expected_value, expected_gradient = value_and_gradient(expected, wide)
        torch.testing.assert_close(value.double(), expected_value, rtol=1e-6, atol=1e-7)
        assert (gradient - expected_gradient).abs().max() <= 3e-5 * expected_gradient.abs().max()


def test_equal_pixels_have_no_variance() -> None:
    color = torch.tensor([0.1, -7.3, 1e4]).view(1, 3, 1, 1)
    statistics = ClassStatistics(2, 3)
    for images in (1, 3):
        labels = torch.zeros(images, 9, 11, dtype=torch.int64)
        labels[0, 4, 4] = 1
        statistics.update(color.expand(images, 3, 9, 11), labels)
    assert statistics.count.tolist() == [99 - 1 + 3 * 99 - 1, 2]
    torch.testing.assert_close(statistics.mean[1], color.flatten().double())
    assert torch.equal(statistics.variance, torch.zeros(2, 3, dtype=torch.float64))


def test_the_mean_keeps_moving_after_a_million_pixels() -> None:
    statistics = ClassStatistics(1, 1)
    statistics.count.fill_(10**6)
    statistics.mean.fill_(1.0)
    for _ in range(300):  # each moves the mean by less than half the distance to the next float32
        statistics.update(torch.full((1, 1, 1, 1), 1.05), torch.zeros(1, 1, 1, dtype=torch.int64))
    assert statistics.mean.item() == pytest.approx(1 + 0.05 * 300 / (10**6 + 300), abs=1e-9)


def test_statistics_that_were_saved_in_float32_are_taken_up() -> None:
    saved = {"count": torch.tensor([3, 0]), "mean": torch.randn(2, 4), "variance": torch.rand(2, 4)}
    statistics = ClassStatistics(2, 4)
    statistics.load_state_dict(saved)
    for name, value in statistics.state_dict().items():
        assert torch.equal(value, saved[name].to(value.dtype)), name


def test_counts_keep_growing_past_the_integers_of_float32() -> None:
    statistics = ClassStatistics(1, 1)
    statistics.count.fill_(2**30)
    statistics.update(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64))
    assert statistics.count.item() == 2**30 + 1


def test_statistics_are_bit_equal_when_repeated() -> None:
    problem = make_problem(2, 300, 5, (9, 9), labelled=0.8, seed=1)
    first, second = ClassStatistics(5, 300), ClassStatistics(5, 300)
    for statistics in (first, second):
        statistics.update(problem.features.float(), problem.labels)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_contrast_works_in_channel_blocks_on_any_memory_layout(layout: str) -> None:
    problem = make_problem(2, 600, 4, (6, 7), labelled=0.6, seed=2)
    features = {
        "contiguous": problem.features,
        "channels_last": problem.features.contiguous(memory_format=torch.channels_last),
        "transposed": problem.features.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout].requires_grad_()
    arguments = (features, problem.labels, problem.mean, problem.variance)
    assert_same(
        distribution_contrast(*arguments, temperature=0.5),
        literal.distribution_contrast(*arguments, temperature=0.5),
        features,
    )
    statistics = ClassStatistics(4, 600)
    statistics.update(features, problem.labels)
    _, mean, _ = literal.merge_statistics(features, problem.labels, torch.zeros(4), problem.mean, problem.variance)
    torch.testing.assert_close(statistics.mean[statistics.count > 0], mean[statistics.count > 0])


def test_gradients_match_finite_differences() -> None:
    problem = make_problem(2, 3, 4, (2, 3), labelled=0.8, seed=3)
    labels, mean, variance = problem.labels, problem.mean, problem.variance
    features, logits = problem.features.requires_grad_(), problem.logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: distribution_contrast(x, labels, mean, variance, temperature=0.4), features
    )
    assert torch.autograd.gradcheck(lambda x: segmentation_cross_entropy(x, labels), logits)
    assert torch.autograd.gradcheck(lambda x: lovasz_softmax(x, labels), logits)


def test_ignored_pixels_count_as_absent() -> None:
    problem = make_problem(2, 4, 3, (8, 8), labelled=1.0, seed=4)
    top_ignored = problem.labels.clone()
    top_ignored[:, :4] = IGNORE_INDEX
    for loss in (segmentation_cross_entropy, lovasz_softmax):
        torch.testing.assert_close(
            loss(problem.logits, top_ignored), loss(problem.logits[:, :, 4:], problem.labels[:, 4:])
        )
    torch.testing.assert_close(
        distribution_contrast(problem.features, top_ignored, problem.mean, problem.variance),
        distribution_contrast(problem.features[:, :, 4:], problem.labels[:, 4:], problem.mean, problem.variance),
    )


def test_contrast_with_unseen_classes_alone_is_the_log_of_their_number() -> None:
    features = torch.randn(1, 5, 2, 2, requires_grad=True)
    loss = distribution_contrast(features, torch.zeros(1, 2, 2, dtype=torch.int64), *torch.zeros(2, 7, 5))
    assert loss.item() == pytest.approx(math.log(7))


def test_a_zero_feature_has_no_gradient() -> None:
    features = torch.randn(1, 4, 1, 2)
    features[..., 0] = 0
    features.requires_grad_()
    loss = distribution_contrast(
        features, torch.zeros(1, 1, 2, dtype=torch.int64), torch.randn(3, 4), torch.rand(3, 4), temperature=0.5
    )
    loss.backward()
    assert loss.isfinite()
    assert features.grad is not None
    assert torch.equal(features.grad[..., 0], torch.zeros(1, 4, 1))
    assert features.grad[..., 1].abs().max() > 0


def test_half_precision_features_and_autocast_compute_in_float32() -> None:
    problem = make_problem(1, 300, 5, (6, 6), labelled=0.8, seed=5)
    mean, variance = problem.mean.float(), problem.variance.float()
    half = problem.features.bfloat16().requires_grad_()
    wide = half.detach().float().requires_grad_()
    expected = distribution_contrast(wide, problem.labels, mean, variance)
    expected.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = distribution_contrast(half, problem.labels, mean, variance)
        actual.backward()
        statistics = ClassStatistics(5, 300)
        statistics.update(half, problem.labels)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    assert half.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(half.grad, wide.grad.bfloat16(), rtol=1e-2, atol=0)
    outside = ClassStatistics(5, 300)
    outside.update(wide, problem.labels)
    assert torch.equal(statistics.variance, outside.variance)

    logits = problem.logits.bfloat16()
    for loss in (segmentation_cross_entropy, lovasz_softmax):
        assert loss(logits, problem.labels).dtype == torch.float32
        assert torch.equal(loss(logits, problem.labels), loss(logits.float(), problem.labels))


def test_contrast_names_the_sizes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 2\) \(B, D, h, w\), \(3, 5\) \(C, D\)"):
        distribution_contrast(
            torch.ones(1, 4, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64), torch.ones(3, 5), torch.ones(3, 5)
        )
    with pytest.raises(ValueError, match="`temperature` must be positive, but got 0"):
        distribution_contrast(
            torch.ones(1, 5, 2, 2),
            torch.zeros(1, 2, 2, dtype=torch.int64),
            torch.ones(3, 5),
            torch.ones(3, 5),
            temperature=0,
        )


@fast
@given(
    full=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    cells=st.tuples(st.integers(1, 100), st.integers(1, 100)),
)
@example(full=(6, 6), cells=(74, 94))  # float64 ratios would sample differently
def test_labels_at_features_sample_like_nearest_interpolation(full: tuple[int, int], cells: tuple[int, int]) -> None:
    labels = torch.arange(full[0] * full[1]).view(1, *full)
    expected = F.interpolate(labels[:, None].float(), size=cells, mode="nearest")[:, 0].long()
    assert torch.equal(labels_at_features(labels, cells), expected)


def test_confident_labels_keep_the_threshold_itself() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, -0.1], [-0.1, 0.0], [2.0, -2.0]]).T.reshape(1, 2, 2, 2).requires_grad_()
    assert confident_labels(logits, 0.5).tolist() == [[[0, 0], [1, 0]]]
    assert confident_labels(logits, 0.6).tolist() == [[[255, 255], [255, 0]]]
    assert not confident_labels(logits, 0.5).requires_grad


# Two workers. Each holds a part of the joined batch; data parallelism averages what they compute.

PARTS = (slice(0, 1), slice(1, 3))


def joined_batch(case: str) -> Problem:
    problem = make_problem(3, 6, 4, (4, 5), labelled=0.7, seed=6)
    problem.labels[2, 1:] = IGNORE_INDEX
    problem.labels[0][problem.labels[0] == 1] = 0  # class 1 is present at one worker alone
    problem.labels[1, 0] = 1
    if case == "one worker without labels":
        problem.labels[PARTS[0]] = IGNORE_INDEX
    if case == "no labels":
        problem.labels[:] = IGNORE_INDEX
    return problem


CASES = ("uneven counts", "one worker without labels", "no labels")


def losses_and_statistics(case: str, part: slice) -> dict[str, Tensor]:
    problem = joined_batch(case)
    features = problem.features[part].clone().requires_grad_()
    logits = problem.logits[part].clone().requires_grad_()
    labels = problem.labels[part]
    statistics = ClassStatistics(4, 6)
    statistics.update(features, labels)
    statistics.update(2 * features, labels)
    far = ClassStatistics(4, 6)
    far.update((features + 1e4 * labels.unsqueeze(1)).float(), labels)
    losses = {
        "cross entropy": (segmentation_cross_entropy(logits, labels), logits),
        "lovasz": (lovasz_softmax(logits, labels), logits),
        "contrast": (
            distribution_contrast(features, labels, problem.mean, problem.variance, temperature=0.5),
            features,
        ),
    }
    results = statistics.state_dict() | {f"{name} of classes far apart": t for name, t in far.state_dict().items()}
    for name, (loss, wanted) in losses.items():
        results[f"{name} value"], results[f"{name} gradient"] = value_and_gradient(loss, wanted)
    return results


def run_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results = {case: losses_and_statistics(case, PARTS[rank]) for case in CASES}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_equal_one_on_the_joined_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_worker, args=(str(tmp_path),), nprocs=2)
    workers = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case in CASES:
        for name, expected in losses_and_statistics(case, slice(None)).items():
            first, second = (worker[case][name] for worker in workers)
            if name.endswith("value"):
                actual = (first + second) / 2
            elif name.endswith("gradient"):
                actual = torch.cat([first, second]) / 2
            else:
                assert torch.equal(first, second), f"{case}: the workers disagree about {name}"
                actual = first
            torch.testing.assert_close(
                actual, expected, rtol=1e-10, atol=1e-12, msg=lambda text, at=f"{case}, {name}": f"{at}: {text}"
            )
