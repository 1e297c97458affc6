"""Faults as machines have them: real processes, killed, stopped and asked to end; disks full and databases away.

Each test prints how long it took from the fault to the next result. docs/faults.md says which tests hold other faults.
"""

import contextlib
import functools
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from conftest import RECOVERY, TINY, _postgres, cluster_without_token
from mlflow import MlflowClient
from optuna.trial import TrialState

COMMAND = str(Path(sys.executable).with_name("segadapt"))
EVERY = 15


def tiny(steps: int, warmup: int = 4) -> list[str]:
    own = {"trainer.steps": steps, "trainer.eval_every": EVERY, "warmup.steps": warmup}
    return [f"{key}={value}" for key, value in (TINY | own).items()]


WORDS = tiny(120)

pytestmark = pytest.mark.slow


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 600) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.05)
    return found


class Driver:
    """A command in the background, and what it prints with the time of each line."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.lines: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            [COMMAND, *words],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line))

    def said(self) -> str:
        return "".join(line for _, line in self.lines)

    def wait_for(self, pattern: str, after: int = 0) -> "tuple[float, re.Match[str]]":
        """When the first line that matches came, of those after the first `after` ones, and its match."""

        def found() -> "tuple[float, re.Match[str]] | None":
            ended = self.process.poll() is not None and not self.reader.is_alive()
            for when, line in self.lines[after:]:
                if match := re.search(pattern, line):
                    return when, match
            assert not ended, self.said()
            return None

        known: tuple[float, re.Match[str]] = wait_for(found, pattern)
        return known

    def ends(self) -> int:
        return self.process.wait(timeout=600)

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
    """Seconds from each fault to the next result of what it hit, which `tests/conftest.py` prints in the end."""

    def __init__(self, note: Callable[[str, object], None]) -> None:
        self.note = note

    def measure(self, fault: str, driver: Driver, name: str, inflict: Callable[[], None]) -> int:
        """Inflict a fault on a trial and return the step of its next result."""
        return self.begin(fault, driver, name, inflict)()

    def begin(self, fault: str, driver: Driver, name: str, inflict: Callable[[], None]) -> Callable[[], int]:
        """Inflict a fault on a trial; what is returned waits for its next result and returns the step."""
        started = time.monotonic()
        inflict()
        before = len(driver.lines)

        def wait() -> int:
            when, match = driver.wait_for(rf"{name} step (\d+)/", before)
            self.note(RECOVERY, (fault, when - started))
            return int(match.group(1))

        return wait


@pytest.fixture
def recoveries(record_property: Callable[[str, object], None]) -> Recoveries:
    return Recoveries(record_property)


def processes(folder_name: str, title: str = "") -> list[int]:
    """Processes that work in a folder of this name, as trials do in one named after their id."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink().name == folder_name and title in (process / "cmdline").read_text():
                found.append(int(process.name))
    return found


def is_alive(process: int) -> bool:
    """Whether a process runs; one that ended may wait as a zombie for its parent."""
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def runs_of(folder: Path, experiment: str) -> dict[str, Any]:
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return {run.info.run_name: run for run in client.search_runs([found.experiment_id])}


def steps_of(folder: Path, run: Any) -> list[int]:
    return [step for step, _ in history(folder, run, "target_val/miou")]


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


@pytest.fixture
def stages(undisturbed: Path) -> Path:
    """A folder of shared stages that are computed already."""
    return undisturbed / "runs" / "stages"


def test_a_search_survives_kills_hangs_and_preemptions_of_its_trials(
    undisturbed: Path, recoveries: Recoveries, tmp_path: Path
) -> None:
    @functools.cache
    def key_of(name: str) -> str:
        return trial_id(tmp_path, "sdca-streets", name)  # takes a while, in which a trial goes on

    def signalled(name: str, number: signal.Signals) -> Callable[[], None]:
        key = key_of(name)
        process = wait_for(lambda: processes(key, ".train"), f"the process of {name}")[0]  # others wait to be reused

        def inflict() -> None:
            os.kill(process, number)
            wait_for(lambda: number == signal.SIGSTOP or not is_alive(process), f"process {process} to end")

        return inflict

    with driving(tmp_path, *SEARCH, "--max-failures", "1", "--trial-timeout", "45", *WORDS) as driver:

        def begin(fault: str, name: str, number: signal.Signals) -> Callable[[], int]:
            key_of(name)
            driver.wait_for(f"{name} step {EVERY}/")
            return recoveries.begin(fault, driver, name, signalled(name, number))

        key_of("sdca-002")  # runs beside the first
        killed = begin("trial killed", "sdca-001", signal.SIGKILL)
        hung = begin("trial hangs, time-out 45 s", "sdca-002", signal.SIGSTOP)
        assert killed() >= EVERY, "from its checkpoint"
        begin("trial asked to end", "sdca-003", signal.SIGTERM)()
        begin("trial killed", "sdca-003", signal.SIGKILL)()
        begin("trial killed", "sdca-004", signal.SIGKILL)()
        signalled("sdca-004", signal.SIGKILL)()
        assert hung() >= EVERY
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
        assert found[name].data.tags.get("segadapt.preemptions") == ("1" if name == "sdca-003" else None)
    assert found["sdca-004"].info.status == "FAILED"
    assert found["sdca-streets"].info.status == "FINISHED"
    study = optuna.load_study(study_name="sdca-streets", storage=f"sqlite:///{tmp_path}/runs/optuna.db")
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.COMPLETE] * 3 + [TrialState.FAIL]
    ended = subprocess.run(
        [COMMAND, "search", "--resume", "sdca-streets"], cwd=tmp_path, capture_output=True, text=True
    )
    assert not re.search(r"sdca-00[123] step", ended.stdout), "nothing that finished is done again"


def descendants(parent: int, title: str) -> list[int]:
    """Processes started by another one or by those it started, by a part of their title."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if title in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def test_workers_and_nodes_that_die_are_replaced(
    recoveries: Recoveries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with cluster_without_token(num_cpus=0, include_dashboard=True, dashboard_port=port) as cluster:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]

        def workers() -> dict[int, Any]:
            """The trial's workers and the nodes they are on."""
            raylets = {node.all_processes["raylet"][0].process.pid: node for node in nodes}
            return {pid: node for raylet, node in raylets.items() for pid in descendants(raylet, "RayTrainWorker")}

        def inflict_on_a_worker(number: signal.Signals) -> Callable[[], None]:
            def inflict() -> None:
                process = min(workers())
                os.kill(process, number)
                wait_for(lambda: not is_alive(process), f"worker {process} to end")

            return inflict

        def lose_a_node() -> None:
            node = next(iter(workers().values()))
            os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
            nodes.remove(node)
            cluster.remove_node(node, allow_graceful=False)

        def started() -> list[str]:
            """What the trial's processes are, by the class of their actor."""
            raylets = [node.all_processes["raylet"][0].process.pid for node in (cluster.head_node, *nodes)]
            titles = [
                Path(f"/proc/{pid}/cmdline").read_text() for raylet in raylets for pid in descendants(raylet, "ray::")
            ]
            return sorted(
                match.group(1) for title in titles if (match := re.match(r"ray::(?!IDLE|\w+Agent)(\w+)", title))
            )

        words = ["train", "source_only", "--workers-per-trial", "2", "--address", cluster.address]
        with driving(tmp_path, *words, *tiny(1, warmup=210)) as driver:
            driver.wait_for("source_only step 15/")
            assert started() == ["ImplicitFunc", "RayTrainWorker", "RayTrainWorker", "SynchronizationActor"]
            assert recoveries.measure("worker killed", driver, "source_only", inflict_on_a_worker(signal.SIGKILL)) >= 15
            recoveries.measure("worker asked to end", driver, "source_only", inflict_on_a_worker(signal.SIGTERM))
            recoveries.measure("node killed", driver, "source_only", lose_a_node)
            assert driver.ends() == 0, driver.said()
    run = runs_of(tmp_path, "train-source_only-streets")["source_only"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["segadapt.preemptions"] == "1", "and the two that died are no more than may"
    assert steps_of(tmp_path, run) == list(range(15, 211, 15)), "every step once"


def test_a_trial_of_two_workers_one_of_which_stands_still_is_started_again(
    recoveries: Recoveries, tmp_path: Path
) -> None:
    words = ["train", "source_only", "--workers-per-trial", "2", "--trial-timeout", "40"]
    with driving(tmp_path, *words, *tiny(1, warmup=60)) as driver:
        driver.wait_for("source_only step 15/")
        stopped = max(descendants(driver.process.pid, "RayTrainWorker"))

        def stop() -> None:
            os.kill(stopped, signal.SIGSTOP)

        recoveries.measure("one of two workers hangs, time-out 40 s", driver, "source_only", stop)
        assert not is_alive(stopped)
        assert driver.ends() == 0, driver.said()
    run = runs_of(tmp_path, "train-source_only-streets")["source_only"]
    assert run.data.tags["segadapt.restarts"] == "1"
    assert steps_of(tmp_path, run) == [15, 30, 45, 60], "every step once"


TAKES_MEMORY = """
import mmap, sys
taken = []
def free():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
while free() > int(sys.argv[1]):
    taken.append(mmap.mmap(-1, 2**26))
    for page in range(0, 2**26, mmap.PAGESIZE):
        taken[-1][page] = 1
sys.stdin.read()
"""


def test_a_trial_that_is_killed_because_its_node_has_no_memory_left_goes_on(
    recoveries: Recoveries, stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = psutil.virtual_memory()
    least = memory.available - 5 * 10**9  # the search takes some of it
    if least < 10**9:
        pytest.skip(f"needs 6 GB of memory, but {memory.available / 1e9:.1f} GB are free")
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{1 - least / memory.total:.4f}")
    shutil.copytree(stages, tmp_path / "runs" / "stages")
    words = ["search", "sdca", "--trials", "1", "--launcher", "inprocess", "--max-failures", "9", *tiny(150)]
    with driving(tmp_path, *words) as driver:
        driver.wait_for("sdca-001 step 15/")
        (process,) = processes(trial_id(tmp_path, "sdca-streets", "sdca-001"), "ray::")

        def take_all_memory() -> None:
            other = subprocess.Popen([sys.executable, "-c", TAKES_MEMORY, str(least - 2**28)], stdin=subprocess.PIPE)
            try:
                wait_for(lambda: not is_alive(process), "Ray to end the trial's process")
            finally:
                other.kill()
                other.wait()

        assert recoveries.measure("memory of the node full", driver, "sdca-001", take_all_memory) >= EVERY
        assert driver.ends() == 0, driver.said()
    run = runs_of(tmp_path, "sdca-streets")["sdca-001"]
    assert steps_of(tmp_path, run) == list(range(15, 151, 15)), "every step once"
    log = subprocess.run(
        [COMMAND, "logs", "sdca-001", "--search", "sdca-streets"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "its node was short of memory" in log.stdout


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount a file system of its own, if that is allowed here."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300m", "none", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def own_postgres(running: Path) -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    """Another server with the programs of a running one; yields its address, what kills it and what starts it again."""
    postmaster = int((running / "data" / "postmaster.pid").read_text().splitlines()[0])
    user = "nobody" if os.geteuid() == 0 else None
    programs = Path(f"/proc/{postmaster}/exe").readlink().parent
    with tempfile.TemporaryDirectory(prefix="pg") as name:
        folder = Path(name)
        if user is not None:
            shutil.chown(folder, user)
        servers = _postgres(programs, folder, user)
        next(servers)
        again: list[subprocess.Popen[bytes]] = []
        first = int((folder / "data" / "postmaster.pid").read_text().splitlines()[0])
        command = Path(f"/proc/{first}/cmdline").read_text().rstrip("\0").split("\0")

        def kill() -> None:
            os.kill(first, signal.SIGKILL)
            os.waitpid(first, 0)  # a zombie would look alive to the next one

        def restart() -> None:
            again.append(subprocess.Popen(command, user=user, cwd=folder))

        try:
            yield f"postgresql+psycopg://postgres@/postgres?host={folder}", kill, restart
        finally:
            for server in again:
                server.send_signal(signal.SIGINT)
                server.wait(timeout=60)
            servers.close()  # type: ignore[attr-defined]


def test_a_search_waits_for_its_database_and_its_disk(
    recoveries: Recoveries, postgres_socket: Path, stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGADAPT_MIN_FREE_BYTES", "1000000")
    away_s = 6.0
    storage = tmp_path / "runs"
    storage.mkdir()
    words = ["search", "sdca", "--trials", "1", "--launcher", "inprocess", *tiny(300)]
    with small_disk(storage), own_postgres(postgres_socket) as (url, kill, restart):
        shutil.copytree(stages, storage / "stages")

        def lose_the_database() -> None:
            kill()
            time.sleep(away_s)
            restart()

        def fill_the_disk() -> None:
            with contextlib.suppress(OSError), (storage / "full").open("wb") as file:
                while True:
                    file.write(bytes(2**20))
            time.sleep(away_s)
            (storage / "full").unlink()

        def refuse_writing() -> None:
            (process,) = processes(trial_id(tmp_path, "sdca-streets", "sdca-001"))
            _, most = resource.prlimit(process, resource.RLIMIT_FSIZE)
            resource.prlimit(process, resource.RLIMIT_FSIZE, (100, most))  # longer files are refused with an error
            time.sleep(away_s)
            resource.prlimit(process, resource.RLIMIT_FSIZE, (most, most))

        with driving(tmp_path, *words, "--study-uri", url) as driver:
            driver.wait_for("sdca-001 step 15/")
            recoveries.measure(f"PostgreSQL killed, back after {away_s:g} s", driver, "sdca-001", lose_the_database)
            recoveries.measure(f"disk full for {away_s:g} s", driver, "sdca-001", fill_the_disk)
            recoveries.measure(f"trial cannot write for {away_s:g} s", driver, "sdca-001", refuse_writing)
            assert driver.ends() == 0, driver.said()
        run = runs_of(tmp_path, "sdca-streets")["sdca-001"]
        assert run.info.status == "FINISHED"
        assert steps_of(tmp_path, run) == list(range(15, 301, 15)), "every step once"
        (trial,) = optuna.load_study(study_name="sdca-streets", storage=url).trials
        assert trial.state == TrialState.COMPLETE
        assert sorted(trial.intermediate_values) == list(range(15, 301, 15))
