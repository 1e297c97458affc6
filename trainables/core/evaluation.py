"""Evaluation on labelled validation images: the one place that sees target labels."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX, ClassList, EvaluationData, LabelledImages
from segadapt.trainables.core.data.loading import one_pass
from segadapt.trainables.core.metrics import ConfusionMatrix
from segadapt.trainables.core.networks import Segmenter


@dataclass(frozen=True)
class DomainEvaluation:
    """Counts of one validation set over all workers."""

    confusion: Tensor
    """(C, C) int64, rows are the truth, columns the prediction."""
    iou: Tensor
    """(C,) float64; NaN for a class that is neither present nor predicted."""
    miou: float
    """Mean over the classes that have an IoU, in [0, 1]."""


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
        return numbers


def predict(segmenter: Segmenter, images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return class indices, (B, *size) int64, of uint8 images (B, 3, H, W)."""
    output = segmenter(segmenter.normalise(images))
    return segmenter.upsample(output.logits.float(), size).argmax(1)


@torch.no_grad()
def evaluate_domain(
    segmenter: Segmenter, images: LabelledImages, classes: ClassList, device: torch.device, batch_size: int
) -> DomainEvaluation:
    """Count predictions against labels at label size over the whole set, shared out over the workers."""
    confusion = ConfusionMatrix(len(classes))
    for batch, indices in one_pass(images, batch_size):
        labels = torch.stack([images.label(index) for index in indices]).to(device, torch.int64)
        size = (labels.shape[-2], labels.shape[-1])
        confusion.update(predict(segmenter, batch.to(device), size), labels)
    confusion.reduce()
    return DomainEvaluation(confusion.counts.cpu(), confusion.iou().cpu(), confusion.miou())


def evaluate(segmenter: Segmenter, data: EvaluationData, device: torch.device, batch_size: int) -> Evaluation:
    """Evaluate both domains; the network is left in the mode it was in."""
    training = segmenter.training
    segmenter.eval()
    source, target = (
        evaluate_domain(segmenter, images, data.classes, device, batch_size) for images in (data.source, data.target)
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
    """Write a picture of target validation samples, one row each: input, label, prediction."""
    training = segmenter.training
    segmenter.eval()
    rows = []
    step = max(1, len(data.target) // samples)
    for index in range(0, len(data.target), step)[:samples]:
        image, label = data.target.image(index), data.target.label(index)
        size = (label.shape[-2], label.shape[-1])
        prediction = predict(segmenter, image[None].to(device), size)[0].cpu()
        shown = torch.nn.functional.interpolate(image[None].float(), size).byte()[0].permute(1, 2, 0)
        prediction = torch.where(label == IGNORE_INDEX, IGNORE_INDEX, prediction)
        rows.append(torch.cat([shown, colorize(label, data.classes), colorize(prediction, data.classes)], dim=1))
    segmenter.train(training)
    width = min(row.shape[1] for row in rows)
    sheet = torch.cat([row[:, :width] for row in rows])
    Image.fromarray(sheet.numpy()).save(path)
