"""What a search takes over from an earlier one."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

import segadapt as api
from segadapt.platform.errors import UsageError
from segadapt.platform.experiment.record import Record
from segadapt.platform.search.ranges import split_ranges, start
from segadapt.platform.search.study import PRIOR, TRIAL_ID, propose
from segadapt.platform.search.warm_start import SearchSettings, inherit
from segadapt.platform.storage.folders import Place, open_storage

MIOU = "target_val/miou"
SPACE = {"method.temperature": FloatDistribution(0.1, 10.0, log=True)}


def search(fixed: dict[str, Any], space: dict[str, Any] = SPACE, objective: str = MIOU) -> SearchSettings:
    return SearchSettings({"sdca": fixed}, {"sdca": space}, objective)


@pytest.fixture
def trials() -> list[Any]:
    """Of a search over the temperature: 0.5 -> 0.4, 5.0 -> 0.6, one stopped early and one that failed."""
    study = optuna.create_study(direction="maximize")
    for temperature, value in ((0.5, 0.4), (5.0, 0.6), (1.0, None), (2.0, None)):
        study.enqueue_trial({"method.temperature": temperature})
        trial = study.ask()
        propose({"sdca": SPACE}, trial)
        trial.set_user_attr(TRIAL_ID, str(trial.number))
        trial.set_user_attr("rung_2", {"values": {MIOU: 0.3}, "continues": value is not None})
        trial.report(0.3, 2)
        state = TrialState.COMPLETE if value is not None else (TrialState.PRUNED, TrialState.FAIL)[trial.number - 2]
        study.tell(trial, value, state=state)
    return study.trials


def test_trials_that_the_new_search_could_have_run_count_with_values_and_rungs(trials: list[Any]) -> None:
    found = inherit("old", search({"trainer.steps": 100}), search({"trainer.steps": 100}), trials)
    assert [trial.params["method.temperature"] for trial in found.trials] == [0.5, 5.0, 1.0]
    assert [trial.state.name for trial in found.trials] == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert all(trial.user_attrs[PRIOR] == "old" and TRIAL_ID not in trial.user_attrs for trial in found.trials)
    assert found.trials[0].user_attrs["rung_2"]["continues"]
    assert str(found) == "from old: 3 trials count as prior points"
    study = optuna.create_study(direction="maximize")
    study.add_trials(found.trials)
    assert study.best_value == 0.6


def test_what_did_not_fit_one_device_is_not_held_against_another(trials: list[Any]) -> None:
    trials[2].set_constraint("memory", 1.0)
    assert [trial.number for trial in inherit("old", search({}), search({}), trials[2:3]).trials] == []
    assert len(inherit("old", search({}), search({}), trials).trials) == 2


def test_trials_outside_a_changed_range_are_left_out_and_named(trials: list[Any]) -> None:
    narrower = search({}, {"method.temperature": FloatDistribution(0.1, 2.0, log=True)})
    found = inherit("old", search({}), narrower, trials)
    assert [trial.params["method.temperature"] for trial in found.trials] == [0.5, 1.0]
    assert str(found).endswith("left out: 1 (method.temperature outside the range)")


def test_what_one_search_fixed_and_the_other_varies_is_known(trials: list[Any]) -> None:
    wider = search({}, {**SPACE, "method.confidence_threshold": FloatDistribution(0.5, 0.98)})
    fixed = search({"method.confidence_threshold": 0.7})
    assert [t.params["method.confidence_threshold"] for t in inherit("old", fixed, wider, trials).trials] == [0.7] * 3
    default = inherit("old", search({}), wider, trials)
    assert {trial.params["method.confidence_threshold"] for trial in default.trials} == {0.9}
    backwards = inherit("old", search({}), search({"method.temperature": 5.0}, {}), trials)
    assert [trial.value for trial in backwards.trials] == [0.6]


def test_other_data_leave_only_settings_to_try_first(trials: list[Any]) -> None:
    found = inherit("old", search({"data.streets.seed": 0}), search({"data.streets.seed": 1}), trials)
    assert found.trials == []
    assert found.points == [{"method.temperature": 5.0}]
    assert "left out: 3 (data.streets.seed differs)" in str(found)
    objective = inherit("old", search({}), search({}, objective="score/entropy"), trials)
    assert objective.mismatches == {f"objective {MIOU}": 3}


def test_a_joint_search_takes_over_one_methods_trials(trials: list[Any]) -> None:
    joint = SearchSettings({"sdca": {}, "clst": {}}, {"sdca": SPACE, "clst": {}}, MIOU)
    found = inherit("old", search({}), joint, trials)
    assert found.trials[1].params == {"method": "sdca", "sdca.method.temperature": 5.0}
    back = inherit("joint", joint, search({}), found.trials)
    assert [trial.params for trial in back.trials] == [{"method.temperature": value} for value in (0.5, 5.0, 1.0)]


def test_ranges_are_read_from_settings() -> None:
    values = {
        "method.temperature": "log_interval(0.5, 5)",
        "method.lovasz_weight": "choice(0, 0.75)",
        "trainer.steps": 40,
    }
    fixed, ranges = split_ranges("sdca", values)
    assert fixed == {"trainer.steps": 40}
    assert ranges == {
        "method.temperature": FloatDistribution(0.5, 5, log=True),
        "method.lovasz_weight": CategoricalDistribution((0, 0.75)),
    }
    assert start(ranges["method.temperature"], 100.0) == 5.0
    assert start(ranges["method.temperature"], None) == pytest.approx(2.5**0.5)
    assert start(ranges["method.lovasz_weight"], 0.75) == 0.75


@pytest.mark.parametrize(
    ("text", "distribution"),
    [
        ("log_interval(1e-5, 1e-2)", FloatDistribution(1e-5, 1e-2, log=True)),
        ("choice(1e-3, .5, 2)", CategoricalDistribution((1e-3, 0.5, 2))),
        ("choice([1, 2][0], 3)", None),
        ("choice(1:30, 2)", None),
        ("choice(3 # 4)", None),
    ],
)
def test_ends_and_choices_are_read_as_values_of_settings_are(text: str, distribution: Any) -> None:
    if distribution is not None:
        assert split_ranges("sdca", {"method.temperature": text})[1] == {"method.temperature": distribution}
        return
    with pytest.raises(UsageError, match=r"A range must be|must be of type float"):
        split_ranges("sdca", {"method.temperature": text})


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("method.temperature", "interval(5, 1)", "A range must be"),
        ("method.temperature", "interval(1)", "A range must be"),
        ("method.temperature", "log_interval(0, 1)", "A range must be"),
        ("method.temperature", "interval(-1, 1)", "temperature must be positive"),
        ("method.nonsense", "interval(0, 1)", "method.nonsense"),
        ("trainer.steps", "choice(10, 20)", "must act on the trials alone"),
        ("optimizer.momentum", "interval(0.5, 0.9)", "must act on the trials alone"),
        ("data.streets.seed", "choice(0, 1)", "must act on the trials alone"),
    ],
)
def test_a_range_that_cannot_be_searched_is_refused(key: str, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        split_ranges("sdca", {key: text})


def test_a_fork_takes_over_what_is_not_given(tmp_path: Path) -> None:
    storage = str(tmp_path)
    words = {"trainer.steps": 40, "method.temperature": "log_interval(0.5, 5)"}
    parent = api.plan(["sdca"], words, trials=7, seed=3, sampler="random", place=Place(storage)).record
    parent.save(open_storage(storage))
    fork = api.plan(
        [], {"method.lovasz_weight": 0.5, "data.streets.seed": 1}, fork=parent.name, place=Place(storage)
    ).record
    assert (fork.trials, fork.seed, fork.sampler, fork.scheduler) == (7, 3, "random", "asha")
    assert (fork.forked_from, fork.warm_start) == (parent.name, [parent.name])
    found, before = fork.candidates["sdca"], parent.candidates["sdca"]
    assert found.fixed == {**before.fixed, "method.lovasz_weight": 0.5, "data.streets.seed": 1}
    assert found.space == {key: value for key, value in before.space.items() if key != "method.lovasz_weight"}
    assert found.first["method.temperature"] == 5.0, "the published 100 lies outside"
    assert Record.load(open_storage(storage), parent.name).candidates == parent.candidates
    front = api.plan([], {}, fork=parent.name, objective=f"{MIOU},time/step", place=Place(storage)).record
    assert front.scheduler == "none"
