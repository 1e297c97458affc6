"""Leases on a shared folder: of all processes on all nodes, at most one holds a lease, and a dead one's is taken over.

A lease is a folder of numbered records, of which the highest counts: it names a holder, or says that the lease is free.
Records are only ever appended, by creating the file with the next number, which the file system lets one process do. To
take a free lease, to take over one that is not renewed, and to release one are therefore the same atomic step, and none
of them can undo what another process did in between.

A lease does not stop a holder that was taken for dead and wakes up; what it guards must bear being done twice.
"""

import contextlib
import dataclasses
import json
import os
import socket
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

RENEWED_EVERY_S = 3.0
"""Seconds between the heartbeats of a holder."""

STALE_AFTER_S = 30.0
"""Seconds without heartbeat after which a holder counts as dead."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lease, for people."""

    experiment: str
    stage: str
    """What it computes."""
    host: str = dataclasses.field(default_factory=socket.gethostname)
    pid: int = dataclasses.field(default_factory=os.getpid)
    since: float = dataclasses.field(default_factory=time.time)
    """Unix time on its own clock."""

    def __str__(self) -> str:
        return f"{self.experiment} (process {self.pid} on {self.host})"


_UNKNOWN = Owner("unknown", "unknown", "unknown", 0, 0.0)
"""Whoever is just writing, or died while writing, its record."""


@dataclass(frozen=True)
class Held:
    """A lease that somebody holds."""

    owner: Owner
    age_s: float
    """Seconds since the last heartbeat, by the file system's clock."""

    @property
    def alive(self) -> bool:
        """Whether the holder must be left in peace."""
        return self.age_s <= STALE_AFTER_S


class Lease:
    """A lease of this process, renewed by a thread until it is released or the process ends.

    Args:
        folder: Holds the lease's records.
        number: Number of this process's record.
        former: Who held the lease that was taken over; None if it was free.
    """

    def __init__(self, folder: Path, number: int, former: Held | None) -> None:
        self.former = former
        self._folder = folder
        self._number = number
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="segadapt-lease", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def held(self) -> bool:
        """Whether nobody has taken the lease over."""
        return _highest(self._folder) == self._number

    def release(self) -> None:
        """Let others take the lease; leaves it alone if it was taken over."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # a storage that fails now lets the lease run out instead
            _append(self._folder, self._number + 1, None)

    def _renew(self) -> None:
        while not self._stop.wait(RENEWED_EVERY_S):
            try:
                os.utime(self._folder / str(self._number))  # sets the time of the file server, not of this node
            except FileNotFoundError:
                return  # taken over
            except OSError:
                continue  # the next heartbeat may pass


def take(folder: Path, owner: Owner) -> Lease | Held:
    """Take a lease that is free or not renewed any more; otherwise return who holds it. Does not wait.

    Args:
        folder: Holds the lease's records, on a file system that all processes see; made if need be.
        owner: Who asks.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        number = _highest(folder)
        try:
            holder = _read(folder, number) if number else None
        except FileNotFoundError:
            continue  # others were faster
        if holder is not None and holder.alive:
            return holder
        if _append(folder, number + 1, owner):
            return Lease(folder, number + 1, holder)


def holder_of(folder: Path) -> Held | None:
    """Return who holds a lease, dead or alive; None if it is free."""
    try:
        number = _highest(folder)
        return _read(folder, number) if number else None
    except FileNotFoundError:
        return None


def forget(folder: Path, free_for_s: float) -> bool:
    """Remove the records of a lease that was free for so long; returns whether it did.

    The time must be longer than any process may hesitate between looking at the lease and taking it.
    """
    try:
        number = _highest(folder)
        if not number or _read(folder, number) is not None:
            return False
        if clock(folder) - (folder / str(number)).stat().st_mtime < free_for_s:
            return False
        (folder / str(number)).unlink()
        folder.rmdir()
    except OSError:  # somebody takes it at this moment
        return False
    return True


def clock(folder: Path) -> float:
    """Return the time by the clock that sets the modification times of files in `folder`: nodes' clocks differ."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_mtime


def _highest(folder: Path) -> int:
    """Return the number of the record that counts; 0 if there is none yet."""
    return max(_numbers(folder), default=0)


def _numbers(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()]


def _read(folder: Path, number: int) -> Held | None:
    """Return the holder that a record names, or None if it says that the lease is free."""
    now = clock(folder)  # before the heartbeat is read: a process paused in between must not find it old
    with (folder / str(number)).open() as file:  # opening makes a network file system ask its server
        renewed = os.fstat(file.fileno()).st_mtime
        text = file.read()
    try:
        content = json.loads(text)
        owner = Owner(**content) if content is not None else None
    except (ValueError, TypeError):
        owner = _UNKNOWN
    return Held(owner, max(0.0, now - renewed)) if owner is not None else None


def _append(folder: Path, number: int, owner: Owner | None) -> bool:
    """Append a record, unless another process did so first; returns whether it counts."""
    path = folder / str(number)
    try:
        with path.open("x") as file:
            json.dump(dataclasses.asdict(owner) if owner is not None else None, file)
    except (FileExistsError, FileNotFoundError):  # the latter: the folder was tidied away
        return False
    if _highest(folder) != number:  # the records went on long ago, and number was tidied away
        path.unlink(missing_ok=True)
        return False
    for former in _numbers(folder):
        if former < number:
            (folder / str(former)).unlink(missing_ok=True)
    return True
