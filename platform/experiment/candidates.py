"""What a search tries of each method: the settings that it fixes, the space that it searches, and where it begins."""

from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution

from segadapt import search_spaces
from segadapt.platform.errors import UsageError
from segadapt.platform.experiment.record import Candidate, Record
from segadapt.platform.search.ranges import spell_range, split_ranges, start
from segadapt.platform.settings.config import Values, anchored, keys, resolve
from segadapt.trainables import METHODS
from segadapt.trainables.core.data.datasets import packed_size
from segadapt.trainables.source_only import SourceOnly

_SIZES = {"data.source": "augmentation.source_size", "data.target": "augmentation.target_size"}
"""Settings of the size of a domain's images, by the setting that names the domain's data."""


def new_candidates(methods: Sequence[str], values: Values, preset: str) -> dict[str, Candidate]:
    """Return what a new search tries."""
    expanded = _expanded(_methods(methods), values)
    return {method: _candidate(method, settings, preset) for method, settings in expanded.items()}


def forked_candidates(parent: Record, values: Values) -> dict[str, Candidate]:
    """Return what a search tries that begins as an earlier one: with its settings and ranges, some of them changed."""
    expanded = _expanded(list(parent.candidates), values)
    forked = {}
    for method, before in parent.candidates.items():
        fixed, ranges = split_ranges(method, expanded[method])
        space = {key: ranges.get(key, range_) for key, range_ in {**before.space, **ranges}.items() if key not in fixed}
        inherited = _without_packed_sizes(before.fixed, fixed)
        settings = {**inherited, **before.first, **fixed}
        first = {key: start(space[key], settings.get(key, keys(method)[key].default)) for key in space}
        fixed = {key: value for key, value in {**inherited, **fixed}.items() if key not in space}
        forked[method] = Candidate(fixed, space, first)
    return forked


def _methods(names: Sequence[str]) -> list[str]:
    """Return the methods of a search, each once."""
    if not names:
        raise UsageError("METHOD must be given, or --resume NAME. `segadapt list` shows the methods.")
    methods = list(dict.fromkeys(names))
    if methods == ["all"]:
        methods = [method.name for method in METHODS if method is not SourceOnly]
    for name in methods:
        resolve(name, {})
    if SourceOnly.name in methods and len(methods) > 1:
        raise UsageError(
            f"{SourceOnly.name} must be searched alone, since the other methods start from it, but got "
            f"{', '.join(methods)}. Leave it out: its score is shown with every search."
        )
    return methods


def _expanded(methods: Sequence[str], values: Values) -> dict[str, dict[str, Any]]:
    """Return the settings of each method: those that name it (`sdca.method.temperature`) and those that name none."""
    expanded: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for key, value in values.items():
        prefix, _, rest = key.partition(".")
        if prefix in expanded:
            expanded[prefix][rest] = value
    for key, value in values.items():
        if key.partition(".")[0] not in expanded:
            for settings in expanded.values():
                settings.setdefault(key, value)
    return {method: with_packed_sizes(anchored(settings)) for method, settings in expanded.items()}


def with_packed_sizes(values: Values) -> dict[str, Any]:
    """Return the settings with the size of packed training images, where no other is given for the domain.

    Without it, training would see images of the packed size, and evaluation and label-free scores those of the
    validation split, which is packed at its full size.
    """
    sizes = {key: packed_size(values.get(data)) for data, key in _SIZES.items() if key not in values}
    return {**values, **{key: list(size) for key, size in sizes.items() if size is not None}}


def _without_packed_sizes(fixed: Values, values: Values) -> dict[str, Any]:
    """Return the settings of an earlier search without sizes that followed from packed data which `values` replace."""
    followed = {
        key
        for data, key in _SIZES.items()
        if data in values and fixed.get(key) == _as_list(packed_size(fixed.get(data)))
    }
    return {key: value for key, value in fixed.items() if key not in followed}


def _as_list(size: Sequence[int] | None) -> list[int] | None:
    return None if size is None else list(size)


def _candidate(method: str, values: Values, preset: str) -> Candidate:
    """Return what a search tries of a method: everything searched that no setting fixes, starting at a preset."""
    space, presets = space_of(method)
    usual = {key: spell_range(range_) for key, range_ in space.items()}  # may be asked for, wherever the setting acts
    others = {key: value for key, value in values.items() if key not in usual or value != usual[key]}
    fixed_by_user, ranges = split_ranges(method, others)
    space = {**space, **ranges}
    settings = {**presets[search_spaces.DEFAULT_PRESET], **preset_settings(method, preset)}
    free = {key: distribution for key, distribution in space.items() if key not in fixed_by_user}
    fixed = {key: value for key, value in settings.items() if key not in space}
    first = {key: start(free[key], settings.get(key, keys(method)[key].default)) for key in free}
    return Candidate({**fixed, **fixed_by_user}, free, first)


def space_of(method: str) -> tuple[dict[str, BaseDistribution], dict[str, dict[str, Any]]]:
    """Return what a search of a method varies, and its presets.

    Raises:
        UsageError: If there is no such method.
    """
    try:
        return search_spaces.load(method)
    except ValueError as error:
        raise UsageError(str(error)) from error


def preset_settings(method: str, name: str) -> dict[str, Any]:
    """Return the settings of a method's preset.

    Raises:
        UsageError: If the method has no such preset.
    """
    presets = space_of(method)[1]
    if name not in presets:
        raise UsageError(f"--preset of {method} must be one of {', '.join(presets)}, but got {name!r}.")
    return presets[name]
