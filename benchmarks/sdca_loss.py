"""Time and peak memory of SDCA's losses and statistics: the exact cheap form against the literal one.

One training step's worth of work without a network: both levels (features, logits) and both domains, statistics,
forward and backward, on one thread. Each form runs in a fresh process, so that its peak memory is its own.

    python benchmarks/sdca_loss.py --json benchmarks/results/sdca_loss.json
"""

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from literal import sdca as literal
from measuring import Row, compare, first_step, time_steps
from segadapt.trainables.core.losses.distribution_contrast import distribution_contrast
from segadapt.trainables.core.state.class_statistics import ClassStatistics

LEVELS = ("features", "logits")
DOMAINS = ("source", "target")

Maps = dict[tuple[str, str], Tensor]
"""Representations (B, D, H, W) by level and domain."""


def make_inputs(setting: dict[str, Any]) -> tuple[Maps, dict[str, Tensor]]:
    """Return representations and labels by domain: all source and half of the target labelled."""
    torch.manual_seed(0)
    batch, (rows, columns) = setting["batch"], setting["grid"]
    sizes = {"features": setting["channels"], "logits": setting["classes"]}
    maps = {
        (level, domain): torch.randn(batch, sizes[level], rows, columns).relu_().requires_grad_()
        for level in LEVELS
        for domain in DOMAINS
    }
    labels = {domain: torch.randint(0, setting["classes"], (batch, rows, columns)) for domain in DOMAINS}
    labels["target"][:, ::2] = 255
    return maps, labels


def cheap_step(setting: dict[str, Any], maps: Maps, labels: dict[str, Tensor]) -> Callable[[], Tensor]:
    states = {
        "features": ClassStatistics(setting["classes"], setting["channels"]),
        "logits": ClassStatistics(setting["classes"], setting["classes"]),
    }

    def step() -> Tensor:
        loss = torch.zeros(())
        for level, state in states.items():
            state.update(maps[level, "source"], labels["source"])
            for domain in DOMAINS:
                loss = loss + distribution_contrast(maps[level, domain], labels[domain], state.mean, state.variance)
        loss.backward()
        return loss.detach()

    return step


def literal_step(setting: dict[str, Any], maps: Maps, labels: dict[str, Tensor]) -> Callable[[], Tensor]:
    classes = setting["classes"]
    states = {
        level: (torch.zeros(classes), torch.zeros(classes, channels), torch.zeros(classes, channels))
        for level, channels in (("features", setting["channels"]), ("logits", classes))
    }

    def step() -> Tensor:
        loss = torch.zeros(())
        for level in LEVELS:
            states[level] = literal.merge_statistics(maps[level, "source"], labels["source"], *states[level])
            for domain in DOMAINS:
                loss = loss + literal.distribution_contrast(maps[level, domain], labels[domain], *states[level][1:])
        loss.backward()
        return loss.detach()

    return step


def measure(form: str, setting: dict[str, Any]) -> Row:
    """Return the first step's loss and memory, and wall and processor times of the others, after a tiny step."""
    make_step = {"cheap": cheap_step, "literal": literal_step}[form]
    tiny = {**setting, "grid": (3, 3), "channels": 8}
    make_step(tiny, *make_inputs(tiny))()
    maps, labels = make_inputs(setting)
    step = make_step(setting, maps, labels)
    first = first_step(step)
    seconds, cpu_seconds = time_steps(step, maps.values(), setting["repeats"])
    return {**first, "median_s": median(seconds), "median_cpu_s": median(cpu_seconds), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure SDCA's losses and statistics, cheap form against literal.")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--grid", type=int, nargs=2, default=[65, 129], metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--repeats", type=int, default=5)
    compare(parser, measure)


if __name__ == "__main__":
    main()
