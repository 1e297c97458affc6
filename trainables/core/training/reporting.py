"""What leaves the trainer at an evaluation: metrics, and the function that writes a checkpoint."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from segadapt.trainables.core import distributed

Report = Callable[[dict[str, Any], Callable[[Path], None] | None], None]
"""Receives the metrics of an evaluation and, on the first worker, a function that writes the checkpoint to a folder."""


class NonFiniteLossError(ArithmeticError):
    """A loss term or the network's predictions became NaN or infinite; the trial cannot recover."""


@dataclass
class Progress:
    """Sums since the last report; kept on the device, so that steps need not wait for it."""

    terms: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add the terms of a step."""
        for name, value in terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + value
        self.steps += 1

    def losses(self) -> dict[str, float]:
        """Mean of each term over steps and workers."""
        scale = self.steps * distributed.world_size()
        return {name: float(distributed.sum_over_workers(total)) / scale for name, total in sorted(self.terms.items())}
