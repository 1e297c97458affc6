"""Faults as machines have them: real processes, killed, stopped and asked to end; disks full and databases away.

Each test prints how long it took from the fault to the next result. docs/faults.md says which tests hold other faults.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import TINY
from mlflow import MlflowClient
from optuna.trial import TrialState

COMMAND = str(Path(sys.executable).with_name("segadapt"))
WORDS = [f"{key}={value}" for key, value in (TINY | {"trainer.steps": 90, "trainer.eval_every": 15}).items()]

pytestmark = pytest.mark.slow


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 240) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.05)
    return found


class Driver:
    """A command in the background and what it prints."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.log = folder / f"{words[0]}.txt"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [COMMAND, *words], cwd=folder, stdout=output, stderr=output, process_group=0
            )

    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, pattern: str, after: int = 0) -> "re.Match[str]":
        """The first match in what was printed after the first `after` characters."""

        def found() -> "re.Match[str] | None":
            assert self.process.poll() is None or re.search(pattern, self.said()[after:]), self.said()
            return re.search(pattern, self.said()[after:])

        match: re.Match[str] = wait_for(found, pattern)
        return match

    def ends(self) -> int:
        return self.process.wait(timeout=240)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=60)


@contextlib.contextmanager
def driving(folder: Path, *words: str) -> Iterator[Driver]:
    driver = Driver(folder, *words)
    try:
        yield driver
    finally:
        driver.stop()


class Recoveries:
    """Seconds from each fault to the next result of what it hit."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float]] = []

    def measure(self, fault: str, driver: Driver, name: str, inflict: Callable[[], None]) -> int:
        """Inflict a fault on a trial and return the step of its next result."""
        before = len(driver.said())
        started = time.monotonic()
        inflict()
        step = int(driver.wait_for(rf"{name} step (\d+)/", before).group(1))
        self.rows.append((fault, time.monotonic() - started))
        return step


@pytest.fixture(scope="module")
def recoveries(request: pytest.FixtureRequest) -> Iterator[Recoveries]:
    found = Recoveries()
    yield found
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    reporter.write_line("\nseconds from the fault to the next result:")
    for fault, seconds in found.rows:
        reporter.write_line(f"  {fault:50} {seconds:6.1f}")


def processes(folder_name: str, title: str = "") -> list[int]:
    """Processes that work in a folder of this name, as trials do in one named after their id."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink().name == folder_name and title in (process / "cmdline").read_text():
                found.append(int(process.name))
    return found


def runs_of(folder: Path, experiment: str) -> dict[str, Any]:
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return {run.info.run_name: run for run in client.search_runs([found.experiment_id])}


def history(folder: Path, run: Any, metric: str) -> list[tuple[int, float]]:
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    return [(entry.step, entry.value) for entry in client.get_metric_history(run.info.run_id, metric)]


def trial_id(folder: Path, experiment: str, name: str) -> str:
    def found() -> str | None:
        with contextlib.suppress(Exception):  # the driver writes it meanwhile
            return str(runs_of(folder, experiment)[name].data.tags["segadapt.trial_id"])
        return None

    known: str = wait_for(found, f"the run {name}")
    return known


SEARCH = ["search", "sdca", "--trials", "4", "--concurrent", "2", "--scheduler", "none", "--launcher", "inprocess"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run([COMMAND, *SEARCH, *WORDS], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_search_survives_kills_hangs_and_preemptions_of_its_trials(
    undisturbed: Path, recoveries: Recoveries, tmp_path: Path
) -> None:
    def signalled(name: str, number: signal.Signals) -> Callable[[], None]:
        (process,) = processes(trial_id(tmp_path, "sdca-streets", name))
        return lambda: os.kill(process, number)

    with driving(tmp_path, *SEARCH, "--max-failures", "1", "--trial-timeout", "45", *WORDS) as driver:
        driver.wait_for("sdca-001 step 15/")
        step = recoveries.measure("trial killed", driver, "sdca-001", signalled("sdca-001", signal.SIGKILL))
        assert step >= 15, "from its checkpoint"
        driver.wait_for("sdca-002 step 30/")
        step = recoveries.measure(
            "trial hangs, time-out 45 s", driver, "sdca-002", signalled("sdca-002", signal.SIGSTOP)
        )
        assert step >= 30
        driver.wait_for("sdca-003 step 15/")
        recoveries.measure("trial asked to end", driver, "sdca-003", signalled("sdca-003", signal.SIGTERM))
        recoveries.measure("trial killed", driver, "sdca-003", signalled("sdca-003", signal.SIGKILL))
        driver.wait_for("sdca-004 step 15/")
        recoveries.measure("trial killed", driver, "sdca-004", signalled("sdca-004", signal.SIGKILL))
        signalled("sdca-004", signal.SIGKILL)()
        assert driver.ends() == 1, driver.said()
    assert "sdca-004 failed" in driver.said()
    found, expected = runs_of(tmp_path, "sdca-streets"), runs_of(undisturbed, "sdca-streets")
    assert set(found) == set(expected)
    for name in ("sdca-001", "sdca-002", "sdca-003"):
        assert found[name].info.status == "FINISHED"
        assert found[name].data.params == expected[name].data.params
        for metric in ("target_val/miou", "loss/total"):
            assert history(tmp_path, found[name], metric) == history(undisturbed, expected[name], metric)
        assert found[name].data.tags["segadapt.restarts"] == ("2" if name == "sdca-003" else "1")
        assert found[name].data.tags["segadapt.preemptions"] == ("1" if name == "sdca-003" else "0")
    assert found["sdca-004"].info.status == "FAILED"
    assert found["sdca-streets"].info.status == "FINISHED"
    study = optuna.load_study(study_name="sdca-streets", storage=f"sqlite:///{tmp_path}/runs/optuna.db")
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.COMPLETE] * 3 + [TrialState.FAIL]
    ended = subprocess.run(
        [COMMAND, "search", "--resume", "sdca-streets"], cwd=tmp_path, capture_output=True, text=True
    )
    assert " step " not in ended.stdout, "nothing is done again"
