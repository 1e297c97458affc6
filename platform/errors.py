"""Errors that a user can mend, and texts without the secrets that addresses may hold."""

import functools
import importlib.metadata
import logging
import re
from typing import ClassVar
from urllib.parse import unquote

logger = logging.getLogger(__name__)


class UsageError(Exception):
    """Something asked for cannot be done as asked; the message says what must hold, what came and what to do.

    The command line prints it without a traceback and exits with `exit_status`. Of addresses in it, secrets are left
    out.
    """

    exit_status: ClassVar[int] = 2

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class NotStartedError(UsageError):
    """Ray did not start on this machine. What was asked for is right: the same command may succeed later."""

    exit_status: ClassVar[int] = 3


_ADDRESS = re.compile(r"(?<=://)\S+")
"""What follows the scheme of an address in a text. Addresses hold no white space: `check_address` refuses others."""

_PARAMETER = re.compile("(?<=[?&;#])([^=?&;#]+)=([^&]*)")
"""A parameter of an address; its value may hold all but `&`."""

_SECRET_WORDS = ("pass", "pwd", "secret", "token", "key", "credential", "signature", "auth")
"""A parameter whose name holds one of these is a secret."""


def redacted(text: object) -> str:
    """Return a text without the secrets of the addresses in it.

    Logins are left out, whatever characters they hold, and the values of parameters that are named as secrets:
    http://me:secret@host becomes http://host, and postgresql:///db?password=secret postgresql:///db?password=***.
    """
    return _ADDRESS.sub(lambda address: _without_secrets(address[0])[0], str(text))


def holds_password(text: object) -> bool:
    """Return whether an address in a text holds a password; a name of a user alone is none."""
    return any(_without_secrets(address)[1] for address in _ADDRESS.findall(str(text)))


def check_address(name: str, address: str | None) -> None:
    """Make sure that an address is one word: what is shown of a text leaves out the secrets of such addresses alone.

    Args:
        name: Of the option.
        address: What it was given; None if it was not.

    Raises:
        UsageError: If it is empty or holds white space; the message does not show it.
    """
    if address == "":
        raise UsageError(f"{name} must be an address, but got ''. Leave it out to use the storage folder.")
    if address is not None and re.search(r"\s", address):
        raise UsageError(f"{name} must be an address without white space, but got some. Write a space as %20.")


def check_no_password(name: str, value: object) -> None:
    """Refuse a password in an address that is kept where others may read it: in records, in MLflow, in checkpoints.

    Args:
        name: Of the setting or argument.
        value: What it was given; only addresses are looked at.

    Raises:
        UsageError: If there is one; the message does not show it.
    """
    if holds_password(value):
        raise UsageError(
            f"{name} must hold no password or key, since it is kept and shown, but got one in {redacted(value)}. "
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or log in as the bucket's own programs do."
        )


def _without_secrets(address: str) -> tuple[str, bool]:
    """Return what may be shown of an address without its scheme, and whether it holds a password.

    Programs differ in where they see the end of a login that holds characters such as `/`. Here it is the last `@` of
    all, so that no reading leaves a part of it.
    """
    before, sign, after = address.rpartition("@")
    if not sign or (":" not in before and re.search("[/?&;#]", before)):  # none, or one in the path
        shown = _PARAMETER.sub(_without_value, address)
        return shown, shown != address
    begun = f"?{before.rpartition('&')[2]}"
    if _PARAMETER.sub(_without_value, begun) != begun:  # the `@` is in the value of a secret, which goes on behind it
        _, *following = after.partition("&")
        return _PARAMETER.sub(_without_value, "".join(["?***", *following])), True
    shown = _PARAMETER.sub(_without_value, after)
    return shown, shown != after or bool(before.partition(":")[2])


def _without_value(parameter: re.Match[str]) -> str:
    """Return NAME=VALUE without a value that is secret."""
    name, value = parameter.groups()
    if any(word in unquote(name).lower() for word in _SECRET_WORDS):
        return f"{name}=***"
    return f"{name}={_PARAMETER.sub(_without_value, value)}"


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
