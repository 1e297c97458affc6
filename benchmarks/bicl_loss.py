"""Time and peak memory of BiCL's contrast: the exact cheap form against the literal one.

One training step's worth of work without a network: both directions of all pairs, forward and backward, on one thread.
Each form runs in a fresh process, so that its peak memory is its own.

    python benchmarks/bicl_loss.py --json benchmarks/results/bicl_loss.json
"""

import argparse
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from literal import bicl as literal
from measuring import Row, compare, first_step, time_steps
from segadapt.trainables.core.losses.prototype_contrast import prototype_contrast

WEIGHT = 0.2

Inputs = dict[str, tuple[Tensor, Tensor]]
"""Features (B, D, h, w) and labels (B, H, W) by domain."""


def make_inputs(setting: dict[str, Any]) -> Inputs:
    """Return features and blocks of labels: all of the source and half of the target labelled."""
    torch.manual_seed(0)
    batch, side, pixels = setting["batch"], setting["grid"], setting["pixels"]

    def domain() -> tuple[Tensor, Tensor]:
        features = torch.randn(batch, setting["channels"], side, side).requires_grad_()
        blocks = torch.randint(0, setting["classes"], (batch, 12, 12))
        places = torch.arange(pixels) * 12 // pixels
        return features, blocks[:, places[:, None], places]

    inputs = {"source": domain(), "target": domain()}
    inputs["target"][1][:, ::2] = 255
    return inputs


def cheap_step(inputs: Inputs, classes: int) -> Tensor:
    contrast = prototype_contrast(*inputs["source"], *inputs["target"], num_classes=classes)
    loss = WEIGHT * (contrast.forward + contrast.backward)
    loss.backward()
    return loss.detach()


def literal_step(inputs: Inputs, classes: int) -> Tensor:
    pairs = [
        sum(literal.contrast(*pair, num_classes=classes))
        for pair in zip(*inputs["source"], *inputs["target"], strict=True)
    ]
    loss = WEIGHT * torch.stack(pairs).mean()
    loss.backward()
    return loss.detach()


def measure(form: str, setting: dict[str, Any]) -> Row:
    """Return the first step's loss and memory, and wall and processor times of the others."""
    inputs = make_inputs(setting)
    step = partial({"cheap": cheap_step, "literal": literal_step}[form], inputs, setting["classes"])
    first = first_step(step)
    seconds, cpu_seconds = time_steps(step, (features for features, _ in inputs.values()), setting["repeats"])
    medians = {"median_s": median(seconds), "median_cpu_s": median(cpu_seconds)}
    return {**first, **medians, "seconds": seconds, "cpu_seconds": cpu_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure BiCL's contrast, cheap form against literal.")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--grid", type=int, default=92, help="cells of the feature map per side")
    parser.add_argument("--pixels", type=int, default=730, help="pixels of the label map per side")
    parser.add_argument("--channels", type=int, default=76)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--repeats", type=int, default=7)
    compare(parser, measure)


if __name__ == "__main__":
    main()
