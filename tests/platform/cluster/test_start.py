"""Ray on a busy machine, where it may not start in its time."""

import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from segadapt.platform.cli.main import main
from segadapt.platform.cluster.connection import connect
from segadapt.platform.errors import UsageError

LATE = "The current node timed out during startup. The GCS has become overloaded."
"""What Ray says then."""


def late(failures: int, monkeypatch: pytest.MonkeyPatch) -> list[psutil.Process]:
    """Have Ray come up too late so many times; returns what it starts then."""
    begun: list[psutil.Process] = []
    start = ray.init

    def init(**options: Any) -> Any:
        if len(begun) == failures:
            return start(**options)
        begun.append(psutil.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        raise Exception(LATE)  # as Ray does

    monkeypatch.setattr(ray, "init", init)
    return begun


def test_a_ray_that_comes_up_late_is_given_more_time_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun = late(1, monkeypatch)
    with connect(None) as capacity:
        assert capacity.nodes
        priority = ray.remote(lambda: os.getpriority(os.PRIO_PROCESS, 0))
        assert ray.get(priority.remote()) == os.getpriority(os.PRIO_PROCESS, 0), "trials are as urgent as the command"
        with pytest.raises(UsageError, match="must not be in a Ray cluster yet"), connect(None):
            pass
        assert ray.is_initialized(), "it is left alone"
        assert [process.is_running() for process in begun] == [False], "what had been started is ended first"
    assert "trying again, with 300 s for it" in caplog.text


def test_a_ray_that_does_not_come_up_is_told_of_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = late(2, monkeypatch)
    with pytest.raises(UsageError) as refused, connect(None):
        pass
    assert str(refused.value).startswith("Ray must start on this machine, but did not, not even with 300 s for it")
    assert LATE.rstrip(".") in str(refused.value)
    assert [process.is_running() for process in begun] == [False, False]


def test_a_command_for_which_ray_does_not_come_up_has_an_exit_status_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    late(2, monkeypatch)
    monkeypatch.setattr("sys.argv", ["segadapt", "search", "sdca"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 3
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: Ray must start on this machine")
    assert not list(tmp_path.glob("runs/ray/*")), "nothing may be left behind"
