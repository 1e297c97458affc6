"""Optuna's storage in a database that may be away for a while."""

import contextlib
import functools
import inspect
import itertools
import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, Trial

from segadapt.platform.errors import UsageError, redacted, warn_of_change
from segadapt.platform.storage.folders import Place
from segadapt.platform.storage.retries import STORAGE_PATIENCE_S, retry

PRIVATE = (
    ("optuna.storages", "get_storage", "keep ended trials in memory rather than read them each time"),
    ("optuna.trial", "FrozenTrial._trial_id", "go on with a trial that an earlier session proposed"),
    ("optuna.study", "Study._storage", "read one trial of a study without reading the others"),
)
"""Parts of Optuna that are not public: module, name and what they are for."""

_MAKING_S = 30.0
"""Seconds that another command may take to make the tables of a new database."""

_CONNECT_S = 10
"""Seconds in which a database server must take a connection; without a limit a lost one is waited for minutes."""

_SERVERS = ("postgresql", "mysql", "mariadb")
"""Servers whose drivers take `connect_timeout`."""


def open_study_storage(url: str) -> BaseStorage:
    """Connect to Optuna's storage; what is asked of it later waits while the database is away.

    Args:
        url: As SQLAlchemy takes it; SQLite and PostgreSQL are tested.

    Raises:
        UsageError: If it cannot be reached; the message leaves out the password.
    """
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return _patient(_remembering(_made_or_found(url)))
    except (SQLAlchemyError, ImportError) as error:
        raise UsageError(
            "--study-uri must be a database that answers, such as postgresql+psycopg://host/name (with "
            f"`pip install segadapt[postgresql]`), but {redacted(url)} does not: {_reason(error)}"
        ) from error


def _made_or_found(url: str) -> RDBStorage:
    """Return Optuna's storage in a database; its tables are made if there are none.

    Of commands that find a new database at once, each makes what it then finds made by another.
    """
    from sqlalchemy.exc import IntegrityError, SQLAlchemyError

    def attempt() -> RDBStorage:
        try:
            return RDBStorage(url, engine_kwargs=_engine_options(url))
        except SQLAlchemyError as error:
            if isinstance(error, IntegrityError) or "already exists" in str(error):
                raise _AlreadyMadeError("Another command makes the study's tables") from error
            raise

    try:
        return retry(attempt, _AlreadyMadeError, _MAKING_S, pauses=itertools.repeat(0.2), level=logging.DEBUG)
    except _AlreadyMadeError as error:
        raise error.__cause__ or error from None


def _engine_options(url: str) -> dict[str, Any]:
    """Return how SQLAlchemy connects; a time limit in the address itself wins."""
    from sqlalchemy.engine import make_url

    address = make_url(url)
    limited = address.get_backend_name() in _SERVERS and "connect_timeout" not in address.query
    return {"pool_pre_ping": True} | ({"connect_args": {"connect_timeout": _CONNECT_S}} if limited else {})


def database_file(place: Place) -> Path | None:
    """Return the file that keeps the studies; None if a server does."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if place.study_uri is None:
        return place.folders.study_database
    try:
        address = make_url(place.study_uri)
    except ArgumentError:  # which connecting tells of
        return None
    is_file = address.get_backend_name() == "sqlite" and address.database not in (None, "", ":memory:")
    return Path(str(address.database)).absolute() if is_file else None


def file_fault(file: Path) -> str | None:
    """Return why no study can be read from a file: it is missing, empty or damaged; None if it is sound.

    The file is neither made nor changed.
    """
    try:
        if file.stat().st_size == 0:
            return "is empty"
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
            answer = str(database.execute("pragma quick_check(1)").fetchone()[0])
    except FileNotFoundError:
        return "is missing"
    except sqlite3.OperationalError:  # it is locked or may not be read: that it is damaged, nobody knows
        return None
    except sqlite3.DatabaseError as error:
        return f"is damaged ({error})"
    return None if answer == "ok" else f"is damaged ({answer.splitlines()[0]})"


def why_no_study(place: Place, name: str) -> str | None:
    """Return why the study of a search cannot be read; None if it can. No file and no study is made.

    Raises:
        UsageError: If the database does not answer.
    """
    file = database_file(place)
    if file is not None and (fault := file_fault(file)):
        return f"{file} {fault}"
    if name in optuna.get_all_study_names(open_study_storage(place.study_url)):
        return None
    return f"{file or study_database_name(place)} holds no study {name!r}"


def study_database_name(place: Place) -> str:
    """Return how the database of the studies is noted: its address without login; empty for the storage folder's."""
    from sqlalchemy.engine import URL, make_url

    if place.study_uri is None:
        return ""
    address = make_url(place.study_uri)
    where = {key: value for key, value in address.query.items() if key in ("host", "port")}  # of a socket
    return URL.create(
        address.drivername, None, None, address.host, address.port, address.database, where
    ).render_as_string()


def _remembering(storage: RDBStorage) -> BaseStorage:
    """Return a storage that reads ended trials once, or the same one, which reads them each time."""
    try:
        from optuna.storages import get_storage
    except ImportError as error:
        warn_of_change("optuna", str(error), "all trials are read from the database each time, which is slow.")
        return storage
    return get_storage(storage)


def read_trial(study: optuna.Study, trial: FrozenTrial) -> FrozenTrial:
    """Return a trial as the study's storage has it now."""
    return study._storage.get_trial(trial._trial_id)


def trial_handle(study: optuna.Study, trial: FrozenTrial) -> Trial:
    """Return what writes to a trial of the study, which an earlier session may have proposed."""
    return Trial(study, trial._trial_id)


class _AwayError(Exception):
    """A database does not answer, or takes nothing."""


class _AlreadyMadeError(Exception):
    """A table, or a row of one, was made by another process since it was looked for."""


def _patient(storage: BaseStorage) -> BaseStorage:
    """Return a storage that does what this one does, but waits while the database is restarted, full or read-only."""
    names = [name for name, _ in inspect.getmembers(BaseStorage, inspect.isfunction) if not name.startswith("_")]
    methods = {name: staticmethod(_waiting(getattr(storage, name))) for name in names}
    patient: BaseStorage = type("PatientStorage", (BaseStorage,), methods)()
    return patient


def _waiting(method: Callable[..., Any]) -> Callable[..., Any]:
    """Have a storage's method wait while its database is restarted, full or read-only."""
    from sqlalchemy.exc import OperationalError

    def attempt(*arguments: Any, **keywords: Any) -> Any:
        try:
            return method(*arguments, **keywords)
        except (OperationalError, StorageInternalError) as error:
            away = error if isinstance(error, OperationalError) else error.__cause__
            if not isinstance(away, OperationalError):
                raise
            raise _AwayError(f"The study's database does not answer: {_reason(away)}") from error

    @functools.wraps(method)
    def call(*arguments: Any, **keywords: Any) -> Any:
        return retry(lambda: attempt(*arguments, **keywords), _AwayError, STORAGE_PATIENCE_S)

    return call


def _reason(error: Exception) -> str:
    """Return the first line of what a database answered."""
    return redacted(getattr(error, "orig", None) or error).strip().splitlines()[0]
