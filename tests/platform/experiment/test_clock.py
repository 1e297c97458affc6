"""What is last, and who is silent, does not depend on the clock."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial

from segadapt.platform.experiment import tune_state, watch
from segadapt.platform.experiment.tune_state import next_session
from segadapt.platform.experiment.watch import Watch
from segadapt.platform.ray_internals.tune import saving_as


class Listening:
    """A driver's watch over trials that run, with a clock of its own, and whom it killed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trials: int, timeout_s: float) -> None:
        self.now, self.killed = 0.0, list[str]()
        self.trials = {f"t{number}": SimpleNamespace(status=Trial.RUNNING, id=f"t{number}") for number in range(trials)}
        monkeypatch.setattr(watch, "kill_process", lambda trial: self.killed.append(trial.id))
        runs: Any = SimpleNamespace(failures={}, note=lambda *words, **fields: None)
        receivers: Any = None
        self.watch = Watch(runs, receivers, timeout_s, lambda: self.now)

    def wait(self, seconds: float, heard: tuple[str, ...] = ()) -> None:
        """Let time pass as Tune does that waits for its trials: it looks ten times a second."""
        for _ in range(round(10 * seconds)):
            self.now += 0.1
            for trial_id in heard:
                self.watch.heard(trial_id)
            self.watch.look(self.trials)


def test_a_trial_that_is_silent_while_the_driver_listens_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Listening(monkeypatch, trials=2, timeout_s=30)
    driver.wait(29, heard=("t0",))
    assert driver.killed == []
    driver.wait(2, heard=("t0",))
    assert driver.killed == ["t1"]


@pytest.mark.parametrize("standstill_s", [60.0, 3600.0])
def test_a_driver_that_stood_still_hears_its_trials_before_it_judges_them(
    standstill_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Listening(monkeypatch, trials=3, timeout_s=30)
    driver.wait(10, heard=("t0", "t1"))
    driver.now += standstill_s  # stopped, or waiting for a database
    driver.watch.look(driver.trials)
    assert driver.killed == [], "what they reported meanwhile is not read yet"
    driver.watch.heard("t0")  # Tune reads one report at a time
    driver.watch.look(driver.trials)
    driver.watch.heard("t1")
    driver.wait(15, heard=("t0", "t1"))
    assert driver.killed == []
    driver.wait(5, heard=("t0", "t1"))
    assert driver.killed == ["t2"], "which was silent for 30 s in which it could have been heard"


def test_the_last_session_is_counted_and_comes_after_those_of_earlier_versions(tmp_path: Path) -> None:
    assert next_session(tmp_path) == "session-000001"
    for session in ("2999-01-01_00-00-00", "session-000001", "session-000002"):
        for kind in ("experiment_state", "callback-states"):
            (tmp_path / f"{kind}-{session}.json").write_text(json.dumps(session))
    os.utime(tmp_path / "experiment_state-session-000001.json", (2e10, 2e10))  # as by a clock that is ahead
    assert next_session(tmp_path) == "session-000003"
    assert {file.session for file in tune_state._newest(tune_state._files(tmp_path))} == {"session-000002"}


def test_tune_saves_under_the_name_of_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TuneController, "__init__", lambda controller: setattr(controller, "_session_str", "2026"))
    with saving_as("session-000007"):
        assert TuneController()._session_str == "session-000007"  # type: ignore[call-arg]
    assert TuneController()._session_str == "2026"  # type: ignore[call-arg]
