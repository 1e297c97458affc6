"""Evaluation on labelled validation images: the one place that sees target labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX, ClassList, EvaluationData, LabelledImages
from segadapt.trainables.core.data.loading import one_pass, worker_share
from segadapt.trainables.core.data.sampling import in_threads
from segadapt.trainables.core.data.transforms import Size
from segadapt.trainables.core.label_quality import LabelQuality, LabelQualityCounter, LabelRule
from segadapt.trainables.core.metrics import ConfusionMatrix, intersection_over_union
from segadapt.trainables.core.networks import Segmenter
from segadapt.trainables.core.validation import check

_GALLERY_WIDTH = 512
"""Widest picture in a gallery: a checkpoint carries one, and Cityscapes' own size would take it 20 MB."""


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How a network is asked about an image: once, or several times with the class probabilities averaged."""

    scales: tuple[float, ...] = (1.0,)
    """Sizes at which the image is shown, as factors of its own size per side."""
    flip: bool = False
    """Whether each size is also shown mirrored left to right."""
    window: Size | None = None
    """Height and width of the overlapping windows in which an image is shown; None: whole."""

    def __post_init__(self) -> None:
        check(len(self.scales) > 0, "at least one scale must be given", self.scales)
        check(len(set(self.scales)) == len(self.scales), "scales must differ from each other", self.scales)
        for scale in self.scales:
            check(0.1 <= scale <= 10, "a scale must lie in [0.1, 10]", scale)
        check(self.window is None or min(self.window) >= 1, "a window must have at least one pixel", self.window)

    def __str__(self) -> str:
        scales = "single scale" if self.scales == (1.0,) else f"scales {' '.join(f'{s:g}' for s in self.scales)}"
        window = f", windows of {self.window[0]}x{self.window[1]}" if self.window else ""
        return f"{scales}, {'flip' if self.flip else 'no flip'}{window}"


ONCE = Inference()
"""The image as it is, which is how the papers evaluate."""


@dataclass(frozen=True)
class DomainEvaluation:
    """Counts of one validation set over all workers."""

    confusion: Tensor
    """(C, C) int64, rows are the truth, columns the prediction."""
    iou: Tensor
    """(C,) float64; NaN for a class that is neither present nor predicted."""
    miou: float
    """Mean over the classes that have an IoU, in [0, 1]."""
    pseudo_labels: LabelQuality | None = None
    """Of the labels that the method would give now; None where it labels nothing."""


@dataclass(frozen=True)
class Evaluation:
    """What is known of a network after one evaluation."""

    source_val: DomainEvaluation
    target_val: DomainEvaluation
    classes: ClassList

    def metrics(self) -> dict[str, float]:
        """Return the numbers to report, by their tracked names; classes without an IoU are left out."""
        numbers = {"target_val/miou": self.target_val.miou, "source_val/miou": self.source_val.miou}
        for name, iou in zip(self.classes.names, self.target_val.iou.tolist(), strict=True):
            if iou == iou:
                numbers[f"target_val/iou/{name}"] = iou
        if self.target_val.pseudo_labels is not None:
            numbers |= self.target_val.pseudo_labels.metrics()
        return numbers


@dataclass(frozen=True)
class Protocol:
    """Which classes a published number is the mean of."""

    metric: str
    """Name of the mean; carries the subset."""
    counted: frozenset[str] | None
    """Classes whose true pixels count, those of others are left out; None counts all."""
    averaged: frozenset[str] | None
    """Classes in the mean; None averages all."""


@dataclass(frozen=True)
class Score:
    """What a protocol makes of a confusion matrix."""

    iou: dict[str, float]
    """Of the averaged classes, in their order; NaN for one that is neither present nor predicted."""
    miou: float
    """Mean over those that have an IoU; NaN if none has."""

    def metrics(self, domain: str, protocol: Protocol) -> dict[str, float]:
        """Return the numbers to report, by their tracked names; what is NaN is left out."""
        numbers = {f"{domain}/{protocol.metric}": self.miou}
        numbers |= {f"{domain}/iou/{name}": iou for name, iou in self.iou.items()}
        return {name: value for name, value in numbers.items() if value == value}


def score(confusion: Tensor, names: Sequence[str], protocol: Protocol) -> Score:
    """Return the IoUs and their mean under a protocol.

    Pixels of a counted class that were predicted as any other class are misses, whether that is averaged or not.

    Args:
        confusion: (C, C), rows are the truth, columns the prediction.
        names: Of the C classes.
        protocol: Its averaged classes must be among `names`.
    """
    counted = torch.tensor([protocol.counted is None or name in protocol.counted for name in names])
    values = intersection_over_union(confusion * counted[:, None]).tolist()
    iou = {
        name: value
        for name, value in zip(names, values, strict=True)
        if protocol.averaged is None or name in protocol.averaged
    }
    valid = [value for value in iou.values() if value == value]
    return Score(iou, sum(valid) / len(valid) if valid else float("nan"))


def views(segmenter: Segmenter, images: Tensor, inference: Inference = ONCE) -> list[Tensor]:
    """Return what a network says of uint8 images (B, 3, H, W) each time it is asked.

    Images are resized bilinearly, with antialiasing where they shrink; mirrored answers are mirrored back.

    Returns:
        Logits at feature resolution, (B, C, h, w) float32 each; h and w differ between scales. With windows they have
        the resolution of the images that were shown.
    """
    normalised = segmenter.normalise(images)
    answers = []
    for scale in inference.scales:
        size = [max(1, round(side * scale)) for side in images.shape[-2:]]
        shown = normalised if scale == 1 else F.interpolate(normalised, size=size, mode="bilinear", antialias=True)
        answers.append(_logits(segmenter, shown, inference.window))
        if inference.flip:
            answers.append(_logits(segmenter, shown.flip(-1), inference.window).flip(-1))
    return answers


def _logits(segmenter: Segmenter, shown: Tensor, window: Size | None) -> Tensor:
    """Return logits of normalised images (B, 3, H, W); in windows (B, C, H, W), averaged where windows overlap.

    Neighbouring windows overlap by at least a third, and the last ones end with the image.
    """
    if window is None:
        return cast(Tensor, segmenter(shown).logits.float())
    height, width = (min(side, most) for side, most in zip(shown.shape[-2:], window, strict=True))
    total = shown.new_zeros((len(shown), segmenter.num_classes, *shown.shape[-2:]), dtype=torch.float32)
    times = total.new_zeros(shown.shape[-2:])
    for top in _starts(shown.shape[-2], height):
        for left in _starts(shown.shape[-1], width):
            part = (..., slice(top, top + height), slice(left, left + width))
            total[part] += segmenter.upsample(segmenter(shown[part]).logits.float(), (height, width))
            times[part] += 1
    return total.div_(times)


def _starts(length: int, window: int) -> list[int]:
    """Return where windows of a side begin so that they cover `length` pixels."""
    stride = max(1, 2 * window // 3)
    return [*range(0, length - window, stride), length - window]


def mean_probabilities(segmenter: Segmenter, answers: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Return class probabilities (B, C, *size), averaged over `answers`, logits (B, C, h, w) of any resolution each."""
    total = segmenter.upsample(answers[0], size).softmax(1)
    for logits in answers[1:]:
        total += segmenter.upsample(logits, size).softmax(1)
    return total.div_(len(answers))


def decide(segmenter: Segmenter, answers: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Return class indices, (B, *size) int64, of one or more `answers`, logits (B, C, h, w)."""
    if len(answers) == 1:
        return segmenter.upsample(answers[0], size).argmax(1)
    return mean_probabilities(segmenter, answers, size).argmax(1)


def predict(segmenter: Segmenter, images: Tensor, size: tuple[int, int], inference: Inference = ONCE) -> Tensor:
    """Return class indices, (B, *size) int64, of uint8 images (B, 3, H, W)."""
    return decide(segmenter, views(segmenter, images, inference), size)


@torch.no_grad()
def evaluate_domain(
    segmenter: Segmenter,
    images: LabelledImages,
    classes: ClassList,
    device: torch.device,
    batch_size: int,
    *,
    threads: int = 0,
    inference: Inference = ONCE,
    see: Callable[[str, Tensor], None] | None = None,
    rule: LabelRule | None = None,
) -> DomainEvaluation:
    """Count predictions against labels at label size over the whole set, shared out over the workers.

    Memory does not grow with the set: beside what is read ahead, it holds one batch at the size the network sees (with
    windows, its logits too) and one image's logits at label size. Labels may differ in size.

    Args:
        segmenter: In evaluation mode.
        images: The set.
        classes: Of the set and of the network.
        device: Where the network is.
        batch_size: Images the network is shown at a time.
        threads: That read ahead, up to a batch of images and twice as many labels as threads.
        inference: How it is asked.
        see: Receives the id and the prediction, (H, W) int64, of each image of this worker.
        rule: Gives pseudo labels, which are counted as well; it gets what the network says when it is first asked.
    """
    confusion = ConfusionMatrix(len(classes))
    quality = LabelQualityCounter(len(classes)) if rule is not None else None
    labels = in_threads(images.label, worker_share(images), threads)
    for batch, indices in one_pass(images, batch_size, threads=threads):
        shown = batch.to(device)
        answers = views(segmenter, shown, inference)
        for row, index in enumerate(indices):
            label = next(labels).to(device)
            size = (label.shape[-2], label.shape[-1])
            prediction = decide(segmenter, [logits[row : row + 1] for logits in answers], size)[0]
            confusion.update(prediction, label)
            if rule is not None and quality is not None:
                quality.update(rule(shown[row : row + 1], answers[0][row : row + 1], size)[0], label)
            if see is not None:
                see(images.ids[index], prediction)
    confusion.reduce()
    labelled = quality.reduced() if quality is not None else None
    return DomainEvaluation(confusion.counts.cpu(), confusion.iou().cpu(), confusion.miou(), labelled)


def evaluate(
    segmenter: Segmenter,
    data: EvaluationData,
    device: torch.device,
    batch_size: int,
    *,
    threads: int = 0,
    inference: Inference = ONCE,
    rule: LabelRule | None = None,
) -> Evaluation:
    """Evaluate both domains, and on the target the pseudo labels of `rule`; the network is left in its mode."""
    training = segmenter.training
    segmenter.eval()
    source, target = (
        evaluate_domain(
            segmenter, images, data.classes, device, batch_size, threads=threads, inference=inference, rule=used
        )
        for images, used in ((data.source, None), (data.target, rule))
    )
    segmenter.train(training)
    return Evaluation(source, target, data.classes)


def colorize(labels: Tensor, classes: ClassList) -> Tensor:
    """Paint class indices (H, W) in the classes' colours: (H, W, 3) uint8; ignored pixels are black."""
    palette = torch.zeros(256, 3, dtype=torch.uint8)
    palette[: len(classes)] = torch.tensor(classes.colors, dtype=torch.uint8)
    return palette[labels.long()]


@torch.no_grad()
def save_gallery(
    segmenter: Segmenter, data: EvaluationData, device: torch.device, path: Path, samples: int = 6
) -> None:
    """Write a picture of target validation samples, one row each: input, label, prediction; large ones are reduced."""
    training = segmenter.training
    segmenter.eval()
    rows = []
    step = max(1, len(data.target) // samples)
    for index in range(0, len(data.target), step)[:samples]:
        image, label = data.target.image(index), data.target.label(index)
        every = -(-label.shape[-1] // _GALLERY_WIDTH)
        label = label[::every, ::every]
        size = (label.shape[-2], label.shape[-1])
        prediction = predict(segmenter, image[None].to(device), size)[0].cpu()
        shown = torch.nn.functional.interpolate(image[None].float(), size).byte()[0].permute(1, 2, 0)
        prediction = torch.where(label == IGNORE_INDEX, IGNORE_INDEX, prediction)
        rows.append(torch.cat([shown, colorize(label, data.classes), colorize(prediction, data.classes)], dim=1))
    segmenter.train(training)
    width = min(row.shape[1] for row in rows)
    sheet = torch.cat([row[:, :width] for row in rows])
    Image.fromarray(sheet.numpy()).save(path)
