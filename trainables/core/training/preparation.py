"""What a method may look at before a stage: both domains, un-augmented."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX, DomainData
from segadapt.trainables.core.data.loading import ResizedImages, ResizedTargetImages, in_step, one_pass
from segadapt.trainables.core.data.transforms import AugmentationConfig
from segadapt.trainables.core.method import Method, Stage, StageData
from segadapt.trainables.core.training.checkpoint import tensors_hash


def prepare_stage_data(
    data: DomainData,
    folder: Path,
    made_by: Mapping[str, str],
    *,
    augmentation: AugmentationConfig,
    batch_size: int,
    threads: int,
    normalise: Callable[[Tensor], Tensor],
) -> StageData:
    """Return both domains un-augmented, in batches.

    Args:
        data: Labelled source and unlabelled target.
        folder: Folder for what the stage writes.
        made_by: What pseudo labels are labelled with.
        augmentation: Settings, of which the sizes hold.
        batch_size: Images in a batch at most.
        threads: Number of threads that read ahead.
        normalise: Puts uint8 images on the device, as the network's float input.
    """
    source_images = ResizedImages(data.source, augmentation, "source", labels=True)
    target_images = ResizedTargetImages(data.target, augmentation)

    def source() -> Iterator[tuple[Tensor, Tensor]]:
        for images, indices in one_pass(source_images, batch_size, threads=threads):
            labels = torch.stack([source_images.label(index) for index in indices])
            normalised = normalise(images)
            yield normalised, labels.to(normalised.device, torch.int64)

    def source_in_step() -> Iterator[tuple[Tensor, Tensor]]:
        return in_step(source(), lambda last: (last[0], torch.full_like(last[1], IGNORE_INDEX)))

    def target() -> Iterator[tuple[Tensor, Tensor]]:
        for images, indices in one_pass(target_images, batch_size, threads=threads):
            yield normalise(images), torch.tensor(indices)

    return StageData(
        folder=folder,
        target_ids=data.target.ids,
        source_batches=source_in_step,
        target_batches=target,
        made_by=made_by,
    )


def maker_of_pseudo_labels(method: Method, stage: Stage, data: DomainData) -> dict[str, str]:
    """Return what pseudo labels of a stage are labelled with; `network` is the hash of the labelling weights."""
    return {
        "stage": stage.name,
        "method": method.name,
        "network": tensors_hash(method.labeller(stage).state_dict()),
        "data": data.fingerprint,
    }
