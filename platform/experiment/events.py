"""Tune's events on their way to tracking and to the screen. Lives in the driver."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from ray import tune
from ray.tune.experiment import Trial

from segadapt.platform.experiment.naming import Labels
from segadapt.platform.experiment.trial_runs import Receivers, TrialRuns
from segadapt.platform.experiment.watch import Watch, step_of
from segadapt.platform.ray_internals.trials import (
    allow_failures,
    allow_no_failure,
    forget_replaced_checkpoint,
    forgive_failure,
    staging_folder,
)
from segadapt.platform.ray_internals.tune import SHORT_OF_MEMORY
from segadapt.platform.settings.reported import End, Reported
from segadapt.platform.settings.states import TrialState
from segadapt.platform.trial.spec import TrialSpec


class Events(tune.Callback):
    """Write trials to the tracker and show them.

    Tune saves its callbacks with an experiment and goes on with the saved ones. Whoever reads this one back is given
    the running session's instead, which then takes over the state that Tune saved of it.

    Args:
        spec: What trials share.
        labels: How their runs are named and tagged.
        receivers: Where events go.
    """

    session: ClassVar["Events | None"] = None
    """The events of the experiment that this process runs."""

    def __init__(self, spec: TrialSpec, labels: Labels, receivers: Receivers) -> None:
        self._spec = spec
        self._labels = labels
        self._receivers = receivers
        self._swept = False
        self._open: dict[str, Any] = {}
        self.runs = TrialRuns(spec, labels, receivers)
        self._watch = Watch(self.runs, receivers, spec.tolerance.timeout_s)
        self.interrupted: set[str] = set()
        """Trials that this session was stopped in the middle of; they can go on."""

    def __reduce__(self) -> tuple[Callable[[], "Events"], tuple[()]]:
        return events_of_session, ()

    def get_state(self) -> dict[str, Any]:
        """Return what a resumed search must know, in plain values."""
        runs = self.runs
        return {
            "names": runs.names.names,
            "numbers": runs.names.numbers,
            "failures": {trial_id: reported.as_result() for trial_id, reported in runs.failures.items()},
            "ended": runs.ended,
            "restarts": dict(runs.restarts),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over what an earlier session knew."""
        runs = self.runs
        runs.names.names, runs.names.numbers = state["names"], state["numbers"]
        runs.failures = {trial_id: Reported.from_result(result) for trial_id, result in state["failures"].items()}
        runs.ended, runs.restarts = state["ended"], Counter(state["restarts"])

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Before anything else: close runs of trials that a killed driver started but had not yet saved."""
        self._receivers.ledger.keep()
        if trials:
            self._receivers.archive.keep(staging_folder(trials[0]))
        if not self._swept:
            self._swept = True
            self._sweep(trials)
        self._watch.look(self._open)
        self._receivers.progress.beat()

    def _sweep(self, trials: list[Any]) -> None:
        """Clear up after earlier sessions, and take over their trials."""
        trial_ids = [trial.trial_id for trial in trials]
        names = self.runs.names
        self._receivers.tracker.end_lost(
            self._labels.experiment, names.key(""), [names.key(each) for each in trial_ids]
        )
        if self._receivers.close_lost is not None:
            self._receivers.close_lost(trial_ids)
        self.runs.evaluations.forget(trial_ids)
        self._open = {trial.trial_id: trial for trial in trials if trial.status not in (Trial.TERMINATED, Trial.ERROR)}
        if ended := len(trials) - len(self._open):
            self._receivers.progress.ended_before(ended)
        leading = self._spec.objective.leading
        for trial in trials:
            if (reached := trial.metric_analysis.get(leading)) is not None:
                self._receivers.progress.reached_before(names.name(trial.trial_id), reached["max"])
        for trial in self._open.values():
            forget_replaced_checkpoint(trial)
            allow_failures(trial, self._spec.tolerance.max_failures)
        if self._receivers.retention is not None:
            self._receivers.retention.sweep()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Open the run of a trial, or continue it."""
        self._open[trial.trial_id] = trial
        self._watch.heard(trial.trial_id)
        self.runs.start(trials, trial.trial_id, trial.config, step_of(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Pass on an evaluation, or remember why the trial is about to fail."""
        self._watch.heard(trial.trial_id)
        reported = Reported.from_result(result)
        if reported.end is End.PREEMPTED:
            forgive_failure(trial)
            return
        if reported.failure is not None:
            self.runs.failures[trial.trial_id] = reported
            allow_no_failure(trial)  # the code or its settings failed, not a machine: trying again would fail again
            return
        for name in ("config", *self.runs.evaluated(trial.trial_id, reported)):
            if name not in self._spec.objective.goals:  # Tune keeps six statistics of each number, of all trials
                result.pop(name, None)

    def on_checkpoint(self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any) -> None:
        """Keep the pictures of an evaluation: its checkpoint gives way to a better one."""
        folder = Path(checkpoint.path)
        self.runs.evaluations.kept(trial.trial_id, folder)
        self.runs.keep_gallery(trial.trial_id, folder, step_of(trial))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Stop the clock of a trial whose process died, until it is started again."""
        self.runs.restarted(trial.trial_id, _death(trial))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Close the run of a trial that ended or was stopped early."""
        is_finished = Reported.from_result(trial.last_result or {}).end is End.FINISHED
        self._end(trial.trial_id, TrialState.FINISHED if is_finished else TrialState.STOPPED_EARLY)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Close the run of a trial that failed."""
        reported = self.runs.failures.get(trial.trial_id)
        if reported is None:
            reported = Reported(end=End.FAILED, reason=f"{_death(trial)}, too often; see Ray's error file")
        is_infeasible = reported.end is End.INFEASIBLE
        self._end(trial.trial_id, TrialState.INFEASIBLE if is_infeasible else TrialState.FAILED, reported.failure)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Close the runs of trials that the end of a budget or an interruption left unfinished."""
        state = self._receivers.limits.reached() or TrialState.INTERRUPTED
        for trial in trials:
            if trial.trial_id not in self.runs.ended:
                if state is TrialState.INTERRUPTED:
                    self.interrupted.add(trial.trial_id)
                if self.runs.was_started(trial.trial_id):
                    self._end(trial.trial_id, state)
        if trials:  # Tune has saved for the last time
            self._receivers.archive.keep(staging_folder(trials[0]), at_once=True)
        if self._receivers.retention is not None:
            self.runs.remove_checkpoints()
            self._receivers.retention.sweep()

    def _end(self, trial_id: str, state: TrialState, failure: str | None = None) -> None:
        self._open.pop(trial_id, None)
        self.runs.end(trial_id, state, failure)


def events_of_session() -> Events:
    """Return the events of the running session, in place of those that Tune saved in an earlier one."""
    if Events.session is None:
        raise RuntimeError("What Tune saved of an experiment must be read where that experiment runs, but none does.")
    return Events.session


def _death(trial: Any) -> str:
    """Return what is known of why a trial's process died."""
    try:
        last = Path(trial.error_file).read_text().rpartition("Failure #")[2]
    except (OSError, TypeError):  # none was written
        last = ""
    return SHORT_OF_MEMORY if SHORT_OF_MEMORY in last else "its process or node died"
