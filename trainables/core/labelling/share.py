"""Pseudo labels of the most confident share of pixels: globally per class, and locally per image."""

# B images of H x W pixels, C classes.

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.distributed import sum_over_workers
from segadapt.trainables.core.labelling.files import PseudoLabelWriter
from segadapt.trainables.core.labelling.thresholds import ConfidenceHistogram, confidence_and_prediction
from segadapt.trainables.core.method import StageData

_EVERY = 5


def class_share_thresholds(
    batches: Callable[[], Iterable[Tensor]], num_classes: int, *, share: float = 0.1, excluded: Sequence[int] = ()
) -> Tensor:
    """Return the probability from which on a pixel belongs to the most confident share of a class.

    Of each image and class, the confidences of the pixels predicted as that class are sorted ascending and every fifth
    is kept, from the smallest on. With n of them over all images, the threshold is the floor(share * n)-th largest; the
    smallest if that number is 0, so a rare class takes all of its pixels. 1 for a class never predicted. Exact, in
    0.5 MB per class whatever the size of the set: the first pass counts by the upper half of the float's bits, the
    second by the lower half.

    Args:
        batches: Starts a pass over this worker's share of the set: up-sampled logits, (B, C, H, W). Called twice; every
            worker calls this function.
        num_classes: C.
        share: Share of each class's pixels, in [0, 1].
        excluded: Classes whose threshold is 1.

    Returns:
        (C,) float32 on the CPU, the same on every worker.

    Source:
        Lee et al., Bi-directional Contrastive Learning (BiCL), ECCV 2022, arXiv 2207.10892; cvlab-yonsei/DASS@f544686.
        Differs: a class never predicted stops the original, which also sorts all confidences in memory.
    """
    upper = ConfidenceHistogram(num_classes)
    for logits in batches():
        upper.update(*_every_fifth(logits))
    upper.reduce()
    counts = upper.counts.sum(dim=1)
    from_top = torch.tensor([int(n * share) for n in counts.tolist()])
    ascending = torch.where(from_top > 0, counts - from_top, 0)
    high, ascending = upper.locate(ascending)

    lower = ConfidenceHistogram(num_classes, high)
    for logits in batches():
        lower.update(*_every_fifth(logits))
    lower.reduce()
    low, _ = lower.locate(ascending)
    thresholds = ((high << 16) + low).int().view(torch.float32)
    thresholds[counts == 0] = 1.0
    thresholds[list(excluded)] = 1.0
    return thresholds


def select_confident_share(logits: Tensor, thresholds: Tensor, *, share: float = 0.1) -> Tensor:
    """Keep predictions that pass the global or the local test; 255 elsewhere.

    Globally, any class may reach its threshold, not only the predicted one. Locally, the confidence must exceed the
    floor(share * H W)-th largest of its image (the smallest if that number is 0).

    Args:
        logits: Already up-sampled to the label size, (B, C, H, W).
        thresholds: (C,) float32, see `class_share_thresholds`.
        share: Share of an image's pixels, in [0, 1].

    Returns:
        Labels, (B, H, W) uint8.

    Source:
        Lee et al., Bi-directional Contrastive Learning (BiCL), ECCV 2022, arXiv 2207.10892; cvlab-yonsei/DASS@f544686.
    """
    probabilities = logits.float().softmax(dim=1)
    confidence, prediction = probabilities.max(dim=1)
    kept = passes_globally(probabilities, thresholds) | passes_locally(confidence, share)
    return torch.where(kept, prediction, IGNORE_INDEX).to(torch.uint8)


def passes_globally(probabilities: Tensor, thresholds: Tensor) -> Tensor:
    """Return where any of the probabilities, (B, C, H, W), reaches its class's threshold, (C,): (B, H, W) bool."""
    return (probabilities >= thresholds.to(probabilities.device)[:, None, None]).any(dim=1)


def passes_locally(confidence: Tensor, share: float) -> Tensor:
    """Return where the confidence exceeds the floor(share * H W)-th largest of its image, both (B, H, W)."""
    flat = confidence.flatten(1)
    pixels = flat.shape[1]
    from_top = int(pixels * share)
    ascending = pixels - from_top + 1 if from_top > 0 else 1
    if flat.is_cuda and torch.are_deterministic_algorithms_enabled():  # some versions then refuse `kthvalue` on GPUs
        smallest = flat.sort(dim=1).values[:, ascending - 1]
    else:
        smallest = flat.kthvalue(ascending, dim=1).values
    return confidence > smallest[:, None, None]


def label_confident_share(
    predict: Callable[[Tensor], Tensor],
    data: StageData,
    num_classes: int,
    *,
    share: float = 0.1,
    local_share: float = 0.1,
    excluded: Sequence[int] = (),
) -> None:
    """Write the pseudo labels of the whole target set to `data.folder`; every worker calls this for its share.

    The network passes over the set three times: twice for `class_share_thresholds`, once to label.

    Args:
        predict: Maps normalised images, (B, 3, H, W), to logits of the same size, (B, C, H, W).
        data: The un-augmented target set and the folder.
        num_classes: C.
        share: Share of each class's pixels over the set.
        local_share: Share of each image's pixels.
        excluded: Classes whose threshold is 1.
    """

    def logits() -> Iterator[Tensor]:
        for images, _ in data.target_batches():
            yield predict(images)

    kept = torch.zeros(IGNORE_INDEX + 1, dtype=torch.int64)
    with PseudoLabelWriter(data, num_classes) as writer:
        thresholds = class_share_thresholds(logits, num_classes, share=share, excluded=excluded)
        for images, indices in data.target_batches():
            labels = select_confident_share(predict(images), thresholds, share=local_share).cpu()
            kept += torch.bincount(labels.flatten(), minlength=IGNORE_INDEX + 1)
            writer.write(indices, labels)
        kept = sum_over_workers(kept)
        provenance = {
            "rule": "global_local",
            "share": share,
            "local_share": local_share,
            "thresholds": thresholds.tolist(),
            "kept_share": (kept[:num_classes] / kept.sum()).tolist(),
        }
        writer.finish(provenance)


def _every_fifth(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return every fifth confidence of each image and class and the classes, both (N,)."""
    confidence, prediction = confidence_and_prediction(logits)
    parts = [_every_fifth_of_image(*image) for image in zip(confidence.flatten(1), prediction.flatten(1), strict=True)]
    confidences, classes = zip(*parts, strict=True)
    return torch.cat(confidences), torch.cat(classes)


def _every_fifth_of_image(confidence: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
    order = confidence.argsort()
    order = order[prediction[order].argsort(stable=True)]
    classes = prediction[order]
    positions = torch.arange(len(classes), device=classes.device)
    first_of_class = torch.searchsorted(classes, classes)
    kept = (positions - first_of_class) % _EVERY == 0
    return confidence[order][kept], classes[kept]
