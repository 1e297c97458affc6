"""What may vary, and what each paper used. Data only: one module per method with `SPACE` and `PAPER`.

`SPACE` maps dotted configuration keys to Optuna distributions; `PAPER` is the published setting of the same keys.
"""

import importlib
from typing import Any

from optuna.distributions import BaseDistribution


def load(method: str) -> tuple[dict[str, BaseDistribution], dict[str, Any]]:
    """Return the space and the published setting of a method.

    Raises:
        ValueError: If the method has no search space.
    """
    try:
        module = importlib.import_module(f"{__name__}.{method}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"A searched method must have a search space, but {method!r} has none. Use `segadapt train {method}`."
        ) from error
    return dict(module.SPACE), dict(module.PAPER)
