"""Promises of the metrics: counts over the whole set, absent classes left out, workers agree."""

import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.evaluation.metrics import ConfusionMatrix, confusion_matrix


def scores(predictions: list[int], labels: list[int], num_classes: int) -> ConfusionMatrix:
    confusion = ConfusionMatrix(num_classes)
    confusion.update(torch.tensor(predictions), torch.tensor(labels))
    return confusion


def test_rows_are_the_truth_and_columns_the_prediction() -> None:
    counts = confusion_matrix(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, IGNORE_INDEX]), 3)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("predictions", "labels", "iou", "miou"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], [1.0, 1.0, math.nan], 1.0),
        ([0, 1, 1, 1], [0, 0, 1, 1], [1 / 2, 2 / 3, math.nan], 7 / 12),
        ([2, 2, 2, 2], [0, 0, 1, 1], [0.0, 0.0, 0.0], 0.0),  # predicted where it never is: not absent
        ([0, 1, 2, 0], [0, 1, 255, 255], [1.0, 1.0, math.nan], 1.0),  # ignored pixels count nowhere
        ([0, 1, 2, 0], [255, 255, 255, 255], [math.nan, math.nan, math.nan], math.nan),
    ],
)
def test_hand_computed_scores(predictions: list[int], labels: list[int], iou: list[float], miou: float) -> None:
    confusion = scores(predictions, labels, 3)
    assert confusion.iou().dtype == torch.float64
    assert confusion.iou().tolist() == pytest.approx(iou, nan_ok=True)
    assert confusion.miou() == pytest.approx(miou, nan_ok=True)


def test_accuracy_is_the_share_of_true_pixels() -> None:
    accuracy = scores([0, 1, 1, 1], [0, 0, 1, 1], 3).accuracy().tolist()
    assert accuracy == pytest.approx([0.5, 1.0, math.nan], nan_ok=True)


def test_batches_are_summed_before_dividing() -> None:
    confusion = ConfusionMatrix(2)
    confusion.update(torch.tensor([0]), torch.tensor([0]))
    confusion.update(torch.tensor([1, 1, 1]), torch.tensor([0, 0, 0]))
    assert confusion.iou()[0] == 1 / 4  # the mean of the two batches would be 1/2


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.data())
def test_iou_equals_set_arithmetic(num_classes: int, data: st.DataObject) -> None:
    classes = st.integers(0, num_classes - 1)
    pixels = data.draw(st.lists(st.tuples(classes, classes | st.just(IGNORE_INDEX)), min_size=1, max_size=40))
    predictions, labels = (torch.tensor(values, dtype=torch.uint8) for values in zip(*pixels, strict=True))
    confusion = ConfusionMatrix(num_classes)
    confusion.update(predictions, labels)
    valid = [index for index, (_, label) in enumerate(pixels) if label != IGNORE_INDEX]
    for current, iou in enumerate(confusion.iou().tolist()):
        predicted = {index for index in valid if pixels[index][0] == current}
        true = {index for index in valid if pixels[index][1] == current}
        union = predicted | true
        assert iou == pytest.approx(len(predicted & true) / len(union) if union else math.nan, nan_ok=True)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"same shape, but got \(1, 4, 4\) and \(1, 8, 8\). Upsample"):
        confusion_matrix(torch.zeros(1, 4, 4), torch.zeros(1, 8, 8), 2)


def test_labels_of_no_class_are_refused_by_value() -> None:
    labels = torch.tensor([0, 1, 7, 200, IGNORE_INDEX], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"below 3 or 255, but got \[7, 200\]. Check the class map"):
        confusion_matrix(torch.zeros(5, dtype=torch.int64), labels, 3)


@pytest.mark.parametrize("num_classes", [127, 128, 255])
def test_many_classes_fit(num_classes: int) -> None:
    classes = torch.arange(num_classes, dtype=torch.uint8)
    expected = torch.eye(num_classes, dtype=torch.int64).flip(0)
    assert torch.equal(confusion_matrix(classes.flip(0), classes, num_classes), expected)


def joined_set() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (6, 8, 8), generator=generator)
    labels[:, 0] = IGNORE_INDEX
    return torch.randint(0, 4, (6, 8, 8), generator=generator), labels


def run_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    part = slice(0, 2) if rank == 0 else slice(2, 6)
    predictions, labels = joined_set()
    confusion = ConfusionMatrix(4)
    confusion.update(predictions[part], labels[part])
    confusion.reduce()
    torch.save(confusion.counts, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_with_unequal_shares_count_what_one_would(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_worker, args=(str(tmp_path),), nprocs=2)
    expected = confusion_matrix(*joined_set(), 4)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), expected)
