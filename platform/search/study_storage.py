"""Optuna's storage in a database that may be away for a while."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, Trial

from segadapt.platform.errors import UsageError, redacted, warn_of_change
from segadapt.platform.storage.retries import STORAGE_PATIENCE_S, retry

PRIVATE = (
    ("optuna.storages", "get_storage", "keep ended trials in memory rather than read them each time"),
    ("optuna.trial", "FrozenTrial._trial_id", "go on with a trial that an earlier session proposed"),
    ("optuna.study", "Study._storage", "read one trial of a study without reading the others"),
)
"""Parts of Optuna that are not public: module, name and what they are for."""


def open_study_storage(url: str) -> BaseStorage:
    """Connect to Optuna's storage; what is asked of it later waits while the database is away.

    Args:
        url: As SQLAlchemy takes it; SQLite and PostgreSQL are tested.

    Raises:
        UsageError: If it cannot be reached; the message leaves out the password.
    """
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return _patient(_remembering(RDBStorage(url, engine_kwargs={"pool_pre_ping": True})))
    except (SQLAlchemyError, ImportError) as error:
        raise UsageError(
            "--study-uri must be a database that answers, such as postgresql+psycopg://host/name (with "
            f"`pip install segadapt[postgresql]`), but {redacted(url)} does not: {_reason(error)}"
        ) from error


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
