"""Shared stages, computed once and loaded by every trial that needs the same: a content-addressed store."""

import dataclasses
import hashlib
import importlib.metadata
import json
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segadapt.platform.config import TrialConfig
from segadapt.platform.storage import Storage
from segadapt.trainables import method_class
from segadapt.trainables.core.checkpoint import MANIFEST
from segadapt.trainables.core.method import Stage
from segadapt.trainables.core.trainer import Report, stage_steps

_FORMAT = 2
"""Of what a stage leaves; 2: label-free scores."""


@dataclass(frozen=True)
class StageKey:
    """Identifies what a shared stage computes."""

    stage: Stage
    hash: str


def split_plan(config: TrialConfig) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    """Return the shared stages of a trial and the ones it trains itself.

    A method that has shared stages only, such as source-only training, trains them itself.
    """
    plan = method_class(config.method_name).plan(config.method)
    own = tuple(stage for stage in plan if not stage.shared)
    return (tuple(stage for stage in plan if stage.shared), own) if own else ((), plan)


def own_steps(config: TrialConfig) -> int:
    """Return the steps a trial takes itself, after the shared stages."""
    return sum(stage_steps(split_plan(config)[1], config.warmup.steps, config.trainer.steps).values())


def stage_keys(config: TrialConfig, fingerprint: str) -> list[StageKey]:
    """Return the keys of a trial's shared stages in order; each depends on the one before.

    The warm-up depends on data, network, `warmup.*`, the optimiser's, trainer's and augmentation's settings that act in
    it, and the seed; later shared stages on their method besides.

    Args:
        config: Without searched values (`TrialSpec.shared_config`): what a trial varies never acts on a shared stage.
        fingerprint: Of the data.
    """
    optimizer = dataclasses.asdict(config.optimizer)
    optimizer.pop("lr_factor")
    content: dict[str, Any] = {
        "format": _FORMAT,
        "version": importlib.metadata.version("segadapt"),
        "data": fingerprint,
        "network": dataclasses.asdict(config.network),
        "warmup": dataclasses.asdict(config.warmup),
        "optimizer": optimizer,
        "batch": [config.trainer.batch_size, config.trainer.accumulate, config.trainer.precision],
        "seed": config.seed,
    }
    augmentation = config.augmentation.in_every_stage()
    if augmentation:
        content["augmentation"] = augmentation
    keys: list[StageKey] = []
    for stage in split_plan(config)[0]:
        content = {"parent": keys[-1].hash, "method": config.method_name} if keys else content
        content["stage"] = stage.name
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        keys.append(StageKey(stage, digest[:32]))
    return keys


def find(storage: Storage, key: StageKey) -> Path | None:
    """Return the checkpoint folder of a finished stage, or None."""
    folder = storage.stages / key.hash
    return folder if (folder / MANIFEST).is_file() else None


def publish(storage: Storage, key: StageKey, checkpoint: Path) -> None:
    """Copy the last checkpoint of a stage into the store, whole or not at all; the first to finish wins."""
    storage.stages.mkdir(parents=True, exist_ok=True)
    staging = storage.stages / f".{key.hash}.{uuid.uuid4().hex}"
    shutil.copytree(checkpoint, staging)
    try:
        staging.rename(storage.stages / key.hash)
    except OSError:
        if find(storage, key) is None:
            raise
        shutil.rmtree(staging)


def longest_prefix(storage: Storage, keys: Sequence[StageKey]) -> list[Path]:
    """Return the checkpoint folders of the finished stages, up to the first that is missing."""
    folders = []
    for key in keys:
        folder = find(storage, key)
        if folder is None:
            break
        folders.append(folder)
    return folders


def publishing(storage: Storage, keys: Mapping[str, StageKey], report: Report) -> Report:
    """Return a `report` that also publishes the last checkpoint of each stage in `keys` (by stage name)."""

    def wrapped(metrics: dict[str, Any], write: Callable[[Path], None] | None) -> None:
        if write is None or not metrics["stage_finished"]:
            report(metrics, write)
            return

        def write_and_publish(folder: Path) -> None:
            write(folder)
            publish(storage, keys[metrics["stage"]], folder)

        report(metrics, write_and_publish)

    return wrapped
