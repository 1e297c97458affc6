"""How a search is written in its Optuna study, which is its one record: any tool that reads studies can open it."""

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from segadapt.platform.settings.config import METHOD, Values

TRIAL_ID = "trial_id"
"""Attribute of the study's trials that names the trial in Ray, MLflow and the storage folder."""

LOST = "lost"
"""Attribute of proposals that a killed driver had asked for and nobody ran; they are proposed again."""

PRIOR = "prior"
"""Attribute of trials that were taken over from an earlier search, which it names."""

TOO_LARGE = {"memory": 1.0}
"""Constraint, and by how much it is violated, of a trial that can never fit its device."""

RUNG = "rung_"
"""Attributes that hold what was decided about a trial, `rung_STEP`: its values there, and whether it goes on."""

_VALUES = "values_"
"""Attributes that hold a trial's values at a step, `values_STEP`, where Optuna keeps none: with several goals."""

Spaces = Mapping[str, Mapping[str, BaseDistribution]]
"""What varies, by method and dotted key."""


def record_values(trial: Any, known: FrozenTrial, step: int, values: Mapping[str, float]) -> None:
    """Write what a trial reached at a step, once: a resumed trial repeats its last evaluations.

    Args:
        trial: The study's handle of the trial.
        known: What the study holds of it.
        step: Training steps.
        values: By goal.
    """
    if step in values_by_step(known, list(values)):
        return
    if len(values) == 1:
        trial.report(next(iter(values.values())), step)
    else:
        trial.set_user_attr(f"{_VALUES}{step}", dict(values))


def values_as_kept(
    by_step: Mapping[int, Mapping[str, float]], goals: Sequence[str]
) -> tuple[dict[int, float], dict[str, Any]]:
    """Return what a trial reached at each step as a study keeps it: intermediate values, and attributes."""
    if len(goals) == 1:
        return {step: values[goals[0]] for step, values in by_step.items()}, {}
    return {}, {f"{_VALUES}{step}": dict(values) for step, values in by_step.items()}


def values_by_step(trial: FrozenTrial, goals: Sequence[str]) -> dict[int, Mapping[str, float]]:
    """Return what a trial reached at each step, by goal."""
    if len(goals) == 1:
        return {step: {goals[0]: value} for step, value in trial.intermediate_values.items()}
    return {
        int(name.removeprefix(_VALUES)): value for name, value in trial.user_attrs.items() if name.startswith(_VALUES)
    }


def is_infeasible(trial: Any) -> bool:
    """Return whether a trial of the study, or the study's handle of it, broke a constraint."""
    return any(violation > 0 for violation in trial.constraints.values())


def decisions(trial: FrozenTrial) -> dict[int, Any]:
    """Return what was decided about a trial, by rung."""
    return {int(name.removeprefix(RUNG)): value for name, value in trial.user_attrs.items() if name.startswith(RUNG)}


def study_point(spaces: Spaces, method: str, values: Values) -> dict[str, Any]:
    """Return settings of a method as the study names them."""
    return choice_of(spaces, method) | {study_name(spaces, method, key): value for key, value in values.items()}


def study_name(spaces: Spaces, method: str, key: str) -> str:
    """Return what a setting is called in the study: methods of a joint search have parameters of their own."""
    return key if len(spaces) == 1 else f"{method}.{key}"


def choice_of(spaces: Spaces, method: str) -> dict[str, Any]:
    """Return a trial's choice of method; nothing where there is no choice."""
    return {METHOD: method} if len(spaces) > 1 else {}


def propose(spaces: Spaces, trial: Any) -> dict[str, Any]:
    """Return the searched values of a trial of the study: the space, as Optuna's define-by-run has it."""
    methods = list(spaces)
    method = trial.suggest_categorical(METHOD, methods) if len(methods) > 1 else methods[0]
    values = {
        key: _suggest(trial, study_name(spaces, method, key), distribution)
        for key, distribution in spaces[method].items()
    }
    return choice_of(spaces, method) | values


def _suggest(trial: Any, name: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case FloatDistribution(low=low, high=high, step=step, log=log):
            return trial.suggest_float(name, low, high, step=step, log=log)
        case IntDistribution(low=low, high=high, step=step, log=log):
            return trial.suggest_int(name, low, high, step=step, log=log)
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(name, choices)
    raise TypeError(f"A search space must hold Optuna's distributions, but {name!r} is {distribution!r}.")
