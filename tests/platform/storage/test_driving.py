"""One command at a time works on an experiment: real processes, killed and stopped."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from segadapt.platform.errors import UsageError
from segadapt.platform.storage.driving import driving, driving_if_free, is_driven
from segadapt.platform.storage.folders import Storage

DRIVER = """
import sys
from pathlib import Path
from segadapt.platform.storage.driving import driving
from segadapt.platform.storage.folders import Storage
with driving(Storage(Path(sys.argv[1])), "town"):
    print("drives", flush=True)
    sys.stdin.read()
"""


def driver(root: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "drives\n"
    return process


def test_an_experiment_has_one_driver_even_while_it_stands_still_and_none_once_it_is_killed(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with driver(tmp_path) as process:
        try:
            os.kill(process.pid, signal.SIGSTOP)
            with pytest.raises(UsageError, match=f"but process {process.pid} on .* works on 'town'"):
                driving(storage, "town").__enter__()
            assert is_driven(storage, "town")
            with driving_if_free(storage, "village") as alone:
                assert alone, "another experiment has a driver of its own"
        finally:
            process.kill()
        process.wait()
        assert not is_driven(storage, "town")
        with driving(storage, "town"):
            assert is_driven(storage, "town")


def test_looking_whether_an_experiment_is_driven_keeps_no_driver_out(tmp_path: Path) -> None:
    looks = "while True: is_driven(Storage(Path(sys.argv[1])), 'town')"
    script = DRIVER.partition("with driving")[0] + "from segadapt.platform.storage.driving import is_driven\n" + looks
    with driving(Storage(tmp_path), "town"):
        looker = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    try:
        for _ in range(100):
            with driving(Storage(tmp_path), "town"):
                pass
    finally:
        looker.kill()
        looker.wait()


def test_where_nothing_can_be_locked_nothing_is_driven(tmp_path: Path) -> None:
    (tmp_path / "locks").write_text("no folder")
    with pytest.raises(UsageError, match="--storage must be a folder in which files can be written and locked"):
        driving(Storage(tmp_path), "town").__enter__()
