"""Shared stages, computed once and loaded by every trial that needs the same: a content-addressed store.

A stage is computed under a lease, so that searches that need it at the same time compute it once between them.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from segadapt.platform import leases
from segadapt.platform.checkpoints import readable_metrics
from segadapt.platform.config import TrialConfig
from segadapt.platform.sources import source_hash
from segadapt.platform.storage import Storage
from segadapt.trainables import method_class
from segadapt.trainables.core.method import Stage
from segadapt.trainables.core.training.checkpoint import MANIFEST, is_whole
from segadapt.trainables.core.training.config import stage_steps
from segadapt.trainables.core.training.reporting import Report

DESCRIPTION = "stage.json"
"""File in a stage's folder that says what it is."""

LEASES = ".leases"
"""Folder among the stages with the lease of each that was or is being computed."""

NEEDS = "stages.json"
"""File in an experiment's folder with the hashes of the stages it needs until it has finished."""

_POLL_S = 1.0
"""Seconds between two looks at a stage that another process computes."""

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
    """Of each method's later shared stages."""


@dataclass(frozen=True)
class Description:
    """What a stage in the store is, for people."""

    stage: str
    method: str
    """That computed it; the warm-up is the same for all."""
    data: str
    network: str
    seed: int
    steps: int
    experiment: str
    """That computed it."""
    created: float
    """Unix time."""
    parent: str | None = None
    """Hash of the stage before."""


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
    own = tuple(stage for stage in plan if not stage.shared)
    return (tuple(stage for stage in plan if stage.shared), own) if own else ((), plan)


def own_steps(config: TrialConfig) -> int:
    """Return the steps a trial takes itself, after the shared stages."""
    return sum(stage_steps(split_plan(config)[1], config.warmup.steps, config.trainer.steps).values())


def stage_keys(config: TrialConfig, fingerprint: str, code: CodeVersions | None = None) -> list[StageKey]:
    """Return the keys of a trial's shared stages in order; each depends on the one before.

    The warm-up depends on data, network, `warmup.*`, the optimiser's, trainer's and augmentation's settings that act in
    it, and the seed; later shared stages on their method besides. Each depends on the code that computes it.

    Args:
        config: Without searched values (`TrialSpec.shared_config`): what a trial varies never acts on a shared stage.
        fingerprint: Of the data.
        code: Of what computes them; None looks at it now.
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


def find(storage: Storage, key: StageKey) -> Path | None:
    """Return the checkpoint folder of a finished stage, or None."""
    folder = storage.stages / key.hash
    return folder if (folder / MANIFEST).is_file() else None


def lease_folder(storage: Storage, stage_hash: str) -> Path:
    """Return the folder of the lease under which a stage is computed."""
    return storage.stages / LEASES / stage_hash


def need(storage: Storage, experiment: str, keys: Iterable[StageKey]) -> None:
    """Note, before looking for them, which stages an experiment needs: they are not pruned until `need_no_more`."""
    folder = storage.experiment(experiment)
    temporary = folder / f".{NEEDS}"
    temporary.write_text(json.dumps(sorted({key.hash for key in keys})))
    temporary.replace(folder / NEEDS)


def need_no_more(storage: Storage, experiment: str) -> None:
    """Let the stages of a finished experiment be pruned."""
    (storage.experiment(experiment) / NEEDS).unlink(missing_ok=True)


def mark_used(folder: Path) -> None:
    """Note that a stage was loaded now: pruning goes by the time of its manifest."""
    with contextlib.suppress(PermissionError):  # a stage that may only be read can still be loaded
        os.utime(folder / MANIFEST)


def put_damaged_aside(storage: Storage, keys: Sequence[StageKey]) -> list[str]:
    """Take stages whose files are damaged out of the store, so that they are computed anew; returns their names."""
    damaged = []
    for key in keys:
        folder = find(storage, key)
        if folder is not None and (readable_metrics(folder) is None or not is_whole(folder)):
            with contextlib.suppress(FileNotFoundError):  # another experiment was faster
                folder.rename(storage.stages / f".{key.hash}.{uuid.uuid4().hex}")
            damaged.append(key.stage.name)
    return damaged


@contextlib.contextmanager
def turn_to_compute(
    storage: Storage, keys: Sequence[StageKey], experiment: str, say: Callable[[str], None]
) -> Iterator[list[Path]]:
    """Wait until nobody else computes one of these stages, and keep others from computing what is missing.

    Yields the folders of the finished stages, up to the first that is missing; within the context this process alone
    computes the others.

    Args:
        storage: The storage folder.
        keys: Of a trial's shared stages, in order; all processes take leases in this order.
        experiment: That asks.
        say: Told who computes what is waited for.
    """
    with contextlib.ExitStack() as held:
        taken: set[str] = set()
        while True:
            done = longest_prefix(storage, keys)
            open_keys = [key for key in keys[len(done) :] if key.hash not in taken and find(storage, key) is None]
            if not open_keys:
                break
            lease = _wait_for_turn(storage, open_keys[0], experiment, say)
            if lease is not None:
                held.enter_context(lease)
                taken.add(open_keys[0].hash)
        yield done


def _wait_for_turn(storage: Storage, key: StageKey, experiment: str, say: Callable[[str], None]) -> leases.Lease | None:
    """Wait until a stage is there (None) or its lease is this process's."""
    name, told = key.stage.name, None
    while find(storage, key) is None:
        found = leases.take(lease_folder(storage, key.hash), leases.Owner(experiment, name))
        if isinstance(found, leases.Held):
            if found.owner != told:
                say(f"Waiting for the stage {name}, which {found.owner} computes.")
                told = found.owner
            time.sleep(_POLL_S)
            continue
        if find(storage, key) is not None:
            found.release()
            return None
        if found.former is not None:
            say(f"{found.former.owner} gave no sign for {found.former.age_s:.0f} s: {name} is computed here.")
        return found
    return None


def publish(storage: Storage, key: StageKey, checkpoint: Path, description: Description) -> None:
    """Copy the last checkpoint of a stage into the store, whole or not at all; the first to finish wins."""
    storage.stages.mkdir(parents=True, exist_ok=True)
    staging = storage.stages / f".{key.hash}.{uuid.uuid4().hex}"
    shutil.copytree(checkpoint, staging)
    (staging / DESCRIPTION).write_text(json.dumps(dataclasses.asdict(description)))
    mark_used(staging)
    try:
        staging.rename(storage.stages / key.hash)
    except OSError:
        if find(storage, key) is None:
            raise
        shutil.rmtree(staging)


def describe(folder: Path) -> Description | None:
    """Return what a stage in the store is; None if its folder does not say."""
    try:
        return TypeAdapter(Description).validate_json((folder / DESCRIPTION).read_bytes())
    except (OSError, ValueError):
        return None


def longest_prefix(storage: Storage, keys: Sequence[StageKey]) -> list[Path]:
    """Return the checkpoint folders of the finished stages, up to the first that is missing."""
    folders = []
    for key in keys:
        folder = find(storage, key)
        if folder is None:
            break
        folders.append(folder)
    return folders


def publishing(
    storage: Storage, keys: Sequence[StageKey], config: TrialConfig, experiment: str, report: Report
) -> Report:
    """Return a `report` that also publishes the last checkpoint of each of a trial's shared stages."""
    by_name = {key.stage.name: key for key in keys}
    steps = stage_steps(tuple(key.stage for key in keys), config.warmup.steps, config.trainer.steps)

    def wrapped(metrics: dict[str, Any], write: Callable[[Path], None] | None) -> None:
        if write is None or not metrics["stage_finished"]:
            report(metrics, write)
            return
        key = by_name[metrics["stage"]]
        description = Description(
            stage=key.stage.name,
            method=config.method_name,
            data=config.data.name,
            network=config.network.name,
            seed=config.seed,
            steps=steps[key.stage.name],
            experiment=experiment,
            created=time.time(),
            parent=key.parent,
        )

        def write_and_publish(folder: Path) -> None:
            write(folder)
            publish(storage, key, folder, description)

        report(metrics, write_and_publish)

    return wrapped
