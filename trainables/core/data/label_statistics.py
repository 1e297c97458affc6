"""What labels show, looked at before anything is trained: labels of another coding read without an error.

A label whose ids mean something else still decodes, into wrong classes or into none. Its class shares give it away.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from segadapt.trainables.core.data.batch import DomainData, EvaluationData, LabelledImages
from segadapt.trainables.core.data.class_lists import duplicates
from segadapt.trainables.core.data.threads import decoding_threads, in_threads

STREET_SHARES: Mapping[str, float] = {
    "road": 0.369,
    "sidewalk": 0.061,
    "building": 0.228,
    "wall": 0.007,
    "fence": 0.009,
    "pole": 0.012,
    "traffic light": 0.002,
    "traffic sign": 0.006,
    "vegetation": 0.159,
    "terrain": 0.012,
    "sky": 0.040,
    "person": 0.012,
    "rider": 0.001,
    "car": 0.070,
    "truck": 0.003,
    "bus": 0.002,
    "train": 0.002,
    "motorcycle": 0.001,
    "bicycle": 0.004,
}
"""Shares of the classes in the labelled pixels of Cityscapes' training set, rounded figures as commonly cited."""

STREET_CLASSES = ("road", "building", "vegetation", "sky", "car")
"""Classes that are common in street images of any kind; labels that name all of them show streets."""

_LOOKED_AT = 32
"""Labels of a set that are looked at before training."""

_LEAST_LABELS = 8
"""Fewest labels whose shares say anything."""

_COMMON_SHARE = 0.02
"""Share in one domain of a class that is expected in the other."""

_MOST_IGNORED = 0.5

_MOST_MOVED = 0.5
"""Share of pixels in other classes than expected, from which on labels are suspected. Our choice."""

_ADVICE = (
    "Labels that hold train ids in place of ids, or colours of another palette, look so: see whether their classes are "
    "those of the images (`segadapt data show`)."
)


@dataclass(frozen=True)
class LabelShares:
    """What some labels of a set show."""

    labels: int
    """How many were looked at."""
    classes: Mapping[str, float]
    """Share of each class in the pixels of all classes; zeros if there is no such pixel."""
    ignored: float
    """Share of pixels of no class in all pixels."""

    @classmethod
    def of(cls, labels: int, pixels: Mapping[str, int], ignored: int) -> "LabelShares":
        """Return the shares of pixels that were counted by class."""
        total = sum(pixels.values())
        shares = {name: count / max(1, total) for name, count in pixels.items()}
        return cls(labels, shares, ignored / max(1, total + ignored))


def sampled_shares(images: LabelledImages, names: Sequence[str]) -> LabelShares:
    """Return what up to 32 labels, evenly spread over a set, show.

    Args:
        images: The set; may be empty.
        names: Its classes, in the order of their indices.
    """
    chosen = range(0, len(images), max(1, -(-len(images) // _LOOKED_AT)))
    counts = torch.zeros(256, dtype=torch.int64)
    for part in in_threads(lambda index: images.label(index).flatten().bincount(minlength=256), chosen, _threads()):
        counts += part
    pixels = dict(zip(names, counts.tolist(), strict=False))
    return LabelShares.of(len(chosen), pixels, int(counts[len(names) :].sum()))


def _threads() -> int:
    return min(4, decoding_threads())


def shows_a_class(images: LabelledImages, num_classes: int) -> bool:
    """Return whether any label of a set has a pixel of a trained class; reads no more labels than it takes."""
    return any(bool((images.label(index) < num_classes).any()) for index in range(len(images)))


def suspicions(shares: LabelShares) -> list[str]:
    """Return what is implausible about labels by themselves, as clauses that begin with `they`."""
    if shares.labels < _LEAST_LABELS:
        return []
    clauses = []
    if shares.ignored > _MOST_IGNORED:
        clauses.append(f"they leave {shares.ignored:.0%} of the pixels without a class")
    shown = [name for name, share in shares.classes.items() if share]
    if len(shown) == 1:
        clauses.append(f"they show {shown[0]} alone")
    street = {name: _share_of(name, shares.classes) for name in STREET_CLASSES}
    if any(share is None for share in street.values()):
        return clauses
    absent = [name for name, share in street.items() if not share]
    if absent:
        return [*clauses, f"they show no {', no '.join(absent)}, which streets have"]
    usual = {name: _share_of(name, STREET_SHARES) or 0.0 for name in shares.classes}
    total = sum(usual.values())
    difference = _difference(shares.classes, {name: share / total for name, share in usual.items()})
    if difference is not None:
        clauses.append(f"they show {difference} in Cityscapes")
    return clauses


def label_warnings(data: DomainData, evaluation: EvaluationData) -> list[str]:
    """Return what looks wrong about the labels of both domains, by themselves and held against each other.

    Labels of the target are those of its validation set; where there are none, the source is judged alone.
    """
    names = data.classes.names
    source, target = sampled_shares(data.source, names), sampled_shares(evaluation.target, names)
    warnings = [
        warning_text(f"Labels of the {domain}", clauses)
        for domain, shares in (("source", source), ("target", target))
        if (clauses := suspicions(shares))
    ]
    if min(source.labels, target.labels) < _LEAST_LABELS:
        return warnings
    clauses = [
        f"{name} is {there.classes[name]:.0%} of the {where}'s pixels and absent from the {other}'s"
        for name in names
        for there, where, missing, other in ((source, "source", target, "target"), (target, "target", source, "source"))
        if there.classes[name] >= _COMMON_SHARE and missing.classes[name] == 0
    ]
    difference = _difference(source.classes, target.classes)
    if difference is not None:
        clauses.append(f"the source's labels show {difference} in the target's")
    return [*warnings, *([warning_text("Labels of source and target", clauses)] if clauses else [])]


def warning_text(subject: str, clauses: Sequence[str]) -> str:
    """Return what looks wrong, and what it may come from, in two sentences."""
    return f"{subject} may mean other classes than they are read as: {'; '.join(clauses)}. {_ADVICE}"


def _share_of(name: str, shares: Mapping[str, float]) -> float | None:
    return next((share for other, share in shares.items() if duplicates((other, name))), None)


def _difference(shares: Mapping[str, float], expected: Mapping[str, float]) -> str | None:
    """Return the classes that differ most, as `9 % road and not 37 % as`; None if shares are about as expected."""
    moved = sum(abs(share - expected[name]) for name, share in shares.items()) / 2
    if moved <= _MOST_MOVED:
        return None
    most = sorted(shares, key=lambda name: -abs(shares[name] - expected[name]))[:2]
    return " and ".join(f"{shares[name]:.0%} {name}, not {expected[name]:.0%}" for name in most) + " as"
