"""A step of online self-training: time, memory and its parts, against a literal step.

    python benchmarks/online.py [--networks compact ...] [--size 64x128] [--batch-size 4] [--json PATH]

Forms, with the same network, images and labels, MIC's settings and SGD:

* ours: the passes of `segadapt`'s trainer for `online_self_training`, the optimiser's step and the teacher's.
* unmasked, unmixed, alone: the same without the masked term, without the mixed one, and without both.
* literal: the step as public codes write it (`literal/online.py`).

Images are drawn once: loading them is no part. Forms take turns, `--rounds` times `--steps` steps each; times are
processor times of one thread, memory is by how much a step raises what tensors hold at its peak. A part's share is what
leaving it out saves.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from literal.online import LiteralOnlineStep
from measuring import peak_tensor_bytes, write_record
from segadapt.trainables import method_class
from segadapt.trainables.core.data.batch import DomainBatch
from segadapt.trainables.core.method import Method, WarmupConfig
from segadapt.trainables.core.networks import build_segmenter
from segadapt.trainables.core.online.config import OnlineConfig
from segadapt.trainables.core.online.terms import OnlineTerms
from segadapt.trainables.core.training.passes import pass_step

CLASSES = 11
LR = 1e-4
FORMS: dict[str, dict[str, Any]] = {
    "ours": {},
    "unmasked": {"mask": "none"},
    "unmixed": {"mix_weight": 0.0},
    "alone": {"mask": "none", "mix_weight": 0.0},
}


class OnlineStep:
    """Optimiser steps of `online_self_training`, as the trainer takes them."""

    def __init__(self, network: str, settings: dict[str, Any]) -> None:
        self.method = built(network)
        self.online = OnlineTerms(self.method.deployed, OnlineConfig(enabled=True, quality="batch", **settings))
        self.method.online = self.online
        self.method.train()
        trained = [parameter for parameter in self.method.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=LR, momentum=0.9, weight_decay=5e-4)
        self.step = 0

    def __call__(self, batch: DomainBatch) -> None:
        """Take one step."""

        def batches() -> Iterator[DomainBatch]:
            yield batch

        pass_step(
            self.method,
            self.method,
            batches(),
            self.step,
            1,
            precision=contextlib.nullcontext,
            scale=lambda loss: loss,
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.online.follow(self.method.deployed)
        self.step += 1


def built(network: str) -> Method:
    """Return the method with its network, equal for equal names."""
    torch.manual_seed(0)
    cls = method_class("online_self_training")
    return cls(build_segmenter(network, CLASSES), cls.Config(), WarmupConfig())


def drawn_batch(batch_size: int, height: int, width: int) -> DomainBatch:
    """Return normalised images of smooth colours, and labels in blocks of which each image shows several classes."""
    draw = torch.Generator().manual_seed(0)

    def images() -> Tensor:
        coarse = torch.randn(batch_size, 3, 8, 16, generator=draw)
        return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")

    blocks = torch.randint(0, CLASSES, (batch_size, 1, 4, 8), generator=draw).float()
    labels = torch.nn.functional.interpolate(blocks, size=(height, width), mode="nearest")[:, 0].long()
    return DomainBatch(images(), labels, images(), key=(0, "adapt"), numbers=tuple(range(batch_size)))


def measure(network: str, batch: DomainBatch, steps: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Return seconds of a step in each turn and the bytes at its peak, form by form."""
    literal, target = LiteralOnlineStep(built(network).segmenter, LR), batch.target_images
    assert target is not None
    calls: dict[str, Callable[[], object]] = {
        "literal": lambda: literal(batch.source_images, batch.source_labels, target)
    }
    for form, settings in FORMS.items():
        calls[form] = step_of(OnlineStep(network, settings), batch)
    for call in calls.values():
        call()  # momentum is allotted
    seconds: dict[str, list[float]] = {form: [] for form in calls}
    for turn in range(rounds):
        for form in list(calls) if turn % 2 == 0 else reversed(list(calls)):
            begin = time.process_time()
            for _ in range(steps):
                calls[form]()
            seconds[form].append((time.process_time() - begin) / steps)
    return {form: {"step_s": seconds[form], "peak_bytes": peak_tensor_bytes(call)} for form, call in calls.items()}


def step_of(step: OnlineStep, batch: DomainBatch) -> Callable[[], None]:
    return lambda: step(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["compact"])
    parser.add_argument("--size", default="64x128", help="height x width")
    parser.add_argument("--batch-size", type=int, default=4, help="images per domain")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    height, width = map(int, options.size.split("x"))
    batch, results = drawn_batch(options.batch_size, height, width), {}
    for network in options.networks:
        rows = results[network] = measure(network, batch, options.steps, options.rounds)
        typical = {form: statistics.median(row["step_s"]) for form, row in rows.items()}
        ours, literal = rows["ours"], rows["literal"]
        ratios = [ours_s / literal_s for ours_s, literal_s in zip(ours["step_s"], literal["step_s"], strict=True)]
        print(f"{network} {options.size}, by the literal step's: ", end="")
        print(f"time {typical['ours'] / typical['literal']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}),", end=" ")
        print(f"memory {ours['peak_bytes'] / literal['peak_bytes']:.2f}; of our step's time", end=" ")
        shares = {f"{part} term": 1 - typical[f"un{part}"] / typical["ours"] for part in ("masked", "mixed")}
        shares["source term without both"] = typical["alone"] / typical["ours"]
        print(", ".join(f"{part} {share:.0%}" for part, share in shares.items()), flush=True)
        setting = {"size": options.size, "batch_size": options.batch_size, "steps": options.steps}
        write_record(options.json, setting, results=results)


if __name__ == "__main__":
    main()
