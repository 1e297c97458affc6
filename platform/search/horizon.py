"""How long the trials of a search run, and the training steps at which they are compared."""

from dataclasses import dataclass

REDUCTION_FACTOR = 2
"""The better 1/REDUCTION_FACTOR of the trials that reached a rung go on."""


def levels(grace_steps: int, steps: int) -> list[int]:
    """Return the steps at which ASHA compares trials: the first evaluation, then REDUCTION_FACTOR times as many."""
    rungs = [grace_steps]
    while rungs[-1] * REDUCTION_FACTOR < steps:
        rungs.append(rungs[-1] * REDUCTION_FACTOR)
    return [level for level in rungs if level < steps]


@dataclass(frozen=True)
class Horizon:
    """How long trials run, and how many at a time."""

    grace_steps: int
    """Steps before a trial may be stopped."""
    steps: int
    """Steps of the longest trial."""
    concurrent: int
    """Trials at a time."""

    @property
    def rungs(self) -> list[int]:
        """Training steps at which trials are compared, rising."""
        return levels(self.grace_steps, self.steps)

    @property
    def bracket_steps(self) -> int:
        """Steps of all trials of one successive halving, which ends with one trial of full length."""
        ends = [*self.rungs, self.steps]
        trials = [REDUCTION_FACTOR ** (len(ends) - 1 - passed) for passed in range(len(ends))]
        return sum(count * (end - start) for count, start, end in zip(trials, [0, *ends], ends, strict=False))
