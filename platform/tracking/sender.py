"""Sending records to the tracking server, as often as it takes."""

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Collection
from pathlib import Path

from segadapt.platform.errors import redacted
from segadapt.platform.settings.states import TrialState
from segadapt.platform.storage.files import locked
from segadapt.platform.storage.folders import Place, database_url
from segadapt.platform.storage.retries import retry
from segadapt.platform.tracking import outbox
from segadapt.platform.tracking.client import mlflow_client, mlflow_settings, waiting_folder
from segadapt.platform.tracking.moved import point_artifacts_here
from segadapt.platform.tracking.outbox import Entry, Outbox
from segadapt.platform.tracking.runs import RunWriter
from segadapt.platform.tracking.tags import STATE_TAG

logger = logging.getLogger(__name__)

_REFUSALS = 6
"""So many failures in a row, while the server answers other requests, are the record's own fault."""


class _AwayError(Exception):
    """The server, or its database, is away or busy."""


def send_waiting(place: Place, timeout_s: float = 60.0) -> None:
    """Send what ended processes have left for a server, for `timeout_s` seconds at most."""
    point_artifacts_here(place)
    folder = waiting_folder(place)
    if not outbox.left_over(folder) or not os.access(folder, os.W_OK):
        return
    sender = Sender(place)
    try:
        sender.connect()
    except Exception as error:
        logger.warning(
            "Records of earlier commands wait in %s: %s does not answer (%s).", folder, sender.shown, redacted(error)
        )
        return
    thread = threading.Thread(target=sender.send_left_over, name="segadapt-tracking", daemon=True)
    with mlflow_settings():
        thread.start()
        thread.join(timeout_s)
    if thread.is_alive():
        sender.given_up.set()
        logger.warning("%s did not take all within %g s; the rest waits in %s.", sender.shown, timeout_s, folder)


class Sender:
    """Empties boxes into a server, as often as it takes."""

    def __init__(self, place: Place) -> None:
        self._storage = place.folders
        self._local = place.tracking_uri is None
        self._uri = place.tracking_url
        self.shown = redacted(self._uri)
        self._folder = waiting_folder(place)
        self._runs: RunWriter | None = None
        self.given_up = threading.Event()
        """Set when nobody waits any more: what is not sent stays."""

    def connect(self) -> None:
        """Connect.

        Raises:
            Exception: Whatever MLflow's client raises if the server does not answer.
        """
        with locked(self._storage.mlflow_lock) if self._local else contextlib.nullcontext():
            if self._local:
                _make_database(self._storage.mlflow_database)
            runs = RunWriter(mlflow_client(self._uri), self._storage.mlflow_artifacts if self._local else None)
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
            tags = {STATE_TAG: str(TrialState.INTERRUPTED)}
            status = TrialState.INTERRUPTED.mlflow
            box.append("end", {"key": key, "status": status, "tags": tags, "timestamp": timestamp})
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
        runs, refusals = self._runs, 0
        assert runs is not None

        def deliver() -> None:
            nonlocal refusals
            try:
                runs.perform(entry)
            except Exception as error:
                refusals = refusals + 1 if _may_be_refusal(error) and runs.answers() else 0
                if not _is_transient(error) or refusals == _REFUSALS:
                    self._set_aside(box, entry, error)
                    return
                box.sync()
                raise self._away(error) from error
            box.delivered(entry)

        return self._as_often_as_it_takes(deliver)

    def _set_aside(self, box: Outbox, entry: Entry, error: Exception) -> None:
        where = box.refuse(entry, redacted(f"{type(error).__name__}: {error}"))
        key = entry.arguments.get("key", "")
        logger.error("Tracking refused a record (%s %s): %s It is kept in %s.", entry.operation, key, error, where)

    def _reach(self) -> bool:
        """Connect, if that is not done; returns False if `given_up` came first."""

        def connect() -> None:
            try:
                self.connect()
            except Exception as error:
                raise self._away(error) from error

        return self._runs is not None or self._as_often_as_it_takes(connect)

    def _as_often_as_it_takes(self, attempt: Callable[[], None]) -> bool:
        """Try until it succeeds; returns False if `given_up` came first."""
        try:
            retry(attempt, _AwayError, given_up=self.given_up)
        except _AwayError:
            return False
        return True

    def _away(self, error: Exception) -> _AwayError:
        return _AwayError(f"Tracking at {self.shown} failed ({redacted(error)})")


def _make_database(path: Path) -> None:
    """Make MLflow's database if there is none, whole or not at all: migrations that a kill cut short never go on."""
    if path.is_file():
        return
    folder = path.with_name(f".{path.name}.new")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed here
    folder.mkdir()
    RunWriter(mlflow_client(database_url(folder / path.name)), None).check()
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
