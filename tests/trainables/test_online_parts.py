"""Promises of the parts of online self-training: values and gradients of the released code, and what it leaves open."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.data.sampling import RareClassOrder, rare_class_probabilities
from segadapt.trainables.core.losses.feature_distance import feature_distance, pure_labels
from segadapt.trainables.core.losses.segmentation import segmentation_cross_entropy, weighted_cross_entropy
from segadapt.trainables.core.online.class_mix import class_masks, class_mix, draw_classes
from segadapt.trainables.core.online.masking import block_mask, mask_grid, mask_tokens
from segadapt.trainables.core.online.pseudo_labels import weighted_pseudo_labels
from segadapt.trainables.core.state.mean_teacher import MeanTeacher, warmed_momentum

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {torch.float64: (1e-9, 1e-9), torch.float32: (2e-6, 3e-5)}
"""Of values and gradients, against the largest of them."""


class Golden:
    """Inputs and results of the released code, in a precision."""

    def __init__(self, name: str, precision: torch.dtype = torch.float64) -> None:
        self.arrays = np.load(GOLDEN / f"online_{name}.npz")
        self.precision = precision

    def __getitem__(self, name: str) -> Any:
        value = torch.from_numpy(np.array(self.arrays[name]))
        if value.ndim == 0 and name.startswith("cfg_"):
            return value.item()
        return value.to(self.precision) if value.is_floating_point() else value

    def indices(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.arrays[name])).long()

    def near(self, name: str, actual: Tensor, *, gradient: bool = False) -> None:
        expected = torch.from_numpy(np.array(self.arrays[name])).to(torch.float64)
        tolerance = TOLERANCE[self.precision][gradient] * (expected.abs().max().item() or 1)
        torch.testing.assert_close(actual.detach().to(torch.float64), expected, rtol=0, atol=tolerance)


precisions = pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=["float64", "float32"])


class Student(nn.Module):
    def __init__(self, golden: Golden, run: int) -> None:
        super().__init__()
        for name in ("w", "b", "s"):
            self.register_parameter(name, nn.Parameter(golden[f"in_r{run}_teacher_{name}"]))
        self.register_buffer("buf", golden[f"in_r{run}_teacher_buf"])


@precisions
@pytest.mark.parametrize("run", range(4))
def test_a_teacher_follows_as_in_the_released_code(run: int, precision: torch.dtype) -> None:
    golden = Golden("1_ema", precision)
    student = Student(golden, run)
    teacher = MeanTeacher(student)
    for index, step in enumerate(golden.indices(f"in_r{run}_t").tolist()):
        for name in ("w", "b", "s"):
            getattr(student, name).data = golden[f"in_r{run}_student_{name}"][index]
        momentum = warmed_momentum(step, golden[f"cfg_r{run}_alpha"])
        assert momentum == pytest.approx(golden.arrays[f"exp_r{run}_alpha_t"][index], rel=1e-12)
        teacher.follow(student, momentum=momentum)
        for name in ("w", "b", "s"):
            actual, expected = getattr(teacher.network, name), golden[f"exp_r{run}_{name}"][index]
            tolerance = TOLERANCE[precision][0] * expected.abs().max().item()
            torch.testing.assert_close(actual.detach(), expected.to(precision), rtol=0, atol=tolerance)


def test_the_momentum_begins_with_a_copy() -> None:
    assert [warmed_momentum(step, 0.999) for step in (0, 1, 999, 5000)] == [0, 0.5, 0.999, 0.999]


@precisions
@pytest.mark.parametrize("case", ["2_pseudo", "2b_pseudo_single"])
def test_pseudo_labels_and_their_weights_are_those_of_the_released_code(case: str, precision: torch.dtype) -> None:
    golden = Golden(case, precision)
    size = (golden["cfg_H"], golden["cfg_W"])
    probabilities = F.interpolate(golden["in_logits_small"], size, mode="bilinear").softmax(1)
    margin = torch.ones(len(probabilities), *size, dtype=torch.bool)
    margin[:, : golden["cfg_top"]] = False
    margin[:, size[0] - golden["cfg_bottom"] :] = False
    for quality in ("batch", "image"):
        for name, trusted in (("margin", margin), ("mask", golden["in_valid_mask"][:, 0].bool())):
            labels, weights = weighted_pseudo_labels(probabilities, golden["cfg_tau"], quality=quality, trusted=trusted)
            assert torch.equal(labels, golden.indices("exp_label"))
            golden.near(f"exp_weight_{quality}_{name}", weights)
        q = weighted_pseudo_labels(probabilities, golden["cfg_tau"], quality=quality).weights[:, 0, 0]
        golden.near(f"exp_q_{quality}", q if quality == "image" else q[0])


def test_a_probability_at_the_threshold_is_confident_and_none_makes_all_weights_zero() -> None:
    probabilities = torch.tensor([0.75, 0.25]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    assert weighted_pseudo_labels(probabilities, 0.75).weights.unique().tolist() == [1]
    assert weighted_pseudo_labels(probabilities, 0.76).weights.unique().tolist() == [0]


@pytest.mark.parametrize("classes_of", ["batch", "image"])
def test_mixes_are_those_of_the_released_code(classes_of: Any) -> None:
    golden = Golden("3_classmix", torch.float32)
    labels, choices = golden.indices("in_label"), golden.indices(f"in_{classes_of}_choice")
    released = classes_of == "batch"
    ours = draw_classes(labels, torch.rand(len(labels), 256), classes_of=classes_of, paste_ignored=released)
    assert ours.sum(1).tolist() == [int((choice >= 0).sum()) for choice in choices]
    drawn = torch.zeros(len(labels), 256, dtype=torch.bool)
    for row, choice in zip(drawn, choices, strict=True):
        row[choice[choice >= 0]] = True
    masks = class_masks(labels, drawn)
    assert torch.equal(masks, golden[f"exp_{classes_of}_mask"].bool())
    inputs = (labels, golden["in_tgt"], golden.indices("in_pseudo"), golden["in_pseudo_weight"])
    for ignored_weight, name in ((1.0, "weight"), (0.0, "weight_vfm")):
        mixed = class_mix(masks, golden["in_src"], *inputs, ignored_weight=ignored_weight)
        assert torch.equal(mixed.images, golden[f"exp_{classes_of}_img"])
        assert torch.equal(mixed.labels, golden.indices(f"exp_{classes_of}_label"))
        assert torch.equal(mixed.weights, golden[f"exp_{classes_of}_{name}"])


def test_half_of_an_images_classes_rounded_up_is_drawn_and_255_never() -> None:
    labels = torch.tensor([[[0, 1, 2, 255]], [[4, 4, 4, 4]], [[255, 255, 255, 255]]])
    drawn = draw_classes(labels, torch.rand(3, 256))
    assert drawn.sum(1).tolist() == [2, 1, 0]
    assert not drawn[0, 3:].any()
    masks = class_masks(labels, drawn)
    assert masks.flatten(1).sum(1).tolist() == [2, 4, 0]
    seen = {tuple(draw_classes(labels[:1], torch.rand(1, 256))[0].nonzero()[:, 0].tolist()) for _ in range(60)}
    assert seen == {(0, 1), (0, 2), (1, 2)}
    assert draw_classes(labels[2:], torch.rand(1, 256), paste_ignored=True)[0].nonzero().tolist() == [[IGNORE_INDEX]]


@precisions
@pytest.mark.parametrize("case", ["4_wce", "4b_wce_samesize", "4c_wce_shrink"])
@pytest.mark.parametrize("mean_over", ["all", "valid"])
@pytest.mark.parametrize("weighted", [True, False])
def test_weighted_cross_entropy_is_that_of_the_released_code(
    case: str, mean_over: Any, weighted: bool, precision: torch.dtype
) -> None:
    golden = Golden(case, precision)
    logits = golden["in_logits"].requires_grad_()
    labels = golden.indices("in_label")
    upsampled = F.interpolate(logits, labels.shape[-2:], mode="bilinear")
    loss = weighted_cross_entropy(upsampled, labels, golden["in_weight"] if weighted else None, mean_over=mean_over)
    name = f"exp_{'weighted' if weighted else 'plain'}_{mean_over}"
    golden.near(name, loss)
    loss.backward()
    assert logits.grad is not None
    golden.near(f"{name}_grad", logits.grad, gradient=True)


def test_without_weights_the_mean_over_valid_pixels_is_plain_cross_entropy() -> None:
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    labels[0] = IGNORE_INDEX
    plain = segmentation_cross_entropy(logits, labels)
    assert torch.equal(weighted_cross_entropy(logits, labels, mean_over="valid"), plain)
    assert torch.equal(weighted_cross_entropy(logits, labels), plain / 2)


@pytest.mark.parametrize("mean_over", ["all", "valid"])
def test_weights_of_zero_and_labels_of_255_give_no_gradient(mean_over: Any) -> None:
    logits = torch.randn(1, 3, 2, 4, requires_grad=True)
    labels = torch.tensor([[[0, 1, 255, 2], [255, 255, 1, 0]]])
    weights = torch.tensor([[[0.0, 1, 1, 0], [1, 1, 1, 0]]])
    weighted_cross_entropy(logits, labels, weights, mean_over=mean_over).backward()
    assert logits.grad is not None
    reached = logits.grad.abs().sum(1) > 0
    assert torch.equal(reached, (weights > 0) & (labels != 255))
    empty = weighted_cross_entropy(logits, torch.full_like(labels, 255), weights, mean_over=mean_over)
    assert empty.item() == 0
    (gradient,) = torch.autograd.grad(empty, logits)
    assert not gradient.any()


@pytest.mark.parametrize("index", range(3))
def test_probabilities_of_rare_classes_are_those_of_the_released_code(index: int) -> None:
    golden = Golden("5_rcs")
    temperature = golden["cfg_temperatures"][index].item()
    ours = rare_class_probabilities(golden["in_counts"].long(), temperature)
    torch.testing.assert_close(ours, golden["exp_prob"][index], rtol=1e-9, atol=1e-15)


def test_draws_follow_the_probabilities_and_show_enough_of_their_class() -> None:
    counts = torch.tensor([[900, 90, 0], [900, 2, 0], [0, 400, 0]])
    order = RareClassOrder(counts, ("seed", 1), temperature=0.5, min_pixels=50)
    expected = rare_class_probabilities(counts, 0.5)
    draws = [order.at(position) for position in range(4000)]
    assert draws[:50] == [RareClassOrder(counts, ("seed", 1), temperature=0.5, min_pixels=50).at(p) for p in range(50)]
    shares = torch.tensor([sum(drawn == c for _, drawn in draws) for c in range(3)]) / len(draws)
    deviation = (expected * (1 - expected) / len(draws)).sqrt()
    assert ((shares - expected).abs() <= 4 * deviation).all()
    assert shares[2] == 0
    assert all(counts[image, drawn] > 50 for image, drawn in draws)
    assert {image for image, drawn in draws if drawn == 1} == {0, 2}


def test_a_class_that_no_image_shows_enough_of_is_drawn_where_there_is_any() -> None:
    order = RareClassOrder(torch.tensor([[900, 3], [900, 0]]), ("k",), temperature=0.1, min_pixels=50)
    assert {order.at(position) for position in range(40) if order.at(position)[1] == 1} == {(0, 1)}
    with pytest.raises(ValueError, match="none shows a trained class"):
        RareClassOrder(torch.zeros(2, 3, dtype=torch.int64), ("k",), temperature=0.1, min_pixels=1)


@precisions
@pytest.mark.parametrize("case", ["6_fd", "6b_fd_empty"])
def test_feature_distance_is_that_of_the_released_code(case: str, precision: torch.dtype) -> None:
    golden = Golden(case, precision)
    features = golden["in_feat"].requires_grad_()
    labels, things = golden.indices("in_label"), golden.indices("cfg_things").tolist()
    options = {"num_classes": golden["cfg_C"], "purity": golden["cfg_purity"]}
    cells = pure_labels(labels, (features.shape[-2], features.shape[-1]), **options)
    assert torch.equal(cells, golden.indices("exp_label_small"))
    loss = feature_distance(features, golden["in_feat_frozen"], labels, things=things, **options)
    golden.near("exp_loss", loss)
    (golden["cfg_lambda"] * loss).backward()
    assert features.grad is not None
    golden.near("exp_grad", features.grad, gradient=True)


def test_cells_whose_features_agree_give_no_gradient() -> None:
    features = torch.randn(1, 4, 2, 2, requires_grad=True)
    labels = torch.full((1, 8, 8), 11)
    feature_distance(features, features.detach().clone(), labels, num_classes=19).backward()
    assert features.grad is not None
    assert not features.grad.any()


@precisions
@pytest.mark.parametrize("case", ["7_block", "7b_block_halfgrid", "7c_block_coarse"])
def test_masks_and_their_loss_are_those_of_the_released_code(case: str, precision: torch.dtype) -> None:
    golden = Golden(case, precision)
    shown = golden["in_img"]
    size = (shown.shape[-2], shown.shape[-1])
    draws = golden["in_u"]
    assert mask_grid(len(shown), size, golden["cfg_block"]) == tuple(draws.shape)
    mask = block_mask(size, golden["cfg_block"], golden["cfg_ratio"], draws)
    assert torch.equal(mask[:, 0], golden["exp_mask"].bool())
    assert torch.equal(shown * mask, golden["exp_img"])
    logits = golden["in_logits_masked"].requires_grad_()
    upsampled = F.interpolate(logits, size, mode="bilinear")
    loss = golden["cfg_lambda"] * weighted_cross_entropy(upsampled, golden.indices("in_pseudo"), golden["in_weight"])
    golden.near("exp_loss", loss)
    loss.backward()
    assert logits.grad is not None
    golden.near("exp_grad", logits.grad, gradient=True)


def test_the_share_of_kept_blocks_is_what_the_ratio_leaves() -> None:
    draws = torch.rand(mask_grid(64, (512, 512), 32), generator=torch.Generator().manual_seed(0))
    mask = block_mask((512, 512), 32, 0.7, draws)
    assert mask.float().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / draws.numel()))
    assert mask_grid(1, (4, 4), 32) == (1, 1, 1, 1)


@precisions
def test_tokens_are_replaced_as_in_the_released_code(precision: torch.dtype) -> None:
    golden = Golden("8_vfm_tokens", precision)
    replaced = mask_tokens(golden["in_tokens"], golden["in_mask_token"], golden["cfg_ratio"], golden["in_u"])
    assert torch.equal(replaced, golden["exp_tokens"])
