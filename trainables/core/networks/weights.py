"""Weights that a network starts from: read from a file or downloaded, and copied where they fit."""

import importlib
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segadapt.trainables.core.networks.segmenter import Segmenter

_FILES = (".pth", ".pt", ".safetensors")

_FILES_SHOWN = ".pth, .pt or .safetensors"


@dataclass(frozen=True)
class WeightsReport:
    """What `load_weights` did."""

    loaded: int
    """Tensors copied."""
    missing: tuple[str, ...]
    """Names of the network that kept their initial value."""
    unexpected: tuple[str, ...]
    """Names of the state that the network has not, or has in its head in another shape."""

    def __str__(self) -> str:
        return f"{self.loaded} tensors loaded; missing: {some(self.missing)}; unexpected: {some(self.unexpected)}"


def load_weights(segmenter: Segmenter, state: Mapping[str, Tensor]) -> WeightsReport:
    """Copy every tensor of `state` that has a place in `segmenter`; a head for other classes is left out.

    Args:
        segmenter: Changed in place.
        state: State of a segmenter, of its backbone, of a method that holds it, or of torchvision's or Caffe's network
            of this kind; wrapped for data parallelism or not.

    Returns:
        What was copied and what was not.

    Raises:
        ValueError: If less than half of the backbone has a place, or a tensor of it has another shape.
    """
    places = {_canonical(name): (name, value) for name, value in segmenter.state_dict().items()}
    fitting: dict[str, Tensor] = {}
    unexpected = []
    misfits = []
    for key, value in state.items():
        name, present = places.get(_canonical(key), (key, None))
        if present is not None and present.shape == value.shape:
            fitting[name] = value
        elif present is not None and name.startswith("backbone."):
            misfits.append(f"{key} is {tuple(value.shape)}, not {tuple(present.shape)}")
        elif not key.endswith("num_batches_tracked"):
            unexpected.append(key)
    missing = [name for name, _ in places.values() if name not in fitting and not name.endswith("num_batches_tracked")]
    report = WeightsReport(len(fitting), tuple(missing), tuple(unexpected))
    filled, empty = (sum(name.startswith("backbone.") for name in names) for names in (fitting, missing))
    if not misfits and filled <= empty:
        raise ValueError(
            f"The weights must be those of the network's backbone, but fill {filled} of its {filled + empty} tensors. "
            f"Missing: {some(report.missing)}. Unexpected: {some(report.unexpected)}. "
            "Choose the network.name they were trained with."
        )
    if misfits:
        raise ValueError(
            f"The weights must have the shapes of the network's backbone, but {len(misfits)} tensors differ: "
            f"{some(misfits)}. Choose the network.name they were trained with."
        )
    segmenter.load_state_dict(fitting, strict=False)
    return report


def _canonical(name: str) -> str:
    """Return a tensor's name without what only says where a network of this kind keeps it."""
    places = ("module", "Scale", "segmenter", "backbone", "features", "stem", "stages", "low", "high")
    renamed = {
        "classifier": "head",
        "layer5": "head",
        "conv2d_list": "convolutions",
    }  # the last two: public DeepLab-v2s
    return ".".join(renamed.get(part, part) for part in name.split(".") if part not in places)


def some(names: Sequence[str], shown: int = 3) -> str:
    """Return the first of the names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more if names else "none"


def is_file(weights: str) -> bool:
    """Return whether a value of `network.weights` is a file's path, rather than the name of published weights."""
    return weights.endswith(_FILES)


def read_file(weights: str) -> Mapping[str, Tensor]:
    """Return the named tensors of a file.

    Raises:
        ValueError: If it is missing, damaged or of another kind.
    """
    if not is_file(weights):
        raise ValueError(
            f"network.weights must be none, pretrained, or a {_FILES_SHOWN} file, but got {weights!r}. Correct it."
        )
    return _local_state(Path(weights).expanduser())


def read_weights(name: str, published: str | None, weights: str) -> Mapping[str, Tensor]:
    """Return named tensors of a file, or of torchvision's weights of that name.

    Args:
        name: Name of the network, for messages.
        published: torchvision's name of the network's backbone; None if no weights are published for it.
        weights: A file's path, or a name such as IMAGENET1K_V1.

    Raises:
        ValueError: If the weights cannot be had.
    """
    if is_file(weights):
        return _local_state(Path(weights).expanduser())
    if weights == "pretrained":
        names = f", or one of {', '.join(_published(published))}" if published is not None else ""
        raise ValueError(
            f"network.weights=pretrained of {name!r} must be in the storage, but are not: run `segadapt weights fetch "
            f"{name} WEIGHTS`, where WEIGHTS is a {_FILES_SHOWN} file{names}."
        )
    if published is None:
        raise ValueError(
            f"network.weights of {name!r} must be none or a {_FILES_SHOWN} file, but got {weights!r}: "
            "no weights are published for it."
        )
    return _published_state(published, weights)


def _local_state(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"network.weights must be an existing file, but there is none at {path}. Correct the path.")
    if path.suffix == ".safetensors":
        return _safetensors_state(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"network.weights must be a file of tensors that loads without running code, but {path} does not: {error} "
            "Save it again with torch.save(network.state_dict(), path)."
        ) from error
    for wrapper in ("state_dict", "model", "state"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise ValueError(
            f"network.weights must be a file of named tensors, but {path} holds a {type(content).__name__}. "
            "Save it again with torch.save(network.state_dict(), path)."
        )
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def _safetensors_state(path: Path) -> Mapping[str, Tensor]:
    try:
        load_file = importlib.import_module("safetensors.torch").load_file
    except ImportError as error:
        raise ValueError(
            f"Reading {path} needs the package safetensors, which is not installed. Install it, or save the tensors "
            "with torch.save and give that .pth file."
        ) from error
    try:
        state: Mapping[str, Tensor] = load_file(path)
    except Exception as error:  # the package has an error of its own
        raise ValueError(
            f"network.weights must be a whole safetensors file, but {path} is not: {error}. Fetch it again."
        ) from error
    return state


def _published(backbone: str) -> list[str]:
    """Return torchvision's names of the weights of a backbone, without DEFAULT, which changes between versions."""
    from torchvision.models import get_model_weights

    return [choice.name for choice in get_model_weights(backbone)]


def _published_state(backbone: str, weights: str) -> Mapping[str, Tensor]:
    from torchvision.models import get_model_weights

    choices, known = get_model_weights(backbone), _published(backbone)
    if weights not in known:
        raise ValueError(
            f"network.weights must be none, a {_FILES_SHOWN} file, or one of {', '.join(known)}, but got {weights!r}."
        )
    chosen = choices[weights]
    try:
        state: Mapping[str, Tensor] = chosen.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, a full disk, a file with another hash
        raise ValueError(
            f"network.weights={weights} must be downloaded once, but {chosen.url} could not be had: {error}. "
            "Fetch that file on a machine with network access and set network.weights to its path, "
            f"or put it into {Path(torch.hub.get_dir()) / 'checkpoints'}."
        ) from error
    return state
