"""Optuna's storage in a database that may be away for a while."""

import copy
import functools
from collections.abc import Callable
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage, _CachedStorage
from optuna.storages._cached_storage import _StudyInfo
from optuna.trial import FrozenTrial

from segadapt.platform.errors import UsageError
from segadapt.platform.storage.retries import STORAGE_PATIENCE_S, retry


def open_study_storage(url: str, *, alone: bool = False) -> BaseStorage:
    """Connect to Optuna's storage; what is asked of it later waits while the database is away.

    Args:
        url: As SQLAlchemy takes it; SQLite and PostgreSQL are tested.
        alone: This process alone changes the trials of the studies that it opens, so that it need not look for changes.

    Raises:
        UsageError: If it cannot be reached; the message leaves out the password.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        kind = _OwnStorage if alone else _PatientStorage
        return kind(RDBStorage(url, engine_kwargs={"pool_pre_ping": True}))
    except (SQLAlchemyError, ImportError) as error:
        try:
            shown = make_url(url).render_as_string(hide_password=True)
        except SQLAlchemyError:
            shown = "what was given"
        raise UsageError(
            "--study-uri must be a database that answers, such as postgresql+psycopg://user:password@host/name (with "
            f"`pip install segadapt[postgresql]`), but {shown} does not: {_reason(error)}"
        ) from error


class _AwayError(Exception):
    """A database does not answer, or takes nothing."""


def _waiting(method: Callable[..., Any]) -> Callable[..., Any]:
    """Have a storage's method wait while its database is restarted, full or read-only."""
    from sqlalchemy.exc import OperationalError

    def attempt(*arguments: Any, **named: Any) -> Any:
        try:
            return method(*arguments, **named)
        except (OperationalError, StorageInternalError) as error:
            away = error if isinstance(error, OperationalError) else error.__cause__
            if not isinstance(away, OperationalError):
                raise
            raise _AwayError(f"The study's database does not answer: {_reason(away)}") from error

    @functools.wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        return retry(lambda: attempt(*arguments, **named), _AwayError, STORAGE_PATIENCE_S)

    return call


class _PatientStorage(_CachedStorage):
    """Optuna's storage in a database that may be away for a while."""


for _method in BaseStorage.__abstractmethods__:
    setattr(_PatientStorage, _method, _waiting(getattr(_CachedStorage, _method)))


class _OwnStorage(_PatientStorage):
    """A storage that reads a trial once, and again only after this process has written to it.

    Optuna's reads all unfinished trials whenever it looks at the study: with 800 at a time, that is most of a search.
    """

    def __init__(self, backend: RDBStorage) -> None:
        super().__init__(backend)
        self._written: set[int] = set()
        self._last_read: dict[int, int] = {}

    def delete_study(self, study_id: int) -> None:
        """Forget it; its number may be given to another."""
        super().delete_study(study_id)
        self._last_read.pop(study_id, None)

    @_waiting
    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return a copy of what is known of a trial: Optuna writes into what it is given."""
        if trial_id not in self._trial_id_to_study_id_and_number:
            return super().get_trial(trial_id)
        study_id, number = self._trial_id_to_study_id_and_number[trial_id]
        if trial_id in self._written:
            self._read_trials_from_remote_storage(study_id)
        return copy.deepcopy(self._studies[study_id].trials[number])

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        """Read what was written or is new."""
        with self._lock:
            self._studies.setdefault(study_id, _StudyInfo())
            written = {trial_id for trial_id in self._written if self._study_of(trial_id) in (study_id, None)}
            last = self._last_read.get(study_id, -1)
            trials = self._backend._get_trials(study_id, None, written, last)
            self._add_trials_to_cache(study_id, trials)
            self._last_read[study_id] = max([last, *(trial._trial_id for trial in trials)])
            self._written -= written

    def _study_of(self, trial_id: int) -> int | None:
        study_id, _ = self._trial_id_to_study_id_and_number.get(trial_id, (None, None))
        return study_id


def _noting(method: Callable[..., Any]) -> Callable[..., Any]:
    """Have a method that writes to a trial note that, before it does: its answer may be lost."""

    @functools.wraps(method)
    def call(storage: _OwnStorage, trial_id: int, *arguments: Any, **named: Any) -> Any:
        storage._written.add(trial_id)
        return method(storage, trial_id, *arguments, **named)

    return call


for _method in ("param", "state_values", "intermediate_value", "user_attr", "system_attr"):
    setattr(_OwnStorage, f"set_trial_{_method}", _noting(getattr(_PatientStorage, f"set_trial_{_method}")))


def _reason(error: Exception) -> str:
    """Return the first line of what a database answered."""
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]
