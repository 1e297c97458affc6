"""The study in storages that users have: a PostgreSQL server, and tools that read studies."""

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import optuna
import psycopg
import pytest
from commands import forked
from conftest import TINY_WORDS, GuardedMlflow
from searching import Watched

import segadapt as api
from segadapt.platform.errors import UsageError
from segadapt.platform.search.study_storage import open_study_storage
from segadapt.platform.storage.folders import Place

Call = Callable[..., "CompletedProcess[str]"]


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Ray leaves its logs; short, since a socket's path is."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name:
        monkeypatch.setenv("RAY_TMPDIR", name)
        yield Path(name)


@pytest.mark.slow
def test_a_search_keeps_its_study_in_postgresql_and_goes_on_there(
    segadapt: Call,
    postgres_url: str,
    guarded_mlflow: GuardedMlflow,
    ray_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secrets = {"AWS_SECRET_ACCESS_KEY": "hunter2-aws", "AWS_SESSION_TOKEN": "hunter2-session"}
    secrets |= {"PGPASSWORD": "hunter2-pg", "RAY_AUTH_TOKEN": "hunter2-" + "0" * 56}
    secrets |= {"MLFLOW_TRACKING_PASSWORD": "hunter2-mlflow"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    server = guarded_mlflow.address.replace("://", f"://admin:{guarded_mlflow.password}@")
    words = ["--study-uri", postgres_url.replace("postgres@", "postgres:hunter2-study@"), "--tracking-uri", server]
    done = segadapt("search", "sdca", "--trials", "1", *words, *TINY_WORDS, timeout=900)
    assert done.returncode == 0, done.stderr
    more = segadapt("search", "--extend", "sdca-streets", "--trials", "1", *words, timeout=900)
    assert more.returncode == 0, more.stderr
    study = optuna.load_study(study_name="sdca-streets", storage=postgres_url)
    assert len(study.trials) == 2
    assert all(trial.state.is_finished() and trial.intermediate_values for trial in study.trials)
    assert not (tmp_path / "runs" / "optuna.db").exists(), "one record of the study"
    status = api.status("sdca-streets", place=Place(tmp_path / "runs", server, postgres_url))
    assert status.rungs[0].reached >= 2
    report = segadapt("report", "sdca-streets", *words)
    assert report.returncode == 0, report.stderr
    folders = (tmp_path, ray_folder, guarded_mlflow.folder)
    left = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    kept = {path: path.read_bytes() for path in left if not path.name.startswith("auth.")}  # the login's own
    assert {"mlflow.db", "sdca-streets.html", "record.json", "raylet.out"} <= {path.name for path in kept}
    assert not [path for path, content in kept.items() if b"hunter2" in content], "a secret is in a file"
    assert not [path for path, content in kept.items() if postgres_url.encode() in content]
    assert "hunter2" not in "".join(f"{command.stdout}{command.stderr}" for command in (done, more, report))
    told = [(trial.params, trial.user_attrs, trial.system_attrs) for trial in study.trials]
    assert "hunter2" not in f"{told}{study.user_attrs}"


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "nonsense"])
def test_a_study_storage_that_does_not_answer_is_refused_without_its_password(driver: str) -> None:
    with pytest.raises(UsageError, match="--study-uri must be a database that answers") as refused:
        open_study_storage(f"{driver}://me:secret@127.0.0.1:1/studies")
    assert "secret" not in str(refused.value)


def test_optuna_dashboard_opens_the_study(watched: Watched, tmp_path: Path) -> None:
    watched.copy_storage(tmp_path / "runs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [str(Path(sys.executable).with_name("optuna-dashboard")), f"sqlite:///{tmp_path}/runs/optuna.db"]
    server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", port])
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=5) as answer:
                    studies = json.load(answer)["study_summaries"]
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.5)
    finally:
        server.terminate()
        server.wait(timeout=30)
    assert [study["study_name"] for study in studies] == [Watched.NAME]


def open_together(folder: Path, url: str, number: int) -> None:
    """Open a new database together with others."""
    import optuna.storages._rdb.storage  # noqa: F401  # before the others are waited for

    (folder / str(number)).mkdir()
    while len(list(folder.iterdir())) < OPENERS:
        pass
    open_study_storage(url).get_all_studies()


OPENERS = 4


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_commands_that_find_a_new_database_at_once_all_open_it(
    database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite:///{tmp_path / 'optuna.db'}" if database == "sqlite" else new_database(request)
    (tmp_path / "ready").mkdir()
    processes = [forked(open_together, tmp_path / "ready", url, number) for number in range(OPENERS)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * OPENERS
    assert open_study_storage(url).get_all_studies() == []


def new_database(request: pytest.FixtureRequest) -> str:
    socket: Path = request.getfixturevalue("postgres_socket")
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(f"host={socket} user=postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"postgresql+psycopg://postgres@/{name}?host={socket}"
