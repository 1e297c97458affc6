"""Lite R-ASPP on MobileNet-v3."""

from collections import OrderedDict
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segadapt.trainables.core.networks.layers import Backbone, NormLayer
from segadapt.trainables.core.networks.segmenter import Segmenter


class LrasppStages(nn.Module):
    """MobileNet's blocks from stride 8 on: detail at stride 8 and context at stride 16."""

    def __init__(self, low: nn.Module, high: nn.Module) -> None:
        super().__init__()
        self.low = low
        self.high = high

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, 40, H / 8, W / 8) and (B, 960, H / 16, W / 16)."""
        low = self.low(x)
        return low, self.high(low)


class LrasppSegmenter(Segmenter):
    """Lite R-ASPP. Features are what the two classifiers see: 40 channels of detail and 128 of gated context.

    Source: Howard et al., Searching for MobileNetV3, ICCV 2019; torchvision's LRASPP, of which `head` is a part.
    """

    def decode(self, hidden: tuple[Tensor, Tensor]) -> Tensor:
        """Return the features, (B, D, h, w), of detail and context."""
        low, high = hidden
        head = cast(Any, self.head)
        gated = head.cbr(high) * head.scale(high)
        context = F.interpolate(gated, size=low.shape[-2:], mode="bilinear", align_corners=False)
        return torch.cat([low, context], 1)

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits, (B, C, h, w), of features."""
        head = cast(Any, self.head)
        detail = head.low_classifier.in_channels
        return cast(Tensor, head.low_classifier(features[:, :detail]) + head.high_classifier(features[:, detail:]))


def build_lraspp_mobilenet_v3_large(num_classes: int, frozen_norm: NormLayer | None) -> Segmenter:
    """Build Lite R-ASPP on a MobileNet-v3 whose last blocks are dilated, as torchvision does."""
    from torchvision.models import mobilenet_v3_large
    from torchvision.models.segmentation.lraspp import LRASPPHead

    # `dilated` is a private switch of torchvision's builder; its own segmentation models set it the same way.
    mobilenet = mobilenet_v3_large(weights=None, dilated=True, **({"norm_layer": frozen_norm} if frozen_norm else {}))
    blocks = [(str(index), block) for index, block in enumerate(mobilenet.features)]
    stem, low, high = (nn.Sequential(OrderedDict(part)) for part in (blocks[:4], blocks[4:5], blocks[5:]))
    return LrasppSegmenter(
        Backbone(stem, LrasppStages(low, high)),
        LRASPPHead(40, 960, num_classes, 128),
        feature_channels=168,
        num_classes=num_classes,
    )
