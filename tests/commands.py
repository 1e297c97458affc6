"""The command line in processes of its own that have imported already what commands import, which takes seconds."""

import atexit
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from subprocess import run as run_process
from unittest.mock import patch

COMMAND = str(Path(sys.executable).with_name("segadapt"))

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(
    ["segadapt.platform.api.training", "segadapt.platform.api.results", "mlflow.store.tracking.sqlalchemy_store"]
)

_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING"}
"""What commands set before they import MLflow."""

_READ_LATE = ("MLFLOW_", "_MLFLOW_", "PYTEST_", "RAY_CLIENT_MODE", "SEGADAPT_")
"""Beginnings of variables that are read when needed, or set by imports; others may be read by imports."""


def _read_early() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_READ_LATE)}


_USUAL = _read_early()


def forked(target: Callable[..., None], *arguments: object) -> BaseProcess:
    """Start a function in a fork of a process that has imported what commands import, MLflow included."""
    with patch.dict(os.environ, _QUIET):
        forkserver.ensure_running()
    process = _FORKED.Process(target=target, args=arguments)
    process.start()
    return process


def run_command(folder: Path, *words: str, timeout: float = 600) -> "CompletedProcess[str]":
    """Run a command in a folder: where the environment is the usual one, in a fork (`forked`), else by its script."""
    if _read_early() != _USUAL:
        command = [COMMAND, *words]
        return run_process(command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False)
    with tempfile.TemporaryDirectory() as name:
        printed, errors = Path(name) / "printed", Path(name) / "errors"
        process = forked(_run, words, folder, printed, errors, dict(os.environ))
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutExpired(words, timeout, printed.read_text(), errors.read_text())
        assert process.exitcode is not None
        return CompletedProcess(words, process.exitcode, printed.read_text(), errors.read_text())


def _run(words: tuple[str, ...], folder: Path, printed: Path, errors: Path, environment: dict[str, str]) -> None:
    """Do what the script of `COMMAND` does."""
    from segadapt.platform.cli.main import main

    for path, stream in ((printed, 1), (errors, 2)):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [COMMAND, *words]
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # which `multiprocessing` leaves out
