"""Commands of segadapt as a shell takes them, for a person to paste."""

import os
import shlex
from pathlib import Path

from segadapt.platform.errors import redacted
from segadapt.platform.storage.folders import HERE, Place

_WITHOUT_STORAGE = ("list", "describe", "data", "submit", "jobs", "stop")
"""Commands that look into no storage folder."""

_WITHOUT_TRACKING = (*_WITHOUT_STORAGE, "plan", "ui", "cache")
"""Commands that ask no MLflow server."""

_WITH_STUDY = ("search", "status", "report", "doctor")
"""Commands that read studies."""


def command_line(command: str, *words: object, place: Place = HERE) -> str:
    """Return a command of segadapt, quoted for a shell, begun as this one was.

    Secrets of addresses are left out, as in all that is shown.

    Args:
        command: Its name.
        words: What follows it.
        place: Where its experiment is kept and tracked; options name what is not as by default.
    """
    parts = [command, *(redacted(word) for word in words)]
    if command not in _WITHOUT_STORAGE and Path(place.storage) != Path(HERE.storage):
        parts += ["--storage", str(place.storage)]
    if command not in _WITHOUT_TRACKING and place.tracking_uri is not None:
        parts += ["--tracking-uri", redacted(place.tracking_uri)]
    if command in _WITH_STUDY and place.study_uri is not None:
        parts += ["--study-uri", redacted(place.study_uri)]
    return shlex.join([*_program(), *parts])


def _program() -> list[str]:
    """Return how this command was called: uv finds it where no shell does."""
    return ["uv", "run", "segadapt"] if "UV_RUN_RECURSION_DEPTH" in os.environ else ["segadapt"]
