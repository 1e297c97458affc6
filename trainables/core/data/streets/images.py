"""Generation of the images and labels of streets."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from segadapt.trainables.core.data.batch import DomainData, EvaluationData, LabelledDomains
from segadapt.trainables.core.data.streets.config import CLASSES, PARTS, StreetsConfig
from segadapt.trainables.core.data.streets.domains import Bytes, domain_of
from segadapt.trainables.core.data.streets.painting import paint_street
from segadapt.trainables.core.data.streets.photography import photograph
from segadapt.trainables.core.data.streets.v1.classes import CLASSES_V1
from segadapt.trainables.core.data.streets.v1.drawing import drawing_v1


@dataclass(eq=False)
class StreetsImages:
    """Labelled street scenes."""

    ids: Sequence[str]
    images: Bytes  # (N, 3, H, W)
    labels: Bytes  # (N, H, W)

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> Tensor:
        """Return an RGB image, (3, H, W) uint8."""
        return torch.tensor(self.images[index])

    def label(self, index: int) -> Tensor:
        """Return its class indices, (H, W) uint8; every pixel has a class."""
        return torch.tensor(self.labels[index])


@dataclass(eq=False)
class StreetsTargetImages:
    """Street scenes whose labels were dropped when they were generated."""

    ids: Sequence[str]
    images: Bytes  # (N, 3, H, W)

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> Tensor:
        """Return an RGB image, (3, H, W) uint8."""
        return torch.tensor(self.images[index])


def load_streets(config: StreetsConfig, *, oracle: bool = False) -> tuple[DomainData, EvaluationData]:
    """Generate the benchmark, or return it at once if this process has generated it before.

    Args:
        config: Size, amount, seed and shift.
        oracle: Put the *labelled target training set* in the place of the source. A model trained on it without
            adaptation is the upper bound that adaptation is compared with; it is no adaptation result.

    Returns:
        What training may use and what evaluation alone may use.
    """
    return _load(config, oracle)


def labelled_streets(config: StreetsConfig) -> LabelledDomains:
    """Generate the benchmark with all labels, those of the target's training set included."""
    (training, evaluation), (oracle, _) = load_streets(config), load_streets(config, oracle=True)
    return LabelledDomains(training.source, evaluation.source, oracle.source, evaluation.target, training.classes)


@lru_cache(maxsize=4)
def _load(config: StreetsConfig, oracle: bool) -> tuple[DomainData, EvaluationData]:
    source_train, source_val, target_train, target_val = _sets(config)
    classes = CLASSES if config.edition == 2 else CLASSES_V1
    content = hashlib.sha256(f"streets oracle={oracle} {classes.names}".encode())
    for part in (source_train, source_val, target_train, target_val):
        content.update(f"{part.ids} {part.images.shape}".encode())
        content.update(part.images.tobytes())
        content.update(part.labels.tobytes())

    training = DomainData(
        source=target_train if oracle else source_train,
        target=StreetsTargetImages(target_train.ids, target_train.images),
        classes=classes,
        fingerprint=content.hexdigest(),
    )
    scored = StreetsTargetImages(target_val.ids, target_val.images)
    return training, EvaluationData(source=source_val, target=target_val, scored=scored, classes=classes)


@lru_cache(maxsize=4)
def _sets(config: StreetsConfig) -> tuple[StreetsImages, StreetsImages, StreetsImages, StreetsImages]:
    """Return the training and validation set of the source, then those of the target."""
    source_train, source_val = (_generate(config, "source", split) for split in ("train", "val"))
    target_train, target_val = (_generate(config, "target", split) for split in ("train", "val"))
    return source_train, source_val, target_train, target_val


def _generate(config: StreetsConfig, domain: str, split: str) -> StreetsImages:
    """Draw all scenes of one domain and split, each from its own random stream."""
    height, width = config.size
    draw = _drawing(config, domain, height, width)
    count = config.count(split)
    images = np.empty((count, 3, height, width), np.uint8)
    labels = np.empty((count, height, width), np.uint8)
    for index in range(count):
        rng = np.random.default_rng([config.seed, domain == "target", split == "val", index])
        images[index], labels[index] = draw(rng)
    images.flags.writeable = labels.flags.writeable = False
    return StreetsImages(tuple(f"streets_{domain}_{split}_{index:06d}" for index in range(count)), images, labels)


def _drawing(
    config: StreetsConfig, domain: str, height: int, width: int
) -> Callable[[np.random.Generator], tuple[Bytes, Bytes]]:
    """Return what draws an image, (3, H, W), and its labels, (H, W), of a domain from a random stream."""
    if config.edition == 1:
        return drawing_v1(config.shift if domain == "target" else 0.0, height, width)
    look = domain_of(**{part: config.strength(part) if domain == "target" else 0.0 for part in PARTS})

    def draw(rng: np.random.Generator) -> tuple[Bytes, Bytes]:
        scene = paint_street(rng, look, height, width)
        return photograph(scene), scene.labels

    return draw
