"""What happens when a training step does not fit the device's memory."""

import json
import os
from pathlib import Path

import torch
from torch import nn

_NOTE = "micro_batch.json"


class InfeasibleError(RuntimeError):
    """The trial's settings do not fit the device, however small the micro-batch."""


class SmallerMicroBatchError(RuntimeError):
    """A step did not fit one of several workers: all must begin again, with the smaller micro-batch that was noted."""


def smaller_micro_batch(size: int, workers: int) -> int | None:
    """Return the largest smaller micro-batch that parts this one equally: its half, where every worker's share is even.

    Args:
        size: Images of each domain over all workers; a multiple of `workers`.
        workers: Data-parallel workers.

    Returns:
        A multiple of `workers`; None if every worker has a single image.
    """
    own = size // workers
    parts = next((parts for parts in range(2, own + 1) if own % parts == 0), None)
    return size // parts if parts is not None else None


class Snapshot:
    """Parameters, buffers and random numbers as they were before a step, so that a failed step leaves no trace.

    A forward may move buffers (running statistics) and parameters (DRSL's modes), hence both are kept, on the device.
    """

    def __init__(self, module: nn.Module) -> None:
        self._tensors = [*module.parameters(), *module.buffers()]
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
