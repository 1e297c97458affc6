"""MLflow, written from the driver through a queue on disk: a slow or absent server delays records, never a trial.

Runs are addressed by a key of ours (`experiment/trial id`), kept as a tag; a run that exists is continued. Only
explicit run ids are used, never MLflow's process-wide active run.

What a process could not send, because the server was away or it was killed, is sent by the next one that tracks to the
same server from the same storage folder, before its own records. A kill between sending a record and noting that
repeats the record, so each kind may be repeated: see `_Runs`.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from segadapt.platform import outbox
from segadapt.platform.checkpoints import iou_table, label_table
from segadapt.platform.outbox import Entry, Outbox
from segadapt.platform.redaction import redacted
from segadapt.platform.storage import Storage

logger = logging.getLogger(__name__)

KEY_TAG = "segadapt.key"
KIND_TAG = "segadapt.kind"
STATE_TAG = "segadapt.state"
FAILURE_TAG = "segadapt.failure"
CHECKPOINT_TAG = "segadapt.checkpoint"
NOT_KEPT = "not kept"
"""What `CHECKPOINT_TAG` holds once the checkpoint was removed."""
METHOD_TAG = "segadapt.method"

_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Has MLflow open an experiment with its table of runs; it would show traces of language models otherwise."""

_TABLE = "per_class_iou.json"
_LABEL_TABLE = "pseudo_labels.json"
_GALLERY = "gallery.png"
_EVALUATION = ("evaluation.json", _GALLERY)
"""What of a checkpoint folder is tracked."""
_GALLERY_STEP = re.compile(r"gallery\+step\+(\d+)\+")
"""What MLflow calls the pictures of a step."""

Status = Literal["FINISHED", "FAILED", "KILLED"]

_PAUSES_S = (0.5, 1, 2, 5, 10)
"""Between the attempts at a record; the last one repeats."""

_REFUSALS = len(_PAUSES_S) + 1
"""So many failures in a row, while the server answers other requests, are the record's own fault."""


def tracking_uri(storage: Storage, uri: str | None) -> str:
    """Return the tracking server's address: `uri`, or the SQLite database in the storage folder."""
    return uri or f"sqlite:///{storage.mlflow_database}"


def waiting_folder(storage: Storage, uri: str | None) -> Path:
    """Return the folder of records that wait for a server, named after it without the password it may hold."""
    if uri is None:
        return storage.tracking / "local"
    parts = urlsplit(uri.rstrip("/"))
    place = parts.netloc.rpartition("@")[2] + parts.path
    digest = hashlib.sha256(f"{parts.scheme}://{place}".encode()).hexdigest()[:8]
    return storage.tracking / f"{re.sub('[^A-Za-z0-9.]+', '-', place).strip('-')[-60:]}-{digest}"


def client(uri: str) -> Any:
    """Return an `MlflowClient` that gives up on an absent server at once.

    It never repeats a request by itself: a repeated "create" whose first answer was lost would make a second run.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output is ours
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # else it tells its makers which functions are called
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


@dataclass(frozen=True)
class RunInfo:
    """What identifies a run and is known at its start."""

    key: str
    experiment: str
    name: str
    tags: Mapping[str, str]
    params: Mapping[str, Any]
    parent_key: str | None = None


class Tracker:
    """Write runs from a queue in one thread, in order. The queue is on disk: what is logged outlives the process.

    Args:
        storage: Where the queue and local artifacts go.
        uri: The tracking server's address; None takes the storage's SQLite database.
    """

    def __init__(self, storage: Storage, uri: str | None) -> None:
        self._uri = tracking_uri(storage, uri)
        self._outbox = Outbox.create(waiting_folder(storage, uri))
        self._open: dict[str, None] = {}
        self._sender = _Sender(storage, uri)
        self._thread = threading.Thread(
            target=self._sender.send_all, args=(self._outbox,), name="segadapt-tracking", daemon=True
        )
        self._thread.start()

    def start(self, info: RunInfo) -> None:
        """Create the run, or continue the one that has its key; its tags are set anew, its params are kept."""
        self._open[info.key] = None
        params = {name: str(value) for name, value in info.params.items()}
        tags = {"mlflow.user": os.environ.get("USER", "segadapt"), **info.tags}
        self._record("start", **{**asdict(info), "tags": tags, "params": params}, timestamp=_now())

    def log_metrics(self, key: str, metrics: Mapping[str, Any], step: int) -> None:
        """Log finite numbers at a training step; a step that the run has is a repeat and left out."""
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }
        self._record("log_metrics", key=key, numbers=numbers, step=step, timestamp=_now())

    def log_summary(self, key: str, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers that sum a run up; may repeat."""
        numbers = {name: float(value) for name, value in metrics.items()}
        self._record("log_summary", key=key, numbers=numbers, step=step, timestamp=_now())

    def set_tags(self, key: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        self._record("set_tags", key=key, tags=dict(tags))

    def log_datasets(self, key: str, datasets: Sequence[Mapping[str, str]]) -> None:
        """Log on which data a run works.

        Args:
            key: Of the run.
            datasets: Each with `name`, `digest`, `source_type`, `source`, and as `context` training or evaluation.
        """
        self._record("log_datasets", key=key, datasets=[dict(found) for found in datasets])

    def log_gallery(self, key: str, checkpoint: Path, step: int) -> None:
        """Store the gallery in a checkpoint folder as the one of a training step."""

        def keep(files: Path) -> None:
            _link(checkpoint / _GALLERY, files / _GALLERY)

        self._record("log_gallery", keep, key=key, step=step, timestamp=_now())

    def log_json(self, key: str, content: Any, name: str) -> None:
        """Store `content` as a JSON or YAML artifact, by the ending of `name`."""
        self._record("log_json", key=key, content=content, name=name)

    def log_file(self, key: str, path: Path, folder: str | None = None) -> None:
        """Copy a file or folder into the run's artifacts.

        Until it is sent, a file is kept as a copy. A folder's files must not be written again, but may be removed.
        """

        def keep(files: Path) -> None:
            if path.is_dir():
                shutil.copytree(path, files / path.name, copy_function=_link)
            elif path.exists():  # else sending it tells
                shutil.copy(path, files)

        self._record("log_file", keep, key=key, path=str(path), folder=folder)

    def log_evaluation(self, key: str, checkpoint: Path) -> None:
        """Store the gallery, the confusion matrix and the per-class table that lie in a checkpoint folder."""

        def keep(files: Path) -> None:
            for name in _EVALUATION:
                _link(checkpoint / name, files / name)

        self._record("log_evaluation", keep, key=key)

    def log_figure(self, key: str, make: Callable[[], Any], name: str) -> None:
        """Store the figure that `make` returns (plotly for .html, matplotlib for .png); it is drawn at once."""
        folder, _, file = name.rpartition("/")

        def keep(files: Path) -> None:
            figure = make()
            if file.endswith(".html"):
                figure.write_html(files / file, auto_open=False)  # with its script: clusters may have no internet
            else:
                figure.savefig(files / file)

        self._record("log_file", keep, key=key, path=file, folder=folder or None)

    def end(self, key: str, status: Status) -> None:
        """Close a run."""
        self._open.pop(key, None)
        self._record("end", key=key, status=status, timestamp=_now())

    def end_lost(self, experiment: str, prefix: str, known: Collection[str]) -> None:
        """Mark unfinished runs whose key has `prefix` and is not `known` as lost: nobody will go on with them."""
        self._record("end_lost", experiment=experiment, prefix=prefix, known=list(known))

    def close(self, timeout_s: float = 120.0) -> None:
        """Close the runs that are still open and send what is queued; after `timeout_s` seconds the rest is left.

        What is left is sent by the next process that tracks there.
        """
        for key in list(self._open):
            self.set_tags(key, {STATE_TAG: "interrupted"})
            self.end(key, "KILLED")
        self._outbox.finish_input()
        self._thread.join(timeout_s)
        self._sender.given_up.set()
        if waiting := self._outbox.waiting:
            logger.warning(
                "The tracking server %s did not take %d records within %g s. They wait in %s; the next segadapt "
                "command that tracks there sends them.",
                redacted(self._uri),
                waiting,
                timeout_s,
                self._outbox.folder,
            )

    def _record(self, operation: str, keep: Callable[[Path], None] | None = None, **arguments: Any) -> None:
        try:
            self._outbox.append(operation, arguments, keep)
        except Exception:  # tracking never ends a search
            logger.exception("A record for tracking (%s) could not be made; it is left out.", operation)


def send_waiting(storage: Storage, uri: str | None, timeout_s: float = 60.0) -> None:
    """Send what ended processes have left for a server, for `timeout_s` seconds at most."""
    folder = waiting_folder(storage, uri)
    if not outbox.left_over(folder) or not os.access(folder, os.W_OK):
        return
    sender = _Sender(storage, uri)
    try:
        sender.connect()
    except Exception as error:
        logger.warning(
            "Records of earlier commands wait in %s: %s does not answer (%s).", folder, sender.shown, redacted(error)
        )
        return
    thread = threading.Thread(target=sender.send_left_over, name="segadapt-tracking", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        sender.given_up.set()
        logger.warning("%s did not take all within %g s; the rest waits in %s.", sender.shown, timeout_s, folder)


class _Sender:
    """Empties boxes into a server, as often as it takes."""

    def __init__(self, storage: Storage, uri: str | None) -> None:
        self._storage = storage
        self._local = uri is None
        self._uri = tracking_uri(storage, uri)
        self.shown = redacted(self._uri)
        self._folder = waiting_folder(storage, uri)
        self._runs: _Runs | None = None
        self.given_up = threading.Event()
        """Set when nobody waits any more: what is not sent stays."""

    def connect(self) -> None:
        """Connect.

        Raises:
            Exception: Whatever MLflow's client raises if the server does not answer.
        """
        with (self._storage.root / ".mlflow.lock").open("w") as lock:
            if self._local:
                fcntl.flock(lock, fcntl.LOCK_EX)
                _make_database(self._storage.mlflow_database)
            runs = _Runs(client(self._uri), self._storage.mlflow_artifacts if self._local else None)
            runs.check()
            self._runs = runs

    def send_all(self, own: Outbox) -> None:
        """Send what others left, then the records of this process, which may still come in."""
        self._reach()  # while the first records come in
        self.send_left_over()
        self._send(own)
        own.close()

    def send_left_over(self) -> None:
        """Send what ended processes left, and close the runs that they left open."""
        with outbox.taking(self._folder, self.given_up) as alone:
            for folder in outbox.left_over(self._folder) if alone else []:
                box = Outbox.take(folder)
                if box is not None:
                    self._send_left(box)
                    box.close()
                if self.given_up.is_set():
                    return

    def _send_left(self, box: Outbox) -> None:
        unfinished = _left_open(box.entries())
        for key, timestamp in unfinished.items():
            box.append("set_tags", {"key": key, "tags": {STATE_TAG: "interrupted"}})
            box.append("end", {"key": key, "status": "KILLED", "timestamp": timestamp})
        box.finish_input()
        waiting = box.waiting
        self._send(box)
        if waiting and not box.waiting:
            logger.warning("Sent %d records that an earlier command had left for %s.", waiting, self.shown)

    def _send(self, box: Outbox) -> None:
        for entry in box:
            if self.given_up.is_set() or not (self._reach() and self._deliver(box, entry)):
                box.sync()
                return

    def _deliver(self, box: Outbox, entry: Entry) -> bool:
        """Try until the server has the record: later ones build on it. What it refuses for good is set aside."""
        assert self._runs is not None
        refusals = 0
        for pause in _pauses():
            try:
                self._runs.perform(entry)
            except Exception as error:
                refusals = refusals + 1 if _may_be_refusal(error) and self._runs.answers() else 0
                if not _is_transient(error) or refusals == _REFUSALS:
                    self._set_aside(box, entry, error)
                    return True
                logger.warning("Tracking at %s failed (%s), trying again in %g s.", self.shown, redacted(error), pause)
            else:
                box.delivered(entry)
                return True
            box.sync()
            if self.given_up.wait(pause):
                return False
        return False

    def _set_aside(self, box: Outbox, entry: Entry, error: Exception) -> None:
        where = box.refuse(entry, redacted(f"{type(error).__name__}: {error}"))
        key = entry.arguments.get("key", "")
        logger.error("Tracking refused a record (%s %s): %s It is kept in %s.", entry.operation, key, error, where)

    def _reach(self) -> bool:
        """Connect, if that is not done; returns False if `given_up` came first."""
        pauses = _pauses()
        while self._runs is None:
            try:
                self.connect()
            except Exception as error:
                pause = next(pauses)
                logger.warning("Tracking at %s failed (%s), trying again in %g s.", self.shown, redacted(error), pause)
                if self.given_up.wait(pause):
                    return False
        return True


def _make_database(path: Path) -> None:
    """Make MLflow's database if there is none, whole or not at all: migrations that a kill cut short never go on."""
    if path.is_file():
        return
    folder = path.with_name(f".{path.name}.new")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed here
    folder.mkdir()
    _Runs(client(f"sqlite:///{folder / path.name}"), None).check()
    (folder / path.name).rename(path)
    folder.rmdir()


def _left_open(entries: Collection[Entry]) -> dict[str, int]:
    """Return the keys of runs that were started and not ended, each with the time of the last record."""
    unfinished: dict[str, None] = {}
    last = 0
    for entry in entries:
        last = max(last, entry.arguments.get("timestamp", 0))
        if entry.operation == "start":
            unfinished[entry.arguments["key"]] = None
        elif entry.operation == "end":
            unfinished.pop(entry.arguments["key"], None)
    return dict.fromkeys(unfinished, last)


class _Runs:
    """The operations of records, on an MLflow server. Each may be repeated right away, as after a kill.

    A run is found by its key before it is made. Metrics are rows by run, name, step, time and value, and the time is
    the record's. Tags, the end of a run and artifacts overwrite themselves.
    """

    def __init__(self, client: Any, artifacts: Path | None) -> None:
        self._client = client
        self._artifacts = artifacts
        self._run_ids: dict[str, str] = {}
        self._steps: dict[str, set[int]] = {}
        self._galleries: dict[str, set[int]] = {}

    def perform(self, entry: Entry) -> None:
        """Do what a record says."""
        files = {} if entry.files is None else {"files": entry.files}
        getattr(self, f"_{entry.operation}")(**entry.arguments, **files)

    def check(self) -> None:
        """Make a small request.

        Raises:
            Exception: Whatever MLflow's client raises if the server does not answer it.
        """
        self._client.search_experiments(max_results=1)

    def answers(self) -> bool:
        """Return whether the server takes a request."""
        for _ in range(2):  # the first may meet the connection that the failure left behind
            with contextlib.suppress(Exception):
                self.check()
                return True
        return False

    def _start(
        self,
        *,
        key: str,
        experiment: str,
        name: str,
        tags: dict[str, str],
        params: Mapping[str, str],
        parent_key: str | None,
        timestamp: int,
    ) -> None:
        from mlflow.entities import Param

        experiment_id = self._experiment_id(experiment)
        found = self._find([experiment_id], key)
        parent = {} if parent_key is None else {"mlflow.parentRunId": self._run_id(parent_key)}
        own = {**tags, **parent}
        known: Mapping[str, str] = {}
        if found is not None:
            known = found.data.params
            self._run_ids[key] = found.info.run_id
            self._client.update_run(found.info.run_id, status="RUNNING")
            self._set_tags(key=key, tags=own)
        else:
            made = self._client.create_run(experiment_id, timestamp, {KEY_TAG: key, **own}, name)
            self._run_ids[key] = made.info.run_id
        if new := [Param(name, value) for name, value in params.items() if name not in known]:
            self._client.log_batch(self._run_ids[key], params=new)

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            location = (self._artifacts / name).as_uri() if self._artifacts else None
            try:
                return str(self._client.create_experiment(name, artifact_location=location, tags=_EXPERIMENT_TAGS))
            except MlflowException:
                found = self._client.get_experiment_by_name(name)  # another process may have been first
                if found is None:
                    raise
        return str(found.experiment_id)

    def _find(self, experiments: list[str], key: str) -> Any:
        found = self._client.search_runs(experiments, f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        return found[0] if found else None

    def _run_id(self, key: str) -> str:
        """Return the id of a run of this session or, by its key, of an earlier one."""
        if key not in self._run_ids:
            found = self._find([entry.experiment_id for entry in self._client.search_experiments()], key)
            if found is None:
                raise KeyError(f"A run must be started before its records, but {key!r} was not.")
            self._run_ids[key] = found.info.run_id
        return self._run_ids[key]

    def _log_metrics(self, *, key: str, numbers: Mapping[str, float], step: int, timestamp: int) -> None:
        if key not in self._steps:
            history = self._client.get_metric_history(self._run_id(key), "time/evaluation")
            self._steps[key] = {entry.step for entry in history}
        if step not in self._steps[key]:
            self._log_summary(key=key, numbers=numbers, step=step, timestamp=timestamp)
            self._steps[key].add(step)

    def _log_summary(self, *, key: str, numbers: Mapping[str, float], step: int, timestamp: int) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, timestamp, step) for name, value in numbers.items()]
        self._client.log_batch(self._run_id(key), metrics=metrics)

    def _set_tags(self, *, key: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self._run_id(key), tags=[RunTag(name, value) for name, value in tags.items()])

    def _log_datasets(self, *, key: str, datasets: Sequence[Mapping[str, str]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for found in datasets:
            about = {name: value for name, value in found.items() if name != "context"}
            inputs.append(DatasetInput(Dataset(**about), [InputTag("mlflow.data.context", found["context"])]))
        self._client.log_inputs(self._run_id(key), inputs)

    def _log_gallery(self, *, key: str, step: int, timestamp: int, files: Path) -> None:
        from PIL import Image

        run_id = self._run_id(key)
        if key not in self._galleries:
            found = (_GALLERY_STEP.search(entry.path) for entry in self._client.list_artifacts(run_id, "images"))
            self._galleries[key] = {int(match[1]) for match in found if match}
        if step in self._galleries[key]:  # MLflow names images at random: a repeat would be a second one
            return
        try:
            with Image.open(files / _GALLERY) as image:
                self._client.log_image(run_id, image, key="gallery", step=step, timestamp=timestamp, synchronous=True)
        except Exception:
            del self._galleries[key]  # it may be there
            raise
        self._galleries[key].add(step)

    def _log_json(self, *, key: str, content: Any, name: str) -> None:
        self._client.log_dict(self._run_id(key), content, name)

    def _log_file(self, *, key: str, path: str, folder: str | None, files: Path) -> None:
        kept = files / Path(path).name
        if kept.is_dir():
            self._client.log_artifacts(self._run_id(key), str(kept), folder)
        elif kept.exists():
            self._client.log_artifact(self._run_id(key), str(kept), folder)
        else:
            raise FileNotFoundError(f"A file to track must exist, but {path} did not.")

    def _log_evaluation(self, *, key: str, files: Path) -> None:
        from segadapt.platform.plots import confusion_picture

        run_id = self._run_id(key)
        summary = json.loads((files / "evaluation.json").read_text())
        for domain in ("target_val", "source_val"):
            picture = confusion_picture(summary[domain]["confusion"], summary["classes"], domain)
            self._client.log_image(run_id, picture, f"confusion/{domain}.png")
        # `log_table` would add to the table of an earlier session
        tables = {_TABLE: iou_table(files), _LABEL_TABLE: label_table(files)}
        shown = {name: table for name, table in tables.items() if table is not None}
        for name, table in shown.items():
            self._client.log_dict(run_id, table, name)
        logged = [{"path": name, "type": "table"} for name in shown]
        self._client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps(logged))
        self._client.log_artifact(run_id, str(files / "gallery.png"))

    def _end(self, *, key: str, status: Status, timestamp: int) -> None:
        self._client.set_terminated(self._run_id(key), status, timestamp)

    def _end_lost(self, *, experiment: str, prefix: str, known: Collection[str]) -> None:
        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            return
        for unfinished in ("attributes.status = 'RUNNING'", f"tags.`{STATE_TAG}` = 'interrupted'"):
            for run in self._client.search_runs([found.experiment_id], unfinished, max_results=10_000):
                key = run.data.tags.get(KEY_TAG, "")
                if key.startswith(prefix) and key not in known:
                    self._client.set_tag(run.info.run_id, STATE_TAG, "lost")
                    if run.info.status == "RUNNING":
                        self._client.set_terminated(run.info.run_id, "KILLED")


def _link(source: str | Path, target: str | Path) -> None:
    """Give a file that is never written again a second name, or copy it where the disk cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def _now() -> int:
    """Return the time as MLflow counts it; a record that waits keeps the time at which it was made."""
    return int(time.time() * 1000)


def _pauses() -> Iterator[float]:
    yield from _PAUSES_S
    while True:
        yield _PAUSES_S[-1]


def _is_transient(error: Exception) -> bool:
    """Return whether trying again may help: the server or its database is away or busy."""
    from mlflow.exceptions import MlflowException
    from requests import HTTPError
    from sqlalchemy.exc import OperationalError

    if isinstance(error, MlflowException):  # a connection that fails or breaks counts as status 500
        return _may_pass(error.get_http_status_code())  # type: ignore[no-untyped-call]
    if isinstance(error, HTTPError):  # an upload through the server
        return error.response is None or _may_pass(error.response.status_code)
    if isinstance(error, FileNotFoundError):  # what was to be uploaded is gone
        return False
    return isinstance(error, OSError | OperationalError)


def _may_pass(status: int) -> bool:
    return status >= 500 or status in (401, 403, 408, 429)  # no login, no permission, too slow, too much: as of now


def _may_be_refusal(error: Exception) -> bool:
    """Return whether an error can be the record's own fault; a database that is busy or full is not."""
    from mlflow.exceptions import MlflowException

    return not (isinstance(error, MlflowException) and error.error_code == "TEMPORARILY_UNAVAILABLE")
