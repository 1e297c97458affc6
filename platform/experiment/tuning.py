"""Experiments: one trial, or a search in which Optuna proposes, Tune runs and a scheduler stops."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from segadapt.platform.experiment.events import Events
from segadapt.platform.experiment.ledger import GpuHours, Ledger, Limits, spent_hours
from segadapt.platform.experiment.naming import Labels
from segadapt.platform.experiment.progress import Progress
from segadapt.platform.experiment.trial_runs import Receivers
from segadapt.platform.experiment.tune_state import TUNER, StateArchive, next_session, note_tuner
from segadapt.platform.ray_internals.tune import saving_as, set_tune_config, trials_of
from segadapt.platform.search.horizon import Horizon
from segadapt.platform.search.priorband import Prior
from segadapt.platform.search.samplers import SamplerName, make_sampler
from segadapt.platform.search.schedulers import SCHEDULERS
from segadapt.platform.search.searcher import ListedTrials, Proposals, StudySearch
from segadapt.platform.search.study import LOST, TRIAL_ID, Spaces, is_infeasible, values_by_step
from segadapt.platform.search.study_storage import open_study_storage, trial_handle
from segadapt.platform.search.warm_start import Inheritance
from segadapt.platform.settings.config import Values
from segadapt.platform.storage.checkpoints import TrialCheckpoint
from segadapt.platform.storage.retention import CheckpointRetention
from segadapt.platform.tracking.tracker import Tracker
from segadapt.platform.trial.launchers import run_in_process, run_with_ray_train
from segadapt.platform.trial.spec import TrialSpec
from segadapt.trainables.core.training import interruption as preemption


@dataclass(frozen=True)
class SearchPlan:
    """What a search tries, and for how long."""

    spaces: Spaces
    first: Mapping[str, Values]
    """What is tried first of each method."""
    trials: int
    """In all, those of earlier sessions included."""
    concurrent: int
    seed: int
    steps: int
    """Steps of the longest trial."""
    grace_steps: int
    """Steps before a trial may be stopped: the first rung."""
    study_url: str
    """Optuna's storage."""
    sampler: SamplerName = "auto"
    scheduler: str = "asha"
    """One of `SCHEDULERS`."""
    inherited: Sequence[Inheritance] = ()
    """What is known from earlier searches, if the study is new."""
    time_budget_s: float | None = None
    max_gpu_hours: float | None = None

    @property
    def horizon(self) -> Horizon:
        """How long its trials run."""
        return Horizon(self.grace_steps, self.steps, self.concurrent)


@dataclass(frozen=True)
class ListPlan:
    """Trials that are all known beforehand."""

    values: Sequence[Values]
    """What distinguishes each from the experiment's fixed settings."""
    concurrent: int

    @property
    def trials(self) -> int:
        """How many there are."""
        return len(self.values)


@dataclass(frozen=True)
class TrialResult:
    """How a trial of an experiment ended."""

    trial_id: str
    name: str
    """Name of its run."""
    error: str | None
    ended: bool
    """False if an interruption left it unfinished."""
    values: Values = field(compare=False)
    """What distinguishes it from the experiment's fixed settings."""
    best: TrialCheckpoint | None = field(default=None, compare=False)
    """Its best evaluation, if this session heard of all of them and it left a checkpoint that is kept."""


def run_experiment(
    spec: TrialSpec,
    labels: Labels,
    steps: int,
    tracker: Tracker,
    title: str | None,
    plan: "SearchPlan | ListPlan | None" = None,
    retention: CheckpointRetention | None = None,
) -> list[TrialResult]:
    """Run one trial, or with a `plan` a search or a list of trials; what was begun before is continued.

    Args:
        spec: What the trials share.
        labels: Names of their runs.
        steps: Steps of the longest trial.
        tracker: Receives runs and metrics.
        title: Shown on the screen, with how it goes on; None shows nothing.
        plan: The search or list; None runs a single trial.
        retention: Removes checkpoints of ended trials; None keeps them.
    """
    searcher = open_study(spec, plan) if isinstance(plan, SearchPlan) else None
    ledger = Ledger(spec.folder, spec.resources)
    receivers = Receivers(
        tracker=tracker,
        progress=Progress(title, spec.objective.leading, plan.trials if plan else 1, steps),
        ledger=ledger,
        limits=_limits(spec, plan, ledger),
        archive=StateArchive(spec.folder),
        retention=retention,
        close_lost=partial(_close_lost, searcher) if searcher is not None else None,
    )
    events = Events(spec, labels, receivers)
    Events.session, Limits.session = events, receivers.limits  # whom Tune's saved state stands for
    try:
        with saving_as(next_session(spec.folder)):
            results = _tuner(spec, plan, searcher, events, receivers.limits).fit()
    finally:
        receivers.progress.close()
        ledger.save()
    trials = trials_of(results)
    if searcher is not None and not events.interrupted:
        _close_unfinished(searcher, spec.objective.goals)
    trials = sorted(trials, key=lambda trial: events.runs.names.number(trials, trial.trial_id))
    return [_trial_result(trial, events) for trial in trials]


def _tuner(
    spec: TrialSpec,
    plan: "SearchPlan | ListPlan | None",
    searcher: StudySearch | None,
    events: Events,
    limits: Limits,
) -> Any:
    """Return what runs the trials, from where they were if they were begun."""
    from ray import tune

    trainable, config = _trainable(spec), _tune_config(spec, plan, searcher)
    if (spec.folder / TUNER).is_file():
        tuner = tune.Tuner.restore(
            str(spec.folder),
            trainable=trainable,
            resume_unfinished=True,
            resume_errored=plan is None,  # what a single run failed of may be mended; a failed trial is a result
        )
        set_tune_config(tuner, config)  # the study remembers; what was pickled may be out of date
        return tuner
    tuner = tune.Tuner(
        trainable,
        tune_config=config,
        run_config=tune.RunConfig(
            name=spec.experiment,
            storage_path=str(spec.storage.experiments),
            verbose=0,
            callbacks=[events],
            stop=limits,
            failure_config=tune.FailureConfig(max_failures=spec.tolerance.max_failures),
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=spec.objective.keeps, checkpoint_score_order="max"
            ),
        ),
    )
    note_tuner(spec.folder)
    return tuner


def _trial_result(trial: Any, events: Events) -> TrialResult:
    trial_id = trial.trial_id
    return TrialResult(
        trial_id,
        events.runs.names.name(trial_id),
        _last_line(trial) if trial.status == "ERROR" else None,
        trial_id not in events.interrupted,
        trial.config,
        events.runs.evaluations.known(trial_id),
    )


def _last_line(trial: Any) -> str:
    """Return the last line of a trial's error file, which names the error."""
    try:
        return Path(trial.error_file).read_text().strip().splitlines()[-1]
    except (OSError, IndexError, TypeError):
        return "unknown; see the trial's folder"


def _limits(spec: TrialSpec, plan: "SearchPlan | ListPlan | None", ledger: Ledger) -> Limits:
    if not isinstance(plan, SearchPlan):
        return Limits(None, None)
    hours = None
    if plan.max_gpu_hours is not None:
        stages = spent_hours(spec.storage, spec.experiment, "gpu", stages_only=True)
        hours = GpuHours(plan.max_gpu_hours, ledger, stages)
    return Limits(plan.time_budget_s, hours)


def _trainable(spec: TrialSpec) -> Any:
    from ray import tune

    resources = spec.resources
    if resources.uses_train:
        worker = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
        from segadapt.platform.ray_internals.train import bundles

        function = tune.with_parameters(run_with_ray_train, spec=spec)
        return tune.with_resources(function, tune.PlacementGroupFactory(bundles(worker, resources.workers)))
    needs = {"cpu": resources.cpus} | ({"gpu": resources.gpus} if resources.gpus else {})
    return tune.with_resources(_preemptible(tune.with_parameters(run_in_process, spec=spec)), needs)


def _preemptible(function: Any) -> Any:
    """Return Tune's class for a trial's function; its process leaves in good order when it is asked to end."""
    from ray.tune.trainable import wrap_function

    class Preemptible(wrap_function(function)):  # type: ignore[misc]
        def setup(self, config: Any) -> None:
            preemption.leave_when_terminated()
            super().setup(config)

    return Preemptible


def _tune_config(spec: TrialSpec, plan: "SearchPlan | ListPlan | None", searcher: StudySearch | None) -> Any:
    from ray import tune

    config = tune.TuneConfig(
        metric=spec.objective.keeps,
        mode="max",
        num_samples=1,
        reuse_actors=plan is not None and _may_be_reused(spec),
        trial_dirname_creator=_folder_name,
    )
    match plan:
        case SearchPlan():
            assert searcher is not None
            config.search_alg = Proposals(searcher, plan.trials, spec.storage.experiments)
            config.scheduler = SCHEDULERS[plan.scheduler].of(searcher.study, spec.objective, plan.horizon)
            config.num_samples = plan.trials
        case ListPlan():
            listed = ListedTrials(plan.values, plan.concurrent)
            config.search_alg = Proposals(listed, len(plan.values), spec.storage.experiments)
            config.num_samples = len(plan.values)
    return config


def _may_be_reused(spec: TrialSpec) -> bool:
    """Return whether the process of a trial may run another one after it."""
    if not spec.resources.uses_train:
        return True
    from segadapt.platform.ray_internals.train import workers_are_in_the_trial

    return workers_are_in_the_trial()


def _folder_name(trial: Any) -> str:
    return str(trial.trial_id)


def open_study(spec: TrialSpec, plan: SearchPlan) -> StudySearch:
    """Return the searcher of a search with its study, which has the search's name; it is made if it is new."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_study_storage(plan.study_url)
    names = optuna.get_all_study_names(storage)
    begun = (spec.folder / TUNER).is_file()
    if spec.experiment in names and not begun:
        left = optuna.load_study(study_name=spec.experiment, storage=storage)
        if left.get_trials(deepcopy=False):  # of a driver killed before its first trial
            optuna.delete_study(study_name=spec.experiment, storage=storage)
    searcher = StudySearch(
        spaces=plan.spaces,
        first=plan.first,
        objective=spec.objective,
        sampler=make_sampler(
            plan.sampler,
            seed=plan.seed,
            joint=len(plan.spaces) > 1,
            horizon=plan.horizon,
            prior=Prior.of(plan.spaces, plan.first),
            objective=spec.objective,
        ),
        seed=plan.seed,
        concurrent=plan.concurrent,
        study_name=spec.experiment,
        storage=storage,
    )
    if not begun:
        for inherited in plan.inherited:
            searcher.study.add_trials(inherited.trials)
            for point in inherited.points:
                searcher.study.enqueue_trial(point)
    return searcher


def load_study(name: str, url: str) -> Any:
    """Return the study of a search."""
    import optuna

    return optuna.load_study(study_name=name, storage=open_study_storage(url))


def _close_lost(searcher: StudySearch, known: Collection[str]) -> None:
    """Propose again what a killed driver had asked for but not yet saved, so that nobody would run it."""
    from optuna.trial import TrialState

    study = searcher.study
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.user_attrs.get(TRIAL_ID) not in known:
            trial_handle(study, trial).set_user_attr(LOST, True)
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)


def _close_unfinished(searcher: StudySearch, goals: Sequence[str]) -> None:
    """End the study's trials that nobody runs any more: pruned if they reported anything, otherwise failed."""
    from optuna.trial import TrialState

    study = searcher.study
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if TRIAL_ID not in trial.user_attrs:  # made twice, since the answer of the database was lost
            trial_handle(study, trial).set_user_attr(LOST, True)
        says_something = values_by_step(trial, goals) or is_infeasible(trial)
        study.tell(trial.number, state=TrialState.PRUNED if says_something else TrialState.FAIL)
