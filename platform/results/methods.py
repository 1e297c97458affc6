"""Methods of one search, compared at equal budget: what each had reached when all had spent the same training steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from segadapt.platform.results.seeds import Reranked, paired_difference
from segadapt.platform.search.study import PRIOR, values_by_step
from segadapt.platform.settings.config import METHOD
from segadapt.platform.settings.objective import Objective
from segadapt.platform.settings.text import number_text


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


@dataclass(frozen=True)
class Addition:
    """What the losses of a method add to a training that all methods of a search share."""

    method: str
    at_budget: float | None
    """Its best minus that of the shared training alone, when both had spent the same steps; None if one is unknown."""
    trial: str | None = None
    """Name of the trial whose configuration was trained again; None if none of the method was."""
    mean: float | None = None
    """Mean difference over the seeds on which both were trained."""
    half_width: float | None = None
    """Half the width of the 95 % confidence interval of that difference, paired by seed (Student's t)."""

    def __str__(self) -> str:
        """Return the method, and what its losses add."""
        if self.mean is not None:
            return f"{self.method} {self.mean:+.3f} ± {number_text(self.half_width)}"
        return f"{self.method} {'-' if self.at_budget is None else f'{self.at_budget:+.3f} (one seed)'}"


def additions(
    ground: str, at_budget: Mapping[str, float], reranked: Sequence[Reranked], method_of: Mapping[str, str]
) -> list[Addition]:
    """Return what the losses of each other method add, by its best configuration; the largest first.

    Args:
        ground: The method that is the shared training alone.
        at_budget: Best of each method when all had spent the same steps.
        reranked: Configurations that were trained again, best first.
        method_of: Method of each trial by its name.
    """
    repeated: dict[str, Reranked] = {}
    for configuration in reranked:
        repeated.setdefault(method_of.get(configuration.name, ""), configuration)
    alone, results = repeated.get(ground), []
    for method in sorted(set(method_of.values()) - {ground}):
        known = method in at_budget and ground in at_budget
        result = Addition(method, at_budget[method] - at_budget[ground] if known else None)
        if alone is not None and (again := repeated.get(method)) is not None:
            mean, half_width = paired_difference(again.values, alone.values)
            result = replace(result, trial=again.name, mean=mean, half_width=half_width)
        results.append(result)
    return sorted(results, key=lambda result: -_rank(result))


def _rank(result: Addition) -> float:
    """Return the best known difference; none counts as least."""
    return next((known for known in (result.mean, result.at_budget) if known is not None), -math.inf)


def _best_within(history: Sequence[dict[int, float]], budget: int) -> float:
    seen, before = [], 0
    for evaluations in history:
        seen += [value for step, value in evaluations.items() if before + step <= budget]
        before += max(evaluations)
    return max(seen, default=float("nan"))
