"""An experiment from its record to its end: shared stages, trials, tracking, plots. The one path of all training."""

import contextlib
import dataclasses
import itertools
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segadapt.platform.cluster.capacity import Capacity, resources_of
from segadapt.platform.cluster.connection import connect, signal_handlers_kept, treat_termination_as_interrupt
from segadapt.platform.cluster.preflight import check_nodes, data_paths
from segadapt.platform.errors import UsageError
from segadapt.platform.experiment.record import BEGUN, Options, Outcome, Record, finished_trials, save_record
from segadapt.platform.experiment.tune_state import TUNER, mend
from segadapt.platform.results.seeds import Reranked, rerank, verdict
from segadapt.platform.search.study_storage import open_study_storage
from segadapt.platform.search.warm_start import Inheritance, inherit
from segadapt.platform.settings.objective import Objective
from segadapt.platform.settings.resources import Allocation
from segadapt.platform.storage.checkpoints import (
    TrialCheckpoint,
    best_checkpoint,
    checkpoint_folder,
    iou_table,
    read_metrics,
)
from segadapt.platform.storage.files import write_whole
from segadapt.platform.storage.retention import CheckpointRetention
from segadapt.platform.storage.stage_keys import StageKey, code_versions, own_steps, stage_experiment, stage_keys
from segadapt.platform.storage.stages import (
    describe,
    longest_prefix,
    mark_used,
    need,
    need_no_more,
    put_damaged_aside,
    turn_to_compute,
)
from segadapt.platform.tracking.descriptions import datasets, search_note
from segadapt.platform.tracking.tags import (
    BEST_NAME_TAG,
    BEST_TRIAL_TAG,
    CACHE_TAGS,
    DATA_NOTES_TAG,
    FROM_TAG,
    KIND_TAG,
    METHOD_TAG,
    NOTE_TAG,
    STAGE_TAGS,
    STATE_TAG,
    VERDICT_TAG,
)
from segadapt.platform.trial.environment import environment, git_tags
from segadapt.platform.trial.spec import TrialSpec
from segadapt.trainables.core.training.checkpoint import GALLERY
from segadapt.trainables.core.training.config import stage_steps

if TYPE_CHECKING:
    from segadapt.platform.experiment.tuning import TrialResult


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


def run(record: Record, options: Options) -> Outcome:
    """Run an experiment, or go on with it if it was begun.

    Raises:
        UsageError: If it cannot run as asked; nothing was started then.
    """
    from segadapt.platform.tracking.tracker import Tracker

    clock = _Clock()
    storage = options.place.prepared()
    if record.kind == "search":
        open_study_storage(options.place.study_url)  # answers, or nothing is begun
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
            check_nodes(storage.root, data_paths(record.configs().values()))
        record = save_record(record, storage)
        spec = TrialSpec(
            storage=storage,
            experiment=record.name,
            fixed={name: found.fixed for name, found in record.candidates.items()},
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
        for note in self._data_notes():
            self.options.say(note)
        self._mend(self.spec.folder)
        if self.record.kind == "finish":  # hangs under the trial that it continues, and starts from its checkpoint
            results = self._run_trials()
            clock.lap("trials")
            return _failed(results), _missing(results)
        self._open_parent()
        state = "failed"
        try:
            ready = self._ensure_shared_stages()
            clock.lap("shared stages")
            results = self._run_trials() if ready else []
            clock.lap("trials")
            missing = not ready or _missing(results)
            ranking: list[Reranked] = []
            if self.record.rerank and not missing:
                ranking, missing = self._rerank(results)
                clock.lap("rerank")
            state = "interrupted" if missing else "finished" if self._summarise(results, ranking) else "failed"
        except KeyboardInterrupt:
            state = "interrupted"
            raise
        finally:
            self._close_parent(state)
        return _failed(results), missing

    def _mend(self, folder: Path) -> None:
        if done := mend(folder):
            self.options.say(done)

    def _run_trials(self) -> "list[TrialResult]":
        from segadapt.platform.experiment.events import Labels
        from segadapt.platform.experiment.ledger import spent_hours
        from segadapt.platform.experiment.tuning import ListPlan, SearchPlan, run_experiment

        record = self.record
        configs = record.configs().values()
        steps = max(own_steps(config) for config in configs)
        plan: SearchPlan | ListPlan | None = None
        if record.max_gpu_hours is not None:
            spent = spent_hours(self.spec.storage, record.name, "gpu")
            if spent >= record.max_gpu_hours:
                self.options.say(
                    f"--max-gpu-hours: {spent:.3g} of {record.max_gpu_hours:g} are spent; no trial starts."
                )
        if record.kind == "search":
            plan = SearchPlan(
                spaces={name: found.space for name, found in record.candidates.items()},
                first={name: found.first for name, found in record.candidates.items()},
                trials=record.trials,
                concurrent=self.concurrent,
                seed=record.seed,
                steps=steps,
                grace_steps=min(steps, *(config.trainer.eval_every for config in configs)),
                study_url=self.study_url,
                sampler=record.sampler,
                scheduler=record.scheduler,
                inherited=self._inherited(),
                time_budget_s=record.time_budget_s,
                max_gpu_hours=record.max_gpu_hours,
            )
        finish = f"finish-{record.from_name}" + (f"-{record.number}" if record.number > 1 else "")
        names = {"search": [], "train": [record.methods], "finish": [finish]}[record.kind]
        if record.kind == "finish" and record.seeds > 1:
            first = next(iter(configs)).seed
            values = [{"seed": seed} for seed in range(first, first + record.seeds)]
            names = [f"{finish}.seed-{found['seed']}" for found in values]
            plan = ListPlan(values, self.concurrent)
        labels = Labels(
            experiment=record.search or record.name,
            kind="finish" if record.kind == "finish" else "trial",
            names=names,
            tags={FROM_TAG: record.from_name} if record.from_name else {},
            parent_key=self.parent_key,
        )
        title = f"{record.kind} {record.name} ({record.methods}"
        title += f", {self.concurrent} at a time)" if record.kind == "search" else ")"
        return run_experiment(self.spec, labels, steps, self.tracker, title, plan, self._keeper(record.name))

    def _keeper(self, experiment: str) -> CheckpointRetention | None:
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
        from segadapt.platform.experiment.tuning import load_study

        if (self.spec.folder / TUNER).is_file():
            return []
        found = []
        for name in self.record.warm_start:
            earlier = Record.load(self.spec.storage, name)
            study = load_study(name, self.study_url)
            found.append(inherit(name, earlier.settings(), self.record.settings(), study.get_trials(deepcopy=False)))
            self.options.say(str(found[-1]))
        return found

    def _data_notes(self) -> list[str]:
        """Return what was decided about the data, such as the classes that are trained."""
        from segadapt.trainables.core.data.datasets import load_data

        configs = {config.data: None for config in self.record.configs().values() if config.data.source is not None}
        return [note for config in configs for note in load_data(config)[0].notes]

    def _open_parent(self) -> None:
        from segadapt.platform.tracking.tracker import RunInfo
        from segadapt.trainables.core.data.datasets import load_data

        record, found = self.record, environment()
        tags = {KIND_TAG: record.kind, METHOD_TAG: record.methods, STATE_TAG: "running", **git_tags(found)}
        if notes := self._data_notes():
            tags[DATA_NOTES_TAG] = "\n".join(notes)
        params = {"method": record.methods, "objective": record.objective, "trials": record.trials, "seed": record.seed}
        if record.kind == "search":
            tags |= record.lineage()
            params |= {"sampler": record.sampler, "scheduler": record.scheduler}
        if len(record.candidates) == 1:
            params |= next(iter(record.candidates.values())).fixed
        self.tracker.start(RunInfo(record.name, record.name, record.name, tags, params))
        for data in dict.fromkeys(config.data for config in record.configs().values()):
            self.tracker.log_datasets(record.name, datasets(data, load_data(data)[0].fingerprint))
        configs = {name: config.as_dict() for name, config in record.configs().items()}
        self.tracker.log_json(record.name, configs, "config.yaml")
        self.tracker.log_json(record.name, found, "environment.json")
        spaces = {name: candidate.as_dict() for name, candidate in record.candidates.items()}
        self.tracker.log_json(record.name, spaces, "space.yaml")

    def _summarise(self, results: "list[TrialResult]", ranking: Sequence[Reranked]) -> bool:
        """Put the best trial and the plots on the parent run; returns whether there is a best one."""
        record = self.record
        found = self._kept(results)
        if found:
            order = self._by_objective(found)
            winner = next((result for result in order if ranking and result.name == ranking[0].name), order[0])
            best = found[winner]
            goals = {goal: best.metrics[goal] for goal in self.spec.objective.goals if goal in best.metrics}
            values = {f"best/{goal}": value for goal, value in goals.items()}
            self.tracker.log_summary(record.name, values, best.metrics["step"])
            told = verdict(ranking) if ranking else None
            note = search_note(record.name, winner.name, goals, best.metrics["step"], len(results), told)
            tags = {BEST_TRIAL_TAG: winner.trial_id, BEST_NAME_TAG: winner.name}
            self.tracker.set_tags(record.name, tags | ({NOTE_TAG: note} if record.kind == "search" else {}))
            if best.kept:
                self.tracker.log_file(f"{record.name}/{winner.trial_id}", best.path, "checkpoint")
        if record.kind == "search":
            if found:
                self._log_selection({result.name: checkpoint.metrics for result, checkpoint in found.items()})
            self._log_study()
        return bool(found)

    def _kept(self, results: "list[TrialResult]") -> "dict[TrialResult, TrialCheckpoint]":
        """Return the trials that left a checkpoint."""
        return {result: best for result in results if (best := self._best(result.trial_id)) is not None}

    def _by_objective(self, found: "Mapping[TrialResult, TrialCheckpoint]") -> "list[TrialResult]":
        """Return trials by the objective at their kept checkpoint, best first."""
        scores = self.spec.objective.scores([checkpoint.metrics for checkpoint in found.values()])
        order = sorted(zip(scores, found, strict=True), key=lambda entry: (-entry[0], entry[1].name))
        return [result for _, result in order]

    def _rerank(self, results: "list[TrialResult]") -> tuple[list[Reranked], bool]:
        """Train the best configurations again, on seeds the search has not used; returns also whether some did not end.

        Raises:
            StageFailedError: If a shared stage fails on one of the seeds.
        """
        from segadapt.platform.experiment.events import Labels
        from segadapt.platform.experiment.tuning import ListPlan, run_experiment

        record = self.record
        chosen = self._by_objective(self._kept(results))[: record.rerank]
        runs = [(result, seed) for result in chosen for seed in record.fresh_seeds()]
        methods = dict.fromkeys(self.spec.method(result.values) for result in chosen)
        if not self._ensure_shared_stages(record.fresh_seeds(), methods):
            return [], True
        spec = dataclasses.replace(self.spec, experiment=f"{record.name}.rerank-{record.rerank}x{record.seeds}")
        labels = Labels(record.name, "rerank", [f"{result.name}.seed-{seed}" for result, seed in runs], {}, record.name)
        plan = ListPlan([{**result.values, "seed": seed} for result, seed in runs], self.concurrent)
        steps = max(own_steps(config) for config in record.configs().values())
        title = f"rerank {record.name}"
        self._mend(spec.folder)
        again = run_experiment(spec, labels, steps, self.tracker, title, plan, self._keeper(spec.experiment))
        values: dict[str, dict[int, float]] = {}
        for (result, seed), run in zip(runs, again, strict=False):  # trials are in the order of the list
            best = best_checkpoint(spec.folder, run.trial_id, spec.objective.keeps)
            if best is not None and run.error is None:
                values.setdefault(result.name, {})[seed] = best.metrics[spec.objective.leading]
        ranking = rerank(values)
        if ranking:
            self.tracker.log_json(record.name, [dataclasses.asdict(found) for found in ranking], "rerank.json")
            self.tracker.set_tags(record.name, {VERDICT_TAG: verdict(ranking)})
        return ranking, _missing(again)

    def _log_study(self) -> None:
        """Put the study's plots on the parent run, and how the methods compare at equal budget."""
        from segadapt.platform.experiment.tuning import load_study
        from segadapt.platform.results.methods import compare_methods
        from segadapt.platform.results.plots import study_figures

        objective, key = self.spec.objective, self.record.name
        study = load_study(key, self.study_url)
        for name, make in study_figures(study, objective):
            self.tracker.log_figure(key, make, name)
        if compared := compare_methods(study.get_trials(deepcopy=False), objective):
            reached = {f"equal_budget/{result.method}": result.best_at_budget for result in compared}
            self.tracker.log_summary(key, {**reached, "equal_budget/steps": compared[0].budget}, compared[0].budget)
            self.tracker.log_json(key, [dataclasses.asdict(result) for result in compared], "methods.json")

    def _log_selection(self, kept: Mapping[str, Mapping[str, Any]]) -> None:
        """Record what label-free selection among the trials would have lost; it changes no choice."""
        from segadapt.platform.results.label_free import compare

        choices = compare(kept)
        last = max(int(metrics["step"]) for metrics in kept.values())
        regrets = {f"regret/{choice.score}": choice.regret for choice in choices}
        self.tracker.log_summary(self.record.name, regrets, last)
        self.tracker.log_json(self.record.name, [dataclasses.asdict(choice) for choice in choices], "selection.json")

    def _close_parent(self, state: str) -> None:
        from segadapt.platform.experiment.ledger import spent_hours

        if state == "finished":
            need_no_more(self.spec.storage, self.record.name)
        unit = "gpu" if self.spec.resources.gpus > 0 else "cpu"
        hours = spent_hours(self.spec.storage, self.record.name, unit)
        self.tracker.log_summary(self.record.name, {f"cost/{unit}_hours": hours}, 0)
        self.tracker.set_tags(self.record.name, {STATE_TAG: state})
        status = {"interrupted": "KILLED", "finished": "FINISHED", "failed": "FAILED"}[state]
        self.tracker.end(self.record.name, status)

    def _best(self, trial_id: str) -> TrialCheckpoint | None:
        return best_checkpoint(self.spec.folder, trial_id, self.spec.objective.keeps)

    def _ensure_shared_stages(self, seeds: Sequence[int | None] = (None,), methods: Iterable[str] = ()) -> bool:
        """Have the shared stages of methods in the store; returns False if interrupted.

        Args:
            seeds: For which training seeds; None is the experiment's own.
            methods: Names; none for all.
        """
        own = {method: self._stage_keys(method, None) for method in self.record.candidates}
        wanted = [(method, seed, self._stage_keys(method, seed)) for method in methods or own for seed in seeds]
        needed = itertools.chain(*own.values(), *(keys for _, _, keys in wanted))
        need(self.spec.storage, self.record.name, needed)
        return all(self._ensure_stages_of(method, seed, keys) for method, seed, keys in wanted)

    def _stage_keys(self, method: str, seed: int | None) -> list[StageKey]:
        from segadapt.trainables.core.data.datasets import load_data

        config = self.spec.shared_config(method, seed)
        return stage_keys(config, load_data(config.data)[0].fingerprint, self.spec.code)

    def _ensure_stages_of(self, method: str, seed: int | None, keys: list[StageKey]) -> bool:
        """Load a method's shared stages, wait for those that others compute, and compute what is missing."""
        storage, say = self.spec.storage, self.options.say
        for name in put_damaged_aside(storage, keys):
            say(f"{method}: the files of the stage {name} are damaged; it is computed anew.")
        try:
            with turn_to_compute(storage, keys, self.record.name, say) as done:
                if done:
                    names = ", ".join(key.stage.name for key in keys[: len(done)])
                    say(f"{method}: stages computed earlier are loaded: {names}.")
                if len(done) < len(keys):
                    self._compute_stages(method, seed, keys, len(done))
                else:
                    self._close_lost_stage_run(method, seed)
        except KeyboardInterrupt:  # while it waited for others
            return False
        done = longest_prefix(storage, keys)
        if len(done) < len(keys):
            return False
        for folder in done:
            mark_used(folder)
        if done and seed is None:
            self._log_baseline(keys, done)
        return True

    def _compute_stages(self, method: str, seed: int | None, keys: list[StageKey], done: int) -> None:
        """Compute a method's shared stages but the first `done`, as a trial of its own that uses the whole machine.

        What this experiment began before is continued, if the stages are the same.

        Raises:
            StageFailedError: If the trial fails.
        """
        from segadapt.platform.experiment.events import Labels
        from segadapt.platform.experiment.tuning import run_experiment

        config = self.spec.shared_config(method, seed)
        resources, _ = resources_of(self.options.resources, self.capacity, 1, 1)
        spec = dataclasses.replace(
            self.spec,
            experiment=stage_experiment(self.record.name, method, seed),
            fixed={method: {**self.spec.fixed[method], "seed": config.seed}},
            resources=resources,
            shared_stages=True,
        )
        begun, content = spec.folder / BEGUN, json.dumps([key.hash for key in keys])
        if spec.folder.exists() and not (begun.exists() and begun.read_text() == content):
            shutil.rmtree(spec.folder)  # it was finished and pruned since, or the code was edited
        self._mend(spec.folder)
        spec.folder.mkdir(exist_ok=True)
        write_whole(begun, content)
        missing = tuple(key.stage for key in keys[done:])
        steps = sum(stage_steps(missing, config.warmup.steps, config.trainer.steps).values())
        names = [stage.name for stage in missing]
        labels = Labels(self.record.name, "stage", names[:1], {}, self.parent_key)
        results = run_experiment(spec, labels, steps, self.tracker, f"shared stages {', '.join(names)}")
        reason = next((result.error for result in results if result.error), None)
        if reason is not None:
            raise StageFailedError(f"The shared stages did not finish: {reason}")
        if not _missing(results):
            begun.unlink()

    def _close_lost_stage_run(self, method: str, seed: int | None) -> None:
        """Close the run of stages that this experiment began and, after it was killed, another one computed."""
        name = stage_experiment(self.record.name, method, seed)
        self.tracker.end_lost(self.record.name, f"{name}/", known=())

    def _log_baseline(self, keys: list[StageKey], folders: list[Path]) -> None:
        """Record what the trials start from on the parent run, and whether the cache had it."""
        key, metrics = self.record.name, read_metrics(folders[0])
        start = {f"start/{goal}": metrics[goal] for goal in self.spec.objective.goals if goal in metrics}
        self.tracker.log_summary(key, start, 0)
        self.tracker.log_file(key, folders[0] / GALLERY, "start")
        self.tracker.log_json(key, iou_table(folders[0]), "start/per_class_iou.json")
        own = {stage_experiment(self.record.name, method) for method in self.record.candidates}
        tags = {}
        for stage, folder in zip(keys, folders, strict=True):
            found = describe(folder)
            computed = found is not None and found.experiment in own
            tags[f"{STAGE_TAGS}{stage.stage.name}"] = stage.hash
            tags[f"{CACHE_TAGS}{stage.stage.name}"] = "computed here" if computed else "hit"
        self.tracker.set_tags(key, tags)


def _failed(results: "list[TrialResult]") -> int:
    return sum(result.error is not None for result in results)


def _missing(results: "list[TrialResult]") -> bool:
    return any(not result.ended for result in results)


class StageFailedError(RuntimeError):
    """A stage that all trials need could not be computed."""
