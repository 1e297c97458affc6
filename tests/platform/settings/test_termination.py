"""Commands that are asked to end, in whatever way, leave no process and no folder behind."""

import os
import pty
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from conftest import TINY_WORDS
from searching import COMMAND, free_port, tracked, wait_for


def measuring(driver: psutil.Process) -> list[psutil.Process]:
    """The processes of a dry run that measure a few steps."""
    return [each for each in driver.children(recursive=True) if "experiment.probe" in " ".join(each.cmdline())]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_dry_run_that_is_ended_leaves_no_process_and_no_folder(number: signal.Signals, tmp_path: Path) -> None:
    words = [COMMAND, "search", "source_only", "--dry-run", *TINY_WORDS]
    driver = psutil.Popen(words, cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)})
    wait_for(lambda: bool(measuring(driver)), "its measuring process")
    (probe,) = measuring(driver)
    driver.send_signal(number)
    assert driver.wait(timeout=60) != 0
    wait_for(lambda: not probe.is_running() or probe.status() == psutil.STATUS_ZOMBIE, "the end of its process")
    wait_for(lambda: not list(tmp_path.glob("segadapt-probe-*")), "the end of its folder")


@pytest.mark.parametrize(("before", "ends"), [("SIG_IGN", False), ("SIG_DFL", True)], ids=["nohup", "terminal"])
def test_a_terminal_that_is_closed_ends_what_is_not_to_outlive_it(before: str, ends: bool) -> None:
    script = (
        f"import os, signal; signal.signal(signal.SIGHUP, signal.{before})\n"
        "from segadapt.platform.settings.termination import treat_termination_as_interrupt\n"
        "treat_termination_as_interrupt()\n"
        "try:\n    os.kill(os.getpid(), signal.SIGHUP)\n    print('goes on')\n"
        "except KeyboardInterrupt:\n    print('ends in good order')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ("ends in good order" if ends else "goes on")


def read_until(closed: threading.Event, terminal: int) -> None:
    """Read what is shown on a terminal: nobody can write to one that is full."""
    while not closed.is_set():
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 4096)


@pytest.mark.slow
def test_a_search_whose_terminal_is_closed_ends_in_good_order(warm: Path) -> None:
    terminal, inner = pty.openpty()
    words = [word for word in TINY_WORDS if not word.startswith("trainer.steps")]
    words = [COMMAND, "search", "sdca", "--trials", "1", *words, "trainer.steps=600"]
    begin = "import os, sys; os.setsid(); os.close(os.open(os.ttyname(0), os.O_RDWR)); "
    begin += "os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", begin, *words]  # in a session of its own, whose terminal this is
    driver = psutil.Popen(command, cwd=warm, stdin=inner, stdout=inner, stderr=inner)
    os.close(inner)
    closed = threading.Event()
    reader = threading.Thread(target=read_until, args=(closed, terminal), daemon=True)
    reader.start()
    wait_for(lambda: any((warm / "runs" / "ray").glob("sdca-streets/*/checkpoint_*")), "its trial")
    started = driver.children(recursive=True)
    assert {"raylet", "gcs_server"} <= {process.name() for process in started}
    closed.set()
    reader.join()
    os.close(terminal)
    assert driver.wait(timeout=120) == 130
    _, left = psutil.wait_procs(started, timeout=60)
    assert left == []
    runs = tracked(warm, "sdca-streets")
    assert runs["sdca-001"].data.tags["segadapt.state"] == "interrupted", "not only sent by whoever comes next"
    assert runs["sdca-streets"].info.status == "KILLED"
    assert not list((warm / "runs" / "tracking" / "local").glob("*/records.jsonl")), "all was sent"


def test_pages_that_are_ended_leave_no_server(trained: Path) -> None:
    words = [COMMAND, "ui", "--port", str(free_port())]
    pages = psutil.Popen(words, cwd=trained, stdout=subprocess.PIPE, text=True)
    assert "MLflow shows" in pages.stdout.readline()
    started = pages.children(recursive=True)
    assert started
    pages.send_signal(signal.SIGHUP)
    assert pages.wait(timeout=60) == 0
    _, left = psutil.wait_procs(started, timeout=30)
    assert left == []
