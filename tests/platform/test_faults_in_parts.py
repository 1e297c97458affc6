"""What tolerates faults, piece by piece; `tests/faults` has it whole, with real kills."""

from dataclasses import dataclass
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution

from segadapt.platform.errors import UsageError
from segadapt.platform.experiment.naming import Labels, RunNames
from segadapt.platform.experiment.tuning import _close_unfinished
from segadapt.platform.search.searcher import StudySearch
from segadapt.platform.search.study import LOST
from segadapt.platform.settings.objective import Objective
from segadapt.platform.settings.resources import Tolerance
from segadapt.platform.storage.retries import retry
from segadapt.platform.trial.launchers import _again_if_not_at_fault
from segadapt.trainables.core.training.interruption import note_preemption


class Disk:
    """Refuses so many writes."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals

    def write(self) -> str:
        if self.refusals > 0:
            self.refusals -= 1
            raise OSError("full")
        return "written"


def test_storage_that_refuses_is_asked_again_for_so_long() -> None:
    assert retry(Disk(refusals=2).write, OSError, 60) == "written"
    with pytest.raises(OSError, match="full"):
        retry(Disk(refusals=9).write, OSError, 1)
    with pytest.raises(OSError, match="full"):
        retry(Disk(refusals=1).write, KeyError, 60)


@pytest.mark.parametrize("settings", [{"max_failures": -1}, {"timeout_s": 0.0}, {"timeout_s": float("nan")}])
def test_tolerance_is_checked(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="must"):
        Tolerance(**settings)  # type: ignore[arg-type]


class Workers:
    """Die (D) or leave (L) in this order, under what starts them again and counts both alike, as Ray Train does."""

    def __init__(self, folder: Path, events: str) -> None:
        self.folder = folder
        self.events = list(events)

    def fit(self, max_failures: int) -> str:
        for failures in range(1, len(self.events) + 1):
            event = self.events.pop(0)
            if event == "L":
                note_preemption(self.folder)
            if failures > max_failures:
                raise RuntimeError("worker died" if event == "D" else "PreemptedError: asked to end")
        return "trained"


@pytest.mark.parametrize(
    ("events", "ends_well"),
    [("", True), ("DD", True), ("DDD", False), ("LLLLLLL", True), ("DLD", True), ("LDLDL", True), ("DLDLD", False)],
)
def test_workers_may_leave_as_often_as_they_are_asked_to(events: str, ends_well: bool, tmp_path: Path) -> None:
    workers = Workers(tmp_path, events)
    if ends_well:
        assert _again_if_not_at_fault(workers.fit, tmp_path, 2) == "trained"
    else:
        with pytest.raises(RuntimeError, match="worker died"):
            _again_if_not_at_fault(workers.fit, tmp_path, 2)
    assert workers.events == []


@dataclass
class Proposed:
    trial_id: str


def test_a_trial_that_is_started_again_does_not_change_the_numbers_of_others() -> None:
    names = RunNames(Labels("test", "trial", [], {}, None), "test")
    first, second, third = map(Proposed, "abc")
    assert names.number([first, second], "a") == 1
    assert names.number([second, first, third], "b") == 2, "Tune has put the first at the end"
    assert names.number([second, first, third], "c") == 3


def test_a_proposal_that_was_written_twice_is_no_trial() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searcher = StudySearch(
        spaces={"sdca": {"method.temperature": FloatDistribution(0.1, 10.0)}},
        first={"sdca": {"method.temperature": 1.0}},
        objective=Objective(),
        sampler=optuna.samplers.RandomSampler,
        seed=0,
        concurrent=2,
        study_name="found",
        storage=optuna.storages.InMemoryStorage(),
    )
    searcher.suggest("a")
    searcher.study.ask()  # its answer was lost, so that the trial was asked for again
    _close_unfinished(searcher, ["target_val/miou"])
    assert [LOST in trial.user_attrs for trial in searcher.study.trials] == [False, True]
    assert all(trial.state.is_finished() for trial in searcher.study.trials)
