"""Searches that know no target label, and what such a choice costs."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, TINY_WORDS
from PIL import Image
from searching import command, steps_of, tracked

import segadapt as api
from segadapt.platform.results.label_free import compare
from segadapt.platform.settings.objective import LABEL_FREE
from segadapt.platform.storage.folders import Place

TRAINING_WORDS = [word for word in TINY_WORDS if not word.startswith("data.")]


def trial(miou: float, entropy: float, **others: float) -> dict[str, float]:
    return {"target_val/miou": miou, "score/entropy": entropy, **others}


def test_a_score_that_ranks_trials_as_target_miou_does_loses_nothing() -> None:
    (choice,) = compare({"a": trial(0.5, -0.9), "b": trial(0.7, -0.2), "c": trial(0.6, -0.3)})
    assert (choice.score, choice.trials, choice.chosen, choice.regret) == ("score/entropy", 3, "b", 0.0)
    assert choice.correlation == pytest.approx(1)


def test_regret_is_what_the_chosen_trial_lacks() -> None:
    (choice,) = compare({"a": trial(0.5, -0.1), "b": trial(0.7, -0.2), "c": trial(0.6, -0.3), "d": trial(0.4, -0.15)})
    assert (choice.chosen, choice.target_miou) == ("a", 0.5)
    assert choice.regret == pytest.approx(0.2)
    assert choice.correlation == pytest.approx(1 - 6 * (4 + 4 + 4 + 4) / (4 * 15)), "every rank is two off"


def test_few_or_equal_trials_have_no_rank_correlation() -> None:
    assert compare({"a": trial(0.5, -0.1), "b": trial(0.7, -0.2)})[0].correlation is None
    (equal,) = compare({"c": trial(0.6, 0.0), "b": trial(0.7, 0.0), "a": trial(0.5, 0.0)})
    assert (equal.correlation, equal.chosen) == (None, "a"), "of equals, the first by name"
    assert compare({}) == []


def test_trials_without_a_score_are_left_out() -> None:
    known = trial(0.5, -0.1, **{"source_val/miou": 0.9})
    choices = compare({"a": known, "b": {"target_val/miou": 0.7}})
    assert {choice.score: (choice.trials, choice.chosen) for choice in choices} == {
        "source_val/miou": (1, "a"),
        "score/entropy": (1, "a"),
    }


def test_nothing_is_compared_without_target_labels() -> None:
    assert compare({"a": trial(float("nan"), -0.1), "b": trial(float("nan"), -0.2)}) == []


def poison(target: Path) -> None:
    """Change the class of every pixel of a domain's validation labels."""
    files = sorted((target / "val" / "labels").glob("*.png"))
    assert files
    for path in files:
        label = np.asarray(Image.open(path))
        Image.fromarray(np.where(label == 255, 255, (label + 3) % 8).astype(np.uint8)).save(path)


@pytest.mark.slow
def test_poisoned_target_labels_change_nothing_that_a_label_free_search_chooses(tmp_path: Path) -> None:
    api.data_make(str(tmp_path / "true"), {key: value for key, value in TINY.items() if key.startswith("data.")})
    shutil.copytree(tmp_path / "true", tmp_path / "false")
    poison(tmp_path / "false" / "target")
    objective = "score/information_maximization"
    boards, runs = {}, {}
    for labels in ("true", "false"):
        folder = tmp_path / labels
        data = [f"data.{domain}=folder:{folder}/{domain}" for domain in ("source", "target")]
        words = ["--name", "blind", "--trials", "5", "--concurrent", "1", "--objective", objective]
        done = command(folder, "search", "sdca", *words, *data, *TRAINING_WORDS)
        assert done.returncode == 0, done.stderr
        assert f"blind: {objective}" in done.stdout
        runs[labels] = tracked(folder, "blind")
        boards[labels] = api.runs("blind", place=Place(str(folder / "runs")))
    order = {labels: [(row.name, row.best, row.best_step, row.state) for row in boards[labels].rows] for labels in runs}
    assert order["true"] == order["false"], "same leaderboard, best trial, checkpoints and stops"
    assert len({row.state for row in boards["true"].rows if row.kind == "trial"}) == 2, "some were stopped"
    assert boards["true"].baseline == boards["false"].baseline is not None
    best = {labels: parents["blind"].data.tags["segadapt.best_trial"] for labels, parents in runs.items()}
    for labels, found in runs.items():
        winner = found[boards[labels].rows[0].name]
        assert winner.data.tags["segadapt.trial_id"] == best[labels]
    for name in (f"sdca-{number:03d}" for number in range(1, 6)):
        true, false = runs["true"][name], runs["false"][name]
        assert true.data.params == false.data.params, "same proposals"
        assert steps_of(tmp_path / "true", true) == steps_of(tmp_path / "false", false)
        for metric in (*LABEL_FREE, f"best/{objective}"):
            assert true.data.metrics[metric] == false.data.metrics[metric], metric
        assert true.data.metrics["target_val/miou"] != false.data.metrics["target_val/miou"]

    parent_metrics = runs["true"]["blind"].data.metrics
    assert {f"regret/{score}" for score in LABEL_FREE} <= set(parent_metrics)
    (artifact,) = (tmp_path / "true" / "runs" / "mlartifacts" / "blind").glob("*/artifacts/selection.json")
    logged = {entry["score"]: entry for entry in json.loads(artifact.read_text())}
    judged = api.runs("blind", selection=True, place=Place(str(tmp_path / "true" / "runs"))).selection
    assert [choice.score for choice in judged] == list(LABEL_FREE)
    mious = {name: run.data.metrics["best/target_val/miou"] for name, run in runs["true"].items() if "-0" in name}
    for choice in judged:
        assert logged[choice.score] == pytest.approx(vars(choice))
        assert choice.trials == 5
        assert choice.regret == pytest.approx(max(mious.values()) - mious[choice.chosen])
        assert parent_metrics[f"regret/{choice.score}"] == pytest.approx(choice.regret)
    for name, run in runs["true"].items():
        if "-0" in name:  # what the table shows is what was reported at the step of the checkpoint that was kept
            step = int(run.data.tags["segadapt.best_step"])
            assert run.data.metrics["best/target_val/miou"] == value_at(tmp_path / "true", run, step)
    by_objective = next(choice for choice in judged if choice.score == objective)
    assert by_objective.chosen == boards["true"].rows[0].name
    table = command(tmp_path / "true", "runs", "blind", "--selection").stdout
    assert re.search(rf"{objective} +5 +-?\d\.\d+ +{by_objective.chosen} +0\.\d+ +0\.\d+", table)
    assert "rank correlation" not in command(tmp_path / "true", "runs", "blind").stdout


def value_at(folder: Path, run: object, step: int) -> float:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    history = client.get_metric_history(run.info.run_id, "target_val/miou")  # type: ignore[attr-defined]
    (value,) = [entry.value for entry in history if entry.step == step]
    return float(value)
