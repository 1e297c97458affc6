"""What trials have cost so far: the time they ran and the devices they held, kept over restarts."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, TypeAdapter
from ray import tune

from segadapt.platform.errors import UsageError
from segadapt.platform.settings.resources import Allocation
from segadapt.platform.settings.states import TrialState
from segadapt.platform.storage.files import write_whole
from segadapt.platform.storage.folders import Storage

logger = logging.getLogger(__name__)

LEDGER = "cost.json"
"""File in an experiment's folder: seconds, GPU seconds and CPU seconds of each trial."""

_UNITS = ("seconds", "gpu_seconds", "cpu_seconds")

_SAVE_EVERY_S = 5.0

_ACCOUNTS = TypeAdapter(dict[str, dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]])


class Ledger:
    """The accounts of one experiment.

    Args:
        folder: The experiment's; what earlier sessions spent is read from there.
        resources: What a trial holds while it runs in this session.
        clock: Seconds from any origin.
    """

    def __init__(self, folder: Path, resources: Allocation, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = folder / LEDGER
        self._spent = _read(self._file)
        self._rates = {
            "seconds": 1.0,
            "gpu_seconds": resources.workers * resources.gpus,
            "cpu_seconds": resources.workers * resources.cpus,
        }
        self._gpu_seconds = sum(spent["gpu_seconds"] for spent in self._spent.values())
        self._clock = clock
        self._running: dict[str, float] = {}
        self._saved = clock()

    def start(self, trial_id: str) -> None:
        """A trial runs from now on."""
        self._running.setdefault(trial_id, self._clock())

    def stop(self, trial_id: str) -> None:
        """A trial has ended or waits to be started again."""
        if trial_id in self._running:
            self._settle(trial_id)
            del self._running[trial_id]

    def keep(self) -> None:
        """Save every few seconds, so that a kill loses no more; call it often, and `save` at the end."""
        if self._clock() - self._saved >= _SAVE_EVERY_S:
            self.save()

    def trial_hours(self, trial_id: str) -> float:
        """Return the hours that a trial ran, over all sessions."""
        self._settle(trial_id)
        return self._spent.get(trial_id, {}).get("seconds", 0.0) / 3600

    def gpu_hours(self) -> float:
        """Return the GPU hours of all trials, over all sessions."""
        for trial_id in self._running:
            self._settle(trial_id)
        return self._gpu_seconds / 3600

    def _settle(self, trial_id: str) -> None:
        if trial_id not in self._running:
            return
        now = self._clock()
        spent = self._spent.setdefault(trial_id, dict.fromkeys(self._rates, 0.0))
        for unit, rate in self._rates.items():
            spent[unit] += rate * (now - self._running[trial_id])
        self._gpu_seconds += self._rates["gpu_seconds"] * (now - self._running[trial_id])
        self._running[trial_id] = now

    def save(self) -> None:
        """Write all accounts, those of running trials up to now."""
        for trial_id in self._running:
            self._settle(trial_id)
        self._saved = self._clock()
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._file, json.dumps(self._spent))
        except OSError as error:  # tried again soon: storage that is away for a while ends no search
            logger.warning("What trials have cost is not saved in %s: %s", self._file, error)


def spent_hours(storage: Storage, experiment: str, unit: str, *, stages_only: bool = False) -> float:
    """Return the hours that an experiment's trials and shared stages have held devices, as far as they are saved.

    Args:
        storage: The storage folder.
        experiment: Its name.
        unit: `gpu` or `cpu`.
        stages_only: Leave the trials out.
    """
    files = list(storage.experiments.glob(f"{experiment}.stages-*/{LEDGER}"))
    if not stages_only:
        files.append(storage.experiment(experiment) / LEDGER)
    return sum(spent[f"{unit}_seconds"] for file in files for spent in _read(file).values()) / 3600


def _read(file: Path) -> dict[str, dict[str, float]]:
    if not file.is_file():
        return {}
    try:
        accounts: dict[str, dict[str, float]] = _ACCOUNTS.validate_json(file.read_bytes())
    except ValueError as error:
        raise UsageError(
            f"{file} must hold the seconds that each trial took, but is damaged. Remove it to count from 0 again."
        ) from error
    return {trial_id: {**dict.fromkeys(_UNITS, 0.0), **spent} for trial_id, spent in accounts.items()}


class GpuHours:
    """A limit on the GPU hours of a search.

    Args:
        limit: GPU hours of all trials and shared stages, over all sessions.
        ledger: This session's accounts.
        stages: GPU hours that shared stages took.
    """

    def __init__(self, limit: float, ledger: Ledger, stages: float) -> None:
        self._limit = limit
        self._ledger = ledger
        self._stages = stages

    def spent(self) -> bool:
        """Return whether all is spent."""
        return self._stages + self._ledger.gpu_hours() >= self._limit


class Limits(tune.Stopper):
    """Ends a search, running trials included, when this session's time or the search's GPU hours are spent.

    Tune saves its stopper with a search and goes on with the saved one: an earlier session's, whose time is spent and
    whose accounts are closed. Whoever reads this one back is given the running session's instead.

    Args:
        time_budget_s: From when Tune first asks; None is without end.
        gpu_hours: None is without limit.
    """

    session: ClassVar["Limits | None"] = None
    """The limits of the experiment that this process runs."""

    def __init__(self, time_budget_s: float | None, gpu_hours: GpuHours | None) -> None:
        self._time_budget_s = time_budget_s
        self._deadline: float | None = None
        self._gpu_hours = gpu_hours

    def __reduce__(self) -> tuple[Callable[[], "Limits"], tuple[()]]:
        return _limits_of_session, ()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is stopped by itself."""
        return False

    def stop_all(self) -> bool:
        """Return whether the search ends."""
        if self._deadline is None and self._time_budget_s is not None:
            self._deadline = time.monotonic() + self._time_budget_s
        return self.reached() is not None

    def reached(self) -> TrialState | None:
        """Return the state of trials that a limit leaves unfinished; None if there is no such limit yet."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return TrialState.OUT_OF_TIME
        is_spent = self._gpu_hours is not None and self._gpu_hours.spent()
        return TrialState.OUT_OF_GPU_HOURS if is_spent else None


def _limits_of_session() -> Limits:
    return Limits.session or Limits(None, None)
