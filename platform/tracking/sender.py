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
from segadapt.platform.storage import retries
from segadapt.platform.storage.files import locked
from segadapt.platform.storage.folders import Place, database_url
from segadapt.platform.tracking import outbox
from segadapt.platform.tracking.client import Failure, failure_of, mlflow_client, mlflow_settings, waiting_folder
from segadapt.platform.tracking.moved import point_artifacts_here
from segadapt.platform.tracking.outbox import Entry, Outbox
from segadapt.platform.tracking.runs import LostRunError, RunWriter
from segadapt.platform.tracking.tags import STATE_TAG

logger = logging.getLogger(__name__)

_TRIES = 24
"""A record that a server fails at so often, while it answers other requests, no longer holds up those behind it."""

_TRIES_AGAIN = 3
"""The same of one that had been set aside before."""

_RESTARTS = 3
"""A server that has lost the runs of a box more often does not keep them."""


class _AwayError(Exception):
    """The server, or its database, is away or busy; or storage is."""


def send_waiting(place: Place, timeout_s: float = 60.0, *, refused_too: bool = False) -> None:
    """Send what ended processes have left for a server, for `timeout_s` seconds at most.

    Args:
        place: Says where it is kept, and the server.
        timeout_s: How long it may take.
        refused_too: Whether also what the server named as wrong.
    """
    point_artifacts_here(place)
    folder = waiting_folder(place)
    if not (outbox.left_over(folder) or outbox.refused(folder)) or not os.access(folder, os.W_OK):
        return
    sender = Sender(place)
    problems: list[str] = []

    def send() -> None:
        try:
            sender.connect()
            sender.send_left_over(refused_too=refused_too)
        except Exception as error:
            problems.append(redacted(error))

    thread = threading.Thread(target=send, name="segadapt-tracking", daemon=True)
    with mlflow_settings():
        thread.start()
        thread.join(timeout_s)
    if problems:
        logger.warning("Records of earlier commands wait in %s: %s (%s).", folder, sender.shown, problems[0])
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
        self._not_made: dict[str, bool] = {}  # keys of runs whose start was set aside, and whether for good
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
        try:
            self.send_left_over()
        except OSError as error:
            logger.error("What earlier commands left in %s cannot be sent: %s", self._folder, error)
        try:
            self._send(own)
            own.close()
        except Exception:
            logger.exception("Tracking has ended; the next segadapt command that tracks there sends the rest.")

    def send_left_over(self, *, refused_too: bool = False) -> None:
        """Send what ended processes left, and close the runs that they left open.

        Args:
            refused_too: Whether also what the server named as wrong. What it merely failed at is always sent again.

        Raises:
            OSError: If storage refuses.
        """
        with outbox.taking(self._folder, self.given_up) as alone:
            if not alone:
                return
            self._send_boxes()
            outbox.send_again(self._folder, final=refused_too)
            self._send_boxes()

    def _send_boxes(self) -> None:
        for folder in outbox.left_over(self._folder):
            try:
                box = Outbox.take(folder)
                if box is not None:
                    self._send_left(box)
                    box.close()
            except OSError as error:  # one that cannot be read does not hold up the others
                logger.error("What an earlier command left in %s cannot be sent: %s", folder, error)
            if self.given_up.is_set():
                return

    def _send_left(self, box: Outbox) -> None:
        unfinished = _left_open(box.entries())
        for key, timestamp in unfinished.items():
            tags = {STATE_TAG: str(TrialState.INTERRUPTED)}
            status = TrialState.INTERRUPTED.mlflow
            box.append("end", {"key": key, "status": status, "tags": tags, "timestamp": timestamp})
        box.finish_input()
        waiting = min(box.waiting, len(box.entries()))  # numbers of what is sent again have gaps
        self._send(box)
        if waiting and not box.waiting:
            logger.warning("Sent %d records that an earlier command had left for %s.", waiting, self.shown)

    def _send(self, box: Outbox) -> None:
        for entry in box:
            if self.given_up.is_set() or not (self._reach() and self._deliver(box, entry)):
                box.sync()
                return

    def _deliver(self, box: Outbox, entry: Entry, restarts: int = 0) -> bool:
        """Try until the server has the record: later ones build on it. What it does not take is set aside."""
        lost: list[LostRunError] = []

        def deliver() -> None:
            lost.clear()
            try:
                self._perform(box, entry)
            except LostRunError as error:
                lost.append(error)
            except OSError as error:  # storage refuses what is noted of the record
                raise self._away(error) from error

        if not self._as_often_as_it_takes(deliver):
            return False
        if not lost:
            return True
        key = _needed(entry)
        was_started = key not in self._not_made and _was_started(box, entry, key)
        if was_started and restarts < _RESTARTS:
            return self._begin_again(box, entry, restarts + 1)
        final = self._not_made.get(key, not was_started)
        return self._as_often_as_it_takes(lambda: self._set_aside(box, entry, lost[0], final=final))

    def _perform(self, box: Outbox, entry: Entry) -> None:
        """Have the server do what a record says, or set it aside.

        Raises:
            LostRunError: If the server does not have its run.
            _AwayError: If the server does not answer.
            OSError: If storage refuses.
        """
        runs = self._runs
        assert runs is not None
        for tries_left in reversed(range(_TRIES_AGAIN if entry.operation == outbox.AGAIN else _TRIES)):
            try:
                runs.perform(entry)
            except LostRunError:
                raise
            except Exception as error:
                failure = failure_of(error)
                if failure is Failure.AWAY or (failure is Failure.DOUBTFUL and not runs.answers()):
                    box.sync()
                    raise self._away(error) from error
                if failure is Failure.REFUSED or not tries_left:
                    self._set_aside(box, entry, error, final=failure is Failure.REFUSED)
                    return
                logger.debug("Tracking at %s failed, trying again: %s", self.shown, redacted(error))
                if self.given_up.wait(retries.FIRST_PAUSE_S):
                    raise self._away(error) from error
            else:
                box.delivered(entry)
                self._not_made.pop(entry.arguments.get("key", ""), None)
                return

    def _begin_again(self, box: Outbox, entry: Entry, restarts: int) -> bool:
        """Send the records of a box, up to one of them, once more: the server has lost its runs."""
        earlier = [other for other in box.entries() if other.number < entry.number]
        gone = [other for other in earlier if other.files is not None and not other.files.exists()]
        box.begin_again()
        logger.warning(
            "%s does not have the runs any more that it had (was it restarted with another database?): they are made "
            "again from the %d records that are still here; %d pictures and files that it had taken are lost, and what "
            "earlier sessions had sent.",
            self.shown,
            len(earlier) - len(gone),
            len(gone),
        )
        for other in [*earlier, entry]:
            if other in gone:
                box.delivered(other)
            elif self.given_up.is_set() or not self._deliver(box, other, restarts):
                return False
        return True

    def _set_aside(self, box: Outbox, entry: Entry, error: Exception, *, final: bool) -> None:
        try:
            where = box.refuse(entry, redacted(f"{type(error).__name__}: {error}"), final=final)
        except OSError as refusal:
            raise self._away(refusal) from refusal
        if entry.operation == "start":
            self._not_made[entry.arguments["key"]] = final
        text = "refused a record" if final else "failed again and again at a record, which is set aside"
        then = "`segadapt doctor --fix` sends" if final else "The next segadapt command that tracks there sends"
        logger.error("Tracking %s (%s): %s It is kept in %s. %s it again.", text, _named(entry), error, where, then)

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
            retries.retry(attempt, _AwayError, given_up=self.given_up)
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


def _needed(entry: Entry) -> str:
    """Return the key of the run that must be there for a record."""
    return str(entry.arguments.get("parent_key" if entry.operation == "start" else "key"))


def _was_started(box: Outbox, entry: Entry, key: str) -> bool:
    """Return whether a box holds, before a record, the start of a run."""
    earlier = (other for other in box.entries() if other.operation == "start" and other.number < entry.number)
    return any(other.arguments["key"] == key for other in earlier)


def _named(entry: Entry) -> str:
    """Return what a record is, for people."""
    if entry.operation == outbox.AGAIN:
        return f"{entry.arguments['operation']} {entry.arguments['arguments'].get('key', '')}"
    return f"{entry.operation} {entry.arguments.get('key', '')}"
