"""Heads for backbones of any kind: a decoder that joins the backbone's maps, and the classifier of what it gives.

What a decoder returns are the features that methods look at: what the last classifier sees, on the grid of the logits.

B images, C classes, D channels of the features on h x w cells. A backbone gives one map or several, finest first,
(B, D_i, h_i, w_i) each.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Maps = Sequence[Tensor]


class DecoderHead(nn.Module, ABC):
    """A decoder and a classifier.

    Args:
        channels: D_i of each map, finest first.
        num_classes: C.
    """

    maps: ClassVar[int]
    """How many maps of a backbone with several resolutions the head reads, the coarsest ones; 0: all."""
    feature_channels: int
    """D, which the subclass's `__init__` sets, as it does `classifier`."""
    classifier: nn.Module

    @abstractmethod
    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()

    @abstractmethod
    def decode(self, maps: Maps) -> Tensor:
        """Return the features, (B, D, h, w)."""

    def forward(self, maps: Maps) -> Tensor:
        """Return logits, (B, C, h, w)."""
        return cast(Tensor, self.classifier(self.decode(maps)))


class LinearHead(DecoderHead):
    """A 1x1 convolution on the maps themselves, each normalised, brought to the finest one and put side by side.

    A single map, which ends with the backbone's own norm, is taken as it is.
    """

    maps = 0

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__(channels, num_classes)
        self.norms = nn.ModuleList([nn.GroupNorm(1, width) for width in channels] if len(channels) > 1 else [])
        self.feature_channels = sum(channels)
        self.classifier = nn.Conv2d(self.feature_channels, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def decode(self, maps: Maps) -> Tensor:
        """Return the joined maps, (B, D_1 + D_2 + ..., h_1, w_1)."""
        if not self.norms:
            return maps[0]
        return _joined([norm(part) for norm, part in zip(self.norms, maps, strict=True)])


class LightHead(DecoderHead):
    """Two transposed convolutions on the coarsest map, then a 3x3 one: four times as fine, a quarter of the channels.

    Source: VFM-UDA, tue-mps/vfm-uda@e154d8f, models/vit_variants/vit_lightweight_head.py.
    """

    maps = 1

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__(channels, num_classes)
        whole, half, quarter = channels[-1], channels[-1] // 2, channels[-1] // 4
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(whole, half, 2, stride=2, bias=False),
            ChannelNorm(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, stride=2, bias=False),
            ChannelNorm(quarter),
            nn.Conv2d(quarter, quarter, 3, padding=1, bias=False),
            ChannelNorm(quarter),
        )
        self.feature_channels = quarter
        self.classifier = nn.Conv2d(quarter, num_classes, 1, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.1)

    def decode(self, maps: Maps) -> Tensor:
        """Return features, (B, D_n / 4, 4 h_n, 4 w_n)."""
        return cast(Tensor, self.decoder(maps[-1]))


class PyramidHead(DecoderHead):
    """A feature pyramid: coarse maps are added to finer ones, and all levels are joined at the finest.

    A single map is first given four resolutions by itself, from four times as fine to half as fine.
    Source: Lin et al., Feature Pyramid Networks, CVPR 2017; Li et al., Exploring Plain Vision Transformer Backbones for
    Object Detection, ECCV 2022 (the pyramid of a single map).
    """

    maps = 0
    width = 256

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__(channels, num_classes)
        self.scales = SimplePyramid(channels[0]) if len(channels) == 1 else None
        levels = self.scales.channels if self.scales is not None else list(channels)
        self.lateral = nn.ModuleList(nn.Conv2d(level, self.width, 1) for level in levels)
        self.smooth = nn.ModuleList(_convolution(self.width, self.width, 3) for _ in levels)
        self.feature_channels = self.width
        self.classifier = nn.Conv2d(self.width, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def decode(self, maps: Maps) -> Tensor:
        """Return features, (B, 256, h, w), at the resolution of the finest level."""
        levels = self.scales(maps[0]) if self.scales is not None else maps
        above: Tensor | None = None
        joined: list[Tensor] = []
        for level, lateral, smooth in zip(reversed(levels), reversed(self.lateral), reversed(self.smooth), strict=True):
            here = lateral(level)
            above = here if above is None else here + _resized(above, here)
            joined.append(smooth(above))
        features = joined[-1]
        for level in joined[:-1]:
            features = features + _resized(level, features)
        return features


class SimplePyramid(nn.Module):
    """Four maps from one: four times and twice as fine, as it is, and half as fine."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        self.channels = [quarter, half, channels, channels]
        self.fine = nn.Sequential(
            nn.ConvTranspose2d(channels, half, 2, stride=2),
            ChannelNorm(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, stride=2),
        )
        self.middle = nn.ConvTranspose2d(channels, half, 2, stride=2)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps, finest first."""
        return [self.fine(x), self.middle(x), x, F.max_pool2d(x, 3, 2, padding=1)]


class DAFormerHead(DecoderHead):
    """Four maps, each brought to 256 channels and to the finest one, joined by separable atrous convolutions.

    Source: Hoyer et al., DAFormer, CVPR 2022; lhoyer/MIC@2f932a9. Batch norm is trained and reads one worker's batch.
    """

    maps = 4
    width = 256
    dilations = (1, 6, 12, 18)
    dropout = 0.1

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__(channels, num_classes)
        if len(channels) != 4:
            raise ValueError(
                f"network.head=daformer needs a backbone with four resolutions, but this one gives {len(channels)}. "
                "Set network.head to light or pyramid, or choose a hierarchical backbone."
            )
        self.embed = nn.ModuleList(nn.Conv2d(part, self.width, 1) for part in channels)
        joined = self.width * len(channels)
        self.branches = nn.ModuleList(_separable(joined, self.width, dilation) for dilation in self.dilations)
        self.bottleneck = _convolution(self.width * len(self.dilations), self.width, 3)
        self.feature_channels = self.width
        self.classifier = nn.Sequential(nn.Dropout2d(self.dropout), nn.Conv2d(self.width, num_classes, 1))
        nn.init.normal_(cast(nn.Conv2d, self.classifier[1]).weight, std=0.01)

    def decode(self, maps: Maps) -> Tensor:
        """Return features, (B, 256, h_1, w_1)."""
        joined = _joined([embed(part) for embed, part in zip(self.embed, maps, strict=True)])
        return cast(Tensor, self.bottleneck(torch.cat([branch(joined) for branch in self.branches], 1)))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each cell of a map, (B, D, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised map."""
        return exportable(super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


HEADS: dict[str, type[DecoderHead]] = {
    "linear": LinearHead,
    "light": LightHead,
    "pyramid": PyramidHead,
    "daformer": DAFormerHead,
}
"""Heads by name, beside `deeplabv2`, which has no decoder."""


def exportable(x: Tensor) -> Tensor:
    """Return `x`, contiguous if a graph is made of it: `torch.export` asks about strides that depend on sizes."""
    return x.contiguous() if torch.compiler.is_exporting() else x


def _convolution(channels: int, width: int, kernel: int, *, dilation: int = 1) -> nn.Sequential:
    """Return a convolution that keeps the resolution, with batch norm and ReLU."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


def _separable(channels: int, width: int, dilation: int) -> nn.Sequential:
    """Return a depthwise 3x3 and a 1x1 convolution; without dilation a plain 1x1 one."""
    if dilation == 1:
        return _convolution(channels, width, 1)
    depthwise = nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )
    return nn.Sequential(depthwise, _convolution(channels, width, 1))


def _joined(maps: Maps) -> Tensor:
    """Return maps side by side, brought to the resolution of the first."""
    return torch.cat([maps[0], *(_resized(part, maps[0]) for part in maps[1:])], 1)


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
