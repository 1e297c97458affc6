"""The run that an experiment's trials hang under: what was asked, what came out, what it cost."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from segadapt.platform.experiment.evaluations import kept_metrics
from segadapt.platform.experiment.record import Record
from segadapt.platform.results.seeds import Reranked, verdict
from segadapt.platform.settings.states import TrialState
from segadapt.platform.storage.checkpoints import TrialCheckpoint
from segadapt.platform.storage.folders import Place
from segadapt.platform.tracking.descriptions import Reached, datasets, search_note
from segadapt.platform.tracking.tags import (
    BEST_NAME_TAG,
    BEST_TRIAL_TAG,
    DATA_NOTES_TAG,
    KIND_TAG,
    METHOD_TAG,
    NOTE_TAG,
    STATE_TAG,
)
from segadapt.platform.trial.environment import environment, git_tags
from segadapt.platform.trial.spec import TrialSpec

if TYPE_CHECKING:
    from segadapt.platform.experiment.tuning import TrialResult


_SHOWN_OTHERS = 4
"""Trials that the description of a search names beside the best."""


@dataclass(frozen=True)
class ParentRun:
    """The parent run of an experiment; its key is the experiment's name."""

    record: Record
    spec: TrialSpec
    tracker: Any
    place: Place
    """Where the experiment is kept and tracked."""

    def open(self, data_notes: Sequence[str]) -> None:
        """Open the run, or continue it.

        Args:
            data_notes: What was decided about the data.
        """
        from segadapt.platform.tracking.tracker import RunInfo
        from segadapt.trainables.core.data.datasets import load_data

        record, depended_on = self.record, environment()
        tags = {KIND_TAG: record.kind, METHOD_TAG: record.methods, STATE_TAG: str(TrialState.RUNNING)}
        tags |= git_tags(depended_on)
        if data_notes:
            tags[DATA_NOTES_TAG] = "\n".join(data_notes)  # `segadapt.data` is a trial's fingerprint
        params = {"method": record.methods, "objective": record.objective, "trials": record.trials, "seed": record.seed}
        if record.kind == "search":
            tags |= record.lineage()
            params |= {"sampler": record.sampler, "scheduler": record.scheduler}
        if len(record.candidates) == 1:
            params |= next(iter(record.candidates.values())).fixed
        self.tracker.start(RunInfo(record.name, record.name, record.name, tags, params))
        for data in dict.fromkeys(config.data for config in record.configs.values()):
            self.tracker.log_datasets(record.name, datasets(data, load_data(data)[0].fingerprint))
        configs = {name: config.as_dict() for name, config in record.configs.items()}
        self.tracker.log_json(record.name, configs, "config.yaml")
        self.tracker.log_json(record.name, depended_on, "environment.json")
        spaces = {name: candidate.as_dict() for name, candidate in record.candidates.items()}
        self.tracker.log_json(record.name, spaces, "space.yaml")

    def summarise(
        self,
        results: "Sequence[TrialResult]",
        ordered: "Mapping[TrialResult, TrialCheckpoint]",
        ranking: Sequence[Reranked],
        start: Mapping[str, float],
    ) -> bool:
        """Put the best trial and the plots on the run; returns whether there is a best one.

        Args:
            results: All trials.
            ordered: Those that left a checkpoint, each with its best one; the best trial comes first.
            ranking: The best trials as they did on other seeds, if they were trained again.
            start: Metrics of the network that all trials began from.
        """
        if ordered:
            first = next(iter(ordered))
            best = next((result for result in ordered if ranking and result.name == ranking[0].name), first)
            steps = _steps(ordered)
            self._log_best(best, ordered[best], steps)
            if self.record.kind == "search":
                others = [self._reached(trial, ordered[trial]) for trial in ordered if trial is not best]
                lead = verdict(ranking) if ranking else None
                reached, trials = self._reached(best, ordered[best]), len(results)
                note = search_note(self.record.name, reached, others[:_SHOWN_OTHERS], trials, start, lead, self.place)
                self.tracker.set_tags(self.record.name, {NOTE_TAG: note})
        if self.record.kind == "search":
            if ordered:
                kept = {trial.name: ordered[trial].metrics for trial in results if trial in ordered}
                self._log_selection(kept, steps)
            self._log_study()
        return bool(ordered)

    def _reached(self, result: "TrialResult", best: TrialCheckpoint) -> Reached:
        known = kept_metrics(best)
        goals = {goal: known[goal] for goal in self.spec.objective.goals if goal in known}
        return Reached(result.name, goals, int(best.metrics["step"]), result.values)

    def _log_best(self, result: "TrialResult", best: TrialCheckpoint, steps: int) -> None:
        """Put the best trial on the run.

        Args:
            result: The trial.
            best: Its best checkpoint.
            steps: Where the search stands.
        """
        record = self.record
        reached = {f"best/{goal}": value for goal, value in self._reached(result, best).goals.items()}
        self.tracker.log_summary(record.name, reached, steps)
        self.tracker.set_tags(record.name, {BEST_TRIAL_TAG: result.trial_id, BEST_NAME_TAG: result.name})
        if best.kept:
            self.tracker.log_file(f"{record.name}/{result.trial_id}", best.path, "checkpoint")

    def _log_study(self) -> None:
        """Put the study's plots on the run, and how the methods compare at equal budget."""
        from segadapt.platform.experiment.tuning import load_study
        from segadapt.platform.results.methods import compare_methods
        from segadapt.platform.results.plots import study_figures

        objective, key = self.spec.objective, self.record.name
        study = load_study(key, self.place.study_url)
        for name, make in study_figures(study, objective):
            self.tracker.log_figure(key, make, name)
        if compared := compare_methods(study.get_trials(deepcopy=False), objective):
            reached = {f"equal_budget/{result.method}": result.best_at_budget for result in compared}
            self.tracker.log_summary(key, {**reached, "equal_budget/steps": compared[0].budget}, compared[0].budget)
            self.tracker.log_json(key, [dataclasses.asdict(result) for result in compared], "methods.json")

    def _log_selection(self, metrics_by_trial: Mapping[str, Mapping[str, Any]], steps: int) -> None:
        """Record what label-free selection among the trials would have lost; it changes no choice."""
        from segadapt.platform.results.label_free import compare

        choices = compare(metrics_by_trial)
        regrets = {f"regret/{choice.score}": choice.regret for choice in choices}
        self.tracker.log_summary(self.record.name, regrets, steps)
        self.tracker.log_json(self.record.name, [dataclasses.asdict(choice) for choice in choices], "selection.json")

    def close(self, state: TrialState) -> None:
        """Close the run: finished, failed or interrupted."""
        from segadapt.platform.experiment.ledger import spent_hours

        unit = "gpu" if self.spec.resources.gpus > 0 else "cpu"
        hours = spent_hours(self.spec.storage, self.record.name, unit)
        # At the seconds it took: MLflow shows that of the highest step, and of equals the one of the latest clock.
        self.tracker.log_summary(self.record.name, {f"cost/{unit}_hours": hours}, round(3600 * hours))
        self.tracker.end(self.record.name, state.mlflow, {STATE_TAG: str(state)})


def _steps(ordered: "Mapping[TrialResult, TrialCheckpoint]") -> int:
    """Return a step at which a search's summary comes after those of all sessions with fewer trials.

    MLflow shows the value of the highest step, and of equals that of the latest clock.
    """
    return sum(int(best.metrics["step"]) for best in ordered.values())
