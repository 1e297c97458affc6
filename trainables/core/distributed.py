"""Sums over data-parallel workers, so that two workers compute what one would on the joined batch.

Every function is the identity when `torch.distributed` is not initialised.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of data-parallel workers."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this worker's index, 0 for the first."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all workers."""
    if dist.is_initialized():
        # Without its device, NCCL guesses one by the rank, which is another worker's where each sees its own alone.
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def sum_over_workers(value: Tensor) -> Tensor:
    """Return the sum of `value` over all workers, without gradient."""
    if world_size() == 1:
        return value.detach()
    total = _reachable(value.detach().clone(memory_format=torch.contiguous_format))
    dist.all_reduce(total)
    return total.to(value.device)


def _reachable(value: Tensor) -> Tensor:
    """Move a tensor to where the process group can work on it: NCCL knows GPU tensors only."""
    return value.cuda() if dist.get_backend() == "nccl" else value


def gather_over_workers(value: Tensor) -> Tensor:
    """Concatenate `value` of all workers along its first dimension in rank order, without gradient.

    The first dimension may differ between workers, the others must agree.
    """
    if world_size() == 1:
        return value.detach()
    lengths = torch.zeros(world_size(), dtype=torch.int64, device=value.device)
    lengths[rank()] = value.shape[0]
    sizes = sum_over_workers(lengths).tolist()
    padded = _reachable(value.new_zeros((max(sizes), *value.shape[1:])))
    padded[: value.shape[0]] = value.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(value.device)


def rows_before(count: int, device: torch.device) -> int:
    """Return how many rows the workers before this one have, each of which gives its own `count`."""
    if world_size() == 1:
        return 0
    counts = gather_over_workers(torch.tensor([count], device=device))
    return int(counts[: rank()].sum())


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """Divide a local sum by the mean count per worker: data parallelism averages the result into the global mean.

    Args:
        total: This worker's sum, scalar, with gradient.
        count: This worker's number of summands, scalar.

    Returns:
        Scalar. Its average over the workers is `sum(totals) / sum(counts)`; zero, with zero gradient, when nothing
        was counted anywhere.
    """
    everywhere = sum_over_workers(count.to(torch.float64))
    scale = torch.where(everywhere > 0, world_size() / everywhere.clamp(min=1), 0.0)
    return total * scale.to(total.dtype)
