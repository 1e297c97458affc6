"""The log of a trial, without a trial."""

import json
import logging
import os
import threading
import time
import warnings
from pathlib import Path

import pytest

from segadapt.platform.trial.log import as_text, entries, follow_entries, log_folder, logged, note_by_driver
from segadapt.platform.trial.machine_use import MachineUse
from segadapt.trainables.core.journal import note
from segadapt.trainables.core.training.interruption import PreemptedError


def test_a_log_holds_what_a_process_notes_and_warns_of_but_no_login(tmp_path: Path) -> None:
    folder = log_folder(tmp_path)
    with logged(tmp_path, "rank-1", "abc", 1):
        note("evaluation", "well", stage="adapt", step=4, miou=0.5, at="http://me:hunter2@host/x")
        warnings.warn("odd", UserWarning, stacklevel=1)
        logging.getLogger("theirs").warning("postgresql://me:hunter2@db is slow")
        logging.getLogger("theirs").error("nested %s", {"a": ["s3://me:hunter2@bucket"]})
        logging.getLogger("theirs").info("left out")
        logging.getLogger("segadapt.platform").info("kept")
    note("evaluation", "after the trial")
    found = entries(folder)
    assert [(entry["event"], entry["level"], entry["rank"]) for entry in found] == [
        ("evaluation", "INFO", 1),
        ("warning", "WARNING", 1),
        ("log", "WARNING", 1),
        ("log", "ERROR", 1),
        ("log", "INFO", 1),
    ]
    assert {key: found[0][key] for key in ("trial", "stage", "step", "message")} == {
        "trial": "abc",
        "stage": "adapt",
        "step": 4,
        "message": "well",
    }
    assert found[0]["fields"] == {"miou": 0.5, "at": "http://host/x"}
    assert found[0]["time"].endswith("+00:00")
    assert "UserWarning: odd" in found[1]["message"]
    assert "hunter2" not in (folder / "rank-1.jsonl").read_text()
    assert logging.getLogger("segadapt").level == logging.NOTSET


def test_an_error_ends_the_log_with_its_traceback_and_leaving_does_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), logged(tmp_path, "rank-0", "abc", 0):
        raise ValueError("wrong: http://me:hunter2@host")
    with pytest.raises(PreemptedError), logged(tmp_path, "rank-0", "abc", 0):
        raise PreemptedError("asked to end")
    error, left = entries(log_folder(tmp_path))
    assert (error["event"], error["level"], left["event"], left["level"]) == ("error", "ERROR", "left", "WARNING")
    assert error["fields"]["traceback"].splitlines()[-1] == "ValueError: wrong: http://host"
    assert "Traceback" in as_text(error)
    assert "traceback" not in left["fields"]


def test_lines_that_were_cut_short_or_refused_cost_no_other(tmp_path: Path) -> None:
    folder = log_folder(tmp_path)
    with logged(tmp_path, "rank-0", "abc", 0):
        note("first", "1")
        with (folder / "rank-0.jsonl").open("a") as file:
            file.write('{"time": "2026-01')  # the disk was full
        note("second", "2")
        away = folder.rename(tmp_path / "away")
        folder.write_text("")  # storage refuses
        note("third", "3")
        folder.unlink()
        away.rename(folder)
        note("fourth", "4")
    assert [entry["event"] for entry in entries(folder)] == ["first", "second", "third", "fourth"]


def test_following_ends_with_the_trial_and_not_where_it_was_interrupted(tmp_path: Path) -> None:
    note_by_driver(tmp_path, "abc", "started", "a")
    note_by_driver(tmp_path, "abc", "ended", "interrupted")
    note_by_driver(tmp_path, "abc", "started", "again")

    def go_on() -> None:
        time.sleep(0.3)
        with logged(tmp_path, "rank-0", "abc", 0):
            note("evaluation", "late")
        note_by_driver(tmp_path, "abc", "ended", "finished")

    thread = threading.Thread(target=go_on)
    thread.start()
    read = [entry["message"] for entry in follow_entries(log_folder(tmp_path))]
    thread.join()
    assert read == ["a", "interrupted", "again", "late", "finished"]


def test_what_a_process_uses_is_measured_between_two_calls() -> None:
    with MachineUse() as use:
        use.take()
        end = time.process_time() + 0.2
        while time.process_time() < end:
            json.dumps(list(range(1000)))
        busy = use.take()
        time.sleep(0.2)
        idle = use.take()
    assert busy["system/process_cpu_percentage"] > 4 * idle["system/process_cpu_percentage"]
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    assert idle["system/process_memory_megabytes"] == pytest.approx(resident, rel=0.1)


def test_a_gpu_is_asked_by_its_own_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from segadapt.platform.trial import machine_use

    monkeypatch.setattr(machine_use, "_EVERY_S", 0.01)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 80 + device)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 2_000_000)
    with MachineUse() as use:
        time.sleep(0.3)
        found = use.take()
    assert found["system/gpu_utilization_percentage"] == 83
    assert found["system/gpu_memory_peak_megabytes"] == 2
