"""Methods of one search at equal budget."""

from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from segadapt.platform.results.methods import compare_methods
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
