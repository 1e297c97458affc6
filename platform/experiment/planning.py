"""Checking what is asked for, and planning a search or a run."""

import json
import shlex
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypedDict

from segadapt import search_spaces
from segadapt.platform.errors import UsageError
from segadapt.platform.experiment.candidates import (
    forked_candidates,
    new_candidates,
    preset_settings,
    space_of,
    with_packed_sizes,
)
from segadapt.platform.experiment.naming import free_name, usual_name
from segadapt.platform.experiment.record import Candidate, Record
from segadapt.platform.search.samplers import check_sampler
from segadapt.platform.search.schedulers import SCHEDULERS
from segadapt.platform.settings.config import Values, anchored, read_experiment, resolve
from segadapt.platform.settings.objective import LABEL_FREE, TARGET, Objective
from segadapt.platform.storage.folders import Place
from segadapt.platform.trial.checking import checked_config


class SearchChoices(TypedDict, total=False):
    """What may be asked of a search besides its methods and settings; the fields of `SearchRequest` explain each."""

    config: str | None
    skip_bad: bool
    preset: str | None
    time_budget_s: float | None
    max_gpu_hours: float | None
    concurrent: int | None
    sampler: str | None
    scheduler: str | None
    seed: int | None
    rerank: int | None
    seeds: int | None
    keep_top: int | None
    resume: str | None
    extend: str | None
    fork: str | None
    warm_start: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What is asked of a search, by the shell or a notebook.

    What is None, False or an empty list was not asked for; 0 and "" were.
    """

    methods: Sequence[str] = ()
    """Names of the methods to search, or `all` for every method that adapts."""
    settings: Values = field(default_factory=dict)
    """Settings that no trial changes, by dotted key; after `METHOD.`, of that method alone. A range
    (`interval(0.1, 10)`, `log_interval(0.1, 10)` or `choice(a, b)`) is searched instead."""
    config: str | None = None
    """Experiment file with more settings; `settings` override it."""
    skip_bad: bool = False
    """Leave out files that cannot be decoded."""
    preset: str | None = None
    """Where the search starts, by default at `paper`: its searched settings are tried first, its others are fixed."""
    trials: int | None = None
    """Trials to run, by default 20; with `extend`, trials to add."""
    time_budget_s: float | None = None
    """Seconds after which the search stops."""
    max_gpu_hours: float | None = None
    """GPU hours of trials and shared stages after which the search stops."""
    concurrent: int | None = None
    """Trials at a time, by default as many as fit."""
    objective: str | None = None
    """One of `GOALS`, or several (see `Objective`); by default target mIoU."""
    sampler: str | None = None
    """One of `SAMPLERS`, by default `auto`."""
    scheduler: str | None = None
    """One of `SCHEDULERS`, by default `asha`, or `none` where trials are compared by dominance."""
    seed: int | None = None
    """Seed of the sampler, by default 0."""
    rerank: int | None = None
    """Number of the best configurations that are trained again on other seeds."""
    seeds: int | None = None
    """Number of those seeds, by default 3."""
    keep_top: int | None = None
    """Number of the best trials that keep their checkpoints; by default all do."""
    name: str | None = None
    """Name of the search, by default made from methods and data."""
    resume: str | None = None
    """Search to go on with."""
    extend: str | None = None
    """Search that runs more trials."""
    fork: str | None = None
    """Search whose methods, settings and ranges this one begins with; what else is asked changes them."""
    warm_start: Sequence[str] = ()
    """Searches whose trials count as prior points where this one could have run them."""
    dry_run: bool = False
    """Whether it is only planned."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What is asked of a single run. What is None, False or an empty list was not asked for; 0 and "" were."""

    method: str | None = None
    settings: Values = field(default_factory=dict)
    """Settings by dotted key."""
    config: str | None = None
    """Experiment file with more settings; `settings` override it."""
    skip_bad: bool = False
    """Leave out files that cannot be decoded."""
    preset: str | None = None
    """Preset of the method to start from, by default `paper`."""
    objective: str | None = None
    """What the kept checkpoint is the best by, as a search's; by default target mIoU."""
    name: str | None = None
    """Name of the run, by default made from method and data."""
    resume: str | None = None
    """Run to go on with."""


_ACTS_WITH: Mapping[type, Mapping[str, frozenset[str]]] = {
    SearchRequest: {
        "resume": frozenset({"rerank", "seeds", "keep_top"}),
        "extend": frozenset({"trials", "time_budget_s", "rerank", "seeds", "keep_top"}),
        "fork": frozenset(entry.name for entry in fields(SearchRequest)) - {"methods", "preset"},
    },
    TrainRequest: {"resume": frozenset()},
}
"""What may be asked for beside the name of an experiment that exists, by how it is named. The rest was decided when it
began."""

_TAKEN = {"resume": "methods and settings", "extend": "methods and settings", "fork": "its methods"}
"""What is taken from a search that exists."""

_DEFAULT_TRIALS, _DEFAULT_SEEDS = 20, 3


def plan_search(request: SearchRequest, place: Place) -> Record:
    """Check what is asked of a search and return what it would do; touches nothing.

    Args:
        request: What is asked.
        place: Where the search is kept and tracked.

    Raises:
        UsageError: If a method, a setting, a range or a number is not as it must be, or something that is asked for
            could not act.
    """
    _refuse_idle(request)
    if request.resume is not None:
        record = _changed(Record.load(place.folders, request.resume), request)
    elif request.extend is not None:
        record = _extended(search_only(Record.load(place.folders, request.extend), "--extend"), request)
    else:
        record = _new_search(request, place)
    if record.kind == "search":
        check_plan(record, Objective.parse(record.objective))
    check_labels(record)
    return record


def plan_training(request: TrainRequest, place: Place) -> Record:
    """Check what is asked of a single run and return what it would do; touches nothing.

    Raises:
        UsageError: If a method or setting is not as it must be, or something that is asked for could not act.
    """
    _refuse_idle(request)
    if request.resume is not None:
        record = Record.load(place.folders, request.resume)
        check_labels(record)
        return record
    if request.method is None:
        raise UsageError("METHOD must be given, or --resume NAME. `segadapt list` shows the methods.")
    resolve(request.method, {})
    preset = search_spaces.DEFAULT_PRESET if request.preset is None else request.preset
    base = preset_settings(request.method, preset) if preset != search_spaces.DEFAULT_PRESET else {}
    settings = with_packed_sizes(anchored({**base, **_settings(request)}))
    config = checked_config(request.method, settings, place.folders)
    record = Record(
        kind="train",
        name=free_name(place, request.name, usual_name("train", [request.method], config.data.name)),
        candidates={request.method: Candidate(settings)},
        objective=str(Objective.parse(TARGET if request.objective is None else request.objective)),
    )
    check_labels(record)
    return record


def _settings(request: SearchRequest | TrainRequest) -> dict[str, Any]:
    """Return the settings that are asked for, those of the experiment file included."""
    from_file = read_experiment(Path(request.config)) if request.config is not None else {}
    return {**from_file, **({"data.skip_bad": True} if request.skip_bad else {}), **request.settings}


def _asked(request: SearchRequest | TrainRequest) -> dict[str, str]:
    """Return what is asked for, by field, as the command line spells it; numbers and texts count whatever they are."""
    spelled: dict[str, str] = {}
    for entry in fields(request):
        value = getattr(request, entry.name)
        if value is None or value is False or (isinstance(value, Sized) and not isinstance(value, str) and not value):
            continue
        match entry.name:
            case "settings":
                spelled[entry.name] = " ".join(f"{key}={setting}" for key, setting in value.items())
            case "methods" | "method":
                spelled[entry.name] = shlex.join([value] if isinstance(value, str) else value)
            case "dry_run":
                spelled[entry.name] = "--dry-run (in Python: `plan`)"
            case name:
                spelled[name] = "--" + name.removesuffix("_s").replace("_", "-")
    return spelled


def _refuse_idle(request: SearchRequest | TrainRequest) -> None:
    """Refuse what could not act, by name.

    Raises:
        UsageError: If there is such a thing.
    """
    asked = _asked(request)
    for option, acting in _ACTS_WITH[type(request)].items():
        idle = [spelled for name, spelled in asked.items() if name != option and name not in acting]
        if option not in asked or not idle:
            continue
        taken, kind, advice = _TAKEN[option], "search", "Leave them out"
        if isinstance(request, TrainRequest):
            taken, kind, advice = "method and settings", "run", "Leave them out, or begin a new run"
        elif option != "fork":
            advice = "Leave them out; --fork begins a new search with changed settings"
        raise UsageError(
            f"--{option} takes {taken} from the {kind} {getattr(request, option)!r}, but got {' '.join(idle)}. "
            f"{advice}."
        )
    if request.skip_bad and request.settings.get("data.skip_bad", True) is not True:
        raise UsageError(
            "--skip-bad sets data.skip_bad=true, but got data.skip_bad="
            f"{json.dumps(request.settings['data.skip_bad'], default=str)} as well. Keep one."
        )
    if isinstance(request, SearchRequest) and request.seeds is not None and not request.rerank:
        rerank = "without it" if request.rerank is None else f"and --rerank {request.rerank}"
        raise UsageError(
            "--seeds must come with --rerank K, whose runs they are for, but got "
            f"--seeds {request.seeds} {rerank}. Leave it out, or give both."
        )


def _changed(record: Record, request: SearchRequest) -> Record:
    """Return the record of an experiment that goes on, with what is asked of it anew."""
    if request.rerank is not None:
        seeds = _DEFAULT_SEEDS if request.seeds is None else request.seeds
        seeds = seeds if request.rerank else 0
        record = replace(search_only(record, "--rerank"), rerank=request.rerank, seeds=seeds)
    if request.keep_top is not None:
        record = replace(search_only(record, "--keep-top"), keep_top=request.keep_top)
    return record


def _extended(record: Record, request: SearchRequest) -> Record:
    """Return the record of a search with more trials."""
    trials = _DEFAULT_TRIALS if request.trials is None else request.trials
    if trials < 1:
        raise UsageError(f"--trials must be positive, but got {trials}.")
    return _changed(replace(record, trials=record.trials + trials, time_budget_s=request.time_budget_s), request)


def _new_search(request: SearchRequest, place: Place) -> Record:
    """Return the record of a new search."""
    values, folders = _settings(request), place.folders
    parent = search_only(Record.load(folders, request.fork), "--fork") if request.fork is not None else None
    for earlier in request.warm_start:
        search_only(Record.load(folders, earlier), "--warm-start")
    if parent is not None:
        candidates = forked_candidates(parent, values)
    else:
        preset = search_spaces.DEFAULT_PRESET if request.preset is None else request.preset
        candidates = new_candidates(request.methods, values, preset)
    base = parent or Record("search", "", {}, TARGET, trials=_DEFAULT_TRIALS)
    objective = Objective.parse(base.objective if request.objective is None else request.objective)
    scheduler = "none" if objective.is_front else base.scheduler
    configs = {
        method: checked_config(method, {**each.fixed, **each.first}, place.folders)
        for method, each in candidates.items()
    }
    for method, each in candidates.items():
        if "online.enabled" in each.space:  # only some trials have what must fit then
            checked_config(method, {**each.fixed, **each.first, "online.enabled": True}, place.folders)
    usual = usual_name("search", candidates, next(iter(configs.values())).data.name)
    earlier_searches = dict.fromkeys([*([request.fork] if request.fork is not None else []), *request.warm_start])
    seeds = _DEFAULT_SEEDS if request.seeds is None else request.seeds
    return Record(
        kind="search",
        name=free_name(place, request.name, usual),
        candidates=candidates,
        objective=str(objective),
        seed=base.seed if request.seed is None else request.seed,
        trials=base.trials if request.trials is None else request.trials,
        concurrent=request.concurrent,
        time_budget_s=request.time_budget_s,
        max_gpu_hours=request.max_gpu_hours,
        # `check_plan` looks at the sampler
        sampler=base.sampler if request.sampler is None else request.sampler,  # type: ignore[arg-type]
        scheduler=scheduler if request.scheduler is None else request.scheduler,
        forked_from=request.fork,
        warm_start=list(earlier_searches),
        rerank=0 if request.rerank is None else request.rerank,
        seeds=seeds if request.rerank else 0,
        keep_top=request.keep_top,
    )


def check_plan(record: Record, objective: Objective) -> None:
    """Make sure that the parts of a planned search fit together."""
    limits = (record.trials, record.concurrent, record.time_budget_s, record.max_gpu_hours)
    if any(number is not None and number <= 0 for number in limits):
        raise UsageError(
            "--trials, --concurrent, --time-budget and --max-gpu-hours must be positive, but got "
            f"{', '.join(map(str, limits))}."
        )
    spaces = record.settings().spaces
    if len(spaces) == 1 and not any(spaces.values()):
        fixed = ", ".join(key for method in spaces for key in space_of(method)[0])
        raise UsageError(f"A search must vary something, but KEY=VALUE fixes all of {fixed}. Free one.")
    check_sampler(record.sampler, spaces, objective)
    if record.scheduler not in SCHEDULERS:
        raise UsageError(f"--scheduler must be one of {', '.join(SCHEDULERS)}, but got {record.scheduler!r}.")
    scheduler = SCHEDULERS[record.scheduler]
    if objective.is_front and scheduler.compares:
        raise UsageError(
            f"--scheduler must be none for a Pareto front, since trials are compared at their end, but got "
            f"{record.scheduler!r}. Leave it out, or join the goals by '+' to rank trials."
        )
    if len(objective.goals) > 1 and scheduler.one_goal:
        fitting = " or ".join(name for name, each in SCHEDULERS.items() if each.compares and not each.one_goal)
        raise UsageError(f"--scheduler {record.scheduler} must have one goal, but got {objective}. Use {fitting}.")
    if record.rerank < 0 or (record.rerank > 0 and record.seeds < 2):
        raise UsageError(
            "--rerank must not be negative and --seeds at least 2, since one seed tells nothing of their noise, but "
            f"got {record.rerank} and {record.seeds}."
        )
    if record.keep_top is not None and record.keep_top < 1:
        raise UsageError(f"--keep-top must be at least 1, so that a trial can be finished, but got {record.keep_top}.")


def search_only(record: Record, option: str) -> Record:
    """Return the record of a search.

    Raises:
        UsageError: If it is that of another kind of experiment.
    """
    if record.kind != "search":
        raise UsageError(f"{option} must name a search, but {record.name!r} is a {record.kind}.")
    return record


def check_labels(record: Record) -> None:
    """Make sure that the data have the labels that training and the objective need, some pixel of a trained class.

    Raises:
        UsageError: If they have not, or cannot be read.
    """
    from segadapt.trainables.core.data.datasets import load_data
    from segadapt.trainables.core.data.label_statistics import shows_a_class

    goals = Objective.parse(record.objective).goals
    for config in dict.fromkeys(config.data for config in record.configs.values() if config.data.source is not None):
        try:
            data, evaluation = load_data(config)
            labelled = config.target if config.oracle else config.source
            needed = {"train": (data.source, labelled), "validation": (evaluation.source, config.source)}
            count = len(data.classes)
            blank = [(name, *each) for name, each in needed.items() if not shows_a_class(each[0], count)]
            knows_target = TARGET not in goals or shows_a_class(evaluation.target, count)
        except ValueError as error:
            raise UsageError(str(error)) from error
        for name, images, location in blank:
            raise UsageError(
                f"Labels of the source must show a trained class ({', '.join(data.classes.names)}), but every pixel of "
                f"the {len(images)} {name} labels in {location} is of another or none. `segadapt data check` shows "
                "what they hold."
            )
        if not knows_target:
            raise UsageError(
                _no_target_label(record.objective, config.target, len(evaluation.scored), evaluation.target)
            )


def _no_target_label(objective: str, location: str | None, images: int, labelled: Sized) -> str:
    """Say that an objective asks for target labels where there are none, and which objectives do not."""
    lack = f"none of the {images} target validation images in {location} has one"
    if len(labelled):
        lack = f"no pixel of the {len(labelled)} target validation labels in {location} is of a trained class"
    return (
        f"The objective {objective} must find labels of the target, but {lack}. Choose without them: "
        f"--objective {' or '.join(LABEL_FREE)}."
    )
