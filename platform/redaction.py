"""Addresses may hold passwords; what is shown, logged or kept must not."""

import re

_LOGIN = re.compile(r"(?<=://)[^/\s]*@")


def redacted(text: object) -> str:
    """Return a text without the logins of the addresses in it: http://me:secret@host becomes http://host."""
    return _LOGIN.sub("", str(text))
