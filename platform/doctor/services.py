"""Do tracking, studies and the cluster answer?"""

import contextlib
import importlib.metadata
import shlex
import sqlite3
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import requests
from packaging.version import InvalidVersion, Version

from segadapt.platform.cluster.connection import check_address, connect, why_no_cluster
from segadapt.platform.doctor.drivers import Drivers
from segadapt.platform.doctor.findings import Examination, Finding, fault
from segadapt.platform.errors import UsageError, redacted
from segadapt.platform.ray_internals.start import variable
from segadapt.platform.search.study_storage import database_file, file_fault, open_study_storage
from segadapt.platform.settings.text import first_line
from segadapt.platform.storage.folders import database_url
from segadapt.platform.tracking import outbox
from segadapt.platform.tracking.client import mlflow_settings, reading_client, waiting_folder
from segadapt.platform.tracking.mlflow_internals import newest_schema
from segadapt.platform.tracking.sender import send_waiting

NEW_DATABASE = "Move it away, or copy a backup in its place"


# Tracking and studies.


def waiting_findings(what: Examination) -> Iterator[Finding]:
    """Find records that ended commands left for a server, and those that a server refused."""
    mine = waiting_folder(what.place)
    for server in sorted(path for path in what.storage.tracking.glob("*") if path.is_dir()):
        boxes = outbox.box_contents(server)
        lives = any(box.alive for box in boxes)
        left = [box for box in boxes if not box.alive]
        waiting = sum(box.waiting for box in left)
        for kept in outbox.refused(server):
            yield _refused(what, kept, lives=lives, mine=server == mine)
        if not left:
            continue
        text = f"{waiting} records of {len(left)} ended commands wait in {server}"
        meaning = "Their driver was killed, or the server was away: MLflow is behind"
        if lives:
            yield Finding("tracking", "ok", text, "", "A command that runs now sends them")
        elif server == mine:
            yield Finding("tracking", "fault", text, meaning, "--fix sends them", partial(_send, what, server))
        else:
            yield Finding("tracking", "warning", text, meaning, "Give that server's --tracking-uri")


def _refused(what: Examination, kept: outbox.RefusedRecords, *, lives: bool, mine: bool) -> Finding:
    """Return the finding that MLflow did not take records; `--fix` sends them again if no command tracks there now."""
    count = len(kept.reasons)
    text = f"MLflow did not take {count} records, {kept.final} of them for what they hold: {kept.file}"
    meaning = f"They are missing there. The last reason: {kept.reasons[-1][:300]}"
    if lives:
        advice = "When the commands that track there have ended, --fix sends them again"
    elif not mine:
        advice = "Give that server's --tracking-uri"
    else:
        advice = "--fix sends them again; if the reason stays, delete the file and the folder beside it"
    repair = partial(_send_refused, what, kept.file) if mine and not lives else None
    return Finding("tracking", "warning", text, meaning, advice, repair)


def tracking_findings(what: Examination) -> Iterator[Finding]:
    """Look whether MLflow answers, with the schema of the installed version."""
    if what.place.tracking_uri is None:
        if not what.storage.mlflow_database.is_file():
            yield Finding("tracking", "ok", "No runs yet: the first search makes MLflow's database")
            return
        problem = next(_database_problems(what.storage.mlflow_database), None)
        if problem is not None:
            yield problem
            return
    shown = redacted(what.place.tracking_uri or what.storage.mlflow_database)
    try:
        reading_client(what.place).search_experiments(max_results=1)
    except UsageError as error:
        yield fault("tracking", str(error), "Runs cannot be seen or compared", "")
        return
    except Exception as error:  # whatever the client raises for a database that it cannot use
        reason = first_line(error)
        advice = "Start the server, or correct --tracking-uri; records wait on disk meanwhile"
        yield fault("tracking", f"{shown} does not answer: {reason}", "Runs cannot be seen or compared", advice)
        return
    yield from _server_version(what.place.tracking_uri, shown)


def _server_version(uri: str | None, shown: str) -> Iterator[Finding]:
    ours = importlib.metadata.version("mlflow")
    if uri is None or not uri.startswith("http"):
        yield Finding("tracking", "ok", f"{shown} answers, schema of MLflow {ours}")
        return
    try:
        with mlflow_settings():
            answer = requests.get(f"{uri.rstrip('/')}/version", timeout=5)  # takes the login that an address may hold
        answer.raise_for_status()
        theirs = Version(answer.text.strip())
    except (OSError, InvalidVersion):
        yield Finding("tracking", "ok", f"{shown} answers, but does not tell its version")
        return
    if theirs.release[:2] == Version(ours).release[:2]:
        yield Finding("tracking", "ok", f"{shown} answers, MLflow {theirs}, {ours} here")
    else:
        text = f"{shown} runs MLflow {theirs}, but {ours} is here"
        meaning = "They may not understand each other's requests"
        yield Finding("tracking", "warning", text, meaning, f"Install mlflow {ours} on the server")


def _database_problems(path: Path) -> Iterator[Finding]:
    """Find out, without a change, whether an SQLite database is MLflow's and of this MLflow's schema."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            tables = {name for (name,) in database.execute("select name from sqlite_master where type = 'table'")}
            revision = database.execute("select version_num from alembic_version").fetchone() if tables else None
            runs = database.execute("select count(*) from runs").fetchone()[0] if "runs" in tables else 0
    except sqlite3.OperationalError as error:
        if "no such table" not in str(error):
            yield fault("tracking", f"{path} cannot be read: {error}", "No run can be seen or tracked", NEW_DATABASE)
            return
        revision, runs = None, 0
    except sqlite3.DatabaseError as error:
        yield fault("tracking", f"{path} is damaged: {error}", "No run can be seen or tracked", NEW_DATABASE)
        return
    schema = newest_schema()
    if schema is None:
        text = f"The schema of {path} cannot be looked at: MLflow has changed in the part that tells the newest one"
        meaning = "It may have been written by another version of MLflow, or be half made"
        yield Finding("tracking", "warning", text, meaning, "Install the MLflow that segadapt is made for")
        return
    version = revision[0] if revision else None
    if version == schema.revision and schema.tables <= tables:
        return
    if not runs:
        text = f"{path} was left half made, without a run"
        advice = "--fix sets it aside; the next command makes it anew"
        repair = partial(_set_aside, path, "half-made")
        yield Finding("tracking", "fault", text, "A command was killed while it made it", advice, repair)
        return
    ours = importlib.metadata.version("mlflow")
    text = f"{path} holds {runs} runs in another schema ({version}) than MLflow {ours} has ({schema.revision})"
    upgrade = f"mlflow db upgrade {shlex.quote(database_url(path))}"
    advice = f"Use the MLflow that wrote it; or, if it is older, copy it and `{upgrade}`"
    yield fault(
        "tracking", text, "It was written by another version of MLflow, or a change of it was cut short", advice
    )


def _set_aside(path: Path, state: str) -> None:
    path.rename(path.with_name(f"{path.name}.{state}-{time.time():.0f}"))


def _send_refused(what: Examination, file: Path) -> None:
    reading_client(what.place)  # else sending would wait for long
    send_waiting(what.place, refused_too=True)
    kept = next((kept for kept in outbox.refused(file.parent.parent) if kept.file == file), None)
    if kept is not None:
        raise RuntimeError(f"MLflow still does not take {len(kept.reasons)} of them: {kept.reasons[-1][:300]}")


def _send(what: Examination, server: Path) -> None:
    reading_client(what.place)
    send_waiting(what.place)
    left = [box for box in outbox.box_contents(server) if not box.alive]
    if left:
        raise RuntimeError(f"{sum(box.waiting for box in left)} records still wait; is the server there?")


def study_findings(what: Examination) -> Iterator[Finding]:
    """Look whether Optuna's database answers."""
    file = database_file(what.place)
    lack = file_fault(file) if file is not None else None
    if file is not None and lack in ("is missing", "is empty"):  # what that means for a search, its own line tells
        yield Finding("study", "ok", f"{file} {lack}: the first search makes the database of studies")
        return
    if file is not None and lack is not None:
        drivers = Drivers.of(what.storage)
        text, meaning = f"{file} {lack}", "Searches cannot begin or go on"
        if drivers.names or drivers.starting:
            yield fault("study", text, meaning, "Put back a copy, or stop the commands that run now, then --fix")
            return
        advice = "Put back a copy; or --fix sets it aside and makes the studies anew from what Ray and MLflow hold"
        yield Finding("study", "fault", text, meaning, advice, partial(_set_aside, file, "damaged"))
        return
    shown = redacted(what.place.study_uri or what.storage.study_database)
    try:
        names = _studies(what.place.study_url)
    except UsageError as error:
        yield fault("study", str(error), "Searches cannot begin or go on", "")
    except Exception as error:  # of another version, or no database of Optuna's
        reason = first_line(error)
        text = f"{shown} cannot be used: {reason}"
        yield fault("study", text, "Searches cannot begin or go on", "Use the Optuna that made it, or a backup")
    else:
        yield Finding("study", "ok", f"{shown} answers, {names} studies")


def _studies(url: str) -> int:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return len(optuna.get_all_study_names(open_study_storage(url)))


# Cluster.


def cluster_findings(what: Examination) -> Iterator[Finding]:
    """Look whether the cluster answers, and what its nodes have and see."""
    address, named_by = what.address, "--address"
    if address is None:
        address, named_by = variable("RAY_ADDRESS"), "RAY_ADDRESS"
    if address is None:
        yield Finding("cluster", "ok", "No --address: commands start Ray on this machine, and end it with themselves")
        return
    try:
        check_address(address, named_by)
        lack = why_no_cluster(address)
    except (UsageError, ConnectionError, ValueError) as error:
        lack = str(error)
    if lack is not None:
        advice = f"Start it with `ray start --head`, or correct or unset {named_by}"
        yield fault("cluster", f"{named_by}={address}: {lack}", "No search can join it", advice)
        return
    try:
        yield from _nodes(what, address)
    except Exception as error:  # whatever Ray raises for a cluster that refuses or does not answer
        reason = first_line(error)
        meaning = "The cluster asks for a token that this machine lacks, runs another Ray, or is ending"
        advice = "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH as on the head; compare `ray --version`"
        yield fault("cluster", f"{address} refuses: {reason}", meaning, advice)


def _nodes(what: Examination, address: str) -> Iterator[Finding]:
    """Join the cluster, and have its nodes look at what they have installed and see."""
    from segadapt.platform.cluster.preflight import node_problems

    with connect(address) as capacity:
        authenticated = "with a token" if variable("RAY_AUTH_MODE") == "token" else "without a token"
        yield Finding("cluster", "ok", f"{address} answers, {authenticated}: {capacity}")
        if not what.storage.root.is_dir():
            return
        problems = node_problems(what.storage.root)
        for problem in problems:
            advice = "Install the same wheel on all nodes, and mount the storage folder there"
            yield fault("cluster", problem, "A search refuses to begin on such a cluster", advice)
        if not problems:
            yield Finding("cluster", "ok", "All nodes have the same versions as this machine, and write to the storage")
