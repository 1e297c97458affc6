"""Which checkpoints of a search are kept (`--keep-top`), and the removal of the others. Lives in the driver."""

import contextlib
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from segadapt.platform.settings.objective import Objective
from segadapt.platform.storage import files
from segadapt.platform.storage.checkpoints import REMOVED, TrialCheckpoint, delete, put_away
from segadapt.platform.storage.folders import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankedTrial:
    """A trial that has checkpoints, as the decision about them sees it."""

    trial_id: str
    name: str
    """Name of its run; the leaderboard shows equals in the order of their names."""
    ended: bool
    """False as long as it may go on: pending, running, paused or interrupted."""
    values: tuple[float, ...] = ()
    """What it reached in each goal, the leading one first, higher is better; -inf where it reached nothing."""


def removable(trials: Collection[RankedTrial], needed: Collection[str], keep_top: int) -> set[str]:
    """Return the ids of the trials whose checkpoints may go.

    Those are ended, not needed, and at least `keep_top` other ended ones come before them. A trial comes before another
    if it is at least as good in every goal, and ahead in the leaderboard. So of one goal the best `keep_top` stay. Of
    several, a Pareto front stays whole, and so do the best by the leading goal or by mean rank, whatever trials are
    still to come: ranks change with them, but never in favour of one of two trials that is worse in every goal.

    What was removed earlier may be left out of `trials`: who comes before it also comes before those behind it.

    Args:
        trials: All that have checkpoints.
        needed: Ids of trials whose checkpoints something else starts from.
        keep_top: At least 1.
    """
    ended = [trial for trial in trials if trial.ended]
    return {
        trial.trial_id
        for trial in ended
        if trial.trial_id not in needed and sum(_comes_before(other, trial) for other in ended) >= keep_top
    }


def _comes_before(first: RankedTrial, second: RankedTrial) -> bool:
    as_good = all(one >= other for one, other in zip(first.values, second.values, strict=True))
    return as_good and (-first.values[0], first.name) < (-second.values[0], second.name)


def ranking_values(objective: Objective, metrics: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the values of a `RankedTrial` from what was reported with a checkpoint."""
    signs = dict(zip(objective.goals, (1 if mode == "max" else -1 for mode in objective.modes), strict=True))
    order = sorted(objective.goals, key=lambda goal: goal != objective.leading)
    values = [signs[goal] * metrics.get(goal, math.nan) for goal in order]
    return tuple(value if math.isfinite(value) else -math.inf for value in values)


@contextlib.contextmanager
def locked(storage: Storage) -> Iterator[None]:
    """Let one process at a time remove checkpoints of a storage folder or note that it needs one."""
    with files.locked(storage.root / ".checkpoints.lock"):
        yield


class CheckpointRetention:
    """Removes the checkpoints of an experiment's ended trials that are not among the best.

    Args:
        storage: The storage folder.
        experiment: Name of the experiment.
        objective: What trials are compared by.
        keep_top: How many of the best keep theirs.
        needed: Returns the ids of trials whose checkpoints something else starts from.
    """

    def __init__(
        self,
        storage: Storage,
        experiment: str,
        objective: Objective,
        keep_top: int,
        needed: Callable[[], Collection[str]],
    ) -> None:
        self._storage = storage
        self._folder = storage.experiment(experiment)
        self._objective = objective
        self._keep_top = keep_top
        self._needed = needed
        self._looked_at: set[str] = set()
        self._holding: dict[str, RankedTrial] = {}

    def sweep(self) -> None:
        """Complete the removals that a killed driver left undone, and those of checkpoints that came too late."""
        for record in (self._folder / REMOVED).glob("*.json"):
            if self._succeeds(put_away, record.stem, self._objective.keeps):
                self._succeeds(delete, record.stem)

    def collect(
        self,
        ended: Mapping[str, str],
        open_trials: Mapping[str, str],
        announce: Callable[[str], None],
        best_of: Callable[[str], TrialCheckpoint | None],
    ) -> None:
        """Remove what may go.

        Args:
            ended: Names of the ended trials, by id.
            open_trials: Names of those that may go on.
            announce: Called with the id of each trial before its checkpoints go.
            best_of: Returns the best checkpoint of a trial by its id.
        """
        for trial_id, name in ended.items():
            if trial_id not in self._looked_at:
                self._looked_at.add(trial_id)
                best = best_of(trial_id)
                if best is not None and best.kept:
                    values = ranking_values(self._objective, best.metrics)
                    self._holding[trial_id] = RankedTrial(trial_id, name, ended=True, values=values)
        waiting = [RankedTrial(trial_id, name, ended=False) for trial_id, name in open_trials.items()]
        away = []
        with locked(self._storage):
            for trial_id in sorted(removable([*self._holding.values(), *waiting], self._needed(), self._keep_top)):
                announce(trial_id)
                if self._succeeds(put_away, trial_id, self._objective.keeps):
                    away.append(trial_id)
        for trial_id in away:
            if self._succeeds(delete, trial_id):
                del self._holding[trial_id]

    def _succeeds(self, step: Callable[..., None], trial_id: str, *arguments: str) -> bool:
        """Take a step of a removal; returns False if the file system did not let go of the files yet."""
        try:
            step(self._folder, trial_id, *arguments)
        except OSError as error:  # such as files that somebody reads over NFS; never worth ending a search
            logger.warning("Checkpoints of %s could not be removed (%s); tried again later.", trial_id, error)
            return False
        return True
