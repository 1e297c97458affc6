"""Data-parallel workers: what they exchange, how much of it is hidden, and how throughput scales.

    python benchmarks/scaling.py [--methods sdca ...] [--network compact] [--workers 2] [--json PATH]

Runs the last stage of a method on this machine's processors, one thread per worker, gloo over loopback: alone on a
batch, and with several workers on as many batches joined, in turns. Of a step with several workers it counts

* gradients: the bytes of each bucket that is averaged, and when it was ready, as a share of the backward pass;
* statistics: the bytes and calls in which losses and state add up over workers, none of which is hidden.

Prediction for N workers that are joined by B bytes per second each, rings as NCCL and gloo build them: an exchange of S
bytes takes 2 (N - 1) / N * S / B. A bucket's begins when it is ready and the one before has ended; what ends after the
backward pass is waited for, and so are all statistics. The prediction for this machine, with B measured on a large
exchange, stands beside what was measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from measuring import parse, write_record
from segadapt.trainables.core.networks import base_lr
from segadapt.trainables.core.training.config import OptimizerConfig, TrainerConfig, TrainerSettings
from step import MEASURED, Clock, MeasuredTrainer, build, pseudo_label, streets_world, write_checkpoint

LARGE = 25_000_000  # values in the exchange that gives the bandwidth
SAID = (1e9, 10e9, 100e9)
"""Bandwidths in bytes per second that the table predicts for."""


class WallClock(Clock):
    """Wall time: waiting for other workers counts."""

    def mark(self) -> float:
        """Return this point."""
        return time.perf_counter()

    now = mark


class Exchanges:
    """What one worker gives to others in a step."""

    def __init__(self) -> None:
        self.buckets: list[tuple[int, float]] = []
        self.statistics: list[int] = []
        self.began = self.ended = 0.0
        self._within_gradients = False

    def watch(self) -> None:
        """Count all that passes through `torch.distributed` from now on."""
        for name in ("all_reduce", "all_gather"):
            setattr(dist, name, self._counted(getattr(dist, name)))

    def hook(self, group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Average a bucket as DDP does, and note its size and when it was ready."""
        self.buckets.append((bucket.buffer().nbytes, time.perf_counter()))
        self._within_gradients = True
        future = allreduce_hook(group, bucket)
        self._within_gradients = False
        return future

    def step(self) -> dict[str, Any]:
        """Return what the last step exchanged."""
        length = self.ended - self.began
        return {
            "gradient_bytes": [size for size, _ in self.buckets],
            "ready": [min(1.0, (at - self.began) / length) for _, at in self.buckets],
            "backward_s": length,
            "statistics_bytes": sum(self.statistics),
            "statistics_calls": len(self.statistics),
        }

    def _counted(self, exchange: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensors: Any, *rest: Any, **options: Any) -> Any:
            if not self._within_gradients:
                given = tensors if isinstance(tensors, Tensor) else tensors[0]
                self.statistics.append(given.nbytes)
            return exchange(tensors, *rest, **options)

        return counted


class WatchedTrainer(MeasuredTrainer):
    """Notes what a step exchanges, and when its backward pass begins and ends."""

    exchanges: Exchanges
    clock_type = WallClock

    def parallel(self) -> nn.Module:
        """Watch what the wrapped method exchanges, and when its forward pass ends."""
        wrapped = super().parallel()
        wrapped.register_forward_hook(self._begin_backward)
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.register_comm_hook(None, self.exchanges.hook)
        return wrapped

    def step(self, *arguments: Any) -> dict[str, Tensor] | None:
        """Note what this step exchanges, and when its passes have ended."""
        self.exchanges.buckets.clear()
        self.exchanges.statistics.clear()
        terms = super().step(*arguments)
        self.exchanges.ended = time.perf_counter()
        return terms

    def _begin_backward(self, *_: Any) -> None:
        self.exchanges.began = time.perf_counter()


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """Be one worker; returns the seconds of a step in each turn and, of several workers, what a step exchanges."""
    torch.set_num_threads(1)
    workers, folder = arguments.world, Path(arguments.folder)
    exchanges = Exchanges()
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", world_size=workers, rank=arguments.rank)
        exchanges.watch()
    world = streets_world(folder / str(arguments.rank))
    classes = len(world.data.classes)
    method, stage = build(arguments.methods[0], arguments.network, classes, literal=False, freeze_norm=False)
    settings = TrainerSettings(
        trainer=TrainerConfig(batch_size=arguments.batch_size * workers),
        optimizer=OptimizerConfig(lr=base_lr(arguments.network) * 0.01),  # as in step.py: the weights are random
        augmentation=world.augmentation,
        seed=0,
    )
    trainer = WatchedTrainer(
        method, (stage,), world.data, world.evaluation, settings, write_checkpoint, folder, device=torch.device("cpu")
    )
    trainer.pseudo_label = pseudo_label(world)
    trainer.exchanges = exchanges
    trainer.take(1)
    found: dict[str, Any] = {"step_s": [], "images": arguments.batch_size * workers * len(stage.domains)}
    for _ in sys.stdin:  # each line asks for a turn
        found["step_s"].append(trainer.take(arguments.steps) / arguments.steps)
        print("done", flush=True)
    if workers > 1:
        found |= exchanges.step() | {"bytes_per_s": bandwidth(workers)}
        dist.barrier()
        dist.destroy_process_group()
    return found


def bandwidth(workers: int) -> float:
    """Return the bytes per second that join the workers, by a large exchange; the median of five."""
    large, seconds = torch.zeros(LARGE), []
    for _ in range(6):
        begin = time.perf_counter()
        dist.all_reduce(large)
        seconds.append(time.perf_counter() - begin)
    return 2 * (workers - 1) / workers * large.nbytes / statistics.median(seconds[1:])


def predicted_wait(row: dict[str, Any], workers: int, bytes_per_s: float) -> float:
    """Return the seconds of a step in which a worker waits for exchanges between so many workers."""
    pace = 2 * (workers - 1) / workers / bytes_per_s
    end = 0.0
    for size, ready in zip(row["gradient_bytes"], row["ready"], strict=True):
        end = max(end, ready * row["backward_s"]) + pace * size
    return max(0.0, end - row["backward_s"]) + pace * row["statistics_bytes"]


class Workers:
    """Processes that train together when asked."""

    def __init__(self, method: str, count: int, folder: str) -> None:
        command = [sys.executable, *sys.argv, "--methods", method, "--world", str(count), "--folder", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen(
                [*command, "--rank", str(rank)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(count)
        ]

    def turn(self) -> None:
        """Let all take a turn, and wait for them."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("turn\n")
            process.stdin.flush()
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "done\n"

    def end(self) -> dict[str, Any]:
        """End them; returns what the first one found."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        answers = []
        for process in self.processes:
            assert process.stdout is not None
            answers.append(process.stdout.read())
            process.wait()
        found: dict[str, Any] = json.loads(answers[0])
        return found


def measure(method: str, workers: int, rounds: int) -> dict[str, Any]:
    """Return what one worker and several of them took and exchanged, in turns."""
    with tempfile.TemporaryDirectory() as alone, tempfile.TemporaryDirectory() as together:
        both = [Workers(method, 1, alone), Workers(method, workers, together)]
        for _ in range(rounds):
            for group in both:
                group.turn()
        one, several = (group.end() for group in both)
    ratios = sorted(workers * first / second for first, second in zip(one["step_s"], several["step_s"], strict=True))
    step = statistics.median(one["step_s"])
    wait = predicted_wait(several, workers, several["bytes_per_s"])
    exchanged = sum(several["gradient_bytes"]) + several["statistics_bytes"]
    return {
        **several,
        "one_worker_step_s": one["step_s"],
        "speed_up": ratios,
        "predicted_speed_up": workers * step / (step + wait),
        "predicted_wait_s": {
            f"{count} workers, {said / 1e9:g} GB/s": predicted_wait(several, count, said)
            for count in (2, 8)
            for said in SAID
        },
        "exchanged_bytes": exchanged,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=MEASURED, default=MEASURED)
    parser.add_argument("--network", default="compact")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8, help="images per domain and worker")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    for hidden, kind in (("--world", int), ("--rank", int), ("--folder", str)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    arguments, setting = parse(parser)
    if arguments.world:
        print(json.dumps(work(arguments)))
        return
    results = {}
    for method in arguments.methods:
        row = results[method] = measure(method, arguments.workers, arguments.rounds)
        ratios = row["speed_up"]
        print(
            f"{method:<12} gradients {sum(row['gradient_bytes']) / 1e6:8.2f} MB in {len(row['gradient_bytes'])}, "
            f"statistics {row['statistics_bytes'] / 1e6:7.3f} MB in {row['statistics_calls']}, "
            f"{statistics.median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f}), "
            f"predicted {row['predicted_speed_up']:.2f}",
            flush=True,
        )
        write_record(arguments.json, setting, results=results)


if __name__ == "__main__":
    main()
