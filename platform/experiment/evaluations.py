"""The best evaluation of each trial, as its process reported it, and what its run says of it."""

import math
from collections.abc import Collection
from pathlib import Path

from segadapt.platform.settings.objective import GOALS, Objective
from segadapt.platform.settings.reported import Reported
from segadapt.platform.settings.states import TrialState
from segadapt.platform.storage.checkpoints import TrialCheckpoint, best_checkpoint, checkpoint_name
from segadapt.platform.storage.folders import Storage
from segadapt.platform.tracking.descriptions import trial_note
from segadapt.platform.tracking.tags import BEST_STEP_TAG, CHECKPOINT_TAG, FAILURE_TAG, NOT_KEPT, NOTE_TAG, STATE_TAG
from segadapt.platform.trial.spec import TrialSpec


class Evaluations:
    """What the trials of an experiment reached.

    Of a trial that ran in this session from its start, without a break, what it reported is all there is. Others may
    have left checkpoints that this session never heard of, and the workers of Ray Train may have left a last one that
    they did not come to report: these are looked for in storage.

    Args:
        spec: What trials share.
    """

    def __init__(self, spec: TrialSpec) -> None:
        self._spec = spec
        self._unheard: set[str] = set()
        self._last: dict[str, Reported] = {}
        self._best: dict[str, TrialCheckpoint] = {}

    def forget(self, trial_ids: Collection[str]) -> None:
        """Look for checkpoints of these trials in storage: they ran before, or were started again."""
        self._unheard.update(trial_ids)

    def reported(self, trial_id: str, reported: Reported) -> None:
        """A trial was evaluated."""
        self._last[trial_id] = reported

    def kept(self, trial_id: str, folder: Path) -> None:
        """The checkpoint of a trial's last evaluation is in storage."""
        last, metric = self._last.get(trial_id), self._spec.objective.keeps
        if last is None or not math.isfinite(value := last.metrics.get(metric, math.nan)):
            self.forget([trial_id])
            return
        best = self._best.get(trial_id)
        if best is None or value >= best.metrics[metric]:
            self._best[trial_id] = TrialCheckpoint(folder, {**last.metrics, "step": last.step})

    def best(self, trial_id: str) -> TrialCheckpoint | None:
        """Return the best evaluation of a trial that left a checkpoint; `kept` says whether that is still there."""
        return self.known(trial_id) or best_checkpoint(self._spec.folder, trial_id, self._spec.objective.keeps)

    def known(self, trial_id: str) -> TrialCheckpoint | None:
        """Return the same from what was reported; None if that does not say it, or the checkpoint was removed."""
        best = self._best.get(trial_id)
        if best is None or trial_id in self._unheard or self._spec.resources.uses_train or not best.path.is_dir():
            return None
        return best


def kept_metrics(best: TrialCheckpoint | None) -> dict[str, float]:
    """Return what a trial's best checkpoint had reached in each goal that a search may have."""
    metrics = best.metrics if best is not None else {}
    values = {goal: metrics.get(goal) for goal in GOALS}
    return {goal: value for goal, value in values.items() if value is not None and math.isfinite(value)}


def end_tags(
    storage: Storage, state: TrialState, best: TrialCheckpoint | None, objective: Objective, failure: str | None
) -> dict[str, str]:
    """Return what the run of a trial that has ended is tagged with.

    Args:
        storage: The storage folder, below which checkpoints are named.
        state: How it ended.
        best: Its best checkpoint.
        objective: What trials are compared by.
        failure: Why it failed; None if it did not.
    """
    tags = {STATE_TAG: str(state)}
    if best is not None:
        tags[CHECKPOINT_TAG] = checkpoint_name(storage, best.path) if best.kept else NOT_KEPT
        tags[BEST_STEP_TAG] = str(best.metrics["step"])
    if failure is not None:
        tags[FAILURE_TAG] = failure
    reached = kept_metrics(best)
    shown = {goal: reached[goal] for goal in objective.goals if goal in reached}
    tags[NOTE_TAG] = trial_note(state, shown, best.metrics["step"] if best is not None else None, failure)
    return tags
