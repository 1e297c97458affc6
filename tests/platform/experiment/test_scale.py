"""What a search does per trial and report does not grow with how many trials there are."""

import io
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages._rdb import storage as rdb
from optuna.trial import TrialState as OptunaState
from optuna.trial import create_trial
from ray.tune.execution.tune_controller import TrialRunnerWrapper
from rich.console import Console

from segadapt.platform.experiment.ledger import LEDGER, Ledger
from segadapt.platform.experiment.progress import Progress
from segadapt.platform.ray_internals.tune import pace
from segadapt.platform.search.horizon import Horizon
from segadapt.platform.search.priorband import Prior
from segadapt.platform.search.samplers import make_sampler
from segadapt.platform.search.schedulers import SCHEDULERS
from segadapt.platform.search.searcher import StudySearch
from segadapt.platform.search.study import RUNG, TRIAL_ID
from segadapt.platform.search.study_storage import open_study_storage
from segadapt.platform.settings.objective import Objective
from segadapt.platform.settings.resources import Allocation
from segadapt.platform.settings.states import TrialState

MIOU = "target_val/miou"
SPACE = {"sdca": {"optimizer.lr_factor": FloatDistribution(0.2, 8.0, log=True)}}


class Study:
    """A searcher and a scheduler on a study in SQL with trials that have ended and trials that run."""

    def __init__(self, ended: int, running: int, monkeypatch: pytest.MonkeyPatch) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.statements = self.trials_read = 0
        storage = open_study_storage("sqlite:///:memory:")
        fill(storage, ended)
        self._count(monkeypatch)
        horizon = Horizon(2, 8, running + 1)
        self.searcher = StudySearch(
            spaces=SPACE,
            first={"sdca": {"optimizer.lr_factor": 1.0}},
            objective=Objective(),
            sampler=make_sampler(
                "auto",
                seed=0,
                joint=False,
                horizon=horizon,
                prior=Prior({}),
                objective=Objective(),
            ),
            seed=0,
            concurrent=running + 1,
            study_name="scale",
            storage=storage,
        )
        self.scheduler: Any = SCHEDULERS["asha"].of(self.searcher.study, Objective(), horizon)
        for number in range(running):
            self.searcher.suggest(f"running-{number}")
        self.run_trial("first")  # reads what there is

    def _count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sqlalchemy import Engine, event

        def execute(*_: Any) -> None:
            self.statements += 1

        event.listen(Engine, "before_cursor_execute", execute)
        build = rdb.RDBStorage._build_frozen_trial_from_trial_model

        def built(storage: Any, trial: Any) -> Any:
            self.trials_read += 1
            return build(storage, trial)

        monkeypatch.setattr(rdb.RDBStorage, "_build_frozen_trial_from_trial_model", built)

    def run_trial(self, name: str) -> dict[str, int]:
        """Propose a trial, hear its reports and its end; returns what that took."""
        self.statements = self.trials_read = 0
        assert self.searcher.suggest(name) is not None
        for step in (2, 4, 6, 8):
            result = {MIOU: 2.0, "step": step, "finished": step == 8}  # better than all
            assert self.scheduler.on_trial_result(None, SimpleNamespace(trial_id=name), result) == "CONTINUE"
        self.searcher.on_trial_complete(name, result)
        assert self.searcher.study.trials[-1].intermediate_values == {2: 2.0, 4: 2.0, 6: 2.0, 8: 2.0}
        return {"statements": self.statements, "trials read": self.trials_read}


def fill(storage: Any, ended: int) -> None:
    """Make a study of so many trials that were stopped at the first rung."""
    study = optuna.create_study(study_name="scale", storage=storage, direction="maximize")
    distributions = SPACE["sdca"]
    for number in range(ended):
        value = number / ended
        decision = {"values": {MIOU: value}, "continues": False}
        study.add_trial(
            create_trial(
                state=OptunaState.PRUNED,
                params={"optimizer.lr_factor": 1.0 + value},
                distributions=distributions,
                intermediate_values={2: value},
                user_attrs={TRIAL_ID: f"ended-{number}", f"{RUNG}2": decision},
            )
        )


def costs(ended: int, running: int) -> dict[str, int]:
    """What a trial takes beside so many others."""
    with pytest.MonkeyPatch.context() as patch:
        return Study(ended, running, patch).run_trial("next")


def test_a_trial_costs_the_study_as_much_however_many_have_ended() -> None:
    assert costs(ended=12, running=2) == costs(ended=36, running=2)


def test_the_study_is_asked_as_often_for_each_trial_and_reads_those_that_run_a_few_times() -> None:
    few, many = costs(ended=12, running=2), costs(ended=12, running=8)
    assert few["statements"] == many["statements"]
    assert many["trials read"] - few["trials read"] <= 6 * 6, "six times in four reports and its end"


def test_accounts_are_written_every_few_seconds_whatever_ends(tmp_path: Path) -> None:
    now, writes = [0.0], 0
    ledger = Ledger(tmp_path, Allocation(), clock=lambda: now[0])
    for number in range(1000):
        ledger.start(f"t{number}")
        now[0] += 0.01
        ledger.stop(f"t{number}")
        ledger.keep()
        if (tmp_path / LEDGER).exists():
            writes += 1
            (tmp_path / LEDGER).unlink()
    assert 1 <= writes <= 2


class Unread(dict[str, Any]):
    """A dictionary that nobody goes through."""

    def values(self) -> Any:
        """Refuse."""
        raise AssertionError("all trials were gone through")


def test_a_report_is_shown_without_going_through_all_trials() -> None:
    written = io.StringIO()
    progress = Progress("search", MIOU, trials=4, steps=8, console=Console(file=written, width=160))
    progress._views = Unread()
    for number, value in enumerate((0.5, 0.7, 0.6)):
        progress.started(f"t{number}", f"sdca-{number}", step=2 if number == 2 else 0)
        progress.result(f"t{number}", 4, value)
    progress.paused("t0")
    progress.ended("t1", TrialState.FINISHED)
    assert written.getvalue().splitlines()[-1].startswith("sdca-1 finished · best 0.700 (sdca-1) · 1/4 trials done")
    assert (progress._taken, progress._missing) == (10, 8 + 4), "of a trial not begun and one that runs"


def test_a_search_that_goes_on_counts_what_ended_before() -> None:
    written = io.StringIO()
    progress = Progress("search", MIOU, trials=5, steps=8, console=Console(file=written, width=160))
    progress.ended_before(3)
    assert written.getvalue().splitlines()[-1] == "search: going on, 3/5 trials done"
    progress.started("t3", "sdca-003")
    progress.result("t3", 8, 0.5)
    progress.ended("t3", TrialState.FINISHED)
    assert "4/5 trials done" in written.getvalue().splitlines()[-1]
    assert progress._missing == 8


def shown_by_the_minute(trials: int, steps: int) -> tuple[Progress, io.StringIO, list[float]]:
    """A progress without a terminal, what it has written, and its clock in seconds."""
    written, now = io.StringIO(), [0.0]
    console = Console(file=written, width=160)
    return Progress("search", MIOU, trials, steps, console, lambda: now[0]), written, now


def test_the_best_of_earlier_sessions_stays_the_best() -> None:
    progress, written, _ = shown_by_the_minute(trials=2, steps=8)
    progress.reached_before("sdca-001", 0.404)
    progress.reached_before("sdca-002", 0.2)
    progress.started("t2", "sdca-002", step=4)
    progress.result("t2", 8, 0.399)
    assert "step 8/8 target_val/miou 0.399 · best 0.404 (sdca-001)" in written.getvalue()


def test_something_is_said_each_minute_however_slow_the_trials_are() -> None:
    progress, written, now = shown_by_the_minute(trials=8, steps=8)
    for number in range(6):
        progress.started(f"t{number}", f"sdca-{number}")
    for _ in range(15 * 60):  # as Tune's loop asks
        now[0] += 1
        progress.beat()
    lines = written.getvalue().splitlines()
    assert len(lines) == 1 + 15
    assert lines[-1].startswith("at work: sdca-0 step 0/8, sdca-1 step 0/8, sdca-2 step 0/8, sdca-3 step 0/8, 2 more")
    progress.result("t0", 2, 0.5)
    now[0] += 59
    progress.beat()
    assert len(written.getvalue().splitlines()) == 17, "a report is a sign of life as well"


def test_nothing_is_shown_where_nobody_wants_to_see_it() -> None:
    written = io.StringIO()
    progress = Progress(None, MIOU, trials=1, steps=8, console=Console(file=written, force_terminal=True))
    progress.started("t", "sdca-001")
    progress.result("t", 8, 0.5)
    progress.ended("t", TrialState.FINISHED)
    progress.close()
    assert written.getvalue() == ""


def test_the_time_left_has_a_spread_and_comes_with_its_ground() -> None:
    progress, written, now = shown_by_the_minute(trials=4, steps=12)

    def last() -> str:
        return written.getvalue().splitlines()[-1]

    progress.started("t0", "sdca-0")
    for step, seconds in ((2, 40), (4, 42)):
        now[0] += seconds
        progress.result("t0", step, 0.5)
        assert "left" not in last(), "two reports are no ground"
    now[0] += 38
    progress.result("t0", 6, 0.5)
    assert last().endswith("· at most 15 min left"), "42 steps at 20 s, and how unlike the reports were"
    progress.ended("t0", TrialState.STOPPED_EARLY)
    assert last().endswith("· 6 to 13 min left"), "36 steps, or half of them where all are stopped as the first was"


@pytest.mark.parametrize("trials", [10, 10_000])
def test_saving_the_state_takes_a_twentieth_of_the_time(
    trials: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving takes 1 ms per trial; each 0.1 s a trial writes a checkpoint and Tune asks for the state to be saved."""
    now, spent = [0.0], 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    syncer = SimpleNamespace(sync_up=lambda *_: True, wait=lambda: None)
    storage = SimpleNamespace(syncer=syncer, experiment_driver_staging_path=str(tmp_path), experiment_fs_path="there")
    controller = SimpleNamespace(_checkpoint_manager=None, _storage=storage)
    pace(TrialRunnerWrapper(controller, None))  # type: ignore[arg-type]  # as schedulers are given it
    found: Any = controller._checkpoint_manager

    def save() -> None:
        nonlocal spent
        spent += 1e-3 * trials
        now[0] += 1e-3 * trials

    while now[0] < 1000:
        now[0] += 0.1
        found.on_trial_checkpoint(SimpleNamespace())
        found.sync_up_experiment_state(save)
    assert spent <= 60
    found.sync_up_experiment_state(save, force=True, wait=True)
