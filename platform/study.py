"""How a search is written in its Optuna study, which is its one record: any tool that reads studies can open it."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage, _CachedStorage
from optuna.storages._cached_storage import _StudyInfo
from optuna.trial import FrozenTrial

from segadapt.platform.config import Values
from segadapt.platform.errors import UsageError
from segadapt.platform.patience import patiently
from segadapt.platform.trial import METHOD, STORAGE_PATIENCE_S

SchedulerName = Literal["asha", "asha-promote", "median", "hyperband", "none"]
SCHEDULERS: tuple[SchedulerName, ...] = get_args(SchedulerName)

TRIAL_ID = "trial_id"
"""Attribute of the study's trials that names the trial in Ray, MLflow and the storage folder."""
LOST = "lost"
"""Attribute of proposals that a killed driver had asked for and nobody ran; they are proposed again."""
PRIOR = "prior"
"""Attribute of trials that were taken over from an earlier search, which it names."""

RUNG = "rung_"
"""Attributes that hold what was decided about a trial, `rung_STEP`: its values there, and whether it goes on."""
_VALUES = "values_"
"""Attributes that hold a trial's values at a step, `values_STEP`, where Optuna keeps none: with several goals."""

Spaces = Mapping[str, Mapping[str, BaseDistribution]]
"""What varies, by method and dotted key."""


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
        return patiently(lambda: attempt(*arguments, **named), _AwayError, STORAGE_PATIENCE_S)

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


def record_values(trial: Any, known: FrozenTrial, step: int, values: Mapping[str, float]) -> None:
    """Write what a trial reached at a step, once: a resumed trial repeats its last evaluations.

    Args:
        trial: The study's handle of the trial.
        known: What the study holds of it.
        step: Training steps.
        values: By goal.
    """
    if step in values_by_step(known, list(values)):
        return
    if len(values) == 1:
        trial.report(next(iter(values.values())), step)
    else:
        trial.set_user_attr(f"{_VALUES}{step}", dict(values))


def values_by_step(trial: FrozenTrial, goals: Sequence[str]) -> dict[int, Mapping[str, float]]:
    """Return what a trial reached at each step, by goal."""
    if len(goals) == 1:
        return {step: {goals[0]: value} for step, value in trial.intermediate_values.items()}
    return {
        int(name.removeprefix(_VALUES)): value for name, value in trial.user_attrs.items() if name.startswith(_VALUES)
    }


def decisions(trial: FrozenTrial) -> dict[int, Any]:
    """Return what was decided about a trial, by rung."""
    return {int(name.removeprefix(RUNG)): value for name, value in trial.user_attrs.items() if name.startswith(RUNG)}


def study_point(spaces: Spaces, method: str, values: Values) -> dict[str, Any]:
    """Return settings of a method as the study names them."""
    return choice_of(spaces, method) | {study_name(spaces, method, key): value for key, value in values.items()}


def study_name(spaces: Spaces, method: str, key: str) -> str:
    """Return what a setting is called in the study: methods of a joint search have parameters of their own."""
    return key if len(spaces) == 1 else f"{method}.{key}"


def choice_of(spaces: Spaces, method: str) -> dict[str, Any]:
    """Return a trial's choice of method; nothing where there is no choice."""
    return {METHOD: method} if len(spaces) > 1 else {}


def propose(spaces: Spaces, trial: Any) -> dict[str, Any]:
    """Return the searched values of a trial of the study: the space, as Optuna's define-by-run has it."""
    methods = list(spaces)
    method = trial.suggest_categorical(METHOD, methods) if len(methods) > 1 else methods[0]
    values = {
        key: _suggest(trial, study_name(spaces, method, key), distribution)
        for key, distribution in spaces[method].items()
    }
    return choice_of(spaces, method) | values


def _suggest(trial: Any, name: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case FloatDistribution(low=low, high=high, step=step, log=log):
            return trial.suggest_float(name, low, high, step=step, log=log)
        case IntDistribution(low=low, high=high, step=step, log=log):
            return trial.suggest_int(name, low, high, step=step, log=log)
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(name, choices)
    raise TypeError(f"A search space must hold Optuna's distributions, but {name!r} is {distribution!r}.")
