"""The passes of a training step, and what happens when they do not fit the device's memory."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from segadapt.trainables.core import distributed
from segadapt.trainables.core.networks import FrozenParameter
from segadapt.trainables.core.training.config import Precision

_NOTE = "micro_batch.json"
_FIRST_TENSOR_CORES = (7, 0)


class InfeasibleError(RuntimeError):
    """The trial's settings do not fit the device, however small the micro-batch."""


class SmallerMicroBatchError(RuntimeError):
    """A step did not fit one of several workers: all must begin again, with the smaller micro-batch that was noted."""


def smaller_micro_batch(size: int, workers: int, least: int = 1) -> int | None:
    """Return the largest smaller micro-batch that parts this one equally: its half, where every worker's share is even.

    Args:
        size: Images of each domain over all workers; a multiple of `workers`.
        workers: Data-parallel workers.
        least: Images that a worker must have.

    Returns:
        A multiple of `workers`; None if there is none.
    """
    per_worker = size // workers
    parts = next((parts for parts in range(2, per_worker // least + 1) if per_worker % parts == 0), None)
    return size // parts if parts is not None else None


@contextlib.contextmanager
def batch_norm_explained() -> Iterator[None]:
    """Say what to do where batch normalisation meets a single value per channel, as with one very small image."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "Batch normalisation must see several values of each channel, but one image of so few pixels leaves one. "
            "Raise trainer.batch_size or the images' size (augmentation.crop, source_size and target_size)."
        ) from error


class Snapshot:
    """Parameters, buffers and random numbers as they were before a step, so that a failed step leaves no trace.

    A forward may move buffers (running statistics) and parameters (DRSL's modes), hence both are kept, on the device,
    without what is frozen and the weights of a teacher, which only moves between steps.
    """

    def __init__(self, module: nn.Module) -> None:
        weights = [
            weight
            for name, weight in module.named_parameters()
            if not isinstance(weight, FrozenParameter) and not name.startswith("online.teacher.")
        ]
        self._tensors = [*weights, *module.buffers()]
        self._kept = [tensor.detach().clone() for tensor in self._tensors]
        self._cuda = any(tensor.is_cuda for tensor in self._tensors)

    @torch.no_grad()
    def take(self) -> None:
        """Remember the present state."""
        torch._foreach_copy_(self._kept, self._tensors)
        self._random = torch.get_rng_state()
        self._cuda_random = torch.cuda.get_rng_state() if self._cuda else None

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the state of the last `take`."""
        torch._foreach_copy_(self._tensors, self._kept)
        torch.set_rng_state(self._random)
        if self._cuda_random is not None:
            torch.cuda.set_rng_state(self._cuda_random)


def note_micro_batch(folder: Path, size: int) -> None:
    """Leave a micro-batch for workers that begin again, whole or not at all; several may do so at once."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{_NOTE}.{os.uname().nodename}.{os.getpid()}"
    temporary.write_text(json.dumps(size))
    temporary.replace(folder / _NOTE)


def noted_micro_batch(folder: Path) -> int | None:
    """Return what `note_micro_batch` left in the folder, if anything."""
    try:
        return int(json.loads((folder / _NOTE).read_text()))
    except FileNotFoundError:
        return None


def data_parallel(method: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a whole method for several workers: one forward is one step; statistics and losses reduce themselves."""
    if distributed.world_size() == 1:
        return method
    devices = [device] if device.type == "cuda" else None
    # Gradients lie in the buckets that are exchanged: no copy there and back, and no second one in memory.
    wrapped = DistributedDataParallel(method, device_ids=devices, gradient_as_bucket_view=True)
    wrapped.broadcast_buffers = False  # set here, since torch 2.15 warns of the argument and 2.11 has no other
    return wrapped


def synchronised(train_step: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Average gradients over workers in the last micro-batch only."""
    if last or not isinstance(train_step, DistributedDataParallel):
        return contextlib.nullcontext()
    skipped: contextlib.AbstractContextManager[None] = train_step.no_sync()
    return skipped


def take_buffers_of_first_worker(method: nn.Module) -> None:
    """Let all workers agree on buffers: running statistics of batch normalisation differ between them."""
    if distributed.world_size() > 1:
        for buffer in method.buffers():
            torch.distributed.broadcast(buffer, 0)


def network_precision(device: torch.device, precision: Precision) -> torch.dtype:
    """Return the type in which networks multiply under a `trainer.precision`.

    bfloat16 counts where it is native: cards of the Turing and Volta generations emulate it, many times slower than
    the float16 that their tensor cores are made for. Cards before those have none, and float16 is slow there.
    """
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16 if torch.cuda.get_device_capability(device) >= _FIRST_TENSOR_CORES else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the context in which networks compute in the `trainer.precision` asked for."""
    dtype = network_precision(device, precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def choose_kernels(device: torch.device, deterministic: bool) -> None:
    """Let PyTorch take kernels whose results repeat to the bit, or those that cuDNN finds to be the fastest.

    It holds for the whole process, which trains one trial after another.
    """
    torch.use_deterministic_algorithms(deterministic)
    # Filling new memory is for finding faults, and takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic
    if device.type == "cuda":  # cuBLAS reads it when it starts, for which there is but one time in a process
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def loss_scale(device: torch.device, precision: Precision) -> torch.amp.GradScaler:
    """Return what scales losses, so that gradients do not vanish in float16; in other types it does nothing.

    The fused optimisers of GPUs read on the device whether a step is to be left out.
    """
    return torch.amp.GradScaler(device.type, enabled=network_precision(device, precision) == torch.float16)


def describe_memory(method: nn.Module, micro_batch: int, batch_size: int, device: torch.device) -> dict[str, Any]:
    """Return what is reported about memory: the micro-batch, the peak, and what parting the batch has changed.

    Args:
        method: The trained method.
        micro_batch: Images of each domain in a micro-batch.
        batch_size: Images of each domain that were asked for.
        device: Device that the steps run on.
    """
    description: dict[str, Any] = {"memory/micro_batch": micro_batch}
    if device.type == "cuda":
        description["memory/peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    if micro_batch < batch_size:
        normalised = any(isinstance(module, _BatchNorm) and module.training for module in method.modules())
        description["memory_note"] = (
            f"Micro-batches of {micro_batch} instead of {batch_size} images, since the device's memory is short. "
            + ("Batch normalisation sees micro-batches, so do losses" if normalised else "Losses")
            + " that sort, contrast or average within a batch; the sum over them weighs micro-batches equally."
        )
    return description
