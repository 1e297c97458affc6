"""What segadapt does: one function per command, of the same name."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from segadapt import search_spaces
from segadapt.platform import cache, tracking
from segadapt.platform.checkpoints import checkpoints, read_metrics
from segadapt.platform.config import Key, TrialConfig, Values, anchored, flatten, keys, resolve
from segadapt.platform.errors import UsageError
from segadapt.platform.experiments import Candidate, Options, Outcome, Record, run
from segadapt.platform.objective import GOALS, Objective
from segadapt.platform.ranges import split_ranges, start
from segadapt.platform.redaction import redacted
from segadapt.platform.reranking import Reranked, rerank, verdict
from segadapt.platform.samplers import check_sampler
from segadapt.platform.selection import TARGET, Choice, compare
from segadapt.platform.storage import Storage, check_name, open_storage
from segadapt.platform.study import SCHEDULERS, open_study_storage
from segadapt.platform.trial import CONFIG, trial_artifacts
from segadapt.platform.trial_log import entries as log_entries
from segadapt.platform.trial_log import follow as follow_log
from segadapt.platform.trial_log import log_folder
from segadapt.trainables import METHODS, method_class
from segadapt.trainables.core.evaluation.evaluate import score
from segadapt.trainables.core.evaluation.inference import Inference
from segadapt.trainables.core.networks import build_segmenter
from segadapt.trainables.self_training import SelfTraining
from segadapt.trainables.source_only import SourceOnly

if TYPE_CHECKING:
    from segadapt.platform.cost import Estimate
    from segadapt.platform.deploy import Origin
    from segadapt.platform.findings import Finding
    from segadapt.platform.jobs import Job
    from segadapt.platform.predicting import PredictionResult
    from segadapt.platform.status import SearchStatus
    from segadapt.trainables.core.data.checking import DatasetReport
    from segadapt.trainables.core.data.readers.shard_format import Manifest

_INHERITED = ("data.", "network.", "augmentation.", "trainer.batch_size", "trainer.accumulate", "trainer.precision")
"""Settings that a finish takes over from its trial; the others act on the adaptation alone."""


@dataclass(frozen=True)
class Row:
    """A trial in a leaderboard."""

    name: str
    method: str
    kind: str
    state: str
    best: float | None
    """Leading goal at the checkpoint that was kept."""
    best_step: int | None
    last: float | None
    params: Mapping[str, str]
    run_id: str
    checkpoint: str | None
    failure: str | None
    goals: Mapping[str, float] = field(default_factory=dict)
    """All goals of the search at that checkpoint."""
    score: float | None = None
    """What trials are ordered by; minus the mean rank where ranks decide, otherwise the leading goal."""
    checkpoint_removed: bool = False
    """Whether it left a checkpoint that was not kept."""
    on_front: bool = False
    """Whether no other trial surpasses it in all goals, where they make a front."""


@dataclass(frozen=True)
class Leaderboard:
    """The trials of a search, best first."""

    search: str
    objective: str
    rows: Sequence[Row]
    baseline: float | None
    """Objective of the source-only network that the trials started from."""
    selection: Sequence[Choice] = ()
    """What each label-free score would have chosen; empty unless asked for."""
    methods: Mapping[str, float] = field(default_factory=dict)
    """Of a search of several methods: the best that each had reached when all had spent the same steps."""
    equal_steps: int | None = None
    """Those steps."""
    reranked: Sequence[Reranked] = ()
    """The best configurations over several seeds, if they were trained again."""
    verdict: str | None = None
    """Whether the first of them is better beyond the noise of seeds."""


@dataclass(frozen=True)
class FinishResult:
    """A model before and after self-training."""

    name: str
    from_run: str
    seed: int
    best: float | None
    """Leading goal of the search at the best checkpoint."""
    before: Mapping[str, float]
    after: Mapping[str, float]
    """After the last step."""
    rounds: Sequence[Mapping[str, float]]
    """Of each round that ended: `labelled_share`, of the target's pixels, and metrics at its end."""
    checkpoint: str | None
    """The best by the search's objective."""
    last: str | None
    """That of the last step."""


@dataclass(frozen=True)
class EvaluationResult:
    """How well a run's network labels the target validation set."""

    run: str
    checkpoint: str
    step: int
    """Training steps of the checkpoint."""
    protocol: str
    how: str
    """Scales, flip and aggregation."""
    images: int
    metrics: Mapping[str, float]
    """`target_val/miou`, with the size of the subset in its name, and `target_val/iou/CLASS`."""
    iou: Mapping[str, float | None]
    """Of the averaged classes; None for one that is neither present nor predicted, which the mean leaves out."""
    classes: Sequence[str]
    """Of the confusion matrix."""
    confusion: Sequence[Sequence[int]]
    """Pixels; rows are the truth, columns the prediction."""
    tracked: str
    """Prefix of the metrics in the MLflow run."""
    predictions: str | None
    """Folder of the saved predictions."""


@dataclass(frozen=True)
class ExportResult:
    """A run's network in files and in MLflow's registry."""

    run: str
    folder: str
    """Holds model.onnx, model.pt2 and model.json."""
    differences: Mapping[str, float]
    """Largest difference of a class probability from the run's network, by file."""
    model: str
    """Name in the registry."""
    version: str


def list_methods() -> list[tuple[str, str]]:
    """Return name and one-line description of every method."""
    return [(method.name, (method.__doc__ or "").strip().splitlines()[0]) for method in METHODS]


def describe(method: str) -> list[tuple[Key, str, dict[str, Any]]]:
    """Return every setting of a method with its searched range as text, and its value in each preset that has one."""
    resolve(method, {})
    space, presets = _space(method)
    return [
        (
            key,
            show_range(space[key.name]) if key.name in space else "",
            {name: values[key.name] for name, values in presets.items() if key.name in values},
        )
        for key in keys(method).values()
    ]


def show_range(distribution: BaseDistribution) -> str:
    """Return a searched range as text."""
    match distribution:
        case CategoricalDistribution(choices=choices):
            return "{" + ", ".join(str(choice) for choice in choices) + "}"
        case FloatDistribution(low=low, high=high, log=log) | IntDistribution(low=low, high=high, log=log):
            return f"{low:g} to {high:g}" + (" (log)" if log else "")
    return str(distribution)


def plan_search(
    methods: Sequence[str],
    values: Values,
    *,
    preset: str = search_spaces.DEFAULT_PRESET,
    trials: int | None = None,
    time_budget_s: float | None = None,
    max_gpu_hours: float | None = None,
    concurrent: int | None = None,
    objective: str | None = None,
    sampler: str | None = None,
    scheduler: str | None = None,
    seed: int | None = None,
    rerank: int = 0,
    seeds: int = 3,
    keep_top: int | None = None,
    fork: str | None = None,
    warm_start: Sequence[str] = (),
    name: str | None = None,
    storage: str = "runs",
    tracking_uri: str | None = None,
) -> Record:
    """Check a search and return what it would do; touches nothing.

    Args:
        methods: Names of the methods to search, or `all` for every method that adapts; none with `fork`.
        values: Settings that no trial changes, by dotted key; after `METHOD.`, of that method alone. A range
            (`interval(0.1, 10)`, `log_interval(0.1, 10)` or `choice(a, b)`) is searched instead.
        preset: Where the search starts: its searched settings are tried first, its others are fixed.
        trials: Trials to run; None for 20.
        time_budget_s: Stops the search after so many seconds.
        max_gpu_hours: Stops the search when its trials and shared stages have held GPUs for so long.
        concurrent: Trials at a time.
        objective: One of `GOALS`, or several (see `Objective`); None for target mIoU.
        sampler: One of `SAMPLERS`; None for `auto`.
        scheduler: One of `SCHEDULERS`; None for `asha`, or `none` where trials are compared by dominance.
        seed: Of the sampler; None for 0.
        rerank: So many of the best configurations are trained again on other seeds.
        seeds: How many seeds that are.
        keep_top: So many of the best trials keep their checkpoints; None keeps those of all.
        fork: Search whose methods, settings and ranges this one begins with; what is given changes them.
        warm_start: Searches whose trials count as prior points where this one could have run them.
        name: Of the search; None makes one from methods and data.
        storage: The storage folder.
        tracking_uri: MLflow server that will hold the search; None for the storage folder's own.

    Raises:
        UsageError: If a method, a setting, a range or a number is not as it must be.
    """
    opened = Storage(Path(storage).expanduser().absolute())
    parent = _search_only(Record.load(opened, fork), "--fork") if fork is not None else None
    if parent is not None and methods:
        raise UsageError(f"--fork takes the methods of {fork!r}, but got {' '.join(methods)} besides. Leave them out.")
    candidates = _forked(parent, values) if parent is not None else _candidates(methods, values, preset)
    chosen = Objective.parse(objective or (parent.objective if parent is not None else TARGET))
    scheduler = scheduler or ("none" if chosen.is_front else parent.scheduler if parent is not None else "asha")
    sampler = sampler or (parent.sampler if parent is not None else "auto")
    configs = {method: _checked(method, {**found.fixed, **found.first}) for method, found in candidates.items()}
    default = "-".join(candidates) if len(candidates) <= 3 else f"{len(candidates)}-methods"
    warm = list(dict.fromkeys([*([fork] if fork is not None else []), *warm_start]))
    for earlier in warm_start:
        _search_only(Record.load(opened, earlier), "--warm-start")
    record = Record(
        kind="search",
        name=_free_name(storage, tracking_uri, name, f"{default}-{next(iter(configs.values())).data.name}"),
        candidates=candidates,
        objective=str(chosen),
        seed=seed if seed is not None else parent.seed if parent is not None else 0,
        trials=trials if trials is not None else parent.trials if parent is not None else 20,
        concurrent=concurrent,
        time_budget_s=time_budget_s,
        max_gpu_hours=max_gpu_hours,
        sampler=sampler,  # type: ignore[arg-type]  # checked below
        scheduler=scheduler,  # type: ignore[arg-type]
        forked_from=fork,
        warm_start=warm,
        rerank=rerank,
        seeds=seeds if rerank else 0,
        keep_top=keep_top,
    )
    _check_plan(record, chosen)
    return record


def _check_plan(record: Record, objective: Objective) -> None:
    """Make sure that the parts of a planned search fit together."""
    given = (record.trials, record.concurrent, record.time_budget_s, record.max_gpu_hours)
    if any(number is not None and number <= 0 for number in given):
        raise UsageError(
            "--trials, --concurrent, --time-budget and --max-gpu-hours must be positive, but got "
            f"{', '.join(map(str, given))}."
        )
    spaces = record.settings().spaces
    if len(spaces) == 1 and not any(spaces.values()):
        fixed = ", ".join(key for method in spaces for key in _space(method)[0])
        raise UsageError(f"A search must vary something, but KEY=VALUE fixes all of {fixed}. Free one.")
    check_sampler(record.sampler, spaces, objective)
    if record.scheduler not in SCHEDULERS:
        raise UsageError(f"--scheduler must be one of {', '.join(SCHEDULERS)}, but got {record.scheduler!r}.")
    if objective.is_front and record.scheduler != "none":
        raise UsageError(
            f"--scheduler must be none for a Pareto front, since trials are compared at their end, but got "
            f"{record.scheduler!r}. Leave it out, or join the goals by '+' to rank trials."
        )
    if len(objective.goals) > 1 and record.scheduler in ("median", "hyperband"):
        raise UsageError(
            f"--scheduler {record.scheduler} must have one goal, but got {objective}. Use asha or asha-promote."
        )
    if record.rerank < 0 or (record.rerank > 0 and record.seeds < 2):
        raise UsageError(
            "--rerank must not be negative and --seeds at least 2, since one seed tells nothing of their noise, but "
            f"got {record.rerank} and {record.seeds}."
        )
    if record.keep_top is not None and record.keep_top < 1:
        raise UsageError(f"--keep-top must be at least 1, so that a trial can be finished, but got {record.keep_top}.")


def _candidates(methods: Sequence[str], values: Values, preset: str) -> dict[str, Candidate]:
    """Return what a new search tries."""
    expanded = _expanded(_methods(methods), values)
    return {method: _candidate(method, own, preset) for method, own in expanded.items()}


def _forked(parent: Record, values: Values) -> dict[str, Candidate]:
    """Return what a search tries that begins as an earlier one: with its settings and ranges, some of them changed."""
    expanded = _expanded(list(parent.candidates), values)
    forked = {}
    for method, found in parent.candidates.items():
        fixed, ranges = split_ranges(method, expanded[method])
        space = {key: ranges.get(key, range_) for key, range_ in {**found.space, **ranges}.items() if key not in fixed}
        settings = {**found.fixed, **found.first, **fixed}
        first = {key: start(space[key], settings.get(key, keys(method)[key].default)) for key in space}
        fixed = {key: value for key, value in {**found.fixed, **fixed}.items() if key not in space}
        forked[method] = Candidate(fixed, space, first)
    return forked


def _methods(names: Sequence[str]) -> list[str]:
    """Return the methods of a search, each once."""
    if not names:
        raise UsageError("METHOD must be given, or --resume NAME. `segadapt list` shows the methods.")
    methods = list(dict.fromkeys(names))
    if methods == ["all"]:
        methods = [method.name for method in METHODS if method is not SourceOnly]
    for name in methods:
        resolve(name, {})
    if SourceOnly.name in methods and len(methods) > 1:
        raise UsageError(
            f"{SourceOnly.name} must be searched alone, since the other methods start from it, but got "
            f"{', '.join(methods)}. Leave it out: its score is shown with every search."
        )
    return methods


def _expanded(methods: Sequence[str], values: Values) -> dict[str, dict[str, Any]]:
    """Return the settings of each method: those that name it (`sdca.method.temperature`) and those that name none."""
    expanded: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for key, value in values.items():
        prefix, _, rest = key.partition(".")
        if prefix in expanded:
            expanded[prefix][rest] = value
    for key, value in values.items():
        if key.partition(".")[0] not in expanded:
            for own in expanded.values():
                own.setdefault(key, value)
    return {method: anchored(own) for method, own in expanded.items()}


def _candidate(method: str, values: Values, preset: str) -> Candidate:
    """Return what a search tries of a method: everything searched that no setting fixes, starting at a preset."""
    space, presets = _space(method)
    own, ranges = split_ranges(method, values)
    space = {**space, **ranges}
    settings = {**presets[search_spaces.DEFAULT_PRESET], **_preset(method, preset)}
    free = {key: distribution for key, distribution in space.items() if key not in own}
    fixed = {key: value for key, value in settings.items() if key not in space}
    first = {key: start(free[key], settings.get(key, keys(method)[key].default)) for key in free}
    return Candidate({**fixed, **own}, free, first)


def _space(method: str) -> tuple[dict[str, BaseDistribution], dict[str, dict[str, Any]]]:
    try:
        return search_spaces.load(method)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _preset(method: str, name: str) -> dict[str, Any]:
    presets = _space(method)[1]
    if name not in presets:
        raise UsageError(f"--preset of {method} must be one of {', '.join(presets)}, but got {name!r}.")
    return presets[name]


def estimate(record: Record, options: Options) -> "Estimate":
    """Measure a few real steps of each method of a planned search and predict its time, memory and disk space.

    `Estimate.check` refuses what cannot fit. Nothing is kept and no Ray is started.

    Raises:
        UsageError: If a trial can never run here, or a method's steps fail.
    """
    from segadapt.platform import cost

    return cost.estimate(record, options)


def search(record: Record, options: Options) -> Outcome:
    """Run a planned search, or go on with it if it was begun."""
    return run(record, options)


def resume(name: str, options: Options, *, rerank: int = 0, seeds: int = 3, keep_top: int | None = None) -> Outcome:
    """Go on with a search, single run or finish after its driver was killed; finished trials are not run again.

    Args:
        name: Of the experiment.
        options: Where it runs.
        rerank: Of a search: so many of its best configurations are trained again on other seeds.
        seeds: How many seeds that are.
        keep_top: Of a search: so many of the best trials keep their checkpoints from now on; None changes nothing.

    Raises:
        UsageError: If there is no such experiment, or it cannot go on as asked.
    """
    record = Record.load(open_storage(options.storage), name)
    if rerank:
        record = dataclasses.replace(_search_only(record, "--rerank"), rerank=rerank, seeds=seeds)
    if keep_top is not None:
        record = dataclasses.replace(_search_only(record, "--keep-top"), keep_top=keep_top)
    if rerank or keep_top is not None:
        _check_plan(record, Objective.parse(record.objective))
    return run(record, options)


def extend(
    name: str,
    options: Options,
    *,
    trials: int,
    time_budget_s: float | None = None,
    rerank: int = 0,
    seeds: int = 3,
    keep_top: int | None = None,
) -> Outcome:
    """Run more trials of a search; its sampler knows all earlier ones.

    Args:
        name: Of the search.
        options: Where it runs.
        trials: How many more.
        time_budget_s: Stops it after so many seconds.
        rerank: As in `resume`.
        seeds: As in `resume`.
        keep_top: As in `resume`.

    Raises:
        UsageError: If there is no such search, or a number is not positive.
    """
    record = _search_only(Record.load(open_storage(options.storage), name), "--extend")
    if trials < 1:
        raise UsageError(f"--trials must be positive, but got {trials}.")
    record = dataclasses.replace(record, trials=record.trials + trials, time_budget_s=time_budget_s)
    if rerank:
        record = dataclasses.replace(record, rerank=rerank, seeds=seeds)
    if keep_top is not None:
        record = dataclasses.replace(record, keep_top=keep_top)
    _check_plan(record, Objective.parse(record.objective))
    return run(record, options)


def _search_only(record: Record, option: str) -> Record:
    if record.kind != "search":
        raise UsageError(f"{option} must name a search, but {record.name!r} is a {record.kind}.")
    return record


def train(
    method: str,
    values: Values,
    options: Options,
    *,
    preset: str = search_spaces.DEFAULT_PRESET,
    name: str | None = None,
) -> tuple[str, Outcome]:
    """Run one trial of a method; returns the name of the experiment that holds it."""
    resolve(method, {})
    settings = {**_preset(method, preset), **values} if preset != search_spaces.DEFAULT_PRESET else dict(values)
    settings = anchored(settings)
    config = _checked(method, settings)
    record = Record(
        kind="train",
        name=_free_name(options.storage, options.tracking_uri, name, f"train-{method}-{config.data.name}"),
        candidates={method: Candidate(settings)},
        objective=TARGET,
    )
    return record.name, run(record, options)


def finish(
    run_name: str,
    values: Values,
    options: Options,
    *,
    search_name: str,
    rounds: int | None = None,
    seeds: int = 1,
    keep_losses: bool = False,
) -> tuple[list[FinishResult], Outcome]:
    """Self-train from the kept checkpoint of a trial: evaluate; in rounds label the target, train on both, evaluate.

    Asked for again with the same settings, it goes on where it was interrupted.

    Args:
        run_name: Name of a run in the search, or `best`.
        values: Settings of the method `self_training` that differ from its defaults, by dotted key. Labels are chosen
            by the rule of the trial's method, unless `method.rule` is given.
        options: Where it runs.
        search_name: The search (or single run) that holds the trial.
        rounds: Times the target is labelled; None leaves `method.rounds` as it is.
        seeds: How often it is done: with the trial's seed, or the one given, and those that follow it.
        keep_losses: Whether the losses of the trial's method stay, with its state, beside those on pseudo labels.

    Returns:
        One result per seed that began, best first, and how it ended.

    Raises:
        UsageError: If there is no such trial, it left no checkpoint, or its losses cannot be kept.
    """
    if seeds < 1:
        raise UsageError(f"--seeds must be at least 1, but got {seeds}.")
    board = runs(search_name, storage=options.storage, tracking_uri=options.tracking_uri)
    row = _pick(board, run_name)
    assert row.checkpoint is not None
    start = Path(row.checkpoint)
    try:
        trained = dict(flatten(json.loads((start / CONFIG).read_text())))
    except OSError as error:
        raise UsageError(
            f"The checkpoint of {row.name} must lie in {start}, but cannot be read: {error.strerror}. "
            "Finish another run, or run the trial again."
        ) from error
    if rounds is not None:
        values = {**values, "method.rounds": rounds}
    settings = finish_settings(row.method, trained, anchored(values), keep_losses=keep_losses)
    _checked("self_training", settings)
    asked = [row.checkpoint, settings, *([seeds] if seeds > 1 else [])]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    record = Record(
        kind="finish",
        name=f"{search_name}.finish-{row.name}-{digest}",
        candidates={"self_training": Candidate(settings)},
        objective=board.objective,
        trials=seeds,
        seeds=seeds,
        search=search_name,
        start=str(start),
        from_key=_key_of(row, options),
        from_name=row.name,
    )
    outcome = run(record, options)
    return _finish_results(record, row, options), outcome


def finish_settings(method: str, trained: Values, values: Values, *, keep_losses: bool = False) -> dict[str, Any]:
    """Return the settings of `self_training` that finish a trial.

    Args:
        method: Of the trial.
        trained: All settings of the trial, by dotted key.
        values: Settings of the finish that are given; they win.
        keep_losses: As in `finish`.
    """
    settings = {key: value for key, value in trained.items() if key.startswith(_INHERITED)}
    if (rule := method_class(method).aligns_corners) is not None:
        settings["network.align_corners"] = rule
    if keep_losses:
        own = dataclasses.asdict(_resolved(method, trained).method)
        settings |= {"method.kept_method": method, **{f"method.kept_settings.{key}": own[key] for key in own}}
    settings |= {"seed": trained["seed"], **values}
    if "method.rule" not in settings:
        settings = {**_labelling(method, trained), **settings}
    restart = _restarts(resolve("self_training", settings))
    settings.setdefault("trainer.evaluate_start", not restart)  # the trial's network is not what is trained then
    return settings


def evaluate(
    run_name: str,
    values: Values,
    *,
    search_name: str,
    protocol: str = "auto",
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    aggregation: float | None = None,
    save_predictions: str | None = None,
    storage: str = "runs",
    tracking_uri: str | None = None,
) -> EvaluationResult:
    """Evaluate a run's network on the target validation set at full label resolution, and note it in its MLflow run.

    Args:
        run_name: `best` for the best trial, or the name or id of a trial or finish in the search.
        values: What differs from the run's settings, by dotted key: other data, another size of the images.
        search_name: The search (or single run) that holds the run.
        protocol: One of `evaluating.PROTOCOLS`.
        scales: Sizes at which an image is shown; class probabilities are averaged.
        flip: Show each image mirrored as well.
        aggregation: Share of similar pixels' average in the prediction, for networks that offer it.
        save_predictions: New folder for the predictions as files for the Cityscapes server.
        storage: The storage folder.
        tracking_uri: MLflow server that holds the search; None for the storage folder's own.

    Raises:
        UsageError: If there is no such run, or it cannot be evaluated as asked.
    """
    import torch

    from segadapt.platform import evaluating

    try:
        inference = Inference(scales=tuple(scales), flip=flip)
    except ValueError as error:
        raise UsageError(str(error)) from error
    settings = evaluating.data_settings(values)
    overrides = dict(settings) if aggregation is None else {**settings, evaluating.AGGREGATION: float(aggregation)}
    row = _pick(runs(search_name, storage=storage, tracking_uri=tracking_uri), run_name, kinds=("trial", "finish"))
    assert row.checkpoint is not None
    key, opened = _key_of(row, Options(storage=storage, tracking_uri=tracking_uri)), open_storage(storage)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    deployed = evaluating.load_deployed(Path(row.checkpoint), overrides, device)
    images, labelled = evaluating.target_images(deployed.config, deployed.names)
    chosen = evaluating.protocol(protocol, deployed.names, labelled)
    submission = None
    if save_predictions is not None:
        submission = evaluating.Submission(Path(save_predictions), deployed.names)

    inference = dataclasses.replace(inference, window=deployed.config.trainer.eval_window)
    confusion = evaluating.evaluate_target(deployed, images, inference, device, submission).confusion
    found = score(confusion, deployed.names, chosen)
    variant = evaluating.variant(protocol, inference, aggregation, settings)
    result = EvaluationResult(
        run=row.name,
        checkpoint=row.checkpoint,
        step=deployed.step,
        protocol=protocol,
        how=f"{inference}, {evaluating.aggregation_text(deployed.config)}",
        images=len(images),
        metrics=found.metrics("target_val", chosen),
        iou={name: iou if iou == iou else None for name, iou in found.iou.items()},
        classes=deployed.names,
        confusion=confusion.tolist(),
        tracked=f"evaluation/{variant}",
        predictions=save_predictions,
    )
    tracker = tracking.Tracker(opened, tracking_uri)
    metrics = {f"{result.tracked}/{name}": value for name, value in result.metrics.items()}
    tracker.log_summary(key, metrics, result.step)
    tracker.log_json(key, {**dataclasses.asdict(result), "settings": dict(settings)}, f"{result.tracked}.json")
    tracker.close()
    return result


def export(
    run_name: str,
    *,
    search_name: str,
    out: str | None = None,
    register: str | None = None,
    storage: str = "runs",
    tracking_uri: str | None = None,
) -> ExportResult:
    """Write a run's network as ONNX and torch.export files and register it in MLflow, as a version linked to the run.

    The network alone: no teacher, no extra heads; normalisation, resizing and up-sampling are part of it. The files are
    compared with the run's network at several sizes before they are kept.

    Args:
        run_name: `best` for the best trial, or the name or id of a trial or finish in the search.
        search_name: The search (or single run) that holds the run.
        out: New or empty folder; None makes one named after search and run here.
        register: Name of the registered model; None takes the search's.
        storage: The storage folder.
        tracking_uri: MLflow server that holds the search; None for the storage folder's own.

    Raises:
        UsageError: If there is no such run, it cannot be exported, or the folder holds something.
        ExportError: If an exported file differs from the network; nothing is written.
    """
    import torch

    from segadapt.platform import deploy

    name = register or search_name
    deploy.check_name(name)
    origin = _origin(run_name, search_name, storage, tracking_uri)
    network, card = deploy.load_network(origin, torch.device("cpu"))
    folder = Path(out or re.sub(r"[^\w.-]", "-", f"{origin.search}-{origin.run}")).expanduser()  # a server named it
    differences = deploy.write(network, card, folder)
    version = deploy.register(_client(storage, tracking_uri), name, card, folder / deploy.ONNX)
    return ExportResult(origin.run, str(folder), differences, name, version)


def predict(
    source: str,
    images: str,
    out: str,
    *,
    search_name: str | None = None,
    batch_size: int = 8,
    overlay: bool = True,
    confidence: bool = False,
    storage: str = "runs",
    tracking_uri: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> "PredictionResult":
    """Label an image or a folder of images, on a GPU if there is one, and go on if that was interrupted.

    Args:
        source: An exported .onnx or .pt2 file; or, with `search_name`, `best` or the name or id of a trial or finish.
        images: An image, or a folder that is searched recursively.
        out: New, empty, or begun by the same command. Gets `labels`, `overlays` and `confidence`, with the images'
            paths.
        search_name: The search (or single run) that holds the run.
        batch_size: Images of equal size that are predicted at a time, at most.
        overlay: Also write the images under their classes' colours.
        confidence: Also write the probability of the predicted class, 0 to 255.
        storage: The storage folder.
        tracking_uri: MLflow server that holds the search; None for the storage folder's own.
        progress: Called with the number of images just done and of all.

    Raises:
        UsageError: If there is no such run or file, there are no images, or `out` holds something else.
    """
    import torch

    from segadapt.platform import deploy, predicting

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if source.endswith((".onnx", ".pt2")):
        network, card = deploy.open_exported(Path(source), device)
    elif search_name is None:
        raise UsageError(
            f"RUN needs --search NAME, and a file must end in .onnx or .pt2, but got {source!r} alone. "
            "`segadapt runs NAME` shows the runs of a search."
        )
    else:
        origin = _origin(source, search_name, storage, tracking_uri)
        network, card = deploy.from_run(origin, device)
    return predicting.predict(
        predicting.Labeller(network, card),
        Path(images).expanduser(),
        Path(out).expanduser(),
        batch_size=batch_size,
        overlay=overlay,
        confidence=confidence,
        progress=progress,
    )


def _origin(run_name: str, search_name: str, storage: str, tracking_uri: str | None) -> "Origin":
    from segadapt.platform.deploy import Origin

    row = _pick(runs(search_name, storage=storage, tracking_uri=tracking_uri), run_name, kinds=("trial", "finish"))
    assert row.checkpoint is not None
    tags = _client(storage, tracking_uri).get_run(row.run_id).data.tags
    return Origin(search_name, row.name, row.run_id, Path(row.checkpoint), tags.get("segadapt.data", ""))


def runs(
    search_name: str, *, selection: bool = False, storage: str = "runs", tracking_uri: str | None = None
) -> Leaderboard:
    """Return the leaderboard of a search or single run, read from MLflow; records that wait for it are sent first.

    Args:
        search_name: The search or single run.
        selection: Also judge what label-free scores would have chosen, by target mIoU.
        storage: The storage folder.
        tracking_uri: MLflow server that holds the search; None for the storage folder's own.

    Raises:
        UsageError: If MLflow knows no search of that name; lists those it knows.
    """
    tracking.send_waiting(Storage(Path(storage).expanduser().absolute()), tracking_uri)
    client = _client(storage, tracking_uri)
    found = _entries(client, search_name)
    parents = [entry for entry in found if entry.data.tags.get(tracking.KIND_TAG) in ("search", "train")]
    parent = parents[0].data if parents else None
    objective = Objective.parse(parent.params.get("objective", TARGET) if parent else TARGET)
    rows = _judged([_row(run, objective) for run in found if _kind(run) in ("trial", "finish")], objective)
    reached = {
        name.removeprefix("equal_budget/"): value
        for name, value in (parent.metrics if parent else {}).items()
        if name.startswith("equal_budget/")
    }
    steps = reached.pop("steps", None)
    ranking = rerank(_seeds(found, objective))
    return Leaderboard(
        search=search_name,
        objective=str(objective),
        rows=rows,
        baseline=parent.metrics.get(f"start/{objective.leading}") if parent else None,
        selection=compare(_kept(found)) if selection else (),
        methods=dict(sorted(reached.items(), key=lambda entry: -entry[1])),
        equal_steps=int(steps) if steps is not None else None,
        reranked=ranking,
        verdict=verdict(ranking) if ranking else None,
    )


def _judged(rows: Sequence[Row], objective: Objective) -> list[Row]:
    """Return rows best first, with what they are ordered by; those without a value come last."""
    trials = [row for row in rows if row.kind == "trial" and len(row.goals) == len(objective.goals)]
    goals = [row.goals for row in trials]
    score = dict(zip([row.run_id for row in trials], objective.scores(goals), strict=True))
    front = dict(zip([row.run_id for row in trials], objective.front(goals), strict=True)) if objective.is_front else {}
    judged = [
        dataclasses.replace(
            row,
            score=score.get(row.run_id, None if objective.ranked else row.best),
            on_front=front.get(row.run_id, False),
        )
        for row in rows
    ]
    return sorted(judged, key=lambda row: (row.score is None, -(row.score or 0.0), row.name))


def _seeds(entries: Sequence[Any], objective: Objective) -> dict[str, dict[int, float]]:
    """Return the leading goal of configurations that were trained again, by the name of their trial and the seed."""
    found: dict[str, dict[int, float]] = {}
    for entry in entries:
        value = entry.data.metrics.get(f"best/{objective.leading}")
        if _kind(entry) == "rerank" and value is not None:
            name, _, seed = entry.info.run_name.rpartition(".seed-")
            found.setdefault(name, {})[int(seed)] = value
    return found


def _kind(entry: Any) -> str | None:
    kind: str | None = entry.data.tags.get(tracking.KIND_TAG)
    return kind


def report(
    search_name: str,
    out: str | None = None,
    *,
    storage: str = "runs",
    tracking_uri: str | None = None,
    study_uri: str | None = None,
) -> Path:
    """Write a search as one HTML file that needs no network, and return its path.

    Args:
        search_name: The search.
        out: The file; None for `SEARCH.html` in the current folder.
        storage: The storage folder.
        tracking_uri: MLflow server that holds the search; None for the storage folder's own.
        study_uri: Optuna's storage; None for the file in the storage folder.

    Raises:
        UsageError: If there is no such search, or the file cannot be written.
    """
    from segadapt.platform.report import render

    board = runs(search_name, selection=True, storage=storage, tracking_uri=tracking_uri)
    client = _client(storage, tracking_uri)
    entries = _search_entries(client, search_name)
    study = _study(search_name, storage, study_uri)
    path = Path(out or f"{search_name}.html")
    try:
        path.write_text(render(board, entries, client, study))
    except OSError as error:
        raise UsageError(f"The report must be writable, but {path} is not: {error.strerror}.") from error
    return path


def status(
    search_name: str, *, storage: str = "runs", tracking_uri: str | None = None, study_uri: str | None = None
) -> "SearchStatus":
    """Return how a search stands; runs beside it, on this machine or another that sees its storage or its servers.

    Args:
        search_name: The search.
        storage: The storage folder.
        tracking_uri: MLflow server that holds the search; None for the storage folder's own.
        study_uri: Optuna's storage; None for the file in the storage folder.

    Raises:
        UsageError: If there is no such search.
    """
    from segadapt.platform.status import search_status

    client = _client(storage, tracking_uri)
    entries = _search_entries(client, search_name)
    return search_status(search_name, entries, client, _study(search_name, storage, study_uri))


def _entries(client: Any, name: str) -> list[Any]:
    """Return the MLflow runs of an experiment."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        known = ", ".join(sorted(found.name for found in client.search_experiments() if found.name != "Default"))
        raise UsageError(f"There must be a search {name!r}, but there is not. Known: {known or 'none'}.")
    return list(client.search_runs([experiment.experiment_id], max_results=50_000))


def _search_entries(client: Any, name: str) -> list[Any]:
    """Return the MLflow runs of a search."""
    found = _entries(client, name)
    if not any(_kind(entry) == "search" for entry in found):
        raise UsageError(f"SEARCH must name a search, but {name!r} is a single run. `segadapt runs` shows it.")
    return found


def _study(name: str, storage: str, uri: str | None) -> Any:
    """Return the study of a search; None where only MLflow is at hand."""
    import optuna

    opened = Storage(Path(storage).expanduser().absolute())
    if uri is None and not opened.study_database.is_file():
        return None
    try:
        return optuna.load_study(study_name=name, storage=open_study_storage(opened.study_url(uri)))
    except KeyError:
        return None


def data_make(folder: str, values: Values, *, layout: str = "folder") -> Path:
    """Write the streets benchmark in the layout of a kind of dataset.

    Args:
        folder: A new or empty folder.
        values: Settings of `data.streets`, by dotted key.
        layout: `folder` writes both domains, in the layout for own data. `gta5` and `synthia` write the source's
            training set, `cityscapes` the target, exactly as those datasets are stored.

    Raises:
        UsageError: If the folder holds something already, or a setting or the layout is not known.
    """
    from segadapt.trainables.core.data.datasets import KINDS
    from segadapt.trainables.core.data.streets import labelled_streets

    if layout not in KINDS:
        raise UsageError(f"--format must be one of {', '.join(KINDS)}, but got {layout!r}.")
    config = _streets(values)
    root = Path(folder)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UsageError(f"The folder to write must be new or empty, but {root} is not. Choose another.")
    KINDS[layout].write(root, labelled_streets(config.data.streets))
    return root


def data_check(
    kind: str, root: str, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> "DatasetReport":
    """Decode every file of a dataset and report what it holds and all that is wrong.

    Args:
        kind: gta5, synthia, cityscapes, folder or shards.
        root: Its folder, or the URI of packed shards.
        progress: Called with the number of images just done and of all.

    Raises:
        UsageError: If there is no such kind or folder, or its class list cannot be read.
    """
    from segadapt.trainables.core.data.checking import check_dataset

    try:
        return check_dataset(kind, root, progress)
    except ValueError as error:
        raise UsageError(str(error)) from error


def data_pack(
    kind: str,
    root: str,
    out: str,
    *,
    splits: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    image_format: str = "png",
    quality: int = 95,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> "Manifest":
    """Write a dataset as Parquet shards, which are read several times faster; go on if it was interrupted.

    Args:
        kind: gta5, synthia, cityscapes or folder.
        root: Its folder.
        out: A new or empty folder, or one in which the same was packed before.
        splits: Those to pack; None packs all.
        size: (H, W) the training split is resized to. The validation split keeps its size, and scores their meaning.
        image_format: png, without loss, or jpeg.
        quality: Of JPEG.
        progress: Called with the number of images just done and of all.

    Raises:
        UsageError: If there is no such dataset, a file of it is broken, or the folder holds something else.
    """
    from segadapt.trainables.core.data.datasets import KINDS, open_dataset
    from segadapt.trainables.core.data.packing import PackConfig, pack

    if kind not in KINDS:
        raise UsageError(f"The kind of a dataset to pack must be one of {', '.join(KINDS)}, but got {kind!r}.")
    try:
        config = PackConfig(size, image_format, quality)  # type: ignore[arg-type]  # checked there
        return pack(open_dataset(kind, root), Path(out), config, splits=splits, progress=progress)
    except ValueError as error:
        raise UsageError(str(error)) from error


def data_show(path: str, values: Values) -> Path:
    """Write a contact sheet of both domains with labels in Cityscapes colours."""
    from segadapt.trainables.core.data.streets import contact_sheet

    target = Path(path)
    if not target.parent.is_dir():
        raise UsageError(f"The folder of the picture must exist, but {target.parent} does not. Make it first.")
    contact_sheet(_streets(values).data.streets, target)
    return target


def cache_list(*, storage: str = "runs") -> cache.CacheContent:
    """Return what is in the stage cache: finished stages, the leases of those being computed, what was left over.

    Raises:
        UsageError: If there is no storage folder.
    """
    return cache.content(_stage_storage(storage))


def cache_prune(
    *, older_than_days: float | None = None, everything: bool = False, dry_run: bool = False, storage: str = "runs"
) -> cache.Pruned:
    """Remove stages that were not used of late, and what dead processes left; never what an experiment still needs.

    Args:
        older_than_days: Removes stages that were not used for so many days.
        everything: Removes all stages that may be removed; in place of `older_than_days`.
        dry_run: Only return what would be removed.
        storage: The storage folder.

    Raises:
        UsageError: If not exactly one of both is given, or there is no storage folder.
    """
    if everything == (older_than_days is not None) or (older_than_days is not None and older_than_days < 0):
        shown = f"{older_than_days:g} days" if older_than_days is not None else "no days"
        raise UsageError(
            "Either --older-than DAYS, not negative, or --all must be given, but got "
            f"{shown} and {'--all' if everything else 'no --all'}."
        )
    return cache.prune(_stage_storage(storage), 86400 * (older_than_days or 0.0), dry_run=dry_run)


def doctor(
    *,
    storage: str = "runs",
    tracking_uri: str | None = None,
    study_uri: str | None = None,
    address: str | None = None,
    fix: bool = False,
) -> "Iterator[Finding]":
    """Look whether environment, storage, tracking, studies and cluster are sound and the ledgers agree.

    What is found is yielded as it is found, and with `fix` repaired before.

    Args:
        storage: The storage folder.
        tracking_uri: MLflow server; None for the storage folder's own.
        study_uri: Optuna's storage; None for the storage folder's own.
        address: Ray cluster; None takes RAY_ADDRESS, and without it none is joined or started.
        fix: Repair what can be repaired truthfully; never an experiment that a command works on.
    """
    from segadapt.platform.doctor import Examination, examine

    opened = Storage(Path(storage).expanduser().absolute())
    return examine(Examination(opened, tracking_uri, study_uri, address, fix))


def _stage_storage(storage: str) -> Storage:
    opened = Storage(Path(storage).expanduser().absolute())
    if not opened.root.is_dir():
        raise UsageError(f"--storage must be an existing folder, but {opened.root} is not. Name the one of your runs.")
    return opened


def submit(words: Sequence[str], *, address: str, name: str | None = None, wheel: str | None = None) -> str:
    """Run a command on a cluster as a Ray Job and return the job's name; see `jobs.submit`.

    Raises:
        UsageError: If the command cannot run there, or the cluster does not answer.
    """
    from segadapt.platform import jobs

    return jobs.submit(words, address=address, name=name, wheel=wheel)


def jobs(*, address: str) -> "list[Job]":
    """Return the jobs that a cluster knows, oldest first.

    Raises:
        UsageError: If the cluster does not answer.
    """
    from segadapt.platform import jobs

    return jobs.jobs(address)


def logs(job: str, *, address: str, follow: bool = False) -> Iterator[str]:
    """Yield what a job has printed, and with `follow` what it prints until it ends.

    Raises:
        UsageError: If there is no such job, or the cluster does not answer.
    """
    from segadapt.platform import jobs

    return jobs.logs(job, address, follow=follow)


def trial_log(
    run_name: str, search_name: str, *, follow: bool = False, storage: str = "runs", tracking_uri: str | None = None
) -> Iterator[dict[str, Any]]:
    """Return the entries of a trial's log by time, and with `follow` those to come until the trial ends.

    Args:
        run_name: `best`, or a run of the search by name or id: a trial, a shared stage, a finish.
        search_name: The search or single run.
        follow: Wait for more.
        storage: The storage folder.
        tracking_uri: MLflow server that holds the search; None for the storage folder's own.

    Raises:
        UsageError: If there is no such run, or it left no log here.
    """
    found = _entries(_client(storage, tracking_uri), search_name)
    if run_name == "best":
        run_name = _pick(runs(search_name, storage=storage, tracking_uri=tracking_uri), run_name).run_id
    logged = [entry for entry in found if "segadapt.trial_id" in entry.data.tags]
    chosen = [entry for entry in logged if run_name in (entry.info.run_name, entry.info.run_id)]
    if not chosen:
        known = ", ".join(sorted({entry.info.run_name for entry in logged})) or "none"
        raise UsageError(f"TRIAL must be `best` or a run of {search_name!r}, but got {run_name!r}. Those are: {known}.")
    newest = max(chosen, key=lambda entry: entry.info.start_time)  # shared stages may have been begun twice
    tags, opened = newest.data.tags, Storage(Path(storage).expanduser().absolute())
    check_name(tags["segadapt.trial_id"])  # whoever may write to MLflow chose it
    folder = log_folder(trial_artifacts(opened.experiment(tags["segadapt.experiment"]), tags["segadapt.trial_id"]))
    if not folder.is_dir():
        raise UsageError(
            f"The log of {newest.info.run_name} must lie in {folder}, but does not. Name the search's own --storage. "
            f"Once the trial has ended, its run in MLflow ({newest.info.run_id}) has it too, among the artifacts: logs."
        )
    return follow_log(folder) if follow else iter(log_entries(folder))


def stop(job: str, *, address: str) -> bool:
    """End a job as SIGTERM does; returns False if it had ended.

    Raises:
        UsageError: If there is no such job, or the cluster does not answer.
    """
    from segadapt.platform import jobs

    return jobs.stop(job, address)


def ui(*, storage: str = "runs", port: int = 5000) -> int:
    """Serve MLflow's pages for a storage folder on 127.0.0.1 until interrupted; returns the server's exit status.

    Raises:
        UsageError: If there is nothing to show, or the port is taken.
    """
    opened = Storage(Path(storage).expanduser().absolute())
    tracking.send_waiting(opened, None)
    if not opened.mlflow_database.is_file():
        raise UsageError(
            f"--storage must hold runs, but {opened.root} has none yet. `segadapt search sdca` makes some."
        )
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UsageError(f"--port must be free, but {port} is in use. Choose another, e.g. --port {port + 1}.")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--allowed-hosts", f"127.0.0.1:{port},localhost:{port}"]  # no other site's name leads here
    command += ["--backend-store-uri", tracking.tracking_uri(opened, None)]
    command += ["--artifacts-destination", str(opened.mlflow_artifacts)]
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true", **os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _wait_for_health(f"http://127.0.0.1:{port}", server)
        print(f"MLflow shows {opened.root} at http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
        server.communicate()
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()
        server.wait(timeout=30)
    return 0


def _wait_for_health(address: str, server: "subprocess.Popen[str]", timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            message = server.stderr.read() if server.stderr else ""
            raise UsageError(f"The MLflow server must start, but ended: {message.strip()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise UsageError(f"The MLflow server must answer within {timeout_s:.0f} s, but did not. Is the machine busy?")


def _client(storage: str, uri: str | None) -> Any:
    opened = Storage(Path(storage).expanduser().absolute())
    if uri is None and not opened.mlflow_database.is_file():
        raise UsageError(
            f"--storage must hold runs, but {opened.root} has none yet. `segadapt search sdca` makes some."
        )
    return tracking.client(tracking.tracking_uri(opened, uri))


def _checked(method: str, values: Values) -> TrialConfig:
    """Return the configuration, having looked at everything that can be wrong before a process is started."""
    from segadapt.trainables.core.data.datasets import load_data

    config = resolve(method, values)
    try:
        if config.data.name != "streets":  # generated, nothing can be missing
            load_data(config.data)
        if config.network.weights is not None:
            build_segmenter(num_classes=2, **vars(config.network))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return config


def _streets(values: Values) -> TrialConfig:
    return resolve("source_only", values)


def _free_name(storage: str, tracking_uri: str | None, name: str | None, default: str) -> str:
    """Return `name`, or else `default` with a number if it is taken in the storage folder or on the MLflow server.

    Raises:
        UsageError: If `name` is taken, or the server does not answer.
    """
    opened = Storage(Path(storage).expanduser().absolute())
    server = _client(storage, tracking_uri) if tracking_uri is not None else None

    def taken(candidate: str) -> bool:
        if opened.experiment(candidate).exists():
            return True
        try:
            return server is not None and server.get_experiment_by_name(candidate) is not None
        except Exception as error:  # whatever the client raises for an address that is none of a server's
            raise UsageError(
                f"--tracking-uri must name an MLflow server that answers, but {redacted(tracking_uri)} does not: "
                f"{redacted(error)}"
            ) from error

    if name is not None:
        if taken(name):
            raise UsageError(
                f"--name must be new, but {name!r} exists in {opened.root} or on the MLflow server. "
                f"Go on with it by `--resume {name}`, or choose another."
            )
        return name
    candidate, number = default, 1
    while taken(candidate):
        number += 1
        candidate = f"{default}-{number}"
    return candidate


def _pick(board: Leaderboard, name: str, kinds: Sequence[str] = ("trial",)) -> Row:
    """Return the best trial, or the run of one of `kinds` with this name or id."""
    rows = [row for row in board.rows if row.kind in kinds and (row.checkpoint is not None or row.checkpoint_removed)]
    known = ", ".join(row.name for row in rows if row.checkpoint is not None) or "none"
    if board.reranked and name == "best":
        name = board.reranked[0].name
    for row in rows:
        if name in (row.name, row.run_id) or (name == "best" and row.kind == "trial"):
            if row.checkpoint is None:
                raise UsageError(
                    f"The checkpoint of {row.name} must be there, but was not kept: {board.search!r} keeps those of "
                    f"its best trials alone (--keep-top). Name one of {known}; or train {row.name} again, by `segadapt "
                    f"train {row.method}` with its settings."
                )
            return row
    raise UsageError(
        f"RUN must be `best` or a {' or '.join(kinds)} of {board.search!r} with a checkpoint, but got {name!r}. "
        f"Those are: {known}."
    )


def _key_of(row: Row, options: Options) -> str:
    entry = _client(options.storage, options.tracking_uri).get_run(row.run_id)
    return str(entry.data.tags[tracking.KEY_TAG])


def _row(entry: Any, objective: Objective) -> Row:
    tags, metrics = entry.data.tags, entry.data.metrics
    goals = {goal: metrics[f"best/{goal}"] for goal in objective.goals if f"best/{goal}" in metrics}
    checkpoint = tags.get(tracking.CHECKPOINT_TAG)
    return Row(
        name=entry.info.run_name,
        method=tags[tracking.METHOD_TAG],
        kind=tags[tracking.KIND_TAG],
        state=tags.get(tracking.STATE_TAG, entry.info.status.lower()),
        best=goals.get(objective.leading),
        goals=goals,
        best_step=int(tags["segadapt.best_step"]) if "segadapt.best_step" in tags else None,
        last=metrics.get(objective.leading),
        params=entry.data.params,
        run_id=entry.info.run_id,
        checkpoint=checkpoint if checkpoint != tracking.NOT_KEPT else None,
        checkpoint_removed=checkpoint == tracking.NOT_KEPT,
        failure=tags.get(tracking.FAILURE_TAG),
    )


def _kept(entries: Sequence[Any]) -> dict[str, dict[str, float]]:
    """Return what was reported with the kept checkpoint of each trial, by its name."""
    return {
        entry.info.run_name: {
            name: entry.data.metrics[f"best/{name}"] for name in GOALS if f"best/{name}" in entry.data.metrics
        }
        for entry in entries
        if entry.data.tags.get(tracking.KIND_TAG) == "trial"
    }


def _labelling(method: str, trained: Values) -> dict[str, Any]:
    """Return the settings of `self_training` that label as the trial's method does, with the trial's own settings."""
    rule = method_class(method).labelling(_resolved(method, trained).method)
    return {f"method.{key}": value for key, value in rule.items()}


def _resolved(method: str, trained: Values) -> TrialConfig:
    """Return the configuration of a trial from what its checkpoint says."""
    return resolve(method, {key: value for key, value in trained.items() if key in keys(method)})


def _restarts(config: TrialConfig) -> bool:
    """Return whether a finish gives the network its first weights again."""
    assert isinstance(config.method, SelfTraining.Config)
    return config.method.restart


def _finish_results(record: Record, row: Row, options: Options) -> list[FinishResult]:
    """Return how the runs of a finish ended, best first."""
    client = _client(options.storage, options.tracking_uri)
    experiment = client.get_experiment_by_name(record.search)
    found = client.search_runs([experiment.experiment_id], f"tags.`segadapt.experiment` = '{record.name}'")
    newest = {run.info.run_name: run for run in reversed(found)}
    results = [_finish_result(record, row, run, client, options) for run in newest.values()]
    return sorted(results, key=lambda result: (math.inf if result.best is None else -result.best, result.seed))


def _finish_result(record: Record, row: Row, run: Any, client: Any, options: Options) -> FinishResult:
    before, after = {}, {}
    for name in run.data.metrics:
        if name.startswith(("target_val/", "source_val/")):
            history = sorted(client.get_metric_history(run.info.run_id, name), key=lambda entry: entry.step)
            before[name], after[name] = history[0].value, history[-1].value
    if _restarts(next(iter(record.configs().values()))):  # what was evaluated first is not the trial's network
        shown = read_metrics(Path(str(record.start)))
        before = {name: shown.get(name, math.nan) for name in after}
    metrics, tags = run.data.metrics, run.data.tags
    ended = itertools.takewhile(lambda number: f"round/{number}/labelled_share" in metrics, itertools.count(1))
    rounds = [
        {name.removeprefix(f"round/{number}/"): v for name, v in metrics.items() if name.startswith(f"round/{number}/")}
        for number in ended
    ]
    kept = list(checkpoints(open_storage(options.storage).experiment(record.name), tags["segadapt.trial_id"]))
    last = max(kept, key=lambda entry: entry.metrics["step"], default=None)
    return FinishResult(
        name=run.info.run_name,
        from_run=row.name,
        seed=int(tags["segadapt.seed"]),
        best=metrics.get(f"best/{Objective.parse(record.objective).leading}"),
        before=before,
        after=after,
        rounds=rounds,
        checkpoint=tags.get(tracking.CHECKPOINT_TAG),
        last=str(last.path) if last is not None else None,
    )
