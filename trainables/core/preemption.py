"""Leaving a machine that is about to go: a process that is asked to end finishes its step, saves, and leaves.

Cloud providers, schedulers and container runtimes announce the end of a machine with SIGTERM and kill some time later.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

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
