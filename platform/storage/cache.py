"""What lies in the stage cache, who needs it, and how it is made smaller."""

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from segadapt.platform.errors import UsageError
from segadapt.platform.storage import leases
from segadapt.platform.storage.files import folder_size
from segadapt.platform.storage.folders import Storage
from segadapt.platform.storage.stages import DESCRIPTION, LEASES, NEEDS, Description, describe, lease_folder
from segadapt.trainables.core.training.checkpoint import MANIFEST

_LEFT_OVER_S = 3600.0
"""A folder that is being written changes more often than this."""

_FORGET_S = 86400.0
"""A lease's records are removed when it was free for so long."""


@dataclass(frozen=True)
class CachedStage:
    """A finished stage in the store."""

    hash: str
    description: Description | None
    """None if its folder does not say what it is."""
    bytes: int
    age_s: float
    """Seconds since it was computed."""
    unused_s: float
    """Seconds since it was last loaded."""
    needed_by: list[str]
    """Experiments that have not finished, and whoever holds its lease."""


@dataclass(frozen=True)
class RunningLease:
    """A stage that somebody computes, or died while computing."""

    hash: str
    stage: str
    owner: str
    alive: bool
    age_s: float
    """Seconds since the last heartbeat."""


@dataclass(frozen=True)
class CacheContent:
    """The stages of a storage folder, the last used first."""

    stages: list[CachedStage]
    leases: list[RunningLease]
    left_over: list[str]
    """Folders of copies that were never finished."""
    bytes: int
    """Size of the stages."""


@dataclass
class Pruned:
    """What was removed from the stage cache, or would be."""

    stages: list[CachedStage] = field(default_factory=list)
    kept: list[CachedStage] = field(default_factory=list)
    """Those that would have gone, but are needed."""
    leases: list[RunningLease] = field(default_factory=list)
    """Leases of dead processes."""
    left_over: list[str] = field(default_factory=list)
    bytes: int = 0


def content(storage: Storage) -> CacheContent:
    """Return what is in the stage cache of a storage folder."""
    if not storage.stages.is_dir():
        return CacheContent([], [], [], 0)
    now = leases.clock(storage.stages)
    needs, held = _needs(storage), list(_leases(storage))
    stages, left_over = [], []
    for folder in sorted(storage.stages.iterdir()):
        with contextlib.suppress(FileNotFoundError):  # published or pruned while it is looked at
            if folder.name.startswith("."):
                if folder.name != LEASES and now - _last_change(folder) > _LEFT_OVER_S:
                    left_over.append(folder.name)
            elif (folder / MANIFEST).is_file():
                holders = [entry.owner for entry in held if entry.alive and entry.hash == folder.name]
                stages.append(_stage(folder, now, needs.get(folder.name, []) + holders))
    stages.sort(key=lambda stage: stage.unused_s)
    return CacheContent(stages, held, left_over, sum(stage.bytes for stage in stages))


def prune(storage: Storage, unused_for_s: float, *, dry_run: bool = False) -> Pruned:
    """Remove stages that were not used for so long and that nobody needs, and what dead processes left.

    Args:
        storage: The storage folder.
        unused_for_s: Seconds since the last use; 0 removes all.
        dry_run: Only return what would be removed.
    """
    cached, pruned = content(storage), Pruned()
    for stage in cached.stages:
        if stage.unused_s < unused_for_s:
            continue
        if stage.needed_by or not (dry_run or _remove(storage, stage.hash)):
            pruned.kept.append(stage)
        else:
            pruned.stages.append(stage)
    for lease in cached.leases:
        if not lease.alive and (dry_run or _end(storage, lease.hash)):
            pruned.leases.append(lease)
    for name in cached.left_over:
        pruned.bytes += folder_size(storage.stages / name)
        pruned.left_over.append(name)
        if not dry_run:
            shutil.rmtree(storage.stages / name, ignore_errors=True)  # another prune may be at it
    if not dry_run and (storage.stages / LEASES).is_dir():
        for folder in list((storage.stages / LEASES).iterdir()):
            leases.forget(folder, _FORGET_S)
    pruned.bytes += sum(stage.bytes for stage in pruned.stages)
    return pruned


def _needs(storage: Storage) -> dict[str, list[str]]:
    """Return the experiments that have not finished by the hashes of the stages they need."""
    needs: dict[str, list[str]] = {}
    for path in sorted(storage.experiments.glob(f"*/{NEEDS}")):
        with contextlib.suppress(FileNotFoundError):  # it has just finished
            for stage_hash in _needed(path):
                needs.setdefault(stage_hash, []).append(path.parent.name)
    return needs


def _needed(path: Path) -> list[str]:
    try:
        hashes = json.loads(path.read_text())
    except ValueError:
        hashes = None
    if not isinstance(hashes, list) or not all(isinstance(entry, str) for entry in hashes):
        raise UsageError(
            f"{path} must list the stages that {path.parent.name} needs, but is damaged. Go on with that experiment by "
            "--resume, which writes it anew, or remove the file."
        )
    return hashes


def _leases(storage: Storage) -> Iterator[RunningLease]:
    for folder in sorted((storage.stages / LEASES).glob("*")):
        held = leases.holder_of(folder)
        if held is not None:
            yield RunningLease(folder.name, held.owner.stage, str(held.owner), held.alive, held.age_s)


def _stage(folder: Path, now: float, needed_by: list[str]) -> CachedStage:
    described = folder / DESCRIPTION
    used = (folder / MANIFEST).stat().st_mtime
    computed = described.stat().st_mtime if described.exists() else used
    return CachedStage(
        folder.name, describe(folder), folder_size(folder), now - computed, now - max(used, computed), needed_by
    )


def _remove(storage: Storage, stage_hash: str) -> bool:
    """Remove a stage, unless an experiment has begun to need it; returns whether it did.

    The stage is put aside first: an experiment that looks for it now computes it anew, and one that found it before has
    noted that it needs it.
    """
    folder = storage.stages / stage_hash
    aside = storage.stages / f".{stage_hash}.{uuid.uuid4().hex}"
    try:
        folder.rename(aside)
    except FileNotFoundError:  # another prune was faster
        return False
    aside.touch()  # fresh, so that another prune leaves it alone
    if stage_hash in _needs(storage):
        try:
            aside.rename(folder)
        except OSError:  # computed anew meanwhile
            shutil.rmtree(aside)
        return False
    shutil.rmtree(aside)
    return True


def _end(storage: Storage, stage_hash: str) -> bool:
    """Free the lease of a dead process; returns whether it was still that process's."""
    lease = leases.take(lease_folder(storage, stage_hash), leases.Owner("cache prune", "nothing"))
    if isinstance(lease, leases.Held):
        return False
    lease.release()
    return True


def _last_change(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
