"""How a process is asked to end: Ctrl-C, SIGTERM, and SIGHUP when its terminal is closed, all in one way."""

import contextlib
import os
import signal
import stat
import threading
from collections.abc import Iterator

_ASK_TO_END = (signal.SIGTERM, signal.SIGHUP)

_REPLACED = (signal.SIGINT, signal.SIGUSR1, *_ASK_TO_END)
"""What Ray, Tune and this module handle."""


def treat_termination_as_interrupt() -> None:
    """Make SIGTERM and SIGHUP end this process as Ctrl-C does, with everything it started.

    By default they end it at once, and Ray's own handler of SIGTERM aborts it. A SIGHUP that whoever started this
    process had it ignore, as `nohup` does, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # Python allows it there alone
        return
    for number in _ASK_TO_END:
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


@contextlib.contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Restore what Ray, Tune and this module replace meanwhile: a notebook or prompt lives on."""
    handlers = {number: signal.getsignal(number) for number in _REPLACED}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:  # else it was set outside of Python
                    signal.signal(number, handler)


@contextlib.contextmanager
def hangup_held_back() -> Iterator[None]:
    """Hold SIGHUP back meanwhile, and for ever from the processes that are started meanwhile.

    A terminal that is closed sends it to all processes of a command; those of Ray would end before the driver, which
    ends them in good order.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _interrupt(number: int, frame: object) -> None:
    if number == signal.SIGHUP:
        _leave_terminal()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell script's background jobs
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def _leave_terminal() -> None:
    """Have output to the terminal, which is about to go, lead nowhere: writing to it would fail, and so the ending."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # it is closed
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)
    os.close(nowhere)
