"""What networks take: parameters, FLOPs, memory of a training step, and processor time beside that of `compact`.

    python benchmarks/networks.py [--networks compact timm:resnet50.a1_in1k,deeplabv2 ...] [--sizes 64x128 128x256]

A network is NAME or NAME,HEAD, with random weights and 19 classes. FLOPs are those of one image's forward pass, two for
each multiplication with its addition. Memory is what tensors take at most in a training step, parameters, gradients and
the optimiser's state included. Times are processor time of one image, forward alone and in a training step, each
as a multiple of `compact`'s, with which a network takes turns in the same process: the least of `--repeats` turns.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from measuring import parse, peak_tensor_bytes, write_record
from segadapt.trainables.core.losses.segmentation import segmentation_cross_entropy
from segadapt.trainables.core.networks import Segmenter, build_segmenter, recommended_optimizer

BASELINE = "compact"
CLASSES = 19
DEFAULT = (
    "lraspp_mobilenet_v3_large",
    "deeplabv2_resnet101",
    "timm:resnet50.a1_in1k,deeplabv2",
    "timm:tf_efficientnet_lite0.in1k",
    "timm:convnext_tiny.fb_in22k",
    "timm:pvt_v2_b2.in1k",
    "timm:swin_tiny_patch4_window7_224.ms_in22k",
    "timm:eva02_small_patch14_224.mim_in22k",
    "timm:vit_small_patch14_dinov2.lvd142m",
    "timm:vit_base_patch14_dinov2.lvd142m",
)


class Trained:
    """A network with its optimiser and a batch."""

    def __init__(self, network: str, size: tuple[int, int], batch_size: int) -> None:
        torch.manual_seed(0)
        name, _, head = network.partition(",")
        self.segmenter: Segmenter = build_segmenter(name, CLASSES, **({"head": head} if head else {}))
        parameters = list(self.segmenter.parameters())
        adamw = recommended_optimizer(name) == "adamw"
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(parameters, lr=1e-5) if adamw else torch.optim.SGD(parameters, lr=1e-5, momentum=0.9)
        )
        self.images = torch.rand(batch_size, 3, *size)
        self.labels = torch.randint(0, CLASSES, (batch_size, *size))

    def step(self) -> Tensor:
        """Train on the batch once."""
        self.segmenter.train()
        logits = self.segmenter.upsample(self.segmenter(self.images).logits, self.labels.shape[-2:])
        loss = segmentation_cross_entropy(logits, self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def predict(self) -> None:
        """Look at the first image."""
        self.segmenter.eval()
        with torch.no_grad():
            self.segmenter(self.images[:1])


def measure(network: str, size: tuple[int, int], batch_size: int, repeats: int) -> dict[str, Any]:
    """Return what a network takes for images of a size."""
    trained = Trained(network, size, batch_size)
    with FlopCounterMode(display=False) as counter:
        trained.predict()
    parameters = sum(parameter.numel() for parameter in trained.segmenter.parameters())
    row: dict[str, Any] = {
        "parameters": parameters,
        "flops": counter.get_total_flops(),
        "step_bytes": step_bytes(trained),
        "licence": licence(network),
    }
    baseline = Trained(BASELINE, size, batch_size)
    for name, part, images in (("forward", Trained.predict, 1), ("training", Trained.step, batch_size)):
        part(trained), part(baseline)
        turns = [(cpu_seconds(part, trained), cpu_seconds(part, baseline)) for _ in range(repeats)]
        mine, compact = (min(seconds) for seconds in zip(*turns, strict=True))
        row |= {f"{name}_cpu_s": mine / images, f"{name}_ratio": mine / compact}
    return row


def step_bytes(trained: Trained) -> int:
    """Return what tensors take at most in a step that is not the first, which has no state of the optimiser yet."""
    trained.step()
    held = [*trained.segmenter.parameters(), *trained.segmenter.buffers()]
    held += [parameter.grad for parameter in trained.segmenter.parameters() if parameter.grad is not None]
    held += [part for state in trained.optimizer.state.values() for part in state.values() if torch.is_tensor(part)]
    return sum(tensor.nbytes for tensor in held) + peak_tensor_bytes(trained.step)


def cpu_seconds(part: Callable[[Trained], object], trained: Trained) -> float:
    start = time.process_time()
    part(trained)
    return time.process_time() - start


def licence(network: str) -> str | None:
    """Return the licence of the weights that timm knows of."""
    name = network.partition(",")[0]
    if not name.startswith("timm:"):
        return None
    import timm

    known = timm.get_pretrained_cfg(name.removeprefix("timm:"))
    return known.license if known is not None else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=[BASELINE, *DEFAULT], metavar="NAME[,HEAD]")
    parser.add_argument("--sizes", nargs="+", default=["64x128", "128x256"], metavar="HEIGHTxWIDTH")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # what measuring processes are told
    arguments, setting = parse(parser)
    del setting["alone"]
    if arguments.alone:
        height, width = map(int, arguments.sizes[0].split("x"))
        print(json.dumps(measure(arguments.networks[0], (height, width), arguments.batch_size, arguments.repeats)))
        return
    results: dict[str, dict[str, Any]] = {}
    for size in arguments.sizes:
        for network in arguments.networks:
            row = results.setdefault(size, {})[network] = in_process(arguments, network, size)
            print(f"{size:<9}{network:<44}", *(f"{key} {show(value)}" for key, value in row.items()), flush=True)
            write_record(arguments.json, setting, load=os.getloadavg()[0], results=results)


def in_process(arguments: argparse.Namespace, network: str, size: str) -> dict[str, Any]:
    options = [
        f"--{name}={getattr(arguments, name.replace('-', '_'))}" for name in ("batch-size", "repeats", "threads")
    ]
    command = [sys.executable, __file__, "--alone", "--networks", network, "--sizes", size, *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def show(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
