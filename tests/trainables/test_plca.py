"""PLCA: agreement with the authors' losses, and promises of the cycle association and the method.

The golden arrays come from kgl-prml/Pixel-Level-Cycle-Association@e01d77a run in float64 on float32 inputs. Arrays
named `exp_*` are its outputs; gradients and aggregates are stored in float32. Deviations are relative to the largest
entry of the expected array. The literal forms are those of `benchmarks/literal/plca.py`.
"""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated_device import SimulatedDevice
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX, DomainBatch
from segadapt.trainables.core.labelling.features import labels_at_features
from segadapt.trainables.core.losses import cycle_association, pixel_similarity
from segadapt.trainables.core.losses.cycle_association import (
    feature_association,
    find_cycles,
    output_association,
    overconfidence_regulariser,
)
from segadapt.trainables.core.losses.segmentation import lovasz_softmax, segmentation_cross_entropy
from segadapt.trainables.core.losses.spatial_aggregation import aggregate_features, aggregate_probabilities
from segadapt.trainables.core.method import SOURCE_ONLY, WarmupConfig
from segadapt.trainables.core.networks import Segmenter, build_segmenter
from segadapt.trainables.plca import ADAPT, PLCA, AggregatingSegmenter

GOLDEN = Path(__file__).parent / "golden"
CASES = ("plca_basic", "plca_rect", "plca_sharp")
TOLERANCES = {
    torch.float64: {"loss": 1e-9, "gradient": 1e-6},
    torch.float32: {"loss": 2e-6, "gradient": 3e-5},
}


def load_literal() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "literal" / "plca.py"
    spec = importlib.util.spec_from_file_location("literal_plca", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


literal = load_literal()
fast = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(params=["whole", "chunked"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of holding similarities at any size, in several chunks."""
    monkeypatch.setattr(pixel_similarity, "COSTLY_CHANNELS", 0 if request.param == "whole" else 10**9)
    monkeypatch.setattr(pixel_similarity, "CACHED_ENTRIES", 200)
    monkeypatch.setattr(pixel_similarity, "COSTLY_ENTRIES", 200)
    monkeypatch.setattr(pixel_similarity, "SYMMETRIC_BLOCK", 8)
    return str(request.param)


def deviation(actual: Tensor, expected: np.ndarray) -> float:
    largest = float(np.abs(expected).max())
    return float(np.abs(actual.detach().double().numpy() - expected).max()) / (largest or 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("form")
def test_losses_and_gradients_agree_with_the_authors_code(case: str, dtype: torch.dtype) -> None:
    arrays = np.load(GOLDEN / f"{case}.npz")
    setting = json.loads(str(arrays["settings"]))
    assert setting["spagg"]
    assert setting["multilayer"]
    unread = {name for name in arrays.files if name.startswith("exp_")}
    deviations: dict[str, float] = {}

    def compare(name: str, actual: Tensor) -> None:
        unread.remove(name)
        deviations[name] = deviation(actual, arrays[name])

    def compare_indices(name: str, actual: Tensor) -> None:
        unread.remove(name)
        np.testing.assert_array_equal(actual.numpy(), arrays[name], err_msg=name)

    names = ("feat_S", "feat_T", "logit_S", "logit_T")
    inputs = {name: torch.from_numpy(arrays[name]).to(dtype).requires_grad_() for name in names}
    features, target_features, logits, target_logits = inputs.values()
    full_labels = torch.from_numpy(arrays["label_S"]).long()
    labels = labels_at_features(full_labels, (features.shape[2], features.shape[3]))
    alpha = setting["alpha"]

    aggregated = aggregate_features(target_features, weight=alpha)
    compare("exp_feat_x2_agg", aggregated)
    aggregated_probabilities = aggregate_probabilities(target_logits.softmax(dim=1), weight=alpha)
    compare("exp_cls_x2_agg", aggregated_probabilities)
    levels = {
        "feat": find_cycles(features, aggregated, labels, similarity="cosine"),
        "cls": find_cycles(logits.softmax(dim=1), aggregated_probabilities, labels, similarity="divergence"),
    }
    for level, cycles in levels.items():
        compare_indices(f"exp_{level}_mid", cycles.middle)
        compare_indices(f"exp_{level}_end", cycles.end)
        compare_indices(f"exp_{level}_sel", cycles.valid)

    by_feature = feature_association(features, target_features, labels, aggregation_weight=alpha)
    by_output = output_association(logits, target_logits, labels, aggregation_weight=alpha)
    regularisers = [
        overconfidence_regulariser(values, level=setting["lsr_thres"]) for values in (logits, target_logits)
    ]
    upsampled = F.interpolate(logits, size=full_labels.shape[-2:], mode="bilinear", align_corners=False)
    lovasz_weight = setting["lov_w"] * setting["world_size"] * setting["iter_size"]
    supervised = segmentation_cross_entropy(upsampled, full_labels) + lovasz_weight * lovasz_softmax(
        upsampled, full_labels
    )
    total = supervised + setting["asso_w"] * (by_feature + by_output) + setting["lsr_w"] * sum(regularisers)
    compare("exp_loss_association", by_feature)
    compare("exp_loss_association_cls", by_output)
    compare("exp_loss_lsr_S", regularisers[0])
    compare("exp_loss_lsr_T", regularisers[1])
    compare("exp_loss_ce_loss", supervised)
    compare("exp_loss_total", total)
    for prefix, loss in (("feat", by_feature), ("cls", by_output), ("total", total)):
        gradients = torch.autograd.grad(loss, list(inputs.values()), retain_graph=True, materialize_grads=True)
        for name, gradient in zip(names, gradients, strict=True):
            if f"exp_grad_{prefix}_{name}" in unread:
                compare(f"exp_grad_{prefix}_{name}", gradient)
            else:
                assert torch.equal(gradient, torch.zeros_like(gradient)), f"{prefix}, {name}"

    assert not unread, f"expected arrays that were not compared: {sorted(unread)}"
    loose = ("exp_grad", "exp_feat_x2", "exp_cls_x2")  # stored in float32
    tolerances = TOLERANCES[dtype]
    too_far = {
        name: value
        for name, value in deviations.items()
        if value > tolerances["gradient" if name.startswith(loose) else "loss"]
    }
    assert not too_far


class Problem(NamedTuple):
    """Image pairs; some classes are absent."""

    source: Tensor  # (N, D, h, w) float64
    target: Tensor  # (N, D, h', w') float64
    labels: Tensor  # (N, h, w)

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.source, self.target


def make_problem(
    images: int, channels: int, size: tuple[int, int], target_size: tuple[int, int], *, labelled: float, seed: int
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    maps = [
        (2 * torch.randn(images, channels, *cells, generator=generator, dtype=torch.float64)).requires_grad_()
        for cells in (size, target_size)
    ]
    occurring = torch.randint(0, 4, (4,), generator=generator)  # drawn with repetition: some are absent
    labels = occurring[torch.randint(0, 4, (images, *size), generator=generator)]
    labels[torch.rand(images, *size, generator=generator) >= labelled] = IGNORE_INDEX
    return Problem(*maps, labels)


side = st.integers(1, 5)
grid = st.tuples(side, side)
problems = st.builds(
    make_problem,
    images=st.integers(1, 3),
    channels=st.integers(3, 7),
    size=grid,
    target_size=grid,
    labelled=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 2**31),
)


def assert_same(actual: Tensor, expected: Tensor, inputs: tuple[Tensor, ...], direction: Tensor | None = None) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)
    ours, theirs = (
        torch.autograd.grad(value, inputs, direction, materialize_grads=True) for value in (actual, expected)
    )
    for own, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-7, atol=1e-8)


def assert_zero(loss: Tensor, inputs: tuple[Tensor, ...]) -> None:
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, inputs):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.usefixtures("form")
@settings(fast, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    problem=problems,
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    factor=st.sampled_from([0.3, 1.0, 4.0]),
    level=st.sampled_from(["features", "output"]),
)
def test_association_equals_its_definition(problem: Problem, weight: float, factor: float, level: str) -> None:
    name = {"features": "feature_association", "output": "output_association"}[level]
    knobs = {"aggregation_weight": weight, "temperature_factor": factor}
    actual = getattr(cycle_association, name)(*problem, **knobs)
    expected = getattr(literal, name)(*problem, **knobs)
    assert_same(actual, expected, problem.inputs)


@pytest.mark.usefixtures("form")
@settings(fast, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems, weight=st.sampled_from([0.0, 0.3, 1.0]), factor=st.sampled_from([0.3, 1.0, 4.0]))
def test_aggregation_equals_its_definition(problem: Problem, weight: float, factor: float) -> None:
    features = problem.target
    direction = torch.randn_like(features)

    def maps_first(rows: Tensor) -> Tensor:
        return rows.transpose(1, 2).reshape(features.shape)

    rows = literal.pixels_first(features)
    assert_same(
        aggregate_features(features, weight=weight, temperature_factor=factor),
        maps_first(literal.aggregate_features(rows, weight, factor)),
        (features,),
        direction,
    )
    assert_same(
        aggregate_probabilities(features.softmax(dim=1), weight=weight),
        maps_first(literal.aggregate_probabilities(rows.softmax(dim=2), weight)),
        (features,),
        direction,
    )
    with torch.no_grad():
        torch.testing.assert_close(
            aggregate_features(features, weight=weight), maps_first(literal.aggregate_features(rows, weight))
        )


@fast
@given(problem=problems, level=st.floats(0.5, 20.0))
def test_regulariser_equals_its_definition(problem: Problem, level: float) -> None:
    actual = overconfidence_regulariser(problem.source, level=level)
    assert_same(actual, literal.overconfidence_regulariser(problem.source, level), (problem.source,))


def test_one_class_and_one_pixel_cost_nothing_beyond_the_uniform_choice() -> None:
    pixel = make_problem(2, 3, (1, 1), (1, 1), labelled=1.0, seed=0)
    assert_zero(feature_association(*pixel), pixel.inputs)
    assert_zero(output_association(*pixel), pixel.inputs)
    one_class = make_problem(1, 1, (2, 3), (3, 3), labelled=1.0, seed=1)
    loss = output_association(one_class.source, one_class.target, torch.zeros_like(one_class.labels))
    assert loss.item() == pytest.approx(np.log(6) + np.log(9))
    for gradient in torch.autograd.grad(loss, one_class.inputs):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.usefixtures("form")
def test_rows_without_spread_have_no_gradient() -> None:
    source, target = (torch.ones(1, 5, 4, 4).requires_grad_() for _ in range(2))
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    for association in (feature_association, output_association):
        loss = association(source, target, labels)
        assert loss.item() == pytest.approx(2 * np.log(16), rel=1e-5)
        for gradient in torch.autograd.grad(loss, (source, target)):
            assert gradient.abs().max() < 1e-6


@pytest.mark.usefixtures("form")
def test_a_zero_feature_has_no_gradient() -> None:
    problem = make_problem(1, 4, (3, 3), (3, 4), labelled=1.0, seed=2)
    source, target = (values.detach().clone() for values in problem.inputs)
    source[..., 0, 0] = 0
    target[..., 1, 1] = 0
    inputs = (source.requires_grad_(), target.requires_grad_())
    loss = feature_association(*inputs, torch.zeros_like(problem.labels), aggregation_weight=0.0)
    by_source, by_target = torch.autograd.grad(loss, inputs)
    assert torch.equal(by_source[..., 0, 0], torch.zeros_like(by_source[..., 0, 0]))
    assert torch.equal(by_target[..., 1, 1], torch.zeros_like(by_target[..., 1, 1]))
    assert by_source.abs().max() > 0
    assert by_source.isfinite().all()


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("labelled", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["feature_association", "output_association"])
def test_a_gpu_waits_for_nothing_and_finds_the_same(
    name: str, labelled: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_similarity, "GPU_ENTRIES", 200)
    problem = make_problem(2, 5, (4, 5), (3, 6), labelled=labelled, seed=6)
    expected = getattr(literal, name)(*problem)
    gradients = torch.autograd.grad(expected, problem.inputs, materialize_grads=True)
    device = SimulatedDevice()
    device.put(problem)
    with device:
        loss = getattr(cycle_association, name)(*problem)
        found = torch.autograd.grad(loss, problem.inputs, materialize_grads=True)
    assert not device.waits
    torch.testing.assert_close((loss, *found), (expected, *gradients), rtol=1e-7, atol=1e-8)


@pytest.mark.usefixtures("form")
def test_no_valid_cycle_costs_nothing() -> None:
    problem = make_problem(2, 4, (3, 3), (2, 4), labelled=1.0, seed=3)
    ignored = torch.full_like(problem.labels, IGNORE_INDEX)
    lonely = ignored.clone()
    lonely[0, 0, 0] = 1  # returns to itself or, if not, to an ignored pixel
    for association in (feature_association, output_association):
        assert_zero(association(*problem.inputs, ignored), problem.inputs)
        assert association(*problem.inputs, lonely).isfinite()


@pytest.mark.usefixtures("form")
def test_cycles_are_averaged_over_the_batch_and_never_leave_their_pair() -> None:
    problem = make_problem(3, 5, (4, 4), (3, 5), labelled=0.7, seed=4)
    aggregated = aggregate_features(problem.target)
    counts = find_cycles(problem.source, aggregated, problem.labels, similarity="cosine").valid.sum(dim=1)
    alone = torch.stack([feature_association(*(values[n : n + 1] for values in problem)) for n in range(3)])
    assert counts.unique().numel() > 1
    torch.testing.assert_close(feature_association(*problem), (alone * counts).sum() / counts.sum())


def test_ignored_pixels_are_candidates_of_the_way_back() -> None:
    source = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]).T.reshape(1, 2, 1, 3)
    target = torch.tensor([[0.9, 0.1], [0.1, 1.0]]).T.reshape(1, 2, 1, 2)
    labels = torch.tensor([[[0, IGNORE_INDEX, 1]]])
    cycles = find_cycles(source, target, labels, similarity="cosine")
    assert cycles.middle.tolist() == [[0, 0, 1]]
    assert cycles.end.tolist() == [[1, 1, 2]]
    assert cycles.valid.tolist() == [[False, False, True]]


@pytest.mark.usefixtures("form")
def test_gradients_are_taken_at_once_and_scale_with_the_loss() -> None:
    problem = make_problem(2, 5, (3, 4), (4, 3), labelled=0.9, seed=5)
    for association in (feature_association, output_association):
        loss = association(*problem)
        once = torch.autograd.grad(loss, problem.inputs, retain_graph=True)
        thrice = torch.autograd.grad(3 * loss, problem.inputs)
        for first, second in zip(once, thrice, strict=True):
            torch.testing.assert_close(3 * first, second)
        with torch.no_grad():
            torch.testing.assert_close(association(*problem), loss.detach())
    aggregated = aggregate_features(problem.target).sum()
    again = [torch.autograd.grad(aggregated, problem.target, retain_graph=True)[0] for _ in range(2)]
    torch.testing.assert_close(*again)


@pytest.mark.usefixtures("form")
def test_half_precision_and_autocast_compute_in_float32() -> None:
    problem = make_problem(1, 8, (4, 4), (4, 5), labelled=1.0, seed=6)
    half = tuple(values.detach().bfloat16().requires_grad_() for values in problem.inputs)
    wide = tuple(values.detach().float().requires_grad_() for values in half)
    for association in (feature_association, output_association):
        expected = association(*wide, problem.labels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = association(*half, problem.labels)
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)
        for ours, theirs in zip(torch.autograd.grad(actual, half), torch.autograd.grad(expected, wide), strict=True):
            torch.testing.assert_close(ours, theirs.bfloat16(), rtol=2e-2, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(aggregate_features(half[0]), aggregate_features(wide[0]))


def test_settings_and_sizes_that_do_not_fit_are_named() -> None:
    problem = make_problem(1, 4, (2, 2), (2, 2), labelled=1.0, seed=7)
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 2\) \(N, D, h, w\), \(1, 3, 2, 2\)"):
        feature_association(problem.source, problem.target[:, :3], problem.labels)
    with pytest.raises(ValueError, match=r"aggregation weight must lie in \[0, 1\], but got 1.5"):
        feature_association(*problem, aggregation_weight=1.5)
    with pytest.raises(ValueError, match="`temperature_factor` must be positive, but got 0"):
        output_association(*problem, temperature_factor=0.0)
    with pytest.raises(ValueError, match="`floor` must be positive, but got 0"):
        aggregate_probabilities(problem.source.softmax(dim=1), floor=0.0)
    with pytest.raises(ValueError, match="`level` must be positive, but got -1"):
        overconfidence_regulariser(problem.source, level=-1.0)


# Two workers. Each holds a part of the joined batch; data parallelism averages what they compute.

PARTS = (slice(0, 1), slice(1, 3))


def values_and_gradients(part: slice) -> dict[str, Tensor]:
    problem = make_problem(3, 5, (4, 4), (3, 5), labelled=0.7, seed=4)
    source, target = (values.detach()[part].clone().requires_grad_() for values in problem.inputs)
    losses = {
        "features": feature_association(source, target, problem.labels[part]),
        "output": output_association(source, target, problem.labels[part]),
        "regulariser": overconfidence_regulariser(target),
        "nothing valid": feature_association(source, target, torch.full_like(problem.labels[part], IGNORE_INDEX)),
    }
    results = {}
    for name, loss in losses.items():
        results[f"{name} value"] = loss.detach()
        gradients = torch.autograd.grad(loss, (source, target), materialize_grads=True)
        results[f"{name} gradient"], results[f"{name} target gradient"] = gradients
    return results


def run_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(values_and_gradients(PARTS[rank]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_equal_one_on_the_joined_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, expected in values_and_gradients(slice(None)).items():
        joined = first[name] + second[name] if name.endswith("value") else torch.cat([first[name], second[name]])
        torch.testing.assert_close(joined / 2, expected, msg=lambda text, at=name: f"{at}: {text}")


# The method on a toy network.

SUPERVISED = {"cross_entropy", "lovasz"}
ADAPTING = {"feature_association", "output_association", "regulariser_source", "regulariser_target"}


def toy_method(**values: float) -> PLCA:
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=4, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    )
    segmenter = Segmenter(backbone, torch.nn.Conv2d(8, 3, 1), feature_channels=8, num_classes=3)
    return PLCA(segmenter, PLCA.Config(**values), WarmupConfig())


def toy_batch(step: int, *, labelled: bool = True) -> DomainBatch:
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 3, (2, 4, 4), generator=generator).repeat_interleave(6, 1).repeat_interleave(6, 2)
    images = [labels[:, None] + 0.3 * torch.randn(2, 3, 24, 24, generator=generator) + shift for shift in (0.0, 0.4)]
    if not labelled:
        labels = torch.full_like(labels, IGNORE_INDEX)
    return DomainBatch(source_images=images[0], source_labels=labels, target_images=images[1])


@pytest.mark.parametrize(
    "values", [{}, {"grid_scale": 0.5, "grid_share": 0.6}, {"aggregation_weight": 0.0, "temperature_factor": 0.5}]
)
def test_method_trains_every_parameter_with_finite_named_terms(values: dict[str, float]) -> None:
    method = toy_method(**values)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    method.train()
    losses = []
    for step in range(8):
        terms = method(toy_batch(step), step)
        assert set(terms) == SUPERVISED | ADAPTING
        assert all(term.isfinite() and term.ndim == 0 for term in terms.values())
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        for name, parameter in method.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0 or name.endswith("0.bias"), name  # normalised away
        optimizer.step()
        losses.append(sum(terms[name].item() for name in SUPERVISED))
    assert losses[-1] < losses[0]


def test_method_survives_a_batch_without_labels() -> None:
    method = toy_method()
    terms = method(toy_batch(0, labelled=False), 0)
    torch.stack(list(terms.values())).sum().backward()
    for name in SUPERVISED | {"feature_association", "output_association"}:
        assert terms[name].item() == 0, name
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


def test_weights_of_zero_and_the_output_level_leave_their_terms_out() -> None:
    assert set(toy_method(output_level=False)(toy_batch(0), 0)) == SUPERVISED | {"feature_association"}
    nothing = {
        "feature_association_weight": 0.0,
        "output_association_weight": 0.0,
        "lovasz_weight": 0.0,
        "regulariser_weight": 0.0,
    }
    assert set(toy_method(**nothing)(toy_batch(0), 0)) == {"cross_entropy"}
    terms, doubled = (
        toy_method(regulariser_weight=weight)(toy_batch(0), 0)["regulariser_source"] for weight in (0.01, 0.02)
    )
    torch.testing.assert_close(2 * terms, doubled)


def test_adaptation_upsamples_without_aligned_corners_and_the_warm_up_as_the_network_says() -> None:
    method, batch = toy_method().eval(), toy_batch(0)
    logits = method.segmenter(batch.source_images).logits
    for terms, aligned in (
        (method(batch, 0), False),
        (method(DomainBatch(batch.source_images, batch.source_labels, None), 0), True),
    ):
        upsampled = F.interpolate(logits, size=(24, 24), mode="bilinear", align_corners=aligned)
        torch.testing.assert_close(terms["cross_entropy"], F.cross_entropy(upsampled, batch.source_labels))


def test_plan_begins_with_the_shared_warm_up() -> None:
    assert PLCA.plan(PLCA.Config()) == (SOURCE_ONLY, ADAPT)


def test_deployed_network_shares_the_trained_parts_and_does_not_align_corners() -> None:
    method = toy_method().eval()
    images = toy_batch(0).source_images
    output, plain = method.deployed(images), method.segmenter(images)
    assert torch.equal(output.logits, plain.logits)
    torch.testing.assert_close(
        method.deployed.upsample(output.logits, (24, 24)),
        F.interpolate(plain.logits, size=(24, 24), mode="bilinear", align_corners=False),
    )
    assert method.deployed in method.children()
    assert set(method.deployed.state_dict()) == set(method.segmenter.state_dict())
    assert {name.split(".")[0] for name, _ in method.named_parameters()} == {"segmenter"}


def test_deployed_network_can_aggregate_features_and_then_probabilities() -> None:
    method = toy_method(inference_aggregation=0.5).eval()
    images = toy_batch(0).target_images
    with torch.no_grad():
        output = method.deployed(images)
        features = aggregate_features(method.segmenter.backbone(images), weight=0.5)
        probabilities = aggregate_probabilities(method.segmenter.head(features).softmax(dim=1), weight=0.5)
        upsampled = F.interpolate(probabilities, size=(24, 24), mode="bilinear", align_corners=False)
        torch.testing.assert_close(output.features, features)
        torch.testing.assert_close(output.logits.softmax(dim=1), probabilities)
        torch.testing.assert_close(method.deployed.upsample(output.logits, (24, 24)).softmax(dim=1), upsampled)


def test_method_continues_exactly_from_its_state() -> None:
    method, resumed = toy_method(), toy_method()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1)
    method.train()
    method(toy_batch(0), 0)
    resumed.load_state_dict(method.state_dict())
    resumed.train()
    expected, actual = method(toy_batch(1), 1), resumed(toy_batch(1), 1)
    for name, term in expected.items():
        assert torch.equal(term, actual[name]), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"aggregation_weight": 1.2}, r"method.aggregation_weight must lie in \[0, 1\], but got 1.2"),
        ({"temperature_factor": 0.0}, "method.temperature_factor must be positive, but got 0.0"),
        ({"lovasz_weight": -1.0}, "method.lovasz_weight must not be negative, but got -1.0"),
        ({"grid_scale": 0.0}, r"method.grid_scale must lie in \(0, 1\], but got 0.0"),
    ],
)
def test_settings_out_of_range_are_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PLCA.Config(**values)


@pytest.mark.parametrize("name", ["compact", "lraspp_mobilenet_v3_large"])
def test_an_aggregating_network_predicts_as_its_parts_do(name: str) -> None:
    torch.manual_seed(0)
    segmenter = build_segmenter(name, 5).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        plain = AggregatingSegmenter(segmenter, 0.0, 1.0, 1e-6).eval()(images)
        torch.testing.assert_close(plain.logits, segmenter(images).logits)
        mixed = AggregatingSegmenter(segmenter, 1e-6, 1.0, 1e-6).eval()(images)
        torch.testing.assert_close(mixed.logits.softmax(1), plain.logits.softmax(1), atol=1e-4, rtol=1e-4)
