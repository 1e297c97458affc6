"""Matrix products of pixels fused with what follows them, in Triton: no matrix of all pairs is written.

Imported only where a loss is asked for it: Triton comes with torch for CUDA alone. Every program owns one tile of a
matrix and writes it, or sums of its rows, once; no float is added atomically, so results repeat to the bit. Rows are
float32, multiplied as three products of TF32 parts, which is nearly exact, or bfloat16; both are summed in float32.
Cards with less shared memory, or without these types, take other choices: see `choices`.
"""

# n query rows, m key rows, D channels, T tiles of BLOCK columns. In kernels, `shape` is rows and columns of the result
# and terms of each sum; a matrix of any strides is its address, the stride of its rows and that of its columns.

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from segadapt.trainables.core.losses.pixel_similarity import inverse_deviations

BLOCK = 128
"""Rows and columns of a tile."""
DEPTH = {torch.float32: 32, torch.bfloat16: 64}
"""Terms of a product that are loaded at a time, by type: 128 bytes."""
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
MOST_STAGES = 3
"""Parts of a product that are loaded ahead; see `choices`."""
STAGE_BYTES = 2 * BLOCK * 128
"""Shared memory of one of them: 128 bytes of each row and column of a tile."""
PRECISION = "tf32x3"
GROUP = 8
"""Tiles of so many row blocks follow each other, so that their rows are still in the cache."""


class Choices(NamedTuple):
    """What is chosen by the card."""

    stages: int
    """Parts of a product that are loaded ahead."""
    precision: str
    """How float32 is multiplied."""


def choices(shared_bytes: int, capability: tuple[int, int]) -> Choices:
    """Return what a card of that shared memory per block and compute capability runs.

    H100 and A100 load three parts ahead, cards with less memory fewer. Before capability 8.0 there is no TF32: float32
    is multiplied as it is.
    """
    stages = max(1, min(MOST_STAGES, shared_bytes // STAGE_BYTES))
    return Choices(stages, PRECISION if capability >= (8, 0) else "ieee")


@lru_cache
def _choices_of(device: torch.device) -> Choices:
    if device.type != "cuda":  # Triton's interpreter
        return Choices(MOST_STAGES, PRECISION)
    card = torch.cuda.get_device_properties(device)
    return choices(card.shared_memory_per_block_optin, (card.major, card.minor))


class RowStatistics(NamedTuple):
    """What is known of the similarities of each query row with all key rows."""

    best: Tensor  # (n,) int64, the most similar key row
    top: Tensor  # (n,) float32, that similarity
    inverse: Tensor  # (n,) float32, see `inverse_deviations`


@triton.jit
def _own_tile(rows, columns, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Return the indices of this program's rows and columns, int64, and of its block of columns."""
    across = tl.cdiv(columns, BLOCK)
    group, place = tl.program_id(0) // (GROUP * across), tl.program_id(0) % (GROUP * across)
    height = tl.minimum(tl.cdiv(rows, BLOCK) - group * GROUP, GROUP)
    block = tl.arange(0, BLOCK).to(tl.int64)
    return (group * GROUP + place % height) * BLOCK + block, (place // height) * BLOCK + block, place // height


@triton.jit
def _product(first, second, row, column, shape, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """Return a tile of `first @ second`, float32; what lies outside the matrices is zero."""
    rows, columns, depth = shape
    tile = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for start in range(0, depth, DEPTH):
        term = start + tl.arange(0, DEPTH).to(tl.int64)
        left = tl.load(
            first[0] + row[:, None] * first[1] + term[None, :] * first[2],
            mask=(row[:, None] < rows) & (term[None, :] < depth),
            other=0.0,
        )
        right = tl.load(
            second[0] + term[:, None] * second[1] + column[None, :] * second[2],
            mask=(term[:, None] < depth) & (column[None, :] < columns),
            other=0.0,
        )
        tile = tl.dot(left, right, tile, input_precision=PRECISION)
    return tile


@triton.jit
def row_statistics_kernel(
    query,
    key,
    statistics,
    shape,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write, per row of a tile of `query @ key.T`: largest entry and its column, mean, sum of squares about it."""
    rows, columns, depth = shape
    best, top, mean, squares = statistics
    row, column, across = _own_tile(rows, columns, BLOCK, GROUP)
    tile = _product((query, depth, 1), (key, 1, depth), row, column, shape, DEPTH, PRECISION)
    inside = (column < columns)[None, :]
    highest, place = tl.max(tl.where(inside, tile, float("-inf")), axis=1, return_indices=True)
    count = tl.minimum(columns - across * BLOCK, BLOCK)
    center = tl.sum(tile, axis=1) / count
    offsets = tl.where(inside, tile - center[:, None], 0.0)
    slot = across * rows + row
    tl.store(best + slot, across * BLOCK + place, mask=row < rows)
    tl.store(top + slot, highest, mask=row < rows)
    tl.store(mean + slot, center, mask=row < rows)
    tl.store(squares + slot, tl.sum(offsets * offsets, axis=1), mask=row < rows)


@triton.jit
def exponentials_kernel(
    query,
    key,
    scaling,
    results,
    shape,
    WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write exp((s - top) inverse) for a tile of s = `query @ key.T`, if asked for, and the sums of its rows."""
    rows, columns, depth = shape
    top, inverse = scaling
    row, column, across = _own_tile(rows, columns, BLOCK, GROUP)
    tile = _product((query, depth, 1), (key, 1, depth), row, column, shape, DEPTH, PRECISION)
    highest = tl.load(top + row, mask=row < rows, other=0.0)
    factor = tl.load(inverse + row, mask=row < rows, other=0.0)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.exp(tl.where(inside, (tile - highest[:, None]) * factor[:, None], float("-inf")))
    tl.store(results[0] + across * rows + row, tl.sum(tile, axis=1), mask=row < rows)
    if WRITE:
        out = results[1]
        tl.store(out + row[:, None] * columns + column[None, :], tile.to(out.dtype.element_ty), mask=inside)


@triton.jit
def multiply_kernel(
    first,
    second,
    out,
    offset,
    shape,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Set a tile of `out` to that of `first @ second`, add that to it, or multiply it by that less a row's offset."""
    rows, columns = shape[0], shape[1]
    row, column, _ = _own_tile(rows, columns, BLOCK, GROUP)
    tile = _product(first, second, row, column, shape, DEPTH, PRECISION)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = out + row[:, None] * columns + column[None, :]
    if MODE == "add":
        tile += tl.load(place, mask=inside, other=0.0)
    if MODE == "scale":
        tile -= tl.load(offset + row, mask=row < rows, other=0.0)[:, None]
        tile *= tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, tile.to(out.dtype.element_ty), mask=inside)


def row_statistics(query: Tensor, key: Tensor, factor: float) -> RowStatistics:
    """Find the most similar key row of each query row and the deviation of its similarities, which are formed once.

    Args:
        query: (n, D), contiguous, float32 or bfloat16.
        key: (m, D), likewise.
        factor: Multiplies the deviations.
    """
    rows, columns, across = len(query), len(key), triton.cdiv(len(key), BLOCK)
    best = torch.empty(across, rows, dtype=torch.int64, device=query.device)
    top, mean, squares = (query.new_empty(across, rows, dtype=torch.float32) for _ in range(3))
    row_statistics_kernel[_grid(rows, columns)](
        query, key, (best, top, mean, squares), (rows, columns, query.shape[1]), **_constants(query)
    )
    counts = torch.full((across, 1), BLOCK, device=query.device)
    counts[-1] = columns - (across - 1) * BLOCK
    center = (mean * counts).sum(dim=0) / columns
    square = squares.sum(dim=0) + (counts * (mean - center).square()).sum(dim=0)
    highest, tile = top.max(dim=0)
    deviation = (square / max(columns - 1, 1)).sqrt()
    return RowStatistics(best.gather(0, tile[None])[0], highest, inverse_deviations(deviation, center, factor))


def exponentials(query: Tensor, key: Tensor, top: Tensor, inverse: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute exp((s - top) inverse) of the similarities s of query and key rows.

    Args:
        query: (n, D), contiguous, float32 or bfloat16.
        key: (m, D), likewise.
        top: Subtracted, (n,) float32.
        inverse: Multiplied with, (n,) float32.
        out: Where to write them, (n, m), contiguous, float32 or bfloat16; None sums alone.

    Returns:
        Sums over the key rows, (n,) float32.
    """
    rows, columns = len(query), len(key)
    sums = query.new_empty(triton.cdiv(columns, BLOCK), rows, dtype=torch.float32)
    exponentials_kernel[_grid(rows, columns)](
        query,
        key,
        (top, inverse),
        (sums, out),
        (rows, columns, query.shape[1]),
        WRITE=out is not None,
        **_constants(query),
    )
    return sums.sum(dim=0)


def multiply_(out: Tensor, first: Tensor, second: Tensor, *, add: bool = False) -> Tensor:
    """Set `out` to `first @ second`, or add that to it.

    Args:
        out: (n, m), contiguous, float32 or bfloat16.
        first: (n, k), any strides, float32 or bfloat16.
        second: (k, m), of the same type, any strides.
        add: Whether `out` keeps what it has.
    """
    return _multiply(out, first, second, out, "add" if add else "set")


def scale_(out: Tensor, first: Tensor, second: Tensor, offset: Tensor) -> Tensor:
    """Multiply `out`, (n, m), by `first @ second` less `offset`, (n,) float32; otherwise as `multiply_`."""
    return _multiply(out, first, second, offset, "scale")


def _multiply(out: Tensor, first: Tensor, second: Tensor, offset: Tensor, mode: str) -> Tensor:
    multiply_kernel[_grid(*out.shape)](
        (first, *first.stride()),
        (second, *second.stride()),
        out,
        offset,
        (*out.shape, first.shape[1]),
        MODE=mode,
        **_constants(first),
    )
    return out


def _grid(rows: int, columns: int) -> tuple[int]:
    return (triton.cdiv(rows, BLOCK) * triton.cdiv(columns, BLOCK),)


def _constants(rows: Tensor) -> dict[str, object]:
    chosen = _choices_of(rows.device)
    constants = {"BLOCK": BLOCK, "DEPTH": DEPTH[rows.dtype], "GROUP": GROUP, "PRECISION": chosen.precision}
    return {**constants, **OPTIONS, "num_stages": chosen.stages}
