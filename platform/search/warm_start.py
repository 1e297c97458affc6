"""Searches that build on earlier ones: which of the earlier trials a new study may count as its own."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from segadapt.platform.search.study import PRIOR, TRIAL_ID, Spaces, is_infeasible, study_name, study_point
from segadapt.platform.settings.config import METHOD, Values, keys
from segadapt.platform.settings.objective import Objective

_MECHANICS = frozenset({"trainer.loader_threads", "trainer.recompute", "trainer.eval_batch_size", "data.skip_bad"})
"""Settings that change no result."""


@dataclass(frozen=True)
class SearchSettings:
    """The settings of a search, by method: those that no trial changes, and the space."""

    fixed: Mapping[str, Values]
    spaces: Spaces
    objective: str


@dataclass
class Inheritance:
    """What a new study takes over from an earlier search."""

    name: str
    trials: list[FrozenTrial] = field(default_factory=list)
    """Trials that the new search could have run itself, with their values and rungs."""
    points: list[dict[str, Any]] = field(default_factory=list)
    """Where there is no such trial: the best settings of each method, to be tried first."""
    mismatches: Counter[str] = field(default_factory=Counter)
    """Trials left out, by the reason."""

    def __str__(self) -> str:
        """Say what was taken over and what was not."""
        text = f"from {self.name}: {len(self.trials)} trials count as prior points"
        if self.mismatches:
            text += "; left out: " + ", ".join(f"{count} ({why})" for why, count in self.mismatches.most_common())
        if self.points:
            text += f"; the best settings of {len(self.points)} methods are tried first instead"
        return text


def inherit(name: str, earlier: SearchSettings, new: SearchSettings, trials: Collection[FrozenTrial]) -> Inheritance:
    """Match the trials of an earlier search with a new one: those count that the new search could have run itself.

    Args:
        name: Of the earlier search.
        earlier: Its settings.
        new: Those of the new search.
        trials: Of the earlier search's study.
    """
    inheritance = Inheritance(name)
    objective = Objective.parse(earlier.objective)
    leading = objective.goals.index(objective.leading)
    best: dict[str, tuple[float, Values]] = {}
    for trial in trials:
        if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED) or is_infeasible(trial):
            continue  # whether a trial fits depends on the device, which may be another one
        method, values = _values(earlier, trial)
        if method not in new.spaces:
            inheritance.mismatches[f"{method} is not searched"] += 1
            continue
        if trial.state == TrialState.COMPLETE and (method not in best or trial.values[leading] > best[method][0]):
            best[method] = (trial.values[leading], values)
        reason = next(_mismatches(method, values, earlier, new), None)
        if reason is not None:
            inheritance.mismatches[reason] += 1
            continue
        whole = {key: _setting(method, key, values, earlier) for key in new.spaces[method]}
        inheritance.trials.append(_copy(name, trial, method, whole, new.spaces))
    if not inheritance.trials:
        inheritance.points = [_point(method, values, new) for method, (_, values) in best.items()]
    return inheritance


def _values(search: SearchSettings, trial: FrozenTrial) -> tuple[str, dict[str, Any]]:
    """Return the method of a study's trial and its searched settings by dotted key."""
    method = str(trial.params.get(METHOD, next(iter(search.spaces))))
    names = {study_name(search.spaces, method, key): key for key in search.spaces[method]}
    return method, {names[name]: value for name, value in trial.params.items() if name in names}


def _mismatches(method: str, values: Values, earlier: SearchSettings, new: SearchSettings) -> Iterator[str]:
    """Yield why the new search could not have run a trial with these values."""
    if earlier.objective != new.objective:
        yield f"objective {earlier.objective}"
    space = new.spaces[method]
    for key in sorted({*earlier.fixed[method], *values, *new.fixed[method], *space} - _MECHANICS):
        value = _setting(method, key, values, earlier)
        if key in space:
            if not _contains(space[key], value):
                yield f"{key} outside the range"
        elif value != _setting(method, key, {}, new):
            yield f"{key} differs"


def _setting(method: str, key: str, values: Values, search: SearchSettings) -> Any:
    """Return what a setting is in a trial with these searched values."""
    return values.get(key, search.fixed[method].get(key, keys(method)[key].default))


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    match distribution:
        case CategoricalDistribution(choices=choices):
            return value in choices
        case FloatDistribution(low=low, high=high) | IntDistribution(low=low, high=high):
            return isinstance(value, int | float) and low <= value <= high
    return False


def _copy(name: str, trial: FrozenTrial, method: str, values: Values, spaces: Spaces) -> FrozenTrial:
    attributes = {key: value for key, value in trial.user_attrs.items() if key not in (TRIAL_ID, PRIOR)}
    distributions = {study_name(spaces, method, key): distribution for key, distribution in spaces[method].items()}
    if len(spaces) > 1:
        distributions[METHOD] = CategoricalDistribution(list(spaces))
    return create_trial(
        state=trial.state,
        values=trial.values,
        params=study_point(spaces, method, values),
        distributions=distributions,
        user_attrs={**attributes, PRIOR: name},
        intermediate_values=trial.intermediate_values,
    )


def _point(method: str, values: Values, new: SearchSettings) -> dict[str, Any]:
    """Return what a trial to be tried first has in common with the new space; the sampler fills in the rest."""
    space = new.spaces[method]
    inside = {key: value for key, value in values.items() if key in space and _contains(space[key], value)}
    return study_point(new.spaces, method, inside)
