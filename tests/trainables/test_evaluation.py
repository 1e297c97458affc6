"""Promises of evaluation: what is averaged, at which size it is counted, and how much of a set is held at a time."""

import math
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segadapt.trainables.core.data.batch import IGNORE_INDEX, ClassList
from segadapt.trainables.core.evaluation.evaluate import Protocol, evaluate_domain, score
from segadapt.trainables.core.evaluation.inference import Inference, mean_probabilities, predict, views
from segadapt.trainables.core.evaluation.metrics import confusion_matrix
from segadapt.trainables.core.networks import Segmenter, SegmenterOutput
from segadapt.trainables.core.training.config import TrainerConfig

CLASSES = ClassList(("road", "sky", "car"), ((1, 1, 1), (2, 2, 2), (3, 3, 3)))
CPU = torch.device("cpu")


class FunctionSegmenter(Segmenter):
    """A network whose logits are any function of normalised images, at a quarter of their size or at all of it."""

    def __init__(self, logits_of: "nn.Module", num_classes: int = 3) -> None:
        super().__init__(nn.Identity(), logits_of, feature_channels=3, num_classes=num_classes)

    def forward(self, images: Tensor) -> SegmenterOutput:
        return SegmenterOutput(self.head(images), images)


def pointwise() -> Segmenter:
    """Commutes with every flip: a 1x1 convolution."""
    torch.manual_seed(0)
    return FunctionSegmenter(nn.Conv2d(3, 3, 1)).requires_grad_(False).eval()


class Constant(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.tensor([0.5, 2.0, -1.0]).view(1, 3, 1, 1).expand(len(images), 3, *images.shape[-2:])


class ByWidth(nn.Module):
    """Class 0 in images of 8 columns, with confidence; class 1 in wider ones, with less."""

    def forward(self, images: Tensor) -> Tensor:
        logits = [3.0, 0.0, 0.0] if images.shape[-1] == 8 else [0.0, 1.0, 0.0]
        return torch.tensor(logits).view(1, 3, 1, 1).expand(len(images), 3, *images.shape[-2:])


class LeftIsRoad(nn.Module):
    """Class 0 on the left half whatever is there, else class 1."""

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), 3, *images.shape[-2:])
        half = images.shape[-1] // 2
        logits[:, 0, :, :half] = 2.0
        logits[:, 1, :, half:] = 1.0
        return logits


def some_images(count: int = 2, height: int = 6, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def test_once_is_the_arg_max_of_upsampled_logits() -> None:
    network, images = pointwise(), some_images()
    logits = network(network.normalise(images)).logits
    expected = F.interpolate(logits, size=(12, 16), mode="bilinear", align_corners=True).argmax(1)
    assert torch.equal(predict(network, images, (12, 16)), expected)


@pytest.mark.parametrize("align_corners", [True, False])
def test_flipping_changes_nothing_for_an_equivariant_network(align_corners: bool) -> None:
    network, images = pointwise(), some_images()
    network.align_corners = align_corners
    plain, flipped = (views(network, images, Inference(flip=flip)) for flip in (False, True))
    assert len(flipped) == 2
    torch.testing.assert_close(flipped[1], plain[0])
    torch.testing.assert_close(
        mean_probabilities(network, flipped, (12, 16)), mean_probabilities(network, plain, (12, 16))
    )


def test_flipping_takes_the_side_out_of_a_network_that_prefers_one() -> None:
    network = FunctionSegmenter(LeftIsRoad())
    probabilities = mean_probabilities(network, views(network, some_images(), Inference(flip=True)), (6, 8))
    torch.testing.assert_close(probabilities, probabilities.flip(-1))
    left, right = torch.tensor([2.0, 0.0, 0.0]).softmax(0), torch.tensor([0.0, 1.0, 0.0]).softmax(0)
    torch.testing.assert_close(probabilities[0, :, 3, 1], (left + right) / 2)


def test_a_constant_predictor_says_the_same_at_all_scales() -> None:
    network = FunctionSegmenter(Constant())
    answers = views(network, some_images(), Inference(scales=(0.5, 1.0, 1.75), flip=True))
    assert [tuple(answer.shape[-2:]) for answer in answers] == [(3, 4), (3, 4), (6, 8), (6, 8), (10, 14), (10, 14)]
    expected = torch.tensor([0.5, 2.0, -1.0]).softmax(0).view(1, 3, 1, 1).expand(2, 3, 12, 16)
    torch.testing.assert_close(mean_probabilities(network, answers, (12, 16)), expected)


def test_scales_average_probabilities_not_votes_or_logits() -> None:
    network = FunctionSegmenter(ByWidth())
    inference = Inference(scales=(1.0, 1.5, 2.0))
    confident, unsure = torch.tensor([3.0, 0.0, 0.0]).softmax(0), torch.tensor([0.0, 1.0, 0.0]).softmax(0)
    expected = (confident + 2 * unsure) / 3
    probabilities = mean_probabilities(network, views(network, some_images(), inference), (6, 8))
    torch.testing.assert_close(probabilities[0, :, 0, 0], expected)
    assert (predict(network, some_images(), (6, 8), inference) == expected.argmax()).all()
    assert expected.argmax() == 0, "two of three votes are for class 1"


class Seen(nn.Module):
    """Remembers the sizes it was shown; answers with the image itself."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(tuple(images.shape[-2:]))
        return images


def test_windows_of_a_pixelwise_network_add_up_to_the_whole_image() -> None:
    seen = Seen()
    network, images = FunctionSegmenter(seen), some_images(height=11, width=7)
    whole = views(network, images, Inference(flip=True))
    slid = views(network, images, Inference(flip=True, window=(4, 32)))
    assert seen.sizes[2:] == [(4, 7)] * 10, "five windows of at most the image's width, overlapping, and mirrored"
    for one, other in zip(whole, slid, strict=True):
        torch.testing.assert_close(other, one)


def test_a_window_that_holds_the_image_shows_it_whole() -> None:
    torch.manual_seed(0)
    network, images = FunctionSegmenter(nn.Conv2d(3, 3, 3, stride=2, padding=1)), some_images()
    for window in ((64, 64), (6, 8)):
        (logits,) = views(network, images, Inference(window=window, stride=(1, 2)))
        assert torch.equal(logits, views(network, images)[0])


def test_windows_stand_as_far_apart_as_asked_and_the_last_ends_with_the_image() -> None:
    seen = Seen()
    network, images = FunctionSegmenter(seen), some_images(count=1, height=6, width=9)
    (whole,) = views(network, images)
    (slid,) = views(network, images, Inference(window=(6, 4), stride=(1, 2)))
    assert seen.sizes[1:] == [(6, 4)] * 4, "from columns 0, 2, 4 and 5"
    torch.testing.assert_close(slid, whole)


def test_a_window_has_its_size_at_every_scale() -> None:
    seen = Seen()
    views(FunctionSegmenter(seen), some_images(), Inference(scales=(0.5, 2.0), window=(8, 8), stride=(8, 8)))
    assert seen.sizes == [(3, 4), *[(8, 8)] * 4], "an image of 6x8 fits one at half its size"


@pytest.mark.parametrize(("window", "stride"), [(None, (4, 4)), ((8, 8), (9, 8)), ((8, 8), (8, 9)), ((8, 8), (0, 4))])
def test_a_stride_that_leaves_gaps_between_windows_is_refused(window: Any, stride: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"eval_stride must be at least 1 and at most trainer\.eval_window, which is"):
        Inference(window=window, stride=stride)
    with pytest.raises(ValueError, match=r"eval_stride must be at least 1 and at most trainer\.eval_window, which is"):
        TrainerConfig(eval_window=window, eval_stride=stride)


def test_overlapping_windows_average_logits_by_how_many_saw_a_pixel() -> None:
    network, images = FunctionSegmenter(LeftIsRoad()), some_images(count=1, width=8)
    (logits,) = views(network, images, Inference(window=(6, 6)))  # of columns 0 to 5 and 2 to 7, three are road in each
    assert logits[0, 0, 0].tolist() == [2, 2, 2, 1, 1, 0, 0, 0]
    assert logits[0, 1, 0].tolist() == [0, 0, 0, 0.5, 0.5, 1, 1, 1]


@pytest.mark.parametrize(
    ("scales", "message"),
    [((), "at least one scale"), ((1.0, 1.0), "must differ"), ((0.0,), r"lie in \[0.1, 10\]"), ((math.nan,), "lie in")],
)
def test_wrong_scales_are_refused(scales: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Inference(scales=scales)


def test_the_options_are_stated() -> None:
    assert str(Inference()) == "single scale, no flip"
    assert str(Inference(scales=(0.75, 1.0), flip=True)) == "scales 0.75 1, flip"
    assert str(Inference(window=(512, 1024))) == "single scale, no flip, windows of 512x1024"
    assert str(Inference(window=(8, 9), stride=(4, 5))) == "single scale, no flip, windows of 8x9 every 4x5"


def test_a_subset_drops_true_pixels_of_other_classes_and_keeps_predictions_of_them_as_misses() -> None:
    counts = torch.tensor([[6, 2, 1], [1, 3, 0], [5, 5, 9]])
    road = 6 / (6 + 2 + 1 + 1)  # the 5 pixels of car that are called road count nowhere
    sky = 3 / (3 + 1 + 2)
    protocol = Protocol("miou_2", frozenset({"road", "sky"}), frozenset({"road", "sky"}))
    found = score(counts, CLASSES.names, protocol)
    assert found.iou == {"road": road, "sky": sky}
    assert found.miou == (road + sky) / 2
    assert found.metrics("target_val", protocol) == {
        "target_val/miou_2": found.miou,
        "target_val/iou/road": road,
        "target_val/iou/sky": sky,
    }
    narrower = score(counts, CLASSES.names, Protocol("miou_1", frozenset({"road", "sky"}), frozenset({"road"})))
    assert narrower.iou == {"road": road}, "what is counted but not averaged still takes part"


def test_absent_classes_are_left_out_of_the_mean_and_of_the_metrics() -> None:
    everything = Protocol("miou", None, None)
    found = score(torch.tensor([[4, 0, 0], [0, 0, 0], [2, 0, 2]]), CLASSES.names, everything)
    assert math.isnan(found.iou["sky"])
    assert found.miou == (4 / 6 + 2 / 4) / 2
    assert "target_val/iou/sky" not in found.metrics("target_val", everything)
    assert (
        score(torch.zeros(3, 3, dtype=torch.int64), CLASSES.names, everything).metrics("target_val", everything) == {}
    )


class GeneratedImages:
    """Made when asked for; knows how many of those it gave away are still held by anybody."""

    def __init__(self, label_sizes: Sequence[tuple[int, int]]) -> None:
        self.ids = [f"image_{index}" for index in range(len(label_sizes))]
        self.label_sizes = label_sizes
        self.held: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most_held = 0

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> Tensor:
        return self._given(some_images(1)[0].roll(index, -1))

    def label(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        label = torch.randint(0, 3, self.label_sizes[index], generator=generator, dtype=torch.uint8)
        label[0] = IGNORE_INDEX
        return self._given(label)

    def _given(self, value: Tensor) -> Tensor:
        self.held.add(value)
        self.most_held = max(self.most_held, len(self.held))
        return value


@pytest.mark.parametrize("threads", [0, 2])
def test_labels_of_unlike_size_are_counted_at_their_own(threads: int) -> None:
    network, images = pointwise(), GeneratedImages([(6, 8), (12, 16), (9, 9), (6, 8), (30, 40)])
    seen: dict[str, Tensor] = {}
    found = evaluate_domain(network, images, CLASSES, CPU, 3, threads=threads, see=seen.__setitem__)
    expected = torch.zeros(3, 3, dtype=torch.int64)
    for index, size in enumerate(images.label_sizes):
        prediction = predict(network, images.image(index)[None], size)[0]
        assert torch.equal(seen[images.ids[index]], prediction)
        expected += confusion_matrix(prediction, images.label(index), 3)
    assert torch.equal(found.confusion, expected)
    assert list(seen) == images.ids


@pytest.mark.parametrize("threads", [0, 2])
def test_what_is_held_does_not_grow_with_the_set(threads: int) -> None:
    held = []
    for count in (20, 80):
        images = GeneratedImages([(6, 8)] * count)
        evaluate_domain(pointwise(), images, CLASSES, CPU, 4, threads=threads)
        held.append(images.most_held)
    ahead = 4 + 2 * threads + 1 if threads else 1  # images of the next batch, labels, and what is being made
    assert all(most <= 4 + ahead + 4 for most in held), held
    assert len(images.held) == 0


def test_scales_and_flip_reach_the_evaluation_of_a_set() -> None:
    images = GeneratedImages([(6, 8)] * 3)
    plain, averaged = (
        evaluate_domain(FunctionSegmenter(LeftIsRoad()), images, CLASSES, CPU, 2, inference=Inference(flip=flip))
        for flip in (False, True)
    )
    assert plain.confusion.sum() == averaged.confusion.sum() == 3 * 5 * 8
    assert not torch.equal(plain.confusion, averaged.confusion)
