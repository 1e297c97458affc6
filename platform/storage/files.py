"""Files that several processes share: written whole or not at all, locked, measured."""

import contextlib
import fcntl
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
"""Ending of files that are being written; a kill leaves them."""

MOUNTS = Path("/proc/self/mounts")
"""The system's table of mounted file systems, on Linux."""

_NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "fuse.sshfs", "9p", "afs")

_OWN_LOCKS = ("nolock", "noflock", "localflock", "local_lock=all", "local_lock=flock")
"""Mount options under which nodes do not see each other's locks."""


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a file beside `path` to write to, which takes the place of `path` in one step when the context ends well.

    Others see the old content or the new one, whatever is killed in between. Of several processes that write a path at
    once, one wins.
    """
    partial = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: If storage refuses; `path` is as it was then.
    """
    with written_whole(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def lock(file: Any, *, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file until it is closed, or its process ends; returns False if another process has it locked.

    Args:
        file: The open file, or its descriptor.
        shared: Others may lock it shared as well.
        wait: Wait until the others let go of it.

    Raises:
        OSError: If the file system has no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock that a file stands for; the file is made if need be.

    Args:
        path: The file; its content is left alone.
        wait: Wait until others let go of it; otherwise yields False if somebody has it.
    """
    with path.open("a") as file:
        yield lock(file, wait=wait)


def folder_size(folder: Path) -> int:
    """Return the bytes of all files in a folder and its sub-folders."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def file_system(path: Path, mounts: Path) -> tuple[str, str]:
    """Return the kind of file system that a folder lies on, and how it is mounted; `unknown` where nothing tells.

    Args:
        path: The folder.
        mounts: The system's table, such as `MOUNTS`.
    """
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return "unknown", ""
    path = path.resolve()
    mounted = [line for line in lines if path.is_relative_to(line[1].replace("\\040", " "))]
    best = max(mounted, key=lambda line: len(line[1]), default=None)
    return (best[2], best[3]) if best is not None else ("unknown", "")


def keeps_locks_apart(kind: str, options: str) -> bool:
    """Return whether a file system is mounted so that nodes do not see each other's locks."""
    return kind.startswith(_NETWORK) and bool(set(options.split(",")) & set(_OWN_LOCKS))
