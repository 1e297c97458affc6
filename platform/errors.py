"""Errors that a user can mend, and texts without the logins that addresses may hold."""

import functools
import importlib.metadata
import logging
import re

logger = logging.getLogger(__name__)


class UsageError(Exception):
    """Something asked for cannot be done as asked; the message says what must hold, what came and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


_LOGIN = re.compile(r"(?<=://)[^/\s]*@")


def redacted(text: object) -> str:
    """Return a text without the logins of the addresses in it: http://me:secret@host becomes http://host."""
    return _LOGIN.sub("", str(text))


@functools.cache  # said once by a process
def warn_of_change(package: str, error: str, consequence: str) -> None:
    """Tell that a package has changed in a part that is not public, and what serves in its place.

    Args:
        package: Name, as it is installed.
        error: What was looked for and is gone.
        consequence: What serves in its place, and what follows from that.
    """
    version = importlib.metadata.version(package)
    logger.warning("%s %s has changed in a part that segadapt uses (%s): %s", package, version, error, consequence)
