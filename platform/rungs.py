"""Early stopping whose memory is the study, so that its decisions survive a restart of the driver."""

from collections.abc import Sequence
from typing import Any

from ray.tune.schedulers import FIFOScheduler

from segadapt.platform.optuna_search import TRIAL_ID

STEP = "step"
"""Reported time axis: training steps, never Tune's count of reports, which restarts with a trial."""


class StudyRungs(FIFOScheduler):
    """Stop a trial at a rung if its value lies below the best 1/`reduction_factor` of the trials there before it.

    Ray's `ASHAScheduler` decides the same, but forgets its rungs when the driver restarts. Here each decision is an
    attribute of the trial in the study: a trial that reaches a rung again after a restart is told the same again.

    Source: Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020, in the stopping variant.

    Args:
        rungs: Training steps at which trials are compared, rising.
        reduction_factor: More is stricter.
        storage: URL of the Optuna storage.
        study_name: The study.
    """

    def __init__(self, *, rungs: Sequence[int], reduction_factor: float, storage: str, study_name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rungs = tuple(rungs)
        self._quantile = 100 * (1 - 1 / reduction_factor)
        self._storage = storage
        self._study_name = study_name
        self._study: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_study": None}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide when a trial has reached a rung."""
        value = result.get(str(self.metric))
        reached = [rung for rung in self._rungs if rung <= result.get(STEP, -1)]
        if value is None or not reached or result.get("finished"):
            return str(self.CONTINUE)
        return str(self.CONTINUE if self._continues(trial.trial_id, f"rung_{reached[-1]}", float(value)) else self.STOP)

    def _continues(self, trial_id: str, rung: str, value: float) -> bool:
        import numpy as np
        import optuna

        if self._study is None:
            self._study = optuna.load_study(study_name=self._study_name, storage=self._storage)
        trials = self._study.get_trials(deepcopy=False)
        own = next(trial for trial in trials if trial.user_attrs.get(TRIAL_ID) == trial_id)
        if rung not in own.user_attrs:
            before = [trial.user_attrs[rung]["value"] for trial in trials if rung in trial.user_attrs]
            continues = not before or value >= float(np.percentile(before, self._quantile))
            decision = {"value": value, "continues": continues}
            optuna.trial.Trial(self._study, own._trial_id).set_user_attr(rung, decision)
            return continues
        return bool(own.user_attrs[rung]["continues"])
