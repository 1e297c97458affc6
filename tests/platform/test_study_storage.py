"""The study in storages that users have: a PostgreSQL server, and tools that read studies."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import optuna
import pytest
from conftest import TINY_WORDS

from segadapt.platform import api
from segadapt.platform.errors import UsageError
from segadapt.platform.study import open_study_storage

Call = Callable[..., "CompletedProcess[str]"]


@pytest.mark.slow
def test_a_search_keeps_its_study_in_postgresql_and_goes_on_there(
    segadapt: Call, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {"AWS_SECRET_ACCESS_KEY": "hunter2-aws", "MLFLOW_TRACKING_PASSWORD": "hunter2-mlflow"}
    secrets |= {"PGPASSWORD": "hunter2-pg", "RAY_AUTH_TOKEN": "hunter2-" + "0" * 56}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    words = ["--study-uri", postgres_url.replace("postgres@", "postgres:hunter2-study@")]
    done = segadapt("search", "sdca", "--trials", "2", *words, *TINY_WORDS)
    assert done.returncode == 0, done.stderr
    more = segadapt("search", "--extend", "sdca-streets", "--trials", "1", *words)
    assert more.returncode == 0, more.stderr
    study = optuna.load_study(study_name="sdca-streets", storage=postgres_url)
    assert len(study.trials) == 3
    assert all(trial.state.is_finished() and trial.intermediate_values for trial in study.trials)
    assert not (tmp_path / "runs" / "optuna.db").exists(), "one record of the study"
    status = api.status("sdca-streets", storage=str(tmp_path / "runs"), study_uri=postgres_url)
    assert status.rungs[0].reached >= 2
    report = segadapt("report", "sdca-streets", *words)
    assert report.returncode == 0, report.stderr
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"mlflow.db", "sdca-streets.html", "record.json"} <= {path.name for path in kept}
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


@pytest.mark.slow
def test_optuna_dashboard_opens_the_study(segadapt: Call, tmp_path: Path) -> None:
    done = segadapt("search", "sdca", "--trials", "1", "--launcher", "inprocess", *TINY_WORDS)
    assert done.returncode == 0, done.stderr
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
    assert [study["study_name"] for study in studies] == ["sdca-streets"]
