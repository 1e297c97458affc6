"""What no event of Tune tells of trials: that they wait at a rung, or hang."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.experiment import Trial

from segadapt.platform.experiment.trial_runs import Receivers, TrialRuns
from segadapt.platform.ray_internals.trials import kill_process
from segadapt.platform.settings.reported import End, Reported
from segadapt.platform.settings.states import TrialState


def step_of(trial: Any) -> int:
    """Return the training steps that one of Tune's trials has done."""
    return Reported.from_result(trial.last_result or {}).step or 0


_LISTENED_S = 1.0
"""Between two looks, at most so many seconds count as silence: Tune reads what trials report several times a second."""


class Watch:
    """Looks at trials between Tune's events.

    A driver that stands still, or waits for a database, hears nothing whatever its trials report. So silence is not the
    time since a trial was heard, but what passed of it while the driver listened.

    Args:
        runs: Their runs.
        receivers: Where it goes that a trial waits.
        timeout_s: A trial that reports nothing for so long hangs.
        clock: Seconds from any origin.
    """

    def __init__(
        self, runs: TrialRuns, receivers: Receivers, timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._runs = runs
        self._receivers = receivers
        self._timeout_s = timeout_s
        self._clock = clock
        self._looked = clock()
        self._listened_s = 0.0
        self._heard: dict[str, float] = {}
        self._paused: set[str] = set()

    def heard(self, trial_id: str) -> None:
        """A trial gave a sign of life."""
        self._heard[trial_id] = self._listened_s

    def look(self, open_trials: Mapping[str, Any]) -> None:
        """Tell of trials that their scheduler paused or let go on, and end the processes of those that hang.

        Args:
            open_trials: Tune's trials that have not ended, by id.
        """
        now = self._clock()
        self._listened_s += min(now - self._looked, _LISTENED_S)
        self._looked = now
        for trial_id, trial in open_trials.items():
            self._follow_pause(trial_id, trial)
        for trial_id, trial in open_trials.items():
            self._end_if_hung(trial_id, trial)

    def _follow_pause(self, trial_id: str, trial: Any) -> None:
        waits = trial.status == Trial.PAUSED
        if waits == (trial_id in self._paused):
            return
        if waits:
            progress = self._receivers.progress
            self._paused.add(trial_id)
            self._receivers.ledger.stop(trial_id)
            progress.started(trial_id, self._runs.names.name(trial_id), step_of(trial))  # maybe in an earlier session
            progress.paused(trial_id)
            self._runs.note(trial_id, "paused", "The scheduler has it wait at a rung.")
        else:
            self._paused.remove(trial_id)
        self._runs.set_state(trial_id, TrialState.PAUSED if waits else TrialState.RUNNING)

    def _end_if_hung(self, trial_id: str, trial: Any) -> None:
        """Kill the process of a trial that was not heard of for too long; Tune starts it again."""
        now = self._listened_s
        if trial.status != Trial.RUNNING:
            self._heard.pop(trial_id, None)
        elif now - self._heard.setdefault(trial_id, now) > self._timeout_s:
            reason = f"hung: nothing was reported for {self._timeout_s:g} s (--trial-timeout)"
            self._runs.failures[trial_id] = Reported(end=End.FAILED, reason=reason)
            self._runs.note(trial_id, "hung", f"Killed, since it {reason}.", level="WARNING")
            self._heard[trial_id] = now
            kill_process(trial)
