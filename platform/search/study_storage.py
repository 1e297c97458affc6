"""Optuna's storage in a database that may be away for a while."""

import functools
import inspect
import itertools
import logging
from collections.abc import Callable
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, Trial

from segadapt.platform.errors import UsageError, warn_of_change
from segadapt.platform.storage.retries import STORAGE_PATIENCE_S, retry

PRIVATE = (
    ("optuna.storages", "get_storage", "keep ended trials in memory rather than read them each time"),
    ("optuna.trial", "FrozenTrial._trial_id", "go on with a trial that an earlier session proposed"),
    ("optuna.study", "Study._storage", "read one trial of a study without reading the others"),
)
"""Parts of Optuna that are not public: module, name and what they are for."""

_MAKING_S = 30.0
"""Seconds that another command may take to make the tables of a new database."""


def open_study_storage(url: str) -> BaseStorage:
    """Connect to Optuna's storage; what is asked of it later waits while the database is away.

    Args:
        url: As SQLAlchemy takes it; SQLite and PostgreSQL are tested.

    Raises:
        UsageError: If it cannot be reached; the message leaves out the password.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return _patient(_remembering(_made_or_found(url)))
    except (SQLAlchemyError, ImportError) as error:
        try:
            shown = make_url(url).render_as_string(hide_password=True)
        except SQLAlchemyError:
            shown = "what was given"
        raise UsageError(
            "--study-uri must be a database that answers, such as postgresql+psycopg://user:password@host/name (with "
            f"`pip install segadapt[postgresql]`), but {shown} does not: {_reason(error)}"
        ) from error


def _made_or_found(url: str) -> RDBStorage:
    """Return Optuna's storage in a database; its tables are made if there are none.

    Of commands that find a new database at once, each makes what it then finds made by another.
    """
    from sqlalchemy.exc import IntegrityError, SQLAlchemyError

    def attempt() -> RDBStorage:
        try:
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        except SQLAlchemyError as error:
            if isinstance(error, IntegrityError) or "already exists" in str(error):
                raise _AlreadyMadeError("Another command makes the study's tables") from error
            raise

    try:
        return retry(attempt, _AlreadyMadeError, _MAKING_S, pauses=itertools.repeat(0.2), level=logging.DEBUG)
    except _AlreadyMadeError as error:
        raise error.__cause__ or error from None


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
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]
