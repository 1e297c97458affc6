"""What may vary, and where to start. Data only: one module per method with `SPACE`, `PAPER` and, if found, `STREETS`.

`SPACE` maps dotted configuration keys to Optuna distributions. `PAPER` is the published setting of the same keys,
`STREETS` one that a search on the streets benchmark found, `PRESETS` those of several papers by name. Such settings to
start from are called presets.
"""

import importlib
from typing import Any

from optuna.distributions import BaseDistribution

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
