"""The states of a trial, and how MLflow and Optuna call them."""

from enum import StrEnum
from typing import Literal, Self

MlflowStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
"""How a run stands in MLflow."""

OptunaState = Literal["RUNNING", "COMPLETE", "PRUNED", "FAIL"]
"""How a trial stands in Optuna's study, as `optuna.trial.TrialState` names it."""


class TrialState(StrEnum):
    """How a trial stands, in the words of its run's state tag; the run that trials hang under has such a tag too."""

    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    INTERRUPTED = "interrupted"
    LOST = "lost"
    FINISHED = "finished"
    STOPPED_EARLY = "stopped early"
    OUT_OF_TIME = "out of time"
    OUT_OF_GPU_HOURS = "out of GPU hours"
    FAILED = "failed"
    INFEASIBLE = "infeasible"

    @classmethod
    def of(cls, tag: str | None) -> Self | None:
        """Return the state that a run's tag says; None if there is no tag, or it was changed by hand."""
        return cls(tag) if tag in set(cls) else None

    @property
    def mlflow(self) -> MlflowStatus:
        """How MLflow calls the run of a trial in this state."""
        return _STATUS[self][0]

    @property
    def optuna(self) -> OptunaState:
        """How Optuna calls a trial in this state that has reached something; one that has not ends as FAIL."""
        return _STATUS[self][1]

    @property
    def is_active(self) -> bool:
        """Whether a process works on the trial, or is about to."""
        return self in (TrialState.STARTING, TrialState.RUNNING)

    @property
    def is_open(self) -> bool:
        """Whether a driver has yet to end the trial."""
        return self.is_active or self is TrialState.PAUSED

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to do; what is interrupted can go on, and what is lost has no end."""
        return not self.is_open and self not in (TrialState.INTERRUPTED, TrialState.LOST)

    @property
    def is_failure(self) -> bool:
        """Whether the trial's code or settings ended it."""
        return self in (TrialState.FAILED, TrialState.INFEASIBLE)

    def tells(self, end: "TrialState") -> bool:
        """Return whether MLflow may say this of a trial that Ray ended as `end`.

        Ray does not tell the end of a budget from early stopping, nor may it know what could never fit.
        """
        if end.is_failure:
            return self.is_failure
        return self is end or self in (TrialState.OUT_OF_TIME, TrialState.OUT_OF_GPU_HOURS)


_STATUS: dict[TrialState, tuple[MlflowStatus, OptunaState]] = {
    TrialState.STARTING: ("RUNNING", "RUNNING"),
    TrialState.RUNNING: ("RUNNING", "RUNNING"),
    TrialState.PAUSED: ("RUNNING", "RUNNING"),
    TrialState.INTERRUPTED: ("KILLED", "RUNNING"),
    TrialState.LOST: ("KILLED", "FAIL"),
    TrialState.FINISHED: ("FINISHED", "COMPLETE"),
    TrialState.STOPPED_EARLY: ("FINISHED", "PRUNED"),
    TrialState.OUT_OF_TIME: ("KILLED", "PRUNED"),
    TrialState.OUT_OF_GPU_HOURS: ("KILLED", "PRUNED"),
    TrialState.FAILED: ("FAILED", "FAIL"),
    TrialState.INFEASIBLE: ("FAILED", "PRUNED"),
}
