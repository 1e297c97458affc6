"""What the tracker promises, held against a real MLflow server that is killed, hidden behind faults, or never there."""

import errno
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import TINY_WORDS, process_group_is_gone
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    BAD_REQUEST,
    ENDPOINT_NOT_FOUND,
    INVALID_PARAMETER_VALUE,
    PERMISSION_DENIED,
    TEMPORARILY_UNAVAILABLE,
    UNAUTHENTICATED,
)
from PIL import Image
from searching import free_port

import segadapt as api
from segadapt.platform.errors import UsageError
from segadapt.platform.settings.states import MlflowStatus
from segadapt.platform.storage import retries
from segadapt.platform.storage.folders import Place, Storage
from segadapt.platform.tracking import client
from segadapt.platform.tracking.client import mlflow_client
from segadapt.platform.tracking.metric_names import true_names
from segadapt.platform.tracking.outbox import Outbox
from segadapt.platform.tracking.tags import KEY_TAG, METHOD_TAG, STATE_TAG
from segadapt.platform.tracking.tracker import RunInfo, Tracker

LOGGER = "segadapt.platform.tracking.sender"
TOO_LONG = "tag" * 100
"""Name of a tag that MLflow refuses: it takes 250 characters."""


def wait_for(promise: Callable[[], Any], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not promise():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.05)


@dataclass
class Server:
    """A `mlflow server` on PostgreSQL, through which artifacts go, that comes back on the same port and database."""

    folder: Path
    database: str
    port: int = field(default_factory=free_port)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self.database, "--serve-artifacts"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, process_group=0)
        wait_for(self._is_up, f"the server, see {self.folder}/server.log")

    def _is_up(self) -> bool:
        assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        wait_for(lambda: process_group_is_gone(self.process.pid), "the end of the server's children")

    @contextmanager
    def away(self) -> Iterator[None]:
        """Kill it with all its processes, and start it again afterwards."""
        self.kill()
        try:
            yield
        finally:
            self.start()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), postgres_url)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again after moments, but often, where the time until the server is back is not the point."""
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(retries, "LONGEST_PAUSE_S", 0.05)


def run_of(key: str, parent_key: str | None = None, **params: Any) -> RunInfo:
    """What starts the run `key`, in the experiment of its first part."""
    tags = {"segadapt.kind": "trial" if parent_key or "/" in key else "search", METHOD_TAG: "sdca"}
    return RunInfo(key, key.split("/")[0], f"name of {key}", tags, params, parent_key)


class Arrived:
    """The runs of an experiment, as MLflow has them."""

    def __init__(self, uri: str, experiment: str) -> None:
        self.client, self.experiment = mlflow_client(uri), experiment

    def runs(self) -> dict[str, Any]:
        """All runs by key."""
        found = self.client.get_experiment_by_name(self.experiment)
        runs = self.client.search_runs([found.experiment_id]) if found else []
        keys = [run.data.tags.get(KEY_TAG) for run in runs]
        assert len(set(keys)) == len(keys), f"a run exists twice: {sorted(keys)}"
        return dict(zip(keys, runs, strict=True))

    def steps(self, key: str, metric: str = "miou") -> list[int]:
        run = self.runs().get(key)
        return [entry.step for entry in self.client.get_metric_history(run.info.run_id, metric)] if run else []

    def paths(self, key: str, folder: str | None = None) -> list[str]:
        return sorted(entry.path for entry in self.client.list_artifacts(self.runs()[key].info.run_id, folder))

    def artifact(self, key: str, name: str) -> str:
        return Path(self.client.download_artifacts(self.runs()[key].info.run_id, name)).read_text()


def all_is_sent(tracker: Tracker) -> bool:
    return tracker._outbox.waiting == 0


def refused(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Why records were left out, one reason each."""
    errors = [record for record in caplog.records if record.name == LOGGER and record.levelno >= logging.ERROR]
    return [str(record.exc_info[1]) if record.exc_info else record.getMessage() for record in errors]


def test_a_record_takes_one_request_and_pictures_are_looked_for_once_per_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    calls: Counter[str] = Counter()
    telemetry: set[str | None] = set()

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(MlflowClient, name)

        def call(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            telemetry.add(os.environ.get("MLFLOW_DISABLE_TELEMETRY"))
            return real(*arguments, **named)

        return call

    for name in ("log_batch", "list_artifacts", "search_runs"):
        monkeypatch.setattr(MlflowClient, name, counted(name))
    Image.new("RGB", (4, 4)).save(tmp_path / "gallery.png")
    storage = Storage(tmp_path / "runs")
    storage.root.mkdir()
    for _ in range(2):  # a second session sends the same pictures again
        calls.clear()
        tracker = Tracker(Place(storage.root))
        tracker.start(run_of("counted/1", lr=1.0))
        for step in (1, 2, 3):
            tracker.log_gallery("counted/1", tmp_path, step)
        tracker.set_tags("counted/1", {f"tag {number}": "value" for number in range(9)})
        tracker.end("counted/1", "FINISHED", {})
        tracker.close()
        assert calls == {"search_runs": 1, "log_batch": 2, "list_artifacts": 1}
    pictures = [path.name for path in storage.mlflow_artifacts.rglob("gallery*.png")]
    assert len(pictures) == 3, pictures
    assert telemetry == {"true"}, "MLflow is told not to tell its makers which functions are called"


ODD_NAMES = ["Straße (Asphalt)", "Straße [Asphalt]", "side/walk", "..", ".", "a//b", "/x", "x/", "tree, bush & co."]
ODD_NAMES += ["ciel: 100%", 'person\'s "x"', "a;b+c#d", "L" * 300, "L" * 301, "back\\slash", "日本", "<b>|`$*?!@^~={}"]


def test_metrics_and_params_of_any_name_are_stored_with_the_others_and_their_true_names_beside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(tmp_path / "runs")
    storage.root.mkdir()
    values = {f"target_val/iou/{name}": number / 100 for number, name in enumerate(ODD_NAMES)}
    tracker = Tracker(Place(storage.root))
    for _ in range(2):  # a run that goes on has its params already
        tracker.start(run_of("odd/1", **{"lr": 1.0, "method.kept_settings.a (b)": 2.0}))
    tracker.log_metrics("odd/1", {"loss": 3.0, **values}, 1)
    tracker.log_summary("odd/1", {f"evaluation/cityscapes-19/{name}": value for name, value in values.items()}, 1)
    tracker.end("odd/1", "FINISHED", {})
    tracker.close()
    assert not refused(caplog)
    run = Arrived(Place(storage.root).tracking_url, "odd").runs()["odd/1"]
    stored = run.data.metrics
    assert stored.pop("loss") == 3.0
    named = {name: stored[kept] for kept, name in true_names(stored, run.data.tags).items()}
    assert named == values | {f"evaluation/cityscapes-19/{name}": value for name, value in values.items()}
    assert {"target_val/iou/side/walk", "target_val/iou/日本"} <= set(stored), "what MLflow takes is not changed"
    assert set(true_names(run.data.params, run.data.tags).values()) == {"lr", "method.kept_settings.a (b)"}


@pytest.mark.slow
def test_records_of_an_outage_arrive_once_and_in_order(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arrived = Arrived(server.uri, "outage")
    tracker = Tracker(Place(tmp_path, server.uri))
    tracker.start(run_of("outage"))
    tracker.start(run_of("outage/1", parent_key="outage", lr=0.1))
    tracker.log_json("outage/1", {"seed": 0}, "config.yaml")
    tracker.set_tags("outage/1", {"state": "running"})
    for step in range(1, 101):
        tracker.log_metrics("outage/1", {"miou": step / 200}, step)
    wait_for(lambda: arrived.steps("outage/1"), "the first metrics")
    (tmp_path / "gallery.png").write_text("picture")
    with server.away():  # from amid the metrics on
        began = time.monotonic()
        for step in range(101, 111):
            tracker.log_metrics("outage/1", {"miou": step / 200}, step)
        tracker.set_tags("outage/1", {"state": "finished"})
        tracker.log_file("outage/1", tmp_path / "gallery.png", "pictures")
        tracker.log_json("outage/1", {"best": 110}, "best.json")
        tracker.end("outage/1", "FINISHED", {})
        tracker.end("outage", "KILLED", {})
        assert time.monotonic() - began < 1, "logging must not wait for the server"
        wait_for(lambda: "trying again" in caplog.text, "an attempt at the absent server")
    tracker.close(timeout_s=60)
    assert refused(caplog) == []
    assert arrived.steps("outage/1") == list(range(1, 111))
    runs = arrived.runs()
    assert set(runs) == {"outage", "outage/1"}
    assert {key: run.info.status for key, run in runs.items()} == {"outage": "KILLED", "outage/1": "FINISHED"}
    assert runs["outage/1"].data.tags["state"] == "finished"
    assert runs["outage/1"].data.params == {"lr": "0.1"}
    assert runs["outage/1"].data.tags["mlflow.parentRunId"] == runs["outage"].info.run_id
    assert arrived.artifact("outage/1", "pictures/gallery.png") == "picture"
    assert arrived.artifact("outage/1", "config.yaml") == "seed: 0\n"
    assert json.loads(arrived.artifact("outage/1", "best.json")) == {"best": 110}


def waiting(storage: Path) -> list[str]:
    """The records in all queues of a storage folder, delivered or not."""
    return [line for path in storage.rglob("records.jsonl") for line in path.read_text().splitlines()]


SEARCH_THAT_IS_KILLED = """
    import os, signal, sys, time
    from pathlib import Path
    from segadapt.platform.storage.folders import Place
    from segadapt.platform.tracking.tags import METHOD_TAG
    from segadapt.platform.tracking.tracker import RunInfo, Tracker

    storage, uri, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    tracker = Tracker(Place(storage, uri))
    tracker.start(RunInfo(name, name, name, {"segadapt.kind": "search"}, {"objective": "target_val/miou"}))
    tags = {"segadapt.kind": "trial", METHOD_TAG: "sdca", "segadapt.state": "running"}
    tracker.start(RunInfo(f"{name}/1", name, "sdca-001", tags, {"lr": 0.1}, name))
    for step in range(1, 21):
        tracker.log_metrics(f"{name}/1", {"miou": step / 40, "time/evaluation": 0.5}, step)
    print("began", flush=True)
    sys.stdin.readline()
    for step in range(21, 41):
        tracker.log_metrics(f"{name}/1", {"miou": step / 40, "time/evaluation": 0.5}, step)
    checkpoint = storage / "checkpoint"
    tracker.log_evaluation(f"{name}/1", checkpoint)
    tracker.log_file(f"{name}/1", checkpoint, "checkpoint")
    tracker.log_json(f"{name}/1", {"best": 40}, "best.json")
    for path in checkpoint.iterdir():
        path.unlink()  # as Ray removes checkpoints
    print("logged", flush=True)
    sys.stdin.readline()
    """


@pytest.mark.slow
def test_what_a_killed_driver_could_not_send_is_sent_by_the_next_command(server: Server, tmp_path: Path) -> None:
    checkpoint(tmp_path / "checkpoint")
    arrived = Arrived(server.uri, "killed")
    driver = python(SEARCH_THAT_IS_KILLED, str(tmp_path), server.uri, "killed")
    assert driver.stdout is not None
    assert driver.stdin is not None
    assert driver.stdout.readline() == "began\n"
    wait_for(lambda: arrived.steps("killed/1"), "the first metrics")
    with server.away():
        driver.stdin.write("go on\n")
        driver.stdin.flush()
        assert driver.stdout.readline() == "logged\n"
        driver.kill()
        driver.wait()
    command = [str(Path(sys.executable).with_name("segadapt")), "runs", "killed", "--json"]
    command += ["--storage", str(tmp_path), "--tracking-uri", server.uri]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    assert "records that an earlier command had left" in shown.stderr
    assert json.loads(shown.stdout)["rows"][0]["state"] == "interrupted"
    runs = arrived.runs()
    assert {key: run.info.status for key, run in runs.items()} == {"killed": "KILLED", "killed/1": "KILLED"}
    history = arrived.client.get_metric_history(runs["killed/1"].info.run_id, "miou")
    assert [(entry.step, entry.value) for entry in history] == [(step, step / 40) for step in range(1, 41)]
    times = [entry.timestamp for entry in history]
    assert times == sorted(times)
    assert runs["killed/1"].info.end_time == times[-1], "it ended when it was last heard of"
    assert json.loads(arrived.artifact("killed/1", "best.json")) == {"best": 40}
    found = {entry.path for entry in arrived.client.list_artifacts(runs["killed/1"].info.run_id)}
    assert {"gallery.png", "confusion", "per_class_iou.json", "checkpoint"} <= found
    assert json.loads(arrived.artifact("killed/1", "checkpoint/evaluation.json"))["classes"] == ["road", "car"]
    assert waiting(tmp_path) == []
    assert [
        path for path in (tmp_path / "tracking").rglob("*") if path.is_file() and path.name not in (".taking", ".last")
    ] == []


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on to the server, but inflicts a fault on some of them.

    Args:
        server: The server behind.
        fault: What becomes of a request: `lose` its answer, say `503` or `500` instead, or `hang`.
        fails: Whether a request fails; None for the first one of every kind.
    """

    def __init__(self, server: Server, fault: str, fails: Callable[[str], bool] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _FaultyHandler)
        self.server_behind, self.fault, self.fails = server, fault, fails
        self.failed: set[tuple[str, str, bytes]] = set()
        self.failures = 0
        self.ended = threading.Event()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault_of(self, kind: tuple[str, str, bytes]) -> str | None:
        is_hit = kind not in self.failed if self.fails is None else self.fails(kind[1])
        if is_hit:
            self.failed.add(kind)
            self.failures += 1
        return self.fault if is_hit else None

    @contextmanager
    def serving(self) -> Iterator["FaultyProxy"]:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self.ended.set()
            self.shutdown()
            self.server_close()


class _FaultyHandler(BaseHTTPRequestHandler):
    server: FaultyProxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault_of((self.command, self.path, body))
        if fault == "hang":
            self.server.ended.wait()
            return
        if fault in ("500", "503"):
            self.send_error(int(fault))
            return
        behind = HTTPConnection("127.0.0.1", self.server.server_behind.port)
        behind.request(self.command, self.path, body, {**self.headers, "Host": "127.0.0.1"})
        answer = behind.getresponse()
        content = answer.read()
        behind.close()
        if fault == "lose":
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers["Content-Type"])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _pass_on  # noqa: N815, the names that the base class asks for

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", ["lose", "503"])
def test_a_record_whose_first_try_failed_arrives_once(
    server: Server, fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"faulty-{fault}"
    with FaultyProxy(server, fault).serving() as proxy:
        tracker = Tracker(Place(tmp_path, proxy.uri))
        tracker.start(run_of(name))
        tracker.start(run_of(f"{name}/1", parent_key=name, lr=0.1))
        for step in (2, 4, 6):
            tracker.log_metrics(f"{name}/1", {"miou": 0.5, "loss": 1.0}, step)
        tracker.log_json(f"{name}/1", {"seed": 0}, "config.yaml")
        tracker.end(f"{name}/1", "FAILED", {})
        tracker.close(timeout_s=60)

    assert refused(caplog) == []
    assert len(proxy.failed) > 10
    arrived = Arrived(server.uri, name)
    runs = arrived.runs()
    assert set(runs) == {name, f"{name}/1"}
    assert arrived.steps(f"{name}/1") == arrived.steps(f"{name}/1", "loss") == [2, 4, 6]
    assert runs[f"{name}/1"].info.status == "FAILED"
    assert runs[f"{name}/1"].data.params == {"lr": "0.1"}
    assert runs[f"{name}/1"].data.tags["mlflow.parentRunId"] == runs[name].info.run_id
    assert arrived.artifact(f"{name}/1", "config.yaml") == "seed: 0\n"


@pytest.mark.usefixtures("impatient")
def test_what_the_server_refuses_is_left_out_and_the_rest_arrives(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(Place(tmp_path, server.uri))
    tracker.start(run_of("refusal", lr=0.1))
    tracker.log_metrics("refusal", {"miou": 0.1}, 1)
    tracker.set_tags("refusal", {TOO_LONG: "x"})  # the server says 400
    tracker.log_json("refusal", {}, "%252e%252e/outside.json")  # 400 to an upload
    tracker.log_json("refusal", {}, "file")
    tracker.log_json("refusal", {}, "file/below.json")  # 500, however often it is tried
    tracker.log_file("refusal", tmp_path / "gone.png")
    tracker.log_metrics("refusal", {"miou": 0.3}, 3)
    tracker.log_metrics("refusal", {"miou": 0.3}, 3)  # a repeat, nothing to complain about
    tracker.end("refusal", "FINISHED", {})
    tracker.close(timeout_s=60)

    kept = [json.loads(line) for path in tmp_path.rglob("refused.jsonl") for line in path.read_text().splitlines()]
    assert [record["operation"] for record in kept] == ["set_tags", "log_json", "log_json", "log_file"]
    assert waiting(tmp_path) == [], "what is refused for good is not tried again"
    reasons = refused(caplog)
    assert len(reasons) == 4, reasons
    for reason, expected in zip(reasons, ("250", "outside.json", "below.json", "gone.png"), strict=True):
        assert expected in reason
    arrived = Arrived(server.uri, "refusal")
    assert arrived.steps("refusal") == [1, 3]
    assert arrived.runs()["refusal"].info.status == "FINISHED"


@pytest.mark.parametrize("absence", ["refuses", "is silent"])
def test_close_says_what_waits_when_the_server_never_comes(
    absence: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        if absence == "is silent":
            door.listen()
        tracker = Tracker(Place(tmp_path, f"http://127.0.0.1:{door.getsockname()[1]}"))
        tracker.start(run_of("lost"))
        for step in range(10):
            tracker.log_metrics("lost", {"miou": 0.1}, step)
        tracker.end("lost", "FINISHED", {})
        began = time.monotonic()
        tracker.close(timeout_s=3)
        assert time.monotonic() - began < 4
        assert refused(caplog) == []
        assert "did not take 12 records within 3 s. They wait in" in caplog.text
    threads = [thread for thread in threading.enumerate() if thread.name == "segadapt-tracking"]
    wait_for(lambda: not any(thread.is_alive() for thread in threads), "the writer to give up as well", 5)


def python(script: str, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_a_lost_server_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    process = python(
        """
        import socket, sys, time
        from pathlib import Path
        from segadapt.platform.storage.folders import Place
        from segadapt.platform.tracking.tracker import RunInfo, Tracker

        door = socket.create_server(("127.0.0.1", 0))  # takes a request, never answers
        tracker = Tracker(Place(Path(sys.argv[1]), f"http://127.0.0.1:{door.getsockname()[1]}"))
        tracker.start(RunInfo("lost", "lost", "lost", {}, {}))
        door.accept()
        tracker.close(timeout_s=0.5)
        print(time.time())
        """,
        str(tmp_path),
    )
    closed, said = process.communicate(timeout=60)
    assert time.time() - float(closed) < 5
    assert "did not take 2 records" in said, "its start and, as nobody ended it, its end"


def checkpoint(folder: Path) -> Path:
    """What a trial leaves of its best evaluation."""
    folder.mkdir()
    domain = {"confusion": [[3, 1], [0, 4]]}
    metrics = {"target_val/iou/road": 0.75, "target_val/iou/car": 0.8}
    evaluation = {"classes": ["road", "car"], "target_val": domain, "source_val": domain, "metrics": metrics}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    Image.new("RGB", (4, 4)).save(folder / "gallery.png")
    return folder


def test_a_second_session_continues_a_run_by_its_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage, best = Storage(tmp_path), checkpoint(tmp_path / "checkpoint")
    arrived = Arrived(Place(storage.root).tracking_url, "continued")

    def session(steps: range, state: str, status: MlflowStatus, *starts: RunInfo) -> dict[str, Any]:
        tracker = Tracker(Place(storage.root))
        for info in starts:
            tracker.start(info)
        tracker.set_tags("continued/1", {"state": "running"})
        for step in steps:
            tracker.log_metrics("continued/1", {"miou": step / 10, "time/evaluation": 1.0}, step)
        tracker.log_evaluation("continued/1", best)
        tracker.set_tags("continued/1", {"state": state})
        tracker.end("continued/1", status, {})
        tracker.close()
        return arrived.runs()

    first = session(range(1, 4), "interrupted", "KILLED", run_of("continued"), run_of("continued/1", "continued", lr=1))
    assert first["continued/1"].info.status == "KILLED"
    second = session(range(2, 6), "finished", "FINISHED", run_of("continued/1", "continued", lr=2, batch=4))
    assert refused(caplog) == []
    assert {key: run.info.run_id for key, run in second.items()} == {key: run.info.run_id for key, run in first.items()}
    run = second["continued/1"]
    assert (run.info.status, run.data.tags["state"]) == ("FINISHED", "finished")
    assert run.data.tags["mlflow.parentRunId"] == first["continued"].info.run_id
    assert run.data.params == {"lr": "1", "batch": "4"}, "params stay what they were; missing ones are added"
    assert arrived.steps("continued/1") == [1, 2, 3, 4, 5]
    table = json.loads(arrived.artifact("continued/1", "per_class_iou.json"))
    assert table == {"columns": ["class", "target_val_iou"], "data": [["road", 0.75], ["car", 0.8]]}


def test_runs_that_nobody_goes_on_with_are_closed_as_lost(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    killed = Tracker(Place(storage.root))
    for key in ("town/kept", "town/lost", "other/lost"):
        killed.start(run_of(key))
    killed.close()  # closes them as a kill would
    resumed = Tracker(Place(storage.root))
    resumed.end_lost("town", "town/", ["town/kept"])
    resumed.close()
    client = mlflow_client(Place(storage.root).tracking_url)
    state = {
        run.data.tags[KEY_TAG]: (run.info.status, run.data.tags[STATE_TAG])
        for experiment in client.search_experiments()
        for run in client.search_runs([experiment.experiment_id])
    }
    assert state == {
        "town/kept": ("KILLED", "interrupted"),
        "town/lost": ("KILLED", "lost"),
        "other/lost": ("KILLED", "interrupted"),
    }


def test_a_gallery_that_is_recorded_twice_is_stored_once(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "gallery.png")
    tracker = Tracker(Place(tmp_path))
    tracker.start(run_of("galleries"))
    for step in (10, 20, 10):
        tracker.log_gallery("galleries", tmp_path, step)
    tracker.close()
    arrived = Arrived(Place(tmp_path).tracking_url, "galleries")
    (run,) = arrived.runs().values()
    images = [entry.path for entry in arrived.client.list_artifacts(run.info.run_id, "images")]
    assert sorted(path.split("+")[2] for path in images if path.endswith(".png")) == ["10", "20"]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", ["lose", "500"])
def test_a_server_that_fails_three_requests_of_ten_gets_every_record_once(
    server: Server, fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, chance, best = f"flaky-{fault}", random.Random(0), checkpoint(tmp_path / "checkpoint")
    with FaultyProxy(server, fault, lambda path: chance.random() < 0.3).serving() as proxy:
        tracker = Tracker(Place(tmp_path, proxy.uri))
        tracker.start(run_of(name))
        for trial in (f"{name}/1", f"{name}/2"):
            tracker.start(run_of(trial, parent_key=name, lr=0.1))
            for step in range(1, 11):
                tracker.log_metrics(trial, {"miou": step / 20, "time/evaluation": 1.0}, step)
                tracker.log_gallery(trial, best, step) if step % 5 == 0 else None
            tracker.log_evaluation(trial, best)
            tracker.log_summary(trial, {"best/miou": 0.5}, 10)
            tracker.end(trial, "FINISHED", {STATE_TAG: "finished"})
        tracker.log_file(name, best, "checkpoint")
        tracker.end(name, "FINISHED", {STATE_TAG: "finished"})
        tracker.close(timeout_s=120)
        assert proxy.failures > 20

        board = api.runs(name, place=Place(tmp_path, proxy.uri))
        assert [row.state for row in board.rows] == ["finished"] * 2, "commands that read ask again as well"
    assert refused(caplog) == []
    assert list((tmp_path / "tracking").rglob("*.jsonl")) == []
    arrived = Arrived(server.uri, name)
    runs = arrived.runs()
    assert set(runs) == {name, f"{name}/1", f"{name}/2"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for trial in (f"{name}/1", f"{name}/2"):
        assert arrived.steps(trial) == list(range(1, 11))
        assert arrived.steps(trial, "best/miou") == [10]
        pictures = sorted(path.rpartition(".")[2] for path in arrived.paths(trial, "images"))
        assert pictures == ["png", "png", "webp", "webp"]
        assert {"gallery.png", "per_class_iou.json", "confusion"} <= set(arrived.paths(trial))
    assert arrived.paths(name, "checkpoint") == ["checkpoint/evaluation.json", "checkpoint/gallery.png"]


@pytest.mark.usefixtures("impatient")
def test_what_a_server_fails_at_for_no_stated_reason_is_sent_by_the_next_command(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "gallery.png").write_text("picture")
    broken = True
    with FaultyProxy(server, "500", lambda path: broken and path.endswith("gallery.png")).serving() as proxy:
        place = Place(tmp_path, proxy.uri)
        tracker = Tracker(place)
        tracker.start(run_of("uploads"))
        tracker.log_file("uploads", tmp_path / "gallery.png")
        tracker.end("uploads", "FINISHED", {STATE_TAG: "finished"})
        tracker.close(timeout_s=60)
        assert Arrived(server.uri, "uploads").runs()["uploads"].info.status == "FINISHED", "it holds up nothing"
        (reason,) = refused(caplog)
        assert "The next segadapt command that tracks there sends it again" in reason
        broken = False
        api.runs("uploads", place=place)
    assert Arrived(server.uri, "uploads").artifact("uploads", "gallery.png") == "picture"
    assert Arrived(server.uri, "uploads").runs()["uploads"].data.tags[STATE_TAG] == "finished"
    assert list((tmp_path / "tracking").rglob("*.jsonl")) == []


@pytest.mark.usefixtures("impatient")
def test_runs_that_a_server_lost_are_made_again_from_what_is_still_here(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import psycopg

    (tmp_path / "gallery.png").write_text("picture")
    place, arrived = Place(tmp_path, server.uri), Arrived(server.uri, "emptied")
    tracker = Tracker(place)
    tracker.start(run_of("emptied"))
    tracker.start(run_of("emptied/1", parent_key="emptied", lr=0.1))
    tracker.log_metrics("emptied/1", {"miou": 0.1, "time/evaluation": 1.0}, 1)
    tracker.log_file("emptied/1", tmp_path / "gallery.png")
    tracker.log_json("emptied/1", {"seed": 0}, "config.yaml")
    wait_for(partial(all_is_sent, tracker), "the records")
    with psycopg.connect(server.database.replace("+psycopg", ""), autocommit=True) as database:
        database.execute("TRUNCATE experiments CASCADE")  # as after a restart with another database
    tracker.start(run_of("emptied/2", parent_key="emptied", lr=0.2))
    tracker.log_metrics("emptied/1", {"miou": 0.2, "time/evaluation": 1.0}, 2)
    for key in ("emptied/1", "emptied/2", "emptied"):
        tracker.end(key, "FINISHED", {STATE_TAG: "finished"})
    tracker.close(timeout_s=60)

    assert refused(caplog) == []
    assert "made again from the 4 records that are still here; 1 pictures and files" in caplog.text
    runs = arrived.runs()
    assert {key: run.info.status for key, run in runs.items()} == dict.fromkeys(
        ("emptied", "emptied/1", "emptied/2"), "FINISHED"
    )
    assert arrived.steps("emptied/1") == [1, 2]
    assert arrived.artifact("emptied/1", "config.yaml") == "seed: 0\n"
    parent = runs["emptied"].info.run_id
    assert [runs[f"emptied/{trial}"].data.tags["mlflow.parentRunId"] for trial in (1, 2)] == [parent] * 2
    assert list((tmp_path / "tracking").rglob("*.jsonl")) == []


def http_error(status: int) -> Exception:
    answer = requests.Response()
    answer.status_code = status
    return requests.HTTPError(response=answer)


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (MlflowException("a name", INVALID_PARAMETER_VALUE), client.Failure.REFUSED),
        (MlflowException("a database", BAD_REQUEST), client.Failure.DOUBTFUL),  # as any error of SQL is told
        (MlflowException("no such page", ENDPOINT_NOT_FOUND), client.Failure.DOUBTFUL),  # another server's page
        (MlflowException("an error"), client.Failure.DOUBTFUL),  # 500, or a connection that was cut
        (MlflowException("a database", TEMPORARILY_UNAVAILABLE), client.Failure.AWAY),
        (MlflowException("a login", UNAUTHENTICATED), client.Failure.AWAY),
        (MlflowException("no permission", PERMISSION_DENIED), client.Failure.AWAY),
        (http_error(400), client.Failure.REFUSED),
        (http_error(500), client.Failure.DOUBTFUL),
        (http_error(503), client.Failure.AWAY),
        (requests.ConnectionError("cut"), client.Failure.DOUBTFUL),
        (OSError(errno.ENOSPC, "full"), client.Failure.AWAY),
        (FileNotFoundError("what was to be uploaded"), client.Failure.REFUSED),
    ],
)
def test_only_what_names_the_record_refuses_it(error: Exception, failure: client.Failure) -> None:
    assert client.failure_of(error) is failure


READING: dict[str, Callable[[Place], object]] = {
    "runs": lambda place: api.runs("town", place=place),
    "status": lambda place: api.status("town", place=place),
    "report": lambda place: api.report("town", place=place),
    "logs": lambda place: api.trial_log("best", "town", place=place),
    "evaluate": lambda place: api.evaluate("best", "town", place=place),
    "export": lambda place: api.export("best", "town", place=place),
    "finish": lambda place: api.finish("best", "town", place=place),
    "search": lambda place: api.plan("sdca", name="town", place=place),
}


@pytest.mark.parametrize("command", READING)
def test_a_command_that_reads_tells_in_one_sentence_that_the_server_hangs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client._ANSWER_S == 10
    monkeypatch.setattr(client, "_ANSWER_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as door:  # takes requests, never answers
        place = Place(tmp_path, f"http://127.0.0.1:{door.getsockname()[1]}")
        box = Outbox.create(client.waiting_folder(place))
        box.append("end_lost", {"experiment": "town", "prefix": "town/", "known": []})
        box._records.close()  # as when its process ends: sending what waits would hang as well
        with pytest.raises(UsageError, match=r"does not \(no answer within 0.3 s\).*`doctor`.*need no server") as told:
            READING[command](place)
        assert str(door.getsockname()[1]) in str(told.value)


def test_a_server_that_hangs_after_its_first_answer_is_told_as_well(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_REQUEST_S", 0.3)
    with FaultyProxy(server, "hang", lambda path: "get-by-name" in path).serving() as proxy:
        place = Place(tmp_path, proxy.uri)
        with pytest.raises(UsageError, match=r"no answer within 0.3 s"):
            api.runs("town", place=place)


def test_doctor_says_that_the_server_hangs_and_looks_at_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_ANSWER_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as door:
        findings = list(api.doctor(place=Place(tmp_path, f"http://127.0.0.1:{door.getsockname()[1]}"), fix=True))
    (fault,) = (finding.text for finding in findings if finding.level == "fault")
    assert "no answer within 0.3 s" in fault
    assert {"storage", "study", "cluster"} <= {finding.subject for finding in findings}


@pytest.mark.usefixtures("impatient")
def test_a_disk_that_refuses_a_note_of_a_record_delays_records_and_loses_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(Place(tmp_path))
    in_the_way = tracker._outbox.folder / "refused.jsonl"
    in_the_way.mkdir()  # a file cannot be opened for writing here
    tracker.start(run_of("disk"))
    tracker.set_tags("disk", {TOO_LONG: "x"})  # refused, which is to be noted
    tracker.log_metrics("disk", {"miou": 0.3}, 2)
    tracker.end("disk", "FINISHED", {})
    wait_for(lambda: "Is a directory" in caplog.text, "an attempt")
    in_the_way.rmdir()
    tracker.close(timeout_s=60)
    arrived = Arrived(Place(tmp_path).tracking_url, "disk")
    assert arrived.steps("disk") == [2]
    assert arrived.runs()["disk"].info.status == "FINISHED"
    assert len(in_the_way.read_text().splitlines()) == 1


def test_a_run_that_was_made_twice_is_shown_once(tmp_path: Path) -> None:
    place = Place(tmp_path)
    tags = {METHOD_TAG: "sdca", STATE_TAG: "running"}
    tracker = Tracker(place)
    tracker.start(RunInfo("town", "town", "town", {"segadapt.kind": "search", STATE_TAG: "running"}, {}))
    tracker.start(RunInfo("town/1", "town", "sdca-001", {"segadapt.kind": "trial", **tags}, {"lr": 0.1}, "town"))
    tracker.log_summary("town/1", {"best/target_val/miou": 0.5}, 4)
    tracker.end("town/1", "FINISHED", {STATE_TAG: "finished"})
    tracker.end("town", "FINISHED", {STATE_TAG: "finished"})
    tracker.close()
    arrived = Arrived(place.tracking_url, "town")
    for key, run in arrived.runs().items():
        doubled = {name: value for name, value in run.data.tags.items() if name.startswith("segadapt.")}
        made = arrived.client.create_run(run.info.experiment_id, tags={**doubled, KEY_TAG: key, STATE_TAG: "running"})
        assert made.info.run_id != run.info.run_id
    assert [(row.state, row.best) for row in api.runs("town", place=place).rows] == [("finished", 0.5)]
    assert api.status("town", place=place).states == {"finished": 1}
    assert api.status("town", place=place).state == "finished"

    later = Tracker(place)  # goes on with the run that commands show
    later.log_summary("town/1", {"evaluation/miou": 0.6}, 4)
    later.close()
    (row,) = api.runs("town", place=place).rows
    assert arrived.client.get_run(row.run_id).data.metrics["evaluation/miou"] == 0.6


def test_a_summary_that_a_resumed_search_repeats_is_there_once(tmp_path: Path) -> None:
    for regret in (0.1, 0.1, 0.2):
        tracker = Tracker(Place(tmp_path))
        tracker.start(run_of("summary"))
        tracker.log_summary("summary", {"regret/entropy": regret, "best/miou": 0.5}, 8)
        tracker.close()
    arrived = Arrived(Place(tmp_path).tracking_url, "summary")
    assert arrived.steps("summary", "best/miou") == [8]
    assert arrived.runs()["summary"].data.metrics["regret/entropy"] == 0.2
    assert arrived.steps("summary", "regret/entropy") == [8, 8]


def test_what_was_refused_is_sent_again_by_doctor_and_later_words_count(tmp_path: Path) -> None:
    place = Place(tmp_path)
    arrived = Arrived(place.tracking_url, "refused")
    tracker = Tracker(place)
    tracker.start(run_of("refused"))
    wait_for(partial(all_is_sent, tracker), "the run")
    (run,) = arrived.runs().values()
    arrived.client.delete_run(run.info.run_id)  # so MLflow takes nothing more of it
    tracker.set_tags("refused", {"note": "early"})
    tracker.set_tags("refused", {"only": "early"})
    tracker.log_metrics("refused", {"miou": 0.1, "time/evaluation": 1.0}, 1)
    tracker.set_tags("refused", {TOO_LONG: "x"})  # nor will it ever take this
    tracker.log_json("refused", {"seed": 0}, "config.yaml")
    tracker.end("refused", "FINISHED", {STATE_TAG: "finished"})
    tracker.close()
    (named,) = (found for found in api.doctor(place=place) if "did not take" in found.text)
    assert "MLflow did not take 5 records, 5 of them for what they hold" in named.text
    assert named.repair is not None

    arrived.client.restore_run(run.info.run_id)
    arrived.client.set_tag(run.info.run_id, "note", "late")
    (tried,) = (found for found in api.doctor(place=place, fix=True) if "did not take" in found.text)
    assert "MLflow still does not take 1 of them" in tried.advice
    (run,) = arrived.runs().values()
    assert {name: run.data.tags.get(name) for name in ("note", "only", STATE_TAG)} == {
        "note": "late",
        "only": "early",
        STATE_TAG: "finished",
    }
    assert run.info.status == "FINISHED"
    assert arrived.steps("refused") == [1]
    (left,) = tmp_path.rglob("refused.jsonl")
    assert [TOO_LONG in line for line in left.read_text().splitlines()] == [True]


def test_an_experiment_that_is_deleted_in_mlflow_is_restored_by_what_goes_on_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(tmp_path)
    arrived = Arrived(place.tracking_url, "deleted")
    tracker = Tracker(place)
    tracker.start(run_of("deleted"))
    for step in (1, 2):  # once while its driver runs, once before it is resumed
        wait_for(partial(all_is_sent, tracker), "the records")
        arrived.client.delete_experiment(arrived.client.get_experiment_by_name("deleted").experiment_id)
        with pytest.raises(UsageError, match=r"was deleted there.*`segadapt doctor --fix` restores it"):
            api.runs("deleted", place=place)
        if step == 2:
            tracker.close()
            tracker = Tracker(place)
            tracker.start(run_of("deleted"))
        tracker.log_metrics("deleted", {"miou": 0.1, "time/evaluation": 1.0}, step)
    tracker.end("deleted", "FINISHED", {})
    tracker.close()
    assert refused(caplog) == []
    assert arrived.steps("deleted") == [1, 2]
    assert "The experiment deleted was deleted in MLflow; it is restored" in caplog.text


KILLED_IN_A_MIGRATION = """
import os, signal
import sqlalchemy
@sqlalchemy.event.listens_for(sqlalchemy.Engine, "after_cursor_execute")
def kill(connection, cursor, statement, *_):
    if statement.strip().startswith("ALTER TABLE"):
        os.kill(os.getpid(), signal.SIGKILL)
"""
TRACKS = """
import sys
from pathlib import Path
from segadapt.platform.storage.folders import Place
from segadapt.platform.tracking.tracker import RunInfo, Tracker
tracker = Tracker(Place(Path(sys.argv[1])))
tracker.start(RunInfo(sys.argv[2], "kills", sys.argv[2], {}, {}))
tracker.end(sys.argv[2], "FINISHED", {})
tracker.close()
"""


@pytest.mark.slow
def test_a_kill_while_mlflows_database_is_made_breaks_nothing(tmp_path: Path) -> None:
    killed = python(KILLED_IN_A_MIGRATION + TRACKS, str(tmp_path), "killed")
    assert killed.wait(timeout=120) == -signal.SIGKILL
    others = [python(TRACKS, str(tmp_path), name) for name in ("second", "third")]
    assert [other.wait(timeout=120) for other in others] == [0, 0]

    client = mlflow_client(Place(tmp_path).tracking_url)
    (experiment,) = client.search_experiments(filter_string="name = 'kills'")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.tags[KEY_TAG] for run in runs} == {"killed", "second", "third"}
    assert not list(tmp_path.glob(".mlflow.db*"))


@pytest.mark.slow
def test_a_search_goes_on_while_its_server_is_away(server: Server, warm: Path) -> None:
    command = [str(Path(sys.executable).with_name("segadapt")), "search", "sdca", "--name", "away", "--trials", "2"]
    command += ["--scheduler", "none", "--tracking-uri", server.uri, *TINY_WORDS]
    said = warm / "said.txt"
    with said.open("w") as output:
        search = subprocess.Popen(command, cwd=warm, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: "search away" in said.read_text(), "the trials", timeout_s=180)
        with server.away():
            wait_for(lambda: "trying again" in said.read_text(), "an attempt at the absent server", timeout_s=180)
            wait_for(lambda: "sdca-001 step 4/" in said.read_text(), "a result meanwhile", timeout_s=180)
        assert search.wait(timeout=300) == 0, said.read_text()
    finally:
        search.kill()
        search.wait()
    arrived = Arrived(server.uri, "away")
    runs = arrived.runs()
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    trials = [key for key, run in runs.items() if run.data.tags["segadapt.kind"] == "trial"]
    assert [arrived.steps(key, "target_val/miou") for key in trials] == [[2, 4, 6, 8]] * 2
    assert waiting(warm) == []
