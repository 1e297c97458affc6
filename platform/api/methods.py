"""The methods and their settings."""

from typing import TYPE_CHECKING, Any

from segadapt.platform.experiment.candidates import space_of
from segadapt.platform.search.ranges import show_range
from segadapt.platform.settings.config import Key, keys, resolve
from segadapt.trainables import METHODS

if TYPE_CHECKING:
    pass


def list_methods() -> list[tuple[str, str]]:
    """Return name and one-line description of every method."""
    return [(method.name, (method.__doc__ or "").strip().splitlines()[0]) for method in METHODS]


def describe(method: str) -> list[tuple[Key, str, dict[str, Any]]]:
    """Return every setting of a method with its searched range as text, and its value in each preset that has one."""
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
