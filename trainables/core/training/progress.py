"""Sums of loss terms between two reports."""

import time
from dataclasses import dataclass, field

from torch import Tensor

from segadapt.trainables.core import distributed


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
        """Return the mean of each term over steps and workers."""
        scale = self.steps * distributed.world_size()
        return {name: float(distributed.sum_over_workers(total)) / scale for name, total in sorted(self.terms.items())}

    def pace(self, elapsed_s: float, images: int) -> dict[str, float]:
        """Return seconds per step, and images per second.

        Args:
            elapsed_s: Seconds since the last report.
            images: Images of a step.
        """
        return {"time/step": elapsed_s / self.steps, "time/images_per_second": images * self.steps / elapsed_s}
