"""Is the storage folder sound?"""

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

from segadapt.platform.doctor.drivers import Drivers, experiment_of
from segadapt.platform.doctor.findings import Examination, Finding, fault
from segadapt.platform.errors import UsageError
from segadapt.platform.experiment.record import BEGUN
from segadapt.platform.storage import cache, leases
from segadapt.platform.storage.checkpoints import is_sound
from segadapt.platform.storage.driving import driving
from segadapt.platform.storage.files import MOUNTS, file_system, keeps_locks_apart, lock, locked
from segadapt.platform.storage.folders import Storage, open_storage
from segadapt.platform.storage.weights import FETCHED, read_record, records
from segadapt.platform.tracking import outbox

_OLD_S = 3600.0
"""What is in work changes more often than this."""


# Storage.


def storage_findings(what: Examination) -> Iterator[Finding]:
    """Look whether the storage folder can be written and locked, and what dead processes left in it."""
    storage = what.storage
    if not storage.root.exists():
        text = f"{storage.root} does not exist yet"
        yield Finding(
            "storage", "warning", text, "", "The first search makes it; name the folder of your runs by --storage"
        )
        return
    try:
        open_storage(str(storage.root))  # writes a probe
    except UsageError as error:
        yield fault("storage", str(error), "Nothing can be run or repaired there", "")
        return
    free = shutil.disk_usage(storage.root).free / 2**30
    kind, options = file_system(storage.root, MOUNTS)
    yield Finding("storage", "ok", f"{storage.root} can be written, {free:.3g} GiB free, {kind}")
    yield from _locks(storage, kind, options)
    yield from _in_work(storage)
    yield from _stage_cache(storage)
    yield from _weights(storage)


def _locks(storage: Storage, kind: str, options: str) -> Iterator[Finding]:
    """Locks tell which drivers live."""
    with tempfile.NamedTemporaryFile(dir=storage.root) as probe, Path(probe.name).open() as other:
        try:
            lock(probe)
            if lock(other, wait=False):
                raise OSError("two processes hold one lock")
        except OSError as error:
            advice = "Mount it with locks, or choose another folder"
            yield fault("storage", f"Files cannot be locked ({kind}: {error})", "Searches cannot be told apart", advice)
            return
    if keeps_locks_apart(kind, options):
        yield fault(
            "storage",
            f"{kind} is mounted without locks that all nodes see ({options})",
            "A search that another node drives looks dead; no experiment is touched",
            "Mount it without nolock, local_lock or localflock",
        )


def _in_work(storage: Storage) -> Iterator[Finding]:
    making = storage.mlflow_database.with_name(f".{storage.mlflow_database.name}.new")
    with locked(storage.mlflow_lock, wait=False) as alone:  # nobody is at it
        if alone and making.is_dir():
            text = f"{making} is MLflow's database, half made"
            repair = partial(shutil.rmtree, making)
            yield _left(text, "A command was killed while it made it; the next one begins anew", repair)
    for server in sorted(storage.tracking.glob("*")):
        for folder in outbox.abandoned(server, _OLD_S) if server.is_dir() else ():
            repair = partial(shutil.rmtree, folder)
            yield _left(f"{folder} holds no record", "A command was killed as it began", repair)


def _left(text: str, meaning: str, repair: Callable[[], None]) -> Finding:
    return Finding("storage", "fault", text, meaning, "--fix removes it", repair)


def _stage_cache(storage: Storage) -> Iterator[Finding]:
    cached, drivers = cache.content(storage), Drivers.of(storage)
    tidy = partial(_tidy, storage)
    for lease in cached.leases:
        if lease.alive:
            yield Finding("storage", "ok", f"The stage {lease.stage} is computed by {lease.owner}")
        else:
            text = f"The lease on the stage {lease.stage} {lease.hash[:12]} is stale"
            yield _left(text, f"{lease.owner} gave no sign for {lease.age_s:.0f} s", tidy)
    for name in cached.left_over:
        yield _left(f"stages/{name} is a copy that was never finished", "Its process died an hour ago or more", tidy)
    for stage in cached.stages:
        folder = storage.stages / stage.hash
        if not is_sound(folder):
            needed = f"; {', '.join(stage.needed_by)} need it" if stage.needed_by else ""
            text = f"The shared stage {stage.hash[:12]} is cut short{needed}"
            if any(drivers.drive(name) for name in stage.needed_by):
                yield fault("storage", text, "Trials that load it fail", "Stop the command that runs now, then --fix")
                continue
            advice = "--fix removes it; who needs it computes it anew"
            repair = partial(_undisturbed, storage, stage.needed_by, partial(_remove_stage, storage, stage.hash))
            yield Finding("storage", "fault", text, "Trials that load it fail", advice, repair)
    yield from _begun_stages(storage, drivers)


def _weights(storage: Storage) -> Iterator[Finding]:
    for folder in sorted(storage.weights.glob(f"{FETCHED}*")):
        changed = max((path.stat().st_mtime for path in (folder, *folder.glob("*"))), default=0.0)
        if leases.clock(storage.weights) - changed > _OLD_S:
            text = f"weights/{folder.name} holds weights that were never stored whole"
            yield _left(text, "A command was killed while it fetched them", partial(shutil.rmtree, folder))
    for record in records(storage):
        try:
            read_record(storage, record)
        except UsageError as error:
            yield fault("storage", str(error), "Trials with network.weights=pretrained fail", "Do as it says")


def _tidy(storage: Storage) -> None:
    cache.prune(storage, math.inf)  # no stage is that old


def _remove_stage(storage: Storage, stage_hash: str) -> None:
    aside = storage.stages / f".{stage_hash}.broken"
    (storage.stages / stage_hash).rename(aside)  # at once: nobody loads half of it
    shutil.rmtree(aside)


def _undisturbed(storage: Storage, experiments: Collection[str], repair: Callable[[], None]) -> None:
    """Repair something that experiments need, as the only process that works on them."""
    with contextlib.ExitStack() as held:
        for name in sorted(experiments):
            if (storage.experiments / name).is_dir():  # else it is a process, whose experiment is among them too
                held.enter_context(driving(storage, name))
        repair()


def _begun_stages(storage: Storage, drivers: Drivers) -> Iterator[Finding]:
    """Find folders in which shared stages were begun that nobody will go on with."""
    for note in sorted(storage.experiments.glob(f"*/{BEGUN}")):
        experiment = experiment_of(storage, note.parent.name)
        if drivers.drive(experiment):
            continue
        hashes = json.loads(note.read_text())
        if all((storage.stages / stage_hash).is_dir() for stage_hash in hashes):
            why = "Another search has computed them since"
        elif not storage.experiment(experiment).is_dir():
            why = f"The search {experiment} is gone"
        else:
            yield Finding("storage", "ok", f"{note.parent.name} is unfinished", "", f"`--resume {experiment}` goes on")
            continue
        text = f"{note.parent.name} holds shared stages that were begun and never finished"
        advice = "--fix notes that it ended; its folder may be deleted"
        repair = partial(_undisturbed, storage, [experiment], note.unlink)
        yield Finding("storage", "fault", text, why, advice, repair)
