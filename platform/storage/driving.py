"""One command at a time works on an experiment, whatever node it runs on.

Whoever works on an experiment has its file in `locks/` locked. The file system gives the lock up when its process ends,
however it ends, and keeps it for one that merely stands still. So nobody has to judge by the clock who is alive.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from segadapt.platform.errors import UsageError
from segadapt.platform.storage.files import lock
from segadapt.platform.storage.folders import Storage, check_name

_LOOKS, _PAUSE_S = 5, 0.1
"""How often, and how many seconds apart, a lock is tried for."""


@contextlib.contextmanager
def driving_if_free(storage: Storage, name: str) -> Iterator[bool]:
    """Be the only command that works on an experiment meanwhile; yields False if another one is.

    Args:
        storage: The storage folder.
        name: Of the experiment, which need not exist.

    Raises:
        UsageError: If files of the storage folder cannot be locked.
    """
    path = _lock_file(storage, name)
    with contextlib.ExitStack() as opened:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context(path.open("a"))  # never removed: another process may have opened it
            alone = _locked_soon(file)
            if alone:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
        except OSError as error:
            raise UsageError(
                "--storage must be a folder in which files can be written and locked, or two commands could work on "
                f"{name!r} at once, but {path} cannot: {error.strerror}. Mount it with locks, or choose another."
            ) from error
        yield alone


@contextlib.contextmanager
def driving(storage: Storage, name: str) -> Iterator[None]:
    """Be the only command that works on an experiment meanwhile.

    Raises:
        UsageError: If another one is; it is named.
    """
    with driving_if_free(storage, name) as alone:
        if not alone:
            worker = _lock_file(storage, name).read_text() or "another process"
            raise UsageError(
                f"One command at a time must work on an experiment, but {worker} works on {name!r}. Wait until it has "
                "ended, or stop it (Ctrl-C there); what it did is kept."
            )
        yield


def is_driven(storage: Storage, name: str) -> bool:
    """Return whether a command works on an experiment now."""
    try:
        with _lock_file(storage, name).open() as file:
            return not lock(file, shared=True, wait=False)
    except FileNotFoundError:
        return False


def _locked_soon(file: IO[str]) -> bool:
    """Lock a file unless another command has it; one that only looks whether it is locked has it for a moment."""
    for _ in range(_LOOKS):
        if lock(file, wait=False):
            return True
        time.sleep(_PAUSE_S)
    return lock(file, wait=False)


def _lock_file(storage: Storage, name: str) -> Path:
    check_name(name)
    return storage.locks / name
