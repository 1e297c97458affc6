"""How long steps take and wait for their images, without making the host wait for the device."""

import itertools
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class StepTimes:
    """Times of the steps since the last evaluation.

    On a GPU a step ends with an event in its stream, which is read at the evaluation: by then the device has passed it.

    Args:
        device: Device that the steps run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Forget the steps so far; the next one begins now."""
        self._marks = [self._mark()]
        self._began = time.perf_counter()
        self._waited_s = 0.0

    def step_ended(self) -> None:
        """Note the end of a step."""
        self._marks.append(self._mark())

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield batches, and add up how long the host waits for them."""
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited_s += time.perf_counter() - began
            yield batch

    def summary(self) -> dict[str, float]:
        """Return median and 95th percentile of the steps' times in ms, and the share of the time that data took.

        Call it when the device has done the steps.
        """
        if len(self._marks) < 2:
            return {}
        share = self._waited_s / (time.perf_counter() - self._began)
        times = sorted(self._between(*pair) for pair in itertools.pairwise(self._marks))
        return {
            "time/step_median_ms": statistics.median(times),
            "time/step_p95_ms": times[math.ceil(0.95 * len(times)) - 1],
            "time/data_wait_share": share,
        }

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _between(self, first: Any, second: Any) -> float:
        """Return milliseconds."""
        if not self._cuda:
            return float(1e3 * (second - first))
        second.synchronize()  # it has been passed
        return float(first.elapsed_time(second))
