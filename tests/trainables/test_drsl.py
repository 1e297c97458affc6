"""Promises of DRSL: agreement with golden vectors, with the literal forms, between workers, and a run of the method.

No official code was public. The golden arrays named `exp_*` come from plain float64 loops over the formulas on float32
inputs; thresholds and labels also from yzou2/CRST. Deviations are relative to the largest entry of the expected array.
The literal forms are in `benchmarks/literal/drsl.py`.
"""

import copy
import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy import Reports, toy_config

from segadapt.search_spaces.drsl import PAPER, SPACE
from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.labelling.features import labels_at_features
from segadapt.trainables.core.labelling.files import PseudoLabelFolder
from segadapt.trainables.core.labelling.self_paced import self_paced_labels, self_paced_thresholds
from segadapt.trainables.core.losses.mode_alignment import (
    ModeMargin,
    confidence_regulariser,
    draw_pairs,
    mode_alignment,
    mode_margin,
    mode_scores,
    pick_unit_vectors,
    sampled_mode_alignment,
)
from segadapt.trainables.core.method import SOURCE_ONLY
from segadapt.trainables.core.networks import build_segmenter
from segadapt.trainables.core.state.class_modes import ClassModes
from segadapt.trainables.core.training.checkpoint import load_state
from segadapt.trainables.core.training.config import TrainerSettings
from segadapt.trainables.core.training.optimizer import select_trained
from segadapt.trainables.core.training.trainer import Trainer
from segadapt.trainables.drsl import DRSL, Round

GOLDEN = Path(__file__).parent / "golden"
FLOAT64 = torch.float64
TOLERANCES = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-5, 1e-4)}  # scalars, arrays


def load_literal() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "literal" / "drsl.py"
    spec = importlib.util.spec_from_file_location("literal_drsl", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


literal = load_literal()
fast = settings(max_examples=60, deadline=None, derandomize=True)


# Golden vectors.


def deviation(actual: Tensor, expected: np.ndarray) -> float:
    largest = float(np.abs(expected).max())
    return float(np.abs(actual.detach().double().numpy() - expected).max()) / (largest or 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_losses_of_the_modes_agree_with_the_golden_vectors(dtype: torch.dtype) -> None:
    arrays = np.load(GOLDEN / "drsl_1_modes.npz")
    per_class, num_modes = int(arrays["M"]), int(arrays["C"] * arrays["M"])
    unread = {name for name in arrays.files if name.startswith("exp_")}
    deviations: dict[str, float] = {}

    def compare(name: str, actual: Tensor) -> None:
        unread.remove(name)
        deviations[name] = deviation(actual, arrays[name])

    def compare_indices(name: str, actual: Tensor) -> None:
        unread.remove(name)
        np.testing.assert_array_equal(actual.numpy(), arrays[name], err_msg=name)

    source, target, modes = (
        torch.from_numpy(arrays[name]).to(dtype).requires_grad_() for name in ("embed_s", "embed_t", "modes")
    )
    margins = [
        mode_margin(embeddings, torch.from_numpy(arrays[name]).long(), modes, margin=float(arrays["alpha"]))
        for embeddings, name in ((source, "label_s"), (target, "label_t"))
    ]
    for (loss, nearest), domain in zip(margins, ("source", "target"), strict=True):
        compare(f"exp_dml_{domain}", loss)
        compare_indices(f"exp_mode_{domain[0]}", torch.where(nearest < 0, -1, nearest % per_class))
    gradients = torch.autograd.grad(margins[0].loss + margins[1].loss, [source, target, modes])
    for name, gradient in zip(("embed_s", "embed_t", "modes"), gradients, strict=True):
        compare(f"exp_grad_dml_{name}", gradient)
    compare("exp_score_s", mode_scores(source, modes, width=float(arrays["sigma"])))

    cells = (source, margins[0].nearest, target, margins[1].nearest)
    stop_source = bool(arrays["stop_source"])
    expected = mode_alignment(*cells, num_modes=num_modes, stop_source=stop_source)
    compare("exp_sma_expected", expected)
    expected.backward()
    compare("exp_grad_sma_expected_embed_t", target.grad)
    compare("exp_grad_sma_expected_embed_s", torch.zeros_like(source) if source.grad is None else source.grad)

    classes, modes_of_class, target_cells, source_cells = torch.from_numpy(arrays["pairs"]).T
    pairs = torch.stack([classes * per_class + modes_of_class, target_cells, source_cells], dim=1)
    sampled = sampled_mode_alignment(*cells, pairs, num_modes=num_modes, stop_source=stop_source)
    compare("exp_sma_sampled", sampled)
    compare("exp_grad_sma_sampled_embed_t", torch.autograd.grad(sampled, target)[0])
    drawn = draw_pairs(cells[1], cells[3], num_modes=num_modes, pairs=2, generator=torch.Generator().manual_seed(0))
    drawn = of_shared_modes(drawn)[::2, 0]
    compare_indices("exp_sma_cells", torch.stack([drawn // per_class, drawn % per_class], dim=1))

    assert not unread, f"expected arrays that were not compared: {sorted(unread)}"
    too_far = {name: d for name, d in deviations.items() if d > TOLERANCES[dtype][arrays[name].ndim > 0]}
    assert not too_far


def test_thresholds_and_pseudo_labels_agree_with_the_golden_vectors() -> None:
    arrays = np.load(GOLDEN / "drsl_2_cbst.npz")
    classes, portion = int(arrays["C"]), float(arrays["portion"])
    probabilities = torch.from_numpy(arrays["prob"])
    thresholds = self_paced_thresholds(lambda: iter(probabilities.split(1)), classes, portion=portion)
    np.testing.assert_allclose(thresholds.double().numpy(), arrays["exp_thresholds"], rtol=1e-9)
    clear = arrays["boundary"] == 0
    labels = self_paced_labels(probabilities, thresholds).numpy()
    np.testing.assert_array_equal(labels[clear], arrays["exp_plabel"][clear])
    predicted = probabilities.argmax(dim=1)
    np.testing.assert_array_equal(torch.bincount(predicted.flatten()).numpy(), arrays["exp_pred_count"])
    assert ((labels != predicted.numpy()) & (labels != IGNORE_INDEX)).any()
    config = DRSL.Config(portion=portion, portion_step=float(arrays["step"]), portion_cap=float(arrays["portion_max"]))
    assert config.portion_of(1) == pytest.approx(float(arrays["exp_next_portion"]), rel=1e-9)
    assert config.portion_of(100) == float(arrays["portion_max"])


# The literal forms.


class Problem(NamedTuple):
    """Embeddings and labels of both domains, of unlike sizes; some classes are absent from one of them."""

    source: Tensor  # (B, D, h, w) float64
    source_labels: Tensor  # (B, h, w)
    target: Tensor  # (B, D, h', w')
    target_labels: Tensor  # (B, h', w')
    modes: Tensor  # (C, M, D)

    @property
    def num_modes(self) -> int:
        return self.modes.shape[0] * self.modes.shape[1]

    def part(self, images: slice) -> "Problem":
        return Problem(*(values[images].clone() for values in self[:4]), self.modes.clone())

    def leaves(self) -> list[Tensor]:
        return [values.requires_grad_() for values in (self.source, self.target, self.modes)]


def make_problem(
    batch: int,
    channels: int,
    classes: int,
    modes: int,
    sizes: tuple[tuple[int, int], tuple[int, int]],
    *,
    labelled: float,
    seed: int,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def domain(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        full = tuple(int(side * (1 + 3 * torch.rand((), generator=generator))) for side in size)
        occurring = torch.randint(0, classes, (classes,), generator=generator)  # with repetition: some are absent
        labels = occurring[torch.randint(0, classes, (batch, *full), generator=generator)]
        labels[torch.rand(labels.shape, generator=generator) >= labelled] = IGNORE_INDEX
        embeddings = torch.randn(batch, channels, *size, generator=generator, dtype=FLOAT64)
        return embeddings, labels_at_features(labels, size)

    return Problem(
        *domain(sizes[0]), *domain(sizes[1]), torch.randn(classes, modes, channels, generator=generator, dtype=FLOAT64)
    )


side = st.integers(1, 5)
size = st.tuples(side, side)
problems = st.builds(
    make_problem,
    batch=st.integers(1, 3),
    channels=st.integers(1, 7),
    classes=st.integers(1, 5),
    modes=st.integers(1, 4),
    sizes=st.tuples(size, size),
    labelled=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 2**31),
)


def assert_same(actual: Tensor, expected: Tensor, wanted: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    gradients = (torch.autograd.grad(loss, wanted, materialize_grads=True) for loss in (actual, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


def assert_zero(loss: Tensor, wanted: list[Tensor]) -> None:
    assert loss == 0
    for gradient in torch.autograd.grad(loss, wanted, materialize_grads=True):
        assert not gradient.any()


@fast
@given(problem=problems, margin=st.sampled_from([0.0, 0.5, 2.0]))
def test_margin_equals_its_definition(problem: Problem, margin: float) -> None:
    assume(problem.source.shape[1] > 1)  # in one dimension all modes are as near
    leaves = problem.leaves()
    loss, nearest = mode_margin(problem.source, problem.source_labels, problem.modes, margin=margin)
    if (problem.source_labels == IGNORE_INDEX).all():
        assert_zero(loss, leaves)
        assert (nearest == -1).all()
        return
    if len(problem.modes) == 1:
        assert_zero(loss, leaves)
        return
    expected, expected_nearest = literal.mode_margin(
        problem.source, problem.source_labels, problem.modes, margin=margin
    )
    assert_same(loss, expected, leaves)
    assert torch.equal(nearest, expected_nearest)


@fast
@given(problem=problems, stop_source=st.booleans())
def test_alignment_equals_the_mean_over_all_pairs(problem: Problem, *, stop_source: bool) -> None:
    leaves, cells = problem.leaves(), cells_of(problem)
    knobs = {"num_modes": problem.num_modes, "stop_source": stop_source}
    assert_same(mode_alignment(*cells, **knobs), literal.mode_alignment(*cells, **knobs), leaves)


@fast
@given(problem=problems, stop_source=st.booleans(), pairs=st.integers(1, 3))
def test_sampled_alignment_equals_its_definition(problem: Problem, *, stop_source: bool, pairs: int) -> None:
    leaves, cells, num_modes = problem.leaves(), cells_of(problem), problem.num_modes
    generator = torch.Generator().manual_seed(0)
    drawn = draw_pairs(cells[1], cells[3], num_modes=num_modes, pairs=pairs, generator=generator)
    loss = sampled_mode_alignment(*cells, drawn, num_modes=num_modes, stop_source=stop_source)
    drawn = of_shared_modes(drawn)
    if len(drawn) == 0:
        assert_zero(loss, leaves)
    else:
        assert_same(loss, literal.sampled_mode_alignment(*cells, drawn, stop_source=stop_source), leaves)


@fast
@given(problem=problems, width=st.sampled_from([0.2, 0.5, 1.0]))
def test_scores_equal_their_definition(problem: Problem, width: float) -> None:
    actual = mode_scores(problem.source, problem.modes, width=width)
    torch.testing.assert_close(actual, literal.mode_scores(problem.source, problem.modes, width=width))


@fast
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    portion=st.sampled_from([0.0, 0.2, 0.3, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_thresholds_and_labels_equal_those_of_sorting_everything(
    shape: tuple[int, int, int, int], portion: float, seed: int
) -> None:
    logits = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    probabilities = (4 * logits).round().div(4).softmax(dim=1)  # with ties
    thresholds = self_paced_thresholds(lambda: iter(probabilities.split(2)), shape[1], portion=portion)
    expected = literal.self_paced_thresholds(probabilities, portion)
    assert thresholds.tolist() == expected
    labels = self_paced_labels(probabilities, thresholds)
    assert torch.equal(labels.long(), literal.self_paced_labels(probabilities, expected))


def cells_of(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the alignments take."""
    source, target = margins_of(problem)
    return problem.source, source.nearest, problem.target, target.nearest


def of_shared_modes(pairs: Tensor) -> Tensor:
    """Return the rows of pairs that count."""
    return pairs[pairs[:, 0] >= 0]


def margins_of(problem: Problem) -> tuple[ModeMargin, ModeMargin]:
    return (
        mode_margin(problem.source, problem.source_labels, problem.modes),
        mode_margin(problem.target, problem.target_labels, problem.modes),
    )


# Losses at their edges.


def example(**changes: Any) -> Problem:
    knobs = {"batch": 2, "channels": 6, "classes": 4, "modes": 3, "sizes": ((4, 5), (3, 4)), "labelled": 0.8, "seed": 3}
    return make_problem(**(knobs | changes))


def test_gradients_match_finite_differences() -> None:
    problem = example()
    source_modes, target_modes = cells_of(problem)[1::2]
    problem.leaves()

    def margin(embeddings: Tensor, modes: Tensor) -> Tensor:
        return mode_margin(embeddings, problem.source_labels, modes).loss

    def alignment(source: Tensor, target: Tensor) -> Tensor:
        return mode_alignment(source, source_modes, target, target_modes, num_modes=12, stop_source=False)

    assert torch.autograd.gradcheck(margin, (problem.source, problem.modes))
    assert torch.autograd.gradcheck(alignment, (problem.source, problem.target))


def test_a_hand_made_cell_pays_the_difference_of_distances_and_the_margin() -> None:
    modes = torch.tensor([[[2.0, 0.0], [0.0, 3.0]], [[-1.0, 0.0], [0.6, 0.8]]])
    embeddings = torch.tensor([5.0, 0.0]).view(1, 2, 1, 1)
    loss, nearest = mode_margin(embeddings, torch.tensor([[[0]]]), modes, margin=1.0)
    assert loss.item() == pytest.approx(0.0 - 0.8 + 1.0)  # distances 0 and 2 - 2 * 0.6
    assert nearest.item() == 0
    loss, nearest = mode_margin(embeddings, torch.tensor([[[1]]]), modes, margin=1.0)
    assert loss.item() == pytest.approx(0.8 - 0.0 + 1.0)
    assert nearest.item() == 3


@pytest.mark.parametrize("offset", [0.0, 30.0, 300.0])
def test_the_margin_keeps_its_digits_where_all_directions_nearly_agree(offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 1, 40, generator=generator) + offset
    modes = (means + 0.3 * torch.randn(5, 3, 40, generator=generator)).requires_grad_()
    labels = torch.randint(0, 5, (2, 12, 15), generator=generator)
    embeddings = means[labels, 0] + torch.randn(2, 12, 15, 40, generator=generator)
    embeddings = embeddings.movedim(3, 1).contiguous().requires_grad_()
    wide = [tensor.detach().double().requires_grad_() for tensor in (embeddings, modes)]
    actual, expected = mode_margin(embeddings, labels, modes), mode_margin(wide[0], labels, wide[1])
    assert torch.equal(actual.nearest, expected.nearest)
    torch.testing.assert_close(actual.loss.double(), expected.loss, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(actual.loss, [embeddings, modes]), torch.autograd.grad(expected.loss, wide)
    for gradient, wanted in zip(*gradients, strict=True):
        assert (gradient - wanted).abs().max() <= 3e-5 * wanted.abs().max()


def test_classes_weigh_the_same_whatever_their_number_of_cells() -> None:
    problem = example(labelled=1.0)
    alone = [
        mode_margin(problem.source, torch.where(problem.source_labels == k, k, IGNORE_INDEX), problem.modes).loss
        for k in problem.source_labels.unique().tolist()
    ]
    together = mode_margin(problem.source, problem.source_labels, problem.modes).loss
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_ties_go_to_the_lowest_mode_and_zero_embeddings_have_no_gradient() -> None:
    embeddings = torch.zeros(1, 4, 1, 2, requires_grad=True)
    modes = torch.randn(2, 3, 4, requires_grad=True)
    loss, nearest = mode_margin(embeddings, torch.tensor([[[0, 1]]]), modes, margin=0.5)
    assert loss.item() == pytest.approx(0.5)
    assert nearest.tolist() == [[[0, 3]]]
    aligned = mode_alignment(embeddings, nearest, embeddings, nearest, num_modes=6, stop_source=False)
    (loss + aligned).backward()
    for leaf in (embeddings, modes):
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_an_unlabelled_target_costs_exactly_nothing() -> None:
    problem = example()
    problem.target_labels[:] = IGNORE_INDEX
    leaves, cells = problem.leaves(), cells_of(problem)
    _, target = margins_of(problem)
    assert_zero(target.loss, leaves)
    assert_zero(mode_alignment(*cells, num_modes=12), leaves)
    drawn = draw_pairs(cells[1], cells[3], num_modes=12, pairs=4, generator=torch.Generator())
    assert drawn.shape == (48, 3)
    assert of_shared_modes(drawn).shape == (0, 3)
    assert_zero(sampled_mode_alignment(*cells, drawn, num_modes=12), leaves)
    logits = torch.randn(2, 4, 3, 4, dtype=FLOAT64, requires_grad=True)
    assert_zero(confidence_regulariser(logits, problem.target_labels), [logits])


def test_the_first_numbers_drawn_are_dealt_to_the_modes_that_both_domains_have() -> None:
    source = torch.tensor([[[0, 0, 0, 2, 2, 3]]])
    target = torch.tensor([[[0, 2, 2, 2, 2, 1]]])
    drawn = draw_pairs(source, target, num_modes=4, pairs=2, generator=torch.Generator().manual_seed(3))
    numbers = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)  # for two modes
    available = torch.tensor([[1, 4], [3, 2]])[:, :, None]  # of modes 0 and 2: target cells, source cells
    expected = (numbers * available).long().flatten(1).T
    assert drawn[:, 0].tolist() == [0, 0, -1, -1, 2, 2, -1, -1]
    assert torch.equal(of_shared_modes(drawn)[:, 1:], expected)


def test_drawn_pairs_stay_in_their_mode_and_their_mean_approaches_the_expected_form() -> None:
    problem = example()
    cells = cells_of(problem)
    drawn = draw_pairs(cells[1], cells[3], num_modes=12, pairs=4000, generator=torch.Generator().manual_seed(0))
    sampled = sampled_mode_alignment(*cells, drawn, num_modes=12)
    torch.testing.assert_close(sampled, mode_alignment(*cells, num_modes=12), rtol=0, atol=0.01)
    for mode, target_cell, source_cell in of_shared_modes(drawn).unique(dim=0).tolist():
        assert target_cell < (cells[3] == mode).sum()
        assert source_cell < (cells[1] == mode).sum()


def test_a_constant_source_has_no_gradient() -> None:
    problem = example()
    problem.leaves()
    mode_alignment(*cells_of(problem), num_modes=12).backward()
    assert problem.source.grad is None
    assert problem.target.grad is not None


def test_the_regulariser_pulls_labelled_pixels_to_the_uniform_distribution() -> None:
    logits = torch.randn(2, 5, 3, 4, dtype=FLOAT64, requires_grad=True)
    labels = torch.randint(0, 5, (2, 3, 4))
    labels[0] = IGNORE_INDEX
    loss = confidence_regulariser(logits, labels)
    assert loss.item() == pytest.approx(-logits[1].log_softmax(dim=0).mean().item())
    assert confidence_regulariser(torch.zeros(2, 5, 3, 4), labels).item() == pytest.approx(math.log(5))


def test_half_precision_and_autocast_compute_in_float32_on_any_memory_layout() -> None:
    problem = example(channels=8)
    single = [values.float() if values.is_floating_point() else values for values in problem]
    reference = Problem(*single)
    expected = [margins_of(reference)[0].loss, mode_alignment(*cells_of(reference), num_modes=12)]
    reference.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = [margins_of(reference)[0].loss, mode_alignment(*cells_of(reference), num_modes=12)]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)

    half = [values.bfloat16().to(memory_format=torch.channels_last) for values in (reference.source, reference.target)]
    rounded = Problem(half[0].detach(), single[1], half[1].detach(), single[3], single[4])
    rounded.leaves()
    margin, cells = margins_of(rounded)[0], cells_of(rounded)
    loss = margin.loss + mode_alignment(*cells, num_modes=12, stop_source=False)
    assert loss.dtype == torch.float32
    loss.backward()
    wide = Problem(rounded.source.detach().float(), single[1], rounded.target.detach().float(), single[3], single[4])
    wide.leaves()
    wide_loss = margins_of(wide)[0].loss + mode_alignment(*cells_of(wide), num_modes=12, stop_source=False)
    gradients = torch.autograd.grad(wide_loss, [wide.source, wide.target])
    torch.testing.assert_close(loss, wide_loss)
    for ours, theirs in zip((rounded.source.grad, rounded.target.grad), gradients, strict=True):
        assert ours is not None
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=1e-4)


def test_sizes_and_settings_that_do_not_fit_are_named() -> None:
    problem = example()
    with pytest.raises(ValueError, match=r"share the channel size D, but got \(2, 6, 4, 5\).*\(4, 3, 5\)"):
        mode_margin(problem.source, problem.source_labels, problem.modes[..., :5])
    with pytest.raises(ValueError, match="`margin` must not be negative, but got -1"):
        mode_margin(problem.source, problem.source_labels, problem.modes, margin=-1)
    with pytest.raises(ValueError, match="must be finite"):
        self_paced_thresholds(lambda: iter([torch.full((1, 2, 3, 3), math.nan)]), 2)


def test_a_class_never_predicted_and_one_predicted_too_rarely_have_threshold_one() -> None:
    probabilities = torch.tensor([0.7, 0.2, 0.1]).view(1, 3, 1, 1).repeat(1, 1, 6, 8)
    probabilities[0, :, 0, 0] = torch.tensor([0.1, 0.8, 0.1])
    thresholds = self_paced_thresholds(lambda: iter([probabilities]), 3, portion=0.5)
    assert thresholds.tolist() == pytest.approx([0.7, 1.0, 1.0])
    labels = self_paced_labels(probabilities, thresholds)
    assert labels[0, 0, 0] == IGNORE_INDEX
    assert (labels.flatten()[1:] == 0).all()


# The modes.


def test_modes_start_as_a_class_part_and_a_part_that_all_classes_share() -> None:
    torch.manual_seed(0)
    modes = ClassModes(4, 3, 4000)()
    shared = modes - modes[:, :1]
    torch.testing.assert_close(shared, shared[:1].expand_as(shared), rtol=0, atol=1e-6)
    assert shared[0, 1].std().item() == pytest.approx(0.05 * math.sqrt(2), rel=0.05)
    assert (modes[0] - modes[1]).std().item() == pytest.approx(0.1 * math.sqrt(2), rel=0.05)


def test_the_optimiser_moves_modes_as_plain_parameters_without_weight_decay() -> None:
    modes = ClassModes(3, 2, 5)
    plain = nn.Parameter(modes().detach().clone())
    optimisers = [
        torch.optim.SGD(modes.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5),
        torch.optim.SGD([plain], lr=0.1, momentum=0.9),
    ]
    goal = torch.randn(3, 2, 5)
    for _ in range(5):
        for values, optimiser in zip((modes(), plain), optimisers, strict=True):
            optimiser.zero_grad()
            (F.normalize(values, dim=2) - goal).square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(modes(), plain)


def test_a_mode_without_cells_moves_to_a_cell_of_its_class_after_a_while() -> None:
    problem = example(channels=6)
    modes = ClassModes(4, 3, 6)
    lengths = modes.base.norm(dim=2)
    nearest = torch.full_like(problem.source_labels, -1)
    nearest[0, 0, 0], nearest[1, 2, 3] = 0, 3  # modes 0 of classes 0 and 1; classes 2 and 3 are not shown
    target_nearest = torch.tensor([[[1]]])  # mode 1 of class 0

    def track() -> None:
        modes.track(problem.source, nearest, target_nearest, patience=3, generator=torch.Generator().manual_seed(0))

    track()
    track()
    before = modes.base.clone()
    assert modes.idle_steps.tolist() == [[0, 0, 2], [0, 2, 2], [0, 0, 0], [0, 0, 0]]
    assert modes.active_share(within=1) == pytest.approx(9 / 12)
    track()
    moved = (modes.base != before).any(dim=2)
    assert moved.tolist() == [[False, False, True], [False, True, True], [False] * 3, [False] * 3]
    assert not modes.idle_steps.any()
    torch.testing.assert_close(modes.base.norm(dim=2), lengths)
    for (k, m), cell in {(0, 2): (0, 0, 0), (1, 1): (1, 2, 3), (1, 2): (1, 2, 3)}.items():
        embedding = problem.source[cell[0], :, cell[1], cell[2]].float()
        torch.testing.assert_close(F.normalize(modes.base[k, m], dim=0), F.normalize(embedding, dim=0))


def test_a_class_seen_in_the_target_alone_waits_for_a_source_cell() -> None:
    modes = ClassModes(2, 2, 3)
    before = modes.base.clone()
    nothing, seen = torch.full((1, 2, 2), -1), torch.zeros(1, 2, 2, dtype=torch.int64)
    for _ in range(4):
        modes.track(torch.randn(1, 3, 2, 2), nothing, seen, patience=2, generator=torch.Generator())
    assert torch.equal(modes.base, before)
    modes.track(torch.randn(1, 3, 2, 2), seen, None, patience=2, generator=torch.Generator())
    assert (modes.base != before).any(dim=2).tolist() == [[False, True], [False, False]]


# Two workers. Each holds a part of the joined batch; data parallelism averages what they compute.

PARTS = (slice(0, 1), slice(1, 3))
CASES = ("uneven counts", "one worker without labels", "no labels")


def joined_batch(case: str) -> Problem:
    problem = example(batch=3, labelled=0.7)
    if case == "one worker without labels":
        problem.target_labels[PARTS[0]] = IGNORE_INDEX
    if case == "no labels":
        problem.target_labels[:] = IGNORE_INDEX
    return problem


def computed_by_a_worker(case: str, images: slice) -> dict[str, Tensor]:
    problem = joined_batch(case).part(images)
    leaves = dict(zip(("source", "target", "modes"), problem.leaves(), strict=True))
    cells, margins = cells_of(problem), margins_of(problem)
    drawn = draw_pairs(cells[1], cells[3], num_modes=12, pairs=5, generator=torch.Generator().manual_seed(1))
    knobs = {"num_modes": 12, "stop_source": False}
    losses = {
        "source margin": margins[0].loss,
        "target margin": margins[1].loss,
        "alignment": mode_alignment(*cells, **knobs),
        "sampled": sampled_mode_alignment(*cells, drawn, **knobs),
        "regulariser": confidence_regulariser(problem.target, problem.target_labels),
    }
    results = {"pairs": drawn}
    for name, loss in losses.items():
        results[f"{name} value"] = loss.detach()
        gradients = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, materialize_grads=True)
        results |= {f"{name} gradient {leaf}": value for leaf, value in zip(leaves, gradients, strict=True)}
    torch.manual_seed(0)
    modes = ClassModes(4, 3, 6)
    for _ in range(3):
        generator = torch.Generator().manual_seed(2)
        modes.track(problem.source.detach(), cells[1], cells[3], patience=2, generator=generator)
    results |= {"base": modes.base, "idle steps": modes.idle_steps}
    probabilities = torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(3)).softmax(dim=1)[images]
    results["thresholds"] = self_paced_thresholds(lambda: iter([probabilities]), 4, portion=0.3)
    return results


def run_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save({case: computed_by_a_worker(case, PARTS[rank]) for case in CASES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_equal_one_on_the_joined_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_worker, args=(str(tmp_path),), nprocs=2)
    workers = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case in CASES:
        for name, expected in computed_by_a_worker(case, slice(None)).items():
            first, second = (results[case][name] for results in workers)
            if name.endswith(("value", "gradient modes")):
                actual = (first + second) / 2
            elif "gradient" in name:
                actual = torch.cat([first, second]) / 2
            else:
                assert torch.equal(first, second), f"{case}: the workers disagree about {name}"
                actual = first
            torch.testing.assert_close(
                actual, expected, rtol=1e-7, atol=1e-10, msg=lambda text, at=f"{case}, {name}": f"{at}: {text}"
            )


def test_picked_cells_are_counted_in_order_of_image_row_and_column() -> None:
    problem = example()
    groups = problem.source_labels.masked_fill(problem.source_labels == IGNORE_INDEX, -1)
    rows = F.normalize(literal.cells_first(problem.source), dim=1)
    for k in groups.unique().tolist()[1:]:
        own = rows[groups.flatten() == k]
        wanted = torch.arange(len(own)).flip(0)
        picked = pick_unit_vectors(problem.source, groups, torch.full_like(wanted, k), wanted, num_groups=4)
        torch.testing.assert_close(picked, own.flip(0))


# The method.

TERMS = {"cross_entropy", "target_cross_entropy", "metric_source", "metric_target", "alignment"}
VARIANTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "default": ({}, TERMS),
    "sampled, both sides": ({"alignment": "sampled", "stop_source": False, "alignment_pairs": 4}, TERMS),
    "regularised": (
        {"confidence_weight": 0.1, "mirrored": True, "modes_per_class": 1, "rare_crop_chance": 1.0, "reseed_after": 1},
        TERMS | {"confidence"},
    ),
    "no alignment": ({"alignment_weight": 0.0, "rare_crop_chance": 0.0}, TERMS - {"alignment"}),
    "no metric": ({"metric_weight": 0.0}, TERMS - {"metric_source", "metric_target"}),
    "no modes": ({"metric_weight": 0.0, "alignment_weight": 0.0}, {"cross_entropy", "target_cross_entropy"}),
}


def drsl_trainer(folder: Path, **values: Any) -> tuple[Trainer, Reports]:
    config = toy_config("self_training")
    data, evaluation = load_data(config.data)
    torch.manual_seed(config.seed)
    segmenter = build_segmenter(num_classes=len(data.classes), **vars(config.network))
    method = DRSL(segmenter, DRSL.Config(**({"rounds": 2, "embedding_channels": 16} | values)), config.warmup)
    reports = Reports(folder / "checkpoints")
    settings = TrainerSettings(config.trainer, config.optimizer, config.augmentation, config.seed)
    plan = DRSL.plan(method.config)
    return Trainer(method, plan, data, evaluation, settings, reports, folder / "artifacts"), reports


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_has_finite_named_terms_and_resumes_exactly(variant: str, tmp_path: Path) -> None:
    values, terms = VARIANTS[variant]
    trainer, reports = drsl_trainer(tmp_path / "whole", **values)
    before = copy.deepcopy(trainer.method.state_dict())
    trainer.run()
    last = reports.metrics[-1]
    assert {key for key in last if key.startswith("loss/")} == {f"loss/{name}" for name in terms | {"total"}}
    assert all(math.isfinite(value) for key, value in last.items() if key.startswith("loss/"))
    trained = {name for stage in trainer.plan for name in stage.trains or ()}
    still = {name for name in trainer.trainable if torch.equal(trainer.method.state_dict()[name], before[name])}
    assert {name.split(".")[0] for name in still} == {"embedding", "modes"} - trained

    middle = next(index for index, metrics in enumerate(reports.metrics) if metrics["stage"] == trainer.plan[1].name)
    again, resumed = drsl_trainer(tmp_path / "again", **values)
    again.folder = trainer.folder
    again.run(reports.checkpoint(middle))
    assert resumed.metrics[-1]["loss/total"] == last["loss/total"]
    ends = (load_state(each.checkpoint(len(each.metrics) - 1))["state"] for each in (reports, resumed))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trained_parameter_gets_a_gradient_in_every_stage(variant: str, tmp_path: Path) -> None:
    trainer, _ = drsl_trainer(tmp_path, **VARIANTS[variant][0])
    trainer.run()
    for stage in trainer.plan:
        select_trained(trainer.method, stage, trainer.trainable)
        trainer.method.attach(stage is not SOURCE_ONLY)
        batch = next(trainer.batches(stage))
        trainer.method.zero_grad()
        torch.stack(list(trainer.method(batch, 0).values())).sum().backward()
        without = [n for n, p in trainer.method.named_parameters() if (p.grad is None) == p.requires_grad]
        assert not without, stage.name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_without_any_label_has_zero_terms_and_gradients(variant: str, tmp_path: Path) -> None:
    trainer, _ = drsl_trainer(tmp_path, **VARIANTS[variant][0])
    trainer.run()
    for stage in trainer.plan[1:]:
        batch = next(trainer.batches(stage))
        batch = replace(batch, source_labels=torch.full_like(batch.source_labels, IGNORE_INDEX))
        if batch.target_pseudo_labels is not None:
            batch = replace(batch, target_pseudo_labels=torch.full_like(batch.target_pseudo_labels, IGNORE_INDEX))
        trainer.method.zero_grad()
        terms = trainer.method(batch, 0)
        assert all(term == 0 for term in terms.values())
        torch.stack(list(terms.values())).sum().backward()
        for name, parameter in trainer.method.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert not parameter.grad.any(), name


def test_rounds_label_with_growing_portions_and_say_how(tmp_path: Path) -> None:
    trainer, _ = drsl_trainer(tmp_path, portion=0.25, portion_step=0.25)
    trainer.run()
    rounds = [PseudoLabelFolder(trainer.folder / f"round_{number}", trainer.data.target.ids) for number in (1, 2)]
    assert [labels.provenance["portion"] for labels in rounds] == [0.25, 0.5]
    method, last = trainer.method, trainer.plan[-1]
    provenance = rounds[1].provenance
    assert 0 < provenance["active_modes"] <= 1
    assert sum(provenance["predicted"]) == len(trainer.data.target) * 32 * 64
    assert method.predicted.tolist() == provenance["predicted"]
    stored = torch.stack([rounds[1].read(image_id) for image_id in trainer.data.target.ids])
    assert (
        provenance["labelled"] == torch.bincount(stored.flatten(), minlength=256)[: len(trainer.data.classes)].tolist()
    )

    method.eval()
    folder = tmp_path / "other"
    with torch.no_grad():
        data = replace(trainer.stage_data(last), folder=folder)
        method.prepare_stage(last, data)
        probabilities = torch.cat([method._probabilities(images) for images, _ in data.target_batches()])
    again = PseudoLabelFolder(folder, trainer.data.target.ids)
    thresholds = literal.self_paced_thresholds(probabilities, 0.5)
    assert again.provenance["thresholds"] == thresholds
    stored = torch.stack([again.read(image_id) for image_id in trainer.data.target.ids])
    assert torch.equal(stored.long(), literal.self_paced_labels(probabilities, thresholds))


def test_other_seeds_and_rounds_enlarge_other_images(tmp_path: Path) -> None:
    trainer, _ = drsl_trainer(tmp_path, rare_crop_zoom=4.0)
    trainer.run()
    batch = next(trainer.batches(trainer.plan[-1]))
    assert batch.key == (trainer.settings.seed, "round_2")
    enlarged = [
        trainer.method._enlarge_rare_classes(replace(batch, key=key), 0)[0]
        for key in ((0, "round_1"), (0, "round_2"), (1, "round_2"), (1, "round_2"))
    ]
    assert not torch.equal(enlarged[0], enlarged[1])
    assert not torch.equal(enlarged[1], enlarged[2])
    assert torch.equal(enlarged[2], enlarged[3])


def test_mirrored_probabilities_do_not_know_left_from_right(tmp_path: Path) -> None:
    trainer, _ = drsl_trainer(tmp_path, mirrored=True)
    images = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        probabilities, mirrored = (trainer.method._probabilities(each) for each in (images, images.flip(-1)))
    torch.testing.assert_close(probabilities, mirrored.flip(-1))
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(1, 32, 64))


def test_images_are_enlarged_around_the_rarest_class_they_show(tmp_path: Path) -> None:
    trainer, _ = drsl_trainer(tmp_path, rare_crop_chance=1.0, rare_classes=2, rare_crop_zoom=4.0)
    trainer.run()
    method, stage = trainer.method, trainer.plan[-1]
    batch = next(trainer.batches(stage))
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(64.0), indexing="ij")
    images = torch.stack([rows, columns, rows * columns]).repeat(4, 1, 1, 1)
    labels = torch.zeros(4, 32, 64, dtype=torch.int64)
    labels[0, 4, 50] = 1  # rare, and below 0.1 %
    labels[0, 20:, :] = 2  # rare
    labels[1, :, 30] = 2
    labels[2, 5, 5] = 3  # the least predicted but one, not among the two rarest
    batch = replace(batch, target_images=images, target_pseudo_labels=labels, target_indices=torch.arange(4))
    method.predicted.copy_(torch.tensor([100000, 1, 500, 600] + [0] * (len(method.predicted) - 4)))
    enlarged, new_labels = method._enlarge_rare_classes(batch, 0)
    assert (new_labels[0] == 1).sum() >= 1
    assert (new_labels[1] == 2).sum() > 32
    assert all(not torch.equal(enlarged[index], images[index]) for index in (0, 1))
    assert all(torch.equal(enlarged[index], images[index]) for index in (2, 3))
    assert torch.equal(batch.target_pseudo_labels, labels)
    assert enlarged.shape == images.shape

    alone = replace(
        batch, target_images=images[1:2], target_pseudo_labels=labels[1:2], target_indices=torch.tensor([1])
    )
    torch.testing.assert_close(method._enlarge_rare_classes(alone, 0)[0], enlarged[1:2])
    near = new_labels[1] == 2
    assert ((enlarged[1, 1][near] - 30).abs() <= 1).all()  # the image moved with its labels


def test_the_embedding_and_the_modes_are_not_deployed(tmp_path: Path) -> None:
    trainer, _ = drsl_trainer(tmp_path)
    method = trainer.method
    assert method.deployed is method.segmenter
    groups = {group.name: group for group in method.parameter_groups()}
    assert groups["embedding"].fresh
    assert groups["modes"].fresh
    grouped = [id(parameter) for group in groups.values() for parameter in group.parameters]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in method.parameters()}


def test_the_plan_warms_the_modes_up_and_raises_the_portion() -> None:
    plan = DRSL.plan(DRSL.Config())
    assert [stage.name for stage in plan] == ["source_only", "modes", "round_1", "round_2", "round_3"]
    assert plan[0] is SOURCE_ONLY
    assert plan[1].domains == ("source",)
    assert sum(stage.share for stage in plan[1:]) == pytest.approx(1)
    rounds = [stage for stage in plan if isinstance(stage, Round)]
    assert [stage.portion for stage in rounds] == pytest.approx([0.2, 0.25, 0.3])
    assert all(stage.pseudo_labels for stage in rounds)
    plain = DRSL.plan(DRSL.Config(metric_weight=0, alignment_weight=0, rounds=1))
    assert [(stage.name, stage.trains) for stage in plain[1:]] == [("round_1", ("segmenter",))]


@pytest.mark.parametrize(
    "wrong",
    [
        {"metric_weight": -1},
        {"modes_per_class": 0},
        {"rounds": 0},
        {"portion": 0.6},
        {"mode_warmup_share": 1.0},
        {"rare_crop_chance": 2},
        {"rare_crop_zoom": 0.5},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(wrong))} must"):
        DRSL.Config(**wrong)


def test_the_published_setting_is_the_default() -> None:
    assert set(PAPER) == set(SPACE)
    config = DRSL.Config()
    for key, value in PAPER.items():
        section, name = key.split(".")
        assert value == (getattr(config, name) if section == "method" else 1.0), key
        assert SPACE[key]._contains(SPACE[key].to_internal_repr(value))
