"""What PLCA's fused kernels need of a GPU, by compiling them for one, and what they move and compute, by counting.

No GPU is needed: Triton compiles for compute capability 9.0 (H100, H200) and its own tools read the machine code. Then
launches, bytes and operations of the reference and of the kernels are counted, PyTorch standing in for the latter: each
reads its operands and writes its results once, and chunks have the size that they have on a GPU.

    python benchmarks/kernels.py [--json benchmarks/results/kernels.json]
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from measuring import emit
from plca_loss import DOMAINS, make_inputs
from segadapt.trainables.core.losses import kernels, pixel_similarity
from segadapt.trainables.core.losses.cycle_association import feature_association, output_association
from segadapt.trainables.core.losses.pixel_similarity import GPU_ENTRIES, standardise_

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
SIZES = ("i32", "i32", "i32")
ARGUMENTS: dict[str, Any] = {
    "query": "rows",
    "key": "rows",
    "statistics": ("*i64", "*fp32", "*fp32", "*fp32"),
    "scaling": ("*fp32", "*fp32"),
    "results": ("*fp32", "rows"),
    "first": ("rows", "i32", "i32"),
    "second": ("rows", "i32", "i32"),
    "offset": "*fp32",
    "shape": SIZES,
}
"""Types of the kernels' arguments by name; "rows" is that of the multiplied rows."""
CARDS = {"sm_90": (227 * 1024, (9, 0)), "sm_86": (99 * 1024, (8, 6)), "sm_75": (64 * 1024, (7, 5))}
"""Shared memory per block and compute capability of H100, of the RTX 30 series and of T4."""
VARIANTS: dict[str, tuple[Any, dict[Any, Any]]] = {
    "row_statistics": (kernels.row_statistics_kernel, {}),
    "exponentials": (kernels.exponentials_kernel, {"WRITE": True}),
    "multiply, transposed, added": (kernels.multiply_kernel, {"MODE": "add", ("first", 1): 1, ("second", 2): 1}),
    "scale": (kernels.multiply_kernel, {"MODE": "scale", ("first", 2): 1, ("second", 1): 1}),
}
"""A kernel and its constants, by name; a stride of 1 is one as well, by the place of the matrix's argument."""


def compiled(kernel: Any, constants: dict[Any, Any], dtype: torch.dtype, card: str = "sm_90") -> Any:
    """Return a kernel compiled for operands of a type; pointers, sizes and other strides are multiples of 16."""
    shared_bytes, capability = CARDS[card]
    chosen = kernels.choices(shared_bytes, capability)
    constants = {
        "BLOCK": kernels.BLOCK,
        "DEPTH": kernels.DEPTH[dtype],
        "GROUP": kernels.GROUP,
        "PRECISION": chosen.precision,
        **constants,
    }
    out = TYPES[dtype] if constants.get("MODE") == "scale" else "*fp32"
    signature: dict[str, Any] = {}
    attributes, values = {}, {}

    def typed(kind: Any, *place: Any) -> Any:
        """Return the type of what lies at a place among the arguments."""
        if isinstance(kind, tuple):
            return tuple(typed(part, *place, number) for number, part in enumerate(kind))
        path = (kernel.arg_names.index(place[0]), *place[1:])
        constant = place if place in constants else place[0] if len(place) == 1 else None
        if constant in constants:
            values[path] = constants[constant]
            return "constexpr"
        attributes[path] = [["tt.divisibility", 16]]
        return TYPES[dtype] if kind == "rows" else kind

    for name in kernel.arg_names:
        signature[name] = typed(out if name == "out" else ARGUMENTS.get(name), name)
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=attributes)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return triton.compile(source, target=target, options={**kernels.OPTIONS, "num_stages": chosen.stages})


def resources(binary: Any) -> dict[str, int]:
    """Return registers and bytes of stack (for spilled ones) per thread, shared bytes and tensor core products."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        words = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    found = {name: int(re.findall(rf"{name}:(\d+)", text)[-1]) for name in ("REG", "STACK", "LOCAL")}
    return {
        "registers": found["REG"],
        "stack_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": binary.metadata.shared,
        "tensor_core_products": len(re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync", binary.asm["ptx"])),
    }


class Counts(TorchDispatchMode):
    """Operations that would be launched, and the bytes that they read and write; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func.name().startswith(("aten::empty", "aten::new_empty", "aten::detach")):
            self.launches += 1
            read, written = ((v for v in tree_leaves(tree) if isinstance(v, Tensor)) for tree in (args, result))
            self.bytes += sum(value.numel() * value.element_size() for value in (*read, *written))
        return result


class StandIns:
    """PyTorch in place of the kernels: the same values, counted as one launch each that reads and writes once."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts
        self.flops = 0

    def _count(self, first: Tensor, columns: int, *others: Tensor | None) -> None:
        self.flops += 2 * first.numel() * columns
        self.counts.launches += 1
        self.counts.bytes += sum(v.numel() * v.element_size() for v in (first, *others) if v is not None)

    def row_statistics(self, query: Tensor, key: Tensor, factor: float) -> kernels.RowStatistics:
        """As the kernel's."""
        with _disable_current_modes():
            self._count(query, len(key), key)
            scores = query.float() @ key.float().T
            top, best = scores.max(dim=1)
            return kernels.RowStatistics(best, top, standardise_(scores, factor)[:, 0])

    def exponentials(self, query: Tensor, key: Tensor, top: Tensor, inverse: Tensor, out: Tensor | None) -> Tensor:
        """As the kernel's."""
        with _disable_current_modes():
            self._count(query, len(key), key, out)
            scores = (query.float() @ key.float().T).sub_(top[:, None]).mul_(inverse[:, None]).exp_()
            if out is not None:
                out.copy_(scores)
            return scores.sum(dim=1)

    def multiply_(self, out: Tensor, first: Tensor, second: Tensor, *, add: bool = False) -> Tensor:
        """As the kernel's."""
        with _disable_current_modes():
            self._count(first, second.shape[1], second, out, out if add else None)
            product = first.float() @ second.float()
            return out.add_(product) if add else out.copy_(product)

    def scale_(self, out: Tensor, first: Tensor, second: Tensor, offset: Tensor) -> Tensor:
        """As the kernel's."""
        with _disable_current_modes():
            self._count(first, second.shape[1], second, out, out)
            return out.mul_((first.float() @ second.float()).sub_(offset[:, None]))


def count(level: str, form: str, dtype: torch.dtype, setting: dict[str, Any]) -> dict[str, float]:
    """Return launches, bytes and floating point operations of one association, forward and backward."""
    maps, labels = make_inputs(level, setting)
    pair = [maps[level, domain].detach().to(dtype).requires_grad_() for domain in DOMAINS]
    association = {"features": feature_association, "output": output_association}[level]
    counts, flops = Counts(), FlopCounterMode(display=False)
    stand_ins = StandIns(counts)
    replaced = {name: getattr(kernels, name) for name in ("row_statistics", "exponentials", "multiply_", "scale_")}
    if form == "triton":
        for name in replaced:
            setattr(kernels, name, getattr(stand_ins, name))
    with flops, counts:
        association(*pair, labels, kernels=form).backward()
    for name, function in replaced.items():
        setattr(kernels, name, function)
    total = flops.get_total_flops() + stand_ins.flops
    return {"launches": counts.launches, "gigabytes": counts.bytes / 1e9, "teraflops": total / 1e12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, nargs=2, default=[92, 92], metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    compiled_for = {
        f"{name}, {str(dtype).removeprefix('torch.')}": resources(compiled(kernel, constants, dtype))
        for dtype in TYPES
        for name, (kernel, constants) in VARIANTS.items()
    }
    smaller = {
        f"{card}, {str(dtype).removeprefix('torch.')}": resources(compiled(*VARIANTS["scale"], dtype, card))
        for card, dtype in (("sm_86", torch.float32), ("sm_86", torch.bfloat16), ("sm_75", torch.float32))
    }
    pixel_similarity.COSTLY_ENTRIES = pixel_similarity.CACHED_ENTRIES = GPU_ENTRIES
    knobs.runtime.interpret = True  # lets CPU tensors pass; nothing is launched
    setting = {"images": 1, "grid": options.grid, "channels": options.channels, "classes": 19}
    counted = {
        f"{level}, {form}, {str(dtype).removeprefix('torch.')}": count(level, form, dtype, setting)
        for level, form, dtype in (
            ("features", "reference", torch.float32),
            ("features", "triton", torch.float32),
            ("features", "triton", torch.bfloat16),
            ("output", "reference", torch.float32),
            ("output", "triton", torch.float32),
        )
    }
    record = {"triton": triton.__version__, "sm_90": compiled_for, "smaller cards": smaller}
    emit({**record, "setting": setting, "one image pair": counted}, options.json)


if __name__ == "__main__":
    main()
