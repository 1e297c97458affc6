"""What a search is after: one metric, a Pareto front of several (`a,b`), or the best mean rank over several (`a+b`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from segadapt.platform.errors import UsageError
from segadapt.trainables.core.evaluation.label_free import SCORES

TARGET = "target_val/miou"

_SOURCE = "source_val/miou"

MIOUS = (TARGET, _SOURCE)
"""Metrics that need labels of a validation set."""

LABEL_FREE = (_SOURCE, *(f"score/{name}" for name in SCORES))
"""Reported metrics that no target label enters."""

REPORTED = (TARGET, *LABEL_FREE)
"""Metrics that an evaluation reports, mIoU where there are labels for it; higher is better for all."""

COSTS = ("time/step",)
"""Reported metrics of which less is better."""

GOALS = (*REPORTED, *COSTS)
"""Metrics that a search may have as a goal: mIoU on target labels, those that know none, and costs."""


@dataclass(frozen=True)
class Objective:
    """One goal or several, and how a trial is judged by them."""

    goals: tuple[str, ...] = (TARGET,)
    ranked: bool = False
    """Judge by the mean of a trial's ranks in all goals; otherwise several goals give a Pareto front."""

    @classmethod
    def parse(cls, text: str) -> "Objective":
        """Read `METRIC`, `METRIC,METRIC` (a front) or `METRIC+METRIC` (ranks).

        Raises:
            UsageError: If a metric is not known or given twice, or all are costs.
        """
        ranked = "+" in text
        goals = tuple(part.strip() for part in text.split("+" if ranked else ","))
        unknown = [goal for goal in goals if goal not in GOALS]
        if unknown or len(set(goals)) < len(goals):
            raise UsageError(
                f"--objective must be one of {', '.join(GOALS)}, or several, joined by ',' for a Pareto front or by "
                f"'+' for the mean rank, but got {text!r}."
            )
        if all(goal in COSTS for goal in goals):
            raise UsageError(f"--objective must have a metric of quality beside costs, but got {text!r}. Add {TARGET}.")
        return cls(goals, ranked)

    def __str__(self) -> str:
        """Return what `parse` reads."""
        return ("+" if self.ranked else ",").join(self.goals)

    @property
    def is_front(self) -> bool:
        """Whether trials are compared by dominance."""
        return len(self.goals) > 1 and not self.ranked

    @property
    def modes(self) -> list[str]:
        """`max` or `min` for each goal."""
        return ["min" if goal in COSTS else "max" for goal in self.goals]

    @property
    def leading(self) -> str:
        """The first goal that is no cost: what is shown where one number has to do."""
        return next(goal for goal in self.goals if goal not in COSTS)

    @property
    def keeps(self) -> str:
        """Reported number that decides which checkpoint of a trial is kept; ranks compare trials, so the last."""
        return "step" if self.ranked else self.leading

    def scores(self, trials: Sequence[Mapping[str, float]]) -> list[float]:
        """Return what each of some trials is compared by, higher is better: the leading goal, or minus the mean rank.

        Args:
            trials: The goals' values of each trial.
        """
        if not self.ranked:
            return [trial[self.leading] for trial in trials]
        ranks = [
            self._ranks([trial[goal] for trial in trials], mode)
            for goal, mode in zip(self.goals, self.modes, strict=True)
        ]
        return [-sum(ranks_of_trial) / len(ranks_of_trial) for ranks_of_trial in zip(*ranks, strict=True)]

    def front(self, trials: Sequence[Mapping[str, float]]) -> list[bool]:
        """Return which trials no other one surpasses: at least equal in all goals and better in one."""
        signs = [1 if mode == "max" else -1 for mode in self.modes]
        points = [tuple(sign * trial[goal] for sign, goal in zip(signs, self.goals, strict=True)) for trial in trials]
        return [
            not any(other != point and all(o >= p for o, p in zip(other, point, strict=True)) for other in points)
            for point in points
        ]

    @staticmethod
    def _ranks(values: Sequence[float], mode: str) -> list[float]:
        """Return ranks from 1, the best; equals share the mean of theirs."""
        from scipy.stats import rankdata

        return list(map(float, rankdata([value if mode == "min" else -value for value in values])))
