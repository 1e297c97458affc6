"""The methods and their settings."""

from typing import Any

from segadapt.platform.experiment.candidates import space_of
from segadapt.platform.search.ranges import show_range
from segadapt.platform.settings.config import Key, keys, resolve
from segadapt.trainables import METHODS


def list_methods() -> list[tuple[str, str]]:
    """Return name and one-line description of every method.

    Example:
        >>> import segadapt
        >>> [name for name, description in segadapt.list_methods()]
        ['source_only', 'self_training', 'sdca', ...]
    """
    return [(method.name, (method.__doc__ or "").strip().splitlines()[0]) for method in METHODS]


def describe(method: str) -> list[tuple[Key, str, dict[str, Any]]]:
    """Return every setting of a method.

    Args:
        method: Name of the method, as `list_methods` returns it.

    Returns:
        One entry per setting: its key (dotted name, type, default, meaning); the searched range as text, empty if a
        search leaves the setting alone; and its value in each preset that has one.

    Raises:
        UsageError: If there is no such method.

    Example:
        >>> import segadapt
        >>> for key, searched, presets in segadapt.describe("sdca"):
        ...     if key.name == "method.temperature":
        ...         print(key.type, "|", searched, "|", presets["paper"])
        float | 0.3 to 100 (log) | 100.0
    """
    resolve(method, {})
    space, presets = space_of(method)
    return [
        (
            key,
            show_range(space[key.name]) if key.name in space else "",
            {name: values[key.name] for name, values in presets.items() if key.name in values},
        )
        for key in keys(method).values()
    ]
