"""Backbones of timm by their names: convolutional and hierarchical networks, and transformers of one resolution.

Any of timm's models that gives feature maps will do. It is told by what timm itself says of a model: its feature
resolutions, the names of its stem and blocks, its normalisation.

B images of H x W pixels, D channels, h x w cells of a map.
"""

import contextlib
import difflib
import logging
import re
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from segadapt.trainables.core.networks.heads import HEADS, DecoderHead, exportable
from segadapt.trainables.core.networks.hub import source_options
from segadapt.trainables.core.networks.layers import Encoding, SummedDilatedHead
from segadapt.trainables.core.networks.naming import timm_names
from segadapt.trainables.core.networks.resampling import RepeatableResizing
from segadapt.trainables.core.networks.segmenter import Normalisation, Segmenter
from segadapt.trainables.core.networks.tuning import leave_frozen_out
from segadapt.trainables.core.networks.weights import some

logger = logging.getLogger(__name__)

PREFIX = "timm:"
"""What the name of a network begins with whose backbone is a model of timm."""

OWN_BACKBONES = "segadapt.backbones"
"""Group of entry points by which installed packages name modules that register models of theirs with timm."""

_ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
"""How families of models are told to take images of any size; the last need not be told."""

_PERCENT = 100


class SharedStem(nn.Module):
    """Parameters and buffers of a backbone's stem under names that a module may have; a copy of it stands in for them.

    Args:
        tensors: By their name in the backbone.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.places = {name.replace(".", "/").replace("/", "__"): name for name in tensors}
        for key, name in self.places.items():
            tensor = tensors[name]
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(key, tensor)
            else:
                self.register_buffer(key, tensor)
        leave_frozen_out(self)

    def in_backbone(self) -> dict[str, Tensor]:
        """Return the tensors by their name in the backbone."""
        return {self.places[key]: tensor for key, tensor in (*self.named_parameters(), *self.named_buffers())}


class TimmBackbone(Encoding):
    """A model of timm that gives feature maps.

    Args:
        encoder: The model, with a size of its input that is not fixed.
        levels: Which of its feature maps are given.
        normed: Whether the last map ends with the model's final norm.
        cell: Pixels per side of a cell of its coarsest map, which images are brought to multiples of.
        plain: Whether it is a plain transformer, whose cells are its patches: sizes are rounded down, as VFM-UDA's
            code does; else up.
        input_scale: Size per side at which the model sees an image; see `NetworkConfig.input_scale`.
    """

    def __init__(
        self, encoder: nn.Module, levels: tuple[int, ...], *, normed: bool, cell: int, plain: bool, input_scale: float
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.levels = levels
        self.cell = cell
        self.plain = plain
        self._percent = round(_PERCENT * input_scale)
        self._normed = normed

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the maps, (B, D, h, w) each and finest first; one map alone is returned as such.

        A plain transformer's map has the cells of its patches, without class and register tokens, and its final norm.

        Raises:
            ValueError: If the image is smaller than a patch.
        """
        repeats = images.is_cuda and torch.are_deterministic_algorithms_enabled()
        resizing: contextlib.AbstractContextManager[Any] = RepeatableResizing() if repeats else contextlib.nullcontext()
        with resizing:  # of positions
            maps = self.encoder.forward_intermediates(
                self._fitted(images),
                indices=list(self.levels),
                norm=self._normed,
                output_fmt="NCHW",
                intermediates_only=True,
            )
        maps = tuple(exportable(part) for part in maps)
        return maps[0] if len(maps) == 1 else maps

    @property
    def least_side(self) -> int:
        """The least height and width of an image, of which a plain transformer sees whole patches."""
        return -(-_PERCENT * self.cell // self._percent) if self.plain else 1

    @property
    def stem(self) -> SharedStem:  # type: ignore[override]
        """The shallow part that a method may keep per domain: what comes before the blocks, as timm names it."""
        matches = re.compile(self.encoder.group_matcher(coarse=True)["stem"]).match
        named = (*self.encoder.named_parameters(), *self.encoder.named_buffers())
        return SharedStem({f"encoder.{name}": tensor for name, tensor in named if matches(name)})

    def with_stem(self, stem: nn.Module) -> nn.Module:
        """Return a backbone that has `stem`, a copy of this one's, in place of its own, and shares all else."""
        return _WithStem(self, cast(SharedStem, stem))

    def depths(self) -> dict[str, int]:
        """Return how deep each parameter lies: 0 in the stem, 1, 2, ... in the blocks.

        The norm after the last block counts as the stem does. Source: VFM-UDA's groups.
        """
        from timm.models import group_parameters

        groups = group_parameters(self.encoder, self.encoder.group_matcher(coarse=False), reverse=True)
        return {f"encoder.{name}": 0 if re.match(r"(fc_)?norm\.", name) else depth for name, depth in groups.items()}

    def embeddings(self) -> set[str]:
        """Return the names of parameters such as positions, which weight decay should leave alone."""
        names: set[str] = getattr(self.encoder, "no_weight_decay", set)()
        return {f"encoder.{name}" for name in names}

    def _fitted(self, images: Tensor) -> Tensor:
        """Return the images at the nearest size of whole cells to their scaled size, so that cells tile the image."""
        sides = images.shape[-2:]
        if min(sides) < self.least_side:
            raise ValueError(
                f"An image must have at least {self.least_side}x{self.least_side} pixels, a patch of this network, but "
                f"got {sides[0]}x{sides[1]}. Show larger images, or choose a network of smaller patches."
            )
        unit = _PERCENT * self.cell
        up = 0 if self.plain else unit - 1
        size = [(side * self._percent + up) // unit * self.cell for side in sides]
        if not torch.compiler.is_exporting() and size == list(sides):  # a graph for all sizes cannot ask
            return images
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


class _WithStem(nn.Module):
    """A backbone with another stem: where its own is used, the other's tensors are."""

    def __init__(self, backbone: TimmBackbone, stem: SharedStem) -> None:
        super().__init__()
        self.backbone = backbone
        self.stem = stem

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the maps, (B, D, h, w) each and finest first; one map alone is returned as such."""
        maps: Tensor | tuple[Tensor, ...] = functional_call(self.backbone, self.stem.in_backbone(), (images,))
        return maps


class DecodedSegmenter(Segmenter):
    """A segmenter whose head has a decoder, which joins the backbone's maps to the features that are classified."""

    def decode(self, hidden: Any) -> Tensor:
        """Return the features, (B, D, h, w), of the backbone's maps."""
        return cast(DecoderHead, self.head).decode(hidden if isinstance(hidden, tuple) else (hidden,))

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits, (B, C, h, w), of features."""
        return cast(Tensor, cast(DecoderHead, self.head).classifier(features))


def build_timm_segmenter(
    name: str,
    num_classes: int,
    *,
    head: str = "auto",
    state: Mapping[str, Tensor] | None = None,
    pretrained: bool = False,
    freeze_norm: bool | None = None,
    input_scale: float = 1.0,
    drop_path: float = 0.0,
) -> Segmenter:
    """Build a segmenter on a model of timm.

    Args:
        name: timm's name of the model, or one that an installed package registers with timm; see `OWN_BACKBONES`.
        num_classes: C.
        head: One of `HEADS`, `deeplabv2` or `auto`.
        state: Tensors that the backbone starts from, named as timm, its authors or a checkpoint of ours name them.
        pretrained: Whether it starts from the weights that timm knows of.
        freeze_norm: Whether batch norm keeps its statistics and affine part; None: if weights are loaded.
        input_scale: See `NetworkConfig.input_scale`.
        drop_path: See `NetworkConfig.drop_path`.

    Raises:
        ValueError: If there is no such model, it gives no maps, or the head or the weights do not fit it.
    """
    _check_known(name, pretrained=pretrained)
    encoder = _created(name, {"num_classes": 0, "pretrained": pretrained}, drop_path, dilated=head == "deeplabv2")
    if state is not None:
        _load(name, encoder, state)
    reductions, channels = _resolutions(encoder)
    plain = len(reductions) > 1 and len(set(reductions)) == 1
    if head == "auto":
        head = "light" if plain else "daformer" if len(_pyramid(reductions)) == 4 else "pyramid"
    levels = _levels(head, reductions)
    normed = _prune(encoder, levels)
    encoder = _with_norms(name, encoder, freeze_norm, loaded=pretrained or state is not None)
    cell = reductions[levels[-1]]
    _check_any_size(name, encoder, cell)
    backbone = TimmBackbone(encoder, levels, normed=normed, cell=cell, plain=plain, input_scale=input_scale)
    widths = [channels[level] for level in levels]
    published = cast(Any, encoder).pretrained_cfg
    normalisation = Normalisation(mean=tuple(published["mean"]), std=tuple(published["std"]), unit=255.0)
    if head == "deeplabv2":
        _check_fine(name, reductions[levels[-1]])
        dilated = SummedDilatedHead(widths[-1], num_classes, dilations=(6, 12, 18, 24))
        return Segmenter(
            backbone, dilated, feature_channels=widths[-1], num_classes=num_classes, normalisation=normalisation
        )
    decoder = HEADS[head](widths, num_classes)
    return DecodedSegmenter(
        backbone,
        decoder,
        feature_channels=decoder.feature_channels,
        num_classes=num_classes,
        normalisation=normalisation,
    )


def _register_own() -> None:
    """Import the modules that installed packages name to register models of theirs with timm."""
    for entry in entry_points(group=OWN_BACKBONES):
        try:
            entry.load()
        except Exception as error:  # a module may do anything
            raise ValueError(
                f"An entry point of {OWN_BACKBONES} must name a module that Python can import, but {entry.value!r} of "
                f"the package {entry.dist.name if entry.dist else '?'} raises {type(error).__name__}: "
                f"{_short(str(error)).rstrip('.')}. Mend or remove the package."
            ) from error


def _check_known(name: str, *, pretrained: bool) -> None:
    import timm

    if not timm.is_model(name):
        _register_own()
    if not timm.is_model(name) or ("." in name and name not in timm.list_pretrained()):
        near = difflib.get_close_matches(name, [*timm.list_models(), *timm.list_pretrained()], n=5, cutoff=0.4)
        raise ValueError(
            f"network.name={PREFIX}MODEL needs the name of a model of timm {timm.__version__}, but got {name!r}. "
            f"{'Near: ' + ', '.join(near) + '. ' if near else ''}timm.list_models() in Python lists all. One of your "
            f"own comes with a package whose entry point is of {OWN_BACKBONES}."
        )
    if pretrained and not timm.is_model_pretrained(name):
        raise ValueError(
            f"network.weights=pretrained needs weights that timm knows of, but there are none for {name!r}. "
            "Set network.weights to a file, or to none."
        )


def _created(name: str, options: Mapping[str, Any], drop_path: float, *, dilated: bool) -> nn.Module:
    """Return a model that takes images of any size, if it can with output stride 8 where that is asked."""
    import timm

    options = {**options, **({"drop_path_rate": drop_path} if drop_path > 0 else {})}
    refused = ""
    strides: tuple[dict[str, Any], ...] = ({"output_stride": 8}, {}) if dilated else ({},)
    for stride in strides:
        for sizing in _ANY_SIZE:
            try:
                source = source_options(name) if options["pretrained"] else {}
                model: nn.Module = timm.create_model(name, **options, **source, **stride, **sizing)
            except (TypeError, NotImplementedError) as error:  # how families of timm say that they lack an option
                refused = str(error)
            except (OSError, RuntimeError) as error:  # no network, a gated model, a damaged file
                if not options["pretrained"]:
                    raise
                raise ValueError(
                    f"network.weights=pretrained must be downloaded once, but the weights of {name!r} could not be "
                    f"had: {_short(str(error))} Run `segadapt weights fetch {PREFIX}{name}` on a machine with network "
                    "access that sees --storage, or give it, or network.weights, a file."
                ) from error
            else:
                if hasattr(model, "forward_intermediates") and getattr(model, "feature_info", None):
                    return model
                raise ValueError(
                    f"A backbone must give feature maps, but timm's {name!r} ({type(model).__name__}) has none. "
                    "Choose another, such as timm:vit_small_patch14_dinov2 or timm:convnext_tiny."
                )
    raise ValueError(f"network.name={PREFIX}{name} cannot be built with these settings of the network: {refused}.")


def _load(name: str, encoder: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors into a model, named as timm or the model's authors name them, or as a checkpoint of ours does.

    Raises:
        ValueError: If one of the model's is missing or has another shape.
    """
    inner = {key.split("backbone.encoder.", 1)[1]: value for key, value in state.items() if "backbone.encoder." in key}
    renamed = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)  # timm's, of one family
    tensors = inner or timm_names(state, encoder)
    if renamed is not None and not inner:
        tensors = renamed(tensors, encoder)
    places = encoder.state_dict()
    misfits = [
        f"{key} is {tuple(tensors[key].shape)}, not {tuple(place.shape)}"
        for key, place in places.items()
        if key in tensors and tensors[key].shape != place.shape
    ]
    missing = [key for key in places if key not in tensors and not key.endswith("num_batches_tracked")]
    if missing or misfits:
        raise ValueError(
            f"network.weights must be those of timm's {name!r}, but the file lacks {len(missing)} of its "
            f"{len(places)} tensors ({some(missing)}) and {len(misfits)} have another shape ({some(misfits)}). "
            "Choose the network.name they were trained with."
        )
    encoder.load_state_dict({key: tensors[key] for key in places if key in tensors}, strict=False)
    unexpected = [key for key in tensors if key not in places]
    logger.info("%s%s: loaded %d, unexpected %s", PREFIX, name, len(places), some(unexpected))


def _resolutions(encoder: nn.Module) -> tuple[list[int], list[int]]:
    """Return how many pixels per side a cell of each feature map stands for, and the maps' channels."""
    info = cast(Any, encoder).feature_info
    entries = info if isinstance(info, list) else info.info
    return [entry["reduction"] for entry in entries], [entry["num_chs"] for entry in entries]


def _pyramid(reductions: list[int]) -> tuple[int, ...]:
    """Return the last map of each resolution from stride 4 on."""
    last = {reduction: level for level, reduction in enumerate(reductions) if reduction >= 4}
    return tuple(last.values())


def _levels(head: str, reductions: list[int]) -> tuple[int, ...]:
    """Return which maps a head reads; of a plain transformer that is always the last."""
    last = len(reductions) - 1
    if head not in {*HEADS, "deeplabv2"}:
        raise ValueError(f"network.head must be one of auto, deeplabv2, {', '.join(HEADS)}, but got {head!r}.")
    if len(set(reductions)) == 1 or head == "deeplabv2" or HEADS[head].maps == 1:
        return (last,)
    return _pyramid(reductions)


def _prune(encoder: nn.Module, levels: tuple[int, ...]) -> bool:
    """Remove what no map needs; return whether maps end with the model's final norm."""
    model = cast(Any, encoder)
    if (
        len(levels) > 1
        or not isinstance(getattr(model, "norm", None), nn.Module)
        or isinstance(model.norm, nn.Identity)
    ):
        model.prune_intermediate_layers(list(levels), prune_norm=True, prune_head=True)
        return False
    model.prune_intermediate_layers(list(levels), prune_norm=False, prune_head=True)
    return True


def _with_norms(name: str, encoder: nn.Module, freeze: bool | None, *, loaded: bool) -> nn.Module:
    """Return the model, its batch norm frozen if that is asked, or if nothing is and it has weights."""
    from timm.layers import freeze_batch_norm_2d  # type: ignore[attr-defined]

    if freeze and not any(isinstance(part, _BatchNorm) for part in encoder.modules()):
        raise ValueError(
            f"freeze_norm needs batch norm, but '{PREFIX}{name}' has none. Leave it out or set it to false."
        )
    if not freeze and (freeze is not None or not loaded):
        return encoder
    frozen: nn.Module = freeze_batch_norm_2d(encoder)  # type: ignore[no-untyped-call]
    return frozen


def _check_any_size(name: str, encoder: nn.Module, cell: int) -> None:
    """Refuse a model that only takes images of the size that it was trained on: two small ones are shown to it."""
    training = encoder.training
    encoder.eval()
    try:
        for height, width in ((2 * cell, 3 * cell), (3 * cell, 2 * cell)):
            with torch.no_grad():
                cast(Any, encoder).forward_intermediates(torch.zeros(1, 3, height, width), intermediates_only=True)
    except (AssertionError, RuntimeError, ValueError) as error:  # whatever the model checks sizes by
        raise ValueError(
            f"A backbone must take images of any size, but timm's {name!r} takes one size alone. Choose another, such "
            "as timm:vit_small_patch14_dinov2 or timm:convnext_tiny."
        ) from error
    finally:
        encoder.train(training)


def _check_fine(name: str, reduction: int) -> None:
    if reduction > 16:
        raise ValueError(
            f"network.head=deeplabv2 needs a map of output stride 16 or less, but the last of timm's {name!r} has "
            f"{reduction}, and the model cannot trade strides for dilation. Set network.head=pyramid or daformer."
        )


def _short(message: str, most: int = 400) -> str:
    message = " ".join(message.split())
    return message if len(message) <= most else message[:most] + " ..."
