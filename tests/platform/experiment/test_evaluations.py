"""What trials reached, from what they reported and from what they left in storage."""

import json
from pathlib import Path

import pytest

from segadapt.platform.experiment.evaluations import Evaluations
from segadapt.platform.settings.reported import Reported
from segadapt.platform.settings.resources import Allocation
from segadapt.platform.storage.folders import Storage
from segadapt.platform.trial.spec import TrialSpec
from segadapt.trainables.core.training.checkpoint import save_state

MIOU = "target_val/miou"


def left(spec: TrialSpec, step: int, value: float) -> Path:
    """A checkpoint as a trial leaves it."""
    folder = spec.folder / "a" / f"checkpoint_{step:06d}"
    folder.mkdir(parents=True)
    save_state(folder, {"step": step})
    (folder / "evaluation.json").write_text(json.dumps({"metrics": {"step": step, MIOU: value}}))
    return folder


def heard(evaluations: Evaluations, spec: TrialSpec, values: list[float]) -> list[Path]:
    folders = []
    for step, value in enumerate(values, 1):
        evaluations.reported("a", Reported(metrics={MIOU: value}, step=step))
        folders.append(left(spec, step, value))
        evaluations.kept("a", folders[-1])
    return folders


def test_the_best_that_a_trial_reported_is_known_without_reading_it(tmp_path: Path) -> None:
    spec = TrialSpec(Storage(tmp_path), "test", {})
    evaluations = Evaluations(spec)
    folders = heard(evaluations, spec, [0.2, 0.5, 0.5, 0.1])
    for folder in folders:
        (folder / "evaluation.json").unlink()
    best = evaluations.best("a")
    assert best is not None
    assert (best.path, best.metrics) == (folders[2], {"step": 3, MIOU: 0.5}), "the later one of equals"


@pytest.mark.parametrize("why", ["started again", "workers of Ray Train", "removed"])
def test_what_this_session_may_not_have_heard_is_read_from_storage(why: str, tmp_path: Path) -> None:
    resources = Allocation(launcher="train" if why == "workers of Ray Train" else "auto")
    spec = TrialSpec(Storage(tmp_path), "test", {}, resources)
    evaluations = Evaluations(spec)
    folders = heard(evaluations, spec, [0.2, 0.5])
    unheard = left(spec, 3, 0.4 if why == "removed" else 0.9)
    if why == "started again":
        evaluations.forget(["a"])
    elif why == "removed":
        folders[1].rename(tmp_path / "away")
    assert evaluations.known("a") is None
    best = evaluations.best("a")
    assert best is not None
    assert best.path == unheard
