"""MLflow, written from the driver through a queue: a slow or absent server delays records, never a trial.

Runs are addressed by a key of ours (`experiment/trial id`), kept as a tag; a run that exists is continued. Only
explicit run ids are used, never MLflow's process-wide active run.
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from segadapt.platform.checkpoints import iou_table
from segadapt.platform.storage import Storage

logger = logging.getLogger(__name__)

KEY_TAG = "segadapt.key"
KIND_TAG = "segadapt.kind"
STATE_TAG = "segadapt.state"
FAILURE_TAG = "segadapt.failure"
CHECKPOINT_TAG = "segadapt.checkpoint"
METHOD_TAG = "segadapt.method"

_TABLE = "per_class_iou.json"

Status = Literal["FINISHED", "FAILED", "KILLED"]

_PAUSES_S = (0.5, 1, 2, 5, 10)
"""Between the attempts at a record; the last one repeats."""

_REFUSALS = len(_PAUSES_S) + 1
"""So many failures in a row, while the server answers other requests, are the record's own fault."""


def tracking_uri(storage: Storage, uri: str | None) -> str:
    """Return the tracking server's address: `uri`, or the SQLite database in the storage folder."""
    return uri or f"sqlite:///{storage.mlflow_database}"


def client(uri: str) -> Any:
    """Return an `MlflowClient` that gives up on an absent server at once.

    It never repeats a request by itself: a repeated "create" whose first answer was lost would make a second run.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output is ours
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
    """Write runs from a queue in one thread, in order.

    Args:
        storage: Where local artifacts go.
        uri: The tracking server's address; None takes the storage's SQLite database.
    """

    def __init__(self, storage: Storage, uri: str | None) -> None:
        self._storage = storage
        self._local = uri is None
        self._uri = tracking_uri(storage, uri)
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._run_ids: dict[str, str] = {}
        self._last_step: dict[str, int] = {}
        self._client: Any = None
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._write, name="segadapt-tracking", daemon=True)
        self._thread.start()

    def start(self, info: RunInfo) -> None:
        """Create the run, or continue the one that has its key; its tags are set anew, its params are kept."""
        now = _now()
        self._queue.put(lambda: self._start(info, now))

    def log_metrics(self, key: str, metrics: Mapping[str, Any], step: int) -> None:
        """Log finite numbers at a training step; steps at or before the last logged one are repeats and left out."""
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }
        now = _now()
        self._queue.put(lambda: self._log_metrics(key, numbers, step, now))

    def log_summary(self, key: str, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers that sum a run up; may repeat."""
        numbers = dict(metrics)
        now = _now()
        self._queue.put(lambda: self._log_batch(key, numbers, step, now))

    def set_tags(self, key: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        self._queue.put(lambda: self._set_tags(key, tags))

    def log_json(self, key: str, content: Any, name: str) -> None:
        """Store `content` as a JSON or YAML artifact, by the ending of `name`."""
        self._queue.put(lambda: self._client.log_dict(self._run_id(key), content, name))

    def log_file(self, key: str, path: Path, folder: str | None = None) -> None:
        """Copy a file or folder into the run's artifacts."""
        log = "log_artifacts" if path.is_dir() else "log_artifact"
        self._queue.put(lambda: getattr(self._client, log)(self._run_id(key), str(path), folder))

    def log_evaluation(self, key: str, checkpoint: Path) -> None:
        """Store the gallery, the confusion matrix and the per-class table that lie in a checkpoint folder."""
        self._queue.put(lambda: self._log_evaluation(key, checkpoint))

    def log_figure(self, key: str, make: Callable[[], Any], name: str) -> None:
        """Store the figure that `make` returns (plotly for .html, matplotlib for .png)."""
        self._queue.put(lambda: self._client.log_figure(self._run_id(key), make(), name))

    def end(self, key: str, status: Status) -> None:
        """Close a run."""
        now = _now()
        self._queue.put(lambda: self._client.set_terminated(self._run_id(key), status, now))

    def end_lost(self, experiment: str, prefix: str, known: Collection[str]) -> None:
        """Close open runs whose key has `prefix` and is not `known`: nobody will go on with them."""
        self._queue.put(lambda: self._end_lost(experiment, prefix, known))

    def close(self, timeout_s: float = 120.0) -> None:
        """Write what is queued and stop; after `timeout_s` seconds say what was lost and give up."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._given_up.set()
            lost = self._queue.unfinished_tasks - 1  # all but the None above
            logger.error(
                "The tracking server %s did not take %d records within %g s; they are lost.", self._uri, lost, timeout_s
            )

    def _write(self) -> None:
        self._perform(self._connect)
        while (action := self._queue.get()) is not None and not self._given_up.is_set():
            self._perform(action)
            self._queue.task_done()

    def _perform(self, action: Callable[[], None]) -> None:
        """Do one action until it succeeds: later ones build on it. What the server refuses for good is dropped."""
        refusals = 0
        for pause in _pauses():
            try:
                return action()
            except Exception as error:
                refusals = refusals + 1 if self._answers() else 0
                if not _is_transient(error) or refusals == _REFUSALS:
                    logger.exception("The tracking server refused a record; it is left out.")
                    return None
                logger.warning("Tracking at %s failed (%s), trying again in %g s.", self._uri, error, pause)
            if self._given_up.wait(pause):
                return None
        return None

    def _answers(self) -> bool:
        """Return whether the server takes a request."""
        for _ in range(2):  # the first may meet the connection that the failure left behind
            with contextlib.suppress(Exception):
                self._client.search_experiments(max_results=1)
                return True
        return False

    def _connect(self) -> None:
        with (self._storage.root / ".mlflow.lock").open("w") as lock:
            if self._local:
                fcntl.flock(lock, fcntl.LOCK_EX)  # two that create and migrate a fresh database at once break it
            self._client = client(self._uri)
            self._client.search_experiments(max_results=1)

    def _experiment_id(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        location = (self._storage.mlflow_artifacts / name).as_uri() if self._local else None
        return str(self._client.create_experiment(name, artifact_location=location))

    def _start(self, info: RunInfo, timestamp: int) -> None:
        from mlflow.entities import Param, RunTag

        experiment = self._experiment_id(info.experiment)
        found = self._find([experiment], info.key)
        tags = {**info.tags, "mlflow.user": os.environ.get("USER", "segadapt")}
        if info.parent_key is not None:
            tags["mlflow.parentRunId"] = self._run_id(info.parent_key)
        known: Mapping[str, str] = {}
        if found is not None:
            run_id, known = found.info.run_id, found.data.params
            self._client.update_run(run_id, status="RUNNING")
            history = self._client.get_metric_history(run_id, "time/evaluation")
            self._last_step[info.key] = max((entry.step for entry in history), default=-1)
        else:
            run_id = self._client.create_run(experiment, timestamp, {KEY_TAG: info.key}, info.name).info.run_id
        self._run_ids[info.key] = run_id
        params = [Param(name, str(value)) for name, value in info.params.items() if name not in known]
        self._client.log_batch(run_id, params=params, tags=[RunTag(name, value) for name, value in tags.items()])

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

    def _log_metrics(self, key: str, numbers: Mapping[str, float], step: int, timestamp: int) -> None:
        if step > self._last_step.get(key, -1):
            self._log_batch(key, numbers, step, timestamp)
            self._last_step[key] = step

    def _log_batch(self, key: str, numbers: Mapping[str, float], step: int, timestamp: int) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, timestamp, step) for name, value in numbers.items()]
        self._client.log_batch(self._run_id(key), metrics=metrics)

    def _set_tags(self, key: str, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            self._client.set_tag(self._run_id(key), name, value)

    def _end_lost(self, experiment: str, prefix: str, known: Collection[str]) -> None:
        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            return
        for run in self._client.search_runs([found.experiment_id], "attributes.status = 'RUNNING'", max_results=10_000):
            key = run.data.tags.get(KEY_TAG, "")
            if key.startswith(prefix) and key not in known:
                self._client.set_tag(run.info.run_id, STATE_TAG, "lost")
                self._client.set_terminated(run.info.run_id, "KILLED")

    def _log_evaluation(self, key: str, checkpoint: Path) -> None:
        from segadapt.platform.plots import confusion_figure

        run_id = self._run_id(key)
        summary = json.loads((checkpoint / "evaluation.json").read_text())
        for domain in ("target_val", "source_val"):
            figure = confusion_figure(summary[domain]["confusion"], summary["classes"], domain)
            self._client.log_figure(run_id, figure, f"confusion/{domain}.png")
        self._client.log_dict(
            run_id, iou_table(checkpoint), _TABLE
        )  # `log_table` would add to the table of an earlier session
        self._client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([{"path": _TABLE, "type": "table"}]))
        self._client.log_artifact(run_id, str(checkpoint / "gallery.png"))


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
        return bool(error.get_http_status_code() >= 500)  # type: ignore[no-untyped-call]
    if isinstance(error, HTTPError):  # an upload through the server
        return error.response is None or error.response.status_code >= 500
    if isinstance(error, FileNotFoundError):  # what was to be uploaded is gone
        return False
    return isinstance(error, OSError | OperationalError)
