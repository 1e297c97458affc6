"""Time and peak memory of CLST's contrast and centroids: the exact cheap form against the literal one.

One training step's worth of work without a network: the source centroids move, then the mean feature of each class in
each image of both domains is contrasted with them, forward and backward, on one thread. Each form runs in a fresh
process, so that its peak memory is its own.

    python benchmarks/clst_loss.py --json benchmarks/results/clst_loss.json
"""

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from literal import clst as literal
from measuring import Row, compare, first_step, time_steps
from segadapt.trainables.core.losses.centroid_contrast import centroid_contrast
from segadapt.trainables.core.state.class_centroids import ClassCentroids

DOMAINS = ("source", "target")


def make_inputs(setting: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return features and labels by domain: all source and half of the target cells labelled."""
    torch.manual_seed(0)
    batch, (rows, columns) = setting["batch"], setting["grid"]
    features = {
        domain: torch.randn(batch, setting["channels"], rows, columns).relu_().requires_grad_() for domain in DOMAINS
    }
    labels = {domain: torch.randint(0, setting["classes"], (batch, rows, columns)) for domain in DOMAINS}
    labels["target"][:, ::2] = 255
    return features, labels


def cheap_step(setting: dict[str, Any], features: dict[str, Tensor], labels: dict[str, Tensor]) -> Callable[[], Tensor]:
    state = ClassCentroids(setting["classes"], setting["channels"])

    def step() -> Tensor:
        state.update(features["source"], labels["source"])
        losses = [
            centroid_contrast(features[domain], labels[domain], state.centroids, state.seen) for domain in DOMAINS
        ]
        loss = torch.stack(losses).sum()
        loss.backward()
        return loss.detach()

    return step


def literal_step(
    setting: dict[str, Any], features: dict[str, Tensor], labels: dict[str, Tensor]
) -> Callable[[], Tensor]:
    classes, channels = setting["classes"], setting["channels"]
    state = torch.zeros(classes, channels), torch.zeros(classes, dtype=torch.bool)

    def step() -> Tensor:
        nonlocal state
        state = literal.update_centroids(features["source"], labels["source"], *state, momentum=0.99)
        losses = [literal.centroid_contrast(features[domain], labels[domain], *state) for domain in DOMAINS]
        loss = torch.stack(losses).sum()
        loss.backward()
        return loss.detach()

    return step


def measure(form: str, setting: dict[str, Any]) -> Row:
    """Return the first step's loss and memory, and wall and processor times of the others, after a tiny step."""
    make_step = {"cheap": cheap_step, "literal": literal_step}[form]
    tiny = {**setting, "grid": (3, 3), "channels": 8}
    make_step(tiny, *make_inputs(tiny))()
    features, labels = make_inputs(setting)
    step = make_step(setting, features, labels)
    first = first_step(step)
    seconds, cpu_seconds = time_steps(step, features.values(), setting["repeats"])
    return {**first, "median_s": median(seconds), "median_cpu_s": median(cpu_seconds), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure CLST's contrast and centroids, cheap form against literal.")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--grid", type=int, nargs=2, default=[65, 129], metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--repeats", type=int, default=3)
    compare(parser, measure)


if __name__ == "__main__":
    main()
