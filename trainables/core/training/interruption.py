"""Leaving a machine that is about to go: a process that is asked to end finishes its step, saves, and leaves.

Cloud providers, schedulers and container runtimes announce the end of a machine with SIGTERM and kill some time later.
"""

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_NOTE = "preemptions.json"

_asked = threading.Event()

_training = threading.Event()


class PreemptedError(RuntimeError):
    """The process was asked to end and has saved its trial, which can go on elsewhere."""


def leave_when_terminated() -> None:
    """Have SIGTERM end the training of this process after its step; without training, whatever it did before.

    Python allows it in the main thread alone.
    """
    before = signal.getsignal(signal.SIGTERM)

    def ask(number: int, frame: FrameType | None) -> None:
        if _training.is_set():
            _asked.set()
        elif callable(before):
            before(number, frame)

    signal.signal(signal.SIGTERM, ask)


@contextlib.contextmanager
def training() -> Iterator[None]:
    """Training happens meanwhile, in any thread of this process."""
    _training.set()
    try:
        yield
    finally:
        _training.clear()
        _asked.clear()


def asked_to_leave() -> bool:
    """Return whether this process was asked to end since its training began."""
    return _asked.is_set()


def note_preemption(folder: Path) -> None:
    """Count, in the folder of a trial, that it was saved and left."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{_NOTE}"
    temporary.write_text(json.dumps(noted_preemptions(folder) + 1))
    temporary.replace(folder / _NOTE)


def noted_preemptions(folder: Path) -> int:
    """Return how often a trial was saved and left."""
    try:
        return int(json.loads((folder / _NOTE).read_text()))
    except FileNotFoundError:
        return 0
