"""An experiment from its record to its end: shared stages, trials, tracking, plots. The one path of all training."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segadapt.platform.cluster.capacity import Capacity, resources_of
from segadapt.platform.cluster.connection import connect
from segadapt.platform.cluster.preflight import check_nodes, data_paths
from segadapt.platform.errors import UsageError
from segadapt.platform.experiment.naming import Labels, claim_on_servers
from segadapt.platform.experiment.parent_run import ParentRun
from segadapt.platform.experiment.record import RECORD, Options, Outcome, Record, finished_trials, save_record
from segadapt.platform.experiment.shared_stages import SharedStages
from segadapt.platform.experiment.tune_state import TUNER, is_begun, mend, of_another_version
from segadapt.platform.results.seeds import Reranked, rerank, verdict
from segadapt.platform.search.study_storage import open_study_storage, study_database_name, why_no_study
from segadapt.platform.search.warm_start import Inheritance, inherit
from segadapt.platform.settings.objective import Objective
from segadapt.platform.settings.resources import Allocation
from segadapt.platform.settings.states import TrialState
from segadapt.platform.settings.termination import signal_handlers_kept, treat_termination_as_interrupt
from segadapt.platform.storage.checkpoints import TrialCheckpoint, best_checkpoint, checkpoint_folder
from segadapt.platform.storage.files import MOUNTS, file_system, keeps_locks_apart
from segadapt.platform.storage.folders import Place, Storage
from segadapt.platform.storage.retention import CheckpointRetention
from segadapt.platform.storage.stage_keys import code_versions
from segadapt.platform.storage.stages import need_no_more
from segadapt.platform.storage.weights import store_pretrained
from segadapt.platform.tracking.tags import FROM_TAG, VERDICT_TAG
from segadapt.platform.trial.spec import TrialSpec
from segadapt.trainables.core.data.datasets import DataConfig
from segadapt.trainables.core.networks import least_images

if TYPE_CHECKING:
    from segadapt.platform.experiment.tuning import SearchPlan, TrialResult


def check_gpu_hours(record: Record, resources: Allocation) -> None:
    """Refuse a budget of GPU hours that nothing would ever spend.

    Raises:
        UsageError: If trials take no GPU.
    """
    if record.max_gpu_hours is not None and resources.gpus == 0:
        raise UsageError(
            f"--max-gpu-hours must come with trials that use GPUs, but got {record.max_gpu_hours:g} and none are used. "
            "Use --time-budget SECONDS instead."
        )


def check_version(name: str, place: Place) -> None:
    """Refuse to go on with what another version of segadapt began.

    Raises:
        UsageError: If its saved state cannot be read.
    """
    if refusal := of_another_version(place.folders, name):
        raise UsageError(refusal)


def check_workers(record: Record, workers: int) -> None:
    """Refuse batches that the workers of a trial cannot share, before a GPU is taken.

    Raises:
        UsageError: If there are any.
    """
    for config in record.configs.values():
        try:
            config.trainer.check_workers(workers, least_images(config.network.name))
        except ValueError as error:
            raise UsageError(str(error)) from error


def run(record: Record, options: Options) -> Outcome:
    """Run an experiment, or go on with it if it was begun; whoever calls is the only one that works on it.

    Raises:
        UsageError: If it cannot run as asked; nothing was started then.
    """
    from segadapt.platform.tracking.tracker import Tracker

    clock = _Clock()
    check_version(record.name, options.place)
    check_workers(record, options.resources.workers)
    if record.kind == "search":
        check_studies(record, options.place)
    storage = options.place.prepared()
    _tell_if_locks_are_apart(storage, options)
    store_pretrained((config.network for config in record.configs.values()), storage, options.say)
    if record.kind == "search":
        open_study_storage(options.place.study_url)  # answers, or nothing is begun
        record = dataclasses.replace(record, study=study_database_name(options.place))
    with (
        signal_handlers_kept(),
        contextlib.ExitStack() as ending,
        connect(options.address, verbose=options.debug, resources=options.resources) as capacity,
    ):
        tracker = Tracker(options.place)  # not before: what it imports would slow Ray's start down
        ending.callback(tracker.close)
        ending.callback(treat_termination_as_interrupt)  # as before, while what waits is sent
        resources, concurrent = resources_of(options.resources, capacity, record.trials, record.concurrent)
        check_gpu_hours(record, resources)
        if capacity.joined:
            check_nodes(storage.root, data_paths(record.configs.values()))
        if not (storage.experiment(record.name) / RECORD).is_file():
            claim_on_servers(record, options.place)
        record = save_record(record, storage)
        spec = TrialSpec(
            storage=storage,
            experiment=record.name,
            configs=record.shared_configs,
            resources=resources,
            objective=Objective.parse(record.objective),
            start=checkpoint_folder(storage, record.start) if record.start else None,
            tolerance=options.tolerance,
            code=code_versions(record.candidates),
        )
        clock.lap("start")
        failed, interrupted = _Session(record, spec, tracker, options, capacity, concurrent).run(clock)
    clock.lap("tracking")
    return Outcome(failed, interrupted, clock.seconds)


def _tell_if_locks_are_apart(storage: Storage, options: Options) -> None:
    if keeps_locks_apart(*file_system(storage.root, MOUNTS)):
        options.say(
            f"{storage.root} is mounted so that nodes do not see each other's locks: use it from this node alone, or "
            "mount it without nolock, local_lock and localflock."
        )


def check_studies(record: Record, place: Place) -> None:
    """Refuse to go on with a search whose study is gone, or to begin one with the trials of such a search.

    Raises:
        UsageError: If a study is not there; nothing was made in its place.
    """
    begun = is_begun(place.folders.experiment(record.name))
    for name in [record.name] if begun else record.warm_start:
        lack = why_no_study(place, name)
        if lack is None:
            continue
        noted = Record.load(place.folders, name).study
        if noted is not None and noted != study_database_name(place):
            advice = f"It is in {noted}: give --study-uri" if noted else "It is in the storage folder: omit --study-uri"
        else:
            advice = (
                "Put back a copy; or `segadapt doctor --fix` makes it anew from what Tune and MLflow keep of its "
                "trials: settings, values and decisions"
            )
            advice += "" if noted is not None else ". If it was made with --study-uri, give that"
        raise UsageError(f"The study of {name!r} must be there to go on from it, but {lack}. {advice}.")


def inheritances(record: Record, place: Place) -> list[Inheritance]:
    """Return what a search takes over from the earlier ones that it was asked to begin with."""
    from segadapt.platform.experiment.tuning import load_study

    inherited = []
    for name in record.warm_start:
        earlier = Record.load(place.folders, name)
        trials = load_study(name, place.study_url).get_trials(deepcopy=False)
        inherited.append(inherit(name, earlier.settings(), record.settings(), trials))
    return inherited


class _Clock:
    """Wall time of consecutive parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, part: str) -> None:
        now = time.monotonic()
        self.seconds[part] = now - self._last
        self._last = now


@dataclass(frozen=True)
class _Session:
    """One go at an experiment, with everything connected."""

    record: Record
    spec: TrialSpec
    tracker: Any
    options: Options
    capacity: Capacity
    concurrent: int

    @property
    def parent_key(self) -> str:
        """Key of the run that the experiment's trials hang under."""
        return self.record.from_key or self.record.name

    def run(self, clock: _Clock) -> tuple[int, bool]:
        """Run what is to do; returns the number of failed trials and whether some did not end."""
        notes = [*self._data_notes(), *(f"warning: {warning}" for warning in self._label_warnings())]
        for note in notes:
            self.options.say(note)
        self._mend(self.spec.folder)
        if self.record.kind == "finish":  # hangs under the trial that it continues, and starts from its checkpoint
            results = self._run_trials()
            clock.lap("trials")
            return _failed(results), _missing(results)
        parent = ParentRun(self.record, self.spec, self.tracker, self.options.place)
        parent.open(notes)
        state = TrialState.FAILED
        try:
            ready = self._shared_stages.ensure()
            clock.lap("shared stages")
            results = self._run_trials() if ready else []
            clock.lap("trials")
            missing = not ready or _missing(results)
            ranking: list[Reranked] = []
            if self.record.rerank and not missing:
                ranking, missing = self._rerank(results)
                clock.lap("rerank")
            if missing:
                state = TrialState.INTERRUPTED
            elif parent.summarise(results, self._ordered(results), ranking, self._shared_stages.start()):
                state = TrialState.FINISHED
        except KeyboardInterrupt:
            state = TrialState.INTERRUPTED
            raise
        finally:
            if state is TrialState.FINISHED:
                need_no_more(self.spec.storage, self.record.name)
            parent.close(state)
        return _failed(results), missing

    @property
    def _shared_stages(self) -> SharedStages:
        resources, _ = resources_of(self.options.resources, self.capacity, 1, 1)
        return SharedStages(self.record, self.spec, resources, self.tracker, self.options, self.parent_key)

    def _mend(self, folder: Path) -> None:
        if mended := mend(folder):
            self.options.say(mended)

    def _run_trials(self) -> "list[TrialResult]":
        from segadapt.platform.experiment.tuning import ListPlan, SearchPlan, run_experiment

        record = self.record
        self._say_if_spent()
        plan: SearchPlan | ListPlan | None = None
        finish = f"finish-{record.from_name}" + (f"-{record.number}" if record.number > 1 else "")
        names = {"search": [], "train": [record.methods], "finish": [finish]}[record.kind]
        if record.kind == "search":
            plan = self._search_plan()
        if record.kind == "finish" and record.seeds > 1:
            first = next(iter(record.configs.values())).seed
            seeds = range(first, first + record.seeds)
            names = [f"{finish}.seed-{seed}" for seed in seeds]
            plan = ListPlan([{"seed": seed} for seed in seeds], self.concurrent)
        labels = Labels(
            experiment=record.search or record.name,
            kind="finish" if record.kind == "finish" else "trial",
            names=names,
            tags={FROM_TAG: record.from_name} if record.from_name else {},
            parent_key=self.parent_key,
        )
        at_a_time = f", {self.concurrent} at a time" if record.kind == "search" else ""
        title = self._shown(f"{record.kind} {record.name} ({record.methods}{at_a_time})")
        return run_experiment(self.spec, labels, record.steps, self.tracker, title, plan, self._retention(record.name))

    def _shown(self, title: str) -> str | None:
        return None if self.options.quiet else title

    def _say_if_spent(self) -> None:
        """Say that no trial starts if the GPU hours of the search are spent."""
        from segadapt.platform.experiment.ledger import spent_hours

        limit = self.record.max_gpu_hours
        if limit is None:
            return
        spent = spent_hours(self.spec.storage, self.record.name, "gpu")
        if spent >= limit:
            self.options.say(f"--max-gpu-hours: {spent:.3g} of {limit:g} are spent; no trial starts.")

    def _search_plan(self) -> "SearchPlan":
        from segadapt.platform.experiment.tuning import SearchPlan

        record = self.record
        return SearchPlan(
            spaces={name: candidate.space for name, candidate in record.candidates.items()},
            first={name: candidate.first for name, candidate in record.candidates.items()},
            trials=record.trials,
            concurrent=self.concurrent,
            seed=record.seed,
            steps=record.steps,
            grace_steps=record.grace_steps,
            study_url=self.study_url,
            sampler=record.sampler,
            scheduler=record.scheduler,
            inherited=self._inherited(),
            time_budget_s=record.time_budget_s,
            max_gpu_hours=record.max_gpu_hours,
        )

    def _retention(self, experiment: str) -> CheckpointRetention | None:
        """Return what removes checkpoints of the search, or of its runs on other seeds; None if all are kept."""
        record, storage = self.record, self.spec.storage
        if record.keep_top is None:
            return None
        keep_top = max(record.keep_top, record.rerank)  # any of those that are trained again may turn out the best
        return CheckpointRetention(
            storage, experiment, self.spec.objective, keep_top, needed=lambda: finished_trials(storage, record.name)
        )

    @property
    def study_url(self) -> str:
        """Address of Optuna's storage."""
        return self.options.place.study_url

    def _inherited(self) -> list[Inheritance]:
        """Return what a search that is new takes over from earlier ones, and say so."""
        if (self.spec.folder / TUNER).is_file():
            return []
        inherited = inheritances(self.record, self.options.place)
        for each in inherited:
            self.options.say(str(each))
        return inherited

    @property
    def _data(self) -> list[DataConfig]:
        """The data in files that trials read."""
        return list(dict.fromkeys(config.data for config in self.record.configs.values() if config.data.source))

    def _data_notes(self) -> list[str]:
        """Return what was decided about the data, such as the classes that are trained."""
        from segadapt.trainables.core.data.datasets import load_data

        return [note for config in self._data for note in load_data(config)[0].notes]

    def _label_warnings(self) -> list[str]:
        """Return what looks wrong about the labels, of which a part is looked at."""
        from segadapt.trainables.core.data.datasets import load_data
        from segadapt.trainables.core.data.label_statistics import label_warnings

        return [warning for config in self._data for warning in label_warnings(*load_data(config))]

    def _ordered(self, results: "Sequence[TrialResult]") -> "dict[TrialResult, TrialCheckpoint]":
        """Return the trials that left a checkpoint with their best one, by the objective there, best first."""
        spec = self.spec
        reached = {}
        for result in results:
            best = result.best or best_checkpoint(spec.folder, result.trial_id, spec.objective.keeps)
            if best is not None:
                reached[result] = best
        scores = spec.objective.scores([best.metrics for best in reached.values()])
        order = sorted(zip(scores, reached, strict=True), key=lambda entry: (-entry[0], entry[1].name))
        return {result: reached[result] for _, result in order}

    def _to_train_again(self, ordered: "list[TrialResult]") -> "list[TrialResult]":
        """Return the best configurations, and the best one of the method that all others add their losses to."""
        chosen, ground = ordered[: self.record.rerank], self.record.ground
        if ground is None or any(self.spec.method(result.values) == ground for result in chosen):
            return chosen
        return chosen + [result for result in ordered if self.spec.method(result.values) == ground][:1]

    def _rerank(self, results: "list[TrialResult]") -> tuple[list[Reranked], bool]:
        """Train the best configurations again, on seeds the search has not used; returns also whether some did not end.

        Raises:
            StageFailedError: If a shared stage fails on one of the seeds.
        """
        from segadapt.platform.experiment.tuning import ListPlan, run_experiment

        record = self.record
        chosen = self._to_train_again(list(self._ordered(results)))
        runs = [(result, seed) for result in chosen for seed in record.fresh_seeds()]
        methods = dict.fromkeys(self.spec.method(result.values) for result in chosen)
        if not self._shared_stages.ensure(record.fresh_seeds(), methods):
            return [], True
        spec = dataclasses.replace(self.spec, experiment=f"{record.name}.rerank-{record.rerank}x{record.seeds}")
        labels = Labels(record.name, "rerank", [f"{result.name}.seed-{seed}" for result, seed in runs], {}, record.name)
        plan = ListPlan([{**result.values, "seed": seed} for result, seed in runs], self.concurrent)
        self._mend(spec.folder)
        title, retention = self._shown(f"rerank {record.name}"), self._retention(spec.experiment)
        again = run_experiment(spec, labels, record.steps, self.tracker, title, plan, retention)
        values: dict[str, dict[int, float]] = {}
        for (result, seed), run in zip(runs, again, strict=False):  # trials are in the order of the list
            best = run.best or best_checkpoint(spec.folder, run.trial_id, spec.objective.keeps)
            if best is not None and run.error is None:
                values.setdefault(result.name, {})[seed] = best.metrics[spec.objective.leading]
        ranking = rerank(values)
        if ranking:
            self.tracker.log_json(record.name, [dataclasses.asdict(result) for result in ranking], "rerank.json")
            self.tracker.set_tags(record.name, {VERDICT_TAG: verdict(ranking)})
        return ranking, _missing(again)


def _failed(results: "list[TrialResult]") -> int:
    return sum(result.error is not None for result in results)


def _missing(results: "list[TrialResult]") -> bool:
    return any(not result.ended for result in results)
