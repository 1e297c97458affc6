"""Which sample comes when: a pure function of seed and position, so that resuming needs no sampler state."""

import bisect
import hashlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from segadapt.trainables.core.data.batch import LabelledImages
from segadapt.trainables.core.data.threads import in_threads

Item = TypeVar("Item")
Result = TypeVar("Result")

_VERY_RARE_SHARE = 0.001


def derived_seed(*parts: object) -> int:
    """Hash `parts` into a 63-bit seed, equal on every machine and in every process."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a CPU generator seeded from `parts`."""
    return torch.Generator().manual_seed(derived_seed(*parts))


@lru_cache(maxsize=8)
def _epoch_order(length: int, key: tuple[object, ...], epoch: int) -> Tensor:
    return torch.randperm(length, generator=generator(*key, epoch))


def sample_at(position: int, length: int, key: tuple[object, ...]) -> int:
    """Return the index drawn at `position` of an endless walk in which every epoch is a fresh permutation.

    Args:
        position: Number of samples drawn before, over all workers.
        length: Number of samples in the set.
        key: Identifies the walk: seed, stage, domain.
    """
    epoch, offset = divmod(position, length)
    return int(_epoch_order(length, key, epoch)[offset])


class ClassBalancedOrder:
    """An endless walk over images in which rare classes come more often than they occur.

    The walk goes in blocks of 3000. Within one, class c is drawn with a probability in proportion to
    1 / ln(1.01 + r_c), r_c being the share of c among the classes shown by the block's images so far; then the next
    image that shows c is taken, in an order that is shuffled for each block and each time it is used up.

    Args:
        counts: Pixels of each class in each image, (N, C); see `class_counts`.
        key: Identifies the walk: seed, stage, domain.

    Raises:
        ValueError: If no image shows any class.

    Source:
        Li et al., SDCA, arXiv 2105.05013; BIT-DA/SDCA@d00e7ba, inherited from JDAI-CV/FADA.
        Differs: there, the orders within classes go on from block to block. Here a block depends on its number alone.
    """

    block = 3000

    def __init__(self, counts: Tensor, key: tuple[object, ...]) -> None:
        shown = counts > 0
        self._images = {c: shown[:, c].nonzero()[:, 0] for c in shown.any(0).nonzero()[:, 0].tolist()}
        self._classes = [row.nonzero()[:, 0].tolist() for row in shown]
        self._key = key
        if not self._images:
            raise ValueError(
                "Class-balanced sampling needs labelled source images, but none shows a trained class. "
                "Check the class map of the labels or set augmentation.class_balanced=false."
            )
        self._block = lru_cache(maxsize=4)(self._drawn_block)

    def at(self, position: int) -> int:
        """Return the index drawn at `position`, the number of samples drawn before over all workers."""
        number, offset = divmod(position, self.block)
        return self._block(number)[offset]

    def _drawn_block(self, number: int) -> list[int]:
        draw = generator(*self._key, "class_balanced", number)
        present = list(self._images)
        orders = {c: _reshuffled(images, draw) for c, images in self._images.items()}
        occurrences = dict.fromkeys(present, 0)
        drawn = []
        for chance in torch.rand(self.block, generator=draw, dtype=torch.float64).tolist():
            total = max(1, sum(occurrences.values()))
            weights = accumulate(1 / math.log(1.01 + occurrences[c] / total) for c in present)
            cumulative = list(weights)
            chosen = present[min(bisect.bisect_right(cumulative, chance * cumulative[-1]), len(present) - 1)]
            image = next(orders[chosen])
            drawn.append(image)
            for c in self._classes[image]:
                occurrences[c] += 1
        return drawn


def rare_class_probabilities(counts: Tensor, temperature: float) -> Tensor:
    """Return the probability of each class to be drawn, (C,) float64: exp((1 - f_c) / T) over the sum of these.

    f_c is the share of class c in the labelled pixels. A class without a pixel is not drawn.

    Args:
        counts: Pixels of each class in each image, (N, C); see `class_counts`.
        temperature: T > 0; the smaller, the more rare classes are preferred. Paper: 0.01 (DAFormer), 0.05 (VFM-UDA).

    Source:
        Hoyer et al., DAFormer, CVPR 2022, Eq. 8; lhoyer/MIC@2f932a9, mmseg/datasets/uda_dataset.py.
    """
    total = counts.sum(0).to(torch.float64)
    exponents = (1 - total / total.sum()) / temperature
    return exponents.masked_fill(total == 0, -math.inf).softmax(0)


class RareClassOrder:
    """Endless independent draws of images: first a class, rare ones more often, then an image that shows enough of it.

    Args:
        counts: Pixels of each class in each image, (N, C); see `class_counts`.
        key: Identifies the draws: seed, stage, domain.
        temperature: See `rare_class_probabilities`.
        min_pixels: An image shows enough of a class that has more pixels of it. Of a class that no image shows so
            much of, those count that show any. Paper: 3000, for crops of 512 x 512.

    Raises:
        ValueError: If no image shows any class.
    """

    def __init__(self, counts: Tensor, key: tuple[object, ...], *, temperature: float, min_pixels: int) -> None:
        if not counts.any():
            raise ValueError(
                "Rare-class sampling needs labelled source images, but none shows a trained class. "
                "Check the class map of the labels."
            )
        self._key = key
        self._probabilities = rare_class_probabilities(counts, temperature)
        self._images = []
        for column in counts.T:
            enough = (column > min_pixels).nonzero()[:, 0]
            self._images.append(enough if len(enough) else (column > 0).nonzero()[:, 0])

    def at(self, position: int) -> tuple[int, int]:
        """Return the image and the class drawn at `position`, the number of draws before over all workers."""
        draw = generator(*self._key, "rare_class", position)
        drawn = int(torch.multinomial(self._probabilities, 1, generator=draw))
        images = self._images[drawn]
        return int(images[torch.randint(len(images), (1,), generator=draw)]), drawn


def _reshuffled(images: Tensor, draw: torch.Generator) -> Iterator[int]:
    while True:
        yield from images[torch.randperm(len(images), generator=draw)].tolist()


_counted: "weakref.WeakKeyDictionary[LabelledImages, dict[int, Tensor]]" = weakref.WeakKeyDictionary()
_counting = threading.Lock()


def class_counts(images: LabelledImages, num_classes: int, *, threads: int = 4) -> Tensor:
    """Return the pixels of each class in each image of a set, (N, C) int64; reads every label, once per process.

    A set that knows them, such as packed shards, offers `class_counts(num_classes)` and is asked instead.

    Args:
        images: The set.
        num_classes: C; ignored pixels and other values are left out.
        threads: Number of threads that read labels.
    """
    known = getattr(images, "class_counts", None)
    if known is not None:
        counts: Tensor = known(num_classes)
        return counts
    with _counting:
        cached = _counted.setdefault(images, {})
        if num_classes not in cached:
            cached[num_classes] = label_counts(images.label, range(len(images)), num_classes, threads=threads)
        return cached[num_classes]


def label_counts(
    read: Callable[[Item], Tensor], names: Sequence[Item], num_classes: int, *, threads: int = 4
) -> Tensor:
    """Return the pixels of each class in each label, (N, C) int64.

    Args:
        read: Returns a label, (H, W) uint8; called from several threads at once.
        names: What `read` takes.
        num_classes: C; ignored pixels and other values are left out.
        threads: Number of threads that read labels.
    """

    def count(name: Item) -> Tensor:
        return torch.bincount(read(name).flatten(), minlength=num_classes)[:num_classes]

    rows = list(in_threads(count, names, threads))
    return torch.stack(rows) if rows else torch.zeros(0, num_classes, dtype=torch.int64)


def rare_shown(counts: Tensor, number: int) -> list[list[int]]:
    """Return the rare classes that each image shows, rarest first.

    The classes with the fewest pixels are rare. Where an image shows some below 0.1 % of all pixels, those alone.

    Args:
        counts: (N, C), see `class_counts`.
        number: Number of rare classes; classes without a pixel are not counted among them.

    Source:
        Zou et al., Confidence Regularized Self-Training, ICCV 2019 (DRSL §6).
        Differs: counts labelled pixels, there all predicted ones.
    """
    total = counts.sum(0).tolist()
    rare = sorted((c for c, pixels in enumerate(total) if pixels > 0), key=lambda c: total[c])[:number]
    very_rare = {c for c in rare if total[c] < _VERY_RARE_SHARE * sum(total)}
    shown = [[c for c, there in zip(rare, row, strict=True) if there] for row in (counts[:, rare] > 0).tolist()]
    return [[c for c in classes if c in very_rare] or classes for classes in shown]
