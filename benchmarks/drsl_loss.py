"""Time and peak memory of DRSL's losses of the modes: the exact cheap form against the literal one.

One domain's margin loss and both domains' alignment, forward and backward without a network, on one thread. Each
measurement runs in a fresh process, so that its peak memory is its own.

    python benchmarks/drsl_loss.py --json benchmarks/results/drsl_loss.json
"""

import argparse
from functools import partial
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from literal import drsl as literal
from measuring import Row, compare_parts, first_step, time_steps
from segadapt.trainables.core.losses import mode_alignment

LOSSES = ("margin", "alignment")

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""Source and target embeddings (B, D, H, W), source labels (B, H, W) and modes (C, M, D)."""


def make_inputs(setting: dict[str, Any]) -> Inputs:
    """Return embeddings of both domains, labels, 5 % of them ignored, and modes."""
    torch.manual_seed(0)
    shape = (setting["batch"], setting["channels"], *setting["grid"])
    source, target = (torch.randn(shape).requires_grad_() for _ in range(2))
    labels = torch.randint(0, setting["classes"], (shape[0], *shape[2:]))
    labels[torch.rand(labels.shape) < 0.05] = 255
    modes = torch.randn(setting["classes"], setting["modes"], setting["channels"]).requires_grad_()
    return source, target, labels, modes


def take_step(module: ModuleType, loss_name: str, inputs: Inputs) -> Tensor:
    source, target, labels, modes = inputs
    if loss_name == "margin":
        loss, _ = module.mode_margin(source, labels, modes)
    else:
        per_class, num_modes = modes.shape[1], modes.shape[0] * modes.shape[1]
        cells = torch.where(labels == 255, -1, labels * per_class + torch.arange(labels.shape[-1]) % per_class)
        loss = module.mode_alignment(source, cells, target, cells.flip(-1), num_modes=num_modes)
    loss.backward()
    return loss.detach()


def measure(form: str, setting: dict[str, Any], loss_name: str) -> Row:
    """Return the first step's loss and memory, and processor times of the others, after a tiny step."""
    module = {"cheap": mode_alignment, "literal": literal}[form]
    take_step(module, loss_name, make_inputs({**setting, "grid": (3, 3), "channels": 8}))
    inputs = make_inputs(setting)
    step = partial(take_step, module, loss_name, inputs)
    first = first_step(step)
    _, cpu_seconds = time_steps(step, inputs, setting["repeats"])
    return {**first, "median_cpu_s": median(cpu_seconds), "cpu_s": cpu_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure DRSL's losses of the modes, cheap form against literal.")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--grid", type=int, nargs=2, default=[65, 129], metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--modes", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    compare_parts(parser, measure, "losses")


if __name__ == "__main__":
    main()
