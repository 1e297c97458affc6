"""The states of a trial, and how MLflow and Optuna call them."""

from typing import Literal

MlflowStatus = Literal["FINISHED", "FAILED", "KILLED"]
"""How the run of a trial ends in MLflow."""

INFEASIBLE = "infeasible:"
"""How the reason of a failure begins when the trial does not fit the device's memory, whatever the micro-batch."""

PREEMPTED = "preempted:"
"""How the reason begins why a trial's process left that was asked to end."""
