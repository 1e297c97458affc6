"""What is hidden of an image whose labels must be told from its context: blocks of pixels, or tokens."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from segadapt.trainables.core.networks import TimmBackbone


def block_mask(size: tuple[int, int], block: int, ratio: float, draws: Tensor) -> Tensor:
    """Return which pixels are kept, (B, 1, H, W) bool: a grid of cells, each kept where its draw exceeds `ratio`.

    Args:
        size: H and W.
        block: Pixels per side of a cell, about: the grid has round(H / block) x round(W / block) cells, halves rounded
            to even, at least one; row i of the image takes row floor(i g / H) of the grid of g rows.
        ratio: Share that is hidden, in [0, 1]. Paper: 0.7.
        draws: U(0, 1), of the shape that `mask_grid` returns.

    Source:
        Hoyer et al., MIC, CVPR 2023; lhoyer/MIC@2f932a9, mmseg/models/utils/masking_transforms.py.
    """
    kept = draws > ratio
    rows, columns = (
        torch.arange(side, device=draws.device) * cells // side
        for side, cells in zip(size, kept.shape[-2:], strict=True)
    )
    return kept[..., rows[:, None], columns]


def mask_grid(batch: int, size: tuple[int, int], block: int) -> tuple[int, int, int, int]:
    """Return the shape of the draws of `block_mask`: (B, 1, cells per column, cells per row)."""
    return (batch, 1, max(1, round(size[0] / block)), max(1, round(size[1] / block)))


def mask_tokens(tokens: Tensor, mask_token: Tensor, ratio: float, draws: Tensor) -> Tensor:
    """Replace each token whose draw is below `ratio`.

    To be used after the patches are embedded, and before positions and class token are added.

    Args:
        tokens: (B, L, D).
        mask_token: What stands in, broadcast to (B, L, D).
        ratio: Share that is replaced. Paper: 0.7.
        draws: U(0, 1), (B, L).

    Source:
        Englert et al., VFM-UDA, 2024; tue-mps/vfm-uda@e154d8f.
    """
    return torch.where((draws < ratio)[..., None], mask_token, tokens)


@contextlib.contextmanager
def masked_tokens(
    backbone: TimmBackbone, mask_token: Tensor, ratio: float, draw: Callable[[int], Tensor]
) -> Iterator[None]:
    """Let a plain transformer see a share of its patches as `mask_token` within the context; see `mask_tokens`.

    Args:
        backbone: A plain transformer.
        mask_token: (D,).
        ratio: Share that is replaced.
        draw: Returns U(0, 1), (B, L), for the number L of tokens that images turn out to have.
    """

    def replace(module: nn.Module, images: Any, tokens: Tensor) -> Tensor:
        listed = tokens.flatten(1, -2)  # (B, L, D), or (B, h, w, D) of models whose positions are interpolated
        return mask_tokens(listed, mask_token.to(tokens.dtype), ratio, draw(listed.shape[1])).view_as(tokens)

    hook = backbone.encoder.patch_embed.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()
