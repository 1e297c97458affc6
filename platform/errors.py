"""Errors that a user can mend, and texts without the logins that addresses may hold."""

import re


class UsageError(Exception):
    """Something asked for cannot be done as asked; the message says what must hold, what came and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


_LOGIN = re.compile(r"(?<=://)[^/\s]*@")


def redacted(text: object) -> str:
    """Return a text without the logins of the addresses in it: http://me:secret@host becomes http://host."""
    return _LOGIN.sub("", str(text))
