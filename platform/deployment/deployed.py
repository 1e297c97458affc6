"""The network that a run deploys, rebuilt from its checkpoint."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from segadapt.platform.errors import UsageError
from segadapt.platform.settings.config import TrialConfig, Values, flatten, keys, resolve
from segadapt.platform.settings.text import first_line
from segadapt.platform.storage.checkpoints import class_names, configuration, read_metrics
from segadapt.platform.storage.folders import Storage
from segadapt.platform.storage.weights import with_stored_weights
from segadapt.platform.trial.training import build_method
from segadapt.trainables.core.method import Method
from segadapt.trainables.core.networks import NetworkConfig, Segmenter
from segadapt.trainables.core.online.config import OnlineConfig
from segadapt.trainables.core.training.checkpoint import (
    CorruptCheckpointError,
    OtherBackboneError,
    check_frozen,
    frozen_hash,
    load_state,
)

AGGREGATION = "method.inference_aggregation"
"""Setting of methods whose network can aggregate when it predicts."""


@dataclass(frozen=True)
class Deployed:
    """A trained network, ready to predict, and what it was trained as."""

    network: Segmenter
    config: TrialConfig
    names: tuple[str, ...]
    """Names of its classes, in the order of its logits."""
    step: int
    """Training steps it has seen."""


def load_deployed(
    checkpoint: Path, overrides: Values, device: torch.device, storage: Storage | None = None
) -> Deployed:
    """Rebuild the network that a trial deploys from its checkpoint folder.

    Args:
        checkpoint: The folder.
        overrides: Settings to use in place of the trial's, by dotted key.
        device: Where the network goes.
        storage: Where the pretrained weights of a frozen backbone may be kept.

    Raises:
        UsageError: If the checkpoint is missing or damaged, or a setting is not as it must be.
    """
    try:
        content = configuration(checkpoint)
        state = load_state(checkpoint)
        names, step = class_names(checkpoint), int(read_metrics(checkpoint)["step"])
        method, prefix = str(content.pop("method_name")), state["deployed"] + "."
        weights = {name.removeprefix(prefix): part for name, part in state["state"].items() if name.startswith(prefix)}
    except OSError as error:
        raise UsageError(
            f"The checkpoint of the run must lie in {checkpoint}, but cannot be read: {error.strerror}. "
            "Name the --storage of the search, or another run, or run the trial again."
        ) from error
    except CorruptCheckpointError as error:
        raise UsageError(str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _foreign(checkpoint, error) from error
    if AGGREGATION in overrides and AGGREGATION not in keys(method):
        raise UsageError(
            f"--aggregation must be left out for a network that was trained by {method}: it does not offer aggregation."
        )
    config = resolve(method, {**dict(flatten(content)), **overrides})
    built = _built(dataclasses.replace(config, online=OnlineConfig()), weights, len(names), storage)
    try:
        check_frozen(state, frozen_hash(built.segmenter))
        built.deployed.load_state_dict(weights)
    except OtherBackboneError as error:
        raise UsageError(f"{checkpoint}: {error}") from error
    except (RuntimeError, TypeError) as error:
        raise _foreign(checkpoint, error) from error
    return Deployed(built.deployed.to(device).eval(), config, names, step)


def _built(config: TrialConfig, weights: Collection[str], num_classes: int, storage: Storage | None) -> Method:
    """Build the method of a trial, with the backbone it started from where that was frozen.

    Args:
        config: Of the trial.
        weights: Names in the state of the deployed network.
        num_classes: Number of classes of the network.
        storage: Where pretrained weights may be kept.

    Raises:
        UsageError: If the backbone was frozen and cannot be had.
    """
    if config.network.tune == "full":
        return build_method(dataclasses.replace(config, network=_untrained(config.network, weights)), num_classes)
    try:
        network = config.network if storage is None else with_stored_weights(config.network, storage)
        return build_method(dataclasses.replace(config, network=network), num_classes)
    except ValueError as error:
        raise UsageError(
            f"A checkpoint of network.tune={config.network.tune} needs the backbone that it was trained beside, and "
            f"holds the trained parameters alone, but: {error}"
        ) from error


def _foreign(checkpoint: Path, error: Exception) -> UsageError:
    return UsageError(
        f"A checkpoint must be as segadapt wrote it, but what {checkpoint} holds does not fit together: "
        f"{type(error).__name__}: {first_line(error).rstrip('.')}. Name another."
    )


def _untrained(network: NetworkConfig, deployed: Collection[str]) -> NetworkConfig:
    """Return the configuration of the same network without the weights it started from, which need not be at hand.

    Args:
        network: As it was trained. Whether its batch norm was frozen may have followed from the weights.
        deployed: Names in the state of the deployed network.
    """
    backbone = [name for name in deployed if name.startswith("backbone.")]
    has_norm = any(name.endswith("running_var") for name in backbone)
    frozen = has_norm and not any(name.endswith("num_batches_tracked") for name in backbone)
    return dataclasses.replace(network, weights=None, freeze_norm=frozen)
