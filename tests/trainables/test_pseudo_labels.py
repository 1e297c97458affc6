"""Promises of the pseudo labels: exact thresholds in bounded memory, and a folder that is complete or refused."""

import json
import math
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.labelling.files import (
    COLUMNS,
    PROVENANCE,
    PROVENANCE_KEY,
    PseudoLabelFolder,
    PseudoLabelWriter,
)
from segadapt.trainables.core.labelling.quantile import label_target
from segadapt.trainables.core.labelling.thresholds import (
    ConfidenceHistogram,
    class_thresholds,
    confidence_and_prediction,
    select,
)
from segadapt.trainables.core.method import StageData


def naive_thresholds(batches: Sequence[Tensor], num_classes: int, quantile: float, cap: float) -> list[float]:
    """Sort everything, as the original does."""
    pairs = [confidence_and_prediction(logits) for logits in batches]
    confidence = torch.cat([confidence.flatten() for confidence, _ in pairs])
    prediction = torch.cat([prediction.flatten() for _, prediction in pairs])
    thresholds = []
    for current in range(num_classes):
        ascending = sorted(confidence[prediction == current].tolist())
        element = ascending[min(round(quantile * len(ascending)), len(ascending) - 1)] if ascending else 0.0
        thresholds.append(min(element, cap))
    return thresholds


def random_logits(images: int, num_classes: int, seed: int, *, ties: bool = False, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(images, num_classes, 7, 9, generator=generator)
    return logits.round() if ties else logits


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_classes=st.integers(2, 6),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    seed=st.integers(0, 10_000),
    ties=st.booleans(),
    scale=st.sampled_from([0.0, 1e-4, 1.0, 30.0]),
    quantile=st.floats(0, 1),
    cap=st.sampled_from([0.3, 0.9, 1.0]),
)
@example(num_classes=2, sizes=[1], seed=0, ties=True, scale=0.0, quantile=1.0, cap=1.0)
def test_thresholds_equal_a_sort_of_everything(
    num_classes: int, sizes: list[int], seed: int, ties: bool, scale: float, quantile: float, cap: float
) -> None:
    batches = [
        random_logits(size, num_classes, seed + index, ties=ties, scale=scale) for index, size in enumerate(sizes)
    ]
    found = class_thresholds(lambda: batches, num_classes, quantile=quantile, cap=cap)
    assert found.dtype == torch.float64
    assert found.tolist() == naive_thresholds(batches, num_classes, quantile, cap)


@pytest.mark.parametrize(
    ("count", "element"),
    [(1, 0), (2, 1), (3, 2), (5, 2), (7, 4), (9, 4)],  # round(count / 2), halves to even
)
def test_median_rounds_halves_to_even(count: int, element: int) -> None:
    confidence = torch.linspace(0.55, 0.85, count)
    logits = torch.stack([confidence.logit(), torch.zeros(count)])[None, :, None]
    found = class_thresholds(lambda: [logits], 2)
    assert found.tolist() == pytest.approx([confidence[element].item(), 0.0])


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30), st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_two_histograms_locate_any_element(values: list[float], data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(values) - 1))
    values = [abs(value) for value in values]
    confidence, prediction = torch.tensor(values, dtype=torch.float32), torch.zeros(len(values), dtype=torch.int64)
    upper = ConfidenceHistogram(1)
    upper.update(confidence, prediction)
    high, within = upper.locate(torch.tensor([rank]))
    lower = ConfidenceHistogram(1, high)
    lower.update(confidence, prediction)
    low, _ = lower.locate(within)
    found = (high * 65536 + low).int().view(torch.float32).item()
    assert found == sorted(values)[rank]


def test_a_class_never_predicted_keeps_everything() -> None:
    logits = torch.zeros(1, 3, 2, 2)
    logits[:, 1] = 5
    assert class_thresholds(lambda: [logits], 3, cap=0.9).tolist() == [0.0, 0.9, 0.0]


def test_confidence_is_the_largest_probability() -> None:
    probabilities = torch.tensor([0.2, 0.7, 0.1]).view(1, 3, 1, 1)
    confidence, prediction = confidence_and_prediction(probabilities.log().bfloat16())
    assert confidence.dtype == torch.float32
    assert confidence.item() == pytest.approx(0.7, abs=0.01)
    assert prediction.item() == 1


def test_a_network_that_diverged_is_reported() -> None:
    with pytest.raises(ValueError, match="`logits` must be finite"):
        confidence_and_prediction(torch.full((1, 2, 2, 2), math.nan))


def test_pixels_at_their_threshold_are_kept() -> None:
    confidence = torch.tensor([[[0.5, 0.75, 0.75, 0.4]]])
    prediction = torch.tensor([[[0, 0, 1, 1]]])
    labels = select(confidence, prediction, torch.tensor([0.75, 0.5], dtype=torch.float64))
    assert labels.dtype == torch.uint8
    assert labels.tolist() == [[[IGNORE_INDEX, 0, 1, IGNORE_INDEX]]]


IDS = tuple(f"city/city_{number:06d}" for number in range(6))


def stage_data(folder: Path, indices: Sequence[int] = range(len(IDS))) -> StageData:
    """A target set whose images are logits already."""
    images = random_logits(len(IDS), 3, seed=0)

    def target() -> Iterator[tuple[Tensor, Tensor]]:
        for index in indices:
            yield images[index : index + 1], torch.tensor([index])

    def source() -> Iterator[tuple[Tensor, Tensor]]:
        yield from ()

    made_by = {"network": "0123"}
    return StageData(folder, IDS, source, target, made_by)


def test_labelling_keeps_the_confident_part_of_every_class(tmp_path: Path) -> None:
    label_target(lambda images: images, stage_data(tmp_path), 3, quantile=0.5, cap=0.99)
    folder = PseudoLabelFolder(tmp_path, IDS)
    images = random_logits(len(IDS), 3, seed=0)
    thresholds = naive_thresholds([images], 3, 0.5, 0.99)
    assert folder.provenance["thresholds"] == thresholds
    for index, image_id in enumerate(IDS):
        labels = folder.read(image_id)
        confidence, prediction = confidence_and_prediction(images[index : index + 1])
        assert labels.dtype == torch.uint8
        assert labels.shape == (7, 9)
        expected = [
            label if value >= thresholds[label] else IGNORE_INDEX
            for value, label in zip(confidence.flatten().tolist(), prediction.flatten().tolist(), strict=True)
        ]
        assert labels.flatten().tolist() == expected
    assert all(share == pytest.approx(0.5, abs=0.02) for share in folder.provenance["kept_share"])


def test_a_class_never_predicted_has_no_kept_share(tmp_path: Path) -> None:
    label_target(lambda images: images[:, :2], stage_data(tmp_path), 4)
    assert PseudoLabelFolder(tmp_path, IDS).provenance["kept_share"][2:] == [None, None]


def test_missing_labels_are_counted_and_one_is_named(tmp_path: Path) -> None:
    label_target(lambda images: images, stage_data(tmp_path, range(4)), 3)
    with pytest.raises(
        ValueError, match=r"2 of 6 target images have no pseudo label, e\.g\. city/city_000004\. Delete"
    ):
        PseudoLabelFolder(tmp_path, IDS)


def test_interrupted_writing_is_noticed(tmp_path: Path) -> None:
    with PseudoLabelWriter(stage_data(tmp_path), 3) as writer:
        writer.write(torch.arange(6), torch.zeros(6, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"must hold provenance\.json, but .* interrupted"):
        PseudoLabelFolder(tmp_path, IDS)


def test_changed_labels_are_refused(tmp_path: Path) -> None:
    label_target(lambda images: images, stage_data(tmp_path), 3)
    path = tmp_path / "labels-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"labels-00000-of-00001\.parquet must be as it was written"):
        PseudoLabelFolder(tmp_path, IDS)


def test_labelling_again_first_withdraws_the_mark(tmp_path: Path) -> None:
    label_target(lambda images: images, stage_data(tmp_path), 3)

    def fails(images: Tensor) -> Tensor:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        label_target(fails, stage_data(tmp_path), 3)
    assert not (tmp_path / PROVENANCE).exists()


def test_labels_are_one_parquet_file_that_says_how_they_were_made(tmp_path: Path) -> None:
    from pyarrow import parquet

    (tmp_path / ".labels-00001-of-00002.parquet.partial").write_bytes(b"of an attempt that was killed")
    label_target(lambda images: images, stage_data(tmp_path), 3, quantile=0.5, cap=0.99)
    path = tmp_path / "labels-00000-of-00001.parquet"
    assert {found.name for found in tmp_path.iterdir()} == {PROVENANCE, path.name}, "nothing temporary is left"
    table = parquet.read_table(path)
    assert table.column_names == list(COLUMNS)
    assert table["id"].to_pylist() == list(IDS)
    provenance = json.loads(parquet.read_metadata(path).metadata[PROVENANCE_KEY])
    folder = PseudoLabelFolder(tmp_path, IDS)
    assert provenance == folder.provenance
    assert provenance["rule"] == "quantile"
    assert provenance["network"] == "0123", "what the trainer says of its network"
    labels = torch.stack([folder.read(image_id) for image_id in IDS])
    kept = (labels != IGNORE_INDEX).float().flatten(1).mean(1)
    assert table["kept"].to_pylist() == pytest.approx(kept.tolist())
    assert provenance["labelled_share"] == pytest.approx(kept.mean().item())
    counts = torch.bincount(labels.flatten(), minlength=256)[:3]
    assert provenance["class_shares"] == pytest.approx((counts / counts.sum()).tolist())
    before = path.read_bytes()
    label_target(lambda images: images, stage_data(tmp_path), 3, quantile=0.5, cap=0.99)
    assert path.read_bytes() == before, "labelled again, the bytes are the same"


def run_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    label_target(lambda images: images, stage_data(Path(folder) / "two", (0, 1) if rank == 0 else (2, 3, 4, 5)), 3)
    PseudoLabelFolder(Path(folder) / "two", IDS)
    dist.destroy_process_group()


def test_two_workers_label_as_one(tmp_path: Path) -> None:
    label_target(lambda images: images, stage_data(tmp_path / "one"), 3)
    (tmp_path / "two").mkdir()
    torch.multiprocessing.spawn(run_worker, args=(str(tmp_path),), nprocs=2)
    one, two = (PseudoLabelFolder(tmp_path / name, IDS) for name in ("one", "two"))
    assert one.provenance == two.provenance
    assert all(torch.equal(one.read(image_id), two.read(image_id)) for image_id in IDS)
