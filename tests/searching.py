"""Searches run by their command line, what MLflow holds of them, and one that many tests look at."""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess, Popen
from threading import Thread
from typing import Any, ClassVar
from unittest.mock import patch

from commands import COMMAND, run_command
from doors import Doors
from mlflow import MlflowClient

import segadapt
from segadapt.platform.doctor.findings import Finding
from segadapt.platform.results.status import SearchStatus
from segadapt.platform.storage.folders import Place
from segadapt.platform.tracking.moved import point_artifacts_here

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


@dataclass(frozen=True)
class Watched:
    """A search of three trials of SDCA that has ended, and what others said about it while it ran."""

    folder: Path
    """Where it ran, with its storage in `runs`; one file of tests goes on with it, others take a copy."""
    output: str
    """What the search printed, its errors apart in `errors`."""
    errors: str
    statuses: list[dict[str, Any]]
    """What `status --watch --json` printed every few seconds until it ended by itself."""
    looks: list[SearchStatus]
    """What `segadapt.status` said many times a second; a tiny trial may begin and end between two of `statuses`."""
    findings: list[Finding]
    """What `doctor --fix` said and did."""
    opened: set[tuple[str, str]]
    """Address and name of each process that listened on it."""
    to_others: set[tuple[str, str]]
    """Those of them that other machines could reach."""
    resumed: "CompletedProcess[str]"
    """What `search --resume` said while it ran."""

    NAME: ClassVar[str] = "sdca-streets"

    @property
    def left(self) -> Path:
        """The storage as the search left it."""
        return self.folder / "left"

    def copy_storage(self, to: Path) -> None:
        """Copy what the search left, as a user may."""
        shutil.copytree(self.left, to)
        point_artifacts_here(Place(to))


def watched_search(folder: Path, words: Sequence[str]) -> Watched:
    """Run a search, and look at it with `status`, `doctor` and `Doors` meanwhile."""
    storage, shown, looks = folder / "runs", [], []
    with (
        Doors() as doors,
        (folder / "output.txt").open("w") as output,
        (folder / "errors.txt").open("w") as errors,
    ):
        words = [COMMAND, "search", "sdca", "--trials", "3", *words]
        search = Popen(words, cwd=folder, stdout=output, stderr=errors)

        def watch() -> None:
            while search.poll() is None and not (shown and shown[-1].returncode == 0):
                if (storage / "mlflow.db").is_file():  # refused until the search has opened its run
                    shown.append(run_command(folder, "status", Watched.NAME, "--watch", "--json"))
                time.sleep(0.2)

        watcher = Thread(target=watch)
        watcher.start()
        try:
            wait_for(lambda: any((storage / "ray").glob("*.stages-*/experiment_state-*")), "its stages")
            wait_for((storage / "mlflow.db").is_file, "its records")
            with patch.dict(os.environ):
                findings = list(segadapt.doctor(place=segadapt.Place(storage), fix=True))
            resumed = run_command(folder, "search", "--resume", Watched.NAME)
            assert search.poll() is None, "it was to be seen while it ran"
            storage_place = segadapt.Place(str(storage))
            while search.poll() is None:
                looks.append(segadapt.status(Watched.NAME, place=storage_place))
                time.sleep(0.1)
        finally:
            search.terminate()
            search.wait()
            watcher.join()
    printed, complaints = ((folder / name).read_text() for name in ("output.txt", "errors.txt"))
    assert search.returncode == 0, printed + complaints
    assert shown[-1].returncode == 0, shown[-1].stderr
    shutil.copytree(storage, folder / "left")
    statuses = [json.loads(line) for line in shown[-1].stdout.splitlines()]
    return Watched(folder, printed, complaints, statuses, looks, findings, doors.opened, doors.to_others, resumed)
