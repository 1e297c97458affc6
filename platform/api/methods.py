"""The methods and their settings."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from segadapt.platform.errors import UsageError
from segadapt.platform.experiment.candidates import space_of
from segadapt.platform.search.ranges import show_range
from segadapt.platform.settings.config import Key, anchored, keys, resolve
from segadapt.platform.storage.folders import HERE, Place
from segadapt.platform.storage.weights import weights_origin
from segadapt.trainables import METHODS

_RANDOM = (None, "none")
"""Values of `network.weights` without weights to start from, which would freeze batch norm."""


def list_methods() -> list[tuple[str, str]]:
    """Return name and one-line description of every method.

    Example:
        >>> import segadapt
        >>> [name for name, description in segadapt.list_methods()]
        ['source_only', 'self_training', 'online_self_training', 'sdca', ...]
    """
    return [(method.name, (method.__doc__ or "").strip().splitlines()[0]) for method in METHODS]


def describe(method: str) -> list[tuple[Key, str, dict[str, Any]]]:
    """Return every setting of a method.

    Args:
        method: Name of the method, as `list_methods` returns it.

    Returns:
        One entry per setting: its key (dotted name, type, default, meaning); the searched range as text, empty if a
        search leaves the setting alone; and its value in each preset that has one.

    Raises:
        UsageError: If there is no such method.

    Example:
        >>> import segadapt
        >>> for key, searched, presets in segadapt.describe("sdca"):
        ...     if key.name == "method.temperature":
        ...         print(key.type, "|", searched, "|", presets["paper"])
        float | 0.3 to 100 (log) | 100.0
    """
    resolve(method, {})
    space, presets = space_of(method)
    return [
        (
            key,
            show_range(space[key.name]) if key.name in space else "",
            {name: values[key.name] for name, values in presets.items() if key.name in values},
        )
        for key in keys(method).values()
    ]


@dataclass(frozen=True)
class NetworkSize:
    """How large a network is, and how much of it is trained."""

    name: str
    parameters: int
    trained: int
    """Parameters that training moves; the others are frozen (`network.tune`)."""
    weights: str | None = None
    """Where the weights come from that it starts from; None at random ones."""
    licence: str | None = None
    """Under which licence those are."""

    @property
    def trained_share(self) -> float:
        """Share of the parameters that training moves."""
        return self.trained / self.parameters


def network_size(method: str, settings: Mapping[str, Any], *, place: Place = HERE) -> NetworkSize:
    """Count the parameters of the network that trials with these settings train; its weights are not read.

    Args:
        method: Name of the method, as `list_methods` returns it.
        settings: By dotted key, such as `network.tune`; as `segadapt.train` takes them.
        place: Where pretrained weights may be kept.

    Returns:
        How large it is, how much of it is trained, and what it starts from.

    Raises:
        UsageError: If a setting is wrong, the network cannot be built, or the data are missing.

    Example:
        >>> import segadapt
        >>> size = segadapt.network_size("sdca", {"network.name": "timm:test_vit", "network.tune": "lora"})
        >>> f"{size.trained_share:.0%} of {size.parameters}"
        '24% of 405056'
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    from segadapt.trainables.core.data.datasets import load_data
    from segadapt.trainables.core.networks import build_segmenter

    config = resolve(method, anchored(settings))
    start = dataclasses.replace(config.network, weights=None, freeze_norm=None)
    whole = dataclasses.replace(start, tune="full", lora_rank=16, lora_targets=None)
    try:
        classes = len(load_data(config.data)[0].classes)
        with torch.device("meta"):  # nothing is drawn or kept
            all_parameters = dict(build_segmenter(num_classes=classes, **vars(whole)).named_parameters())
            segmenter = build_segmenter(num_classes=classes, **vars(start))
    except ValueError as error:
        raise UsageError(str(error)) from error
    origin = weights_origin(config.network, place.folders)
    trained = {name: part for name, part in segmenter.named_parameters() if part.requires_grad}
    if config.network.freeze_norm or (config.network.freeze_norm is None and config.network.weights not in _RANDOM):
        for prefix, module in segmenter.backbone.named_modules(prefix="backbone"):
            if isinstance(module, _BatchNorm):
                trained = {name: part for name, part in trained.items() if not name.startswith(f"{prefix}.")}
    return NetworkSize(
        config.network.name,
        sum(part.numel() for part in (all_parameters | trained).values()),  # with what tuning adds
        sum(part.numel() for part in trained.values()),
        weights=None if origin is None else origin.source,
        licence=None if origin is None else origin.licence,
    )
