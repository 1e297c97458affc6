"""What may vary, and where to start. Data only: one module per method with `SPACE`, `PAPER` and, if found, `STREETS`.

`SPACE` maps dotted configuration keys to Optuna distributions. `PAPER` is the published setting of the same keys,
`STREETS` one that a search on the streets benchmark found, `PRESETS` those of several papers by name. Such settings to
start from are called presets. `CONFIDENCE` says of each key how sure its published value is: `high` where the paper or
its code states it, `medium` where it was stated for another method or depends on the network, `low` where it is ours.
"""

import importlib
from typing import Any, Literal

from optuna.distributions import BaseDistribution

Confidence = Literal["low", "medium", "high"]

DEFAULT_CONFIDENCE: Confidence = "medium"
"""Confidence in the default of a setting that is searched though its method's space leaves it out."""

DEFAULT_PRESET = "paper"

QUICK: dict[str, Any] = {"warmup.steps": 60, "trainer.steps": 40, "trainer.eval_every": 20}
"""A look at a method on streets within half a minute: too short to judge it."""


def load(method: str) -> tuple[dict[str, BaseDistribution], dict[str, dict[str, Any]]]:
    """Return the space of a method and its presets by name, the published setting first.

    Raises:
        ValueError: If the method has no search space.
    """
    try:
        module = importlib.import_module(f"{__name__}.{method}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"A searched method must have a search space, but {method!r} has none. Use `segadapt train {method}`."
        ) from error
    presets = {DEFAULT_PRESET: dict(module.PAPER), "quick": dict(QUICK)}
    if hasattr(module, "STREETS"):
        presets["streets"] = dict(module.STREETS)
    presets |= {name: dict(settings) for name, settings in getattr(module, "PRESETS", {}).items()}
    return dict(module.SPACE), presets


def confidence(method: str) -> dict[str, Confidence]:
    """Return how sure the published value of each setting in a method's space is."""
    stated: dict[str, Confidence] = importlib.import_module(f"{__name__}.{method}").CONFIDENCE
    return dict(stated)
