"""How good the pseudo labels are that a method would give to validation images now; a part of evaluation alone."""

# C classes, H x W pixels of a label map.

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.evaluation.metrics import ConfusionMatrix

LabelRule = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]
"""Labels one image as a method labels target images, and knows no true label.

It takes the image (1, 3, h, w) uint8, the logits of the deployed network for it (1, C, h', w') and the size (H, W) of
the label map; it returns class indices (1, H, W), 255 where no label is given.
"""


@dataclass(frozen=True)
class LabelQuality:
    """Pixels with a true label, by it and by the label that the rule gave them."""

    counts: Tensor
    """(C, C + 1) int64; rows are the truth, the last column has no label."""

    def metrics(self) -> dict[str, float]:
        """Return the share of pixels with a label and how many of those are right; what has no pixel is left out."""
        labelled = self.counts[:, :-1]
        numbers = {
            "pseudo_labels/kept": _ratio(labelled.sum(), self.counts.sum()),
            "pseudo_labels/accuracy": _ratio(labelled.diagonal().sum(), labelled.sum()),
        }
        return {name: value for name, value in numbers.items() if value is not None}

    def by_class(self, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
        """Return two shares per class; None where there is no pixel.

        `kept`: of the pixels that truly are of the class, those with any label. `accuracy`: of the pixels labelled as
        the class, those that are of it.
        """
        labelled = self.counts[:, :-1]
        true, with_label, correct = self.counts.sum(1), labelled.sum(0), labelled.diagonal()
        return {
            name: {"kept": _ratio(labelled[k].sum(), true[k]), "accuracy": _ratio(correct[k], with_label[k])}
            for k, name in enumerate(names)
        }


class LabelQualityCounter:
    """Counts labels of a rule against the truth, image by image and over all workers.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        self._unlabelled = num_classes
        self._counts = ConfusionMatrix(num_classes + 1)

    def update(self, labels: Tensor, truth: Tensor) -> None:
        """Add an image: the labels of the rule and the true ones, both (H, W), 255 = none."""
        labels_or_none = torch.where(labels == IGNORE_INDEX, self._unlabelled, labels.long())
        self._counts.update(labels_or_none, truth)

    def reduced(self) -> LabelQuality:
        """Return the sums over the workers; call once, after the last update, on every worker."""
        self._counts.reduce()
        return LabelQuality(self._counts.counts[:-1].cpu())


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return float(part / whole) if whole > 0 else None
