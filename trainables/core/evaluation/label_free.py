"""Scores of a network on target images alone, to choose checkpoints, trials and methods without target labels.

Higher is better for all. Predictions are taken at feature resolution and every image weighs the same. Labels cannot be
reached from here: what is scored is a `ScoredImages`.
"""

# C classes, n images, h x w cells of a feature map, N = h * w; p_i the class probabilities of cell i, (C,).

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from segadapt.trainables.core.data.batch import TargetImages
from segadapt.trainables.core.data.loading import one_pass
from segadapt.trainables.core.data.sampling import generator
from segadapt.trainables.core.distributed import sum_over_workers
from segadapt.trainables.core.evaluation.inference import Inference, views
from segadapt.trainables.core.networks import Segmenter

MOST_IMAGES = 64
"""Images of a set that are scored at most: each costs two forward passes at every evaluation."""

CELLS_PER_IMAGE = 16
"""Cells of an image that soft neighbourhood density compares: 1024 of 64 images."""

_ROWS = 512
"""Cells whose likeness to all others is held at a time."""


def entropy(mean_entropy: Tensor) -> Tensor:
    """Return the negative mean entropy of the predictions, -mean_i H(p_i).

    Highest, 0, for certain predictions, whether right or all the same; lowest, -ln C, for uniform ones.

    Args:
        mean_entropy: Mean of H(p_i) = -Σ_k p_ik ln p_ik over cells and images, scalar.

    Source:
        Morerio et al., Minimal-Entropy Correlation Alignment, ICLR 2018, which chooses hyper-parameters by it.
    """
    return -mean_entropy


def information_maximization(mean_probabilities: Tensor, mean_entropy: Tensor) -> Tensor:
    """Return the mutual information of cell and predicted class, H(mean_i p_i) - mean_i H(p_i).

    Between 0, for predictions that are all the same (uniform ones among them), and ln C, for certain predictions that
    use all classes equally often.

    Args:
        mean_probabilities: Mean of p_i over cells and images, (C,).
        mean_entropy: Mean of H(p_i) over cells and images, scalar.

    Source:
        Krause et al., Discriminative Clustering by Regularized Information Maximization, NIPS 2010; as a validator of
        domain adaptation in Musgrave et al., arXiv 2208.07360.
    """
    marginal: Tensor = torch.special.entr(mean_probabilities).sum()
    return marginal - mean_entropy


def soft_neighborhood_density(probabilities: Tensor, *, temperature: float = 0.05) -> Tensor:
    """Return the mean entropy of each cell's soft assignment to the other cells, by likeness of prediction.

        mean_i H(q_i),   q_ij = exp(<u_i, u_j> / temperature) / Σ_{l ≠ i} exp(<u_i, u_l> / temperature),   u = p / |p|

    High where predictions form dense groups. It is highest, ln(M - 1), where all are the same: it takes a network that
    collapsed to one class, or is vague everywhere, for a good one.

    Args:
        probabilities: Predictions of M cells, (M, C). Time grows with M², memory with 512 M.
        temperature: Divides the cosine similarities.

    Returns:
        Scalar in nats; 0 for fewer than two cells.

    Source:
        Saito et al., Tune it the Right Way, ICCV 2021, arXiv 2108.10860: the temperature and the softmax output as
        feature are theirs. Differs: `label_free_scores` compares a fixed random subset of the cells of all images.
    """
    if len(probabilities) < 2:
        return probabilities.new_zeros(())
    units = F.normalize(probabilities, dim=1)
    total = units.new_zeros((), dtype=torch.float64)
    for first in range(0, len(units), _ROWS):
        similarities = units[first : first + _ROWS] @ units.T / temperature
        rows = torch.arange(len(similarities), device=units.device)
        similarities[rows, first + rows] = -torch.inf
        total += torch.special.entr(similarities.softmax(1)).sum(dtype=torch.float64)
    return total / len(units)


def batch_nuclear_norm(second_moment: Tensor) -> Tensor:
    """Return the nuclear norm (sum of singular values) of all predictions over the largest it can be, sqrt(N C).

    The paper takes the norm |P|_* of a batch's predictions P, (N, C), by a singular value decomposition. The singular
    values are the roots of the eigenvalues of P^T P, which is (C, C) and a sum over cells: so all cells of all images
    are the batch here, and memory does not grow with them. With G = P^T P / N:

        |P|_* / sqrt(N C) = Σ_k sqrt(eigenvalue_k(G)) / sqrt(C)

    Between 1 / C, for uniform predictions, and 1, for certain predictions that use all classes equally often. Certain
    predictions of one class have 1 / sqrt(C).

    Args:
        second_moment: G, the mean of p_i p_i^T over cells and images, (C, C) float64: roots of float32 rounding
            errors would count.

    Source:
        Cui et al., Towards Discriminability and Diversity: Batch Nuclear-norm Maximization, CVPR 2020.
    """
    if not second_moment.isfinite().all():
        return second_moment.new_tensor(torch.nan)
    eigenvalues: Tensor = torch.linalg.eigvalsh(second_moment).clamp(min=0)
    return eigenvalues.sqrt().sum() / math.sqrt(len(second_moment))


class PredictionStatistics:
    """What the scores need of a set's predictions, gathered in one pass and shared by the workers.

    Holds a row per image, whichever worker saw it, so that sums do not depend on the number of workers: about
    (C² + 16 C) float64 per image.

    Args:
        num_images: n, the number of images in the whole set.
        num_classes: C.
    """

    def __init__(self, num_images: int, num_classes: int) -> None:
        def rows(*shape: int) -> Tensor:
            return torch.zeros(num_images, *shape, dtype=torch.float64)

        self.entropies = rows()
        self.probabilities = rows(num_classes)
        self.second_moments = rows(num_classes, num_classes)
        self.agreements = rows()
        self.cells = rows(CELLS_PER_IMAGE, num_classes)

    def update(self, indices: list[int], logits: Tensor, mirrored: Tensor) -> None:
        """Add images of the set.

        Args:
            indices: Positions of the images in the set, b of them.
            logits: (b, C, h, w), any floating type.
            mirrored: Logits of the images mirrored left to right, mirrored back; of the same shape.
        """
        log_probabilities = logits.double().log_softmax(1).flatten(2)
        exact = log_probabilities.exp()
        agreeing = logits.argmax(1) == mirrored.argmax(1)
        self.entropies[indices] = -(exact * log_probabilities).sum(1).mean(1).cpu()
        self.probabilities[indices] = exact.mean(2).cpu()
        self.second_moments[indices] = (exact @ exact.mT / exact.shape[2]).cpu()
        self.agreements[indices] = agreeing.flatten(1).double().mean(1).cpu()
        for row, index in enumerate(indices):
            order = torch.randperm(exact.shape[2], generator=generator("soft_neighborhood_density", index))
            chosen = exact[row, :, order[:CELLS_PER_IMAGE].to(exact.device)].T
            self.cells[index, : len(chosen)] = chosen.cpu()

    def reduce(self) -> None:
        """Put the workers' rows together; call once, after the last update, on every worker."""
        for name, rows in list(vars(self).items()):
            setattr(self, name, sum_over_workers(rows))

    def drawn_cells(self) -> Tensor:
        """Return the cells that were drawn, (M, C) float32; maps of fewer cells leave rows of zeros, left out here."""
        cells = self.cells.flatten(0, 1).float()
        return cells[cells.sum(1) > 0]

    def scores(self) -> dict[str, float]:
        """Return every score by its name, in the order of `SCORES`."""
        with torch.autocast("cpu", enabled=False):  # networks alone compute in a narrow type
            return {name: float(score(self)) for name, score in SCORES.items()}


SCORES: Mapping[str, Callable[[PredictionStatistics], Tensor]] = {
    "entropy": lambda statistics: entropy(statistics.entropies.mean()),
    "information_maximization": lambda statistics: information_maximization(
        statistics.probabilities.mean(0), statistics.entropies.mean()
    ),
    "soft_neighborhood_density": lambda statistics: soft_neighborhood_density(statistics.drawn_cells()),
    "batch_nuclear_norm": lambda statistics: batch_nuclear_norm(statistics.second_moments.mean(0)),
    "flip_agreement": lambda statistics: statistics.agreements.mean(),
}
"""The scores by name, each from what one pass over the images has gathered; a run reports them as `score/NAME`."""


class ScoredImages:
    """Up to `MOST_IMAGES` images of a set, evenly spread, as a type without labels.

    Args:
        images: The set, labelled or not; nothing but its ids and images is kept.
    """

    def __init__(self, images: TargetImages) -> None:
        every = max(1, math.ceil(len(images) / MOST_IMAGES))
        self._chosen = range(0, len(images), every)
        self._image = images.image
        self.ids: Sequence[str] = [images.ids[index] for index in self._chosen]

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> Tensor:
        """Return an RGB image, (3, H, W) uint8."""
        return self._image(self._chosen[index])


@torch.no_grad()
def label_free_scores(
    segmenter: Segmenter, images: TargetImages, device: torch.device, batch_size: int, *, threads: int = 0
) -> dict[str, float]:
    """Score a network on images in one pass, shared out over the workers; the network is left in the mode it was in.

    `flip_agreement` is the share of cells whose class stays the same when the image is mirrored left to right. It is 1
    for constant predictions, too. It has no source: consistency under augmentation, in its simplest form.

    Cost: two forward passes per image; the rest took 25 ms on one CPU for 60 maps of 16 x 32 cells and 8 classes.
    Memory: a batch of predictions and `PredictionStatistics`.

    Args:
        segmenter: The network.
        images: A `ScoredImages`. Scores of networks are comparable on the same images only.
        device: Where the network is.
        batch_size: Images it is shown at a time.
        threads: Number of threads that read ahead.
    """
    training = segmenter.training
    segmenter.eval()
    statistics = PredictionStatistics(len(images), segmenter.num_classes)
    for batch, indices in one_pass(images, batch_size, threads=threads):
        logits, mirrored = views(segmenter, batch.to(device), Inference(flip=True))
        statistics.update(indices, logits, mirrored)
    statistics.reduce()
    segmenter.train(training)
    return statistics.scores()
