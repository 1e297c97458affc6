"""Names that authors and other packages give to the tensors of networks that timm has as well."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_BLOCK = re.compile(r"_blocks\.(\d+)\.(\w+)\.(.+)")


def timm_names(state: Mapping[str, Tensor], encoder: nn.Module) -> dict[str, Tensor]:
    """Return named tensors under timm's names, where they have those of a package that is known here.

    Args:
        state: Tensors by name; others than those below are returned as they are.
        encoder: The model of timm that they are for.

    Source:
        EfficientNet-PyTorch and what derives from it, such as EfficientNet-Lite-PyTorch:
        lukemelas/EfficientNet-PyTorch, efficientnet_pytorch/model.py. Its blocks are numbered through; timm's are
        counted within stages.
    """
    if "_conv_stem.weight" not in state or not hasattr(encoder, "blocks"):
        return dict(state)
    blocks = [
        (f"blocks.{stage}.{place}", block)
        for stage, part in enumerate(encoder.blocks)  # type: ignore[arg-type]
        for place, block in enumerate(part)
    ]
    return {_efficientnet_name(name, blocks): tensor for name, tensor in state.items()}


def _efficientnet_name(name: str, blocks: list[tuple[str, Any]]) -> str:
    """Return timm's name of a tensor of EfficientNet-PyTorch; as it is if the network has no such block."""
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    block = _BLOCK.fullmatch(name)
    if block is None:
        part, _, leaf = name.partition(".")
        return f"{outside.get(part, part)}.{leaf}"
    number, part, leaf = int(block[1]), block[2], block[3]
    if number >= len(blocks):
        return name
    place, module = blocks[number]
    expands = hasattr(module, "conv_pwl")  # the first blocks do not: their parts are one fewer
    inside = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2" if expands else "bn1",
        "_se_reduce": "se.conv_reduce",
        "_se_expand": "se.conv_expand",
        "_project_conv": "conv_pwl" if expands else "conv_pw",
        "_bn2": "bn3" if expands else "bn2",
    }
    return f"{place}.{inside.get(part, part)}.{leaf}"
