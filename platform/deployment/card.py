"""What a deployed network says about itself, beside and inside its files."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from segadapt.trainables.core.evaluation.deployed import SMALLEST_SIDE

_PREFIX = "segadapt."

_LABELS = 255
"""A label is a byte, and 255 stands for none."""

LEAST_PART = 64
"""Least height and width, in pixels, of the parts in which a large image is looked at."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a deployed network says about itself; the metadata of an exported file."""

    classes: tuple[str, ...]
    """In the order of the channels of the output; a label is the index of its class."""
    colors: tuple[tuple[int, int, int], ...]
    """RGB, of each class."""
    input: str = "images: uint8 (batch, 3, height, width), RGB, 0 to 255"
    output: str = "probabilities: float32 (batch, class, height, width), of the size of the image"
    smallest_side: int = SMALLEST_SIDE
    """Least height and width of an image, in pixels."""
    whole_pixels: int
    """`segadapt predict` looks at larger images in parts, or reduced if `input_size` is given."""
    input_size: tuple[int, int] | None
    """Height and width that the network itself brings images to, as in training; None leaves them as they are."""
    normalisation: Mapping[str, Any]
    """What the network itself does with pixel values: bgr, then (value - mean) / std."""
    aggregation: float
    """Weight of similar pixels of the same image in the prediction (PLCA); 0 if there is none."""
    metrics: Mapping[str, float]
    """Metrics of the checkpoint: mIoU on both validation sets, IoU of each class on the target's, label-free scores."""
    unknown: tuple[str, ...] = ()
    """Metrics that could not be measured: target_val/miou, where no target validation image had a label."""
    search: str
    run: str
    run_id: str
    """In MLflow."""
    checkpoint_sha256: str
    step: int
    """Training steps of the checkpoint."""
    data_fingerprint: str
    """Fingerprint of the data it was trained on."""
    config: Mapping[str, Any]
    """Configuration of the run."""
    weights: str | None = None
    """What the training began from: a name on a hub, an address or a file; None for random numbers."""
    weights_licence: str | None = None
    """Under which those are, as their publishers name it, or unknown; None without."""
    weights_sha256: str | None = None
    """Hash of their file in the storage; None if they were not in it."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)

    def as_strings(self) -> dict[str, str]:
        """Return what ONNX takes: each field as JSON."""
        return {_PREFIX + name: json.dumps(value) for name, value in self.as_dict().items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Card":
        """Rebuild what `as_dict` returned, also after a way through JSON.

        Raises:
            ValueError: If it is something else: the file may be anybody's.
        """
        card = TypeAdapter(cls).validate_python(dict(content))
        if not 0 < len(card.classes) == len(card.colors) <= _LABELS:
            raise ValueError(f"{len(card.classes)} classes and {len(card.colors)} colours do not fit together")
        if not all(0 <= value < 256 for color in card.colors for value in color):
            raise ValueError("colours are not of 8 bits")
        if not max(LEAST_PART, card.smallest_side) <= math.isqrt(max(0, card.whole_pixels)) or card.smallest_side < 1:
            raise ValueError(f"no image can have {card.smallest_side} and {card.whole_pixels} pixels")
        return card

    @classmethod
    def from_strings(cls, content: Mapping[str, str]) -> "Card":
        """Rebuild what `as_strings` returned."""
        return cls.from_dict(
            {
                name.removeprefix(_PREFIX): json.loads(value)
                for name, value in content.items()
                if name.startswith(_PREFIX)
            }
        )
