"""Tune's events on their way to tracking and to the screen. Lives in the driver."""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from segadapt.platform.experiment.ledger import Ledger, Limits
from segadapt.platform.experiment.progress import Progress
from segadapt.platform.experiment.tune_state import StateKeeper
from segadapt.platform.ray_internals.trials import (
    allow_failures,
    allow_no_failure,
    forget_replaced_checkpoint,
    forgive_failure,
    kill_process,
    staging_folder,
)
from segadapt.platform.ray_internals.tune import SHORT_OF_MEMORY
from segadapt.platform.settings.objective import GOALS
from segadapt.platform.settings.states import INFEASIBLE, MlflowStatus
from segadapt.platform.storage.checkpoints import best_checkpoint, checkpoint_name
from segadapt.platform.storage.retention import CheckpointRetention
from segadapt.platform.tracking.descriptions import datasets, trial_note
from segadapt.platform.tracking.tags import (
    BEST_STEP_TAG,
    CHECKPOINT_TAG,
    DATA_TAG,
    EXPERIMENT_TAG,
    FAILURE_TAG,
    KIND_TAG,
    MEMORY_TAG,
    METHOD_TAG,
    NOT_KEPT,
    NOTE_TAG,
    OBJECTIVE_TAG,
    PREEMPTIONS_TAG,
    RESTARTS_TAG,
    ROUND_TAGS,
    SEED_TAG,
    STATE_TAG,
    TRIAL_ID_TAG,
)
from segadapt.platform.tracking.tracker import RunInfo, Tracker
from segadapt.platform.trial.environment import environment, git_tags
from segadapt.platform.trial.log import ENDED, FOLDER, STARTED, log_folder, note_by_driver
from segadapt.platform.trial.spec import TrialSpec
from segadapt.trainables.core.labelling.files import PROVENANCE
from segadapt.trainables.core.training.checkpoint import GALLERY
from segadapt.trainables.core.training.interruption import noted_preemptions

logger = logging.getLogger(__name__)

_STATUS: dict[str, MlflowStatus] = {
    "failed": "FAILED",
    "infeasible": "FAILED",
    "interrupted": "KILLED",
    "out of time": "KILLED",
    "out of GPU hours": "KILLED",
}
"""How the run of a trial in this state ends in MLflow; FINISHED otherwise."""

METRIC_PREFIXES = (
    "target_val/",
    "source_val/",
    "score/",
    "pseudo_labels/",
    "loss/",
    "time/",
    "memory/",
    "system/",
    "lr",
)
"""Reported numbers that are tracked; Tune adds bookkeeping of its own."""


@dataclass(frozen=True)
class Labels:
    """How the runs of an experiment are called and found."""

    experiment: str
    """MLflow experiment."""
    kind: str
    """What the trials are: trial, stage, rerank or finish."""
    names: Sequence[str]
    """Of the runs, where they are known beforehand; others are named after their method, `sdca-001`, `plca-002`, ..."""
    tags: Mapping[str, str]
    parent_key: str | None


class Events(tune.Callback):
    """Write trials to the tracker and show them.

    Saved with the experiment's state, so that a resumed search continues the same names and runs.
    """

    def __init__(self, spec: TrialSpec, labels: Labels) -> None:
        self._spec = spec
        self._labels = labels
        self._names: dict[str, str] = {}
        self._failures: dict[str, str] = {}
        self._ended: set[str] = set()
        self._started: set[str] = set()
        self._tracker: Tracker | None = None
        self._progress: Progress | None = None
        self._ledger: Ledger | None = None
        self._limits: Limits | None = None
        self._swept = False
        self._open: dict[str, Any] = {}
        self._numbers: dict[str, int] = {}
        self._heard: dict[str, float] = {}
        self._restarts: Counter[str] = Counter()
        self._paused: set[str] = set()
        self._described: set[str] = set()
        self._close_lost: Callable[[Collection[str]], None] | None = None
        self._keeper: CheckpointRetention | None = None
        self._states: StateKeeper | None = None
        self.interrupted: set[str] = set()
        """Trials that this session was stopped in the middle of; they can go on."""

    def attach(
        self,
        spec: TrialSpec,
        tracker: Tracker,
        progress: Progress,
        ledger: Ledger,
        limits: Limits,
        close_lost: Callable[[Collection[str]], None] | None,
        keeper: CheckpointRetention | None,
    ) -> None:
        """Connect to this session's folder, tracker, screen, accounts and end, which are not saved.

        Args:
            spec: What trials share now: the storage folder may have been moved.
            tracker: Receives runs and metrics.
            progress: Receives what is shown.
            ledger: Receives what trials cost.
            limits: That may end the search.
            close_lost: Told all trials that are known, so that the study can close the others.
            keeper: Removes checkpoints; None keeps those of all trials.
        """
        self._spec = spec
        self._keeper = keeper
        self._states = StateKeeper(self._spec.folder)
        self._close_lost = close_lost
        self._tracker = tracker
        self._progress = progress
        self._ledger = ledger
        self._limits = limits
        self._heard = {}
        self._environment = environment()

    def __getstate__(self) -> dict[str, Any]:
        gone = ("_tracker", "_progress", "_close_lost", "_ledger", "_limits", "_keeper", "_states")
        return {**self.__dict__, **dict.fromkeys(gone)}

    def get_state(self) -> dict[str, Any]:
        """Return what a resumed search must know."""
        return {
            "names": self._names,
            "failures": self._failures,
            "ended": self._ended,
            "numbers": self._numbers,
            "restarts": self._restarts,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over what an earlier session knew."""
        self._names, self._failures, self._ended = state["names"], state["failures"], state["ended"]
        self._numbers, self._restarts = state["numbers"], state["restarts"]

    def key(self, trial_id: str) -> str:
        """Return the key of a trial's run."""
        return f"{self._spec.experiment}/{trial_id}"

    def name(self, trial_id: str) -> str:
        """Return the name of a trial's run; the id of a trial that was never started."""
        return self._names.get(trial_id, trial_id)

    def number(self, trials: Sequence[Any], trial_id: str) -> int:
        """Return which proposal a trial is, from 1; Tune puts a trial that it starts again at the end of its list."""
        if trial_id not in self._numbers:
            for trial in trials:
                self._numbers.setdefault(trial.trial_id, len(self._numbers) + 1)
        return self._numbers[trial_id]

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Before anything else: close runs of trials that a killed driver started but had not yet saved."""
        assert self._tracker is not None
        assert self._progress is not None
        assert self._ledger is not None
        assert self._states is not None
        self._ledger.keep()
        if trials:
            self._states.keep(staging_folder(trials[0]))
        if not self._swept:
            self._swept = True
            known = [self.key(trial.trial_id) for trial in trials]
            self._tracker.end_lost(self._labels.experiment, self.key(""), known)
            if self._close_lost is not None:
                self._close_lost([trial.trial_id for trial in trials])
            self._open = {
                trial.trial_id: trial for trial in trials if trial.status not in (Trial.TERMINATED, Trial.ERROR)
            }
            if ended := len(trials) - len(self._open):
                self._progress.ended_before(ended)
            for trial in self._open.values():
                forget_replaced_checkpoint(trial)
                allow_failures(trial, self._spec.tolerance.max_failures)
            if self._keeper is not None:
                self._keeper.sweep()
        self._follow_pauses()
        self._end_hung()

    def _follow_pauses(self) -> None:
        """Tell of trials that their scheduler paused or let go on; Tune has no event for it."""
        assert self._tracker is not None
        assert self._ledger is not None
        assert self._progress is not None
        for trial_id, trial in self._open.items():
            waits = trial.status == Trial.PAUSED
            if waits == (trial_id in self._paused):
                continue
            if waits:
                self._paused.add(trial_id)
                self._ledger.stop(trial_id)
                self._progress.started(trial_id, self.name(trial_id), _step(trial))  # maybe in an earlier session
                self._progress.paused(trial_id)
                self._note(trial_id, "paused", "The scheduler has it wait at a rung.")
            else:
                self._paused.remove(trial_id)
            self._tracker.set_tags(self.key(trial_id), {STATE_TAG: "paused" if waits else "running"})

    def _end_hung(self) -> None:
        """Kill the process of a trial that was not heard of for too long; Tune starts it again."""
        now, timeout_s = time.monotonic(), self._spec.tolerance.timeout_s
        for trial_id, trial in self._open.items():
            if trial.status != Trial.RUNNING:
                self._heard.pop(trial_id, None)
            elif now - self._heard.setdefault(trial_id, now) > timeout_s:
                self._failures[trial_id] = f"hung: nothing was reported for {timeout_s:g} s (--trial-timeout)"
                self._note(trial_id, "hung", f"Killed, since it {self._failures[trial_id]}.", level="WARNING")
                self._heard[trial_id] = now
                kill_process(trial)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Open the run of a trial, or continue it."""
        assert self._tracker is not None
        assert self._progress is not None
        assert self._ledger is not None
        trial_id = trial.trial_id
        self._open[trial_id] = trial
        self._heard[trial_id] = time.monotonic()
        self._ledger.start(trial_id)
        number = self.number(trials, trial_id)
        if trial_id in self._started:
            self._note(trial_id, STARTED, f"{self.name(trial_id)} is started again.", name=self.name(trial_id))
            return
        self._started.add(trial_id)
        self._ended.discard(trial_id)  # a single run that failed may be tried again
        config = self._spec.config(trial.config)
        names = self._labels.names
        name = self._names.setdefault(trial_id, names[number - 1] if names else f"{config.method_name}-{number:03d}")
        tags = {
            KIND_TAG: self._labels.kind,
            METHOD_TAG: config.method_name,
            STATE_TAG: "running",
            TRIAL_ID_TAG: trial_id,
            EXPERIMENT_TAG: self._spec.experiment,
            SEED_TAG: str(config.seed),
            OBJECTIVE_TAG: str(self._spec.objective),
            **git_tags(self._environment),
            **self._labels.tags,
        }
        run = RunInfo(
            key=self.key(trial_id),
            experiment=self._labels.experiment,
            name=name,
            tags=tags,
            params=trial.config or self._spec.fixed[config.method_name],
            parent_key=self._labels.parent_key,
        )
        self._tracker.start(run)
        self._tracker.log_json(run.key, config.as_dict(), "config.yaml")
        self._tracker.log_json(run.key, self._environment, "environment.json")
        self._progress.started(trial_id, name, _step(trial))
        self._note(trial_id, STARTED, f"{name} is started.", name=name, experiment=self._spec.experiment)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Pass on an evaluation, or remember why the trial is about to fail."""
        assert self._tracker is not None
        assert self._progress is not None
        trial_id = trial.trial_id
        self._heard[trial_id] = time.monotonic()
        if "preempted" in result:
            forgive_failure(trial)
            return
        if "failure" in result:
            self._failures[trial_id] = result["failure"]
            allow_no_failure(trial)  # the code or its settings failed, not a machine: trying again would fail again
            return
        self._failures.pop(trial_id, None)
        metrics = {name: value for name, value in result.items() if name.startswith(METRIC_PREFIXES)}
        if self._labels.kind == "finish":
            metrics |= self._round(trial_id, result)
        self._tracker.log_metrics(self.key(trial_id), metrics, int(result["step"]))
        if "fingerprint" in result and trial_id not in self._described:
            self._described.add(trial_id)
            self._tracker.set_tags(self.key(trial_id), {DATA_TAG: result["fingerprint"]})
            data = self._spec.config(trial.config).data
            self._tracker.log_datasets(self.key(trial_id), datasets(data, result["fingerprint"]))
        if "checkpoint_path" in result:  # of a trial that Ray Train runs: Tune sees no checkpoint
            self._keep_gallery(trial_id, Path(result["checkpoint_path"]), int(result["step"]))
        if "memory_note" in result:
            self._tracker.set_tags(self.key(trial_id), {MEMORY_TAG: result["memory_note"]})
        self._progress.result(trial_id, int(result["step"]), result.get(self._spec.objective.leading))
        for name in ("config", *metrics):
            if name not in self._spec.objective.goals:  # Tune keeps six statistics of each number, of all trials
                result.pop(name, None)

    def _round(self, trial_id: str, result: dict[str, Any]) -> dict[str, float]:
        """Keep how the labels of a round were made, and return the metrics of its end under the round's number."""
        assert self._tracker is not None
        stage = str(result["stage"])
        number = stage.removeprefix("round_")
        if number == stage or not result["stage_finished"]:
            return {}
        content = json.loads((self._spec.artifacts(trial_id) / stage / PROVENANCE).read_text())
        self._tracker.log_json(self.key(trial_id), content, f"rounds/{number}.json")
        self._tracker.set_tags(self.key(trial_id), {f"{ROUND_TAGS}{number}.labelled_by": content["network"]})
        ends = {
            name: value for name, value in result.items() if name.startswith(("target_val/miou", "source_val/miou"))
        }
        found = {"labelled_share": content["labelled_share"], **ends}
        return {f"round/{number}/{name}": value for name, value in found.items()}

    def on_checkpoint(self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any) -> None:
        """Keep the pictures of an evaluation: its checkpoint gives way to a better one."""
        self._keep_gallery(trial.trial_id, Path(checkpoint.path), _step(trial))

    def _keep_gallery(self, trial_id: str, folder: Path, step: int) -> None:
        assert self._tracker is not None
        if (folder / GALLERY).is_file():
            self._tracker.log_gallery(self.key(trial_id), folder, step)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Stop the clock of a trial whose process died, until it is started again."""
        assert self._ledger is not None
        assert self._tracker is not None
        trial_id = trial.trial_id
        self._ledger.stop(trial_id)
        self._restarts[trial_id] += 1
        reason = self._failures.get(trial_id, _death(trial))
        number, most = self._restarts[trial_id], self._spec.tolerance.max_failures
        message = f"Restart {number} from the last checkpoint: {reason}."
        self._note(trial_id, "restart", message, level="WARNING", restarts=number, max_failures=most)
        self._tracker.set_tags(self.key(trial_id), {RESTARTS_TAG: str(self._restarts[trial_id])})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Close the run of a trial that ended or was stopped early."""
        self._end(trial.trial_id, "finished" if (trial.last_result or {}).get("finished") else "stopped early")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Close the run of a trial that failed."""
        reason = self._failures.get(trial.trial_id) or f"{_death(trial)}, too often; see Ray's error file"
        self._end(trial.trial_id, "infeasible" if reason.startswith(INFEASIBLE) else "failed", reason)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Close the runs of trials that the end of a budget or an interruption left unfinished."""
        assert self._limits is not None
        assert self._states is not None
        state = self._limits.reached() or "interrupted"
        for trial in trials:
            if trial.trial_id not in self._ended:
                if state == "interrupted":
                    self.interrupted.add(trial.trial_id)
                if trial.trial_id in self._started:
                    self._end(trial.trial_id, state)
        if trials:  # Tune has saved for the last time
            self._states.keep(staging_folder(trials[0]), at_once=True)
        if self._keeper is not None:
            self._collect()
            self._keeper.sweep()

    def _end(self, trial_id: str, state: str, failure: str | None = None) -> None:
        assert self._tracker is not None
        assert self._progress is not None
        assert self._ledger is not None
        self._ledger.stop(trial_id)
        self._open.pop(trial_id, None)
        if trial_id in self._ended:
            return
        if state != "interrupted":
            self._ended.add(trial_id)
        key = self.key(trial_id)
        self._tracker.log_summary(key, {"cost/hours": self._ledger.trial_hours(trial_id)}, 0)
        tags = {STATE_TAG: state}
        if left := noted_preemptions(self._spec.artifacts(trial_id)):
            tags[PREEMPTIONS_TAG] = str(left)
        best = best_checkpoint(self._spec.folder, trial_id, self._spec.objective.keeps)
        goals: dict[str, float] = {}
        if best is not None:
            tags[CHECKPOINT_TAG] = checkpoint_name(self._spec.storage, best.path) if best.kept else NOT_KEPT
            tags[BEST_STEP_TAG] = str(best.metrics["step"])
            known = {name: best.metrics[name] for name in GOALS if math.isfinite(best.metrics.get(name, math.nan))}
            goals = {goal: known[goal] for goal in self._spec.objective.goals if goal in known}
            kept = {f"best/{name}": value for name, value in known.items()}
            self._tracker.log_summary(key, kept, best.metrics["step"])
            if best.kept:
                self._tracker.log_evaluation(key, best.path)
        if failure is not None:
            tags[FAILURE_TAG] = failure
        step = best.metrics["step"] if best is not None else None
        tags[NOTE_TAG] = trial_note(state, goals, step, tags.get(FAILURE_TAG))
        self._tracker.set_tags(key, tags)
        self._note_end(trial_id, state, tags)
        self._tracker.end(key, _STATUS.get(state, "FINISHED"))
        self._progress.ended(trial_id, state)
        if self._keeper is not None:
            self._collect()

    def _note_end(self, trial_id: str, state: str, tags: Mapping[str, str]) -> None:
        """Finish the log of a trial, and keep it with its run as it is now."""
        assert self._tracker is not None
        reason = tags.get(FAILURE_TAG)
        message = f"{self.name(trial_id)}: {state}" + (f": {reason}" if reason else ".")
        best = tags.get(BEST_STEP_TAG)
        level = "ERROR" if reason else "INFO"
        self._note(trial_id, ENDED, message, level=level, state=state, best_step=int(best) if best else None)
        # What is appended to these files after it, by a session that goes on, may be sent as well.
        self._tracker.log_file(self.key(trial_id), log_folder(self._spec.artifacts(trial_id)), FOLDER)

    def _note(self, trial_id: str, event: str, message: str, *, level: str = "INFO", **fields: Any) -> None:
        try:
            note_by_driver(self._spec.artifacts(trial_id), trial_id, event, message, level=level, **fields)
        except OSError as error:
            logger.warning("The log of %s could not be written: %s", self.name(trial_id), error)

    def _collect(self) -> None:
        """Remove the checkpoints of ended trials that are not among the best."""
        assert self._keeper is not None
        ended = {trial_id: self.name(trial_id) for trial_id in self._ended}
        open_trials = {trial_id: self.name(trial_id) for trial_id in self._names if trial_id not in self._ended}
        self._keeper.collect(ended, open_trials, self._announce_removal)

    def _announce_removal(self, trial_id: str) -> None:
        assert self._tracker is not None
        self._tracker.set_tags(self.key(trial_id), {CHECKPOINT_TAG: NOT_KEPT})


def _step(trial: Any) -> int:
    """Return the training steps that a trial has done."""
    return int((trial.last_result or {}).get("step", 0))


def _death(trial: Any) -> str:
    """Return what is known of why a trial's process died."""
    try:
        last = Path(trial.error_file).read_text().rpartition("Failure #")[2]
    except (OSError, TypeError):  # none was written
        last = ""
    return SHORT_OF_MEMORY if SHORT_OF_MEMORY in last else "its process or node died"
