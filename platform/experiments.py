"""An experiment from its record to its end: shared stages, trials, tracking, plots. The one path of all training."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution

from segadapt.platform import stages
from segadapt.platform.checkpoints import TrialCheckpoint, best_checkpoint
from segadapt.platform.cluster import Capacity, connect
from segadapt.platform.config import TrialConfig, resolve
from segadapt.platform.environment import environment, git_tags
from segadapt.platform.errors import UsageError
from segadapt.platform.storage import Storage, open_storage
from segadapt.platform.trial import Launcher, Resources, TrialSpec
from segadapt.trainables.core.trainer import stage_steps

RECORD = "record.json"


@dataclass(frozen=True)
class Options:
    """Where an experiment runs and is kept; the same for every command that trains."""

    storage: str = "runs"
    """Folder that all nodes see."""
    tracking_uri: str | None = None
    """MLflow server; None keeps runs in the storage folder."""
    address: str | None = None
    """Ray cluster; None starts one on this machine."""
    launcher: Launcher = "auto"
    workers: int = 1
    """Data-parallel workers of each trial."""
    gpus: float | None = None
    """GPUs of each worker; None takes one if there is any."""
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


@dataclass(frozen=True)
class Record:
    """What an experiment was asked to do; kept in its folder, so that resuming needs its name alone."""

    kind: Literal["search", "train", "finish"]
    name: str
    """Of the experiment's folder."""
    method: str
    values: Mapping[str, Any]
    objective: str
    seed: int = 0
    """Of the sampler."""
    space: Mapping[str, BaseDistribution] = field(default_factory=dict)
    first: Mapping[str, Any] = field(default_factory=dict)
    trials: int = 1
    concurrent: int | None = None
    """Trials at a time; None takes as many as the cluster runs."""
    time_budget_s: float | None = None
    search: str | None = None
    """Of a finish: the experiment in MLflow that it belongs to."""
    start: str | None = None
    """Checkpoint folder that the trial begins from."""
    from_key: str | None = None
    """Of a finish: key of the run it continues."""
    from_name: str | None = None

    def config(self) -> TrialConfig:
        """Return the configuration of a trial before searched values."""
        return resolve(self.method, {**self.values, **self.first})

    def save(self, storage: Storage) -> None:
        """Write the record, whole or not at all."""
        folder = storage.experiment(self.name)
        folder.mkdir(parents=True, exist_ok=True)
        content = dataclasses.asdict(self)
        content["space"] = {key: distribution_to_json(value) for key, value in self.space.items()}
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
        content["space"] = {key: json_to_distribution(text) for key, text in content["space"].items()}
        return cls(**content)


@dataclass(frozen=True)
class Outcome:
    """How an experiment ended."""

    failed: int
    """Trials that failed."""
    interrupted: bool
    seconds: Mapping[str, float]
    """Wall time of each part, in order: start, shared stages, trials, tracking."""


def own_steps(config: TrialConfig) -> int:
    """Return the steps a trial takes itself, after the shared stages."""
    plan = stages.split_plan(config)[1]
    return sum(stage_steps(plan, config.warmup.steps, config.trainer.steps).values())


def resources_of(options: Options, capacity: Capacity, trials: int, concurrent: int | None) -> tuple[Resources, int]:
    """Return what a trial takes and how many run at a time.

    Raises:
        UsageError: If the cluster can never run one trial.
    """
    gpus = options.gpus if options.gpus is not None else float(capacity.gpus > 0)
    if options.workers > capacity.cpus or gpus * options.workers > capacity.gpus:
        raise UsageError(
            f"The cluster must have what one trial takes ({options.workers} workers of 1 CPU and {gpus:g} GPUs), "
            f"but has {capacity.cpus} CPUs and {capacity.gpus} GPUs. Lower --workers-per-trial or --gpus-per-trial."
        )
    fitting = int(capacity.gpus / (gpus * options.workers)) if gpus else capacity.cpus // options.workers
    at_a_time = max(1, min(fitting, trials, concurrent or trials))
    cpus = max(1, capacity.cpus // (at_a_time * options.workers))
    return Resources(options.workers, gpus, cpus, options.launcher), at_a_time


def run(record: Record, options: Options) -> Outcome:
    """Run an experiment, or go on with it if it was begun.

    Raises:
        UsageError: If it cannot run as asked; nothing was started then.
    """
    import torch

    from segadapt.platform.tracking import Tracker

    clock = _Clock()
    storage = open_storage(options.storage)
    needs_dashboard = options.launcher == "train" or options.workers > 1 or torch.cuda.is_available()
    tracker = Tracker(storage, options.tracking_uri)  # connects while Ray starts
    try:
        with connect(options.address, dashboard=needs_dashboard, verbose=options.debug) as capacity:
            resources, concurrent = resources_of(options, capacity, record.trials, record.concurrent)
            spec = TrialSpec(
                storage=storage,
                experiment=record.name,
                method=record.method,
                values=dict(record.values),
                resources=resources,
                objective=record.objective,
                start=Path(record.start) if record.start else None,
            )
            clock.lap("start")
            failed, interrupted = _Session(record, spec, tracker, options, capacity, concurrent).run(clock)
    finally:
        tracker.close()
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
        from segadapt.platform.events import Labels
        from segadapt.platform.search import SearchPlan, run_experiment

        record = self.record
        config = record.config()
        if record.kind != "finish":
            self._open_parent(config)
        if record.start is None:
            self._ensure_shared_stages(config)
        clock.lap("shared stages")
        steps = own_steps(config)
        plan = None
        if record.kind == "search":
            plan = SearchPlan(
                space=record.space,
                first=record.first,
                trials=record.trials,
                concurrent=self.concurrent,
                seed=record.seed,
                steps=steps,
                grace_steps=min(config.trainer.eval_every, steps),
                time_budget_s=record.time_budget_s,
            )
        labels = Labels(
            experiment=record.search or record.name,
            kind="finish" if record.kind == "finish" else "trial",
            prefix=f"finish-{record.from_name}" if record.kind == "finish" else record.method,
            single=record.kind != "search",
            tags={"segadapt.from": record.from_name} if record.from_name else {},
            parent_key=self.parent_key,
        )
        results = run_experiment(self.spec, labels, steps, self.tracker, self._title(), plan)
        clock.lap("trials")
        failed = sum(result.error is not None for result in results)
        missing = sum(not result.ended for result in results)
        if record.kind != "finish":
            self._close_parent(results, failed, missing)
        return failed, missing > 0

    def _title(self) -> str:
        record = self.record
        if record.kind == "search":
            return f"search {record.name} ({record.method}, {self.concurrent} at a time)"
        return f"{record.kind} {record.name} ({record.method})"

    def _open_parent(self, config: TrialConfig) -> None:
        from segadapt.platform.tracking import KIND_TAG, METHOD_TAG, STATE_TAG, RunInfo

        record, found = self.record, environment()
        tags = {KIND_TAG: record.kind, METHOD_TAG: record.method, STATE_TAG: "running", **git_tags(found)}
        params = {"method": record.method, "objective": record.objective, "trials": record.trials, "seed": record.seed}
        self.tracker.start(RunInfo(record.name, record.name, record.name, tags, {**params, **record.values}))
        self.tracker.log_json(record.name, config.as_dict(), "config.yaml")
        self.tracker.log_json(record.name, found, "environment.json")
        space = {key: json.loads(distribution_to_json(value)) for key, value in record.space.items()}
        self.tracker.log_json(record.name, {"space": space, "first": dict(record.first)}, "space.yaml")

    def _close_parent(self, results: Any, failed: int, missing: int) -> None:
        from segadapt.platform.plots import study_figures
        from segadapt.platform.search import load_study
        from segadapt.platform.tracking import STATE_TAG

        record, key = self.record, self.record.name
        found = {result.trial_id: self._best(result.trial_id) for result in results}
        ranked = [(best.metrics[record.objective], trial_id) for trial_id, best in found.items() if best is not None]
        if ranked:
            value, trial_id = max(ranked)
            best = found[trial_id]
            assert best is not None
            self.tracker.log_summary(key, {f"best/{record.objective}": value}, best.metrics["step"])
            self.tracker.set_tags(key, {"segadapt.best_trial": trial_id})
            self.tracker.log_file(f"{record.name}/{trial_id}", best.path, "checkpoint")
        if record.kind == "search":
            study = load_study(self.spec)
            for name, make in study_figures(study, record.objective):
                self.tracker.log_figure(key, make, name)
        state = "interrupted" if missing else "finished" if ranked else "failed"
        self.tracker.set_tags(key, {STATE_TAG: state})
        self.tracker.end(key, {"interrupted": "KILLED", "finished": "FINISHED", "failed": "FAILED"}[state])

    def _best(self, trial_id: str) -> TrialCheckpoint | None:
        return best_checkpoint(self.spec.folder, trial_id, self.record.objective)

    def _ensure_shared_stages(self, config: TrialConfig) -> None:
        """Compute the shared stages that are not in the store, as a trial of its own that uses the whole machine."""
        from segadapt.platform.events import Labels
        from segadapt.platform.search import run_experiment
        from segadapt.trainables.core.data.datasets import load_data

        data, _ = load_data(config.data)
        keys = stages.stage_keys(config, data.fingerprint)
        done = stages.longest_prefix(self.spec.storage, keys)
        names = [key.stage.name for key in keys]
        if len(done) < len(keys):
            if done:
                self.options.say(f"Stages {', '.join(names[: len(done)])}: loaded, computed earlier.")
            missing = tuple(key.stage for key in keys[len(done) :])
            resources, _ = resources_of(self.options, self.capacity, 1, 1)
            spec = dataclasses.replace(
                self.spec, experiment=f"{self.record.name}.stages", resources=resources, shared_stages=True
            )
            steps = sum(stage_steps(missing, config.warmup.steps, config.trainer.steps).values())
            title = f"shared stages {', '.join(stage.name for stage in missing)}"
            labels = Labels(self.record.name, "stage", missing[0].name, True, {}, self.parent_key)
            results = run_experiment(spec, labels, steps, self.tracker, title)
            done = stages.longest_prefix(self.spec.storage, keys)
            if len(done) < len(keys):
                reason = next((result.error for result in results if result.error), "it was interrupted")
                raise StageFailedError(f"The shared stages did not finish: {reason}")
        elif keys:
            self.options.say(f"Stages {', '.join(names)}: loaded, computed earlier.")
        self._log_baseline(keys, done)

    def _log_baseline(self, keys: list[stages.StageKey], folders: list[Path]) -> None:
        """Record what the trials start from on the parent run."""
        if not folders:
            return
        metrics = json.loads((folders[-1] / "evaluation.json").read_text())["metrics"]
        baseline = {f"start/{self.record.objective}": metrics[self.record.objective]}
        self.tracker.log_summary(self.record.name, baseline, 0)
        self.tracker.set_tags(self.record.name, {f"segadapt.stage.{key.stage.name}": key.hash for key in keys})


class StageFailedError(RuntimeError):
    """A stage that all trials need could not be computed."""
