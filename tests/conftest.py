"""Shared settings: a streets world so small that a trial takes seconds."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen
from subprocess import run as run_process

import pytest

TINY = {
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


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a user's own settings out of the tests."""
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def segadapt(tmp_path: Path) -> Callable[..., CompletedProcess[str]]:
    """Run the command line in a fresh folder; returns the completed process."""

    def call(*words: str, timeout: float = 300) -> CompletedProcess[str]:
        return run_process(_command(words), cwd=tmp_path, capture_output=True, text=True, timeout=timeout, check=False)

    return call


@pytest.fixture
def start_segadapt(tmp_path: Path) -> Callable[..., "Popen[str]"]:
    """Start the command line in its own process group in a fresh folder."""

    def call(*words: str) -> "Popen[str]":
        return Popen(_command(words), cwd=tmp_path, stdout=PIPE, stderr=PIPE, text=True, process_group=0)

    return call


def _command(words: Sequence[str]) -> list[str]:
    import sys

    return [str(Path(sys.executable).with_name("segadapt")), *words]


def process_group_is_gone(group: int) -> bool:
    """Return whether no process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny run named `tiny`; no test changes its files."""
    folder = tmp_path_factory.mktemp("trained")
    words = _command(["train", "source_only", "--name", "tiny", *TINY_WORDS])
    done = run_process(words, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return folder
