"""What a leaderboard shows, of rows as MLflow's runs make them."""

from typing import Any

import pytest

from segadapt.platform.cli.tables import show_leaderboard
from segadapt.platform.results.leaderboard import Leaderboard, Row


def row(name: str, best: float, params: dict[str, Any], **more: Any) -> Row:
    texts = {key: str(value) for key, value in params.items()}
    return Row(name, name.partition("-")[0], "trial", "finished", best, 8, best, texts, name, None, None, **more)


def shown(
    capsys: pytest.CaptureFixture[str], *rows: Row, objective: str = "target_val/miou", kind: str = "search"
) -> str:
    show_leaderboard(Leaderboard("town", objective, rows, baseline=0.3, kind=kind))
    return capsys.readouterr().out


def test_a_search_without_target_labels_shows_the_target_miou_that_is_known(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = (row("sdca-001", -0.9, {}, target_miou=0.41), row("sdca-002", -0.95, {}, target_miou=None))
    text = shown(capsys, *rows, objective="score/information_maximization")
    assert "target_val/miou" in text
    assert "0.410" in text
    assert "target_val/miou" not in shown(capsys, rows[1], objective="score/information_maximization")
    assert shown(capsys, row("sdca-001", 0.41, {}, target_miou=0.41)).count("target_val/miou") == 1


def test_columns_of_like_names_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    params = {"method.gain": 1, "warmup.steps": 4, "trainer.steps": 8, "a.b.rate": 1, "b.rate": 2}
    header = shown(capsys, row("sdca-001", 0.4, params)).splitlines()[1].split()
    assert header[-5:] == ["a.b.rate", "b.rate", "gain", "trainer.steps", "warmup.steps"]


def test_the_settings_of_a_single_run_are_no_columns(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, row("sdca-001", 0.4, {"warmup.steps": 4, "trainer.steps": 8}), kind="train")
    assert text.splitlines()[1].split()[-2:] == ["step", "last"]
    assert "settings of sdca-001 that were given:\n  trainer.steps=8 warmup.steps=4" in text


def test_many_settings_are_shown_of_the_best_trial_of_each_method_in_lines_that_can_be_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    params = {"method": "sdca", **{f"sdca.method.setting_{number:02d}": 0.123456 for number in range(20)}}
    text = shown(capsys, row("sdca-002", 0.404, params), row("sdca-001", 0.399, params))
    assert "sdca: 2 trials, best 0.404 (sdca-002) with\n  method.setting_00=0.123 " in text
    assert max(map(len, text.splitlines())) <= 110
    assert text.count("setting_") == 20
