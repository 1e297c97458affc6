"""The runs of trials from start to end: in MLflow, in their logs, on the screen, in the accounts."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segadapt.platform.experiment.evaluations import Evaluations, end_tags, kept_metrics
from segadapt.platform.experiment.ledger import Ledger, Limits
from segadapt.platform.experiment.naming import Labels, RunNames
from segadapt.platform.experiment.progress import Progress
from segadapt.platform.experiment.tune_state import StateArchive
from segadapt.platform.settings.reported import Reported
from segadapt.platform.settings.states import TrialState
from segadapt.platform.storage.retention import CheckpointRetention
from segadapt.platform.storage.weights import weights_origin
from segadapt.platform.tracking.descriptions import datasets, weights_tags
from segadapt.platform.tracking.tags import (
    CHECKPOINT_TAG,
    DATA_TAG,
    EXPERIMENT_TAG,
    KIND_TAG,
    MEMORY_TAG,
    METHOD_TAG,
    NOT_KEPT,
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
from segadapt.platform.trial.spec import Trial, TrialSpec
from segadapt.trainables.core.labelling.files import PROVENANCE
from segadapt.trainables.core.training.checkpoint import GALLERY
from segadapt.trainables.core.training.interruption import noted_preemptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Receivers:
    """Where the events of an experiment go in one session."""

    tracker: Tracker
    progress: Progress
    ledger: Ledger
    limits: Limits
    """What may end the search."""
    archive: StateArchive
    retention: CheckpointRetention | None
    """Removes checkpoints; None keeps those of all trials."""
    close_lost: Callable[[Collection[str]], None] | None
    """Closes what the study has beside the trials that it is told; None where there is no study."""


class TrialRuns:
    """The runs of an experiment's trials.

    Args:
        spec: What trials share.
        labels: How runs are named and tagged.
        receivers: Where all of it goes.
    """

    def __init__(self, spec: TrialSpec, labels: Labels, receivers: Receivers) -> None:
        self._spec = spec
        self._labels = labels
        self._receivers = receivers
        self._tracker = receivers.tracker
        self._environment = environment()
        self._started: dict[str, Trial] = {}
        self._described: set[str] = set()
        self.names = RunNames(labels, spec.experiment)
        self.evaluations = Evaluations(spec)
        self.ended: set[str] = set()
        """Trials that have ended, in whatever session."""
        self.restarts: Counter[str] = Counter()
        """How often each trial was started again since its process or node died."""
        self.failures: dict[str, Reported] = {}
        """What each trial last reported, or is known to have died of, that has not been evaluated since."""

    def was_started(self, trial_id: str) -> bool:
        """Return whether a trial ran in this session."""
        return trial_id in self._started

    def start(self, trials: Sequence[Any], trial_id: str, values: dict[str, Any], step: int) -> None:
        """Open the run of a trial, or continue it.

        Args:
            trials: All trials, in the order in which they were proposed.
            trial_id: The one that starts.
            values: What distinguishes it.
            step: Training steps that it has done.
        """
        self._receivers.ledger.start(trial_id)
        self.names.number(trials, trial_id)
        if trial_id in self._started:
            self.evaluations.forget([trial_id])
            name = self.names.name(trial_id)
            self.note(trial_id, STARTED, f"{name} is started again.", name=name)
            return
        trial = self._started[trial_id] = self._spec.trial(trial_id, values)
        self.ended.discard(trial_id)  # a single run that failed may be tried again
        config, key = trial.config, self.names.key(trial_id)
        name = self.names.take(trials, trial_id, config.method_name)
        tags = {
            KIND_TAG: self._labels.kind,
            METHOD_TAG: config.method_name,
            STATE_TAG: str(TrialState.RUNNING),
            TRIAL_ID_TAG: trial_id,
            EXPERIMENT_TAG: self._spec.experiment,
            SEED_TAG: str(config.seed),
            OBJECTIVE_TAG: str(self._spec.objective),
            **weights_tags(weights_origin(config.network, self._spec.storage)),
            **git_tags(self._environment),
            **self._labels.tags,
        }
        params = values or self._spec.configs[config.method_name].settings
        self._tracker.start(RunInfo(key, self._labels.experiment, name, tags, params, self._labels.parent_key))
        self._tracker.log_json(key, config.as_dict(), "config.yaml")
        self._tracker.log_json(key, self._environment, "environment.json")
        self._receivers.progress.started(trial_id, name, step)
        self.note(trial_id, STARTED, f"{name} is started.", name=name, experiment=self._spec.experiment)

    def evaluated(self, trial_id: str, reported: Reported) -> set[str]:
        """Track an evaluation; returns the names of the numbers that were."""
        assert reported.step is not None
        self.failures.pop(trial_id, None)
        self.evaluations.reported(trial_id, reported)
        key, metrics = self.names.key(trial_id), dict(reported.metrics)
        if self._labels.kind == "finish":
            metrics |= self._round(trial_id, reported)
        self._tracker.log_metrics(key, metrics, reported.step)
        if reported.fingerprint is not None and trial_id not in self._described:
            self._described.add(trial_id)
            self._tracker.set_tags(key, {DATA_TAG: reported.fingerprint})
            data = self._started[trial_id].config.data
            self._tracker.log_datasets(key, datasets(data, reported.fingerprint))
        if reported.checkpoint is not None:
            self.keep_gallery(trial_id, reported.checkpoint, reported.step)
        if reported.memory_note is not None:
            self._tracker.set_tags(key, {MEMORY_TAG: reported.memory_note})
        self._receivers.progress.result(trial_id, reported.step, reported.metrics.get(self._spec.objective.leading))
        return set(metrics)

    def _round(self, trial_id: str, reported: Reported) -> dict[str, float]:
        """Keep how the labels of a round were made, and return the metrics of its end under the round's number."""
        stage = str(reported.stage)
        number = stage.removeprefix("round_")
        if number == stage or not reported.stage_finished:
            return {}
        provenance = json.loads((self._spec.artifacts(trial_id) / stage / PROVENANCE).read_text())
        key = self.names.key(trial_id)
        self._tracker.log_json(key, provenance, f"rounds/{number}.json")
        self._tracker.set_tags(key, {f"{ROUND_TAGS}{number}.labelled_by": provenance["network"]})
        reached = {
            name: value
            for name, value in reported.metrics.items()
            if name.startswith(("target_val/miou", "source_val/miou"))
        }
        summary = {"labelled_share": provenance["labelled_share"], **reached}
        return {f"round/{number}/{name}": value for name, value in summary.items()}

    def keep_gallery(self, trial_id: str, folder: Path, step: int) -> None:
        """Keep the pictures of an evaluation: its checkpoint gives way to a better one."""
        if (folder / GALLERY).is_file():
            self._tracker.log_gallery(self.names.key(trial_id), folder, step)

    def restarted(self, trial_id: str, reason: str) -> None:
        """Stop the clock of a trial whose process died, until it is started again."""
        self._receivers.ledger.stop(trial_id)
        self.restarts[trial_id] += 1
        if trial_id in self.failures:
            reason = str(self.failures[trial_id].failure)
        number, most = self.restarts[trial_id], self._spec.tolerance.max_failures
        message = f"Restart {number} from the last checkpoint: {reason}."
        self.note(trial_id, "restart", message, level="WARNING", restarts=number, max_failures=most)
        self._tracker.set_tags(self.names.key(trial_id), {RESTARTS_TAG: str(number)})

    def set_state(self, trial_id: str, state: TrialState) -> None:
        """Say how a trial stands that has not ended."""
        self._tracker.set_tags(self.names.key(trial_id), {STATE_TAG: str(state)})

    def end(self, trial_id: str, state: TrialState, failure: str | None = None) -> None:
        """Close the run of a trial; of one that was interrupted, until it goes on."""
        self._receivers.ledger.stop(trial_id)
        if trial_id in self.ended:
            return
        if state is not TrialState.INTERRUPTED:
            self.ended.add(trial_id)
        key = self.names.key(trial_id)
        hours = self._receivers.ledger.trial_hours(trial_id)
        self._tracker.log_summary(key, {"cost/hours": hours}, round(3600 * hours))  # of the last session, by no clock
        best = self.evaluations.best(trial_id)
        tags = end_tags(self._spec.storage, state, best, self._spec.objective, failure)
        if preemptions := noted_preemptions(self._spec.artifacts(trial_id)):
            tags[PREEMPTIONS_TAG] = str(preemptions)
        if best is not None:
            reached = {f"best/{goal}": value for goal, value in kept_metrics(best).items()}
            self._tracker.log_summary(key, reached, best.metrics["step"])
            if best.kept:
                self._tracker.log_evaluation(key, best.path)
        self._note_end(trial_id, state, failure, best.metrics["step"] if best is not None else None)
        self._tracker.end(key, state.mlflow, tags)
        self._receivers.progress.ended(trial_id, state)
        self.remove_checkpoints()

    def _note_end(self, trial_id: str, state: TrialState, failure: str | None, best_step: int | None) -> None:
        """Finish the log of a trial, and keep it with its run as it is now."""
        message = f"{self.names.name(trial_id)}: {state}" + (f": {failure}" if failure else ".")
        level = "ERROR" if failure else "INFO"
        self.note(trial_id, ENDED, message, level=level, state=str(state), best_step=best_step)
        # What is appended to these files after it, by a session that goes on, may be sent as well.
        self._tracker.log_file(self.names.key(trial_id), log_folder(self._spec.artifacts(trial_id)), FOLDER)

    def note(self, trial_id: str, event: str, message: str, *, level: str = "INFO", **fields: Any) -> None:
        """Write to a trial's log what its own processes cannot know."""
        try:
            note_by_driver(self._spec.artifacts(trial_id), trial_id, event, message, level=level, **fields)
        except OSError as error:
            logger.warning("The log of %s could not be written: %s", self.names.name(trial_id), error)

    def remove_checkpoints(self) -> None:
        """Remove the checkpoints of ended trials that are not among the best, unless all are kept."""
        if self._receivers.retention is None:
            return
        ended = {trial_id: self.names.name(trial_id) for trial_id in self.ended}
        waiting = {trial_id: name for trial_id, name in self.names.names.items() if trial_id not in self.ended}
        self._receivers.retention.collect(ended, waiting, self._announce_removal, self.evaluations.best)

    def _announce_removal(self, trial_id: str) -> None:
        self._tracker.set_tags(self.names.key(trial_id), {CHECKPOINT_TAG: NOT_KEPT})
