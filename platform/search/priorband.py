"""PriorBand: proposals from the whole space, from around a known good setting and from around the best trial so far.

Source: Mallik et al., PriorBand: Practical Hyperparameter Optimization in the Age of Deep Learning, NeurIPS 2023, and
the authors' code, automl/neps@4558be0. Differs: the memory is the Optuna study alone; settings that depend on the
method of a joint search have their prior and their best trial each; a choice has never less than an even share for its
published value; the share of uniform proposals is that of the lowest rung whatever the scheduler, as the authors have
it for ASHA; there is no model stage.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from segadapt import search_spaces
from segadapt.platform.search.horizon import REDUCTION_FACTOR, Horizon
from segadapt.platform.search.study import Spaces, is_infeasible, study_name, values_by_step
from segadapt.platform.settings.config import Values
from segadapt.platform.settings.objective import Objective

PROPOSAL = "priorband"
"""Attribute of the study's trials that says how PriorBand proposed them (`Proposal.as_dict`)."""

_CONFIDENCE = {"low": 0.25, "medium": 0.5, "high": 0.75}
"""How sure each word is: the mass of a choice's published value, and 1 minus the deviation of a number's normal."""

_UNIFORM = 1 / (1 + REDUCTION_FACTOR**0)
"""Share of uniform proposals at the lowest rung, where every trial begins."""

_MUTATION = 0.5
"""Chance that a setting of the best trial is drawn anew, and not copied."""

_MUTATION_DEVIATION = 0.25
"""Deviation of such a draw from the best trial's value, in parts of the range."""

Origin = Literal["uniform", "prior", "incumbent"]

ValuesByStep = Mapping[int, Mapping[str, float]]
"""What a trial has reached at each step, by goal."""


@dataclass(frozen=True)
class Belief:
    """What is believed of a setting before any trial."""

    value: Any
    """The value that the search starts from."""
    confidence: float
    """How sure it is, from 0 to 1."""


@dataclass(frozen=True)
class Prior:
    """What is believed of the settings of a search before any trial."""

    beliefs: Mapping[str, Belief]
    """By the name that a setting has in the study; the others are drawn uniformly."""
    is_published: bool = True
    """Whether the search starts from the published settings, and not from another preset or range."""

    @classmethod
    def of(cls, spaces: Spaces, first: Mapping[str, Values]) -> "Prior":
        """Return the prior around what a search tries first of each method, as sure as the search spaces say."""
        beliefs, is_published = {}, True
        for method in spaces:
            published = search_spaces.load(method)[1][search_spaces.DEFAULT_PRESET]
            confidence = search_spaces.confidence(method)
            for key, value in first[method].items():
                sure = _CONFIDENCE[confidence.get(key, search_spaces.DEFAULT_CONFIDENCE)]
                beliefs[study_name(spaces, method, key)] = Belief(value, sure)
                is_published = is_published and published.get(key, value) == value
        return cls(beliefs, is_published)


@dataclass(frozen=True)
class Proposal:
    """How PriorBand makes a proposal."""

    uniform: float
    """Share of proposals from the whole space."""
    prior: float
    """Share of proposals from around what the search starts from."""
    incumbent: float
    """Share of proposals from around the best trial so far."""
    likelihood_ratio: float | None
    """How many times likelier the other good trials are around the best trial than around the start; None before there
    are any."""
    is_published: bool
    """Whether the search starts from the published settings."""
    origin: Origin | None = None
    """Where this proposal was drawn from; None if any of its settings was given, not drawn."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as the study keeps them."""
        return dict(vars(self))


class PriorBandSampler(BaseSampler):
    """Draw a proposal uniformly, around the start of the search, or around its best trial.

    The first two have half of the proposals each. When a trial has run to full length and the steps of one successive
    halving are spent, the best trial shares the second half with the start: by how likely the better part of the trials
    at the highest rung would be around either, the best of them with the largest weight.

    Args:
        seed: Seed of one proposal.
        prior: What is believed of the settings.
        objective: One goal, or several that trials are ranked by.
        horizon: How long trials run.
    """

    def __init__(self, *, seed: int, prior: Prior, objective: Objective, horizon: Horizon) -> None:
        self._seed = seed
        self._beliefs = prior.beliefs
        self._is_published = prior.is_published
        self._objective = objective
        self._horizon = horizon
        self._origin: Origin = "uniform"
        self._ranked: list[FrozenTrial] = []
        self.proposal = self._before_any()
        """How the last trial was proposed."""

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return nothing: settings are drawn one by one."""
        return {}

    def sample_relative(
        self, study: Any, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return nothing: settings are drawn one by one."""
        return {}

    def before_trial(self, study: Any, trial: FrozenTrial) -> None:
        """Weigh the three origins by the study, and draw one of them."""
        trials = [
            other
            for other in study.get_trials(deepcopy=False)
            if other.state != TrialState.FAIL and not is_infeasible(other)
        ]
        completed = [other for other in trials if other.state == TrialState.COMPLETE]
        self._ranked = self._best_first(completed, [self._end_values(other) for other in completed])
        self.proposal = self._weighed(trials)
        drawn = np.random.default_rng(self._seed).random()
        if drawn < self.proposal.uniform:
            self._origin = "uniform"
        else:
            self._origin = "prior" if drawn < self.proposal.uniform + self.proposal.prior else "incumbent"
        if "fixed_params" not in trial.system_attrs:
            self.proposal = replace(self.proposal, origin=self._origin)

    def sample_independent(
        self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw one setting; what is drawn depends on its name, not on how many others were drawn before it."""
        rng = np.random.default_rng([self._seed, zlib.crc32(param_name.encode())])
        belief = self._beliefs.get(param_name)
        if self._origin == "incumbent" and (best := self._best_with(param_name)) is not None:
            return _mutated(param_distribution, best.params[param_name], rng)
        if self._origin == "uniform" or belief is None:
            return _uniform(param_distribution, rng)
        return _around(param_distribution, belief, rng)

    def _best_first(self, trials: Sequence[FrozenTrial], values: Sequence[Mapping[str, float]]) -> list[FrozenTrial]:
        scores = self._objective.scores(values)
        ranking = sorted(zip(scores, trials, strict=True), key=lambda entry: (-entry[0], entry[1].number))
        return [trial for _, trial in ranking]

    def _end_values(self, trial: FrozenTrial) -> Mapping[str, float]:
        return dict(zip(self._objective.goals, trial.values, strict=True))

    def _before_any(self) -> Proposal:
        return Proposal(_UNIFORM, 1 - _UNIFORM, 0.0, None, self._is_published)

    def _weighed(self, trials: Sequence[FrozenTrial]) -> Proposal:
        """Return how the next trial is proposed, from what the study's trials have reached."""
        by_trial = [(trial, values_by_step(trial, self._objective.goals)) for trial in trials]
        spent = sum(max(values, default=0) for _, values in by_trial)
        good = self._good_trials(by_trial)
        if not self._ranked or spent < self._horizon.bracket_steps or not good:
            return self._before_any()
        likelihoods = [(self._likelihood(trial, around_best=True), self._likelihood(trial)) for trial in good]
        weights = range(len(good), 0, -1)
        around_best = sum(weight * best for weight, (best, _) in zip(weights, likelihoods, strict=True))
        around_start = sum(weight * start for weight, (_, start) in zip(weights, likelihoods, strict=True))
        incumbent = (1 - _UNIFORM) * around_best / (around_best + around_start)
        others = [pair for trial, pair in zip(good, likelihoods, strict=True) if trial.number != self._ranked[0].number]
        ratio = sum(best for best, _ in others) / sum(start for _, start in others) if others else None
        return Proposal(_UNIFORM, 1 - _UNIFORM - incumbent, incumbent, ratio, self._is_published)

    def _good_trials(self, by_trial: Sequence[tuple[FrozenTrial, ValuesByStep]]) -> list[FrozenTrial]:
        """Return the better part of the trials at the highest rung that has enough of them, the best first."""
        ranked = self._ranked
        for rung in reversed(self._horizon.rungs):
            if len(ranked) >= REDUCTION_FACTOR:
                break
            there = [(trial, values) for trial, values in by_trial if max(values, default=0) >= rung]
            arrivals = [values[min(step for step in values if step >= rung)] for _, values in there]
            ranked = self._best_first([trial for trial, _ in there], arrivals)
        return ranked[: len(ranked) // REDUCTION_FACTOR]

    def _likelihood(self, trial: FrozenTrial, *, around_best: bool = False) -> float:
        """Return how likely a trial's settings are around the start or the best trial, relative to a uniform draw."""
        likelihood = 1.0
        for name, value in trial.params.items():
            belief = self._beliefs.get(name)
            if around_best and (best := self._best_with(name)) is not None:
                belief = Belief(best.params[name], belief.confidence if belief else _CONFIDENCE["medium"])
            if belief is not None:
                likelihood *= _density(trial.distributions[name], belief, value)
        return likelihood

    def _best_with(self, name: str) -> FrozenTrial | None:
        """Return the best trial of full length that has a setting: in a joint search, the best of its method."""
        return next((trial for trial in self._ranked if name in trial.params), None)


def _uniform(distribution: BaseDistribution, rng: np.random.Generator) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(rng.integers(len(distribution.choices)))]
    return _from_unit(distribution, rng.random())


def _around(distribution: BaseDistribution, belief: Belief, rng: np.random.Generator) -> Any:
    """Draw around a belief."""
    if isinstance(distribution, CategoricalDistribution):
        masses = _masses(distribution, belief)
        return distribution.choices[int(rng.choice(len(masses), p=masses))]
    return _from_unit(distribution, _normal_draw(_to_unit(distribution, belief.value), 1 - belief.confidence, rng))


def _mutated(distribution: BaseDistribution, value: Any, rng: np.random.Generator) -> Any:
    """Return a value of the best trial, or another one near it."""
    if rng.random() >= _MUTATION:
        return value
    if isinstance(distribution, CategoricalDistribution):
        others = [choice for choice in range(len(distribution.choices)) if choice != _index(distribution, value)]
        return distribution.choices[int(rng.choice(others))] if others else value
    return _from_unit(distribution, _normal_draw(_to_unit(distribution, value), _MUTATION_DEVIATION, rng))


def _density(distribution: BaseDistribution, belief: Belief, value: Any) -> float:
    """Return how likely a draw around a belief is a value, relative to a uniform draw."""
    if isinstance(distribution, CategoricalDistribution):
        masses = _masses(distribution, belief)
        return masses[_index(distribution, value)] * len(masses)
    normal = NormalDist(_to_unit(distribution, belief.value), 1 - belief.confidence)
    return normal.pdf(_to_unit(distribution, value)) / (normal.cdf(1.0) - normal.cdf(0.0))


def _masses(distribution: CategoricalDistribution, belief: Belief) -> list[float]:
    """Return the probability of each choice."""
    count = len(distribution.choices)
    if count == 1:
        return [1.0]
    mass = max(belief.confidence, 1 / count)
    masses = [(1 - mass) / (count - 1)] * count
    masses[_index(distribution, belief.value)] = mass
    return masses


def _index(distribution: CategoricalDistribution, value: Any) -> int:
    return int(distribution.to_internal_repr(value))


def _normal_draw(mean: float, deviation: float, rng: np.random.Generator) -> float:
    """Draw from a normal that is cut off outside [0, 1]."""
    normal = NormalDist(mean, deviation)
    below, above = normal.cdf(0.0), normal.cdf(1.0)
    return normal.inv_cdf(below + rng.random() * (above - below))


def _ends(distribution: BaseDistribution) -> tuple[float, float, bool]:
    """Return the ends of a range on its own scale, and whether that is logarithmic; a grid has half a step more."""
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    margin = (distribution.step or 0) / 2
    low, high = distribution.low - margin, distribution.high + margin
    return (math.log(low), math.log(high), True) if distribution.log else (low, high, False)


def _to_unit(distribution: BaseDistribution, value: float) -> float:
    """Return where a value lies in its range, from 0 to 1."""
    low, high, is_log = _ends(distribution)
    return ((math.log(value) if is_log else value) - low) / (high - low) if high > low else 0.5


def _from_unit(distribution: BaseDistribution, part: float) -> Any:
    """Return the value at a part of its range, from 0 to 1."""
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, is_log = _ends(distribution)
    value = low + part * (high - low)
    value = math.exp(value) if is_log else value
    if distribution.step is not None:
        value = distribution.low + round((value - distribution.low) / distribution.step) * distribution.step
    value = min(max(value, distribution.low), distribution.high)
    return round(value) if isinstance(distribution, IntDistribution) else float(value)
