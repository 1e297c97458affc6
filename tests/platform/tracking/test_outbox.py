"""The queue on disk: what is in it arrives once and in order, wherever its process is killed."""

import os
import resource
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import forked
from hypothesis import example, given, settings
from hypothesis import strategies as st

from segadapt.platform.storage.folders import Place
from segadapt.platform.tracking.client import mlflow_client
from segadapt.platform.tracking.outbox import Outbox, left_over, taking
from segadapt.platform.tracking.tags import KEY_TAG, STATE_TAG
from segadapt.platform.tracking.tracker import RunInfo, Tracker


def records(root: Path) -> list[Callable[[Tracker], None]]:
    """What a search of one trial logs."""
    trial = RunInfo("town/1", "town", "sdca-001", {STATE_TAG: "running"}, {"lr": 0.1}, "town")
    evaluations = [
        lambda tracker, step=step: tracker.log_metrics("town/1", {"miou": step / 10, "time/evaluation": 1}, step)
        for step in range(1, 7)
    ]
    return [
        lambda tracker: tracker.start(RunInfo("town", "town", "town", {STATE_TAG: "running"}, {"trials": 1})),
        lambda tracker: tracker.start(trial),
        lambda tracker: tracker.log_json("town/1", {"seed": 0}, "config.yaml"),
        *evaluations,
        lambda tracker: tracker.log_file("town/1", root / "gallery.png"),
        lambda tracker: tracker.log_summary("town/1", {"best/miou": 0.6}, 6),
        lambda tracker: tracker.end("town/1", "FINISHED", {STATE_TAG: "finished"}),
        lambda tracker: tracker.end("town", "FINISHED", {STATE_TAG: "finished"}),
    ]


def session(root: Path, killed_at: int | None, in_step: bool) -> None:
    """Log what is not logged yet; the process kills itself before its `killed_at`-th statement to the database."""
    import sqlalchemy

    statements = 0

    def count(*_: Any) -> None:
        nonlocal statements
        statements += 1
        if statements == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    for moment in ("before_cursor_execute", "commit"):
        sqlalchemy.event.listen(sqlalchemy.Engine, moment, count)
    tracker = Tracker(Place(root))
    for record in records(root)[(root / "logged").stat().st_size :]:
        record(tracker)
        with (root / "logged").open("a") as logged:
            logged.write(".")
        while in_step and tracker._outbox.waiting:
            threading.Event().wait(0.001)
    tracker.close()


def run_session(root: Path, killed_at: int | None, in_step: bool) -> None:
    process = forked(session, root, killed_at, in_step)
    process.join(60)
    assert process.exitcode in ((0,) if killed_at is None else (0, -signal.SIGKILL))


def arrived(root: Path) -> dict[str, Any]:
    """All that MLflow has, without ids and times."""
    client = mlflow_client(f"sqlite:///{root}/mlflow.db")
    found = client.get_experiment_by_name("town")
    runs = client.search_runs([found.experiment_id])
    keys = {run.info.run_id: run.data.tags[KEY_TAG] for run in runs}
    assert len(set(keys.values())) == len(keys), "a run exists twice"
    content = {}
    for run in runs:
        tags = {name: keys.get(value, value) for name, value in run.data.tags.items()}
        histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
        for history in histories.values():
            times = [entry.timestamp for entry in sorted(history, key=lambda entry: entry.step)]
            assert times == sorted(times)
        points = {name: [(entry.step, entry.value) for entry in history] for name, history in histories.items()}
        artifacts = sorted(entry.path for entry in client.list_artifacts(run.info.run_id))
        content[keys[run.info.run_id]] = (run.info.status, tags, run.data.params, points, artifacts)
    return content


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage folder with an empty database."""
    root = tmp_path_factory.mktemp("fresh")
    Tracker(Place(root)).close()
    (root / "gallery.png").write_text("picture")
    (root / "logged").touch()
    return root


@pytest.fixture(scope="module")
def undisturbed(fresh: Path) -> dict[str, Any]:
    root = shutil.copytree(fresh, fresh / "undisturbed")
    run_session(root, None, in_step=False)
    return arrived(root)


@settings(max_examples=4, deadline=None, database=None)
@example(kills=[60, 1, 90], in_step=False)
@example(kills=[232], in_step=True)  # while the end of a run is sent
@given(kills=st.lists(st.integers(1, 250), min_size=1, max_size=3), in_step=st.booleans())
def test_sessions_killed_anywhere_leave_what_an_undisturbed_one_does(
    fresh: Path, undisturbed: dict[str, Any], kills: list[int], in_step: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "runs"
        shutil.copytree(fresh, root, ignore=shutil.ignore_patterns("undisturbed"))
        for killed_at in kills:
            run_session(root, killed_at, in_step)
        run_session(root, None, in_step)
        assert arrived(root) == undisturbed
        assert left_over(root / "tracking" / "local") == []


def search(root: Path, key: str) -> None:
    tracker = Tracker(Place(root))
    tracker.start(RunInfo(key, "town", key, {}, {"lr": 0.1}))
    for step in range(1, 21):
        tracker.log_metrics(key, {"miou": step / 100, "loss": 1 / step}, step)
    tracker.set_tags(key, {STATE_TAG: "finished"})
    tracker.log_file(key, root / "gallery.png")
    tracker.end(key, "FINISHED", {})
    tracker.close()


@pytest.mark.slow
def test_four_searches_that_begin_a_storage_folder_at_once_lose_nothing(tmp_path: Path) -> None:
    (tmp_path / "gallery.png").write_text("picture")
    keys = [f"search-{number}" for number in range(4)]
    searches = [forked(search, tmp_path, key) for key in keys]
    for process in searches:
        process.join(120)
    found = arrived(tmp_path)
    assert sorted(found) == keys
    for status, tags, params, points, artifacts in found.values():
        assert (status, tags[STATE_TAG], params, artifacts) == ("FINISHED", "finished", {"lr": "0.1"}, ["gallery.png"])
        assert points["miou"] == [(step, step / 100) for step in range(1, 21)]
        assert points["loss"] == [(step, 1 / step) for step in range(1, 21)]
    assert left_over(tmp_path / "tracking" / "local") == []


def test_a_box_is_taken_by_one_and_only_after_its_process(tmp_path: Path) -> None:
    box = Outbox.create(tmp_path)
    box.append("set_tags", {"key": "a"})
    assert Outbox.take(box.folder) is None, "its process lives"
    box.close()
    taken = Outbox.take(box.folder)
    assert taken is not None
    assert Outbox.take(box.folder) is None, "somebody took it"
    given_up = threading.Event()
    with taking(tmp_path, given_up) as alone:
        assert alone
        given_up.set()
        with taking(tmp_path, given_up) as other:
            assert not other
    taken.finish_input()
    for entry in taken:
        taken.delivered(entry)
    taken.close()
    assert not box.folder.exists()


def make_boxes(folder: Path, number: int) -> None:
    for _ in range(number):
        Outbox.create(folder)
    os._exit(0)  # as a kill leaves them


def test_boxes_are_sent_in_the_order_in_which_they_were_made_whatever_the_clock_says(tmp_path: Path) -> None:
    first = Outbox.create(tmp_path)
    first.append("set_tags", {})
    os.utime(first.folder / "records.jsonl", (2e10, 2e10))  # as by a node whose clock is ahead
    for _ in range(2):
        Outbox.create(tmp_path).close()  # and removed: its number is not given again
    last = Outbox.create(tmp_path)
    earlier_version = tmp_path / "29991231-000000.000000-1"
    first.folder.with_name(earlier_version.name).mkdir()
    (earlier_version / "records.jsonl").touch()
    assert left_over(tmp_path) == [earlier_version, first.folder, last.folder]
    assert last.folder.name == "box-000000004"
    (tmp_path / ".last").write_bytes(b"")  # as a kill may leave it
    assert Outbox.create(tmp_path).folder.name == "box-000000005"


def test_processes_that_make_boxes_at_once_each_have_their_own(tmp_path: Path) -> None:
    processes = [forked(make_boxes, tmp_path, 5) for _ in range(4)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert [path.name for path in left_over(tmp_path)] == [f"box-{number:09d}" for number in range(1, 21)]


def test_a_line_that_a_kill_cut_off_is_no_record(tmp_path: Path) -> None:
    box = Outbox.create(tmp_path)
    box.append("set_tags", {"key": "a"})
    box.close()
    with (box.folder / "records.jsonl").open("a") as records:
        records.write('{"number": 2, "oper')
    taken = Outbox.take(box.folder)
    assert taken is not None
    taken.append("end", {"key": "a"})
    taken.finish_input()
    assert [(entry.number, entry.operation) for entry in taken] == [(1, "set_tags"), (2, "end")]


def append_on_a_full_disk(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    box = Outbox.create(folder)
    box.append("log_json", {"content": "a"})
    size = (box.folder / "records.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, size + 100))
    box.append("log_json", {"content": "b" * 1000})
    box.append("end", {})
    box.finish_input()
    assert [entry.number for entry in box] == [1, 2, 3], "memory holds all"
    assert [entry.number for entry in box.entries()] == [1, 3], "the disk holds whole records only"


def test_a_record_that_the_disk_cannot_hold_is_sent_all_the_same(tmp_path: Path) -> None:
    process = forked(append_on_a_full_disk, tmp_path)
    process.join(60)
    assert process.exitcode == 0
