"""Segmentation networks: a backbone that gives pixel features and a head that turns them into class logits.

| name | output stride | D | head |
|---|---|---|---|
| compact | 4 | 64 | four dilated convolutions, summed |
| deeplabv2_resnet101 | 8 | 2048 | four dilated convolutions, summed |
| deeplabv2_resnet101_caffe | 8 | 2048 | the same on Caffe's ResNet-101, whose input is BGR |
| deeplabv3_resnet50 | 8 | 2048 | atrous spatial pyramid pooling |
| lraspp_mobilenet_v3_large | 8 | 168 | lite reduced pyramid pooling |

B images of H x W pixels, D feature channels, C classes, h x w cells of the feature map.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from segadapt.trainables.core.networks.compact import build_compact
from segadapt.trainables.core.networks.layers import (
    Backbone,
    FrozenBatchNorm,
    NormLayer,
    SummedDilatedHead,
    recompute_blocks,
)
from segadapt.trainables.core.networks.mobilenet import build_lraspp_mobilenet_v3_large
from segadapt.trainables.core.networks.resnet import (
    build_deeplabv2_resnet101,
    build_deeplabv2_resnet101_caffe,
    build_deeplabv3_resnet50,
)
from segadapt.trainables.core.networks.segmenter import (
    CAFFE_BGR,
    IMAGENET_RGB,
    Normalisation,
    Segmenter,
    SegmenterOutput,
    split_backbone,
    with_stem,
)
from segadapt.trainables.core.networks.weights import WeightsReport, load_weights, read_weights

__all__ = [
    "CAFFE_BGR",
    "IMAGENET_RGB",
    "NETWORKS",
    "Backbone",
    "FrozenBatchNorm",
    "NetworkConfig",
    "NetworkRecipe",
    "Normalisation",
    "Segmenter",
    "SegmenterOutput",
    "SummedDilatedHead",
    "WeightsReport",
    "base_lr",
    "build_segmenter",
    "least_images",
    "load_weights",
    "recompute_blocks",
    "split_backbone",
    "with_stem",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Which network is trained and what it starts from; `build_segmenter(num_classes=C, **asdict(config))`."""

    name: str = "compact"
    """One of `NETWORKS`."""
    weights: str | None = None
    """Null or "none": random. A path ending in .pth, .pt or .safetensors: that file. Else like "IMAGENET1K_V1"."""
    freeze_norm: bool | None = None
    """Keep the backbone's batch norm constant, affine part and statistics; null: if weights are loaded.

    `compact` has no batch norm and refuses True.
    """
    norm_epsilon: float | None = None
    """Added to the variances of frozen batch norm; null: as pretrained, but 0 in deeplabv2_resnet101 (SDCA)."""
    align_corners: bool = True
    """Corner rule of the bilinear up-sampling of logits. SDCA, BiCL, CLST: True; PLCA: False."""


@dataclass(frozen=True)
class NetworkRecipe:
    """How a network is built and what is recommended for it."""

    build: Callable[[int, NormLayer | None], Segmenter]
    """From the number of classes and the frozen norm of its backbone, None for trainable batch norm."""
    base_lr: float
    """Base learning rate under SGD with momentum 0.9."""
    published: str | None = None
    """torchvision's name of the backbone, which has ImageNet weights; None without."""
    frozen_epsilon: float = 0.0
    batch_norm: bool = True
    least_images: int = 1
    """Images it must see at a time in training: two where a single pooled value is normalised over the batch."""


NETWORKS = {
    "compact": NetworkRecipe(build_compact, base_lr=0.02, batch_norm=False),
    "deeplabv2_resnet101": NetworkRecipe(build_deeplabv2_resnet101, base_lr=2.5e-4, published="resnet101"),
    "deeplabv2_resnet101_caffe": NetworkRecipe(build_deeplabv2_resnet101_caffe, base_lr=2.5e-4, frozen_epsilon=1e-5),
    "deeplabv3_resnet50": NetworkRecipe(
        build_deeplabv3_resnet50, base_lr=2.5e-4, published="resnet50", frozen_epsilon=1e-5, least_images=2
    ),
    "lraspp_mobilenet_v3_large": NetworkRecipe(
        build_lraspp_mobilenet_v3_large, base_lr=2.5e-4, published="mobilenet_v3_large", frozen_epsilon=1e-3
    ),
}
"""All networks by name."""


def least_images(name: str) -> int:
    """Return how many images a network must see at a time in training.

    Raises:
        ValueError: If there is no such network; lists the known ones.
    """
    return _recipe(name).least_images


def base_lr(name: str) -> float:
    """Return the recommended base learning rate of a network under SGD with momentum 0.9.

    `compact` learns from scratch; the rate of the others, 2.5e-4, is SDCA's for ImageNet weights.

    Raises:
        ValueError: If there is no such network; lists the known ones.
    """
    return _recipe(name).base_lr


def build_segmenter(
    name: str,
    num_classes: int,
    *,
    weights: str | None = None,
    freeze_norm: bool | None = None,
    norm_epsilon: float | None = None,
    align_corners: bool = True,
) -> Segmenter:
    """Build a network; equal for equal `torch.manual_seed`. `NetworkConfig` documents the arguments.

    Raises:
        ValueError: If the network is unknown, the weights cannot be had or do not fit, or there is no batch norm to
            freeze.
    """
    recipe = _recipe(name)
    if weights == "none":
        weights = None
    if freeze_norm and not recipe.batch_norm:
        raise ValueError(f"freeze_norm needs batch norm, but {name!r} has group norm. Leave it out or set it to false.")
    state = None if weights is None else read_weights(name, recipe.published, weights)
    frozen = state is not None if freeze_norm is None else freeze_norm
    epsilon = recipe.frozen_epsilon if norm_epsilon is None else norm_epsilon
    segmenter = recipe.build(num_classes, partial(FrozenBatchNorm, epsilon=epsilon) if frozen else None)
    segmenter.align_corners = align_corners
    segmenter.least_images = recipe.least_images
    if state is not None:
        report = load_weights(segmenter, state)
        level = logging.WARNING if any(key.startswith("backbone.") for key in report.missing) else logging.INFO
        logger.log(level, "%s from %s: %s", name, weights, report)
    return segmenter.to(memory_format=torch.channels_last)


def _recipe(name: str) -> NetworkRecipe:
    if name not in NETWORKS:
        raise ValueError(f"A network must be one of {', '.join(NETWORKS)}, but got {name!r}.")
    return NETWORKS[name]
