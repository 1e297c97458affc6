"""Methods of one search at equal budget."""

from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial
from scipy import stats

from segadapt.platform.results.methods import additions, compare_methods
from segadapt.platform.results.seeds import rerank
from segadapt.platform.search.study import PRIOR
from segadapt.platform.settings.objective import Objective


def trial(method: str, values: dict[int, float], **attributes: str) -> Any:
    return create_trial(
        state=TrialState.PRUNED,
        params={"method": method},
        distributions={"method": CategoricalDistribution(["a", "b"])},
        intermediate_values=values,
        user_attrs=attributes,
    )


def test_methods_are_compared_at_the_steps_that_all_have_spent() -> None:
    trials = [
        trial("a", {10: 0.3, 20: 0.4}),
        trial("b", {10: 0.35}),
        trial("a", {10: 0.2}),
        trial("b", {10: 0.3, 20: 0.36}),
        trial("a", {10: 0.5, 20: 0.9}, **{PRIOR: "earlier"}),
        trial("a", {10: 0.6, 20: 0.8}),
    ]
    first, second = compare_methods(trials, Objective())
    assert (first.method, first.trials, first.steps, first.best) == ("a", 3, 50, 0.8)
    assert (second.method, second.trials, second.steps, second.best) == ("b", 2, 30, 0.36)
    assert first.budget == second.budget == 30
    assert first.best_at_budget == 0.4, "what it found later, with more steps, does not count; nor a prior trial"
    assert second.best_at_budget == 0.36


def test_one_method_has_nobody_to_be_compared_with() -> None:
    study = optuna.create_study()
    assert compare_methods(study.trials, Objective()) == []


def test_what_losses_add_is_paired_by_seed_where_both_were_trained_again() -> None:
    methods = {
        "o-1": "online_self_training",
        "o-2": "online_self_training",
        "s-1": "sdca",
        "b-1": "bicl",
        "p-1": "plca",
    }
    ranking = rerank(
        {
            "s-1": {1: 0.50, 2: 0.60, 3: 0.70},
            "o-2": {1: 0.48, 2: 0.59, 3: 0.67},
            "o-1": {1: 0.10, 2: 0.10, 3: 0.10},
            "b-1": {1: 0.40, 2: 0.60, 3: 0.66},
        }
    )
    at_budget = {"online_self_training": 0.6, "sdca": 0.65, "plca": 0.61}
    sdca, plca, bicl = additions("online_self_training", at_budget, ranking, methods)
    assert (sdca.method, sdca.trial) == ("sdca", "s-1")
    assert (sdca.mean, sdca.at_budget) == (pytest.approx(0.02), pytest.approx(0.05))
    assert sdca.half_width == pytest.approx(stats.t.interval(0.95, 2, scale=stats.sem([0.02, 0.01, 0.03]))[1])
    assert str(sdca) == "sdca +0.020 ± 0.025", "beside the best of the shared training alone, not its first"
    assert (plca.trial, plca.mean, str(plca)) == (None, None, "plca +0.010 (one seed)")
    assert (bicl.at_budget, bicl.mean) == (None, pytest.approx(-0.08 / 3))


def test_a_difference_of_nothing_over_seeds_counts_and_not_that_of_one_seed() -> None:
    methods = {"o-1": "online_self_training", "s-1": "sdca", "b-1": "bicl"}
    ranking = rerank({"o-1": {1: 0.5, 2: 0.5}, "s-1": {1: 0.5, 2: 0.5}})
    bicl, sdca = additions(
        "online_self_training", {"online_self_training": 0.5, "sdca": 0.9, "bicl": 0.6}, ranking, methods
    )
    assert (bicl.method, sdca.method, sdca.mean) == ("bicl", "sdca", 0.0)
