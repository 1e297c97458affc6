"""Class lists of the datasets, what the values stored in their labels mean, and how two lists are matched by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from segadapt.trainables.core.data.batch import IGNORE_INDEX, ClassList

Color = tuple[int, int, int]

UNKNOWN_COLOR = 256
"""Stands for a colour that is no class's in labels coded by colour; no 8-bit value."""

IGNORED_COLOR = 257
"""Stands for a colour that is to be ignored."""

_LABELS: tuple[tuple[str, int, Color], ...] = (
    # name, Cityscapes train id, colour; a label's position is its Cityscapes and GTA5 id
    ("unlabeled", 255, (0, 0, 0)),
    ("ego vehicle", 255, (0, 0, 0)),
    ("rectification border", 255, (0, 0, 0)),
    ("out of roi", 255, (0, 0, 0)),
    ("static", 255, (0, 0, 0)),
    ("dynamic", 255, (111, 74, 0)),
    ("ground", 255, (81, 0, 81)),
    ("road", 0, (128, 64, 128)),
    ("sidewalk", 1, (244, 35, 232)),
    ("parking", 255, (250, 170, 160)),
    ("rail track", 255, (230, 150, 140)),
    ("building", 2, (70, 70, 70)),
    ("wall", 3, (102, 102, 156)),
    ("fence", 4, (190, 153, 153)),
    ("guard rail", 255, (180, 165, 180)),
    ("bridge", 255, (150, 100, 100)),
    ("tunnel", 255, (150, 120, 90)),
    ("pole", 5, (153, 153, 153)),
    ("polegroup", 255, (153, 153, 153)),
    ("traffic light", 6, (250, 170, 30)),
    ("traffic sign", 7, (220, 220, 0)),
    ("vegetation", 8, (107, 142, 35)),
    ("terrain", 9, (152, 251, 152)),
    ("sky", 10, (70, 130, 180)),
    ("person", 11, (220, 20, 60)),
    ("rider", 12, (255, 0, 0)),
    ("car", 13, (0, 0, 142)),
    ("truck", 14, (0, 0, 70)),
    ("bus", 15, (0, 60, 100)),
    ("caravan", 255, (0, 0, 90)),
    ("trailer", 255, (0, 0, 110)),
    ("train", 16, (0, 80, 100)),
    ("motorcycle", 17, (0, 0, 230)),
    ("bicycle", 18, (119, 11, 32)),
    ("license plate", 255, (0, 0, 142)),  # 34 in GTA5; -1, stored as 255, in Cityscapes
)

CITYSCAPES = ClassList(
    names=tuple(name for name, train_id, _ in _LABELS if train_id != IGNORE_INDEX),
    colors=tuple(color for _, train_id, color in _LABELS if train_id != IGNORE_INDEX),
)
"""The 19 classes of the Cityscapes benchmark in the order of their train ids."""

CITYSCAPES_IDS: Mapping[str, int] = {
    name: label_id for label_id, (name, train_id, _) in enumerate(_LABELS) if train_id != IGNORE_INDEX
}
"""Ids of the 19 classes in Cityscapes' `labelIds` and in GTA5."""

_NOT_IN_16 = ("terrain", "truck", "train")
_NOT_IN_13 = (*_NOT_IN_16, "wall", "fence", "pole")

SUBSETS: Mapping[str, tuple[str, ...]] = {
    "19": CITYSCAPES.names,
    "16": tuple(name for name in CITYSCAPES.names if name not in _NOT_IN_16),
    "13": tuple(name for name in CITYSCAPES.names if name not in _NOT_IN_13),
}
"""Cityscapes classes that a benchmark counts: 19 with GTA5, 16 and 13 with SYNTHIA."""

SYNTHIA_IDS: Mapping[str, int] = {
    "road": 3,
    "sidewalk": 4,
    "building": 2,
    "wall": 21,
    "fence": 5,
    "pole": 7,
    "traffic light": 15,
    "traffic sign": 9,
    "vegetation": 6,
    "sky": 1,
    "person": 10,
    "rider": 17,
    "car": 8,
    "bus": 19,
    "motorcycle": 12,
    "bicycle": 11,
}
"""Values in the first channel of a SYNTHIA label, in the order of the 16 classes."""


@dataclass(frozen=True)
class LabelValues:
    """What the values stored in a dataset's labels mean."""

    classes: ClassList
    """The classes that the dataset names."""
    ids: Mapping[str, int]
    """Stored value of each class."""
    ignored: frozenset[int]
    """Stored values that are expected and belong to no class."""
    strict: bool = False
    """Refuse a label with any other value. Otherwise other values are ignored in training, as the papers' codes do."""
    colors: Mapping[Color, int] = field(default_factory=dict)
    """Stored value of each colour, for labels coded by colour; empty where the dataset has none."""

    @property
    def known(self) -> frozenset[int]:
        """All stored values that are expected."""
        return self.ignored | frozenset(self.ids.values())

    def table(self, names: Sequence[str]) -> NDArray[np.uint8]:
        """Return a lookup table from stored values to indices in `names`, (65536,); all others become 255."""
        table = np.full(1 << 16, IGNORE_INDEX, np.uint8)
        values = {_key(name): value for name, value in self.ids.items()}
        for index, name in enumerate(names):
            table[values[_key(name)]] = index
        return table


def _colors(first_of: Sequence[tuple[str, int, Color]], extra: Mapping[Color, int]) -> dict[Color, int]:
    """Map colours to ids. Of labels that share a colour the first counts; void labels, pole and car do."""
    ids: dict[Color, int] = dict(extra)
    for label_id, (_, _, color) in enumerate(first_of):
        ids.setdefault(color, label_id)
    return ids


CITYSCAPES_LABEL_IDS = LabelValues(
    CITYSCAPES, CITYSCAPES_IDS, frozenset(range(34)) - frozenset(CITYSCAPES_IDS.values()) | {IGNORE_INDEX}
)
"""`*_labelIds.png`; license plate, -1, is stored as 255."""

CITYSCAPES_TRAIN_IDS = LabelValues(
    CITYSCAPES, {name: index for index, name in enumerate(CITYSCAPES.names)}, frozenset({IGNORE_INDEX})
)
"""`*_labelTrainIds.png`."""

GTA5 = LabelValues(
    CITYSCAPES,
    CITYSCAPES_IDS,
    frozenset(range(35)) - frozenset(CITYSCAPES_IDS.values()),
    colors=_colors(_LABELS, {(20, 20, 20): 4}),  # static is not black in GTA5's palette
)
"""`labels/*.png`: the index in the palette, or the colour, is a Cityscapes id."""

SYNTHIA = LabelValues(
    ClassList(SUBSETS["16"], tuple(CITYSCAPES.colors[CITYSCAPES.names.index(name)] for name in SUBSETS["16"])),
    SYNTHIA_IDS,
    frozenset(range(23)) - frozenset(SYNTHIA_IDS.values()),
)
"""`GT/LABELS/*.png`. SYNTHIA also labels terrain (16), truck (18) and train (20); the papers ignore them."""


def _key(name: str) -> str:
    """Return what names of the same class share: `Traffic_Light` is `traffic light`."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def duplicates(names: Sequence[str]) -> list[str]:
    """Return the names that stand for the same class as an earlier one."""
    keys = [_key(name) for name in names]
    return [name for index, name in enumerate(names) if keys[index] in keys[:index]]


@dataclass(frozen=True)
class Matching:
    """The classes that two datasets have in common."""

    classes: ClassList
    """The trained ones, as the target names and colours them."""
    source_ignored: tuple[str, ...]
    """Classes of the source that are not trained."""
    target_ignored: tuple[str, ...]

    def __str__(self) -> str:
        """State what is trained and what is ignored."""
        parts = [f"{len(self.classes)} classes are trained: {', '.join(self.classes.names)}"]
        for domain, names in (("source", self.source_ignored), ("target", self.target_ignored)):
            if names:
                parts.append(f"ignored in the {domain}: {', '.join(names)}")
        return "; ".join(parts) + "."


def match(source: ClassList, target: ClassList, subset: Sequence[str] | None = None) -> Matching:
    """Find the classes to train by name; case, `_` and `-` do not matter.

    Args:
        source: Classes of the source.
        target: Classes of the target; trained classes keep their order.
        subset: Train exactly these; None trains all that both domains have.

    Raises:
        ValueError: If fewer than two classes are in common, or a domain lacks a class of the subset.
    """
    source_keys = {_key(name) for name in source.names}
    target_keys = [_key(name) for name in target.names]
    if subset is not None:
        lacking = [
            f"the {domain} lacks {', '.join(missing)}"
            for domain, domain_keys in (("source", source_keys), ("target", set(target_keys)))
            if (missing := [name for name in subset if _key(name) not in domain_keys])
        ]
        if lacking:
            raise ValueError(
                f"data.classes={len(subset)} must be classes of both domains, but {' and '.join(lacking)}. "
                "Use data.classes=auto to train what both have."
            )
    trained_keys = source_keys if subset is None else {_key(name) for name in subset}
    chosen = [index for index, key in enumerate(target_keys) if key in trained_keys]
    if not chosen:
        raise ValueError(
            "Source and target must have classes in common, but the source has "
            f"{', '.join(source.names)} and the target {', '.join(target.names)}. Rename them in classes.yaml."
        )
    if len(chosen) == 1:
        raise ValueError(
            f"Source and target must have two classes or more in common, but have {target.names[chosen[0]]} alone: a "
            f"network of one class is always right. The source has {', '.join(source.names)} and the target "
            f"{', '.join(target.names)}. Rename them in classes.yaml."
        )
    classes = ClassList(tuple(target.names[i] for i in chosen), tuple(target.colors[i] for i in chosen))
    trained = {_key(name) for name in classes.names}
    ignored = [tuple(name for name in domain.names if _key(name) not in trained) for domain in (source, target)]
    return Matching(classes, *ignored)
