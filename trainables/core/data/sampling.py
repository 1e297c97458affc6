"""Which sample comes when: a pure function of seed and position, so that resuming needs no sampler state."""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def derived_seed(*parts: object) -> int:
    """Hash `parts` into a 63-bit seed, equal on every machine and in every process."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a CPU generator seeded from `parts`."""
    return torch.Generator().manual_seed(derived_seed(*parts))


@lru_cache(maxsize=8)
def _epoch_order(length: int, key: tuple[object, ...], epoch: int) -> Tensor:
    return torch.randperm(length, generator=generator(*key, epoch))


def sample_at(position: int, length: int, key: tuple[object, ...]) -> int:
    """Return the index drawn at `position` of an endless walk in which every epoch is a fresh permutation.

    Args:
        position: Number of samples drawn before, over all workers.
        length: Number of samples in the set.
        key: Identifies the walk: seed, stage, domain.
    """
    epoch, offset = divmod(position, length)
    return int(_epoch_order(length, key, epoch)[offset])
