"""What training sees: pairs of a labelled source batch and an unlabelled target batch.

Target labels live in `LabelledImages` handed to evaluation alone; training receives `TargetImages`, a type without
labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

IGNORE_INDEX = 255
"""Label of pixels that belong to no trained class; left out of losses, statistics and metrics."""


@dataclass(frozen=True)
class ClassList:
    """Names and display colours of the trained classes, in order of their index."""

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]

    def __len__(self) -> int:
        return len(self.names)


class LabelledImages(Protocol):
    """Images with labels: the source domain, or any domain's evaluation set."""

    ids: Sequence[str]

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor:
        """Return an RGB image, (3, H, W) uint8."""

    def label(self, index: int) -> Tensor:
        """Return its class indices, (H, W) uint8, 255 = ignore."""


class TargetImages(Protocol):
    """Unlabelled target images. There is no way from here to a label."""

    ids: Sequence[str]

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor:
        """Return an RGB image, (3, H, W) uint8."""


@dataclass(frozen=True)
class DomainData:
    """What training may use: a labelled source, an unlabelled target, the classes and the content fingerprint."""

    source: LabelledImages
    target: TargetImages
    classes: ClassList
    fingerprint: str
    notes: tuple[str, ...] = ()
    """What was decided when the data was loaded, for people: classes left out, images set aside, files left out."""


@dataclass(frozen=True)
class EvaluationData:
    """What evaluation alone may use: labelled validation images of both domains, and all of the target's."""

    source: LabelledImages
    target: LabelledImages
    """The target's validation images that have a label: all, some or none of them."""
    scored: TargetImages
    """All validation images of the target, by which label-free scores judge."""
    classes: ClassList


@dataclass(frozen=True)
class LabelledDomains:
    """Labelled images of both domains, to be written as files in the layout of a kind of dataset."""

    source_train: LabelledImages
    source_val: LabelledImages
    target_train: LabelledImages
    target_val: LabelledImages
    classes: ClassList


@dataclass(frozen=True)
class DomainBatch:
    """One step's images. B source and B target images of this worker; the two domains may differ in size.

    Images are normalised floats once the trainer has moved the batch to its device. Labels are uint8 before, which is
    an eighth of what is copied otherwise, and int64 there.
    """

    source_images: Tensor  # (B, 3, H, W)
    source_labels: Tensor  # (B, H, W), 255 = ignore
    target_images: Tensor | None  # (B, 3, H', W'); None in stages that train on the source alone
    target_indices: Tensor | None = None  # (B,) int64, positions in the target set; always on the CPU
    target_pseudo_labels: Tensor | None = None  # (B, H', W'), 255 = ignore; in stages that have them
    target_trusted: Tensor | None = None  # (B, H', W') bool, where labels may be given to; in online self-training
    key: tuple[object, ...] = ()
    """Seed of the trial and name of the stage: what random draws of a batch begin with."""
    numbers: tuple[int, ...] = ()
    """Number of each pair of images among those of the stage, over all workers: draws then depend on nothing else."""

    def to(self, device: torch.device) -> "DomainBatch":
        """Return the batch on `device`, labels as int64; a GPU gets it from pinned memory, which is not waited for."""
        tensors = {
            name: value
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name != "target_indices"  # numbers that seed random draws
        }
        moved: dict[str, Any] = {name: to_device(value, device) for name, value in tensors.items()}
        labels = {name: value.long() for name, value in moved.items() if name.endswith("labels")}
        return replace(self, **moved | labels)


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device; a GPU gets it from pinned memory, and the copy is not waited for."""
    if device.type == "cuda" and not value.is_cuda:
        value = value.pin_memory()
    return value.to(device, non_blocking=True)
