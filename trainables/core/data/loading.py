"""Batches of both domains for a training step, the same whatever the number of workers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from segadapt.trainables.core import distributed
from segadapt.trainables.core.data.batch import DomainBatch, DomainData, LabelledImages, TargetImages
from segadapt.trainables.core.data.sampling import generator, sample_at
from segadapt.trainables.core.data.transforms import AugmentationConfig, flips, vary_color

PseudoLabelReader = Callable[[str], Tensor]
"""Returns the pseudo label of a target image by its id, (H, W) uint8, 255 = ignore."""


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

    def batch(self, index: int) -> DomainBatch:
        """Return this worker's part of batch number `index` of the stage, images as uint8."""
        per_worker = self.batch_size // distributed.world_size()
        first = index * self.batch_size + distributed.rank() * per_worker
        positions = range(first, first + per_worker)
        source_images, source_labels, _ = self._stack("source", self.data.source, positions, self._source_label)
        if "target" not in self.domains:
            return DomainBatch(source_images, source_labels.long(), None)
        label_of = self._pseudo_label if self.pseudo_labels is not None else None
        target_images, pseudo_labels, indices = self._stack("target", self.data.target, positions, label_of)
        return DomainBatch(
            source_images,
            source_labels.long(),
            target_images,
            torch.tensor(indices),
            pseudo_labels.long() if label_of is not None else None,
        )

    def _source_label(self, index: int) -> Tensor:
        return self.data.source.label(index)

    def _pseudo_label(self, index: int) -> Tensor:
        assert self.pseudo_labels is not None
        return self.pseudo_labels(self.data.target.ids[index])

    def _stack(
        self,
        domain: str,
        images: LabelledImages | TargetImages,
        positions: range,
        label_of: Callable[[int], Tensor] | None,
    ) -> tuple[Tensor, Tensor, list[int]]:
        samples, labels, indices = [], [], []
        for position in positions:
            index = sample_at(position, len(images), (*self.key, domain))
            draw = generator(*self.key, domain, "augment", position)
            image = images.image(index)
            label = label_of(index) if label_of is not None else torch.empty(0, dtype=torch.uint8)
            if domain in self.colored:
                image = vary_color(image, self.augmentation, draw)
            if self.flipped and flips(self.augmentation, draw):
                image = image.flip(-1)
                label = label.flip(-1)
            samples.append(image)
            labels.append(label)
            indices.append(index)
        return torch.stack(samples), torch.stack(labels), indices


def worker_share(images: LabelledImages | TargetImages) -> range:
    """Return the indices this worker handles in one pass over a set: every image on exactly one worker."""
    return range(distributed.rank(), len(images), distributed.world_size())


def one_pass(images: LabelledImages | TargetImages, batch_size: int) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield this worker's share of a set once, un-augmented: images (b, 3, H, W) uint8 and their indices.

    Images of unlike size are never put into one batch.
    """
    pending: list[Tensor] = []
    indices: list[int] = []
    for index in worker_share(images):
        image = images.image(index)
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
