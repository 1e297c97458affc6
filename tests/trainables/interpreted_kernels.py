"""Checks of the fused kernels in Triton's interpreter, which needs no GPU; it must be chosen before Triton is imported.

The reference in float64 is what they are compared with, on shapes that are no multiples of their blocks.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import numpy as np
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from segadapt.trainables.core.losses import cycle_association, kernels, pixel_similarity

NARROW = torch.bfloat16
kernels.BLOCK = 16
kernels.GROUP = 2
kernels.DEPTH = {torch.float32: 16, NARROW: 16}
few = settings(max_examples=6, deadline=None, derandomize=True)
sides = st.integers(1, 40)


def multiply_values(self: Any, first: Any, second: Any, *others: Any) -> Any:
    """Multiply what bfloat16 stands for: the interpreter multiplies its bits."""
    wide = [
        interpreter.TensorHandle((part.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if part.dtype.scalar == tl.bfloat16
        else part
        for part in (first, second)
    ]
    return multiply_handles(self, *wide, *others)


multiply_handles = interpreter.InterpreterBuilder.create_dot
interpreter.InterpreterBuilder.create_dot = multiply_values


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = (actual.double() - expected.double()).norm()
    assert error <= tolerance * expected.double().norm() + 1e-12, f"{error / expected.double().norm():.1e}"


@few
@given(sides, sides, st.integers(1, 40), st.sampled_from([torch.float32, NARROW]), st.integers(0, 2**31))
def check_parts(rows: int, columns: int, depth: int, dtype: torch.dtype, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    query, key, direction = (torch.randn(size, depth, generator=draw).to(dtype) for size in (rows, columns, rows))
    similarities = query.double() @ key.double().T
    found = kernels.row_statistics(query, key, 1.3)
    close(similarities.gather(1, found.best[:, None])[:, 0], similarities.amax(dim=1), 1e-6)
    close(found.top, similarities.amax(dim=1), 1e-6)
    inverse = pixel_similarity.standardise_(similarities.clone(), 1.3)[:, 0]
    if columns > 1:
        close(found.inverse, inverse, 1e-5)

    expected = ((similarities - found.top[:, None]) * found.inverse[:, None]).exp()
    out = torch.full((rows, columns), torch.nan, dtype=dtype)
    for room in (None, out):
        close(kernels.exponentials(query, key, found.top, found.inverse, room), expected.sum(dim=1), 1e-5)
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    close(out, expected, rounding)

    offset = torch.randn(rows, generator=draw)
    scaled = out.double() * (direction.double() @ key.double().T - offset[:, None])
    weights = out.clone()
    close(kernels.scale_(out, direction, key.T, offset), scaled, rounding)
    product = kernels.multiply_(torch.full((columns, depth), torch.nan), weights.T, query)
    close(product, weights.double().T @ query.double(), 1e-5)
    close(kernels.multiply_(product, weights.T, query, add=True), 2 * weights.double().T @ query.double(), 1e-5)


@few
@given(
    grids=st.tuples(*[st.integers(1, 5)] * 4),
    channels=st.integers(3, 40),
    labelled=st.sampled_from([0.0, 0.6, 1.0]),
    knobs=st.tuples(st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.3, 1.0])),
    level=st.sampled_from(["feature_association", "output_association"]),
    seed=st.integers(0, 2**31),
)
def check_association(
    grids: tuple[int, ...], channels: int, labelled: float, knobs: tuple[float, float], level: str, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    maps = [torch.randn(1, channels, *grid, generator=draw).requires_grad_() for grid in (grids[:2], grids[2:])]
    labels = torch.randint(0, 2, (1, *grids[:2]), generator=draw)
    labels[torch.rand(labels.shape, generator=draw) >= labelled] = 255
    association = getattr(cycle_association, level)
    settings = {"aggregation_weight": knobs[0], "temperature_factor": knobs[1]}
    actual = association(*maps, labels, **settings, kernels="triton")
    expected = association(*(values.double() for values in maps), labels, **settings)
    close(actual, expected, 1e-5)
    again = association(*maps, labels, **settings, kernels="triton")
    with torch.no_grad():
        assert torch.equal(association(*maps, labels, **settings, kernels="triton"), actual)
    for ours, theirs, repeated in zip(
        *(torch.autograd.grad(loss, maps) for loss in (actual, expected, again)), strict=True
    ):
        close(ours, theirs, 1e-4)
        assert torch.equal(ours, repeated)


def check_bfloat16_features() -> None:
    draw = torch.Generator().manual_seed(0)
    target = torch.randn(1, 64, 4, 5, generator=draw)
    source = target.flip(3) + 0.1 * torch.randn(1, 64, 4, 5, generator=draw)  # each pixel's partner is beyond doubt
    maps = [values.to(NARROW).requires_grad_() for values in (source, target)]
    labels = torch.zeros(1, 4, 5, dtype=torch.int64)
    losses = [cycle_association.feature_association(*maps, labels, kernels=form) for form in ("triton", "reference")]
    close(*losses, 1e-3)
    for ours, theirs in zip(*(torch.autograd.grad(loss, maps) for loss in losses), strict=True):
        assert ours.dtype == NARROW
        close(ours, theirs, 3e-2)


if __name__ == "__main__":
    check_parts()
    check_association()
    check_bfloat16_features()
