"""States of trials, and what their processes report, as MLflow, Optuna and Tune have them."""

import json
from pathlib import Path
from typing import get_args

import pytest

from segadapt.platform.settings.reported import End, Reported
from segadapt.platform.settings.states import MlflowStatus, OptunaState, TrialState


@pytest.mark.parametrize("state", TrialState)
def test_mlflow_and_optuna_have_a_word_for_every_state(state: TrialState) -> None:
    assert state.mlflow in get_args(MlflowStatus)
    assert state.optuna in get_args(OptunaState)
    assert (state.mlflow == "RUNNING") == state.is_open
    assert TrialState.of(str(state)) is state


def test_a_tag_that_names_no_state_is_none() -> None:
    assert TrialState.of("done by hand") is None
    assert TrialState.of(None) is None


def test_mlflow_may_know_more_of_an_end_than_ray() -> None:
    assert TrialState.OUT_OF_TIME.tells(TrialState.STOPPED_EARLY)
    assert TrialState.INFEASIBLE.tells(TrialState.FAILED)
    assert not TrialState.FINISHED.tells(TrialState.STOPPED_EARLY)
    assert not TrialState.INTERRUPTED.tells(TrialState.FINISHED)


@pytest.mark.parametrize(
    "reported",
    [
        Reported(metrics={"target_val/miou": 0.5, "lr": 1e-3}, step=4, stage="adapt", fingerprint="f"),
        Reported(metrics={"loss/total": 1.0}, step=8, stage="adapt", stage_finished=True, end=End.FINISHED),
        Reported(step=0, checkpoint=Path("/runs/checkpoint_000001"), memory_note="smaller"),
        Reported(end=End.FAILED, reason="ValueError: no"),
        Reported(end=End.INFEASIBLE, reason="too large"),
        Reported(end=End.PREEMPTED, reason="asked to end"),
    ],
)
def test_what_is_reported_comes_back_from_what_tune_saves(reported: Reported) -> None:
    saved = json.loads(json.dumps(reported.as_result()))
    assert Reported.from_result(saved | {"trial_id": "a", "done": True, "training_iteration": 3}) == reported


def test_the_reason_of_a_failure_reads_as_it_always_did() -> None:
    assert Reported(end=End.INFEASIBLE, reason="too large").failure == "infeasible: too large"
    assert Reported(end=End.FAILED, reason="ValueError: no").failure == "ValueError: no"
    assert Reported(end=End.PREEMPTED, reason="asked to end").failure is None
    assert Reported(step=1).failure is None


def test_failures_that_an_earlier_version_saved_are_read() -> None:
    infeasible = Reported.from_result({"failure": "infeasible: too large", "training_iteration": 1})
    assert infeasible == Reported(end=End.INFEASIBLE, reason="too large")
    assert Reported.from_result({"failure": "ValueError: no"}).failure == "ValueError: no"
