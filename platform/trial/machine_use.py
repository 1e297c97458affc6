"""What a trial's process takes of its machine; MLflow shows it under *System metrics*, by the prefix of the names."""

import threading
import time
from types import TracebackType
from typing import Self

import psutil
import torch

_EVERY_S = 1.0
"""Between two looks at the GPU, which tells how busy it was during a part of a second."""

_MEGABYTE = 1e6


class MachineUse:
    """Measures this process, and its GPU if it has one, while the context is open."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._gpu = torch.cuda.is_available()
        self._busy: list[float] = []
        self._closed = threading.Event()
        self._since = time.monotonic(), self._cpu_s()

    def __enter__(self) -> Self:
        """Begin to look at the GPU."""
        if self._gpu:
            device = torch.cuda.current_device()  # of this thread: another one begins with the first device
            threading.Thread(target=self._watch, args=(device,), name="segadapt-gpu", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Look no more."""
        self._closed.set()

    def take(self) -> dict[str, float]:
        """Return what was used since the last call: shares in percent, 100 for one core; memory as it is now, in MB."""
        before, now = self._since, (time.monotonic(), self._cpu_s())
        self._since = now
        used = {
            "process_cpu_percentage": 100 * (now[1] - before[1]) / max(now[0] - before[0], 1e-9),
            "process_memory_megabytes": self._process.memory_info().rss / _MEGABYTE,
        }
        if self._gpu:
            used |= {
                "gpu_memory_allocated_megabytes": torch.cuda.memory_allocated() / _MEGABYTE,
                "gpu_memory_reserved_megabytes": torch.cuda.memory_reserved() / _MEGABYTE,
                "gpu_memory_peak_megabytes": torch.cuda.max_memory_allocated() / _MEGABYTE,
            }
        busy, self._busy = self._busy, []
        if busy:
            used["gpu_utilization_percentage"] = sum(busy) / len(busy)
        return {f"system/{name}": value for name, value in used.items()}

    def _cpu_s(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system

    def _watch(self, device: int) -> None:
        """Ask the driver of the GPU, which makes nothing wait for what runs there."""
        while not self._closed.wait(_EVERY_S):
            try:
                self._busy.append(float(torch.cuda.utilization(device)))
            except Exception:  # whatever NVML raises where it may not look, as in some containers
                return
