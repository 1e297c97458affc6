"""Checkpoints on disk: written whole or not at all, hashed, loaded without unpickling code."""

import hashlib
import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segadapt.trainables.core.networks import frozen_parameters

STATE = "state.pt"

MANIFEST = "manifest.json"

EVALUATION = "evaluation.json"
"""File in a checkpoint folder with the evaluation at its step."""

GALLERY = "gallery.png"
"""File in a checkpoint folder with pictures of what its network predicts."""


FROZEN = "frozen"
"""Entry of a state with the hash of the frozen parameters that it leaves out; None in a state that is whole."""


class CorruptCheckpointError(RuntimeError):
    """A checkpoint folder whose content is not what was written."""


class OtherBackboneError(RuntimeError):
    """A checkpoint without frozen parameters, and a network whose frozen parameters are not those it needs."""


def file_hash(path: Path) -> str:
    """Return the sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of named tensors, hexadecimal: names, types, shapes and values, whatever device or layout."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def frozen_hash(network: nn.Module) -> str | None:
    """Return the `tensors_hash` of what is frozen in a network (`network.tune`); None if nothing is."""
    frozen = dict(frozen_parameters(network))
    return tensors_hash(frozen) if frozen else None


def check_frozen(state: Mapping[str, Any] | None, frozen: str | None) -> None:
    """Make sure that a network has the frozen parameters that a checkpoint leaves out.

    Args:
        state: Content of the checkpoint; None passes.
        frozen: `frozen_hash` of the network.

    Raises:
        OtherBackboneError: If it has others, or one of both has none.
    """
    needed = frozen if state is None else state.get(FROZEN)
    if needed == frozen:
        return
    if needed is None or frozen is None:
        raise OtherBackboneError(
            "A checkpoint must be of a network that is trained in the same parts, but the backbone is frozen in "
            f"{'the network' if needed is None else 'the checkpoint'} alone. Set network.tune as it was."
        )
    raise OtherBackboneError(
        "A checkpoint of trained parameters alone needs the frozen backbone that they were trained beside, of hash "
        f"{needed[:16]}, but network.weights, network.lora_targets and seed give one of hash {frozen[:16]}. "
        "Restore the file of network.weights as it was, or the settings; a random backbone needs the same seed."
    )


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) and the manifest that vouches for it into an existing folder."""
    buffer = io.BytesIO()
    torch.save(state, buffer)  # to a file, it would tell of a full disk by another error than OSError
    (folder / STATE).write_bytes(buffer.getbuffer())
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({"sha256": {STATE: digest}}))


def is_whole(folder: Path) -> bool:
    """Return whether the state in a checkpoint folder is what was written."""
    try:
        expected = json.loads((folder / MANIFEST).read_text())["sha256"][STATE]
        return bool(file_hash(folder / STATE) == expected)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_state(folder: Path) -> dict[str, Any]:
    """Load the state of a checkpoint folder to the CPU.

    Raises:
        CorruptCheckpointError: If a file is missing, differs from its recorded hash or holds more than tensors and
            plain values.
    """
    try:
        expected = json.loads((folder / MANIFEST).read_text())["sha256"][STATE]
        actual = file_hash(folder / STATE)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(
            f"A checkpoint must hold {STATE} and {MANIFEST}, but {folder} is incomplete ({error}). "
            "Continue from another checkpoint."
        ) from error
    if actual != expected:
        raise CorruptCheckpointError(
            f"The hash of {folder / STATE} must be {expected}, but is {actual}: it was changed or cut short. "
            "Continue from another checkpoint."
        )
    try:
        state: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CorruptCheckpointError(
            f"A checkpoint must hold tensors and plain values, but {folder / STATE} holds code, which was not run. "
            "Somebody else made it: do not use it."
        ) from error
    return state
