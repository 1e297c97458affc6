"""Time and peak memory of PLCA's association losses: the exact cheap form against the literal one.

One training step's worth of work without a network: aggregation, both hops, forward and backward, on one thread, for
each level alone and for both. Each measurement runs in a fresh process, so that its peak memory is its own.

    python benchmarks/plca_loss.py --json benchmarks/results/plca_loss.json
"""

import argparse
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor

from literal import plca as literal
from measuring import Row, compare_parts, first_step, time_steps
from segadapt.trainables.core.losses import cycle_association

DOMAINS = ("source", "target")
LEVELS = {"features": ("features",), "output": ("output",), "both": ("features", "output")}


def make_inputs(level: str, setting: dict[str, Any]) -> tuple[dict[tuple[str, str], Tensor], Tensor]:
    """Return the level's representations by (name, domain) and source labels, 5 % ignored.

    Both domains draw pixels around the same class centres, so that most cycles return to their class: the case that
    costs the most. Written a row of pixels at a time, so that the peak memory so far is that of the result.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (setting["images"], *setting["grid"])
    labels = {domain: torch.randint(0, setting["classes"], shape, generator=generator) for domain in DOMAINS}
    sizes = {"features": setting["channels"], "output": setting["classes"]}
    maps = {}
    for name in LEVELS[level]:
        centers = torch.randn(setting["classes"], sizes[name], generator=generator)
        for domain in DOMAINS:
            values = torch.empty(shape[0], sizes[name], *shape[1:])
            for image, own_labels in zip(values, labels[domain], strict=True):
                for row, row_labels in enumerate(own_labels):
                    noise = torch.randn(sizes[name], shape[2], generator=generator)
                    image[:, row] = noise + 3.0 * centers[row_labels].T
            maps[name, domain] = (values.relu_() if name == "features" else values).requires_grad_()
    ignored = torch.rand(shape, generator=generator) < 0.05
    return maps, labels["source"].masked_fill(ignored, 255)


def measure(form: str, setting: dict[str, Any], level: str) -> Row:
    """Return the first step's loss and memory, and processor times of all steps: the first is too long to waste."""
    module = {"cheap": cycle_association, "literal": literal}[form]
    losses = {"features": module.feature_association, "output": module.output_association}
    maps, labels = make_inputs(level, setting)

    def step() -> Tensor:
        loss = torch.stack([losses[name](maps[name, "source"], maps[name, "target"], labels) for name in LEVELS[level]])
        loss.sum().backward()
        return loss.detach().sum()

    start = time.process_time()
    first = first_step(step)
    first_cpu_s = time.process_time() - start
    _, cpu_seconds = time_steps(step, maps.values(), setting["repeats"] - 1)
    cpu_seconds = [first_cpu_s, *cpu_seconds]
    return {**first, "median_cpu_s": median(cpu_seconds), "cpu_s": cpu_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure PLCA's association losses, cheap form against literal.")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--grid", type=int, nargs=2, default=[92, 92], metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    compare_parts(parser, measure, "levels")


if __name__ == "__main__":
    main()
