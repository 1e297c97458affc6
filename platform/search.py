"""Experiments: one trial, or a search in which Optuna proposes, Tune runs and ASHA stops."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from segadapt.platform.config import Values
from segadapt.platform.events import Events, Labels
from segadapt.platform.ledger import GpuHours, Ledger, spent_hours
from segadapt.platform.optuna_search import LOST, Spaces, StudySearch
from segadapt.platform.progress import Progress
from segadapt.platform.rungs import StudyRungs
from segadapt.platform.tracking import Tracker
from segadapt.platform.trial import WORKER_RETRIES, TrialSpec, run_in_process, run_with_ray_train

REDUCTION_FACTOR = 2
"""ASHA keeps the better 1/REDUCTION_FACTOR of the trials that reached a rung."""


@dataclass(frozen=True)
class SearchPlan:
    """What a search tries, and for how long."""

    spaces: Spaces
    first: Mapping[str, Values]
    """What is tried first of each method."""
    trials: int
    concurrent: int
    seed: int
    steps: int
    """Steps of the longest trial."""
    grace_steps: int
    """Steps before a trial may be stopped: the first rung."""
    time_budget_s: float | None = None
    max_gpu_hours: float | None = None


@dataclass(frozen=True)
class TrialResult:
    """How a trial of an experiment ended."""

    trial_id: str
    name: str
    """Of its run."""
    error: str | None
    ended: bool
    """False if an interruption left it unfinished."""


def rungs(plan: SearchPlan) -> list[int]:
    """Return the steps at which a search compares its trials."""
    levels = [plan.grace_steps]
    while levels[-1] * REDUCTION_FACTOR < plan.steps:
        levels.append(levels[-1] * REDUCTION_FACTOR)
    return [level for level in levels if level < plan.steps]


def run_experiment(
    spec: TrialSpec,
    labels: Labels,
    steps: int,
    tracker: Tracker,
    title: str,
    plan: SearchPlan | None = None,
) -> list[TrialResult]:
    """Run one trial, or with a `plan` a search; what was begun before is continued.

    Args:
        spec: What the trials share.
        labels: Names of their runs.
        steps: Steps of the longest trial.
        tracker: Receives runs and metrics.
        title: Shown on the screen.
        plan: The search; None runs a single trial.
    """
    from ray import tune

    trainable = _trainable(spec)
    begun = (spec.folder / "tuner.pkl").is_file()
    if begun:
        tuner = tune.Tuner.restore(
            str(spec.folder),
            trainable=trainable,
            resume_unfinished=True,
            resume_errored=plan is None,  # what a single run failed of may be mended; a failed trial is a result
        )
        if plan is not None:
            _close_lost_proposals(spec)
    else:
        tuner = tune.Tuner(
            trainable,
            tune_config=_tune_config(spec, plan),
            run_config=tune.RunConfig(
                name=spec.experiment,
                storage_path=str(spec.storage.experiments),
                verbose=0,
                callbacks=[Events(spec, labels)],
                stop=GpuHours(plan.max_gpu_hours) if plan is not None and plan.max_gpu_hours is not None else None,
                failure_config=tune.FailureConfig(max_failures=WORKER_RETRIES),
                checkpoint_config=tune.CheckpointConfig(
                    num_to_keep=1, checkpoint_score_attribute=spec.objective, checkpoint_score_order="max"
                ),
            ),
        )
    progress = Progress(title, spec.objective, plan.trials if plan else 1, steps)
    events = _events(tuner)
    ledger, gpu_hours = Ledger(spec.folder, spec.resources), _gpu_hours(tuner)
    if gpu_hours is not None:
        gpu_hours.attach(ledger, spent_hours(spec.storage, spec.experiment, "gpu", stages_only=True))
    events.attach(tracker, progress, ledger, plan.time_budget_s if plan else None, gpu_hours)
    try:
        results = tuner.fit()
    finally:
        progress.close()
    trials = results._experiment_analysis.trials
    if plan is not None and not events.interrupted:
        _close_unfinished(spec)
    return [
        TrialResult(
            trial.trial_id,
            events.name(trial.trial_id),
            _last_line(trial) if trial.status == "ERROR" else None,
            trial.trial_id not in events.interrupted,
        )
        for trial in trials
    ]


def _last_line(trial: Any) -> str:
    """Return the last line of a trial's error file, which names the error."""
    try:
        return Path(trial.error_file).read_text().strip().splitlines()[-1]
    except (OSError, IndexError, TypeError):
        return "unknown; see the trial's folder"


def _events(tuner: Any) -> Events:
    callbacks = tuner._local_tuner.get_run_config().callbacks
    found: Events = next(callback for callback in callbacks if isinstance(callback, Events))
    return found


def _gpu_hours(tuner: Any) -> GpuHours | None:
    found: GpuHours | None = tuner._local_tuner.get_run_config().stop
    return found


def _trainable(spec: TrialSpec) -> Any:
    from ray import tune

    resources = spec.resources
    if resources.uses_train:
        # The driver of a nested run holds no CPU, or concurrent drivers would starve the workers they wait for.
        return tune.with_resources(
            tune.with_parameters(run_with_ray_train, spec=spec), {"node:__internal_head__": 0.001}
        )
    needs = {"cpu": resources.cpus} | ({"gpu": resources.gpus} if resources.gpus else {})
    return tune.with_resources(tune.with_parameters(run_in_process, spec=spec), needs)


def _tune_config(spec: TrialSpec, plan: SearchPlan | None) -> Any:
    from ray import tune

    def folder_name(trial: Any) -> str:
        return str(trial.trial_id)

    if plan is None:
        return tune.TuneConfig(
            metric=spec.objective, mode="max", num_samples=1, trial_dirname_creator=folder_name, reuse_actors=False
        )
    return tune.TuneConfig(
        metric=spec.objective,
        mode="max",
        search_alg=searcher(spec, plan),
        scheduler=StudyRungs(
            rungs=rungs(plan),
            reduction_factor=REDUCTION_FACTOR,
            storage=study_url(spec),
            study_name=spec.experiment,
        ),
        num_samples=plan.trials,
        max_concurrent_trials=plan.concurrent,
        time_budget_s=plan.time_budget_s,
        reuse_actors=not spec.resources.uses_train,
        trial_dirname_creator=folder_name,
    )


def searcher(spec: TrialSpec, plan: SearchPlan) -> Any:
    """Return the Optuna searcher of a search; its study lives in the storage folder under the search's name."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = study_storage(spec)
    if spec.experiment in optuna.get_all_study_names(storage):  # left by a driver killed before its first trial
        optuna.delete_study(study_name=spec.experiment, storage=storage)
    return StudySearch(
        spaces=plan.spaces,
        first=plan.first,
        metric=spec.objective,
        mode="max",
        seed=plan.seed,
        sampler=partial(
            optuna.samplers.TPESampler,
            multivariate=True,
            group=len(plan.spaces) > 1,  # a method's parameters are modelled on the trials that have them
            constant_liar=plan.concurrent > 1,
        ),
        study_name=spec.experiment,
        storage=storage,
    )


def study_url(spec: TrialSpec) -> str:
    """Return the URL of the Optuna storage of the searches in a storage folder."""
    return f"sqlite:///{spec.storage.study_database}"


def study_storage(spec: TrialSpec) -> Any:
    """Return the Optuna storage of the searches in a storage folder."""
    import optuna

    return optuna.storages.RDBStorage(study_url(spec))


def load_study(spec: TrialSpec) -> Any:
    """Return the study of a search."""
    import optuna

    return optuna.load_study(study_name=spec.experiment, storage=study_storage(spec))


def _close_lost_proposals(spec: TrialSpec) -> None:
    """Propose again what the killed driver had asked for but not yet saved, so that nobody would run it."""
    import pickle

    import optuna
    from optuna.trial import TrialState

    saved = sorted(spec.folder.glob("searcher-state-*.pkl"), key=os.path.getmtime)
    known: set[int] = set()
    if saved:
        with saved[-1].open("rb") as file:  # written by our own driver, as Ray's restore reads it too
            state = pickle.load(file)
        known = {trial.number for trial in state.get("_ot_trials", {}).values()} if isinstance(state, dict) else set()
    study = load_study(spec)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.number not in known:
            optuna.trial.Trial(study, trial._trial_id).set_user_attr(LOST, True)
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)


def _close_unfinished(spec: TrialSpec) -> None:
    """End the study's trials that nobody runs any more: pruned at what they reported, otherwise failed."""
    from optuna.trial import TrialState

    study = load_study(spec)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.PRUNED if trial.intermediate_values else TrialState.FAIL)
