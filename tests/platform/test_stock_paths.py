"""What serves where a private part of Ray, Optuna or MLflow is gone: real commands that cannot import it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from conftest import TINY_WORDS
from doors import Doors
from searching import COMMAND

import segadapt as api
from segadapt.platform.storage.folders import Place

BLOCK = """
import builtins, os

import_as_ever = builtins.__import__
blocked = os.environ["SEGADAPT_TEST_BLOCKED"].split()


def import_unless_blocked(name, globals=None, locals=None, fromlist=(), level=0):
    if str((globals or {}).get("__name__")).startswith("segadapt."):
        for part in (name, *(f"{name}.{part}" for part in fromlist or ())):
            if any(f"{part}.".startswith(f"{gone}.") for gone in blocked):
                raise ImportError(f"{part} is gone")
    return import_as_ever(name, globals, locals, fromlist, level)


builtins.__import__ = import_unless_blocked
"""
"""Runs at the start of every process: our modules cannot import what is blocked, their packages can."""

Without = Callable[..., "CompletedProcess[str]"]


@pytest.fixture
def without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Without:
    """Run a command in a fresh folder, without the private names that are given first."""
    folder = tmp_path / "block"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCK)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def run(names: str, *words: str) -> "CompletedProcess[str]":
        environment = {**os.environ, "PYTHONPATH": str(folder), "SEGADAPT_TEST_BLOCKED": names}
        environment["HOME"] = str(tmp_path)  # where Ray, left to itself, writes its token
        return subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
        )

    return run


@pytest.mark.slow
def test_a_search_runs_on_the_stock_parts_of_tune_and_optuna(without: Without, tmp_path: Path) -> None:
    names = {
        "ray.tune.execution.experiment_state": "Tune saves its state at its own pace",
        "ray.tune.execution.class_cache": "Tune sends trials the variables of its choice",
        "ray.air.execution._internal": "a trial whose node is short of memory ends the search",
        "ray._private.services": "Ray starts more processes than it needs",
        "ray._private.ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV": "Ray may build an environment for each process",
        "optuna.storages.get_storage": "all trials are read from the database each time",
    }
    words = ["--trials", "2", "--launcher", "inprocess", *TINY_WORDS]
    done = without(" ".join(names), COMMAND, "search", "sdca", *words)
    assert done.returncode == 0, done.stderr
    for name, consequence in names.items():
        assert f"({name}" in done.stderr, done.stderr
        assert done.stderr.count(consequence) == 1, "said once"
    rows = api.runs("sdca-streets", place=Place(str(tmp_path / "runs"))).rows
    assert {row.state for row in rows} <= {"finished", "stopped early"}
    assert len(rows) == 2


@pytest.mark.slow
def test_rays_own_trainer_runs_a_trial_of_two_workers_and_gives_back_what_a_paused_one_had(
    without: Without, tmp_path: Path
) -> None:
    words = ["--trials", "2", "--workers-per-trial", "2", "--scheduler", "asha-promote", *TINY_WORDS]
    with Doors() as doors:
        done = without("ray.train.v2", COMMAND, "search", "sdca", *words)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Ray's own TorchTrainer runs the workers of trials") == 1
    assert "paused" in done.stdout
    assert not doors.to_others, "its dashboard, too, is there for this machine alone"
    rows = api.runs("sdca-streets", place=Place(str(tmp_path / "runs"))).rows
    assert sorted(row.state for row in rows) == ["finished", "stopped early"]
    (best,) = (row for row in rows if row.state == "finished")
    assert best.checkpoint is not None
    assert (Path(best.checkpoint) / "state.pt").is_file()


@pytest.mark.slow
def test_workers_that_cannot_be_had_to_meet_on_one_address_say_so(without: Without, tmp_path: Path) -> None:
    words = ["source_only", "--name", "open", "--workers-per-trial", "2", *TINY_WORDS]
    done = without("ray.train.torch.config", COMMAND, "train", *words)
    assert done.returncode == 0, done.stderr
    logged = api.trial_log("source_only", "open", place=Place(str(tmp_path / "runs")))
    warnings = [entry["message"] for entry in logged if "listens on all interfaces" in entry["message"]]
    assert len(warnings) == 1


CONNECT = """
import os
from segadapt.platform.cluster.connection import connect
from segadapt.platform.errors import UsageError
import ray
try:
    with connect(None):
        print("mode", ray.get(ray.remote(lambda: os.environ.get("RAY_AUTH_MODE")).remote()))
except UsageError as error:
    print("refused", error)
"""
LOOPBACK = "ray._private.ray_constants.ENABLE_RAY_CLUSTER"
TOKEN = "ray._raylet"


def test_a_ray_that_cannot_be_kept_to_this_machine_still_asks_for_a_token(without: Without) -> None:
    done = without(LOOPBACK, sys.executable, "-c", CONNECT)
    assert done.stdout == "mode token\n", done.stderr
    assert done.stderr.count("guarded by its token alone") == 1


def test_a_ray_that_cannot_be_given_a_token_authenticates_by_itself_on_loopback_and_says_so(without: Without) -> None:
    with Doors() as doors:
        done = without(TOKEN, sys.executable, "-c", CONNECT)
    assert done.stdout.startswith("mode"), done.stderr
    assert not doors.to_others
    assert "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with a token" in done.stderr


def test_a_ray_that_would_be_open_to_the_network_is_not_started(without: Without) -> None:
    done = without(f"{LOOPBACK} {TOKEN}", sys.executable, "-c", CONNECT)
    assert done.stdout.startswith("refused The Ray that is started here must listen on 127.0.0.1 alone or ask"), done
    assert "Set RAY_AUTH_MODE=token" in done.stdout


def test_doctor_says_that_it_cannot_look_at_the_schema_of_mlflows_database(without: Without, trained: Path) -> None:
    done = without("mlflow.store", COMMAND, "doctor", "--storage", str(trained / "runs"))
    assert done.returncode == 0, done.stdout
    assert "cannot be looked at" in " ".join(done.stdout.split())
