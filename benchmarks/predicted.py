"""What a training step takes at the papers' sizes, counted without computing it, and how fast a GPU can be at most.

    python benchmarks/predicted.py [--methods sdca ...] [--scale 1] [--json benchmarks/results/predicted.json]

A step runs on tensors without values (PyTorch's fake tensors) that say they are on a GPU: forward, backward, optimiser.
Each operation that is no view counts as one launch, which reads its inputs and writes its results once. Convolutions
and products also count their floating point operations. The bound is the sum over operations of the larger of bytes by
the card's bandwidth and operations by its rate for their type: kernels that wait for nothing and share no memory. What
the network alone takes, each image once forward and back, stands beside it.

Needs torch, torchvision and `segadapt.trainables` alone, and no GPU.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from measuring import emit
from segadapt.trainables.core.data.batch import DomainBatch
from segadapt.trainables.core.method import Method, Stage
from segadapt.trainables.core.training.gradients import autocast
from step import BATCH_SIZES, MEASURED, NETWORK_OF, build

CLASSES = 19
SIZES = {"source": (720, 1280), "target": (512, 1024)}
CROP = (730, 730)
"""Of both domains in PLCA."""
RATES = {torch.bfloat16: 990e12, torch.float16: 990e12, torch.float32: 67e12, torch.float64: 67e12}
"""Floating point operations per second of an H100 or H200 by type; TF32 is not used."""
BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12}
"""Bytes per second."""
NO_LAUNCH = ("prim::", "aten::empty", "aten::new_empty", "aten::detach", "aten::lift_fresh")


class OnGpu(TorchFunctionMode):
    """All tensors say that they are on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer the question; do all else."""
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        return func(*args, **(kwargs or {}))


@dataclass
class Counts(TorchDispatchMode):
    """Launches, bytes and floating point operations, and the least seconds by card."""

    launches: int = 0
    bytes: int = 0
    flops: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation."""
        result = func(*args, **(kwargs or {}))
        if func.is_view or func.name().startswith(NO_LAUNCH):
            return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        formula = flop_registry.get(func.overloadpacket)
        flops = formula(*args, **(kwargs or {}), out_val=result) if formula is not None else 0
        rate = RATES[tensors[0].dtype] if flops else 1.0
        self.launches += 1
        self.bytes += moved
        self.flops += flops
        for card, bandwidth in BANDWIDTHS.items():
            self.seconds[card] += max(moved / bandwidth, flops / rate)
        return result

    def row(self) -> dict[str, float]:
        """Return what was counted."""
        bounds = {f"{card}_ms": 1e3 * seconds for card, seconds in self.seconds.items()}
        return {"launches": self.launches, "gigabytes": self.bytes / 1e9, "teraflops": self.flops / 1e12, **bounds}


def batch_of(stage: Stage, batch_size: int, sizes: dict[str, tuple[int, int]]) -> DomainBatch:
    """Return a batch as the trainer puts it on a GPU, without values."""
    images, labels = {}, {}
    for domain, size in sizes.items():
        images[domain] = torch.empty(batch_size, 3, *size).contiguous(memory_format=torch.channels_last)
        labels[domain] = torch.empty(batch_size, *size, dtype=torch.int64)
    if "target" not in stage.domains:
        return DomainBatch(images["source"], labels["source"], None)
    pseudo = labels["target"] if stage.pseudo_labels else None
    return DomainBatch(images["source"], labels["source"], images["target"], labels["target"][:, 0, 0], pseudo)


def step_of(method: Method, batch: DomainBatch) -> Callable[[], None]:
    """Return a step of the optimiser."""
    weights = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1e-4, momentum=0.9, weight_decay=5e-4, fused=True)

    def step() -> None:
        with autocast(torch.device("cpu"), "bf16"):
            terms = method(batch, 0)
        torch.autograd.backward(torch.stack(list(terms.values())).sum())
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(0)

    return step


def network_of(method: Method, batch: DomainBatch) -> Callable[[], None]:
    """Return the passes of each domain's images through the network, and back."""

    def passes() -> None:
        for images in (batch.source_images, batch.target_images):
            if images is not None:
                with autocast(torch.device("cpu"), "bf16"):
                    output = method.segmenter(images)
                torch.autograd.backward([output.logits, output.features], [torch.ones_like(part) for part in output])
        method.zero_grad()

    return passes


def without_values(method: Method, fake: FakeTensorMode) -> None:
    """Replace the tensors of a method by such without values."""
    replaced: dict[int, Tensor] = {}
    for module in method.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in replaced:
                    other = fake.from_tensor(tensor.detach())
                    is_weight = isinstance(tensor, nn.Parameter)
                    replaced[id(tensor)] = nn.Parameter(other, tensor.requires_grad) if is_weight else other
                tensors[name] = replaced[id(tensor)]  # type: ignore[assignment]


def predicted(name: str, network: str, scale: float) -> dict[str, Any]:
    """Return what was counted of a method's step and of its network."""
    crop = tuple(round(side * scale) for side in CROP)
    sizes = {domain: tuple(round(side * scale) for side in size) for domain, size in SIZES.items()}
    method, stage = build(name, network, CLASSES, literal=False, freeze_norm=network != "compact")
    fake = FakeTensorMode()
    without_values(method, fake)
    method.train()
    with fake, OnGpu():
        if hasattr(method.config, "rare_crop_chance"):  # draws on the host, which fake tensors do not
            object.__setattr__(method.config, "rare_crop_chance", 0.0)
        batch = batch_of(stage, BATCH_SIZES["paper"], {d: crop if name == "plca" else s for d, s in sizes.items()})
        step = step_of(method, batch)
        step()  # momentum is there from now on
        rows = {}
        for part, function in (("step", step), ("network", network_of(method, batch))):
            counts = Counts()
            with counts:
                function()
            rows[part] = counts.row()
    images = BATCH_SIZES["paper"] * len(stage.domains)
    bounds = {f"{card}_images_per_s": images / (1e-3 * rows["step"][f"{card}_ms"]) for card in BANDWIDTHS}
    return {"method": name, **rows, **bounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=MEASURED, default=MEASURED)
    parser.add_argument("--network", default=NETWORK_OF["paper"])
    parser.add_argument("--scale", type=float, default=1.0, help="of the sides of the papers' images")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [predicted(name, options.network, options.scale) for name in options.methods]
    setting = {"network": options.network, "scale": options.scale, "batch_size": BATCH_SIZES["paper"]}
    emit({"setting": setting, "torch": torch.__version__, "results": rows}, options.json)


if __name__ == "__main__":
    main()
