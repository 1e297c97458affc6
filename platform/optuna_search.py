"""Tune's Optuna searcher over one method or several, taught to tell stopped trials from finished ones."""

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search.optuna import OptunaSearch

from segadapt.platform.config import Values
from segadapt.platform.trial import INFEASIBLE, METHOD
from segadapt.trainables.core.data.sampling import derived_seed

FLOOR = 0.5
"""Part of an equal share of the trials that every method of a search gets, however badly it begins."""

TRIAL_ID = "trial_id"
"""Attribute of the study's trials that names the trial in Ray, MLflow and the storage folder."""
LOST = "lost"
"""Attribute of proposals that a killed driver had asked for and nobody ran; they are proposed again."""

Spaces = Mapping[str, Mapping[str, BaseDistribution]]
"""What varies, by method and dotted key."""


class StudySearch(OptunaSearch):
    """`OptunaSearch` over a conditional space that records trials stopped early as pruned, by training step.

    The base class records them as complete, at a value that fewer steps gave. With several methods, the method is a
    choice of its own and the parameters of each depend on it.

    Args:
        spaces: What varies, by method.
        first: What is tried first of each method.
        sampler: Makes a sampler from its `seed`: a proposal follows from the search's seed, its number and the study
            alone, so that a resumed search proposes what an undisturbed one would.
        seed: Of the search.
        settings: Passed on to `OptunaSearch`.
    """

    def __init__(
        self,
        *,
        spaces: Spaces,
        first: Mapping[str, Values],
        sampler: Callable[..., BaseSampler],
        seed: int,
        **settings: Any,
    ) -> None:
        self._spaces = spaces
        self._make_sampler = sampler
        self._base_seed = seed
        self._reported: dict[str, int] = {}
        points = [
            _choice(spaces, method) | {_study_name(spaces, method, key): value for key, value in first[method].items()}
            for method in spaces
        ]
        self._ot_study: Any
        super().__init__(
            space=partial(_propose, spaces), points_to_evaluate=[point for point in points if point], **settings
        )

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return the searched values of a new trial: its method, if there are several, and settings by dotted key."""
        if trial_id not in self._ot_trials:
            proposed = self._proposed()
            seed = derived_seed(self._base_seed, len(proposed)) % 2**32
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                self._ot_study.sampler = self._make_sampler(seed=seed)
            starved = self._starved([trial.params.get(METHOD) for trial in proposed])
            if starved is not None:
                self._ot_study.enqueue_trial(_choice(self._spaces, starved))
            self._ot_trials[trial_id] = self._ot_study.ask()
            self._ot_trials[trial_id].set_user_attr(TRIAL_ID, trial_id)
        return _propose(self._spaces, self._ot_trials[trial_id])

    def _proposed(self) -> list[FrozenTrial]:
        """Return the study's trials that were proposed so far, each once."""
        trials: list[FrozenTrial] = self._ot_study.get_trials(deepcopy=False)
        return [trial for trial in trials if trial.state != TrialState.WAITING and LOST not in trial.user_attrs]

    def _starved(self, tried: list[str | None]) -> str | None:
        """Return the method that has the fewest trials, if they are fewer than its floor."""
        if not len(tried) >= len(self._spaces) > 1:  # the published settings come first
            return None
        method = min(self._spaces, key=tried.count)
        return method if tried.count(method) < FLOOR * (len(tried) + 1) / len(self._spaces) else None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record an intermediate value at its training step."""
        value, step = result.get(self.metric), int(result.get("step", -1))
        is_new = trial_id not in self._completed_trials and step > self._reported.get(trial_id, -1)
        if is_new and value is not None and math.isfinite(value):
            self._ot_trials[trial_id].report(value, step)
            self._reported[trial_id] = step
        if str(result.get("failure", "")).startswith(INFEASIBLE):  # fails, without a value that the sampler would learn
            self._ot_trials[trial_id].set_user_attr("infeasible", True)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study how the trial ended: complete, pruned (None to the base class) or failed."""
        if result is not None and not error:
            self.on_trial_result(trial_id, result)
            if not result.get("finished"):
                result = None
        super().on_trial_complete(trial_id, result=result, error=error)


def _study_name(spaces: Spaces, method: str, key: str) -> str:
    """Return what a setting is called in the study: methods of a joint search have parameters of their own."""
    return key if len(spaces) == 1 else f"{method}.{key}"


def _choice(spaces: Spaces, method: str) -> dict[str, Any]:
    return {METHOD: method} if len(spaces) > 1 else {}


def _propose(spaces: Spaces, trial: Any) -> dict[str, Any]:
    """Return the searched values of a trial of the study: the space, as Optuna's define-by-run has it."""
    methods = list(spaces)
    method = trial.suggest_categorical(METHOD, methods) if len(methods) > 1 else methods[0]
    values = {
        key: _suggest(trial, _study_name(spaces, method, key), distribution)
        for key, distribution in spaces[method].items()
    }
    return _choice(spaces, method) | values


def _suggest(trial: Any, name: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case FloatDistribution(low=low, high=high, step=step, log=log):
            return trial.suggest_float(name, low, high, step=step, log=log)
        case IntDistribution(low=low, high=high, step=step, log=log):
            return trial.suggest_int(name, low, high, step=step, log=log)
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(name, choices)
    raise TypeError(f"A search space must hold Optuna's distributions, but {name!r} is {distribution!r}.")
