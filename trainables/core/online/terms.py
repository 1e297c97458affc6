"""The terms of online self-training: one component that any method can be trained with.

In every step a teacher, the running average of the network's weights, labels the batch's target images as they are. The
network learns those labels on images that source pixels are pasted on (`online_mix`) and on images of which parts are
hidden (`online_mask`). One pass of the teacher serves both.

What is drawn depends on seed, stage and an image's number in the joined batch alone: it is the same on any number of
workers, in micro-batches, and after a restart.

Training at several resolutions, with a detail and a context crop (HRDA), is not here. It would be a network that takes
both crops, beside `core.networks`, and cut the detail crop of mixed and masked images in `_loss`.
"""

# B images of H x W pixels each of source and target, C classes.

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from segadapt.trainables.core.data.batch import IGNORE_INDEX, DomainBatch, to_device
from segadapt.trainables.core.data.sampling import generator
from segadapt.trainables.core.data.transforms import Size
from segadapt.trainables.core.losses.feature_distance import feature_distance
from segadapt.trainables.core.losses.segmentation import weighted_cross_entropy
from segadapt.trainables.core.networks import Segmenter, TimmBackbone
from segadapt.trainables.core.online.augmentation import Change, blurred, draw_change, jittered
from segadapt.trainables.core.online.class_mix import Mixed, class_masks, class_mix, draw_classes
from segadapt.trainables.core.online.config import OnlineConfig
from segadapt.trainables.core.online.masking import block_mask, mask_grid, masked_tokens
from segadapt.trainables.core.online.pseudo_labels import WeightedLabels, weighted_pseudo_labels
from segadapt.trainables.core.state.mean_teacher import Buffers, MeanTeacher, warmed_momentum
from segadapt.trainables.core.validation import check

PrecisionContext = Callable[[], contextlib.AbstractContextManager[Any]]
"""Opens the context in which networks compute."""

THINGS = frozenset(
    (
        "traffic light",
        "traffic sign",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    )
)
"""Countable classes of Cityscapes, whose features `online.feature_distance` keeps."""

_BUFFERS: dict[str, Buffers] = {"batch": "own", "running": "student", "average": "average"}


class OnlineTerms(nn.Module):
    """A teacher that labels target images in every step, and the terms that the network learns from its labels.

    Args:
        network: The network as it is deployed, with its first weights.
        config: Settings.

    Attributes:
        teacher: The running average of the network.
        steps: Optimiser steps that the teacher has followed.

    Raises:
        ValueError: If tokens are to be masked and the network has none.
    """

    def __init__(self, network: Segmenter, config: OnlineConfig) -> None:
        super().__init__()
        self.config = config
        self.teacher = MeanTeacher(network)
        self.steps = 0
        self.things: Sequence[int] = ()
        self.mask_token = nn.Parameter(torch.zeros(_token_size(network))) if config.mask == "token" else None
        # No part of the state: it is what any process builds from the trial's settings.
        self._first = [copy.deepcopy(network.backbone).requires_grad_(False).eval()] if config.feature_distance else []
        by_batch = config.teacher_norm == "batch"
        self._norms = [part for part in self.teacher.modules() if by_batch and isinstance(part, _BatchNorm)]

    def see_classes(self, names: Sequence[str]) -> None:
        """Remember which classes are things.

        Args:
            names: Names of the classes, in order.

        Raises:
            ValueError: If features of things are to be kept, and no class is a thing.
        """
        self.things = [index for index, name in enumerate(names) if name in THINGS]
        check(
            bool(self.things) or self.config.feature_distance == 0,
            f"online.feature_distance must be 0 unless a class is one of {', '.join(sorted(THINGS))}",
            ", ".join(names),
        )

    def get_extra_state(self) -> Tensor:
        """Return the steps, for `state_dict`."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the steps, from `load_state_dict`."""
        self.steps = int(state)

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Go on with the teacher of an earlier trial, where it had one of the same kind and steps with it."""
        prefix = "online."
        earlier = {
            name.removeprefix(prefix): value for name, value in state["state"].items() if name.startswith(prefix)
        }
        if earlier.keys() == self.state_dict().keys():
            self.load_state_dict(earlier)

    def begin(self, network: Segmenter) -> None:
        """Let the teacher be the network, unless it has followed it before."""
        if self.steps == 0:
            self.teacher.start_from(network)

    def follow(self, network: Segmenter) -> None:
        """Move the teacher, after an optimiser step of the network."""
        self.steps += 1
        momentum = warmed_momentum(self.steps, 1 - self.config.teacher_rate)
        self.teacher.follow(network, momentum=momentum, buffers=_BUFFERS[self.config.teacher_norm])

    def terms(
        self, network: Segmenter, batch: DomainBatch, step: int, precision: PrecisionContext
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield `online_mix` and `online_mask`, weighted scalars, unless their weight is 0.

        Each is computed when it is asked for. Passing it back before the next one is asked for keeps the memory of one
        pass alone.

        Args:
            network: The trained network.
            batch: Normalised images of both domains, on the network's device.
            step: Steps taken in the stage so far.
            precision: Context of the networks.

        Raises:
            ValueError: If images are to be mixed, and source and target images differ in size.
        """
        config, images = self.config, batch.target_images
        if images is None or not (config.mixes or config.masks):
            return
        if config.mixes:
            check_sizes(_size(batch.source_images), _size(images))
        labelled = self.labelled(images, batch.target_trusted, precision)
        loss = partial(self._loss, network, precision)
        if config.mixes:
            mixed = self._mixed(network, batch, labelled, step)
            yield "online_mix", config.mix_weight * loss(*mixed)
            del mixed
        if config.masks:
            yield "online_mask", config.mask_weight * self._masked_loss(network, batch, labelled, step, loss)

    @torch.no_grad()
    def labelled(self, images: Tensor, trusted: Tensor | None, precision: PrecisionContext) -> WeightedLabels:
        """Label target images with the teacher.

        Args:
            images: Normalised, (B, 3, H, W).
            trusted: Which pixels may be labelled, (B, H, W) bool; None: all.
            precision: Context of the networks.
        """
        probabilities = self._probabilities(images, precision)
        if self.config.mirrored:
            mirrored = self._probabilities(images.flip(-1), precision)
            probabilities = (probabilities + mirrored.flip(-1)) / 2
        if self.config.quality != "none":
            return weighted_pseudo_labels(
                probabilities, self.config.threshold, quality=self.config.quality, trusted=trusted
            )
        labels = probabilities.argmax(1)
        everywhere = torch.ones_like(labels, dtype=probabilities.dtype)
        return WeightedLabels(labels, everywhere if trusted is None else everywhere * trusted)

    @contextlib.contextmanager
    def watched(self, backbone: nn.Module, images: Tensor) -> Iterator[list[Tensor]]:
        """Note the last map of a backbone for these images, when it is shown them within the context."""
        maps: list[Tensor] = []

        def note(module: nn.Module, shown: tuple[Any, ...], result: Any) -> None:
            if shown[0] is images:
                maps.append(_last_map(result))

        hook = backbone.register_forward_hook(note) if self.config.feature_distance > 0 else None
        try:
            yield maps
        finally:
            if hook is not None:
                hook.remove()

    def feature_term(
        self, network: Segmenter, batch: DomainBatch, maps: Sequence[Tensor], precision: PrecisionContext
    ) -> dict[str, Tensor]:
        """Return `online_feature_distance`, weighted, unless its weight is 0 or the batch is of the source alone.

        Args:
            network: The trained network.
            batch: See `terms`.
            maps: What `watched` has noted of the source images; without any, they are passed once more.
            precision: Context of the networks.
        """
        if self.config.feature_distance == 0 or batch.target_images is None:
            return {}
        images = batch.source_images
        self._first = [backbone.to(images.device) for backbone in self._first]
        with precision():
            features = maps[-1] if maps else _last_map(network.backbone(images))
            with torch.no_grad():
                pretrained = _last_map(self._first[0](images))
        distance = feature_distance(
            features,
            pretrained,
            batch.source_labels,
            num_classes=network.num_classes,
            things=self.things,
            purity=self.config.feature_purity,
        )
        return {"online_feature_distance": self.config.feature_distance * distance}

    def drawn(self, name: str, batch: DomainBatch, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        """Return what is drawn for each image, on the batch's device, which nothing waits for."""
        draws = torch.stack([draw(generator(*batch.key, name, number)) for number in batch.numbers])
        return to_device(draws, batch.source_images.device)

    def _probabilities(self, images: Tensor, precision: PrecisionContext) -> Tensor:
        for norm in self._norms:
            norm.train()
        with precision():
            logits = self.teacher(images).logits
        for norm in self._norms:
            norm.eval()
        network = cast(Segmenter, self.teacher.network)
        return network.upsample(logits, _size(images)).softmax(1)

    def _loss(
        self, network: Segmenter, precision: PrecisionContext, images: Tensor, labels: Tensor, weights: Tensor
    ) -> Tensor:
        with precision():
            logits = network(images).logits
        deployed = cast(Segmenter, self.teacher.network)
        # Its corner rule holds, but not what else its class may do at the end.
        upsampled = Segmenter.upsample(deployed, logits, _size(labels))
        return weighted_cross_entropy(upsampled, labels, weights, mean_over=self.config.mean_over)

    @torch.no_grad()
    def _mixed(self, network: Segmenter, batch: DomainBatch, labelled: WeightedLabels, step: int) -> Mixed:
        assert batch.target_images is not None
        labels = batch.source_labels
        draws = self.drawn("class_mix", batch, lambda draw: torch.rand(IGNORE_INDEX + 1, generator=draw))
        drawn = draw_classes(labels, draws, classes_of=self.config.classes_of, paste_ignored=self.config.paste_ignored)
        mixed = class_mix(class_masks(labels, drawn), batch.source_images, labels, batch.target_images, *labelled)
        return mixed._replace(images=self._augmented(network, mixed.images, batch, step, "mix"))

    def _masked_loss(
        self,
        network: Segmenter,
        batch: DomainBatch,
        labelled: WeightedLabels,
        step: int,
        loss: Callable[..., Tensor],
    ) -> Tensor:
        config, images = self.config, cast(Tensor, batch.target_images)
        if config.mask_augment:
            images = self._augmented(network, images, batch, step, "mask")
        if self.mask_token is not None:

            def tokens(length: int) -> Tensor:
                return self.drawn("token_mask", batch, lambda draw: torch.rand(length, generator=draw))

            backbone = cast(TimmBackbone, network.backbone)
            with masked_tokens(backbone, self.mask_token, config.mask_ratio, tokens):
                return loss(images, *labelled)
        size = _size(images)
        block = max(1, round(config.mask_block * min(size)))
        grid = mask_grid(1, size, block)[1:]
        draws = self.drawn("block_mask", batch, lambda draw: torch.rand(grid, generator=draw))
        return loss(images * block_mask(size, block, config.mask_ratio, draws), *labelled)

    @torch.no_grad()
    def _augmented(self, network: Segmenter, images: Tensor, batch: DomainBatch, step: int, name: str) -> Tensor:
        """Return normalised images with jittered colours and blurred."""
        config = self.config
        draw = partial(draw_change, jitter=config.jitter, hue=config.hue, blur=config.blur)
        changes = [draw(generator(*batch.key, name, "change", number)) for number in batch.numbers]
        chances = [_chances(batch, name, number if config.augment_of == "image" else step) for number in batch.numbers]
        color = _chosen(changes, [first < config.jitter_chance for first, _ in chances])
        blur = _chosen(changes, [second < config.blur_chance for _, second in chances])
        if any(color) and (config.jitter > 0 or config.hue > 0):
            images = network.normalise(255 * jittered(network.restore(images), color))
        return blurred(images, blur) if any(blur) else images


def _chances(batch: DomainBatch, name: str, number: int) -> list[float]:
    draws: list[float] = torch.rand(2, generator=generator(*batch.key, name, "whether", number)).tolist()
    return draws


def _chosen(changes: Sequence[Change], chosen: Sequence[bool]) -> list[Change | None]:
    return [change if choice else None for change, choice in zip(changes, chosen, strict=True)]


def _size(maps: Tensor) -> Size:
    return maps.shape[-2], maps.shape[-1]


def _last_map(maps: Any) -> Tensor:
    """Return the coarsest of a backbone's maps."""
    return cast(Tensor, maps[-1] if isinstance(maps, tuple) else maps)


def _token_size(network: Segmenter) -> int:
    """Return the channels of a plain transformer's tokens."""
    backbone = network.backbone
    if not isinstance(backbone, TimmBackbone) or not backbone.plain:
        raise ValueError(
            "online.mask=token needs a plain transformer, such as network.name=timm:vit_small_patch14_dinov2.lvd142m, "
            f"but the network has a {type(backbone).__name__} without tokens. Set online.mask=block."
        )
    return int(backbone.encoder.embed_dim)


def check_sizes(source: Size, target: Size) -> None:
    """Raise a ValueError unless source images have the size of target images, as mixing needs."""
    if source != target:
        raise ValueError(
            "Source pixels can be pasted on target images of the same size alone, but source images have "
            f"{source[0]} x {source[1]} pixels and target images {target[0]} x {target[1]} (height x width). Set "
            "augmentation.crop=[height,width] for both domains, or online.mix_weight=0."
        )
