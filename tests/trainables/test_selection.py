"""Label-free scores against plain loops, at their extremes, over workers and without labels."""

import math
import multiprocessing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_trainer import _Poisoned
from toy import toy_config, toy_trainer

from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.evaluation import label_free
from segadapt.trainables.core.evaluation.label_free import (
    MOST_IMAGES,
    SCORES,
    PredictionStatistics,
    ScoredImages,
    label_free_scores,
    soft_neighborhood_density,
)
from segadapt.trainables.core.networks import build_segmenter

CPU = torch.device("cpu")


def scores_of(logits: torch.Tensor, mirrored: torch.Tensor | None = None) -> dict[str, float]:
    """Scores of maps (n, C, h, w), given two images at a time."""
    statistics = PredictionStatistics(len(logits), logits.shape[1])
    mirrored = logits if mirrored is None else mirrored
    for first in range(0, len(logits), 2):
        part = slice(first, first + 2)
        statistics.update(list(range(first, min(first + 2, len(logits)))), logits[part], mirrored[part])
    return statistics.scores()


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def plain_entropy(probabilities: list[float]) -> float:
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def plain_density(cells: list[list[float]], temperature: float) -> float:
    units = [[p / math.sqrt(sum(q * q for q in cell)) for p in cell] for cell in cells]
    total = 0.0
    for i, mine in enumerate(units):
        others = [unit for j, unit in enumerate(units) if j != i]
        likeness = [sum(a * b for a, b in zip(mine, other, strict=True)) / temperature for other in others]
        total += plain_entropy(softmax(likeness))
    return total / len(units)


def test_the_information_in_nearly_uniform_predictions_is_not_lost_in_rounding() -> None:
    logits = 1e-4 * torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    cells = logits.double().softmax(1).movedim(1, 3).reshape(-1, 4)
    expected = plain_entropy(cells.mean(0).tolist()) - sum(map(plain_entropy, cells.tolist())) / len(cells)
    assert scores_of(logits)["information_maximization"] == pytest.approx(expected, rel=1e-4)


def test_scores_equal_plain_loops_over_all_cells() -> None:
    torch.manual_seed(0)
    n, classes, height, width = 3, 4, 3, 5  # 15 cells an image: soft neighbourhood density takes them all
    logits, mirrored = 3 * torch.randn(n, classes, height, width), 3 * torch.randn(n, classes, height, width)
    cells, agreeing = [], 0
    for image in range(n):
        for y in range(height):
            for x in range(width):
                own, other = logits[image, :, y, x].tolist(), mirrored[image, :, y, x].tolist()
                cells.append(softmax(own))
                agreeing += own.index(max(own)) == other.index(max(other))
    mean_entropy = sum(map(plain_entropy, cells)) / len(cells)
    marginal = [sum(cell[k] for cell in cells) / len(cells) for k in range(classes)]
    predictions = torch.tensor(cells, dtype=torch.float64)
    expected = {
        "entropy": -mean_entropy,
        "information_maximization": plain_entropy(marginal) - mean_entropy,
        "soft_neighborhood_density": plain_density(cells, 0.05),
        "batch_nuclear_norm": float(torch.linalg.svdvals(predictions).sum()) / math.sqrt(len(cells) * classes),
        "flip_agreement": agreeing / len(cells),
    }
    assert scores_of(logits, mirrored) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        pytest.param(torch.zeros(2, 4, 4, 4), (-math.log(4), 0.0, math.log(31), 1 / 4, 1.0), id="uniform"),
        pytest.param(
            torch.tensor([1e4, 0.0, 0.0, 0.0]).view(1, 4, 1, 1).repeat(2, 1, 4, 4),
            (0.0, 0.0, math.log(31), 1 / 2, 1.0),
            id="certain of one class everywhere",
        ),
        pytest.param(
            1e4 * torch.eye(4).view(1, 4, 2, 2).repeat(2, 1, 2, 2),
            (0.0, math.log(4), math.log(7), 1.0, 1.0),
            id="certain, all classes equally often",
        ),
        pytest.param(torch.randn(2, 1, 4, 4), (0.0, 0.0, math.log(31), 1.0, 1.0), id="one class"),
        pytest.param(torch.zeros(1, 4, 1, 1), (-math.log(4), 0.0, 0.0, 1 / 4, 1.0), id="one cell"),
    ],
)
def test_extremes_have_the_documented_values(logits: torch.Tensor, expected: tuple[float, ...]) -> None:
    assert scores_of(logits) == pytest.approx(dict(zip(SCORES, expected, strict=True)), abs=1e-5)


def test_density_does_not_depend_on_the_rows_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    cells = torch.randn(10, 3).softmax(1)
    whole = float(soft_neighborhood_density(cells, temperature=0.5))
    assert whole == pytest.approx(plain_density(cells.tolist(), 0.5), abs=1e-5)
    monkeypatch.setattr(label_free, "_ROWS", 3)
    assert float(soft_neighborhood_density(cells, temperature=0.5)) == pytest.approx(whole, abs=1e-6)


def test_maps_of_unlike_size_count_equally() -> None:
    torch.manual_seed(0)
    small, large = torch.randn(1, 3, 2, 2), torch.randn(1, 3, 8, 8)
    statistics = PredictionStatistics(2, 3)
    statistics.update([0], small, small)
    statistics.update([1], large, large)
    parts = [scores_of(small)["entropy"], scores_of(large)["entropy"]]
    assert statistics.scores()["entropy"] == pytest.approx(sum(parts) / 2)
    assert statistics.scores()["soft_neighborhood_density"] <= math.log(4 + label_free.CELLS_PER_IMAGE - 1)


def test_bfloat16_logits_are_scored_in_float32() -> None:
    logits = torch.randn(2, 5, 6, 6).bfloat16()
    assert scores_of(logits) == scores_of(logits.float())


class _Many:
    """A set that remembers which images were asked for."""

    def __init__(self, length: int) -> None:
        self.ids = [str(index) for index in range(length)]
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> torch.Tensor:
        self.asked.append(index)
        return torch.zeros(3, 2, 2, dtype=torch.uint8)

    def label(self, index: int) -> torch.Tensor:
        raise AssertionError("a score must not look at a label")


@pytest.mark.parametrize(("length", "scored"), [(1, 1), (64, 64), (65, 33), (500, 63), (6400, 64)])
def test_a_large_set_is_scored_on_images_spread_over_it(length: int, scored: int) -> None:
    images = _Many(length)
    chosen = ScoredImages(images)
    assert len(chosen) == len(chosen.ids) == scored <= MOST_IMAGES
    for index in range(len(chosen)):
        chosen.image(index)
    assert [str(index) for index in images.asked] == chosen.ids
    assert length - images.asked[-1] <= math.ceil(length / MOST_IMAGES)


def test_what_is_scored_has_no_label_and_asks_for_none() -> None:
    chosen = ScoredImages(_Many(2))
    assert not hasattr(chosen, "label")
    network = build_segmenter("compact", num_classes=3).train()
    found = label_free_scores(network, ScoredImages(_Labelless()), CPU, 2)
    assert set(found) == set(SCORES)
    assert network.training


class _Labelless(_Many):
    def __init__(self) -> None:
        super().__init__(3)

    def image(self, index: int) -> torch.Tensor:
        return torch.full((3, 32, 64), 60 * index, dtype=torch.uint8)


class _Unlabelled:
    """A set of no images."""

    ids: tuple[str, ...] = ()

    def __len__(self) -> int:
        return 0

    def image(self, index: int) -> torch.Tensor:
        raise IndexError(index)

    label = image


@pytest.mark.parametrize("labels", ["poisoned", "none"])
def test_no_score_and_no_source_metric_depends_on_target_labels(labels: str, tmp_path: Path) -> None:
    config = toy_config("bicl")  # which labels the target, so that labels would be counted as well
    trainer, true = toy_trainer(config, tmp_path / "true")
    trainer.run()
    other, false = toy_trainer(config, tmp_path / "false")
    _, evaluation = load_data(config.data)
    target = _Poisoned(evaluation.target) if labels == "poisoned" else _Unlabelled()
    other.evaluation = replace(evaluation, target=target)
    other.run()
    assert len(true.metrics) == len(false.metrics) >= 3
    for mine, theirs in zip(true.metrics, false.metrics, strict=True):
        if labels == "none":
            assert not any(name.startswith(("target_val/", "pseudo_labels/")) for name in theirs), "nothing is made up"
        assert mine["target_val/miou"] != theirs.get("target_val/miou")
        kept = [name for name in mine if not name.startswith(("target_val/", "time/", "pseudo_labels/"))]
        assert {f"score/{name}" for name in SCORES} | {"source_val/miou"} <= set(kept)
        assert {name: mine[name] for name in kept} == {name: theirs[name] for name in kept}


def test_two_workers_score_as_one_does(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_score_as_worker, args=(rank, str(tmp_path), queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert found[0] == found[1] == _score()


def _score() -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = build_segmenter("compact", num_classes=4)
    return label_free_scores(network, ScoredImages(_Labelless()), CPU, 1)


def _score_as_worker(rank: int, folder: str, queue: "multiprocessing.Queue[dict[str, float]]") -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    queue.put(_score())
    dist.barrier()
    dist.destroy_process_group()
