"""Samplers by name: Optuna's, and PriorBand."""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, QMCSampler, RandomSampler, TPESampler

from segadapt.platform.errors import UsageError
from segadapt.platform.search.horizon import Horizon
from segadapt.platform.search.priorband import Prior, PriorBandSampler
from segadapt.platform.search.study import Spaces
from segadapt.platform.settings.objective import Objective

SamplerName = Literal["auto", "tpe", "gp", "cmaes", "random", "qmc", "priorband"]

SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)


def check_sampler(name: str, spaces: Spaces, objective: Objective) -> None:
    """Make sure that a sampler would propose all settings by itself, none by chance instead.

    Raises:
        UsageError: If there is none of this name, or it cannot model the space or the objective.
    """
    if name not in SAMPLERS:
        raise UsageError(f"--sampler must be one of {', '.join(SAMPLERS)}, but got {name!r}.")
    if len(spaces) > 1 and name in ("gp", "cmaes", "qmc"):
        raise UsageError(
            f"--sampler {name} must have one method, since it needs settings that every trial has, but got "
            f"{', '.join(spaces)}. Use tpe or random, or search the methods one by one."
        )
    choices = [
        key
        for space in spaces.values()
        for key, distribution in space.items()
        if isinstance(distribution, CategoricalDistribution)
    ]
    if name == "cmaes" and choices:
        raise UsageError(
            f"--sampler cmaes must have numbers alone, but {', '.join(choices)} are choices. Fix them by KEY=VALUE, "
            "or use another sampler."
        )
    if name == "cmaes" and len(objective.goals) > 1:
        raise UsageError(f"--sampler cmaes must have one goal, but got {objective}. Use tpe or gp.")
    if name == "priorband" and objective.is_front:
        raise UsageError(
            f"--sampler priorband must have one best trial, but got the Pareto front of {objective}. Join the goals by "
            "'+' to rank trials, or use tpe or gp."
        )


def make_sampler(
    name: SamplerName, *, seed: int, joint: bool, horizon: Horizon, prior: Prior, objective: Objective
) -> Callable[..., BaseSampler]:
    """Return what makes a sampler from the `seed` of one proposal.

    Args:
        name: One of `SAMPLERS`; `auto` is `tpe`.
        seed: Of the search.
        joint: Whether methods with settings of their own are searched together.
        horizon: How long trials run, and how many at a time.
        prior: What is believed of the settings before any trial.
        objective: What trials are compared by.
    """
    match name:
        case "auto" | "tpe":
            return partial(
                TPESampler,
                multivariate=True,
                group=joint,  # a method's settings are modelled on the trials that have them
                constant_liar=horizon.concurrent > 1,
            )
        case "gp":
            return partial(GPSampler, deterministic_objective=False)
        case "cmaes":
            return partial(CmaEsSampler, consider_pruned_trials=True, warn_independent_sampling=False)
        case "random":
            return RandomSampler
        case "qmc":
            return partial(_sequence, seed)
        case "priorband":
            return partial(PriorBandSampler, prior=prior, objective=objective, horizon=horizon)


def _sequence(search_seed: int, *, seed: int) -> BaseSampler:
    """Return the search's one low-discrepancy sequence; `seed` draws only what it has no dimension for."""
    return QMCSampler(
        scramble=True,
        seed=search_seed,
        independent_sampler=RandomSampler(seed=seed),
        warn_independent_sampling=False,
        warn_asynchronous_seeding=False,
    )
