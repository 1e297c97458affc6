"""Ranges as users write them, `KEY=interval(0.1, 10)`, and what may be searched at all."""

import json
import math
import re
from typing import Any

import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from segadapt.platform.errors import UsageError
from segadapt.platform.settings.config import Values, keys, parse_value, resolve
from segadapt.platform.storage.stage_keys import stage_keys

_RANGE = re.compile(r"(interval|log_interval|choice)\((.*)\)", re.DOTALL)

_UNSEARCHED = ("data.", "warmup.", "network.", "seed", "trainer.")
"""Settings that decide what is measured, or how far a trial goes, and not how well a method does."""


def split_ranges(method: str, values: Values) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
    """Return settings that are values, and those that are ranges as Optuna's distributions.

    Args:
        method: Whose settings they are.
        values: By dotted key; a range is a text such as `log_interval(0.1, 10)` or `choice(a, b)`.

    Raises:
        UsageError: If a range is not well formed, or its setting is none that trials may differ in.
    """
    texts = {
        key: match for key, value in values.items() if isinstance(value, str) and (match := _RANGE.fullmatch(value))
    }
    ranges = {key: _distribution(method, key, match[1], match[2]) for key, match in texts.items()}
    fixed = {key: value for key, value in values.items() if key not in ranges}
    for key, distribution in ranges.items():
        ends = _ends(distribution)
        configs = [resolve(method, {**fixed, key: end}) for end in ends]
        hashes = {tuple(stage.hash for stage in stage_keys(config, "")) for config in configs}
        if key.startswith(_UNSEARCHED) or len(hashes) > 1:
            raise UsageError(
                f"A searched setting must act on the trials alone, but {key} changes what they all start from, their "
                "length or what is measured. Set it by KEY=VALUE."
            )
    return fixed, ranges


def start(distribution: BaseDistribution, value: Any) -> Any:
    """Return the point of a range that is tried first: `value` if it lies inside, otherwise the nearest or middle."""
    match distribution:
        case CategoricalDistribution(choices=choices):
            return value if value in choices else choices[0]
        case FloatDistribution(low=low, high=high, log=log) | IntDistribution(low=low, high=high, log=log):
            middle = math.sqrt(low * high) if log else (low + high) / 2
            point = min(max(value, low), high) if isinstance(value, int | float) else middle
            return round(point) if isinstance(distribution, IntDistribution) else float(point)
    raise TypeError(f"A search space must hold Optuna's distributions, but got {distribution!r}.")


def _distribution(method: str, key: str, kind: str, text: str) -> BaseDistribution:
    if key not in keys(method):
        resolve(method, {key: None})  # says which keys there are
    try:
        parts = _parts(text)
        if kind == "choice":
            if not all(part is None or isinstance(part, bool | int | float | str) for part in parts):
                raise ValueError("choices must be plain values")
            return CategoricalDistribution(parts)
        low, high = parts
        numbers = IntDistribution if _is_integer(method, key) else FloatDistribution
        return numbers(low, high, log=kind == "log_interval")
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UsageError(
            f"A range must be interval(LOW, HIGH), log_interval(LOW, HIGH) or choice(A, B, ...), but got "
            f"{key}={kind}({text}): {error}"
        ) from error


def _parts(text: str) -> list[Any]:
    """Return the values between the brackets of a range, each read as that of a setting is."""
    if any(mark in text for mark in "[{\"'"):  # commas may stand inside
        parts: list[Any] = yaml.safe_load(f"[{text}]")
        return parts
    return [parse_value(part.strip()) for part in text.split(",")]


def _is_integer(method: str, key: str) -> bool:
    return keys(method)[key].type in ("int", "int | None")


def _ends(distribution: BaseDistribution) -> list[Any]:
    match distribution:
        case CategoricalDistribution(choices=choices):
            return list(choices)
        case FloatDistribution(low=low, high=high) | IntDistribution(low=low, high=high):
            return [low, high]
    return []


def spell_range(distribution: BaseDistribution) -> str:
    """Return a searched range as a user writes it.

    Raises:
        TypeError: If it is none that can be written.
    """
    match distribution:
        case CategoricalDistribution(choices=choices):
            return f"choice({', '.join(map(_spell, choices))})"
        case FloatDistribution(low=low, high=high, log=log) | IntDistribution(low=low, high=high, log=log):
            return f"{'log_' if log else ''}interval({low}, {high})"
    raise TypeError(f"A search space must hold Optuna's distributions, but got {distribution!r}.")


def _spell(choice: Any) -> str:
    """Return a choice as a user writes it: text in quotes where it would be read as something else."""
    if isinstance(choice, str) and parse_value(choice) == choice and not re.search(r"""[\[{"',)]""", choice):
        return choice
    return json.dumps(choice)


def show_range(distribution: BaseDistribution) -> str:
    """Return a searched range as text."""
    match distribution:
        case CategoricalDistribution(choices=choices):
            return "{" + ", ".join(str(choice) for choice in choices) + "}"
        case FloatDistribution(low=low, high=high, log=log) | IntDistribution(low=low, high=high, log=log):
            return f"{low:g} to {high:g}" + (" (log)" if log else "")
    return str(distribution)
