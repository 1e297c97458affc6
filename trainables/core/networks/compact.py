"""A small network for CPUs, trained from scratch."""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from segadapt.trainables.core.networks.layers import Backbone, NormLayer, SummedDilatedHead
from segadapt.trainables.core.networks.segmenter import Segmenter


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group norm beside a shortcut."""

    def __init__(self, in_channels: int, channels: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.norm1 = _group_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.norm2 = _group_norm(channels)
        self.shortcut = (
            nn.Identity() if in_channels == channels and stride == 1 else nn.Conv2d(in_channels, channels, 1, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, channels, H / stride, W / stride)."""
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class CompactStages(nn.Module):
    """Adds context at stride 8 to detail at stride 4."""

    def __init__(self, in_channels: int, context_channels: int, channels: int) -> None:
        super().__init__()
        self.context = nn.Sequential(
            ResidualBlock(in_channels, context_channels, stride=2),
            ResidualBlock(context_channels, context_channels, dilation=2),
            nn.Conv2d(context_channels, channels, 1, bias=False),
        )
        self.detail = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm = _group_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return features at the resolution of `x`."""
        context = F.interpolate(self.context(x), size=x.shape[-2:], mode="bilinear", align_corners=True)
        return F.relu(self.norm(self.detail(x) + context))


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(8, channels)


def build_compact(num_classes: int, _: NormLayer | None) -> Segmenter:
    """Build a small network for CPUs. Group norm has no batch statistics, which evaluation and workers would change."""
    stem = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, padding=1, bias=False), _group_norm(32), nn.ReLU(), ResidualBlock(32, 48, stride=2)
    )
    stages = CompactStages(48, 96, 64)
    backbone = Backbone(stem, stages)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    # Small features damp the head, whose gradient sums over many cells: it stays stable at ten times the base rate.
    nn.init.constant_(cast(Tensor, stages.norm.weight), 0.3)
    head = SummedDilatedHead(64, num_classes, dilations=(1, 2, 4, 8))
    return Segmenter(backbone, head, feature_channels=64, num_classes=num_classes)
