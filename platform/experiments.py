"""An experiment from its record to its end: shared stages, trials, tracking, plots. The one path of all training."""

import contextlib
import dataclasses
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from pydantic import TypeAdapter

from segadapt.platform import stages
from segadapt.platform.checkpoints import TrialCheckpoint, best_checkpoint, iou_table, read_metrics
from segadapt.platform.cluster import Capacity, connect
from segadapt.platform.config import TrialConfig, Values, resolve
from segadapt.platform.environment import environment, git_tags
from segadapt.platform.errors import UsageError
from segadapt.platform.keeping import Keeper, locked, trial_of
from segadapt.platform.lineage import Inheritance, Settings, inherit
from segadapt.platform.notes import NOTE_TAG, datasets, search_note
from segadapt.platform.objective import Objective
from segadapt.platform.preflight import check_nodes, data_paths
from segadapt.platform.reranking import Reranked, rerank, verdict
from segadapt.platform.samplers import SamplerName
from segadapt.platform.storage import Storage, open_storage
from segadapt.platform.study import SchedulerName, open_study_storage
from segadapt.platform.trial import Launcher, Resources, Tolerance, TrialSpec
from segadapt.platform.tune_state import TUNER, mend
from segadapt.trainables.core.training.config import stage_steps

if TYPE_CHECKING:
    from segadapt.platform.search import TrialResult

RECORD = "record.json"

BEGUN = "begun.json"
"""File in the folder of a trial that computes shared stages, with their hashes, until it has ended well."""


@dataclass(frozen=True)
class Options:
    """Where an experiment runs and is kept; the same for every command that trains."""

    storage: str = "runs"
    """Folder that all nodes see."""
    tracking_uri: str | None = None
    """MLflow server; None keeps runs in the storage folder."""
    study_uri: str | None = None
    """Optuna's storage, such as a PostgreSQL database; None keeps studies in the storage folder."""
    address: str | None = None
    """Ray cluster; None starts one on this machine."""
    launcher: Launcher = "auto"
    workers: int = 1
    """Data-parallel workers of each trial."""
    gpus: float | None = None
    """GPUs of each worker; None takes one if there is any."""
    tolerance: Tolerance = field(default_factory=Tolerance)
    """What may go wrong with machines before a trial has failed."""
    debug: bool = False
    say: Callable[[str], None] = print
    """Receives what is told to the user besides the live progress."""

    def __post_init__(self) -> None:
        if self.workers < 1 or (self.gpus is not None and self.gpus < 0):
            raise UsageError(
                "A trial must have at least 1 worker and no negative number of GPUs, but got "
                f"{self.workers} workers and {self.gpus} GPUs."
            )
        if self.launcher == "inprocess" and self.workers > 1:
            raise UsageError(
                f"--launcher inprocess must have 1 worker per trial, but got {self.workers}. Use --launcher train."
            )
        if self.gpus is not None and self.gpus > 1 and self.gpus != int(self.gpus):
            raise UsageError(
                "--gpus-per-trial must be a part of one GPU or a whole number of them, as Ray shares them out, but got "
                f"{self.gpus:g}. Take {int(self.gpus)} or {int(self.gpus) + 1}."
            )


@dataclass(frozen=True)
class Candidate:
    """A method in an experiment."""

    fixed: Values
    """Settings that none of its trials changes, by dotted key."""
    space: Mapping[str, BaseDistribution] = field(default_factory=dict)
    """What its trials vary; empty for a single run."""
    first: Values = field(default_factory=dict)
    """The varied settings of its first trial."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as they are kept and logged."""
        space = {key: json.loads(distribution_to_json(value)) for key, value in self.space.items()}
        return {"fixed": dict(self.fixed), "space": space, "first": dict(self.first)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Candidate":
        """Rebuild what `as_dict` returned."""
        space = {key: json_to_distribution(json.dumps(value)) for key, value in content["space"].items()}
        return cls(dict(content["fixed"]), space, dict(content["first"]))


@dataclass(frozen=True)
class Record:
    """What an experiment was asked to do; kept in its folder, so that resuming needs its name alone."""

    kind: Literal["search", "train", "finish"]
    name: str
    """Of the experiment's folder."""
    candidates: Mapping[str, Candidate]
    """The methods it tries."""
    objective: str
    seed: int = 0
    """Of the sampler."""
    trials: int = 1
    concurrent: int | None = None
    """Trials at a time; None takes as many as the cluster runs."""
    time_budget_s: float | None = None
    max_gpu_hours: float | None = None
    """Of all trials and shared stages, over all sessions."""
    sampler: SamplerName = "auto"
    scheduler: SchedulerName = "asha"
    forked_from: str | None = None
    """Search whose settings this one began with."""
    warm_start: Sequence[str] = ()
    """Searches whose trials count as prior points, the one forked from included."""
    rerank: int = 0
    """So many of the best configurations are trained again after the search, on other seeds."""
    seeds: int = 0
    """How many seeds; of a finish, on how many it is done."""
    keep_top: int | None = None
    """So many of the best trials keep their checkpoints; None keeps those of all."""
    search: str | None = None
    """Of a finish: the experiment in MLflow that it belongs to."""
    start: str | None = None
    """Checkpoint folder that the trial begins from."""
    from_key: str | None = None
    """Of a finish: key of the run it continues."""
    from_name: str | None = None
    number: int = 1
    """Of a finish: which of those of its trial, as it is numbered when it begins."""

    @property
    def methods(self) -> str:
        """Names of the methods, for people."""
        return ", ".join(self.candidates)

    def configs(self) -> dict[str, TrialConfig]:
        """Return the configuration of each method's first trial."""
        return {name: resolve(name, {**found.fixed, **found.first}) for name, found in self.candidates.items()}

    def lineage(self) -> dict[str, str]:
        """Return tags that say what a search builds on."""
        found = {"segadapt.trials": str(self.trials)}  # the param of this name keeps what the search began with
        if self.forked_from is not None:
            found["segadapt.forked_from"] = self.forked_from
        if self.warm_start:
            found["segadapt.warm_start"] = ", ".join(self.warm_start)
        return found

    def fresh_seeds(self) -> list[int]:
        """Return the seeds of `rerank`: none of them is the search's own."""
        own = {config.seed for config in self.configs().values()}
        return [seed for seed in range(self.seeds + len(own)) if seed not in own][: self.seeds]

    def settings(self) -> Settings:
        """Return what decides whether its trials may be compared with another search's."""
        fixed = {name: found.fixed for name, found in self.candidates.items()}
        return Settings(fixed, {name: found.space for name, found in self.candidates.items()}, self.objective)

    def save(self, storage: Storage) -> None:
        """Write the record, whole or not at all."""
        folder = storage.experiment(self.name)
        folder.mkdir(parents=True, exist_ok=True)
        content = vars(self) | {"candidates": {name: found.as_dict() for name, found in self.candidates.items()}}
        temporary = folder / f".{RECORD}"
        temporary.write_text(json.dumps(content, indent=1))
        temporary.replace(folder / RECORD)

    @classmethod
    def load(cls, storage: Storage, name: str) -> "Record":
        """Read the record of an experiment.

        Raises:
            UsageError: If there is none of this name; lists those there are.
        """
        try:
            content = json.loads((storage.experiment(name) / RECORD).read_text())
        except FileNotFoundError as error:
            known = ", ".join(sorted(path.parent.name for path in storage.experiments.glob(f"*/{RECORD}"))) or "none"
            raise UsageError(
                f"There must be an experiment {name!r} in {storage.root}, but there is not. Known: {known}."
            ) from error
        except ValueError as error:
            raise _damaged(storage, name, error) from error
        try:
            content["candidates"] = {name: Candidate.from_dict(found) for name, found in content["candidates"].items()}
            hints = {**get_type_hints(cls), "candidates": dict[str, Any]}
            return cls(**{name: TypeAdapter(hints[name]).validate_python(value) for name, value in content.items()})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _damaged(storage, name, error) from error


def _damaged(storage: Storage, name: str, error: Exception) -> UsageError:
    return UsageError(
        f"{storage.experiment(name) / RECORD} must be as segadapt wrote it, but is not: {error!r}. "
        "Restore it from a backup, or begin a new search."
    )


@dataclass(frozen=True)
class Outcome:
    """How an experiment ended."""

    failed: int
    """Trials that failed."""
    interrupted: bool
    seconds: Mapping[str, float]
    """Wall time of each part, in order: start, shared stages, trials, tracking."""


def resources_of(options: Options, capacity: Capacity, trials: int, concurrent: int | None) -> tuple[Resources, int]:
    """Return what a trial takes and how many run at a time.

    Raises:
        UsageError: If the cluster can never run one trial.
    """
    gpus = options.gpus if options.gpus is not None else float(capacity.gpus > 0)
    room = capacity.workers(1, gpus)
    if room < options.workers:
        raise UsageError(
            f"The cluster must have what one trial takes ({options.workers} workers of 1 CPU and {gpus:g} GPUs, each "
            f"on one node), but its nodes have room for {room}. Nodes: {capacity}. "
            "Lower --workers-per-trial or --gpus-per-trial."
        )
    at_a_time = min(trials, concurrent or trials)
    if concurrent is None or not capacity.joined:  # what was asked of a cluster may wait for nodes that it adds
        at_a_time = min(at_a_time, room // options.workers)
    most = max(node.cpus for node in capacity.nodes)
    needed = min(at_a_time * options.workers, room)
    cpus = next(n for n in range(most, 0, -1) if capacity.workers(n, gpus) >= needed)
    return Resources(options.workers, gpus, cpus, options.launcher), at_a_time


def check_gpu_hours(record: Record, resources: Resources) -> None:
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
    from segadapt.platform.tracking import Tracker

    clock = _Clock()
    storage = open_storage(options.storage)
    if record.kind == "search":
        open_study_storage(storage.study_url(options.study_uri))  # answers, or nothing is begun
    with (
        contextlib.ExitStack() as ending,
        connect(options.address, verbose=options.debug) as capacity,
    ):
        tracker = Tracker(storage, options.tracking_uri)  # not before: what it imports would slow Ray's start down
        ending.callback(tracker.close)
        resources, concurrent = resources_of(options, capacity, record.trials, record.concurrent)
        check_gpu_hours(record, resources)
        if capacity.joined:
            check_nodes(storage.root, data_paths(record.configs().values()))
        record = _save(record, storage)
        spec = TrialSpec(
            storage=storage,
            experiment=record.name,
            fixed={name: found.fixed for name, found in record.candidates.items()},
            resources=resources,
            objective=Objective.parse(record.objective),
            start=Path(record.start) if record.start else None,
            tolerance=options.tolerance,
            code=stages.code_versions(record.candidates),
        )
        clock.lap("start")
        failed, interrupted = _Session(record, spec, tracker, options, capacity, concurrent).run(clock)
    clock.lap("tracking")
    return Outcome(failed, interrupted, clock.seconds)


def _save(record: Record, storage: Storage) -> Record:
    """Write the record and return it; a finish has its number now.

    From then on, what a finish starts from is not removed; until then it may have been.
    """
    with locked(storage):
        is_new = not (storage.experiment(record.name) / RECORD).is_file()
        if record.start is not None and is_new and not Path(record.start).is_dir():
            raise UsageError(
                f"The checkpoint of {record.from_name} must be there, but was removed just now (--keep-top). "
                "Finish another run."
            )
        if record.kind == "finish":
            record = dataclasses.replace(record, number=_finish_number(record, storage))
        record.save(storage)
    return record


def _finish_number(record: Record, storage: Storage) -> int:
    """Return the number of a finish among those of its trial: the one it has, or the next."""
    others = {}
    for path in storage.experiments.glob(f"{record.search}.finish-*/{RECORD}"):
        content = json.loads(path.read_text())
        if content.get("from_name") == record.from_name:
            others[path.parent.name] = content.get("number", 1)
    return int(others.get(record.name, max(others.values(), default=0) + 1))


def finished_trials(storage: Storage, search: str) -> set[str]:
    """Return the ids of a search's trials that some finish starts from, whether it has ended or not."""
    found = set()
    for path in storage.experiments.glob(f"{search}.finish-*/{RECORD}"):
        start = json.loads(path.read_text())["start"]
        if start is not None:
            found.add(trial_of(Path(start)))
    return found


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
        from segadapt.platform.events import Labels
        from segadapt.platform.ledger import spent_hours
        from segadapt.platform.search import ListPlan, SearchPlan, run_experiment

        record = self.record
        configs = record.configs().values()
        steps = max(stages.own_steps(config) for config in configs)
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
            tags={"segadapt.from": record.from_name} if record.from_name else {},
            parent_key=self.parent_key,
        )
        title = f"{record.kind} {record.name} ({record.methods}"
        title += f", {self.concurrent} at a time)" if record.kind == "search" else ")"
        return run_experiment(self.spec, labels, steps, self.tracker, title, plan, self._keeper(record.name))

    def _keeper(self, experiment: str) -> Keeper | None:
        """Return what removes checkpoints of the search, or of its runs on other seeds; None if all are kept."""
        record, storage = self.record, self.spec.storage
        if record.keep_top is None:
            return None
        keep_top = max(record.keep_top, record.rerank)  # any of those that are trained again may turn out the best
        return Keeper(
            storage, experiment, self.spec.objective, keep_top, needed=lambda: finished_trials(storage, record.name)
        )

    @property
    def study_url(self) -> str:
        """Address of Optuna's storage."""
        return self.spec.storage.study_url(self.options.study_uri)

    def _inherited(self) -> list[Inheritance]:
        """Return what a search that is new takes over from earlier ones, and say so."""
        from segadapt.platform.search import load_study

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
        from segadapt.platform.tracking import KIND_TAG, METHOD_TAG, STATE_TAG, RunInfo
        from segadapt.trainables.core.data.datasets import load_data

        record, found = self.record, environment()
        tags = {KIND_TAG: record.kind, METHOD_TAG: record.methods, STATE_TAG: "running", **git_tags(found)}
        if notes := self._data_notes():
            tags["segadapt.data_notes"] = "\n".join(notes)  # `segadapt.data` is a trial's fingerprint
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
            tags = {"segadapt.best_trial": winner.trial_id, "segadapt.best_name": winner.name}
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
        from segadapt.platform.events import Labels
        from segadapt.platform.search import ListPlan, run_experiment

        record = self.record
        chosen = self._by_objective(self._kept(results))[: record.rerank]
        runs = [(result, seed) for result in chosen for seed in record.fresh_seeds()]
        methods = dict.fromkeys(self.spec.method(result.values) for result in chosen)
        if not self._ensure_shared_stages(record.fresh_seeds(), methods):
            return [], True
        spec = dataclasses.replace(self.spec, experiment=f"{record.name}.rerank-{record.rerank}x{record.seeds}")
        labels = Labels(record.name, "rerank", [f"{result.name}.seed-{seed}" for result, seed in runs], {}, record.name)
        plan = ListPlan([{**result.values, "seed": seed} for result, seed in runs], self.concurrent)
        steps = max(stages.own_steps(config) for config in record.configs().values())
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
            self.tracker.set_tags(record.name, {"segadapt.verdict": verdict(ranking)})
        return ranking, _missing(again)

    def _log_study(self) -> None:
        """Put the study's plots on the parent run, and how the methods compare at equal budget."""
        from segadapt.platform.comparison import compare_methods
        from segadapt.platform.plots import study_figures
        from segadapt.platform.search import load_study

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
        from segadapt.platform.selection import compare

        choices = compare(kept)
        last = max(int(metrics["step"]) for metrics in kept.values())
        regrets = {f"regret/{choice.score}": choice.regret for choice in choices}
        self.tracker.log_summary(self.record.name, regrets, last)
        self.tracker.log_json(self.record.name, [dataclasses.asdict(choice) for choice in choices], "selection.json")

    def _close_parent(self, state: str) -> None:
        from segadapt.platform.ledger import spent_hours
        from segadapt.platform.tracking import STATE_TAG

        if state == "finished":
            stages.need_no_more(self.spec.storage, self.record.name)
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
        stages.need(self.spec.storage, self.record.name, needed)
        return all(self._ensure_stages_of(method, seed, keys) for method, seed, keys in wanted)

    def _stage_keys(self, method: str, seed: int | None) -> list[stages.StageKey]:
        from segadapt.trainables.core.data.datasets import load_data

        config = self.spec.shared_config(method, seed)
        return stages.stage_keys(config, load_data(config.data)[0].fingerprint, self.spec.code)

    def _ensure_stages_of(self, method: str, seed: int | None, keys: list[stages.StageKey]) -> bool:
        """Load a method's shared stages, wait for those that others compute, and compute what is missing."""
        storage, say = self.spec.storage, self.options.say
        for name in stages.put_damaged_aside(storage, keys):
            say(f"{method}: the files of the stage {name} are damaged; it is computed anew.")
        try:
            with stages.turn_to_compute(storage, keys, self.record.name, say) as done:
                if done:
                    names = ", ".join(key.stage.name for key in keys[: len(done)])
                    say(f"{method}: stages computed earlier are loaded: {names}.")
                if len(done) < len(keys):
                    self._compute_stages(method, seed, keys, len(done))
                else:
                    self._close_lost_stage_run(method, seed)
        except KeyboardInterrupt:  # while it waited for others
            return False
        done = stages.longest_prefix(storage, keys)
        if len(done) < len(keys):
            return False
        for folder in done:
            stages.mark_used(folder)
        if done and seed is None:
            self._log_baseline(keys, done)
        return True

    def _compute_stages(self, method: str, seed: int | None, keys: list[stages.StageKey], done: int) -> None:
        """Compute a method's shared stages but the first `done`, as a trial of its own that uses the whole machine.

        What this experiment began before is continued, if the stages are the same.

        Raises:
            StageFailedError: If the trial fails.
        """
        from segadapt.platform.events import Labels
        from segadapt.platform.search import run_experiment

        config = self.spec.shared_config(method, seed)
        resources, _ = resources_of(self.options, self.capacity, 1, 1)
        spec = dataclasses.replace(
            self.spec,
            experiment=stages.stage_experiment(self.record.name, method, seed),
            fixed={method: {**self.spec.fixed[method], "seed": config.seed}},
            resources=resources,
            shared_stages=True,
        )
        begun, content = spec.folder / BEGUN, json.dumps([key.hash for key in keys])
        if spec.folder.exists() and not (begun.exists() and begun.read_text() == content):
            shutil.rmtree(spec.folder)  # it was finished and pruned since, or the code was edited
        self._mend(spec.folder)
        spec.folder.mkdir(exist_ok=True)
        begun.write_text(content)
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
        name = stages.stage_experiment(self.record.name, method, seed)
        self.tracker.end_lost(self.record.name, f"{name}/", known=())

    def _log_baseline(self, keys: list[stages.StageKey], folders: list[Path]) -> None:
        """Record what the trials start from on the parent run, and whether the cache had it."""
        key, metrics = self.record.name, read_metrics(folders[0])
        start = {f"start/{goal}": metrics[goal] for goal in self.spec.objective.goals if goal in metrics}
        self.tracker.log_summary(key, start, 0)
        self.tracker.log_file(key, folders[0] / "gallery.png", "start")
        self.tracker.log_json(key, iou_table(folders[0]), "start/per_class_iou.json")
        own = {stages.stage_experiment(self.record.name, method) for method in self.record.candidates}
        tags = {}
        for stage, folder in zip(keys, folders, strict=True):
            found = stages.describe(folder)
            computed = found is not None and found.experiment in own
            tags[f"segadapt.stage.{stage.stage.name}"] = stage.hash
            tags[f"segadapt.cache.{stage.stage.name}"] = "computed here" if computed else "hit"
        self.tracker.set_tags(key, tags)


def _failed(results: "list[TrialResult]") -> int:
    return sum(result.error is not None for result in results)


def _missing(results: "list[TrialResult]") -> bool:
    return any(not result.ended for result in results)


class StageFailedError(RuntimeError):
    """A stage that all trials need could not be computed."""
