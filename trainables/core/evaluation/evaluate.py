"""Evaluation on labelled validation images: the one place that sees target labels.

A target may have none. Its counts are then zeros, and its mIoU is unknown.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segadapt.trainables.core.data.batch import ClassList, EvaluationData, LabelledImages
from segadapt.trainables.core.data.loading import one_pass, worker_share
from segadapt.trainables.core.data.threads import in_threads
from segadapt.trainables.core.evaluation.inference import ONCE, Inference, decide, views
from segadapt.trainables.core.evaluation.metrics import ConfusionMatrix, intersection_over_union
from segadapt.trainables.core.labelling.quality import LabelQuality, LabelQualityCounter, LabelRule
from segadapt.trainables.core.networks import Segmenter


@dataclass(frozen=True)
class DomainEvaluation:
    """Counts of one validation set over all workers."""

    confusion: Tensor
    """(C, C) int64, rows are the truth, columns the prediction."""
    iou: Tensor
    """(C,) float64; NaN for a class that is neither present nor predicted."""
    miou: float
    """Mean over the classes that have an IoU, in [0, 1]; NaN if none has, as without a labelled pixel."""
    pseudo_labels: LabelQuality | None = None
    """Quality of the labels that the method would give now; None where it labels nothing."""


@dataclass(frozen=True)
class Evaluation:
    """What is known of a network after one evaluation."""

    source_val: DomainEvaluation
    target_val: DomainEvaluation
    classes: ClassList

    def metrics(self) -> dict[str, float]:
        """Return the numbers to report, by their tracked names; what has no labelled pixel is left out."""
        numbers = {"target_val/miou": self.target_val.miou, "source_val/miou": self.source_val.miou}
        for name, iou in zip(self.classes.names, self.target_val.iou.tolist(), strict=True):
            numbers[f"target_val/iou/{name}"] = iou
        numbers = {name: value for name, value in numbers.items() if value == value}
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
    """IoU of each averaged class, in their order; NaN for one that is neither present nor predicted."""
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
        names: Names of the C classes.
        protocol: The protocol; its averaged classes must be among `names`.
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
        segmenter: The network, in evaluation mode.
        images: The validation set.
        classes: Classes of the set and of the network.
        device: Where the network is.
        batch_size: Images the network is shown at a time.
        threads: Number of threads that read ahead, up to a batch of images and twice as many labels as threads.
        inference: How the network is asked.
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
    source_network: Segmenter | None = None,
) -> Evaluation:
    """Evaluate both domains, and on the target the pseudo labels of `rule`; the network is left in its mode.

    Source images are shown to `source_network`, which may share parts with the network, or to the network itself.
    """
    rule = rule if len(data.target) else None
    training = segmenter.training
    networks = (source_network or segmenter, segmenter)
    for network in networks:
        network.eval()
    source, target = (
        evaluate_domain(
            network,
            images,
            data.classes,
            device,
            batch_size,
            threads=threads,
            inference=inference,
            rule=rule_of_domain,
        )
        for network, images, rule_of_domain in zip(networks, (data.source, data.target), (None, rule), strict=True)
    )
    for network in networks:
        network.train(training)
    return Evaluation(source, target, data.classes)
