"""Target mIoU of PLCA on streets as a formula: what searches are compared on without training anything.

Fitted by `fit.py` to the real trials in `trials.jsonl` (made by `collect.py`); `surrogate.json` holds its coefficients.
A Gaussian process's mean for each evaluation step, over the search space mapped to the unit cube, and the spread over
seeds. It needs NumPy alone.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE = Path(__file__).with_name("surrogate.json")

Array = NDArray[np.float64]


def unit_point(values: Mapping[str, Any], space: Mapping[str, Mapping[str, Any]]) -> Array:
    """Return settings as a point of the unit cube, (D,), in the order of `space`.

    Args:
        values: By dotted key.
        space: Of each key `low`, `high` and `log`; of a choice between two, `choices`.
    """
    point = []
    for key, range_ in space.items():
        value = values[key]
        if "choices" in range_:
            point.append(float(range_["choices"].index(value)))
            continue
        low, high, value = range_["low"], range_["high"], float(value)
        if range_["log"]:
            low, high, value = np.log(low), np.log(high), np.log(value)
        point.append((value - low) / (high - low))
    return np.array(point)


def matern(left: Array, right: Array, lengths: Array) -> Array:
    """Return Matérn-5/2 covariances, (N, M), of points (N, D) and (M, D) at length scales (D,)."""
    difference = (left[:, None, :] - right[None, :, :]) / lengths
    distance = np.sqrt(5 * (difference**2).sum(-1))
    return (1 + distance + distance**2 / 3) * np.exp(-distance)


class Surrogate:
    """Curves of target mIoU by settings.

    Args:
        path: Of the coefficients.
    """

    def __init__(self, path: Path = FILE) -> None:
        content = json.loads(path.read_text())
        self.method: str = content["method"]
        self.space: dict[str, dict[str, Any]] = content["space"]
        self.steps: list[int] = content["steps"]
        """Training steps of the evaluations, rising."""
        self._points = np.array(content["points"])  # (N, D)
        self._lengths = np.array(content["lengths"])  # (D,)
        self._mean = np.array(content["mean"])  # (T,)
        self._coefficients = np.array(content["coefficients"])  # (N, T)
        self._noise = np.linalg.cholesky(np.array(content["noise"]))  # (T, T)

    def curve(self, values: Mapping[str, Any]) -> Array:
        """Return the expected target mIoU at each of `steps`, (T,), in [0, 1]."""
        point = unit_point(values, self.space)[None]
        curve = self._mean + matern(point, self._points, self._lengths)[0] @ self._coefficients
        return np.clip(curve, 0.0, 1.0)

    def final(self, values: Mapping[str, Any]) -> float:
        """Return the expected target mIoU at the end of a trial."""
        return float(self.curve(values)[-1])

    def noisy_curve(self, values: Mapping[str, Any], seed: int) -> Array:
        """Return what one training with this seed would report at each of `steps`, (T,), in [0, 1]."""
        digest = hashlib.sha256(repr([seed, sorted(values.items())]).encode()).digest()
        draw = np.random.default_rng(int.from_bytes(digest[:8], "big")).standard_normal(len(self.steps))
        return np.clip(self.curve(values) + self._noise @ draw, 0.0, 1.0)
