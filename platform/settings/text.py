"""Numbers, sizes, durations and errors as people read them."""

import json
from pathlib import Path

from segadapt.platform.errors import redacted

_ROUGH = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
"""Seconds of a unit, and its name."""


def path_of(text: str) -> Path:
    """Return the path that a user wrote, `~` and `~USER` replaced by that user's home; any other `~` is a name."""
    path = Path(text)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def number_text(value: float | None) -> str:
    """Return a metric with three decimals; `-` for None."""
    return "-" if value is None else f"{value:.3f}"


def short_text(text: str, digits: int = 3) -> str:
    """Return a text that is a number with so many significant digits, and any other as it is."""
    try:
        return f"{float(text):.{digits}g}"
    except ValueError:
        return text


def setting_text(value: object) -> str:
    """Return the value of a setting as it is written after KEY=."""
    return value if isinstance(value, str) else json.dumps(value)


def size_text(count: int) -> str:
    """Return a number of bytes in a binary unit."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def duration_text(seconds: float) -> str:
    """Return a time span in its largest fitting unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def span_text(fewest_s: float, most_s: float) -> str:
    """Return a time span that is roughly known, both ends in the unit of the larger."""
    size, unit = _rough_unit(most_s)
    fewest, most = (f"{seconds / size:.0f}" for seconds in (fewest_s, most_s))
    return f"about {most} {unit}" if fewest == most else f"{fewest} to {most} {unit}"


def rough_text(seconds: float) -> str:
    """Return a time span as a whole number of its unit."""
    size, unit = _rough_unit(seconds)
    return f"{seconds / size:.0f} {unit}"


def _rough_unit(seconds: float) -> tuple[int, str]:
    return next((size, unit) for size, unit in _ROUGH if seconds >= 1.5 * size or size == 1)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without logins."""
    return redacted(str(error).strip() or type(error).__name__).splitlines()[0]
