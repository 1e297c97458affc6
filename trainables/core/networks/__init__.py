"""Segmentation networks: a backbone that gives pixel features and a head that turns them into class logits.

| name | output stride | D | head |
|---|---|---|---|
| compact | 4 | 64 | four dilated convolutions, summed |
| deeplabv2_resnet101 | 8 | 2048 | four dilated convolutions, summed |
| deeplabv2_resnet101_caffe | 8 | 2048 | the same on Caffe's ResNet-101, whose input is BGR |
| deeplabv3_resnet50 | 8 | 2048 | atrous spatial pyramid pooling |
| lraspp_mobilenet_v3_large | 8 | 168 | lite reduced pyramid pooling |
| timm:MODEL | of the head | of the head | one of `HEADS`, or deeplabv2 |

B images of H x W pixels, D feature channels, C classes, h x w cells of the feature map.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from segadapt.trainables.core.networks.compact import build_compact
from segadapt.trainables.core.networks.heads import HEADS
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
from segadapt.trainables.core.networks.timm_models import PREFIX as TIMM
from segadapt.trainables.core.networks.timm_models import TimmBackbone, build_timm_segmenter
from segadapt.trainables.core.networks.tuning import (
    LORA_TARGETS,
    FrozenParameter,
    Tuning,
    frozen_parameters,
    merged,
    tuned,
)
from segadapt.trainables.core.networks.weights import WeightsReport, load_weights, read_file, read_weights
from segadapt.trainables.core.validation import check

__all__ = [
    "CAFFE_BGR",
    "HEADS",
    "IMAGENET_RGB",
    "NETWORKS",
    "Backbone",
    "FrozenBatchNorm",
    "FrozenParameter",
    "NetworkConfig",
    "NetworkRecipe",
    "Normalisation",
    "Segmenter",
    "SegmenterOutput",
    "SummedDilatedHead",
    "TimmBackbone",
    "WeightsReport",
    "base_lr",
    "build_segmenter",
    "frozen_parameters",
    "least_images",
    "least_side",
    "load_weights",
    "merged",
    "recommended_optimizer",
    "recompute_blocks",
    "split_backbone",
    "with_stem",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Which network is trained and what it starts from; `build_segmenter(num_classes=C, **asdict(config))`."""

    name: str = "compact"
    """One of `NETWORKS`, or timm:MODEL for a backbone of timm, such as timm:vit_small_patch14_dinov2.lvd142m, or of an
    installed package of yours."""
    weights: str | None = None
    """Null or "none": random. A path ending in .pth, .pt or .safetensors: that file. Else like "IMAGENET1K_V1", of
    timm's models "pretrained"."""
    head: str = "auto"
    """Head on a backbone of timm: linear, light, pyramid, daformer, deeplabv2, or auto: light on a plain transformer,
    daformer on four resolutions. The other networks have their own."""
    input_scale: float = 1.0
    """Size per side at which a backbone of timm sees an image, brought to whole cells of it. VFM-UDA: 1.1."""
    drop_path: float = 0.0
    """Share of a sample's residual branches that are left out in training, in the deepest block, of timm's models."""
    freeze_norm: bool | None = None
    """Keep the backbone's batch norm constant, affine part and statistics; null: if weights are loaded, or the
    backbone is frozen.

    Networks without batch norm, such as `compact`, refuse True.
    """
    norm_epsilon: float | None = None
    """Added to the variances of frozen batch norm; null: as pretrained, but 0 in deeplabv2_resnet101 (SDCA)."""
    align_corners: bool = True
    """Corner rule of the bilinear up-sampling of logits. SDCA, BiCL, CLST: True; PLCA: False."""
    tune: Tuning = "full"
    """What is trained: all, the head, or the head and low-rank updates of a frozen backbone of timm (LoRA)."""
    lora_rank: int = 16
    """Rank of the updates, which are multiplied by 16 over the rank."""
    lora_targets: tuple[str, ...] | None = None
    """Linear layers with an update: qkv, proj (both of the attention), mlp; null: those that the backbone has."""

    def __post_init__(self) -> None:
        heads = ("auto", *HEADS, "deeplabv2")
        check(self.head in heads, f"network.head must be one of {', '.join(heads)}", self.head)
        check(0.1 <= self.input_scale <= 10, "network.input_scale must lie in [0.1, 10]", self.input_scale)
        check(0 <= self.drop_path < 1, "network.drop_path must lie in [0, 1)", self.drop_path)
        timms = (("head", "auto"), ("input_scale", 1.0), ("drop_path", 0.0))
        for name, default in timms if not self.name.startswith(TIMM) else ():
            check(
                getattr(self, name) == default,
                f"network.{name} must be left at {default} unless network.name is {TIMM}MODEL",
                getattr(self, name),
            )
        self._check_tuning()

    def _check_tuning(self) -> None:
        if self.tune != "full":
            message = f"network.freeze_norm must be left out with network.tune={self.tune}, which freezes it"
            check(self.freeze_norm is not False, message, self.freeze_norm)
        if self.tune != "lora":
            for name, default in (("lora_rank", 16), ("lora_targets", None)):
                message = f"network.{name} must be left out unless network.tune=lora"
                check(getattr(self, name) == default, message, getattr(self, name))
            return
        message = f"network.tune=lora needs network.name={TIMM}MODEL, a transformer of timm"
        check(self.name.startswith(TIMM), message, self.name, "Set network.tune=head or full.")
        check(self.lora_rank >= 1, "network.lora_rank must be at least 1", self.lora_rank)
        targets, known = self.lora_targets, ", ".join(LORA_TARGETS)
        fits = targets is None or (len(targets) > 0 and set(targets) <= set(LORA_TARGETS))
        check(fits, f"network.lora_targets must be null or some of {known}", targets)


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
"""All networks by name, beside the models of timm."""


def least_images(name: str) -> int:
    """Return how many images a network must see at a time in training.

    Raises:
        ValueError: If there is no such network; lists the known ones. Names of timm's models are not looked up.
    """
    return 1 if name.startswith(TIMM) else _recipe(name).least_images


def least_side(segmenter: Segmenter) -> int:
    """Return the least height and width of an image that a network takes."""
    return segmenter.backbone.least_side if isinstance(segmenter.backbone, TimmBackbone) else 1


def base_lr(name: str, *, pretrained: bool = True) -> float:
    """Return the recommended base learning rate of a network under its `recommended_optimizer`.

    `compact` learns from scratch; the rate of the other named networks, 2.5e-4, is SDCA's for ImageNet weights. That of
    timm's models, 6e-5, is DAFormer's for pretrained transformers; ten times as much where they start at random.

    Raises:
        ValueError: If there is no such network; lists the known ones. Names of timm's models are not looked up.
    """
    if name.startswith(TIMM):
        return 6e-5 if pretrained else 6e-4
    return _recipe(name).base_lr


def recommended_optimizer(name: str) -> Literal["sgd", "adamw"]:
    """Return the optimiser that a network is trained with unless another is asked for."""
    return "adamw" if name.startswith(TIMM) else "sgd"


def _recipe(name: str) -> NetworkRecipe:
    if name not in NETWORKS:
        raise ValueError(f"A network must be one of {', '.join(NETWORKS)} or {TIMM}MODEL, but got {name!r}.")
    return NETWORKS[name]


def build_segmenter(
    name: str,
    num_classes: int,
    *,
    weights: str | None = None,
    freeze_norm: bool | None = None,
    norm_epsilon: float | None = None,
    head: str = "auto",
    input_scale: float = 1.0,
    drop_path: float = 0.0,
    align_corners: bool = True,
    **tuning: Any,
) -> Segmenter:
    """Build a network; equal for equal `torch.manual_seed`. `NetworkConfig` documents the arguments.

    Those of `tuned` come as keywords: they change what is trained of the network, and not what it computes.

    Raises:
        ValueError: If the network is unknown, the weights cannot be had or do not fit, there is no batch norm to
            freeze, or it cannot be tuned as asked.
    """
    if weights == "none":
        weights = None
    if name.startswith(TIMM):
        if norm_epsilon is not None:
            raise ValueError(f"network.norm_epsilon must be left out with {TIMM}MODEL, but got {norm_epsilon}.")
        segmenter = build_timm_segmenter(
            name.removeprefix(TIMM),
            num_classes,
            head=head,
            state=None if weights in (None, "pretrained") else read_file(weights),
            pretrained=weights == "pretrained",
            freeze_norm=freeze_norm,
            input_scale=input_scale,
            drop_path=drop_path,
        )
        segmenter.align_corners = align_corners
        return tuned(segmenter, **tuning).to(memory_format=torch.channels_last)
    recipe = _recipe(name)
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
    return tuned(segmenter, **tuning).to(memory_format=torch.channels_last)
