"""Promises of the study in memory: its record is the same study, whenever it is flushed, closed or reopened."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from segadapt.platform.study_memory import StudyMemory

SPACE = {
    "x": FloatDistribution(1e-3, 1.0, log=True),
    "n": IntDistribution(1, 5),
    "c": CategoricalDistribution([True, False]),
}


def content(study: optuna.Study) -> list[tuple[Any, ...]]:
    return [
        (t.number, t.state, t.params, t.distributions, t.values, t.intermediate_values, t.user_attrs, t.system_attrs)
        for t in study.get_trials(deepcopy=False)
    ]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


def opened(url: str) -> tuple[StudyMemory, optuna.Study]:
    memory = StudyMemory(RDBStorage(url))
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(
        storage=memory, study_name="s", direction="maximize", load_if_exists=True, sampler=sampler
    )
    return memory, study


def run_trials(study: optuna.Study, memory: StudyMemory, flush_each: bool) -> None:
    study.set_user_attr("seed", 3)
    study.enqueue_trial({"x": 0.5})
    for number in range(9):
        trial = study.ask(SPACE)
        trial.set_user_attr("trial_id", str(number))
        for step in (10, 20):
            trial.report(number / step, step)
            trial.set_user_attr(f"rung_{step}", {"value": number / step, "continues": True})
            if flush_each:
                memory.flush()
        match number % 4:
            case 0:
                study.tell(trial, 0.5)
            case 1:
                study.tell(trial, state=TrialState.PRUNED)
            case 2:
                study.tell(trial, state=TrialState.FAIL)
    study.enqueue_trial({"x": 0.25, "n": 3})


@pytest.mark.parametrize("flush_each", [False, True])
def test_the_record_is_the_same_study(url: str, flush_each: bool) -> None:
    memory, study = opened(url)
    run_trials(study, memory, flush_each)
    memory.flush()
    record = optuna.load_study(study_name="s", storage=url)
    assert content(record) == content(study)
    assert record.user_attrs == {"seed": 3}
    memory.close()

    memory, again = opened(url)
    assert content(again) == content(record)
    running = [trial for trial in again.get_trials(deepcopy=False) if trial.state == TrialState.RUNNING]
    assert len(running) == 2
    again.tell(running[0].number, 0.75)
    assert again.ask(SPACE).params["n"] == 3  # what waited in the record comes first
    memory.close()
    assert content(optuna.load_study(study_name="s", storage=url)) == content(again)


def test_a_record_that_fails_ends_the_search(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, study = opened(url)

    def refuse(*arguments: Any) -> int:
        raise OSError("disk full")

    monkeypatch.setattr(memory._record, "create_new_trial", refuse)
    trial = study.ask(SPACE)
    with pytest.raises(OSError, match="disk full"):
        memory.flush()
    with pytest.raises(OSError, match="disk full"):
        trial.report(0.5, 1)
