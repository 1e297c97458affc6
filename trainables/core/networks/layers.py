"""Parts that several networks are built of: backbone, head, frozen batch norm, recomputed blocks.

B images of H x W pixels, D feature channels, C classes, h x w cells of the feature map.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

_BLOCKS = frozenset({"ResidualBlock", "Bottleneck", "InvertedResidual"})
"""Names of the classes of residual blocks: torchvision, which has the last two, takes seconds to import."""

NormLayer = Callable[[int], nn.Module]


class SplitBackbone(nn.Module, ABC):
    """A backbone that has a stem: the shallow layers, which a method may keep per domain."""

    stem: nn.Module

    @abstractmethod
    def with_stem(self, stem: nn.Module) -> nn.Module:
        """Return a backbone that has `stem` in place of its own, and shares all else."""


class Backbone(SplitBackbone):
    """A backbone in two steps: `stem` and `stages`."""

    def __init__(self, stem: nn.Module, stages: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.stages = stages

    def forward(self, images: Tensor) -> Tensor:
        """Return features, (B, D, h, w)."""
        return cast(Tensor, self.stages(self.stem(images)))

    def with_stem(self, stem: nn.Module) -> "Backbone":
        """Return a backbone that has `stem` in place of its own, and shares `stages`."""
        return Backbone(stem, self.stages)


class Encoding(SplitBackbone):
    """A backbone whose `encoder` can compute its blocks once more in the backward pass, as timm's models can."""

    encoder: Any


class SummedDilatedHead(nn.Module):
    """Parallel 3x3 convolutions of different dilation, summed: the classifier of DeepLab-v2.

    Weights start from N(0, 0.01^2). Source: Chen et al., DeepLab, TPAMI 2018, as used by SDCA, BiCL and CLST.
    """

    def __init__(self, feature_channels: int, num_classes: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        convolutions = [
            nn.Conv2d(feature_channels, num_classes, 3, padding=dilation, dilation=dilation) for dilation in dilations
        ]
        for convolution in convolutions:
            nn.init.normal_(convolution.weight, std=0.01)
        self.convolutions = nn.ModuleList(convolutions)

    def branches(self, features: Tensor) -> list[Tensor]:
        """Return the output of each convolution, (B, C, h, w) each; BiCL contrasts their concatenation."""
        return [convolution(features) for convolution in self.convolutions]

    def forward(self, features: Tensor) -> Tensor:
        """Return logits, (B, C, h, w)."""
        first, *others = self.branches(features)
        for other in others:
            first = first + other
        return first


class _RoundedOnce(torch.autograd.Function):
    """`x * scale + shift` of a narrow `x` and wider constants, which are rounded to the type of `x` at the end alone.

    Written into a tensor of the narrow type, so that a GPU casts in its registers: one launch, nothing wide in memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return torch.addcmul(shift, x, scale, out=torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        return torch.mul(gradient, scale, out=torch.empty_like(gradient)), None, None


class FrozenBatchNorm(nn.Module):
    """Batch norm whose affine part and statistics are constants: `weight * (x - mean) / sqrt(var + epsilon) + bias`.

    Loads the state of `nn.BatchNorm2d`. Returns its input's type, and keeps no copy of it for the backward pass. Scale
    and shift are computed when the constants are loaded or converted: that spares a GPU five launches in each pass.
    They stay float32 beside a narrower input, and only the result is rounded.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, channels: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("scale", torch.empty(channels), persistent=False)
        self.register_buffer("shift", torch.empty(channels), persistent=False)
        self._join_constants()
        self.register_load_state_dict_post_hook(FrozenBatchNorm._after_load)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised `x`, (B, channels, H, W)."""
        scale, shift = (constant.view(-1, 1, 1) for constant in (self.scale, self.shift))
        if x.dtype == scale.dtype:
            return torch.addcmul(shift, x, scale)
        return cast(Tensor, _RoundedOnce.apply(x, scale, shift))

    def _join_constants(self) -> None:
        self.scale = self.weight * (self.running_var + self.epsilon).rsqrt()
        self.shift = self.bias - self.running_mean * self.scale

    def _after_load(self, _: Any) -> None:
        self._join_constants()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenBatchNorm":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._join_constants()
        return self


def recompute_blocks(network: nn.Module) -> None:
    """Let residual blocks keep their input alone for the backward pass, which computes the rest of them once more.

    Gradients stay the same. With the three convolutions of ResNet's blocks, the step takes about a third longer.

    Args:
        network: A network or a whole method; changed in place.

    Raises:
        ValueError: If a block has batch norm that is trained, whose running statistics would move twice, or a backbone
            of timm's kind cannot do so.
    """
    encoders = [part.encoder for part in network.modules() if isinstance(part, Encoding)]
    for encoder in encoders:
        _check_no_trained_norm(encoder)
        if not hasattr(encoder, "set_grad_checkpointing"):
            raise ValueError(
                "trainer.recompute=true needs a backbone with set_grad_checkpointing, but "
                f"{type(encoder).__name__} has none. Set trainer.recompute=false."
            )
        encoder.set_grad_checkpointing(True)
    in_encoders = {part for encoder in encoders for part in encoder.modules()}
    for block in network.modules():
        if type(block).__name__ in _BLOCKS and block not in in_encoders:
            _check_no_trained_norm(block)
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def _check_no_trained_norm(block: nn.Module) -> None:
    if any(isinstance(part, _BatchNorm) for part in block.modules()):
        raise ValueError(
            "trainer.recompute=true needs a backbone without trained batch norm, but this network has it. "
            "Set network.freeze_norm=true, or trainer.recompute=false."
        )
