"""The case that adaptation is for: no target image has a label, or a few validation images alone have one."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import TINY, TINY_WORDS
from searching import command, tracked

import segadapt
from segadapt.platform.settings.objective import LABEL_FREE
from segadapt.platform.storage.folders import Place

GOAL = "score/information_maximization"
WORDS = [*(word for word in TINY_WORDS if not word.startswith(("data.", "trainer.steps"))), "trainer.steps=2"]


@pytest.mark.slow
def test_a_target_without_a_label_is_searched_finished_reported_exported_and_predicted(tmp_path: Path) -> None:
    segadapt.data_make(str(tmp_path / "town"), {key: value for key, value in TINY.items() if key.startswith("data.")})
    for labels in (tmp_path / "town" / "target").glob("*/labels"):
        shutil.rmtree(labels)
    data = ["data.source=folder:town/source", "data.target=folder:town/target"]

    def done(*words: str, status: int = 0) -> str:
        ran = command(tmp_path, *words)
        assert ran.returncode == status, ran.stdout + ran.stderr
        return " ".join((ran.stdout + ran.stderr).split())

    unknown = "target_val/miou is unknown: no target validation image has a labelled pixel."
    assert "images without labels: fine for adaptation, nothing to evaluate with." in done(
        "data", "check", "folder", "town/target"
    )
    assert "none of the" in done("search", "sdca", "--name", "blind", *data, *WORDS, status=2)
    search = ["search", "sdca", "--name", "blind", "--trials", "1", "--objective", GOAL]
    assert unknown in done(*search, *data, *WORDS)
    assert unknown in done("runs", "blind", "--selection")
    finished = done("finish", "best", "--search", "blind", "trainer.steps=2")
    assert f"{GOAL} " in finished
    assert "target_val/miou unknown" in finished
    done("report", "blind", "--out", "blind.html")
    assert unknown in (tmp_path / "blind.html").read_text()
    assert "An evaluation must have target validation labels" in done("evaluate", "best", "--search", "blind", status=2)
    done("export", "best", "--search", "blind", "--out", "exported")
    card = json.loads((tmp_path / "exported" / "model.json").read_text())
    assert card["unknown"] == ["target_val/miou"]
    assert set(LABEL_FREE) <= set(card["metrics"])
    assert not any(name.startswith("target_val/") for name in card["metrics"])
    labelled = segadapt.predict(
        str(tmp_path / "exported" / "model.onnx"), str(tmp_path / "town/target/val/images"), str(tmp_path / "labels")
    )
    assert (labelled.written, labelled.unreadable) == (TINY["data.streets.val_images"], ())
    for run in tracked(tmp_path, "blind").values():
        assert not any(name.removeprefix("best/").startswith("target_val/") for name in run.data.metrics)
    board = segadapt.runs("blind", place=Place(tmp_path / "runs"))
    assert board.unknown == unknown
    assert all(row.best is not None for row in board.rows if row.kind == "trial")


@pytest.mark.slow
def test_a_few_target_labels_are_evaluated_with_and_all_images_scored(tmp_path: Path) -> None:
    segadapt.data_make(str(tmp_path / "town"), {key: value for key, value in TINY.items() if key.startswith("data.")})
    target, place = tmp_path / "town" / "target", Place(tmp_path / "runs")
    shutil.rmtree(target / "train" / "labels")
    for label in sorted((target / "val" / "labels").iterdir())[1:]:
        label.unlink()
    values = {f"data.{domain}": f"folder:{tmp_path}/town/{domain}" for domain in ("source", "target")}
    settings = {**{key: value for key, value in TINY.items() if not key.startswith("data.")}, **values}
    assert segadapt.train("source_only", settings, name="few", place=place).failed == 0
    board = segadapt.runs("few", place=place)
    assert board.unknown is None
    result = segadapt.evaluate("best", "few", place=place)
    assert result.images == 1
    assert result.metrics["target_val/miou"] == pytest.approx(board.rows[0].best)
