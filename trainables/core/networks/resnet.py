"""DeepLab on ResNet: v2 on torchvision's and on Caffe's ResNet-101, v3 on ResNet-50."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn

from segadapt.trainables.core.networks.layers import Backbone, NormLayer, SummedDilatedHead
from segadapt.trainables.core.networks.segmenter import CAFFE_BGR, Segmenter


def _resnet_backbone(constructor: Callable[..., nn.Module], frozen_norm: NormLayer | None) -> Backbone:
    """Return a ResNet of output stride 8, whose stages 3 and 4 trade their stride for dilation 2 and 4."""
    resnet = constructor(
        weights=None, norm_layer=frozen_norm or nn.BatchNorm2d, replace_stride_with_dilation=[False, True, True]
    )
    parts = dict(resnet.named_children())
    return Backbone(
        _named_sequence(parts, "conv1", "bn1", "relu", "maxpool", "layer1"),
        _named_sequence(parts, "layer2", "layer3", "layer4"),
    )


def _named_sequence(parts: Mapping[str, nn.Module], *names: str) -> nn.Sequential:
    return nn.Sequential(OrderedDict((name, parts[name]) for name in names))


def build_deeplabv2_resnet101(num_classes: int, frozen_norm: NormLayer | None) -> Segmenter:
    """Build DeepLab-v2 on ResNet-101, the field's standard network. Source: BIT-DA/SDCA@d00e7ba."""
    from torchvision.models import resnet101

    return Segmenter(
        _resnet_backbone(resnet101, frozen_norm),
        SummedDilatedHead(2048, num_classes, dilations=(6, 12, 18, 24)),
        feature_channels=2048,
        num_classes=num_classes,
    )


def build_deeplabv2_resnet101_caffe(num_classes: int, frozen_norm: NormLayer | None) -> Segmenter:
    """Build DeepLab-v2 on ResNet-101 as converted from Caffe. Source: kgl-prml/Pixel-Level-Cycle-Association@e01d77a.

    Against torchvision's: a bottleneck strides in its first 1x1 convolution, the max-pool rounds sizes up, the first
    block of a dilated stage has the stage's dilation, and the input is BGR.
    Differs: the head has a bias and starts from small weights, as in `deeplabv2_resnet101`.
    """
    from torchvision.models import resnet101

    backbone = _resnet_backbone(resnet101, frozen_norm)
    cast(Any, backbone.stem).maxpool.ceil_mode = True
    stages = cast(Any, backbone.stages)
    first = stages.layer2[0]
    first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
    for block, dilation in ((stages.layer3[0], (2, 2)), (stages.layer4[0], (4, 4))):
        block.conv2.dilation = block.conv2.padding = dilation
    return Segmenter(
        backbone,
        SummedDilatedHead(2048, num_classes, dilations=(6, 12, 18, 24)),
        feature_channels=2048,
        num_classes=num_classes,
        normalisation=CAFFE_BGR,
    )


def build_deeplabv3_resnet50(num_classes: int, frozen_norm: NormLayer | None) -> Segmenter:
    """Build DeepLab-v3; its head trains batch norm after an image-wide pool, which needs two images per worker."""
    from torchvision.models import resnet50
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead

    return Segmenter(
        _resnet_backbone(resnet50, frozen_norm),
        DeepLabHead(2048, num_classes),
        feature_channels=2048,
        num_classes=num_classes,
    )
