"""How busy a search keeps the processors of this machine, phase by phase.

    python benchmarks/busy.py [--trials 4] [--json PATH] [KEY=VALUE ...]

Counts what all programs of the machine take: let nothing else run.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from measuring import emit
from segadapt.platform.trial.environment import machine

EVERY_S = 0.2


class Samples:
    """Idle and total processor seconds of the machine over time."""

    def __init__(self) -> None:
        self.taken: list[tuple[float, float, float]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def end(self) -> None:
        """Stop sampling."""
        self._ended.set()
        self._thread.join()

    def busy(self, begin: float, end: float) -> float:
        """Return the share of the processors' time that was used between two points in time."""
        kept = [sample for sample in self.taken if begin <= sample[0] <= end]
        return 1 - (kept[-1][1] - kept[0][1]) / (kept[-1][2] - kept[0][2])

    def _sample(self) -> None:
        while not self._ended.wait(EVERY_S):
            times = psutil.cpu_times()
            self.taken.append(
                (time.monotonic(), times.idle + times.iowait, sum(times) - times.guest - times.guest_nice)
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_intermixed_args()
    samples = Samples()
    with tempfile.TemporaryDirectory() as folder:
        command = [Path(sys.executable).with_name("segadapt"), "search", "sdca", "--trials", str(arguments.trials)]
        command += arguments.settings
        try:
            printed = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
            end = time.monotonic()
        finally:
            samples.end()
    found = re.search(r"took \d+ s \((.*?)\)", printed)
    assert found is not None, printed
    seconds = {part.rsplit(" ", 1)[0]: int(part.rsplit(" ", 1)[1]) for part in found[1].split(", ")}
    begin = end - sum(seconds.values())  # what comes before is Python's start
    phases: dict[str, Any] = {}
    for part, length in seconds.items():
        if length:
            phases[part] = {"seconds": length, "busy": samples.busy(begin, begin + length)}
        begin += length
    after_start = samples.busy(end - sum(seconds.values()) + seconds["start"], end)
    emit(
        {"machine": machine(), "trials": arguments.trials, "phases": phases, "after_start": after_start}, arguments.json
    )


if __name__ == "__main__":
    main()
