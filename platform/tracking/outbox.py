"""Records on their way to a server, kept on disk until it has them: they outlive their process and any outage.

    <server>/.taking              locked by the one process that sends what ended processes left
    <server>/.last                number of the last box; locked while one is made
    <server>/box-<number>/        a box per process, removed when all of it is delivered
        records.jsonl             a record per line; locked as long as its process lives
        delivered                 number of the last record that the server has
        files/<number>/           what that record uploads
        refused.jsonl             what the server did not take, and why; stays, with its files, to be sent again

Boxes are counted, so that they are sent in the order in which their processes began, whatever the clocks of their nodes
say. A record is in the system's hands when `append` returns, so a killed process loses none. While records wait for a
server they are also forced to the disk, by the thread that sends them: a power cut loses at most those of the last
moments.
"""

import contextlib
import errno
import json
import logging
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from segadapt.platform.storage import leases
from segadapt.platform.storage.files import lock, write_whole

logger = logging.getLogger(__name__)

_RECORDS = "records.jsonl"

_REFUSED = "refused.jsonl"

AGAIN = "again"
"""Operation of a record that was refused before; it holds that record's operation and arguments."""


@dataclass(frozen=True)
class Entry:
    """A record."""

    number: int
    """Counts from 1, in the order of `append`."""
    operation: str
    arguments: Mapping[str, Any]
    """Plain JSON values."""
    files: Path | None
    """Folder with what it uploads."""


class Outbox:
    """The records of one process, in order.

    `append` and `finish_input` may be called by any thread, everything else by the one thread that sends. Make one with
    `create` or `take`.
    """

    def __init__(self, folder: Path, records: Any) -> None:
        self.folder = folder
        self._records = records
        self._marks = os.open(folder / "delivered", os.O_RDWR | os.O_CREAT, 0o666)
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._appending = threading.Lock()
        self._delivered = _marked(self._marks)
        self._last = self._delivered
        self._synced = self._delivered

    @classmethod
    def create(cls, server: Path) -> "Outbox":
        """Begin a box in the folder of a server."""
        folder = _next_box(server)
        records = (folder / ".new").open("ab+", buffering=0)
        lock(records)
        (folder / ".new").rename(folder / _RECORDS)  # nobody can find it unlocked
        return cls(folder, records)

    @classmethod
    def take(cls, folder: Path) -> "Outbox | None":
        """Take over the box of a process that ended; None if its process lives or all of it is delivered."""
        try:
            records = os.fdopen(os.open(folder / _RECORDS, os.O_RDWR | os.O_APPEND), "ab+", buffering=0)  # not created
        except FileNotFoundError:
            return None
        if not lock(records, wait=False) or not (folder / _RECORDS).exists():  # it lives, or was removed just now
            records.close()
            return None
        box = cls(folder, records)
        box._load()
        return box

    @property
    def waiting(self) -> int:
        """Number of records that are not delivered."""
        return self._last - self._delivered

    def append(self, operation: str, arguments: Mapping[str, Any], keep: Callable[[Path], None] | None = None) -> None:
        """Add a record.

        Args:
            operation: What is to be done.
            arguments: With what; other than JSON values become text.
            keep: Puts what the record uploads into the folder that it is given.
        """
        with self._appending:
            number = self._last + 1
            files = self.folder / "files" / str(number)
            if keep is not None:
                files.mkdir(parents=True)
                try:
                    keep(files)
                except BaseException:
                    shutil.rmtree(files)
                    raise
            content = {"number": number, "operation": operation, "arguments": arguments, "files": keep is not None}
            line = json.dumps(content, default=str).encode() + b"\n"
            self._write(line)
            self._last = number
            self._lines.put(line)

    def finish_input(self) -> None:
        """Say that no record will follow."""
        self._lines.put(None)

    def __iter__(self) -> Iterator[Entry]:
        """Yield what is not delivered, waiting for more until `finish_input`."""
        while (line := self._lines.get()) is not None:
            yield self._entry(json.loads(line))

    def entries(self) -> list[Entry]:
        """Return all records on disk, delivered ones too."""
        return [self._entry(content) for content in self._contents()]

    def delivered(self, entry: Entry) -> None:
        """Note that the server has this record, and remove what it uploaded."""
        self._mark(entry.number)
        if entry.files is not None:
            shutil.rmtree(entry.files, ignore_errors=True)

    def begin_again(self) -> None:
        """Note that the server has none of the records."""
        self._mark(0)

    def refuse(self, entry: Entry, reason: str, *, final: bool) -> Path:
        """Set a record aside that the server does not take; returns the file that tells of it.

        Args:
            entry: The record.
            reason: What the server said.
            final: Whether the server would say so again, as far as one knows.

        Raises:
            OSError: If storage refuses; the record still waits then.
        """
        content = {**asdict(entry), "files": entry.files is not None, "reason": reason, "final": final}
        with (self.folder / _REFUSED).open("ab", buffering=0) as refused:
            _append_whole(refused, json.dumps(content, default=str).encode() + b"\n")
        self.delivered(replace(entry, files=None))  # its files stay
        return self.folder / _REFUSED

    def _mark(self, number: int) -> None:
        self._delivered = number
        try:
            os.pwrite(self._marks, b"%020d\n" % number, 0)
        except OSError as error:  # the server has it: no reason to wait
            logger.error("What was sent is not noted in %s (%s): a kill would send it again.", self.folder, error)

    def sync(self) -> None:
        """Force what waits to the disk, as far as that takes it."""
        try:
            self._sync()
        except OSError as error:
            logger.error(
                "Records in %s are not forced to the disk (%s): a power cut may lose some.", self.folder, error
            )

    def _sync(self) -> None:
        last = self._last
        os.fsync(self._records.fileno())
        for number in range(self._synced + 1, last + 1):
            for path in (self.folder / "files" / str(number)).rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
        self._synced = last

    def close(self) -> None:
        """Let go of the box; it is removed if nothing waits, but what was refused stays."""
        if self.waiting == 0:
            (self.folder / _RECORDS).unlink()
            if not (self.folder / _REFUSED).exists():
                shutil.rmtree(self.folder)
        self._records.close()
        os.close(self._marks)

    def _write(self, line: bytes) -> None:
        """Write a line; one that has no room on disk is kept in memory alone."""
        try:
            _append_whole(self._records, line)
        except OSError as error:
            logger.error("A record for tracking is not kept in %s (%s): a kill would lose it.", self.folder, error)

    def _load(self) -> None:
        whole = (self.folder / _RECORDS).read_bytes().rpartition(b"\n")
        os.ftruncate(self._records.fileno(), len(whole[0] + whole[1]))  # a kill amid a line: `append` had not returned
        for content in self._contents():
            self._last = max(self._last, content["number"])
            if content["number"] > self._delivered:
                self._lines.put(json.dumps(content).encode())

    def _contents(self) -> Iterator[dict[str, Any]]:
        """Yield the records on disk; lines that a disk has damaged are passed over."""
        with (self.folder / _RECORDS).open("rb") as lines:
            for line in lines:
                content = _read(line)
                if content is not None:
                    yield content
                else:
                    logger.error("A record for tracking in %s is damaged and left out: %.200r", self.folder, line)

    def _entry(self, content: Mapping[str, Any]) -> Entry:
        files = self.folder / "files" / str(content["number"]) if content["files"] else None
        return Entry(content["number"], content["operation"], content["arguments"], files)


def _next_box(server: Path) -> Path:
    """Make the folder of a box that comes after all others."""
    server.mkdir(parents=True, exist_ok=True)
    with (server / ".last").open("a+b") as file:
        lock(file)
        file.seek(0)
        made = [int(path.name.removeprefix("box-")) for path in server.glob("box-*")]
        number = max(_number(file.read()), *made, 0) + 1  # a kill may have left the file empty
        file.truncate(0)
        file.write(b"%d" % number)
        folder = server / f"box-{number:09d}"
        folder.mkdir()
    return folder


@dataclass(frozen=True)
class BoxContents:
    """What a box holds, seen without taking it."""

    folder: Path
    alive: bool
    """Whether its process lives."""
    contents: list[dict[str, Any]]
    """All records, delivered ones too."""
    waiting: int
    """Records that the server does not have."""


def box_contents(server: Path) -> list[BoxContents]:
    """Return the boxes in the folder of a server that are not removed, oldest first; touches none."""
    return [contents for folder in left_over(server) if (contents := _contents_of(folder)) is not None]


def _contents_of(folder: Path) -> BoxContents | None:
    try:
        with (folder / _RECORDS).open("rb") as records:
            alive = not lock(records, shared=True, wait=False)
            lines = records.read().rpartition(b"\n")[0].splitlines()  # the last one may be half written
        marks = folder / "delivered"
        delivered = _number(marks.read_bytes()) if marks.exists() else 0
    except FileNotFoundError:  # removed just now
        return None
    contents = [content for line in lines if (content := _read(line)) is not None]
    return BoxContents(folder, alive, contents, sum(content["number"] > delivered for content in contents))


@dataclass(frozen=True)
class RefusedRecords:
    """What a server did not take of the records of a box."""

    file: Path
    reasons: list[str]
    """One per record."""
    final: int
    """Number of those that the server named as wrong."""


def refused(server: Path) -> list[RefusedRecords]:
    """Return what a server did not take, by box."""
    kept = []
    for file in sorted(server.glob(f"*/{_REFUSED}")):
        if lines := _refused_lines(file):
            final = sum(bool(line.get("final", True)) for line in lines)
            kept.append(RefusedRecords(file, [str(line.get("reason", "")) for line in lines], final))
    return kept


def send_again(server: Path, *, final: bool) -> None:
    """Let what a server did not take of the records of ended processes wait for it once more.

    Args:
        server: Folder of the server; the caller is the one who is `taking`.
        final: Whether also what the server named as wrong.

    Raises:
        OSError: If storage refuses; all is as it was then, or waits and is refused as well.
    """
    for file in sorted(server.glob(f"*/{_REFUSED}")):
        folder, lines = file.parent, _refused_lines(file)
        again = {line["number"]: line for line in lines if final or not line.get("final", True)}
        if (folder / _RECORDS).exists() or not again:  # its process lives, or it is not empty yet
            continue
        (folder / "delivered").unlink(missing_ok=True)
        write_whole(folder / _RECORDS, b"".join(_again(line) for line in again.values()))
        rest = [json.dumps(line).encode() + b"\n" for line in lines if line["number"] not in again]
        write_whole(file, b"".join(rest)) if rest else file.unlink()


def _refused_lines(file: Path) -> list[dict[str, Any]]:
    """Return the records in a file of refused ones; earlier versions noted the path of what a record uploads."""
    lines = (_read(line, lambda content: {**content, "files": bool(content["files"])}) for line in file.open("rb"))
    return [line for line in lines if line is not None]


def _again(line: Mapping[str, Any]) -> bytes:
    """Return the record of one that was refused."""
    arguments = {name: line[name] for name in ("operation", "arguments")}
    if line["operation"] == AGAIN:
        arguments = line["arguments"]
    content = {"number": line["number"], "operation": AGAIN, "arguments": arguments, "files": line["files"]}
    return json.dumps(content).encode() + b"\n"


def _append_whole(file: Any, line: bytes) -> None:
    """Add a line to an unbuffered file, whole or not at all.

    Raises:
        OSError: If storage refuses.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.ftruncate(file.fileno(), size)
        raise


def abandoned(server: Path, older_than_s: float) -> list[Path]:
    """Return the folders of boxes that a kill left without any record, so long ago that nobody is making them."""
    now = leases.clock(server)  # that of the file server, which sets the times that it is compared with
    return [
        folder
        for folder in sorted(server.iterdir())
        if folder.is_dir()
        and not any((folder / name).exists() for name in (_RECORDS, _REFUSED))
        and now - folder.stat().st_mtime > older_than_s
    ]


def _read(line: bytes, renew: Callable[[Any], Any] = lambda content: content) -> dict[str, Any] | None:
    """Return what a line holds, or None if it is not as it was written.

    Args:
        line: The line.
        renew: Returns what an earlier version wrote as it is written now.
    """
    try:
        content = renew(json.loads(line))
        kinds = {"number": int, "operation": str, "arguments": dict, "files": bool}
        whole = all(isinstance(content[name], kind) for name, kind in kinds.items())
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return content if whole and content["number"] > 0 else None


def _marked(marks: int) -> int:
    """Return the number of the last record that was delivered; all are sent again if that is damaged."""
    return _number(os.pread(marks, 32, 0))


def _number(mark: bytes) -> int:
    return int(mark) if mark.strip().isdigit() else 0


def left_over(server: Path) -> list[Path]:
    """Return the boxes in the folder of a server that are not removed, oldest first; their processes may live."""
    return sorted(path.parent for path in server.glob(f"*/{_RECORDS}"))


@contextlib.contextmanager
def taking(server: Path, given_up: threading.Event) -> Iterator[bool]:
    """Be the only one who sends what others left for a server; yields False if `given_up` came first."""
    with (server / ".taking").open("a") as file:
        while not (alone := lock(file, wait=False)) and not given_up.wait(0.1):
            pass
        yield alone
