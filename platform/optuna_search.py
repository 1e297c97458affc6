"""Tune's Optuna searcher, taught to tell stopped trials from finished ones."""

import math
from typing import Any

from ray.tune.search.optuna import OptunaSearch


class StudySearch(OptunaSearch):
    """`OptunaSearch` that records trials stopped early as pruned, with every value they reported by training step.

    The base class records them as complete, at a value that fewer steps gave.

    Args:
        budget: Steps of a full trial.
        settings: Passed on to `OptunaSearch`.
    """

    def __init__(self, *, budget: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._budget = budget

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record an intermediate value at its training step."""
        value = result.get(self.metric)
        if trial_id not in self._completed_trials and value is not None and math.isfinite(value):
            self._ot_trials[trial_id].report(value, int(result["step"]))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study how the trial ended: complete, pruned (None to the base class) or failed."""
        if result is not None and not error:
            self.on_trial_result(trial_id, result)
            if result.get("step", 0) < self._budget:
                result = None
        super().on_trial_complete(trial_id, result=result, error=error)
