"""Class-balanced, self-paced pseudo labels: a threshold per class that admits the same portion of each, and ratios."""

# B images of H x W pixels, C classes.

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.distributed import sum_over_workers
from segadapt.trainables.core.labelling.files import PseudoLabelWriter
from segadapt.trainables.core.labelling.thresholds import ConfidenceHistogram, pixels_per_class
from segadapt.trainables.core.method import StageData

_EVERY = 4


def self_paced_thresholds(batches: Callable[[], Iterable[Tensor]], num_classes: int, *, portion: float = 0.2) -> Tensor:
    """Return the probability that the most confident portion of each class's predictions reaches.

    Of each image and class, the confidences of the pixels predicted as that class are listed row by row and every
    fourth is kept, from the first on. With n of them over all images, the threshold is the floor(portion * n)-th
    largest, and 1 if that number is 0: so also for a class never predicted. Exact, in 0.5 MB per class whatever the
    size of the set: the first pass counts by the upper half of the float's bits, the second by the lower half.

    Args:
        batches: Starts a pass over this worker's share of the set: class probabilities at label size, (B, C, H, W)
            float32. Called twice; every worker calls this function.
        num_classes: C.
        portion: π, in [0, 1].

    Returns:
        (C,) float32 on the CPU, the same on every worker.

    Raises:
        ValueError: If a probability is NaN.

    Source:
        Zou et al., Class-Balanced Self-Training, ECCV 2018, and Confidence Regularized Self-Training, ICCV 2019;
        yzou2/CRST. The self-training code of DRSL's authors, engrjavediqbal/MLSL, has the same rule.
        Differs: the originals sort all confidences in memory.
    """
    upper = ConfidenceHistogram(num_classes)
    for probabilities in batches():
        upper.update(*_every_fourth(probabilities))
    upper.reduce()
    counts = upper.counts.sum(dim=1)
    from_top = torch.tensor([int(n * portion) for n in counts.tolist()])
    high, ascending = upper.locate(torch.where(from_top > 0, counts - from_top, 0))

    lower = ConfidenceHistogram(num_classes, high)
    for probabilities in batches():
        lower.update(*_every_fourth(probabilities))
    lower.reduce()
    low, _ = lower.locate(ascending)
    elements = ((high << 16) + low).int().view(torch.float32)
    return torch.where(from_top > 0, elements, 1.0)


def self_paced_labels(probabilities: Tensor, thresholds: Tensor) -> Tensor:
    """Label each pixel with the class whose probability is largest in relation to its threshold, if that reaches it.

    The class need not be the predicted one: one with a low threshold wins over a more probable one with a high one.

    Args:
        probabilities: (B, C, H, W) float32.
        thresholds: (C,) float32, positive, see `self_paced_thresholds`.

    Returns:
        Labels, (B, H, W) uint8; 255 where no class reaches its threshold.

    Source:
        As `self_paced_thresholds`.
    """
    ratio, label = (probabilities / thresholds.to(probabilities.device)[:, None, None]).max(dim=1)
    return torch.where(ratio >= 1, label, IGNORE_INDEX).to(torch.uint8)


def label_self_paced(
    predict: Callable[[Tensor], Tensor],
    data: StageData,
    num_classes: int,
    *,
    portion: float = 0.2,
    notes: Mapping[str, object] | None = None,
) -> Tensor:
    """Write the pseudo labels of the whole target set to `data.folder`; every worker calls this for its share.

    The network passes over the set three times: twice for `self_paced_thresholds`, once to label.

    Args:
        predict: Maps normalised images, (B, 3, H, W), to class probabilities of the same size, (B, C, H, W).
        data: The un-augmented target set and the folder.
        num_classes: C.
        portion: See `self_paced_thresholds`.
        notes: Further entries of the provenance.

    Returns:
        Pixels predicted as each class over the whole set, (C,) int64 on the CPU, the same on every worker.
    """

    def probabilities() -> Iterator[Tensor]:
        for images, _ in data.target_batches():
            yield predict(images).float()

    counts = torch.zeros(2, num_classes, dtype=torch.int64)  # pixels predicted, pixels labelled
    with PseudoLabelWriter(data, num_classes) as writer:
        thresholds = self_paced_thresholds(probabilities, num_classes, portion=portion)
        for images, indices in data.target_batches():
            scores = predict(images).float()
            labels = self_paced_labels(scores, thresholds)
            parts = [pixels_per_class(scores.argmax(1), num_classes), pixels_per_class(labels, num_classes)]
            counts = counts.to(labels.device) + torch.stack(parts)
            writer.write(indices, labels)
        predicted, labelled = sum_over_workers(counts).cpu().unbind()
        provenance = {
            "rule": "self_paced",
            "portion": portion,
            "thresholds": thresholds.tolist(),
            "predicted": predicted.tolist(),
            "labelled": labelled.tolist(),
            **(notes or {}),
        }
        writer.finish(provenance)
    return predicted


def _every_fourth(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Return every fourth confidence of each image and class, and the classes, both (N,)."""
    confidence, prediction = probabilities.max(dim=1)
    if confidence.isnan().any():
        raise ValueError("Class probabilities must be finite, but the network returned NaN. Lower the learning rate.")
    parts = [_every_fourth_of_image(*image) for image in zip(confidence.flatten(1), prediction.flatten(1), strict=True)]
    confidences, classes = zip(*parts, strict=True)
    return torch.cat(confidences), torch.cat(classes)


def _every_fourth_of_image(confidence: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
    classes, order = prediction.sort(stable=True)
    counts = torch.bincount(classes)
    first_of_class = (counts.cumsum(0) - counts)[classes]
    kept = (torch.arange(len(classes), device=classes.device) - first_of_class) % _EVERY == 0
    return confidence[order[kept]], classes[kept]
