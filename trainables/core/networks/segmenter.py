"""A segmentation network in two parts, what it returns, and how images become its input.

B images of H x W pixels, D feature channels, C classes, h x w cells of the feature map.
"""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segadapt.trainables.core.networks.layers import SplitBackbone


@dataclass(frozen=True)
class Normalisation:
    """How RGB images in 0..255 become a network's input: channels ordered, mean subtracted, divided by deviation."""

    mean: tuple[float, float, float]
    """Mean of each channel in units of `unit`, in the order of the network's channels."""
    std: tuple[float, float, float]
    """Standard deviation of each channel, in the same units and order."""
    unit: float = 1.0
    bgr: bool = False
    """Whether the network takes blue first."""


IMAGENET_RGB = Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), unit=255.0)
"""Normalisation of torchvision's networks. Paper: SDCA, DRSL."""

CAFFE_BGR = Normalisation(mean=(104.00698793, 116.66876762, 122.67891434), std=(1.0, 1.0, 1.0), bgr=True)
"""Normalisation of Caffe's networks. Paper: PLCA, BiCL, CLST."""


class SegmenterOutput(NamedTuple):
    """What a segmenter returns, both at feature resolution."""

    logits: Tensor  # (B, C, h, w)
    features: Tensor  # (B, D, h, w)


class Segmenter(nn.Module):
    """A segmentation network in two parts that share no parameter.

    Args:
        backbone: Maps images (B, 3, H, W) to features (B, D, h, w), or to what `decode` makes features of.
        head: Maps features to logits (B, C, h, w). It is randomly initialised, the backbone may be pretrained.
        feature_channels: D.
        num_classes: C.
        align_corners: Corner rule of `upsample`.
        normalisation: How images become the backbone's input.
    """

    mean: Tensor
    std: Tensor
    least_images = 1
    """Images it must see at a time in training, set by `build_segmenter`."""

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        *,
        feature_channels: int,
        num_classes: int,
        align_corners: bool = True,
        normalisation: Normalisation = IMAGENET_RGB,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.feature_channels = feature_channels
        self.num_classes = num_classes
        self.align_corners = align_corners
        self.normalisation = normalisation
        mean, std = (
            normalisation.unit * torch.tensor(part).view(3, 1, 1) for part in (normalisation.mean, normalisation.std)
        )
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, images: Tensor) -> SegmenterOutput:
        """Return logits and features of normalised images, (B, 3, H, W) float."""
        features = self.features(images)
        return SegmenterOutput(self.classify(features), features)

    def features(self, images: Tensor) -> Tensor:
        """Return the features of normalised images, (B, D, h, w)."""
        return self.decode(self.backbone(images))

    def decode(self, hidden: Any) -> Tensor:
        """Return the features, (B, D, h, w), of what the backbone gives: here that itself."""
        return cast(Tensor, hidden)

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits, (B, C, h, w), of features."""
        return cast(Tensor, self.head(features))

    def normalise(self, images: Tensor) -> Tensor:
        """Return RGB images, (..., 3, H, W) uint8, as this network's float input; see `normalisation`."""
        if self.normalisation.bgr:
            images = images.flip(-3)
        return (images.to(self.mean.dtype) - self.mean) / self.std

    def restore(self, images: Tensor) -> Tensor:
        """Return normalised images, (..., 3, H, W), as RGB in [0, 1]: the inverse of `normalise`, but for the scale."""
        rgb = (images * self.std + self.mean) / 255
        return rgb.flip(-3) if self.normalisation.bgr else rgb

    def upsample(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Return `logits`, (B, C, h, w), interpolated bilinearly to (B, C, *size), in float32 or wider."""
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.interpolate(precise, size=size, mode="bilinear", align_corners=self.align_corners)


def split_backbone(segmenter: Segmenter) -> SplitBackbone:
    """Return the backbone of a network whose shallow layers may be kept per domain.

    Raises:
        ValueError: If it has no such layers.
    """
    backbone = segmenter.backbone
    if not isinstance(backbone, SplitBackbone):
        raise ValueError(
            f"method.split_stem=true needs a backbone with a stem, but the network has {type(backbone).__name__}. "
            "Set method.split_stem=false or choose another network.name."
        )
    return backbone


def with_stem(segmenter: Segmenter, stem: nn.Module) -> Segmenter:
    """Return a network with other shallow layers; it shares `stem` and all other parts, and is part of no state."""
    network = copy.copy(segmenter)
    network._modules = dict(segmenter._modules)  # the copy would share the original's
    network.backbone = split_backbone(segmenter).with_stem(stem)
    return network
