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

import importlib
import logging
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

logger = logging.getLogger(__name__)

_BLOCKS = frozenset({"ResidualBlock", "Bottleneck", "InvertedResidual"})
"""By name: torchvision, whose the last two are, takes seconds to import."""

_FILES = (".pth", ".pt", ".safetensors")
_FILES_SHOWN = ".pth, .pt or .safetensors"


@dataclass(frozen=True)
class Normalisation:
    """How RGB images in 0..255 become a network's input: channels ordered, mean subtracted, divided by deviation."""

    mean: tuple[float, float, float]
    """In units of `unit`, in the order of the network's channels."""
    std: tuple[float, float, float]
    """Likewise."""
    unit: float = 1.0
    bgr: bool = False
    """Whether the network takes blue first."""


IMAGENET_RGB = Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), unit=255.0)
"""torchvision's. Paper: SDCA, DRSL."""
CAFFE_BGR = Normalisation(mean=(104.00698793, 116.66876762, 122.67891434), std=(1.0, 1.0, 1.0), bgr=True)
"""Caffe's. Paper: PLCA, BiCL, CLST."""

NormLayer = Callable[[int], nn.Module]


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


class SegmenterOutput(NamedTuple):
    """What a segmenter returns, both at feature resolution."""

    logits: Tensor  # (B, C, h, w)
    features: Tensor  # (B, D, h, w)


class Segmenter(nn.Module):
    """A segmentation network in two parts that share no parameter.

    Args:
        backbone: Maps images (B, 3, H, W) to features (B, D, h, w).
        head: Maps features to logits (B, C, h, w). It is randomly initialised, the backbone may be pretrained.
        feature_channels: D.
        num_classes: C.
        align_corners: Corner rule of `upsample`.
        normalisation: Of the backbone's input.
    """

    mean: Tensor
    std: Tensor

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
        return cast(Tensor, self.backbone(images))

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits, (B, C, h, w), of features."""
        return cast(Tensor, self.head(features))

    def normalise(self, images: Tensor) -> Tensor:
        """Return RGB images, (..., 3, H, W) uint8, as this network's float input; see `normalisation`."""
        if self.normalisation.bgr:
            images = images.flip(-3)
        return (images.to(self.mean.dtype) - self.mean) / self.std

    def upsample(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Return `logits`, (B, C, h, w), interpolated bilinearly to (B, C, *size), in float32 or wider."""
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.interpolate(precise, size=size, mode="bilinear", align_corners=self.align_corners)


class Backbone(nn.Module):
    """A backbone in two steps: `stem`, the shallow layers, which a method may keep per domain, and `stages`."""

    def __init__(self, stem: nn.Module, stages: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.stages = stages

    def forward(self, images: Tensor) -> Tensor:
        """Return features, (B, D, h, w)."""
        return cast(Tensor, self.stages(self.stem(images)))


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


class FrozenBatchNorm(nn.Module):
    """Batch norm whose affine part and statistics are constants: `weight * (x - mean) / sqrt(var + epsilon) + bias`.

    Loads the state of `nn.BatchNorm2d`. Keeps its input's precision, and no copy of it for the backward pass. Scale and
    shift are computed when the constants are loaded or converted: that spares a GPU five launches in each pass.
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
        scale, shift = (constant.to(x.dtype).view(-1, 1, 1) for constant in (self.scale, self.shift))
        return torch.addcmul(shift, x, scale)

    def _join_constants(self) -> None:
        self.scale = self.weight * (self.running_var + self.epsilon).rsqrt()
        self.shift = self.bias - self.running_mean * self.scale

    def _after_load(self, _: Any) -> None:
        self._join_constants()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenBatchNorm":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._join_constants()
        return self


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
    """Context at stride 8 added to detail at stride 4."""

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

    def features(self, images: Tensor) -> Tensor:
        """Return the features of normalised images, (B, D, h, w)."""
        low, high = self.backbone(images)
        head = cast(Any, self.head)
        gated = head.cbr(high) * head.scale(high)
        context = F.interpolate(gated, size=low.shape[-2:], mode="bilinear", align_corners=False)
        return torch.cat([low, context], 1)

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits, (B, C, h, w), of features."""
        head = cast(Any, self.head)
        detail = head.low_classifier.in_channels
        return cast(Tensor, head.low_classifier(features[:, :detail]) + head.high_classifier(features[:, detail:]))


def recompute_blocks(network: nn.Module) -> None:
    """Let residual blocks keep their input alone for the backward pass, which computes the rest of them once more.

    Gradients stay the same. With the three convolutions of ResNet's blocks, the step takes about a third longer.

    Args:
        network: Or a whole method; changed in place.

    Raises:
        ValueError: If a block has batch norm that is trained, whose running statistics would move twice.
    """
    for block in network.modules():
        if type(block).__name__ not in _BLOCKS:
            continue
        if any(isinstance(part, _BatchNorm) for part in block.modules()):
            raise ValueError(
                "trainer.recompute=true needs a backbone without trained batch norm, but this network has it. "
                "Set network.freeze_norm=true, or trainer.recompute=false."
            )
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(8, channels)


def _compact(num_classes: int, _: NormLayer | None) -> Segmenter:
    """A small network for CPUs. Group norm: no batch statistics, so evaluation and data parallelism change nothing."""
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


def _resnet_backbone(constructor: Callable[..., nn.Module], frozen_norm: NormLayer | None) -> Backbone:
    """Output stride 8: stages 3 and 4 trade their stride for dilation 2 and 4."""
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


def _deeplabv2_resnet101(num_classes: int, frozen_norm: NormLayer | None) -> Segmenter:
    """The field's standard network. Source: BIT-DA/SDCA@d00e7ba."""
    from torchvision.models import resnet101

    return Segmenter(
        _resnet_backbone(resnet101, frozen_norm),
        SummedDilatedHead(2048, num_classes, dilations=(6, 12, 18, 24)),
        feature_channels=2048,
        num_classes=num_classes,
    )


def _deeplabv2_resnet101_caffe(num_classes: int, frozen_norm: NormLayer | None) -> Segmenter:
    """ResNet-101 as converted from Caffe. Source: kgl-prml/Pixel-Level-Cycle-Association@e01d77a.

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


def _deeplabv3_resnet50(num_classes: int, frozen_norm: NormLayer | None) -> Segmenter:
    """Its head keeps trainable batch norm with an image-wide pool: training needs two images per worker and domain."""
    from torchvision.models import resnet50
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead

    return Segmenter(
        _resnet_backbone(resnet50, frozen_norm),
        DeepLabHead(2048, num_classes),
        feature_channels=2048,
        num_classes=num_classes,
    )


def _lraspp_mobilenet_v3_large(num_classes: int, frozen_norm: NormLayer | None) -> Segmenter:
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


NETWORKS = {
    "compact": NetworkRecipe(_compact, base_lr=0.02, batch_norm=False),
    "deeplabv2_resnet101": NetworkRecipe(_deeplabv2_resnet101, base_lr=2.5e-4, published="resnet101"),
    "deeplabv2_resnet101_caffe": NetworkRecipe(_deeplabv2_resnet101_caffe, base_lr=2.5e-4, frozen_epsilon=1e-5),
    "deeplabv3_resnet50": NetworkRecipe(_deeplabv3_resnet50, base_lr=2.5e-4, published="resnet50", frozen_epsilon=1e-5),
    "lraspp_mobilenet_v3_large": NetworkRecipe(
        _lraspp_mobilenet_v3_large, base_lr=2.5e-4, published="mobilenet_v3_large", frozen_epsilon=1e-3
    ),
}
"""All networks by name."""


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
    state = None if weights is None else _state(name, recipe, weights)
    frozen = state is not None if freeze_norm is None else freeze_norm
    epsilon = recipe.frozen_epsilon if norm_epsilon is None else norm_epsilon
    segmenter = recipe.build(num_classes, partial(FrozenBatchNorm, epsilon=epsilon) if frozen else None)
    segmenter.align_corners = align_corners
    if state is not None:
        report = load_weights(segmenter, state)
        level = logging.WARNING if any(key.startswith("backbone.") for key in report.missing) else logging.INFO
        logger.log(level, "%s from %s: %s", name, weights, report)
    return segmenter.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class WeightsReport:
    """What `load_weights` did."""

    loaded: int
    """Tensors copied."""
    missing: tuple[str, ...]
    """Names of the network that kept their initial value."""
    unexpected: tuple[str, ...]
    """Names of the state that the network has not, or has in its head in another shape."""

    def __str__(self) -> str:
        return f"{self.loaded} tensors loaded; missing: {_some(self.missing)}; unexpected: {_some(self.unexpected)}"


def load_weights(segmenter: Segmenter, state: Mapping[str, Tensor]) -> WeightsReport:
    """Copy every tensor of `state` that has a place in `segmenter`; a head for other classes is left out.

    Args:
        segmenter: Changed in place.
        state: Of a segmenter, of its backbone, of a method that holds it, or of torchvision's or Caffe's network of
            this kind; wrapped for data parallelism or not.

    Returns:
        What was copied and what was not.

    Raises:
        ValueError: If nothing has a place, or a tensor of the backbone has another shape.
    """
    own = {_canonical(name): (name, value) for name, value in segmenter.state_dict().items()}
    placed: dict[str, Tensor] = {}
    unexpected = []
    misfits = []
    for key, value in state.items():
        name, present = own.get(_canonical(key), (key, None))
        if present is not None and present.shape == value.shape:
            placed[name] = value
        elif present is not None and name.startswith("backbone."):
            misfits.append(f"{key} is {tuple(value.shape)}, not {tuple(present.shape)}")
        elif not key.endswith("num_batches_tracked"):
            unexpected.append(key)
    missing = [name for name, _ in own.values() if name not in placed and not name.endswith("num_batches_tracked")]
    report = WeightsReport(len(placed), tuple(missing), tuple(unexpected))
    if not placed:
        raise ValueError(
            f"The weights must share tensors with the network, but none fits. Missing: {_some(report.missing)}. "
            f"Unexpected: {_some(report.unexpected)}. Check that both are of the same architecture."
        )
    if misfits:
        raise ValueError(
            f"The weights must have the shapes of the network's backbone, but {len(misfits)} tensors differ: "
            f"{_some(misfits)}. Choose the network.name they were trained with."
        )
    segmenter.load_state_dict(placed, strict=False)
    return report


def _canonical(name: str) -> str:
    """Return a tensor's name without what only says where a network of this kind keeps it."""
    places = ("module", "Scale", "segmenter", "backbone", "features", "stem", "stages", "low", "high")
    renamed = {
        "classifier": "head",
        "layer5": "head",
        "conv2d_list": "convolutions",
    }  # the last two: public DeepLab-v2s
    return ".".join(renamed.get(part, part) for part in name.split(".") if part not in places)


def _some(names: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more if names else "none"


def _recipe(name: str) -> NetworkRecipe:
    if name not in NETWORKS:
        raise ValueError(f"A network must be one of {', '.join(NETWORKS)}, but got {name!r}.")
    return NETWORKS[name]


def _state(name: str, recipe: NetworkRecipe, weights: str) -> Mapping[str, Tensor]:
    if weights.endswith(_FILES):
        return _local_state(Path(weights).expanduser())
    if recipe.published is None:
        raise ValueError(
            f"network.weights of {name!r} must be none or a {_FILES_SHOWN} file, but got {weights!r}: "
            "no weights are published for it."
        )
    return _published_state(recipe.published, weights)


def _local_state(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"network.weights must be an existing file, but there is none at {path}. Correct the path.")
    if path.suffix == ".safetensors":
        return _safetensors_state(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"network.weights must be a file of tensors that loads without running code, but {path} does not: {error} "
            "Save it again with torch.save(network.state_dict(), path)."
        ) from error
    for wrapper in ("state_dict", "model", "state"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise ValueError(
            f"network.weights must be a file of named tensors, but {path} holds a {type(content).__name__}. "
            "Save it again with torch.save(network.state_dict(), path)."
        )
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def _safetensors_state(path: Path) -> Mapping[str, Tensor]:
    try:
        load_file = importlib.import_module("safetensors.torch").load_file
    except ImportError as error:
        raise ValueError(
            f"Reading {path} needs the package safetensors, which is not installed. Install it, or save the tensors "
            "with torch.save and give that .pth file."
        ) from error
    try:
        state: Mapping[str, Tensor] = load_file(path)
    except Exception as error:  # the package has an error of its own
        raise ValueError(
            f"network.weights must be a whole safetensors file, but {path} is not: {error}. Fetch it again."
        ) from error
    return state


def _published_state(backbone: str, weights: str) -> Mapping[str, Tensor]:
    from torchvision.models import get_model_weights

    choices = get_model_weights(backbone)
    known = [choice.name for choice in choices]  # without the alias DEFAULT, which changes between versions
    if weights not in known:
        raise ValueError(
            f"network.weights must be none, a {_FILES_SHOWN} file, or one of {', '.join(known)}, but got {weights!r}."
        )
    chosen = choices[weights]
    try:
        state: Mapping[str, Tensor] = chosen.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, a full disk, a file with another hash
        raise ValueError(
            f"network.weights={weights} must be downloaded once, but {chosen.url} could not be had: {error}. "
            "Fetch that file on a machine with network access and set network.weights to its path, "
            f"or put it into {Path(torch.hub.get_dir()) / 'checkpoints'}."
        ) from error
    return state
