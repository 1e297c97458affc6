"""Trying again while something is away for a while: storage that is full or read-only, a server that is restarted."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE_S = 0.5

LONGEST_PAUSE_S = 10.0

STORAGE_PATIENCE_S = 600.0
"""How long a trial, or the study, waits for storage that refuses what is written."""


def growing_pauses() -> Iterator[float]:
    """Yield pauses in seconds, each twice as long as the one before, up to the longest."""
    pause_s = FIRST_PAUSE_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def retry(
    attempt: Callable[[], T],
    error: type[Exception],
    patience_s: float = math.inf,
    *,
    pauses: Iterator[float] | None = None,
    given_up: threading.Event | None = None,
    level: int = logging.WARNING,
) -> T:
    """Call `attempt` again, after pauses, as long as it raises `error`.

    Args:
        attempt: What is tried.
        error: Says that trying again may help; any other error is raised at once.
        patience_s: Seconds for which it is tried.
        pauses: In seconds, without end; None takes growing ones.
        given_up: Ends the patience as soon as it is set; None waits to the end.
        level: Level of the message before each pause.

    Raises:
        Exception: What `attempt` raised last, once the patience has ended.
    """
    deadline = time.monotonic() + patience_s
    wait = time.sleep if given_up is None else given_up.wait
    pauses = pauses or growing_pauses()
    while True:
        try:
            return attempt()
        except error as raised:
            pause_s = next(pauses)
            if time.monotonic() + pause_s > deadline:
                raise
            logger.log(level, "%s, trying again in %g s.", str(raised).rstrip("."), pause_s)
            if wait(pause_s):  # `sleep` returns None
                raise
