"""What it costs how threads wait for each other: training steps of one process, alone and beside busy programs.

    python benchmarks/threads.py [--others 8] [--turns 3] [--waits sleep ...] [--steps 16] [--json PATH]

Source-only steps on streets_v1 at its default size, median of so many, on one thread and on one for each core. Threads
of torch (OpenMP's, by GNU) may spin for a while before they sleep: `sleep` has them sleep at once
(OMP_WAIT_POLICY=PASSIVE), `spin briefly` is what trials run with (GOMP_SPINCOUNT=10000), `spin` the library's default.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measuring import cpu_model, emit
from segadapt.platform.trial.environment import machine

TRAINING = """
import sys, tempfile
from pathlib import Path
import torch
from segadapt.platform.settings.config import resolve
from segadapt.platform.trial.training import build_method
from segadapt.trainables import method_class
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.training.config import TrainerSettings
from segadapt.trainables.core.training.trainer import Trainer

torch.set_num_threads(int(sys.argv[1]))
steps = int(sys.argv[2])
config = resolve("source_only", {"warmup.steps": steps, "trainer.eval_every": steps, "data.streets.edition": 1,
                                 "data.streets.train_images": 32, "data.streets.val_images": 4})
data, evaluation = load_data(config.data)
method = build_method(config, len(data.classes))
plan = method_class("source_only").plan(config.method)
parts = TrainerSettings(config.trainer, config.optimizer, config.augmentation, config.seed)
report = lambda metrics, write: print(metrics["time/step_median_ms"])
with tempfile.TemporaryDirectory() as folder:
    Trainer(method, plan, data, evaluation, parts, report, Path(folder)).run()
"""
WAITS = {"sleep": {"OMP_WAIT_POLICY": "PASSIVE"}, "spin briefly": {"GOMP_SPINCOUNT": "10000"}, "spin": {}}
CORES = os.cpu_count() or 1


def step_ms(wait: str, threads: int, steps: int) -> float:
    """Return the median milliseconds of so many steps in a fresh process."""
    plain = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", TRAINING, str(threads), str(steps)]
    done = subprocess.run(command, env=plain | WAITS[wait], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


@contextmanager
def beside(others: int) -> Iterator[None]:
    """Run so many programs meanwhile that never wait."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
    try:
        yield
    finally:
        for program in busy:
            program.kill()
            program.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--waits", nargs="+", choices=WAITS, default=list(WAITS))
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: dict[str, list[float]] = {}
    for _ in range(arguments.turns):
        for others in (0, arguments.others):
            with beside(others):
                for wait in arguments.waits:
                    for threads in (1, CORES) if others == 0 else (CORES,):
                        name = f"{others} others, {threads} threads, {wait}"
                        rows.setdefault(name, []).append(step_ms(wait, threads, arguments.steps))
                        print(f"{name:<40}{rows[name][-1]:>10.1f} ms", flush=True)
    medians = {name: statistics.median(values) for name, values in rows.items()}
    emit({"machine": machine(), "cpu": cpu_model(), "step_ms": rows, "medians": medians}, arguments.json)


if __name__ == "__main__":
    main()
