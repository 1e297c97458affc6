"""Batches of both domains for a training step, the same whatever the number of workers and threads."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor

from segadapt.trainables.core import distributed
from segadapt.trainables.core.data.batch import (
    IGNORE_INDEX,
    DomainBatch,
    DomainData,
    EvaluationData,
    LabelledImages,
    TargetImages,
)
from segadapt.trainables.core.data.sampling import (
    ClassBalancedOrder,
    RareClassOrder,
    class_counts,
    generator,
    label_counts,
    rare_shown,
    sample_at,
)
from segadapt.trainables.core.data.threads import in_threads
from segadapt.trainables.core.data.transforms import (
    AugmentationConfig,
    Domain,
    Geometry,
    draw_geometry,
    flips,
    resized_for_network,
    resized_label,
    vary_color,
)
from segadapt.trainables.core.online.config import OnlineConfig

_RARE_SHARE = 3000 / 512**2
"""Share of a crop's pixels that an image shows of the rare class that it is drawn for; the crop shows half of that.
DAFormer: 3000 pixels, and 1500 in crops of 512 x 512."""

_FULL_SHARE = 0.75
"""Share of a crop's labelled pixels that no class may fill. DAFormer: 0.75."""

PseudoLabelReader = Callable[[str], Tensor]
"""Returns the pseudo label of a target image by its id, (H, W) uint8, 255 = ignore."""


@dataclass(frozen=True)
class Sample:
    """One training image as a step sees it."""

    image: Tensor  # (3, H, W) uint8
    label: Tensor | None  # (H, W) uint8, true or pseudo; None where there is none
    index: int  # in its set
    trusted: Tensor | None = None  # (H, W) bool, which pixels may be labelled; in online self-training


@dataclass(frozen=True)
class BatchSource:
    """Assembles the batches of one stage. Sample and augmentation depend on seed, stage and position alone."""

    data: DomainData
    augmentation: AugmentationConfig
    key: tuple[object, ...]
    """Seed and stage name."""
    batch_size: int
    """Images of each domain over all workers."""
    domains: tuple[str, ...]
    colored: tuple[str, ...]
    """Domains whose colours are varied."""
    flipped: bool
    pseudo_labels: PseudoLabelReader | None = None
    online: OnlineConfig | None = None
    """Settings of online self-training, in stages that have it."""

    def batch(self, index: int) -> DomainBatch:
        """Return this worker's part of batch number `index` of the stage, images as uint8."""
        places = self._places(index)
        return self._assembled([self.sample(domain, position) for domain, position in places], places)

    def batches(self, first: int, last: int, *, threads: int = 0) -> Iterator[DomainBatch]:
        """Yield `batch(first)` up to, without, `batch(last)`, read and augmented ahead by threads.

        Memory holds two batches more than the caller does. The sets' `image` and `label` and the reader of pseudo
        labels are called from several threads at once.
        """
        self._prepare()
        places = (place for index in range(first, last) for place in self._places(index))
        per_batch = len(self._places(0))
        samples = in_threads(lambda place: self.sample(*place), places, threads, ahead=max(2 * per_batch, threads))
        for index in range(first, last):
            yield self._assembled([next(samples) for _ in range(per_batch)], self._places(index))

    def sample(self, domain: Domain, position: int) -> Sample:
        """Return the sample drawn at `position`, the number of samples of the domain before it over all workers."""
        images = self._images(domain)
        index, drawn_class = self._drawn(domain, position)
        image, label = images.image(index), self._label(domain, index)
        geometry = self._geometry(domain, position, index, image, label, drawn_class)
        trusted = self._trusted(image, geometry) if domain == "target" and self.online is not None else None
        image = geometry.cut_image(image)
        label = geometry.cut_label(label) if label is not None else None
        draw = generator(*self.key, domain, "augment", position)
        if domain in self.colored:
            image = vary_color(image, self.augmentation, draw)
        image = geometry.pad_image(image)
        label = geometry.pad_label(label) if label is not None else None
        if self.flipped and flips(self.augmentation, draw):
            image = image.flip(-1)
            label = label.flip(-1) if label is not None else None
            trusted = trusted.flip(-1) if trusted is not None else None
        return Sample(image, label, index, trusted)

    def _drawn(self, domain: Domain, position: int) -> tuple[int, int | None]:
        """Return the image at a position, and the class that it was drawn for, if any."""
        if domain == "source" and self._draws_rare_classes:
            return self._rare_classes.at(position)
        if domain == "source" and self.augmentation.class_balanced:
            return self._balanced.at(position), None
        return sample_at(position, len(self._images(domain)), (*self.key, domain)), None

    def _geometry(
        self, domain: Domain, position: int, index: int, image: Tensor, label: Tensor | None, drawn_class: int | None
    ) -> Geometry:
        """Return how an image is resized and cut; in online self-training, a source crop may be drawn several times."""
        shape, rare = (image.shape[-2], image.shape[-1]), self._rare_in(domain, index)
        key = (*self.key, domain, "geometry", position)
        draw = partial(draw_geometry, shape, self.augmentation, domain, label=label, rare=rare)
        geometry = draw(generator(*key))
        if domain == "target" or self.online is None or label is None:
            return geometry
        for attempt in range(1, self.online.crop_tries):
            if geometry.crop is None or _is_varied(geometry.cut_label(label), drawn_class):
                break
            geometry = draw(generator(*key, attempt))
        return geometry

    def _trusted(self, image: Tensor, geometry: Geometry) -> Tensor:
        """Return which pixels of a cut target image may be labelled: neither its margins nor padding."""
        assert self.online is not None
        height, width = image.shape[-2:]
        top, bottom, left, right = self.online.margins
        inside = torch.zeros(height, width, dtype=torch.uint8)
        last_row, last_column = height - int(bottom * height), width - int(right * width)
        inside[int(top * height) : last_row, int(left * width) : last_column] = 1
        return geometry.pad_label(geometry.cut_label(inside)) == 1

    def _places(self, index: int) -> list[tuple[Domain, int]]:
        """Return domain and position of each sample of this worker's part of a batch."""
        per_worker = self.batch_size // distributed.world_size()
        first = index * self.batch_size + distributed.rank() * per_worker
        domains: tuple[Domain, ...] = ("source", "target") if "target" in self.domains else ("source",)
        return [(domain, position) for domain in domains for position in range(first, first + per_worker)]

    def _assembled(self, samples: Sequence[Sample], places: Sequence[tuple[Domain, int]]) -> DomainBatch:
        per_domain = self.batch_size // distributed.world_size()
        source, target = samples[:per_domain], samples[per_domain:]
        source_images, source_labels = self._stacked("source", source)
        assert source_labels is not None
        if not target:
            return DomainBatch(source_images, source_labels, None, key=self.key)
        target_images, pseudo_labels = self._stacked("target", target)
        trusted = [sample.trusted for sample in target if sample.trusted is not None]
        return DomainBatch(
            source_images,
            source_labels,
            target_images,
            torch.tensor([sample.index for sample in target]),
            pseudo_labels,
            torch.stack(trusted) if trusted else None,
            key=self.key,
            numbers=tuple(number for domain, number in places if domain == "source"),
        )

    def _stacked(self, domain: Domain, samples: Sequence[Sample]) -> tuple[Tensor, Tensor | None]:
        images = [sample.image for sample in samples]
        for sample in samples:
            if sample.image.shape != images[0].shape:
                ids = self._images(domain).ids
                raise ValueError(
                    f"The {domain} images of a batch must have one size, but {ids[samples[0].index]} has "
                    f"{_shown(images[0])} and {ids[sample.index]} {_shown(sample.image)} (height x width). Set "
                    f"augmentation.{domain}_size=[height,width] to resize them, or augmentation.crop=[height,width]."
                )
        labels = [sample.label for sample in samples if sample.label is not None]
        return torch.stack(images), torch.stack(labels) if labels else None

    def _images(self, domain: Domain) -> LabelledImages | TargetImages:
        return self.data.source if domain == "source" else self.data.target

    def _label(self, domain: Domain, index: int) -> Tensor | None:
        if domain == "source":
            return self.data.source.label(index)
        return self.pseudo_labels(self.data.target.ids[index]) if self.pseudo_labels is not None else None

    def _prepare(self) -> None:
        """Count classes where that is needed, before there are threads."""
        if self._draws_rare_classes:
            _ = self._rare_classes
        if self.augmentation.class_balanced:
            _ = self._balanced
        if self.augmentation.rare_crop > 0:
            _ = self._rare

    @property
    def _draws_rare_classes(self) -> bool:
        return self.online is not None and self.online.rare_class_temperature is not None

    @cached_property
    def _rare_classes(self) -> RareClassOrder:
        assert self.online is not None
        assert self.online.rare_class_temperature is not None
        pixels = self.online.rare_class_pixels
        if pixels is None:
            pixels = round(_RARE_SHARE * math.prod(self.augmentation.crop or self.data.source.label(0).shape))
        return RareClassOrder(
            class_counts(self.data.source, len(self.data.classes)),
            (*self.key, "source"),
            temperature=self.online.rare_class_temperature,
            min_pixels=pixels,
        )

    @cached_property
    def _balanced(self) -> ClassBalancedOrder:
        return ClassBalancedOrder(class_counts(self.data.source, len(self.data.classes)), (*self.key, "source"))

    @cached_property
    def _rare(self) -> dict[Domain, list[list[int]]]:
        """Return the rare classes each image shows, by domain; if any are below 0.1 % of its pixels, these alone."""
        classes, number = len(self.data.classes), self.augmentation.rare_classes
        rare: dict[Domain, list[list[int]]] = {"source": rare_shown(class_counts(self.data.source, classes), number)}
        if self.pseudo_labels is not None:
            rare["target"] = rare_shown(label_counts(self.pseudo_labels, self.data.target.ids, classes), number)
        return rare

    def _rare_in(self, domain: Domain, index: int) -> list[int]:
        if self.augmentation.rare_crop == 0 or domain not in self._rare:
            return []
        return self._rare[domain][index]


def _is_varied(label: Tensor, drawn_class: int | None) -> bool:
    """Return whether a crop's label shows enough of the class it was drawn for, and no class fills it."""
    counts = torch.bincount(label.flatten(), minlength=IGNORE_INDEX + 1)
    most = int(counts[:IGNORE_INDEX].max())
    fills = most > _FULL_SHARE * int(counts[:IGNORE_INDEX].sum())
    return not fills and (drawn_class is None or int(counts[drawn_class]) > _RARE_SHARE / 2 * label.numel())


def _shown(image: Tensor) -> str:
    return f"{image.shape[-2]} x {image.shape[-1]}"


class ResizedTargetImages:
    """Unlabelled images at the size the network sees outside training.

    Args:
        images: The set.
        config: Settings, of which `target_size` and `interpolation` hold.
    """

    domain: Domain = "target"

    def __init__(self, images: TargetImages, config: AugmentationConfig) -> None:
        self.ids = images.ids
        self._images = images
        self._config = config

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Tensor:
        """Return an RGB image, (3, H, W) uint8."""
        return resized_for_network(self._images.image(index), self._config, self.domain)


class ResizedImages(ResizedTargetImages):
    """Labelled images at the size the network sees outside training.

    Args:
        images: The set.
        config: Settings, of which `size(domain)` and `interpolation` hold.
        domain: Domain of the images.
        labels: Whether labels follow their image; otherwise they keep their own size, as evaluation wants them.
    """

    def __init__(self, images: LabelledImages, config: AugmentationConfig, domain: Domain, *, labels: bool) -> None:
        super().__init__(images, config)
        self.domain = domain
        self._labelled = images
        self._size = config.size(domain) if labels else None

    def label(self, index: int) -> Tensor:
        """Return its class indices, (H', W') uint8, 255 = ignore."""
        label = self._labelled.label(index)
        return label if self._size is None else resized_label(label, self._size)


def evaluation_for_network(data: EvaluationData, config: AugmentationConfig) -> EvaluationData:
    """Return validation images at the size the network sees outside training; labels keep theirs."""
    return replace(
        data,
        source=ResizedImages(data.source, config, "source", labels=False),
        target=ResizedImages(data.target, config, "target", labels=False),
        scored=ResizedTargetImages(data.scored, config),
    )


def worker_share(images: LabelledImages | TargetImages) -> range:
    """Return the indices this worker handles in one pass over a set: every image on exactly one worker."""
    return range(distributed.rank(), len(images), distributed.world_size())


def one_pass(
    images: LabelledImages | TargetImages, batch_size: int, *, threads: int = 0
) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield this worker's share of a set once, un-augmented: images (b, 3, H, W) uint8 and their indices.

    Images of unlike size are never put into one batch.

    Args:
        images: The set.
        batch_size: Images in a batch at most.
        threads: Number of threads that read ahead, up to a batch; they call `images.image` at the same time.
    """
    pending: list[Tensor] = []
    indices: list[int] = []
    share = worker_share(images)
    read = in_threads(images.image, share, threads, ahead=max(batch_size, threads))
    for index, image in zip(share, read, strict=True):
        if pending and (image.shape != pending[0].shape or len(pending) == batch_size):
            yield torch.stack(pending), indices
            pending, indices = [], []
        pending.append(image)
        indices.append(index)
    if pending:
        yield torch.stack(pending), indices


Batch = TypeVar("Batch")


def in_step(batches: Iterator[Batch], without_content: Callable[[Batch], Batch]) -> Iterator[Batch]:
    """Yield equally often on every worker, so that each batch may be reduced over the workers.

    Args:
        batches: This worker's; at least one.
        without_content: Makes a batch that counts for nothing from this worker's last one, for when others have more.
    """
    if distributed.world_size() == 1:
        yield from batches
        return
    last: Batch | None = None
    while True:
        batch = next(batches, None)
        if not distributed.sum_over_workers(torch.tensor(int(batch is not None))):
            return
        if batch is None:
            assert last is not None
            batch = without_content(last)
        last = batch
        yield batch
