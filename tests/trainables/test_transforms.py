"""Promises of training samples: image and label stay together, and seed and position alone decide what is seen."""

import hashlib
import math
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import toy_config, toy_trainer

from segadapt.platform.errors import UsageError
from segadapt.platform.settings.config import resolve
from segadapt.platform.storage.stage_keys import stage_keys
from segadapt.trainables.core import distributed
from segadapt.trainables.core.data.batch import ClassList, DomainBatch, DomainData, EvaluationData
from segadapt.trainables.core.data.loading import BatchSource, evaluation_for_network, one_pass
from segadapt.trainables.core.data.sampling import (
    ClassBalancedOrder,
    class_counts,
    generator,
    in_threads,
    label_counts,
    rare_shown,
)
from segadapt.trainables.core.data.transforms import (
    PAD_COLOR,
    AugmentationConfig,
    Geometry,
    draw_geometry,
    resized,
    resized_for_network,
    resized_label,
    vary_color,
)
from segadapt.trainables.core.labelling.files import PseudoLabelFolder
from segadapt.trainables.core.training.checkpoint import load_state

PLAIN = AugmentationConfig()
BOTH: Any = ("source", "target")


def grid(index: int, height: int, width: int, factor: int) -> Tensor:
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    return ((rows * factor + columns * 7 + index * 31) % 251).to(torch.uint8)


class Patterns:
    """Images and labels of integer patterns, all of one size or of given ones."""

    def __init__(self, count: int, *sizes: tuple[int, int]) -> None:
        self.ids: Sequence[str] = [f"image_{index}" for index in range(count)]
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> Tensor:
        return torch.stack([grid(index, *self.sizes[index % len(self.sizes)], factor) for factor in (3, 5, 11)])

    def label(self, index: int) -> Tensor:
        return grid(index, *self.sizes[index % len(self.sizes)], 13) % 5


CLASSES = ClassList(tuple("abcde"), ((0, 0, 0),) * 5)
DATA = DomainData(Patterns(9, (24, 40)), Patterns(7, (16, 32)), CLASSES, "patterns")


def pseudo(image_id: str) -> Tensor:
    return grid(int(image_id.removeprefix("image_")), 16, 32, 17) % 4


def batch_source(config: AugmentationConfig = PLAIN, data: DomainData = DATA, **values: Any) -> BatchSource:
    settings = {"key": (0, "round"), "batch_size": 4, "domains": BOTH, "colored": (), "flipped": False}
    return BatchSource(data, config, **(settings | values))


def tensors(batch: DomainBatch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}


def equal(left: DomainBatch, right: DomainBatch) -> bool:
    mine, theirs = tensors(left), tensors(right)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


EVERYTHING = AugmentationConfig(
    shorter_side=(14, 30),
    scale=(0.7, 1.4),
    crop=(12, 20),
    rare_crop=0.5,
    class_balanced=True,
    jitter_chance=0.5,
    blur_chance=0.5,
)


def test_default_batches_are_those_of_the_first_release() -> None:
    """The sum was taken at 977ac1a, before images could be resized, cropped and drawn by class."""
    digest = hashlib.sha256()
    stages: list[tuple[str, Any, bool, Any]] = [
        ("source_only", ("source",), False, None),
        ("adapt", BOTH, False, None),
        ("round", BOTH, True, pseudo),
    ]
    for stage, domains, flipped, labels in stages:
        source = batch_source(key=(0, stage), domains=domains, flipped=flipped, pseudo_labels=labels)
        for index in (0, 1, 7):
            for name, value in tensors(source.batch(index).to(torch.device("cpu"))).items():
                digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode() + value.numpy().tobytes())
    assert digest.hexdigest() == "06cd5887155ea33dd8634da41378ec88fb56ff2be19f5e2a75b445e4d0676ef7"


def test_default_colours_are_drawn_in_the_order_of_the_first_release() -> None:
    """Eight draws would shift the flip that follows; the chances draw only where they are not certain."""
    draw, reference = generator("sample"), generator("sample")
    vary_color(DATA.source.image(0), PLAIN, draw)
    for _ in range(6):
        torch.rand((), generator=reference)
    assert torch.equal(torch.rand(3, generator=draw), torch.rand(3, generator=reference))


# Geometry. Ramps encode each pixel's place: red and green are column and row, the label is one of them.


def ramps(height: int = 200, width: int = 240) -> tuple[Tensor, Tensor, Tensor]:
    columns = torch.arange(width, dtype=torch.uint8).expand(height, width)
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand(height, width)
    return torch.stack([columns, rows, columns // 2]), columns, rows


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry((200, 240)),
        Geometry((100, 120)),
        Geometry((311, 399)),
        Geometry((90, 200)),
        Geometry((150, 180), 13, 40, (64, 100)),
        Geometry((300, 360), 200, 3, (77, 200)),
    ],
)
def test_label_pixels_lie_where_their_image_pixels_lie(geometry: Geometry, interpolation: str) -> None:
    image, columns, rows = ramps()
    geometry = replace(geometry, interpolation=interpolation)
    moved = geometry.pad_image(geometry.cut_image(image)).int()
    assert moved.shape[1:] == (geometry.crop or geometry.size)
    for channel, label in enumerate((columns, rows)):
        moved_label = geometry.pad_label(geometry.cut_label(label)).int()
        inner = (moved[channel] - moved_label)[6:-6, 6:-6]
        assert inner.abs().max() <= 2  # the nearest pixel is at most half a step away, and 8 bits round
        assert inner.float().mean().abs() < 0.3  # and none is preferred: taking the upper left one is off by 0.5


def test_labels_take_the_pixel_that_pil_takes() -> None:
    from PIL import Image

    label = torch.randint(0, 19, (37, 53), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for size in ((18, 26), (74, 106), (50, 41), (13, 100)):
        picture = Image.fromarray(label.numpy()).resize((size[1], size[0]), Image.Resampling.NEAREST)
        assert resized_label(label, size).tolist() == [
            [picture.getpixel((x, y)) for x in range(size[1])] for y in range(size[0])
        ]


def test_images_are_resized_as_torchvision_and_antialiased() -> None:
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::2] = 200
    small = resized(stripes, (16, 16))
    assert small.dtype == torch.uint8
    assert (small[:, :, 2:-2].int() - 100).abs().max() <= 2  # without antialiasing: all 0 or all 200
    assert resized(stripes, None) is stripes
    assert resized(stripes, (64, 64)) is stripes
    assert resized(stripes[None].expand(2, -1, -1, -1), (16, 16)).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("label_size", [(200, 240), (100, 120), (400, 480)])
def test_labels_of_another_size_than_their_image_follow_it(label_size: tuple[int, int]) -> None:
    image, columns, _ = ramps()
    label = resized_label(columns, label_size)
    geometry = Geometry((260, 312), 31, 57, (128, 160))
    difference = geometry.cut_image(image)[0].int() - geometry.cut_label(label).int()
    assert difference.abs().max() <= 3
    assert difference.float().mean().abs() < 0.3 * 240 / label_size[1] + 0.3


def test_small_images_get_a_margin_that_labels_ignore() -> None:
    image, columns, _ = ramps(20, 30)
    geometry = draw_geometry((20, 30), AugmentationConfig(crop=(32, 24)), "source", generator("a"))
    moved, label = geometry.pad_image(geometry.cut_image(image)), geometry.pad_label(geometry.cut_label(columns))
    assert moved.shape == (3, 32, 24)
    assert torch.equal(moved[:, 20:].flatten(1), torch.tensor(PAD_COLOR, dtype=torch.uint8)[:, None].expand(3, 12 * 24))
    assert label.shape == (32, 24)
    assert (label[20:] == 255).all()
    assert torch.equal(label[:20], moved[0, :20])
    assert geometry.top == 0


@pytest.mark.parametrize("shape", [(20, 30), (20, 100), (100, 20), (40, 50)])
def test_small_images_may_be_enlarged_instead(shape: tuple[int, int]) -> None:
    config = AugmentationConfig(crop=(32, 40), undersized="enlarge")
    for number in range(20):
        geometry = draw_geometry(shape, config, "source", generator(number))
        assert geometry.size[0] >= 32
        assert geometry.size[1] >= 40
        assert geometry.size[0] / shape[0] == pytest.approx(geometry.size[1] / shape[1], rel=0.05)
        assert geometry.size == shape or 32 in geometry.size or 40 in geometry.size
        assert geometry.top + 32 <= geometry.size[0]
        assert geometry.left + 40 <= geometry.size[1]


def drawn(
    config: AugmentationConfig, shape: tuple[int, int], domain: Any = "source", count: int = 400
) -> list[Geometry]:
    return [draw_geometry(shape, config, domain, generator("geometry", number)) for number in range(count)]


def test_shorter_sides_are_uniform_integers_and_keep_the_aspect() -> None:
    sizes = [geometry.size for geometry in drawn(AugmentationConfig(shorter_side=(760, 763)), (1052, 1914))]
    counts = Counter(height for height, _ in sizes)
    assert set(counts) == {760, 761, 762, 763}
    assert min(counts.values()) > 60
    assert all(width == round(1914 * height / 1052) for height, width in sizes)
    upright = drawn(AugmentationConfig(shorter_side=(512, 512)), (2048, 1024), count=1)
    assert upright[0].size == (1024, 512)


def test_scales_are_uniform_or_in_steps() -> None:
    heights = [geometry.size[0] for geometry in drawn(AugmentationConfig(scale=(0.5, 1.5)), (1000, 2000))]
    assert 500 <= min(heights) < 520
    assert 1480 < max(heights) <= 1500
    assert len(set(heights)) > 200
    steps = [geometry.size for geometry in drawn(AugmentationConfig(scale=(0.8, 1.2), scale_step=0.2), (850, 1700))]
    assert set(steps) == {(680, 1360), (850, 1700), (1020, 2040)}
    assert min(Counter(steps).values()) > 100
    tenths = drawn(AugmentationConfig(scale=(0.5, 1.5), scale_step=0.1), (1000, 1000))
    assert {geometry.size[0] for geometry in tenths} == set(range(500, 1501, 100))


def test_crops_reach_every_place_evenly() -> None:
    geometries = drawn(AugmentationConfig(crop=(8, 6)), (10, 9), count=900)
    counts = Counter((geometry.top, geometry.left) for geometry in geometries)
    assert set(counts) == {(top, left) for top in range(3) for left in range(4)}
    assert min(counts.values()) > 45


def test_sizes_differ_by_domain_and_are_the_base_of_scales() -> None:
    config = AugmentationConfig(source_size=(720, 1280), target_size=(512, 1024), scale=(0.5, 0.5), domains=("target",))
    assert drawn(config, (1052, 1914), "source", 1)[0].size == (720, 1280)
    assert drawn(config, (1024, 2048), "target", 1)[0].size == (256, 512)
    assert drawn(replace(config, crop=(64, 64)), (1052, 1914), "source", 1)[0].crop is None


def test_flips_move_image_and_pseudo_label_together() -> None:
    config = AugmentationConfig(crop=(12, 20), scale=(1, 2))
    flipped = batch_source(replace(config, flip=1.0), flipped=True, pseudo_labels=pseudo).batch(0)
    straight = batch_source(replace(config, flip=0.0), flipped=True, pseudo_labels=pseudo).batch(0)
    for name, value in tensors(straight).items():
        expected = value if name == "target_indices" else value.flip(-1)
        assert torch.equal(tensors(flipped)[name], expected), name


def test_a_pseudo_label_at_evaluation_size_follows_its_image() -> None:
    image, columns, _ = ramps(100, 120)

    class One(Patterns):
        def image(self, index: int) -> Tensor:
            return image

    data = replace(DATA, target=One(3, (100, 120)))
    config = AugmentationConfig(target_size=(50, 60), scale=(1.6, 2.4), crop=(64, 64), domains=("target",))
    small = resized_label(columns, (50, 60))
    source = batch_source(config, data, pseudo_labels=lambda _: small, flipped=True)
    for index in range(3):
        batch = source.batch(index)
        assert batch.target_images is not None
        assert batch.target_pseudo_labels is not None
        difference = batch.target_images[:, 0].int() - batch.target_pseudo_labels
        assert difference.abs().max() <= 3
        assert batch.source_images.shape[-2:] == (24, 40)


def test_margins_keep_their_colour() -> None:
    config = AugmentationConfig(crop=(30, 48), jitter=1.0, grey=1.0)
    batch = batch_source(config, colored=("source",)).batch(0)
    margin = batch.source_images[:, :, 24:]
    assert torch.equal(margin, torch.tensor(PAD_COLOR, dtype=torch.uint8).view(1, 3, 1, 1).expand_as(margin))


def test_colours_vary_with_their_chance() -> None:
    image = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    config = AugmentationConfig(jitter_chance=0.3, blur=0, grey=0)
    changed = sum(not torch.equal(vary_color(image, config, generator(n)), image) for n in range(300))
    assert 60 < changed < 120
    config = AugmentationConfig(jitter=0, hue=0, grey=0, blur_chance=0.7)
    changed = sum(not torch.equal(vary_color(image, config, generator(n)), image) for n in range(300))
    assert 180 < changed < 240


# Determinism.


@pytest.mark.parametrize("config", [PLAIN, EVERYTHING])
def test_threads_and_resuming_change_no_sample(config: AugmentationConfig) -> None:
    def source() -> BatchSource:
        return batch_source(config, colored=BOTH, flipped=True, pseudo_labels=pseudo)

    whole = [source().batch(index) for index in range(6)]
    for threads in (0, 1, 3):
        for first in (0, 4):
            resumed = list(source().batches(first, 6, threads=threads))
            assert len(resumed) == 6 - first
            assert all(equal(batch, whole[first + number]) for number, batch in enumerate(resumed))
    assert not any(equal(left, right) for left, right in pairwise(whole))


@pytest.mark.parametrize("config", [PLAIN, EVERYTHING])
def test_workers_share_a_batch_without_loss(config: AugmentationConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    source = batch_source(config, colored=BOTH, flipped=True, pseudo_labels=pseudo)
    whole = list(source.batches(0, 3))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(list(source.batches(0, 3, threads=2)))
    for batch, first, second in zip(whole, *parts, strict=True):
        for name, value in tensors(batch).items():
            assert torch.equal(torch.cat([tensors(first)[name], tensors(second)[name]]), value), name


def test_the_place_of_a_crop_does_not_depend_on_colours() -> None:
    config = AugmentationConfig(crop=(12, 20))
    plain, colored = batch_source(config).batch(0), batch_source(config, colored=BOTH).batch(0)
    assert torch.equal(plain.source_labels, colored.source_labels)
    assert not torch.equal(plain.source_images, colored.source_images)


def test_results_of_threads_come_in_order_and_no_further_ahead_than_asked() -> None:
    asked: list[int] = []

    def slow_at_first(number: int) -> int:
        time.sleep(0.02 if number == 0 else 0)
        return -number

    def items() -> Any:
        for number in range(50):
            asked.append(number)
            yield number

    results = in_threads(slow_at_first, items(), 3, ahead=5)
    assert [next(results) for _ in range(4)] == [0, -1, -2, -3]
    assert len(asked) == 9
    assert list(results) == [-number for number in range(4, 50)]


def test_an_error_in_a_thread_reaches_the_caller_and_ends_the_threads() -> None:
    def fails(number: int) -> int:
        if number == 3:
            raise ValueError("image_3 is broken")
        return number

    before = threading.active_count()
    with pytest.raises(ValueError, match="image_3 is broken"):
        list(in_threads(fails, range(100), 2))
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.parametrize("threads", [0, 2])
def test_one_pass_reads_every_image_once_and_keeps_sizes_apart(threads: int) -> None:
    images = Patterns(7, (8, 8), (8, 8), (8, 16))
    passed = list(one_pass(images, 2, threads=threads))
    assert [index for _, indices in passed for index in indices] == list(range(7))
    assert all(
        torch.equal(batch[i], images.image(index)) for batch, indices in passed for i, index in enumerate(indices)
    )


# Sampling by class.


class Shares(Patterns):
    """Image i shows the classes `shown[i]` in columns of equal width."""

    def __init__(self, shown: Sequence[Sequence[int]]) -> None:
        super().__init__(len(shown), (4, 12))
        self.shown = shown
        self.reads = 0

    def label(self, index: int) -> Tensor:
        self.reads += 1
        return (
            torch.tensor(self.shown[index], dtype=torch.uint8)
            .repeat_interleave(12 // len(self.shown[index]))
            .expand(4, -1)
        )


def test_classes_are_counted_per_image_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    images = Shares([(0, 1), (2,), (255, 0, 7), (1, 1)])
    expected = [[24, 24, 0], [0, 0, 48], [16, 0, 0], [0, 48, 0]]
    assert class_counts(images, 3, threads=2).tolist() == expected
    assert class_counts(images, 3).tolist() == expected
    assert images.reads == 4
    assert label_counts(images.label, range(4), 3, threads=0).tolist() == expected
    monkeypatch.setattr(Shares, "class_counts", lambda self, classes: torch.full((4, classes), 9), raising=False)
    assert class_counts(images, 3).tolist() == [[9, 9, 9]] * 4


def literal_block(shown: Sequence[Sequence[int]], chances: Sequence[float], next_of: Callable[[int], int]) -> list[int]:
    """SDCA §8.2 word for word, given the random numbers and each class's order."""
    files: list[int] = []
    present = sorted({c for classes in shown for c in classes})
    for chance in chances:
        occurrences = [c for file in files for c in shown[file]]
        weights = [1 / math.log(1.01 + (occurrences.count(c) / len(occurrences) if files else 0)) for c in present]
        threshold, c = chance * sum(weights), 0
        while c < len(present) - 1 and threshold >= sum(weights[: c + 1]):
            c += 1
        files.append(next_of(present[c]))
    return files


def test_class_balanced_sampling_is_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [(0,), (0, 1), (0, 2), (0, 1), (0,), (3,), (0, 1)]
    monkeypatch.setattr(ClassBalancedOrder, "block", 60)
    order = ClassBalancedOrder(class_counts(Shares(shown), 4), ("key",))
    draw = generator("key", "class_balanced", 2)
    chances = torch.rand(60, generator=draw, dtype=torch.float64).tolist()
    orders: dict[int, list[int]] = {}
    found = [order.at(position) for position in range(120, 180)]

    def next_of(c: int) -> int:
        having = [index for index, classes in enumerate(shown) if c in classes]
        if not orders.get(c):
            permutation = torch.randperm(len(having), generator=draw)
            orders[c] = torch.tensor(having)[permutation].tolist()
        return orders[c].pop(0)

    assert found == literal_block(shown, chances, next_of)


def test_rare_classes_come_as_often_as_common_ones() -> None:
    shown = [(0,)] * 90 + [(1,)] * 9 + [(2,)]
    order = ClassBalancedOrder(class_counts(Shares(shown), 3), ("key",))
    classes = Counter(shown[order.at(position)][0] for position in range(6000))
    assert all(abs(classes[c] - 2000) < 150 for c in range(3))  # uniform: 5400, 540, 60
    images = Counter(order.at(position) for position in range(3000))
    common = [images[index] for index in range(90)]
    assert max(common) - min(common) <= 1  # cyclic within a class


def test_balanced_positions_may_be_asked_in_any_order() -> None:
    counts = class_counts(Shares([(0,), (0, 1), (2,), (0, 2)]), 3)
    forward = ClassBalancedOrder(counts, ("key",))
    walk = [forward.at(position) for position in range(7000)]
    backward = ClassBalancedOrder(counts, ("key",))
    assert [backward.at(position) for position in reversed(range(0, 7000, 97))] == walk[::97][::-1]
    other = ClassBalancedOrder(counts, ("other",))
    assert [other.at(position) for position in range(50)] != walk[:50]


def test_balanced_sampling_needs_a_label() -> None:
    with pytest.raises(ValueError, match=r"none shows a trained class.*augmentation\.class_balanced=false"):
        ClassBalancedOrder(torch.zeros(3, 5), ("key",))


def test_only_the_source_is_drawn_by_class() -> None:
    data = DomainData(Shares([(0,)] * 15 + [(1,)]), Patterns(7, (4, 12)), CLASSES, "shares")
    source = batch_source(AugmentationConfig(class_balanced=True), data)
    batches = list(source.batches(0, 70))
    labels = torch.cat([batch.source_labels[:, 0, 0] for batch in batches])
    assert 0.4 < labels.float().mean() < 0.6
    targets = torch.cat([batch.target_indices for batch in batches if batch.target_indices is not None])
    assert torch.bincount(targets).tolist() == [40] * 7


def test_rare_classes_are_those_with_the_fewest_pixels() -> None:
    counts = torch.tensor([[500, 30, 2, 0, 0], [500, 0, 40, 0, 0], [99_000, 50, 0, 1, 0], [10, 0, 0, 0, 0]])
    assert rare_shown(counts, 2) == [[2], [2], [3], []]  # 2 and 3 are the rarest; 4 is never shown
    assert rare_shown(counts, 3) == [[2, 1], [2], [3, 1], []]  # rarest first
    assert rare_shown(counts * torch.tensor([1, 100, 100, 100, 1]), 3) == [[2, 1], [2], [3], []]  # 3 is below 0.1 %


def rare_corner() -> tuple[Tensor, Tensor]:
    label = torch.zeros(60, 80, dtype=torch.uint8)
    label[50:53, 70:74] = 4
    return label.expand(3, 60, 80).clone(), label


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_crops_are_placed_around_rare_classes_with_their_chance(chance: float) -> None:
    image, label = rare_corner()
    config = AugmentationConfig(crop=(20, 20), scale=(0.8, 1.2), rare_crop=chance)
    seen = 0
    for number in range(200):
        geometry = draw_geometry((60, 80), config, "source", generator(number), label=label, rare=[4])
        cut = geometry.cut_label(label)
        assert cut.shape == (20, 20)
        assert geometry.cut_image(image).shape == (3, 20, 20)
        seen += bool((cut == 4).any())
    by_chance = 0.12  # of a crop anywhere
    assert seen / 200 == pytest.approx(chance + (1 - chance) * by_chance, abs=0.1)


def test_rare_crops_need_the_class_to_be_in_the_label() -> None:
    _, label = rare_corner()
    config = AugmentationConfig(crop=(20, 20), rare_crop=1.0)
    plain = draw_geometry((60, 80), config, "source", generator(0))
    assert draw_geometry((60, 80), config, "source", generator(0), label=label, rare=[3]) == plain


def test_rare_crops_follow_true_and_pseudo_labels() -> None:
    _, label = rare_corner()

    class Corners(Patterns):
        def label(self, index: int) -> Tensor:
            return label

    data = DomainData(Corners(5, (60, 80)), Corners(5, (120, 160)), CLASSES, "corners")
    config = AugmentationConfig(crop=(24, 24), rare_crop=1.0, rare_classes=1)
    batch = batch_source(config, data, pseudo_labels=lambda _: label).batch(0)
    assert batch.target_pseudo_labels is not None
    assert (batch.source_labels == 4).flatten(1).any(1).all()
    assert (batch.target_pseudo_labels == 4).flatten(1).any(1).all()
    without = batch_source(config, data).batch(0)
    assert without.target_images is not None
    assert not torch.equal(without.target_images, batch.target_images)


# Errors.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source_size": (0, 4)}, r"augmentation\.source_size must be \[height, width\] in pixels, but got \(0, 4\)"),
        ({"crop": (4, -1)}, r"augmentation\.crop must be \[height, width\]"),
        (
            {"scale": (1.5, 0.5)},
            r"augmentation\.scale must be \[low, high\] with 0 < low <= high, but got \(1.5, 0.5\)",
        ),
        ({"shorter_side": (0, 3)}, r"augmentation\.shorter_side must be \[low, high\]"),
        ({"scale_step": 0.1}, r"augmentation\.scale_step must be positive and comes with augmentation\.scale"),
        ({"rare_crop": 0.8}, r"augmentation\.rare_crop needs augmentation\.crop=\[height, width\]"),
        ({"rare_crop": 1.2, "crop": (4, 4)}, r"augmentation\.rare_crop must lie in \[0, 1\]"),
        ({"rare_classes": 0}, r"augmentation\.rare_classes must be at least 1"),
        ({"jitter_chance": -1}, r"augmentation\.jitter_chance must lie in \[0, 1\]"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**values)


def test_settings_are_read_from_the_command_line() -> None:
    values = {"augmentation.target_size": [512, 1024], "augmentation.scale": [0.75, 2], "augmentation.crop": None}
    config = resolve("clst", values | {"augmentation.domains": ["target"]}).augmentation
    assert (config.target_size, config.scale, config.crop) == ((512, 1024), (0.75, 2.0), None)
    assert config.domains == ("target",)
    with pytest.raises(UsageError, match=r"'augmentation\.crop' must be of type"):
        resolve("clst", {"augmentation.crop": [512]})
    with pytest.raises(UsageError, match=r"augmentation\.rare_crop needs augmentation\.crop"):
        resolve("clst", {"augmentation.rare_crop": 0.5})


@pytest.mark.parametrize("domain", BOTH)
def test_unlike_sizes_in_a_batch_say_what_to_set(domain: str) -> None:
    odd = Patterns(9, (24, 40), (25, 40))
    data = replace(DATA, source=odd) if domain == "source" else replace(DATA, target=odd)
    message = rf"The {domain} images of a batch must have one size, but image_\d has 2\d x 40 and image_\d 2\d x 40 "
    with pytest.raises(ValueError, match=message + rf".*Set augmentation\.{domain}_size=\[height,width\]"):
        list(batch_source(data=data).batches(0, 3))
    for fix in ({f"{domain}_size": (16, 24)}, {"crop": (16, 24)}):
        batch = batch_source(AugmentationConfig(**fix), data).batch(0)  # type: ignore[arg-type]
        assert tensors(batch)[f"{domain}_images"].shape == (4, 3, 16, 24)


# The trainer.


def test_evaluation_sees_images_of_training_size_and_labels_of_full_size() -> None:
    target = Patterns(3, (24, 40), (25, 41))
    data = EvaluationData(source=Patterns(3, (24, 40)), target=target, scored=target, classes=CLASSES)
    config = AugmentationConfig(target_size=(12, 20), interpolation="bicubic")
    shown = evaluation_for_network(data, config)
    assert (shown.source.image(0).shape, shown.target.image(1).shape) == ((3, 24, 40), (3, 12, 20))
    assert torch.equal(shown.target.image(1), resized_for_network(data.target.image(1), config, "target"))
    assert torch.equal(shown.scored.image(1), shown.target.image(1))
    assert torch.equal(shown.target.label(1), data.target.label(1))
    assert shown.target.ids == data.target.ids
    assert [len(indices) for _, indices in one_pass(shown.target, 8)] == [3]


SIZES = {
    "augmentation__source_size": [24, 48],
    "augmentation__target_size": [16, 40],
    "augmentation__scale": [0.9, 1.5],
    "augmentation__crop": [24, 32],
    "augmentation__class_balanced": True,
    "augmentation__rare_crop": 0.5,
    "trainer__loader_threads": 2,
}


@pytest.mark.parametrize("name", ["sdca", "self_training", "bicl", "drsl", "clst", "plca"])
def test_every_method_trains_on_resized_crops_and_resumes_exactly(name: str, tmp_path: Path) -> None:
    config = toy_config(name, **SIZES)
    trainer, whole = toy_trainer(config, tmp_path / "whole")
    trainer.run()
    again, resumed = toy_trainer(config, tmp_path / "resumed")
    again.folder = trainer.folder
    middle = len(whole.metrics) // 2
    again.run(whole.checkpoint(middle))
    last = [load_state(reports.checkpoint(len(reports.metrics) - 1)) for reports in (whole, resumed)]
    assert all(torch.equal(value, last[1]["state"][key]) for key, value in last[0]["state"].items())
    for stage in trainer.plan:
        if stage.pseudo_labels:
            labels = PseudoLabelFolder(trainer.folder / stage.name, trainer.data.target.ids)
            assert labels.read(trainer.data.target.ids[0]).shape == (16, 40)
    confusion = torch.tensor(trainer_confusion(whole.checkpoint(len(whole.metrics) - 1)))
    full = sum((trainer.evaluation.target.label(index) != 255).sum() for index in range(4))
    assert confusion.sum() == full


def trainer_confusion(checkpoint: Path) -> list[list[int]]:
    import json

    content: dict[str, Any] = json.loads((checkpoint / "evaluation.json").read_text())
    confusion: list[list[int]] = content["target_val"]["confusion"]
    return confusion


def test_the_shared_warm_up_depends_on_what_acts_in_it() -> None:
    def key(**values: Any) -> str:
        return stage_keys(toy_config("sdca", **values), "data")[0].hash

    plain = key()
    for same in ({"jitter": 0.1}, {"flip": 0.0}, {"target_size": [16, 32]}, {"blur_chance": 0.5}):
        assert key(**{f"augmentation__{name}": value for name, value in same.items()}) == plain
    changed = [{"source_size": [16, 32]}, {"crop": [16, 16]}, {"scale": [0.5, 1]}, {"class_balanced": True}]
    keys = {key(**{f"augmentation__{name}": value for name, value in change.items()}) for change in changed}
    assert len(keys | {plain}) == 5


def test_threads_that_read_ahead_start_no_teams_and_leave_the_callers() -> None:
    program = """
import os, torch, torch.nn.functional as F
from segadapt.trainables.core.data.threads import in_threads
torch.set_num_threads(4)
image = torch.rand(1, 3, 512, 512)
F.interpolate(image, scale_factor=2.0, mode="bilinear")  # the caller's own team
before = len(os.listdir("/proc/self/task"))
reading = in_threads(lambda _: F.interpolate(image, scale_factor=2.0, mode="bilinear").sum(), range(24), 3)
next(reading)
during = len(os.listdir("/proc/self/task"))
list(reading)
print(during - before, torch.get_num_threads())
"""
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=300)
    assert printed.stdout.split() == ["3", "4"]
