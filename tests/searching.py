"""Searches run by their command line, and what MLflow holds of them."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from commands import COMMAND, run_command
from mlflow import MlflowClient

__all__ = ["COMMAND", "command"]

command = run_command


def tracked(folder: Path, experiment: str) -> dict[str, Any]:
    """All MLflow runs of an experiment by name."""
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return {run.info.run_name: run for run in client.search_runs([found.experiment_id])}


def steps_of(folder: Path, run: Any, metric: str = "target_val/miou") -> list[int]:
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    return [entry.step for entry in client.get_metric_history(run.info.run_id, metric)]


def gallery_steps(folder: Path, run: Any) -> list[int]:
    """The training steps of which MLflow has a gallery, once for each."""
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    images = [entry.path for entry in client.list_artifacts(run.info.run_id, "images")]
    return sorted(int(path.split("+")[2]) for path in images if path.endswith(".png"))


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
