"""Noise tables that textures, clouds and ragged edges are read from.

Only sums, products and look-ups are used, whose results are the same on every processor.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from segadapt.trainables.core.data.streets.domains import Floats

SIDE = 256
"""Rows and columns of a table; it repeats."""


@cache
def noise_table(cells: int, octaves: int) -> Floats:
    """Return smooth noise of mean 0 and a standard deviation of about 1, flattened, (SIDE * SIDE,).

    Args:
        cells: Random values along a side in the coarsest octave; a power of 2.
        octaves: How many are summed, each with twice the cells and 0.6 times the amplitude.
    """
    rng = np.random.default_rng([cells, octaves])
    table = np.zeros((SIDE, SIDE), np.float32)
    amplitude = np.float32(1)
    for _ in range(octaves):
        lattice = rng.random((cells, cells), np.float32) * 2 - 1
        table += amplitude * _enlarged(lattice)
        amplitude *= np.float32(0.6)
        cells = min(2 * cells, SIDE)
    table -= table.mean(dtype=np.float64).astype(np.float32)
    spread = np.sqrt((table * table).mean(dtype=np.float64)).astype(np.float32)
    flat: Floats = (table / spread).ravel()
    flat.flags.writeable = False
    return flat


def _enlarged(lattice: Floats) -> Floats:
    """Interpolate a periodic lattice, (N, N), to (SIDE, SIDE)."""
    cells = len(lattice)
    position = np.arange(SIDE, dtype=np.float32) * np.float32(cells / SIDE)
    first = position.astype(np.intp)
    part = position - first
    part = part * part * (3 - 2 * part)
    second = (first + 1) % cells
    rows = lattice[first] * (1 - part)[:, None] + lattice[second] * part[:, None]
    enlarged: Floats = rows[:, first] * (1 - part) + rows[:, second] * part
    return enlarged


def read_noise(table: Floats, u: Floats, v: Floats) -> Floats:
    """Look up noise at table cells; `u` and `v` broadcast, may be negative, and repeat after SIDE."""
    row = _cells(v) & (SIDE - 1)
    values: Floats = table.take(row * SIDE + (_cells(u) & (SIDE - 1)))
    return values


def _cells(position: Floats) -> NDArray[np.int32]:
    return position.astype(np.int32)
