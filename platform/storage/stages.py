"""Shared stages, computed once and loaded by every trial that needs the same: a content-addressed store.

A stage is computed under a lease, so that searches that need it at the same time compute it once between them.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from segadapt.platform.settings.config import TrialConfig
from segadapt.platform.storage import leases
from segadapt.platform.storage.checkpoints import readable_metrics
from segadapt.platform.storage.files import write_whole
from segadapt.platform.storage.folders import Storage
from segadapt.platform.storage.stage_keys import StageKey
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

_SILENCE_S = 60.0
"""Seconds after which one that waits says so again."""


@dataclass(frozen=True)
class Description:
    """What a stage in the store is, for people."""

    stage: str
    method: str
    """Method that computed it; the warm-up is the same for all."""
    data: str
    network: str
    seed: int
    steps: int
    experiment: str
    """Experiment that computed it."""
    created: float
    """Unix time."""
    parent: str | None = None
    """Hash of the stage before."""


def find(storage: Storage, key: StageKey) -> Path | None:
    """Return the checkpoint folder of a finished stage, or None."""
    folder = storage.stages / key.hash
    return folder if (folder / MANIFEST).is_file() else None


def lease_folder(storage: Storage, stage_hash: str) -> Path:
    """Return the folder of the lease under which a stage is computed."""
    return storage.stages / LEASES / stage_hash


def need(storage: Storage, experiment: str, keys: Iterable[StageKey]) -> None:
    """Note, before looking for them, which stages an experiment needs: they are not pruned until `need_no_more`."""
    write_whole(storage.experiment(experiment) / NEEDS, json.dumps(sorted({key.hash for key in keys})))


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
        keys: Keys of a trial's shared stages, in order; all processes take leases in this order.
        experiment: Name of the experiment that asks.
        say: Receives who computes what is waited for.
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
    name, announced, said_s = key.stage.name, None, 0.0
    while find(storage, key) is None:
        lease = leases.take(lease_folder(storage, key.hash), leases.Owner(experiment, name))
        if isinstance(lease, leases.Held):
            if lease.owner != announced:
                say(f"Waiting for the stage {name}, which {lease.owner} computes.")
                announced, said_s = lease.owner, time.monotonic()
            elif time.monotonic() - said_s > _SILENCE_S:
                say(f"Still waiting for the stage {name} of {lease.owner}.")
                said_s = time.monotonic()
            time.sleep(_POLL_S)
            continue
        if find(storage, key) is not None:
            lease.release()
            return None
        if lease.former is not None:
            say(f"{lease.former.owner} gave no sign for {lease.former.age_s:.0f} s: {name} is computed here.")
        return lease
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
