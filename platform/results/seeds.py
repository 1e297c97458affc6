"""The best configurations of a search, each trained anew on several seeds: is the winner better, or luckier?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Reranked:
    """A configuration over several seeds, none of which the search had seen."""

    name: str
    """Name of the search's trial whose configuration it is."""
    values: Sequence[float]
    """The objective at each seed."""
    mean: float
    half_width: float | None
    """Half the width of the 95 % confidence interval of the mean (Student's t); None for one seed."""
    behind: float | None
    """How far the mean lies below the first one's; None for the first."""
    behind_half_width: float | None
    """Half the width of the 95 % confidence interval of that difference, paired by seed."""

    @property
    def within_noise(self) -> bool:
        """Whether the seeds leave open that it is as good as the first."""
        if self.behind is None or self.behind_half_width is None:
            return self.behind is not None
        return self.behind <= self.behind_half_width


def rerank(runs: Mapping[str, Mapping[int, float]]) -> list[Reranked]:
    """Return configurations by their mean over the seeds that all of them have, best first.

    Args:
        runs: The objective by configuration and seed, higher is better.
    """
    if not runs:
        return []
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in runs.values())))
    if not seeds:
        return []
    values = {name: [by_seed[seed] for seed in seeds] for name, by_seed in runs.items()}
    order = sorted(values, key=lambda name: (-_mean(values[name]), name))
    first = values[order[0]]
    ranking = []
    for name in order:
        by_seed = values[name]
        lacks = [best - value for best, value in zip(first, by_seed, strict=True)]
        is_first = name == order[0]
        ranking.append(
            Reranked(
                name=name,
                values=by_seed,
                mean=_mean(by_seed),
                half_width=_half_width(by_seed),
                behind=None if is_first else _mean(lacks),
                behind_half_width=None if is_first else _half_width(lacks),
            )
        )
    return ranking


def paired_difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of `values - others`, of the same seeds, and half the width of its 95 % confidence interval."""
    differences = [value - other for value, other in zip(values, others, strict=True)]
    return _mean(differences), _half_width(differences)


def verdict(ranking: Sequence[Reranked]) -> str:
    """Return in a sentence whether the first is better than the others beyond the noise of seeds."""
    first, *others = ranking
    equal = [other.name for other in others if other.within_noise]
    if not others:
        return f"{first.name} was the only configuration with all seeds."
    if equal:
        return f"{first.name} leads, but within the noise of seeds {', '.join(equal)} may be as good."
    return f"{first.name} is better than the others beyond the noise of {len(first.values)} seeds."


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _half_width(values: Sequence[float]) -> float | None:
    from scipy.stats import t

    count = len(values)
    if count < 2:
        return None
    variance = sum((value - _mean(values)) ** 2 for value in values) / (count - 1)
    return float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * math.sqrt(variance / count)
