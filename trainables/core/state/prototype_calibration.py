"""Labels of target cells by their nearest source prototype, corrected for the shift between the domains."""

# B source/target pairs, D feature channels, C classes, h x w cells of a feature map, P = h * w.

import torch
from torch import Tensor, nn

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.distributed import gather_over_workers, rows_before
from segadapt.trainables.core.losses.prototype_contrast import class_prototypes, cosine_similarity, grid_of


class PrototypeCalibration(nn.Module):
    """Running difference between target and source prototypes, per class.

    The source prototypes of a pair, moved by this bias, label the cells of its target image; then the pair's own
    difference enters the bias, over the classes that both images show:

        b_k <- m b_k + (1 - m) (r^T_k - r^S_k)

    Pairs follow each other: a pair sees what the pairs before it left, those of earlier data-parallel workers included,
    so that all workers hold the bias of the joined batch.

    Args:
        num_classes: C.
        channels: D.

    Attributes:
        bias: b, (C, D), float64, in which small moves are not lost; zero at the start and for a class that no pair has
            shared.

    Source:
        Lee et al., Bi-directional Contrastive Learning (BiCL), ECCV 2022, arXiv 2207.10892, describes the calibration
        in words and a figure; these formulas are ours. cvlab-yonsei/DASS@f544686 has none.
    """

    bias: Tensor

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(num_classes, channels, dtype=torch.float64))

    @torch.no_grad()
    def label_target(
        self,
        source_features: Tensor,
        source_labels: Tensor,
        target_features: Tensor,
        target_labels: Tensor,
        *,
        temperature: float = 0.1,
        threshold: float = 0.8,
        momentum: float = 0.99,
    ) -> Tensor:
        """Label the target's cells and move the bias; every worker must call this equally often.

        Args:
            source_features: (B, D, h, w), any floating type; computed in float32 or wider, also under autocast.
            source_labels: Class indices of the cells, (B, h, w), int64, 255 = ignore.
            target_features: Features of the target, like the source's.
            target_labels: Fixed pseudo labels of the target, like the source's labels. They alone move the bias.
            temperature: See `transfer_labels`.
            threshold: See `transfer_labels`.
            momentum: m, share of the bias that stays, in [0, 1].

        Returns:
            Class indices, (B, h, w), int64, 255 = no label; whatever `target_labels` says.
        """
        precise = torch.promote_types(source_features.dtype, torch.float32)
        source_features, target_features = source_features.to(precise), target_features.to(precise)
        classes = len(self.bias)
        source, source_sizes = class_prototypes(source_features, source_labels, classes)
        target, target_sizes = class_prototypes(target_features, target_labels, classes)
        present = source_sizes > 0
        biases = self._walk(target.double() - source.double(), present & (target_sizes > 0), momentum)
        labels, _ = transfer_labels(
            target_features, (source + biases).to(precise), present, temperature=temperature, threshold=threshold
        )
        return labels

    def _walk(self, differences: Tensor, shared: Tensor, momentum: float) -> Tensor:
        """Move the bias over the pairs of all workers; return what each pair of this worker saw, (B, C, D)."""
        first = rows_before(len(differences), differences.device)
        biases = []
        bias = self.bias.clone()
        steps = zip(gather_over_workers(differences), gather_over_workers(shared.to(torch.uint8)), strict=True)
        for difference, is_shared in steps:
            biases.append(bias)
            moved = momentum * bias + (1 - momentum) * difference
            bias = torch.where(is_shared.bool().unsqueeze(1), moved, bias)
        biases_of_worker = torch.stack(biases[first : first + len(differences)])
        self.bias.copy_(bias)
        return biases_of_worker


@torch.no_grad()
def transfer_labels(
    features: Tensor, prototypes: Tensor, present: Tensor, *, temperature: float = 0.1, threshold: float = 0.8
) -> tuple[Tensor, Tensor]:
    """Label each cell with its nearest prototype where the assignment is confident.

    Confidence is the largest softmax probability over cosine similarities divided by the temperature; the similarity
    with an absent class is -1.

    Args:
        features: (B, D, h, w), float32 or float64.
        prototypes: (B, C, D), of the same type.
        present: Which classes have a prototype, (B, C) bool.
        temperature: > 0, no unit.
        threshold: Confidence above which a cell is labelled, exclusive; in [0, 1].

    Returns:
        Class indices, (B, h, w), int64, 255 where the confidence is too low, and confidences, (B, h, w).
    """
    similarity = cosine_similarity(features, prototypes).masked_fill(~present.unsqueeze(2), -1.0)
    confidence, nearest = (similarity / temperature).softmax(dim=1).max(dim=1)
    labels = nearest.masked_fill(confidence <= threshold, IGNORE_INDEX)
    shape = (len(features), *grid_of(features))
    return labels.view(shape), confidence.view(shape)
