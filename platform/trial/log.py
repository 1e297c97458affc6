"""The log of a trial: what its processes and the driver noted, an object of JSON a line, kept over restarts.

Each process appends to a file of its own, in the trial's folder in storage, so that no two nodes write to one file.
"""

import contextlib
import json
import logging
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from segadapt.platform.errors import redacted
from segadapt.trainables.core.training.gradients import SmallerMicroBatchError
from segadapt.trainables.core.training.interruption import PreemptedError

FOLDER = "logs"
"""Folder of the log among what a trial's stages write, and among the artifacts of its run."""

DRIVER = "driver"
"""Who writes what the processes of a trial cannot: that they died, that the trial was stopped or ended."""

STARTED, ENDED = "started", "ended"
"""Events with which the driver begins and ends a trial; one that was interrupted may be started again."""

_PACKAGE = "segadapt"

_POLL_S = 1.0

_AGAIN = (PreemptedError, SmallerMicroBatchError)
"""Errors with which a process leaves in good order: the trial is started again."""


def log_folder(artifacts: Path) -> Path:
    """Return the folder of the log of the trial whose stages write to `artifacts`."""
    return artifacts / FOLDER


@contextlib.contextmanager
def logged(artifacts: Path, writer: str, trial_id: str, rank: int | None = None) -> Iterator[None]:
    """Write to a trial's log what this process logs or warns of meanwhile, and the error that ends it.

    Records of segadapt are written from INFO on, others from WARNING on; they are shown where they were before.

    Args:
        artifacts: Where the trial's stages write.
        writer: Names the file, such as `rank-0`.
        trial_id: The trial.
        rank: Rank of this worker; None for a process that trains nothing.
    """
    root, ours = logging.getLogger(), logging.getLogger(_PACKAGE)
    handlers: list[logging.Handler] = [_Handler(log_folder(artifacts) / f"{writer}.jsonl", trial_id, rank)]
    if not root.handlers and logging.lastResort is not None:
        handlers.append(logging.lastResort)  # what shows warnings as long as there is no handler
    level = ours.level
    ours.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    except _AGAIN as error:
        ours.warning("%s", error, extra={"event": "left"})
        raise
    except Exception as error:
        ours.exception("%s: %s", type(error).__name__, error, extra={"event": "error"})
        raise
    finally:
        logging.captureWarnings(False)
        for handler in handlers:
            root.removeHandler(handler)
        ours.setLevel(level)


class _Handler(logging.Handler):
    """Appends records to a file, each in one write; what storage refuses is written with the next record."""

    def __init__(self, path: Path, trial_id: str, rank: int | None) -> None:
        super().__init__(logging.INFO)
        self._path = path
        self._trial_id = trial_id
        self._rank = rank
        self._waiting: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING and record.name.partition(".")[0] != _PACKAGE:
            return
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info:
            fields["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        is_warning = record.name == "py.warnings"
        line = _line(
            record.created,
            record.levelname,
            self._trial_id,
            rank=self._rank,
            event=getattr(record, "event", "warning" if is_warning else "log"),
            message=record.getMessage().strip(),
            stage=getattr(record, "stage", None),
            step=getattr(record, "step", None),
            fields=fields if hasattr(record, "event") else {**fields, "logger": record.name},
        )
        with contextlib.suppress(OSError):  # a log that cannot be written ends no trial
            self._waiting.append(line)
            _append(self._path, "".join(self._waiting))
            self._waiting = []


def note_by_driver(
    artifacts: Path, trial_id: str, event: str, message: str, *, level: str = "INFO", **fields: Any
) -> None:
    """Write to a trial's log what its own processes cannot know.

    Raises:
        OSError: If storage refuses.
    """
    line = _line(time.time(), level, trial_id, event=event, message=message, fields=fields)
    _append(log_folder(artifacts) / f"{DRIVER}.jsonl", line)


def _line(
    when: float,
    level: str,
    trial_id: str,
    *,
    event: str,
    message: str,
    fields: Mapping[str, Any],
    rank: int | None = None,
    stage: str | None = None,
    step: int | None = None,
) -> str:
    content = {
        "time": datetime.fromtimestamp(when, UTC).isoformat(timespec="microseconds"),
        "level": level,
        "trial": trial_id,
        "rank": rank,
        "stage": stage,
        "step": step,
        "event": event,
        "message": message,
        "fields": dict(fields),
    }
    return json.dumps(_without_logins(content), default=str) + "\n"


def _without_logins(value: Any) -> Any:
    match value:
        case str() | Path():
            return redacted(value)
        case Mapping():
            return {name: _without_logins(part) for name, part in value.items()}
        case list() | tuple():
            return [_without_logins(part) for part in value]
    return value


def _append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        broken = file.tell() > 0 and not _ends_a_line(path)  # a kill or a full disk cut the last write short
        file.write((b"\n" if broken else b"") + text.encode())


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def entries(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of a log by time, over all its files; lines that were cut short are passed over."""
    return _by_time(entry for path in folder.glob("*.jsonl") for entry in _entries_of(path))


def follow_entries(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a log, and those to come until the trial ends."""
    shown: dict[Path, int] = {}
    running = True
    while running:
        logs = {path: _entries_of(path) for path in folder.glob("*.jsonl")}
        yield from _by_time(entry for path, log in logs.items() for entry in log[shown.get(path, 0) :])
        shown = {path: len(log) for path, log in logs.items()}
        by_driver = [entry["event"] for entry in logs.get(folder / f"{DRIVER}.jsonl", [])]
        running = next((event for event in reversed(by_driver) if event in (STARTED, ENDED)), STARTED) != ENDED
        if running:
            time.sleep(_POLL_S)


def _entries_of(path: Path) -> list[dict[str, Any]]:
    log = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and "time" in entry:
                log.append(entry)
    return log


def _by_time(log: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(log, key=lambda entry: str(entry["time"]))


def as_text(entry: Mapping[str, Any]) -> str:
    """Return an entry for people: time, who, where, what; an error with its traceback."""
    who = DRIVER if entry["rank"] is None else f"rank {entry['rank']}"
    where = " ".join(str(part) for part in (entry["stage"], entry["step"]) if part is not None)
    level = "" if entry["level"] == "INFO" else f"{entry['level'].lower()}: "
    head = f"{entry['time'][:19].replace('T', ' ')}  {who:7} {where:16} {level}{entry['message']}"
    return "\n".join([head.rstrip(), *entry["fields"].get("traceback", "").splitlines()])
