"""Checkpoints on disk: written whole or not at all, hashed, loaded without unpickling code."""

import hashlib
import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STATE = "state.pt"

MANIFEST = "manifest.json"


class CorruptCheckpointError(RuntimeError):
    """A checkpoint folder whose content is not what was written."""


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
