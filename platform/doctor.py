"""Is everything sound: environment, storage, tracking, studies, cluster; and do the ledgers of each experiment agree.

Looking writes nothing but a probe that is removed. What is repaired, each check of `agreement` and this module says.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shutil
import socket
import sqlite3
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from segadapt.platform import agreement, cache, outbox, tracking, tune_state
from segadapt.platform.agreement import Drivers
from segadapt.platform.errors import UsageError
from segadapt.platform.experiments import BEGUN
from segadapt.platform.findings import Finding
from segadapt.platform.redaction import redacted
from segadapt.platform.storage import Storage, open_storage
from segadapt.platform.study import open_study_storage

_PACKAGES = ("ray", "torch", "torchvision", "optuna", "mlflow")
_OLD_S = 3600.0
"""What is in work changes more often than this."""
_NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "fuse.sshfs", "9p", "afs")
_OWN_LOCKS = ("nolock", "noflock", "localflock", "local_lock=all", "local_lock=flock")
"""Mount options under which nodes do not see each other's locks."""

NEW_DATABASE = "Move it away, or copy a backup in its place"


@dataclass(frozen=True)
class Examination:
    """What to look at."""

    storage: Storage
    tracking_uri: str | None = None
    study_uri: str | None = None
    address: str | None = None
    fix: bool = False


def examine(what: Examination) -> Iterator[Finding]:
    """Look at everything, in the order in which one thing needs another; with `fix` repair it on the way."""
    checks = (_environment, _storage, _waiting, _tracking, _study, _cluster)
    sound = True
    for check in checks:
        for finding in check(what):
            done = finding.mended() if what.fix else finding
            sound = sound and not (finding.level == "fault" and check is _tracking)
            yield done
    if sound:
        yield from _experiments(what)


# Environment.


def _environment(what: Examination) -> Iterator[Finding]:
    about = importlib.metadata.metadata("segadapt")
    python = platform.python_version()
    if Version(python) not in SpecifierSet(about["Requires-Python"]):
        yield _fault("environment", f"Python {python}", f"must be {about['Requires-Python']}", "Use another Python")
    versions = {name: _version(name) for name in _PACKAGES}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    text = f"Python {python}, segadapt {importlib.metadata.version('segadapt')}, {shown}"
    yield Finding("environment", "ok", text)
    bounds = [Requirement(text) for text in importlib.metadata.requires("segadapt") or () if "extra ==" not in text]
    for bound in bounds:
        found = _version(bound.name)
        if found is None or not bound.specifier.contains(found, prereleases=True):
            yield _fault(
                "environment",
                f"{bound.name} {found or 'is missing'}",
                f"segadapt {importlib.metadata.version('segadapt')} is made for {bound.name}{bound.specifier}",
                f"`pip install '{bound.name}{bound.specifier}'`, or `uv sync`",
            )
    yield from _devices()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia/version").exists():
            yield Finding(
                "environment",
                "warning",
                "This machine has an NVIDIA driver, but torch uses no GPU",
                f"torch {torch.__version__} is built for CUDA {torch.version.cuda or 'none'}, or no GPU is visible",
                "Look at `nvidia-smi` and CUDA_VISIBLE_DEVICES; install a torch that suits the driver",
            )
        else:
            yield Finding("environment", "ok", f"No GPU; {os.cpu_count()} CPUs")
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        name = f"GPU {index}: {found.name}, {found.total_memory / 2**30:.0f} GiB"
        try:
            torch.ones(8, device=f"cuda:{index}").sum().item()
            free = torch.cuda.mem_get_info(index)[0] / 2**30
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            yield _fault("environment", f"{name} cannot compute", reason, "Free it, or hide it by CUDA_VISIBLE_DEVICES")
        else:
            yield Finding("environment", "ok", f"{name}, {free:.0f} GiB free, CUDA {torch.version.cuda}")


# Storage.


def _storage(what: Examination) -> Iterator[Finding]:
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
        yield _fault("storage", str(error), "Nothing can be run or repaired there", "")
        return
    free = shutil.disk_usage(storage.root).free / 2**30
    kind, options = file_system(storage.root, Path("/proc/self/mounts"))
    yield Finding("storage", "ok", f"{storage.root} can be written, {free:.3g} GiB free, {kind}")
    yield from _locks(storage, kind, options)
    yield from _in_work(storage)
    yield from _stage_cache(storage)


def file_system(path: Path, mounts: Path) -> tuple[str, str]:
    """Return the kind of file system that a folder lies on, and how it is mounted; `unknown` where nothing tells.

    Args:
        path: The folder.
        mounts: The system's table, `/proc/self/mounts` on Linux.
    """
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return "unknown", ""
    path = path.resolve()
    found = [line for line in lines if path.is_relative_to(line[1].replace("\\040", " "))]
    best = max(found, key=lambda line: len(line[1]), default=None)
    return (best[2], best[3]) if best is not None else ("unknown", "")


def keeps_locks_apart(kind: str, options: str) -> bool:
    """Return whether a file system is mounted so that nodes do not see each other's locks."""
    return kind.startswith(_NETWORK) and bool(set(options.split(",")) & set(_OWN_LOCKS))


def _locks(storage: Storage, kind: str, options: str) -> Iterator[Finding]:
    """Locks tell which drivers live."""
    with tempfile.NamedTemporaryFile(dir=storage.root) as probe, Path(probe.name).open() as other:
        try:
            fcntl.flock(probe, fcntl.LOCK_EX)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                raise OSError("two processes hold one lock")
        except OSError as error:
            advice = "Mount it with locks, or choose another folder"
            yield _fault(
                "storage", f"Files cannot be locked ({kind}: {error})", "Searches cannot be told apart", advice
            )
            return
    if keeps_locks_apart(kind, options):
        yield _fault(
            "storage",
            f"{kind} is mounted without locks that all nodes see ({options})",
            "A search that another node drives looks dead; no experiment is touched",
            "Mount it without nolock, local_lock or localflock",
        )


def _in_work(storage: Storage) -> Iterator[Finding]:
    making = storage.mlflow_database.with_name(f".{storage.mlflow_database.name}.new")
    with _alone(storage) as alone:
        if alone and making.is_dir():
            text = f"{making} is MLflow's database, half made"
            repair = partial(shutil.rmtree, making)
            yield _left(text, "A command was killed while it made it; the next one begins anew", repair)
    for server in sorted(storage.tracking.glob("*")):
        for folder in outbox.abandoned(server, _OLD_S) if server.is_dir() else ():
            repair = partial(shutil.rmtree, folder)
            yield _left(f"{folder} holds no record", "A command was killed as it began", repair)


@contextlib.contextmanager
def _alone(storage: Storage) -> Iterator[bool]:
    """Keep others from making MLflow's database; yields False if one is at it."""
    with (storage.root / ".mlflow.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _left(text: str, meaning: str, repair: Callable[[], None]) -> Finding:
    return Finding("storage", "fault", text, meaning, "--fix removes it", repair)


def _stage_cache(storage: Storage) -> Iterator[Finding]:
    found, drivers = cache.content(storage), Drivers.of(storage)
    tidy = partial(_tidy, storage)
    for lease in found.leases:
        if lease.alive:
            yield Finding("storage", "ok", f"The stage {lease.stage} is computed by {lease.owner}")
        else:
            text = f"The lease on the stage {lease.stage} {lease.hash[:12]} is stale"
            yield _left(text, f"{lease.owner} gave no sign for {lease.age_s:.0f} s", tidy)
    for name in found.left_over:
        yield _left(f"stages/{name} is a copy that was never finished", "Its process died an hour ago or more", tidy)
    for stage in found.stages:
        folder = storage.stages / stage.hash
        if not agreement.is_sound(folder):
            needed = f"; {', '.join(stage.needed_by)} need it" if stage.needed_by else ""
            text = f"The shared stage {stage.hash[:12]} is cut short{needed}"
            if any(drivers.drive(name) for name in stage.needed_by):
                yield _fault("storage", text, "Trials that load it fail", "Stop the command that runs now, then --fix")
                continue
            advice = "--fix removes it; who needs it computes it anew"
            yield Finding(
                "storage",
                "fault",
                text,
                "Trials that load it fail",
                advice,
                partial(_remove_stage, storage, stage.hash),
            )
    yield from _begun_stages(storage, drivers)


def _tidy(storage: Storage) -> None:
    cache.prune(storage, math.inf)  # no stage is that old


def _remove_stage(storage: Storage, stage_hash: str) -> None:
    aside = storage.stages / f".{stage_hash}.broken"
    (storage.stages / stage_hash).rename(aside)  # at once: nobody loads half of it
    shutil.rmtree(aside)


def _begun_stages(storage: Storage, drivers: Drivers) -> Iterator[Finding]:
    """Find folders in which shared stages were begun that nobody will go on with."""
    for note in sorted(storage.experiments.glob(f"*/{BEGUN}")):
        experiment = agreement.experiment_of(storage, note.parent.name)
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
        yield Finding("storage", "fault", text, why, advice, note.unlink)


# Tracking and studies.


def _waiting(what: Examination) -> Iterator[Finding]:
    """Find records that ended commands left for a server, and those that a server refused."""
    own = tracking.waiting_folder(what.storage, what.tracking_uri)
    for server in sorted(path for path in what.storage.tracking.glob("*") if path.is_dir()):
        boxes = outbox.look(server)
        lives = any(box.alive for box in boxes)
        left = [box for box in boxes if not box.alive]
        waiting = sum(box.waiting for box in left)
        for file, count in outbox.refused(server).items():
            text = f"MLflow refused {count} records for good: {file}"
            yield Finding("tracking", "warning", text, "They are missing there", "Read the reasons; delete the file")
        if not left:
            continue
        text = f"{waiting} records of {len(left)} ended commands wait in {server}"
        meaning = "Their driver was killed, or the server was away: MLflow is behind"
        if lives:
            yield Finding("tracking", "ok", text, "", "A command that runs now sends them")
        elif server == own:
            yield Finding("tracking", "fault", text, meaning, "--fix sends them", partial(_send, what, server))
        else:
            yield Finding("tracking", "warning", text, meaning, "Give that server's --tracking-uri")


def _tracking(what: Examination) -> Iterator[Finding]:
    if what.tracking_uri is None:
        if not what.storage.mlflow_database.is_file():
            yield Finding("tracking", "ok", "No runs yet: the first search makes MLflow's database")
            return
        problem = next(_database_problems(what.storage.mlflow_database), None)
        if problem is not None:
            yield problem
            return
    shown = redacted(tracking.tracking_uri(what.storage, what.tracking_uri))
    try:
        tracking.client(tracking.tracking_uri(what.storage, what.tracking_uri)).search_experiments(max_results=1)
    except Exception as error:  # whatever the client raises for what does not answer
        reason = _first_line(error)
        advice = "Start the server, or correct --tracking-uri; records wait on disk meanwhile"
        yield _fault("tracking", f"{shown} does not answer: {reason}", "Runs cannot be seen or compared", advice)
        return
    yield from _server_version(what.tracking_uri, shown)


def _server_version(uri: str | None, shown: str) -> Iterator[Finding]:
    own = importlib.metadata.version("mlflow")
    if uri is None or not uri.startswith("http"):
        yield Finding("tracking", "ok", f"{shown} answers, schema of MLflow {own}")
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/version", timeout=5) as answer:
            theirs = answer.read().decode().strip()
    except OSError:
        yield Finding("tracking", "ok", f"{shown} answers, but does not tell its version")
        return
    if Version(theirs).release[:2] == Version(own).release[:2]:
        yield Finding("tracking", "ok", f"{shown} answers, MLflow {theirs}, {own} here")
    else:
        text = f"{shown} runs MLflow {theirs}, but {own} is here"
        meaning = "They may not understand each other's requests"
        yield Finding("tracking", "warning", text, meaning, f"Install mlflow {own} on the server")


def _database_problems(path: Path) -> Iterator[Finding]:
    """Find out, without a change, whether an SQLite database is MLflow's and of this MLflow's schema."""
    from mlflow.store.db import utils
    from mlflow.store.db.base_sql_model import Base

    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            tables = {name for (name,) in database.execute("select name from sqlite_master where type = 'table'")}
            found = database.execute("select version_num from alembic_version").fetchone() if tables else None
            runs = database.execute("select count(*) from runs").fetchone()[0] if "runs" in tables else 0
    except sqlite3.OperationalError as error:
        if "no such table" not in str(error):
            yield _fault("tracking", f"{path} cannot be read: {error}", "No run can be seen or tracked", NEW_DATABASE)
            return
        found, runs = None, 0
    except sqlite3.DatabaseError as error:
        yield _fault("tracking", f"{path} is damaged: {error}", "No run can be seen or tracked", NEW_DATABASE)
        return
    wanted = utils._get_latest_schema_revision()  # type: ignore[no-untyped-call]
    version = found[0] if found else None
    if version == wanted and set(Base.metadata.tables) <= tables:
        return
    if not runs:
        text = f"{path} was left half made, without a run"
        advice = "--fix sets it aside; the next command makes it anew"
        repair = partial(_set_aside, path)
        yield Finding("tracking", "fault", text, "A command was killed while it made it", advice, repair)
        return
    own = importlib.metadata.version("mlflow")
    text = f"{path} holds {runs} runs in another schema ({version}) than MLflow {own} has ({wanted})"
    advice = f"Use the MLflow that wrote it; or, if it is older, copy it and `mlflow db upgrade sqlite:///{path}`"
    yield _fault(
        "tracking", text, "It was written by another version of MLflow, or a change of it was cut short", advice
    )


def _set_aside(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}.half-made-{time.time():.0f}"))


def _send(what: Examination, server: Path) -> None:
    tracking.send_waiting(what.storage, what.tracking_uri)
    left = [box for box in outbox.look(server) if not box.alive]
    if left:
        raise RuntimeError(f"{sum(box.waiting for box in left)} records still wait; is the server there?")


def _study(what: Examination) -> Iterator[Finding]:
    if what.study_uri is None and not what.storage.study_database.is_file():
        yield Finding("study", "ok", "No studies yet: the first search makes their database")
        return
    url = what.storage.study_url(what.study_uri)
    try:
        names = _studies(url)
    except UsageError as error:
        yield _fault("study", str(error), "Searches cannot begin or go on", "")
    except Exception as error:  # of another version, or no database of Optuna's
        reason = _first_line(error)
        text = f"{redacted(url)} cannot be used: {reason}"
        yield _fault("study", text, "Searches cannot begin or go on", "Use the Optuna that made it, or a backup")
    else:
        yield Finding("study", "ok", f"{redacted(url)} answers, {names} studies")


def _studies(url: str) -> int:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return len(optuna.get_all_study_names(open_study_storage(url)))


def _first_line(error: Exception) -> str:
    """Return the first line of a message, without logins."""
    return redacted(str(error).strip() or type(error).__name__).splitlines()[0]


# Cluster.


def _cluster(what: Examination) -> Iterator[Finding]:
    address = what.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        yield Finding("cluster", "ok", "No --address: commands start Ray on this machine, and end it with themselves")
        return
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            advice = "Start it with `ray start --head`, or correct --address"
            yield _fault("cluster", f"Nothing listens at {address}: {error}", "No search can join it", advice)
            return
    try:
        yield from _nodes(what, address)
    except Exception as error:  # whatever Ray raises for a cluster that refuses or does not answer
        reason = _first_line(error)
        meaning = "The cluster asks for a token that this machine lacks, runs another Ray, or is ending"
        advice = "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH as on the head; compare `ray --version`"
        yield _fault("cluster", f"{address} refuses: {reason}", meaning, advice)


def _nodes(what: Examination, address: str) -> Iterator[Finding]:
    """Join the cluster, and have its nodes look at what they have installed and see."""
    from segadapt.platform.cluster import connect
    from segadapt.platform.preflight import node_problems

    with connect(address) as capacity:
        authenticated = "with a token" if os.environ.get("RAY_AUTH_MODE") == "token" else "without a token"
        yield Finding("cluster", "ok", f"{address} answers, {authenticated}: {capacity}")
        if not what.storage.root.is_dir():
            return
        problems = node_problems(what.storage.root)
        for problem in problems:
            advice = "Install the same wheel on all nodes, and mount the storage folder there"
            yield _fault("cluster", problem, "A search refuses to begin on such a cluster", advice)
        if not problems:
            yield Finding("cluster", "ok", "All nodes have the same versions as this machine, and write to the storage")


# Experiments.


def _experiments(what: Examination) -> Iterator[Finding]:
    """Compare the three ledgers of every experiment that nobody drives; what is repaired is read again."""
    storage = what.storage
    if what.tracking_uri is None and not storage.mlflow_database.is_file():
        return
    if keeps_locks_apart(*file_system(storage.root, Path("/proc/self/mounts"))):
        return
    client = tracking.client(tracking.tracking_uri(storage, what.tracking_uri))
    studies: Any | None = None
    if what.study_uri is not None or storage.study_database.is_file():
        try:
            studies = open_study_storage(storage.study_url(what.study_uri))
        except Exception:  # said before
            return
    for name in agreement.experiments(storage, client, is_local=what.tracking_uri is None):
        try:
            yield from _experiment(what, name, client, studies)
        except (ValueError, TypeError, KeyError, UsageError) as error:  # of a state or record that is not as it must be
            advice = "Put back a copy, or use the version that wrote it"
            yield _fault(name, str(error), "It was changed, or is another version's: it cannot go on", advice)


def _experiment(what: Examination, name: str, client: Any, studies: Any | None) -> Iterator[Finding]:
    def books() -> agreement.Books:
        return agreement.read(name, what.storage, what.tracking_uri, client, studies)

    if Drivers.of(what.storage).drive(name):
        yield _driven(name)
        return
    for finding in _tune_states(what.storage, name):
        yield (finding := finding.mended() if what.fix else finding)
        if not finding.repaired:
            return  # what trials there are, nobody knows
    known, faults = books(), 0
    for check in agreement.CHECKS:
        found = list(check(known))
        for finding in found:
            faults += finding.level == "fault"
            if what.fix and finding.repair is not None and Drivers.of(what.storage).drive(name):
                yield _driven(name)  # it was begun meanwhile
                return
            yield finding.mended() if what.fix else finding
        if what.fix and any(finding.repair is not None for finding in found):
            known = books()
    if not faults and (known.runs or known.trials):
        yield Finding(name, "ok", f"Ray, Optuna and MLflow agree on {len(known.trials)} trials")


def _tune_states(storage: Storage, name: str) -> Iterator[Finding]:
    """Find what a kill left of the state files that Tune copies into the folders of an experiment."""
    for folder in sorted(path for path in storage.experiments.glob(f"{name}*") if path.is_dir()):
        files = tune_state.damaged(folder) if agreement.experiment_of(storage, folder.name) == name else []
        if files:
            text = f"What Tune saved in {folder} is cut short: {', '.join(files)}"
            meaning = "A command was killed as it saved, or the disk was full"
            repair = partial(_mend, folder)
            yield Finding(name, "fault", text, meaning, "--fix puts the state before it back, as --resume does", repair)


def _mend(folder: Path) -> None:
    tune_state.mend(folder)


def _driven(name: str) -> Finding:
    return Finding(name, "ok", "A command works on it now: it is left alone")


def _fault(subject: str, text: str, meaning: str, advice: str) -> Finding:
    return Finding(subject, "fault", text, meaning, advice)
