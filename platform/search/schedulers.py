"""Early stopping whose memory is the study, so that its decisions survive a restart of the driver."""

import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from optuna.trial import FrozenTrial
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from segadapt.platform.ray_internals.tune import pace
from segadapt.platform.search.horizon import REDUCTION_FACTOR, Horizon
from segadapt.platform.search.study import RUNG, TRIAL_ID, decisions, record_values
from segadapt.platform.search.study_storage import read_trial, trial_handle
from segadapt.platform.settings.objective import Objective
from segadapt.platform.settings.reported import End, Reported


class StudyScheduler(FIFOScheduler):
    """Write every value to the study at its training step, and let trials run to their end.

    Args:
        study: The search's Optuna study.
        objective: What trials are compared by.
    """

    compares: ClassVar[bool] = False
    """Whether trials are compared, and stopped or paused, before they have ended."""
    one_goal: ClassVar[bool] = False
    """Whether the search must have one goal."""
    keeps_paused: ClassVar[bool] = False
    """Whether trials that wait keep their checkpoints until the search ends."""

    @classmethod
    def of(cls, study: Any, objective: Objective, horizon: Horizon) -> Self:
        """Return the scheduler of a search."""
        return cls(study, objective)

    def __init__(self, study: Any, objective: Objective) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._study = study
        self._objective = objective
        self._trials: dict[str, FrozenTrial] = {}  # as they once were

    def __getstate__(self) -> dict[str, Any]:
        # The study's address may hold a password; a resumed search makes a new one.
        return {**self.__dict__, "_study": None, "_trials": {}}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """See to it that Tune's state is not saved too often; Tune shows its controller to schedulers alone."""
        pace(tune_controller)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Record an evaluation, then decide whether the trial goes on."""
        reported = Reported.from_result(result)
        values = {goal: reported.metrics.get(goal, math.nan) for goal in self._objective.goals}
        if reported.step is None or not all(map(math.isfinite, values.values())):
            return str(self.CONTINUE)
        recorded = self._recorded(trial.trial_id)
        record_values(trial_handle(self._study, recorded), recorded, reported.step, values)
        if reported.end is End.FINISHED:
            return str(self.CONTINUE)
        return self._decide(tune_controller, trial, reported.step, values)

    def rung_of(self, step: int) -> int | None:
        """Return the rung under which the study holds what was decided at a step; None where nothing is decided."""
        return None

    def _decide(self, tune_controller: Any, trial: Any, step: int, values: Mapping[str, float]) -> str:
        return str(self.CONTINUE)

    def _recorded(self, trial_id: str) -> FrozenTrial:
        """Return what the study holds of a trial."""
        if trial_id not in self._trials:
            self._trials = {
                trial.user_attrs[TRIAL_ID]: trial
                for trial in self._study.get_trials(deepcopy=False)
                if TRIAL_ID in trial.user_attrs
            }
        return read_trial(self._study, self._trials[trial_id])


class StudyPruner(StudyScheduler):
    """Stop a trial where an Optuna pruner says so.

    Args:
        study: The search's Optuna study.
        objective: One goal.
        pruner: Decides from the study's intermediate values.
    """

    compares = True
    one_goal = True

    def __init__(self, study: Any, objective: Objective, pruner: Any) -> None:
        super().__init__(study, objective)
        self._pruner = pruner

    def rung_of(self, step: int) -> int | None:
        """Return the step itself: the pruner looks at each."""
        return step

    def _decide(self, tune_controller: Any, trial: Any, step: int, values: Mapping[str, float]) -> str:
        recorded = self._recorded(trial.trial_id)
        decision = recorded.user_attrs.get(f"{RUNG}{step}")
        if decision is None:
            decision = {"values": values, "continues": not self._pruner.prune(self._study, recorded)}
            trial_handle(self._study, recorded).set_user_attr(f"{RUNG}{step}", decision)
        return str(self.CONTINUE if decision["continues"] else self.STOP)


class MedianRule(StudyPruner):
    """Stop a trial that is worse than the median of the others at its step."""

    @classmethod
    def of(cls, study: Any, objective: Objective, horizon: Horizon) -> Self:
        """Return the scheduler of a search."""
        from optuna.pruners import MedianPruner

        return cls(study, objective, MedianPruner(n_warmup_steps=horizon.grace_steps - 1))


class Hyperband(StudyPruner):
    """Stop trials by successive halving, in brackets that begin to stop at different steps."""

    @classmethod
    def of(cls, study: Any, objective: Objective, horizon: Horizon) -> Self:
        """Return the scheduler of a search."""
        from optuna.pruners import HyperbandPruner

        return cls(study, objective, HyperbandPruner(horizon.grace_steps, horizon.steps, REDUCTION_FACTOR))


class StudyRungs(StudyScheduler):
    """Stop a trial at a rung if it lies below the best 1/REDUCTION_FACTOR of the trials there before it.

    Ray's `ASHAScheduler` decides the same, but forgets its rungs when the driver restarts. Here each decision is an
    attribute of the trial in the study: a trial that reaches a rung again after a restart is told the same again.

    Source: Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020, in the stopping variant.

    Args:
        study: The search's Optuna study.
        objective: What trials are compared by.
        rungs: Training steps at which trials are compared, rising.
    """

    compares = True

    @classmethod
    def of(cls, study: Any, objective: Objective, horizon: Horizon) -> Self:
        """Return the scheduler of a search."""
        return cls(study, objective, horizon.rungs)

    def __init__(self, study: Any, objective: Objective, rungs: Sequence[int]) -> None:
        super().__init__(study, objective)
        self._rungs = tuple(rungs)
        self._reached: defaultdict[str, list[Mapping[str, float]]] | None = None

    def rung_of(self, step: int) -> int | None:
        """Return the highest rung at or below a step."""
        return max((rung for rung in self._rungs if rung <= step), default=None)

    def _decide(self, tune_controller: Any, trial: Any, step: int, values: Mapping[str, float]) -> str:
        if (reached := self.rung_of(step)) is None:
            return str(self.CONTINUE)
        rung = f"{RUNG}{reached}"
        decision = self._recorded(trial.trial_id).user_attrs.get(rung)
        if decision is None:
            return self._arrive(tune_controller, trial, rung, values)
        return str(self.CONTINUE if decision["continues"] else self._halt(tune_controller, trial))

    def _arrive(self, tune_controller: Any, trial: Any, rung: str, values: Mapping[str, float]) -> str:
        """Compare a trial that has just reached a rung with those there before it."""
        import numpy as np

        others = self._values_at(rung)
        *before, score = self._objective.scores([*others, values])
        continues = not before or score >= float(np.percentile(before, 100 * (1 - 1 / REDUCTION_FACTOR)))
        self._set_decision(trial.trial_id, rung, values, continues=continues)
        others.append(values)
        return str(self.CONTINUE if continues else self.STOP)

    def _values_at(self, rung: str) -> list[Mapping[str, float]]:
        """Return what trials reached at a rung; the study is gone through once, since this scheduler alone decides."""
        if self._reached is None:
            self._reached = defaultdict(list)
            for trial in self._study.get_trials(deepcopy=False):
                for name, decision in trial.user_attrs.items():
                    if name.startswith(RUNG):
                        self._reached[name].append(decision["values"])
        return self._reached[rung]

    def _halt(self, tune_controller: Any, trial: Any) -> str:
        return str(self.STOP)

    def _set_decision(self, trial_id: str, rung: str, values: Mapping[str, float], *, continues: bool) -> None:
        decision = {"values": dict(values), "continues": continues}
        trial_handle(self._study, self._recorded(trial_id)).set_user_attr(rung, decision)


class PromotingRungs(StudyRungs):
    """Pause a trial at a rung until it is among the best 1/REDUCTION_FACTOR there, as later trials may make it.

    A paused trial keeps its checkpoint. Those promoted go before new ones. When nothing else is left to do, the paused
    ones are stopped; if none has run to its end by then, the best of the highest rung goes on.

    Source: Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020, Algorithm 2.

    Args:
        study: The search's Optuna study.
        objective: What trials are compared by.
        rungs: Training steps at which trials are compared, rising.
        concurrent: Trials at a time; paused ones do not count.
    """

    keeps_paused = True

    @classmethod
    def of(cls, study: Any, objective: Objective, horizon: Horizon) -> Self:
        """Return the scheduler of a search."""
        return cls(study, objective, horizon.rungs, horizon.concurrent)

    def __init__(self, study: Any, objective: Objective, rungs: Sequence[int], concurrent: int) -> None:
        super().__init__(study, objective, rungs)
        self._concurrent = concurrent
        self._promoted: deque[str] = deque()

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Keep a trial that an earlier session left at a rung waiting there."""
        super().on_trial_add(tune_controller, trial)
        if trial.status == Trial.PENDING and trial.last_result:
            by_rung = decisions(self._recorded(trial.trial_id))
            if by_rung and not by_rung[max(by_rung)]["continues"]:
                trial.set_status(Trial.PAUSED)
                tune_controller.search_alg.searcher.on_pause(trial.trial_id)

    def _arrive(self, tune_controller: Any, trial: Any, rung: str, values: Mapping[str, float]) -> str:
        others = [other for other in self._study.get_trials(deepcopy=False) if rung in other.user_attrs]
        self._set_decision(trial.trial_id, rung, values, continues=False)
        population = [*others, self._recorded(trial.trial_id)]
        scores = self._objective.scores([other.user_attrs[rung]["values"] for other in population])
        ranking = sorted(zip(scores, population, strict=True), key=lambda entry: (-entry[0], entry[1].number))
        action = self._halt(tune_controller, trial)
        for _, other in ranking[: len(population) // REDUCTION_FACTOR]:
            decision = other.user_attrs[rung]
            if not decision["continues"] and not other.state.is_finished():
                other_id = other.user_attrs[TRIAL_ID]
                self._set_decision(other_id, rung, decision["values"], continues=True)
                tune_controller.search_alg.searcher.on_unpause(other_id)
                if other_id == trial.trial_id:
                    action = str(self.CONTINUE)
                else:
                    self._promoted.append(other_id)
        return action

    def _halt(self, tune_controller: Any, trial: Any) -> str:
        tune_controller.search_alg.searcher.on_pause(trial.trial_id)
        return str(self.PAUSE)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Return a promoted trial when there is room; end the paused ones when nothing else is left."""
        live = {trial.trial_id: trial for trial in tune_controller.get_live_trials()}
        active = [trial for trial in live.values() if trial.status in (Trial.PENDING, Trial.RUNNING)]
        if len(active) < self._concurrent:
            for trial_id in self._promoted:
                if trial_id in live and live[trial_id].status == Trial.PAUSED:  # else it is still being saved
                    self._promoted.remove(trial_id)
                    return live[trial_id]
        paused = {trial_id for trial_id, trial in live.items() if trial.status == Trial.PAUSED}
        if paused and not active and not self._promoted and tune_controller.search_alg.is_finished():
            return self._conclude(tune_controller, {trial_id: live[trial_id] for trial_id in paused})
        return None

    def _conclude(self, tune_controller: Any, paused: Mapping[str, Any]) -> Any:
        """Stop the paused trials; but return the best of them if no trial has run to its end."""
        from optuna.trial import TrialState

        if not self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            waiting = [self._recorded(trial_id) for trial_id in paused]
            rung = max(max(decisions(trial)) for trial in waiting)
            highest = [trial for trial in waiting if rung in decisions(trial)]
            scores = self._objective.scores([decisions(trial)[rung]["values"] for trial in highest])
            best = highest[scores.index(max(scores))].user_attrs[TRIAL_ID]
            self._set_decision(best, f"{RUNG}{rung}", decisions(self._recorded(best))[rung]["values"], continues=True)
            tune_controller.search_alg.searcher.on_unpause(best)
            return paused[best]
        for trial in paused.values():
            tune_controller.stop_trial(trial)
        return None


SCHEDULERS: Mapping[str, type[StudyScheduler]] = {
    "asha": StudyRungs,
    "asha-promote": PromotingRungs,
    "median": MedianRule,
    "hyperband": Hyperband,
    "none": StudyScheduler,
}
"""All schedulers by name, the default first."""
