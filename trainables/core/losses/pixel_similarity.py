"""Similarities between all pixels of two images, as matrices with one row per pixel.

What spatial aggregation and cycle association share. A similarity is the product of a query and a key row.
"""

# L pixels of an image, D channels, n rows of a chunk, M columns.

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kernels = Literal["reference", "triton"]
"""What works on pairs of pixels: PyTorch, or fused kernels of the module `kernels`, on CUDA devices alone."""

SMALLEST_NORM = 1e-12
PROBABILITY_FLOOR = 1e-10
SPREAD_FLOOR = 1e-10
COSTLY_CHANNELS = 256
"""From this width on, forming similarities costs more than all that is done with them."""
LARGEST_MATRIX_BYTES = 2**31
GPU_ENTRIES = 2**26
COSTLY_ENTRIES = 2**21
CACHED_ENTRIES = 2**20
KERNEL_ENTRIES = 2**24
SYMMETRIC_BLOCK = 1024
_LEAST_CAPABILITY = (7, 5)


@dataclass(frozen=True)
class Comparison:
    """How pixels are compared.

    Raises:
        ValueError: If a setting is not positive.
    """

    floor: float | None
    """Added to class probabilities before the logarithm of the divergence; None compares by cosine."""
    factor: float = 1.0
    """Multiplies the deviation of standardised rows."""

    def __post_init__(self) -> None:
        if self.floor is not None and not self.floor > 0:
            raise ValueError(f"`floor` must be positive, but got {self.floor}.")
        if not self.factor > 0:
            raise ValueError(f"`temperature_factor` must be positive, but got {self.factor}.")

    def query_and_key(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a pixel compares with others and what others compare it by, (L, D) each.

        The divergence -KL(p || q) = p·log q - p·log p keeps its first part: the second is constant along a row.
        """
        if self.floor is None:
            unit = rows * inverse_norms(rows)
            return unit, unit
        return rows, (rows + self.floor).log_()

    def gradient_by_rows(self, rows: Tensor, by_query: Tensor, by_key: Tensor) -> Tensor:
        """Carry gradients by query and key on to the rows they were made of; overwrites the first."""
        if self.floor is None:
            inverse = inverse_norms(rows)
            return gradient_through_norm_(by_query.add_(by_key), rows * inverse, inverse)
        return by_query.add_(by_key / (rows + self.floor))


def inverse_norms(rows: Tensor) -> Tensor:
    """Return the inverse Euclidean norms, (..., L, 1), of rows (..., L, D); 0 for a zero row."""
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return torch.where(norms < SMALLEST_NORM, 0.0, 1.0 / norms)


def gradient_through_norm_(by_unit: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Turn the gradient by normalised rows (L, D) in place into that by the rows, given their inverse norms."""
    along = torch.einsum("ld,ld->l", by_unit, unit)[:, None]
    return by_unit.addcmul_(unit, along, value=-1.0).mul_(inverse)


def standardise_(scores: Tensor, factor: float) -> Tensor:
    """Divide each row (..., n, M), less its mean, in place by `factor` times its deviation; return 1 / divisors.

    A row whose deviation is below the rounding of its entries becomes zero, and so does its inverse.
    """
    mean = scores.mean(dim=-1, keepdim=True)
    scores.sub_(mean)
    deviation = torch.linalg.vector_norm(scores, dim=-1, keepdim=True) / max(scores.shape[-1] - 1, 1) ** 0.5
    inverse = inverse_deviations(deviation, mean, factor)
    scores.mul_(inverse)
    return inverse


def inverse_deviations(deviation: Tensor, mean: Tensor, factor: float) -> Tensor:
    """Return what multiplies rows of similarities of that deviation and mean: 0 where it is below their rounding."""
    spread = deviation > torch.finfo(deviation.dtype).eps * mean.abs()
    return torch.where(spread, 1.0 / (factor * deviation + SPREAD_FLOOR), 0.0)


def most_similar(query: Tensor, key: Tensor) -> Tensor:
    """Return the index of the key row with the largest product for each query row, (n,)."""
    indices = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    buffer = chunk_buffer(key, len(key))
    for part in chunks(query, len(key)):
        indices[part] = products(query[part], key, buffer).max(dim=1).indices  # several times faster than `argmax`
    return indices


def products(query: Tensor, key: Tensor, buffer: Tensor) -> Tensor:
    """Return `query @ key.T` in the first rows of `buffer`: fresh memory costs as much as the product."""
    return torch.mm(query, key.T, out=buffer[: len(query)])


def products_of_all_pairs(rows: Tensor) -> Tensor:
    """Return `rows @ rows.T`, of which half is computed."""
    matrix = rows.new_empty(len(rows), len(rows))
    for start in range(0, len(rows), SYMMETRIC_BLOCK):
        stop = start + SYMMETRIC_BLOCK
        torch.mm(rows[start:stop], rows[start:].T, out=matrix[start:stop, start:])
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
    return matrix


def add_transpose_(matrix: Tensor) -> None:
    """Add a square matrix's transpose to it, in place, a band at a time."""
    for start in range(0, len(matrix), SYMMETRIC_BLOCK):
        stop = start + SYMMETRIC_BLOCK
        band = matrix[start:stop, start:] + matrix[start:, start:stop].T
        matrix[start:stop, start:] = band
        matrix[start:, start:stop] = band.T


def is_worth_keeping(rows: Tensor, columns: int) -> bool:
    """Whether products of the rows (L, D) with so many columns cost more to form than to hold, and fit the limit."""
    return rows.shape[1] >= COSTLY_CHANNELS and len(rows) * columns * rows.element_size() <= LARGEST_MATRIX_BYTES


def chunk_rows(rows: Tensor, columns: int) -> int:
    """Return how many rows (L, D) to compare at a time: a chunk fits the cache, or is large where products dominate."""
    entries = COSTLY_ENTRIES if rows.shape[1] >= COSTLY_CHANNELS else CACHED_ENTRIES
    return max(1, (GPU_ENTRIES if rows.is_cuda else entries) // columns)


def chunk_buffer(rows: Tensor, columns: int) -> Tensor:
    """Return room for a chunk's similarities, (n, M)."""
    return rows.new_empty(chunk_rows(rows, columns), columns)


def chunks(rows: Tensor, columns: int) -> Iterator[slice]:
    """Yield the slices of the rows (L, D) that are compared at a time."""
    return parts(len(rows), chunk_rows(rows, columns))


def parts(length: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover `length`."""
    for start in range(0, length, size):
        yield slice(start, start + size)


def kernel_operands(kernels: Kernels, maps: tuple[Tensor, ...]) -> torch.dtype | None:
    """Return the type in which kernels multiply rows of such maps.

    It is bfloat16 where that is what came and the card multiplies in it, else float32.

    Returns:
        None for the reference, which needs none.

    Raises:
        ValueError: If the kernels cannot run here.
    """
    if kernels == "reference":
        return None
    try:
        from triton import knobs
    except ImportError as error:
        raise ValueError(
            "`kernels` of 'triton' need the package triton, which is not installed. Choose 'reference'."
        ) from error
    first = maps[0]
    if not (first.is_cuda or knobs.runtime.interpret) or first.dtype == torch.float64:
        raise ValueError(
            "`kernels` of 'triton' need float32 or narrower tensors on a CUDA device, but got "
            f"{first.dtype} on {first.device.type}. Choose 'reference'."
        )
    narrow = all(values.dtype == torch.bfloat16 for values in maps)
    capability = torch.cuda.get_device_capability(first.device) if first.is_cuda else (8, 0)
    if capability < _LEAST_CAPABILITY:
        raise ValueError(
            "`kernels` of 'triton' need a card of compute capability 7.5 or more, but this one has "
            f"{capability[0]}.{capability[1]}. Choose 'reference'."
        )
    return torch.bfloat16 if narrow and capability >= (8, 0) else torch.float32


def image_rows(image: Tensor) -> Tensor:
    """Return an image (D, h, w) with a row per pixel, (h * w, D), float32 or wider, without gradient; may be a view."""
    return image.detach().flatten(1).T.to(precise(image.dtype))


def fresh_rows(rows: Tensor) -> Tensor:
    """Return a contiguous copy."""
    return rows.clone(memory_format=torch.contiguous_format)


def write_rows(image: Tensor, rows: Tensor) -> None:
    """Write (h * w, D) into an image (D, h, w)."""
    image.copy_(rows.T.reshape(image.shape))


def precise(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or float64 where that is what came."""
    return torch.promote_types(dtype, torch.float32)
