"""What identifies a shared stage: its settings, its data and the code that computes it."""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from segadapt.platform.settings.config import TrialConfig
from segadapt.platform.storage.source_hash import source_hash
from segadapt.trainables import method_class
from segadapt.trainables.core.method import Stage
from segadapt.trainables.core.training.config import stage_steps

_WARMUP_SOURCES = (
    "segadapt.trainables.core.training.trainer",
    "segadapt.trainables.core.networks",
    "segadapt.trainables.core.data.datasets",
)
"""Modules that compute the warm-up; a later stage is computed by its method's besides."""


@dataclass(frozen=True)
class StageKey:
    """Identifies what a shared stage computes."""

    stage: Stage
    hash: str
    parent: str | None = None
    """Hash of the stage before."""


@dataclass(frozen=True)
class CodeVersions:
    """Hashes of the code that computes shared stages."""

    warmup: str
    methods: Mapping[str, str]
    """Hash of each method's later shared stages, by the method."""


def stage_experiment(experiment: str, method: str, seed: int | None = None) -> str:
    """Return the name of the folder in which an experiment computes a method's shared stages."""
    return f"{experiment}.stages-{method}" + ("" if seed is None else f"-seed-{seed}")


def code_versions(methods: Iterable[str]) -> CodeVersions:
    """Return the hashes of the code that computes the shared stages of these methods."""
    modules = {method: method_class(method).__module__ for method in methods}
    return CodeVersions(
        source_hash(_WARMUP_SOURCES), {method: source_hash((module,)) for method, module in modules.items()}
    )


def split_plan(config: TrialConfig) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    """Return the shared stages of a trial and the ones it trains itself.

    A method that has shared stages only, such as source-only training, trains them itself.
    """
    plan = method_class(config.method_name).plan(config.method)
    trained_here = tuple(stage for stage in plan if not stage.shared)
    return (tuple(stage for stage in plan if stage.shared), trained_here) if trained_here else ((), plan)


def own_steps(config: TrialConfig) -> int:
    """Return the steps a trial takes itself, after the shared stages."""
    return sum(stage_steps(split_plan(config)[1], config.warmup.steps, config.trainer.steps).values())


def stage_keys(
    config: TrialConfig, fingerprint: str, code: CodeVersions | None = None, weights: str | None = None
) -> list[StageKey]:
    """Return the keys of a trial's shared stages in order; each depends on the one before.

    The warm-up depends on data, network, `warmup.*`, the optimiser's, trainer's and augmentation's settings that act in
    it, and the seed; later shared stages on their method besides. Each depends on the code that computes it.

    Args:
        config: Without searched values (`TrialSpec.shared_config`): what a trial varies never acts on a shared stage.
        fingerprint: Fingerprint of the data.
        code: Hashes of what computes them; None looks at it now.
        weights: Hash of the weights in the storage that the network starts from; None if it starts from others.
    """
    code = code or code_versions([config.method_name])
    optimizer = dataclasses.asdict(config.optimizer)
    optimizer.pop("lr_factor")
    content: dict[str, Any] = {
        "version": importlib.metadata.version("segadapt"),
        "code": code.warmup,
        "data": fingerprint,
        "network": dataclasses.asdict(config.network),
        "warmup": dataclasses.asdict(config.warmup),
        "optimizer": optimizer,
        "batch": [config.trainer.batch_size, config.trainer.accumulate, config.trainer.precision],
        "seed": config.seed,
    }
    if weights is not None:
        content["weights"] = weights
    augmentation = config.augmentation.in_every_stage()
    if augmentation:
        content["augmentation"] = augmentation
    keys: list[StageKey] = []
    for stage in split_plan(config)[0]:
        parent = keys[-1].hash if keys else None
        if parent is not None:
            content = {"parent": parent, "method": config.method_name, "code": code.methods[config.method_name]}
        content["stage"] = stage.name
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        keys.append(StageKey(stage, digest[:32], parent))
    return keys
