"""Errors a user can mend."""


class UsageError(Exception):
    """Something asked for cannot be done as asked; the message says what must hold, what came and what to do.

    The command line prints it without a traceback and exits with status 2.
    """
