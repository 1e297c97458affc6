"""A planned search as an experiment file, which `--config` reads."""

from collections.abc import Mapping
from typing import Any

import yaml

from segadapt.platform.experiment.record import Record
from segadapt.platform.search.ranges import spell_range
from segadapt.platform.settings.config import flatten


def experiment_file(record: Record) -> str:
    """Return all settings of a search as YAML, those that are searched as their ranges.

    What several methods have in common is written once; what differs lies below the name of its method.
    """
    by_method = {method: _settings(record, method) for method in record.candidates}
    first, *others = by_method.values()
    shared = {key for key in first if all(key in each and each[key] == first[key] for each in others)}
    content: dict[str, Any] = {}
    for key, value in first.items():
        if key in shared:
            _put(content, key, value)
    for method, settings in by_method.items():
        for key, value in settings.items():
            if key not in shared:
                _put(content, f"{method}.{key}", value)
    return yaml.safe_dump(content, sort_keys=False)


def _settings(record: Record, method: str) -> Mapping[str, Any]:
    """Return the settings of a method's trials by dotted key, ranges as they are written."""
    content = record.configs[method].as_dict()
    del content["method_name"]
    ranges = {key: spell_range(range_) for key, range_ in record.candidates[method].space.items()}
    return {**dict(flatten(content)), **ranges}


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    """Put a value below the parts of its dotted key."""
    *sections, name = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
    content[name] = value
