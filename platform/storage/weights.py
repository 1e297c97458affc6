"""Pretrained weights in the storage folder, named by their hash, with where they come from and under which licence.

A trial that starts from `pretrained` finds them here, so that nodes need no access to the internet. A network has one
set of them, which thus stays the same while experiments run.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter
from torch import Tensor

from segadapt.platform.errors import UsageError
from segadapt.platform.settings.text import size_text
from segadapt.platform.storage.files import locked, write_whole
from segadapt.platform.storage.folders import Storage, user_path
from segadapt.trainables.core.networks import NETWORKS, NetworkConfig, build_segmenter, load_weights
from segadapt.trainables.core.networks.hub import UNKNOWN, full_name, model_card, pretrained_state
from segadapt.trainables.core.networks.timm_models import PREFIX as TIMM
from segadapt.trainables.core.networks.weights import is_file, read_file, read_weights, some

PRETRAINED = "pretrained"
"""Value of `network.weights` that stands for the weights in the storage, or else for timm's."""

FETCHED = ".fetched-"
"""How the name of a folder begins in which weights are written; a kill leaves it."""

_LOCK = ".lock"

_OPEN = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "isc")
"""Licences that let everybody use what they are on, for whatever purpose."""

_NOT_COMMERCIAL = ("-nc", "noncommercial", "non-commercial", "apple-amlr", "seer-license")
"""Parts of the names of licences that forbid commercial use."""


@dataclass(frozen=True)
class WeightsOrigin:
    """What a network starts from."""

    source: str
    """A name on the hub, an address or a file."""
    licence: str
    """As its publishers name it, such as apache-2.0, or unknown; with `gated` if the hub asks who wants them."""
    sha256: str | None = None
    """Hash of the file in the storage; None if they are not in it."""


@dataclass(frozen=True)
class StoredWeights:
    """Weights in the storage folder."""

    network: str
    """Value of `network.name` that they are for; of timm's models with the tag of the weights."""
    source: str
    """A name on the hub, an address or a file."""
    licence: str
    """As its publishers name it, such as apache-2.0, or unknown; with `gated` if the hub asks who wants them."""
    sha256: str
    """Hash of the file, whose name it is."""
    bytes: int
    stored: float
    """Unix time."""

    def path(self, storage: Storage) -> Path:
        """Return the file."""
        return storage.weights / f"{self.sha256}.safetensors"


def stored_weights(storage: Storage) -> list[StoredWeights]:
    """Return all weights of a storage folder, by the networks they are for.

    Raises:
        UsageError: If a record or a file of them is damaged.
    """
    return [read_record(storage, path) for path in records(storage)]


def records(storage: Storage) -> list[Path]:
    """Return the files that say what weights there are, one for each network."""
    return sorted(storage.weights.glob("*.json"))


def find_weights(storage: Storage, network: str) -> StoredWeights | None:
    """Return the weights for a network; None if the storage has none.

    Args:
        storage: The storage folder.
        network: Value of `network.name`; the tag of timm's default weights may be left out.

    Raises:
        UsageError: If they are damaged.
    """
    record = _record_path(storage, _with_tag(network))
    return read_record(storage, record) if record.is_file() else None


def with_stored_weights(network: NetworkConfig, storage: Storage) -> NetworkConfig:
    """Return the configuration of a network to build it by: `pretrained` is the file in the storage, if there is one.

    Raises:
        UsageError: If that is damaged.
    """
    stored = find_weights(storage, network.name) if network.weights == PRETRAINED else None
    return network if stored is None else dataclasses.replace(network, weights=str(stored.path(storage)))


def weights_hash(network: NetworkConfig, storage: Storage) -> str | None:
    """Return the hash of the weights in the storage that a network starts from; None if it starts from others."""
    stored = find_weights(storage, network.name) if network.weights == PRETRAINED else None
    return None if stored is None else stored.sha256


def weights_origin(network: NetworkConfig, storage: Storage) -> WeightsOrigin | None:
    """Return what a network starts from, and under which licence that is; None if it starts at random."""
    if network.weights in (None, "none"):
        return None
    weights = str(network.weights)
    if weights == PRETRAINED:
        stored = find_weights(storage, network.name)
        if stored is not None:
            return WeightsOrigin(stored.source, stored.licence, stored.sha256)
        card = model_card(network.name.removeprefix(TIMM))
        return WeightsOrigin(card.source, card.licence)
    recipe = NETWORKS.get(network.name)
    if recipe is None or is_file(weights):
        return WeightsOrigin(weights, UNKNOWN)
    return WeightsOrigin(f"torchvision's {recipe.published} {weights}", UNKNOWN)


def licence_note(source: str, licence: str) -> str | None:
    """Return what to tell of a licence before others use a network that started from weights under it; None if nothing.

    Args:
        source: Where the weights come from.
        licence: As `WeightsOrigin` has it.
    """
    name, _, gated = licence.partition(", ")
    if any(part in name.lower() for part in _NOT_COMMERCIAL):
        return (
            f"Weights from {source} are under {licence}, which forbids commercial use; ask whether that holds for what "
            "is trained from them."
        )
    if name == UNKNOWN:
        return f"Weights from {source} are under a licence that is unknown here: ask who published them."
    if gated or name.lower() not in _OPEN:
        return f"Weights from {source} are under {licence}, which has terms of its own: read them before others use it."
    return None


def store_pretrained(networks: Iterable[NetworkConfig], storage: Storage, say: Callable[[str], None]) -> None:
    """Have the weights of networks that start from `pretrained` in the storage before their trials begin.

    Args:
        networks: Networks of the trials; those that start from something else are left alone.
        storage: The storage folder, which is there.
        say: Is told what was put into it.

    Raises:
        UsageError: If they are neither there nor to be had.
    """
    for name in dict.fromkeys(network.name for network in networks if network.weights == PRETRAINED):
        if find_weights(storage, name) is None:
            stored = store_weights(storage, name, PRETRAINED)
            say(
                f"weights of {stored.network} are kept in {storage.weights}: {size_text(stored.bytes)}, from "
                f"{stored.source}, licence {stored.licence}"
            )


def store_weights(storage: Storage, network: str, weights: str, licence: str | None = None) -> StoredWeights:
    """Put weights into the storage, whole or not at all; weights that are there already are left as they are.

    Args:
        storage: The storage folder, which is there.
        network: Value of `network.name` that they are for.
        weights: As `network.weights`: `pretrained`, a name that torchvision gives, or a file.
        licence: Under which they are; None: as timm or the hub says.

    Returns:
        What the storage has now.

    Raises:
        UsageError: If there is no such network, they cannot be had or do not fit it, it has others in this storage, or
            the disk is full.
    """
    if licence is not None and not licence.strip():
        raise UsageError(f"--licence must name a licence, such as apache-2.0, but got {licence!r}. Or leave it out.")
    present = find_weights(storage, network) if weights == PRETRAINED else None
    if present is not None:
        return _recorded(storage, dataclasses.replace(present, licence=licence or present.licence), licence)
    if is_file(weights):
        weights = str(user_path("WEIGHTS", weights).absolute())
    try:
        build_segmenter(network, 2, weights=weights)
        state = _state(network, weights)
        _check_whole(network, state)
    except (ValueError, OSError, RuntimeError) as error:
        raise UsageError(str(error)) from error
    source, stated = _source(network, weights)
    storage.weights.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=FETCHED, dir=storage.weights) as folder:
        whole = Path(folder) / "whole.safetensors"
        _write(state, whole)
        with whole.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        stored = StoredWeights(_with_tag(network), source, licence or stated, digest, whole.stat().st_size, time.time())
        return _recorded(storage, stored, licence, whole)


def _recorded(storage: Storage, stored: StoredWeights, licence: str | None, whole: Path | None = None) -> StoredWeights:
    """Put a file in its place and write its record, unless the network has other weights by now.

    Args:
        storage: The storage folder.
        stored: What is recorded.
        licence: Given by the user; None leaves the record of weights that are there already as it is.
        whole: The file, which is moved; None if it is in its place.
    """
    record = _record_path(storage, stored.network)
    with locked(storage.weights / _LOCK):
        if whole is not None:
            shutil.copymode(storage.weights / _LOCK, whole)  # else its owner alone could read it
        present = read_record(storage, record) if record.is_file() else None
        if present is not None and present.sha256 != stored.sha256:
            raise UsageError(
                f"A network must have one set of weights in a storage folder, but {stored.network} has those of "
                f"{present.source} ({present.sha256[:12]}). Use another --storage, or, once no experiment needs them, "
                f"remove {record}."
            )
        if present is not None and licence is None:
            return present
        if whole is not None:
            whole.replace(stored.path(storage))
        write_whole(record, json.dumps(dataclasses.asdict(stored), indent=1))
    return stored


def _check_whole(network: str, state: Mapping[str, Tensor]) -> None:
    """Refuse weights that leave a part of one of the papers' backbones as it was; of timm's, none can.

    Raises:
        ValueError: If they do.
    """
    if network.startswith(TIMM):
        return
    report = load_weights(build_segmenter(network, 2), state)
    if missing := [name for name in report.missing if name.startswith("backbone.")]:
        raise ValueError(
            f"Weights to keep must fill the backbone of {network!r}, but lack {len(missing)} of its tensors: "
            f"{some(missing)}. Name the network they were trained with."
        )


def _state(network: str, weights: str) -> Mapping[str, Tensor]:
    if not network.startswith(TIMM):
        return read_weights(network, NETWORKS[network].published, weights)
    return pretrained_state(network.removeprefix(TIMM)) if weights == PRETRAINED else read_file(weights)


def _source(network: str, weights: str) -> tuple[str, str]:
    """Return where weights come from, and under which licence they are, as far as anybody says."""
    if weights == PRETRAINED:
        card = model_card(network.removeprefix(TIMM), ask=True)
        return card.source, f"{card.licence}, gated" if card.gated else card.licence
    return (weights if is_file(weights) else f"torchvision's {NETWORKS[network].published} {weights}"), UNKNOWN


def _write(state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as a safetensors file, whose bytes are equal for equal tensors.

    Raises:
        UsageError: If the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    needed, free = sum(tensor.nbytes for tensor in state.values()), shutil.disk_usage(path.parent).free
    if needed >= free:
        raise UsageError(
            f"The disk of --storage must have {size_text(needed)} free for these weights, but {path.parent.parent} has "
            f"{size_text(free)}. Free some space or choose another folder."
        )
    try:
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"The weights must be written to {path.parent.parent}, but cannot be: {error}.") from error


def _with_tag(network: str) -> str:
    return TIMM + full_name(network.removeprefix(TIMM)) if network.startswith(TIMM) else network


def _record_path(storage: Storage, network: str) -> Path:
    return storage.weights / f"{network.replace(':', '-').replace('/', '-')}.json"


def read_record(storage: Storage, record: Path) -> StoredWeights:
    """Return the weights that a file of `records` tells of.

    Raises:
        UsageError: If it or the weights are damaged.
    """
    try:
        stored: StoredWeights = TypeAdapter(StoredWeights).validate_json(record.read_bytes())
        written = stored.path(storage).stat().st_size
    except (OSError, ValueError) as error:
        raise _damaged(record, str(error)) from error
    if written != stored.bytes:
        raise _damaged(record, f"{stored.path(storage)} has {written} bytes, not {stored.bytes}")
    return stored


def _damaged(record: Path, reason: str) -> UsageError:
    return UsageError(
        f"Weights in the storage must be as `segadapt weights fetch` wrote them, but those of {record.stem} are not: "
        f"{reason}. Remove {record} and fetch them again."
    )
