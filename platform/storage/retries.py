"""Trying again while storage is away for a while: full, read-only, restarted."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LONGEST_PAUSE_S = 10.0


def retry(attempt: Callable[[], T], error: type[Exception], patience_s: float) -> T:
    """Call `attempt` again, after growing pauses, as long as it raises `error`.

    Raises:
        Exception: What `attempt` raised, after `patience_s` seconds of it.
    """
    deadline = time.monotonic() + patience_s
    pause_s = 0.5
    while True:
        try:
            return attempt()
        except error as raised:
            if time.monotonic() + pause_s > deadline:
                raise
            logger.warning("Trying again in %g s: %s", pause_s, raised)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


STORAGE_PATIENCE_S = 600.0
"""How long a trial, or the study, waits for storage that refuses what is written."""
