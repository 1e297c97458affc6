"""Methods of one search, compared at equal budget: what each had reached when all had spent the same training steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from segadapt.platform.search.study import PRIOR, values_by_step
from segadapt.platform.settings.config import METHOD
from segadapt.platform.settings.objective import Objective


@dataclass(frozen=True)
class MethodResult:
    """What a method of a joint search reached."""

    method: str
    trials: int
    steps: int
    """Steps that its trials have spent."""
    best: float
    """Leading goal of its best evaluation."""
    budget: int
    """Steps that every method has spent."""
    best_at_budget: float
    """Best of the evaluations within that budget, trials taken in the order of their proposal."""


def compare_methods(trials: Sequence[Any], objective: Objective) -> list[MethodResult]:
    """Return the methods of a study, best at equal budget first; empty for a study of one method.

    Args:
        trials: Trials of the study.
        objective: Objective of the search; its leading goal is compared.
    """
    histories: dict[str, list[dict[int, float]]] = {}
    for trial in trials:
        evaluations = {
            step: values[objective.leading] for step, values in values_by_step(trial, objective.goals).items()
        }
        if METHOD in trial.params and PRIOR not in trial.user_attrs and evaluations:
            histories.setdefault(trial.params[METHOD], []).append(evaluations)
    if not histories:
        return []
    spent = {method: sum(max(values) for values in history) for method, history in histories.items()}
    budget = min(spent.values())
    results = [
        MethodResult(
            method=method,
            trials=len(history),
            steps=spent[method],
            best=max(value for values in history for value in values.values()),
            budget=budget,
            best_at_budget=_best_within(history, budget),
        )
        for method, history in histories.items()
    ]
    return sorted(results, key=lambda result: (-result.best_at_budget, result.method))


def _best_within(history: Sequence[dict[int, float]], budget: int) -> float:
    seen, before = [], 0
    for evaluations in history:
        seen += [value for step, value in evaluations.items() if before + step <= budget]
        before += max(evaluations)
    return max(seen, default=float("nan"))
