"""Plan, search, train and finish."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict, Unpack

from segadapt.platform.experiment.planning import (
    SearchChoices,
    SearchRequest,
    TrainRequest,
    plan_search,
    plan_training,
)
from segadapt.platform.experiment.record import Options, Record
from segadapt.platform.experiment.session import run
from segadapt.platform.results.leaderboard import (
    Leaderboard,
    Row,
    leaderboard,
)
from segadapt.platform.settings.config import Values
from segadapt.platform.settings.resources import Resources, Tolerance
from segadapt.platform.storage.folders import HERE, Place

if TYPE_CHECKING:
    from segadapt.platform.experiment.estimate import Estimate
    from segadapt.platform.experiment.finishing import FinishResult


class Running(TypedDict, total=False):
    """How an experiment runs; the fields of `Options` explain each."""

    address: str | None
    resources: Resources
    tolerance: Tolerance
    debug: bool
    say: Callable[[str], None]


class Choices(Running, SearchChoices, total=False):
    """What may be asked of a search besides what `search` names, and how it runs."""


@dataclass(frozen=True)
class Result:
    """How an experiment ended."""

    name: str
    """Name of the search or single run."""
    place: Place
    """Where it is kept and tracked."""
    failed: int
    """Trials that failed."""
    interrupted: bool
    """Whether it can go on."""
    seconds: Mapping[str, float]
    """Wall time of each part, in order: start, shared stages, trials, tracking."""

    def leaderboard(self) -> Leaderboard:
        """Return its trials, best first."""
        return leaderboard(self.name, self.place)

    @property
    def best(self) -> Row | None:
        """The best trial; None if none has been evaluated."""
        return next((row for row in self.leaderboard().rows if row.kind == "trial" and row.best is not None), None)


@dataclass(frozen=True)
class Plan:
    """What a search or single run would do."""

    record: Record
    options: Options

    def estimate(self) -> "Estimate":
        """Measure a few real steps of each method and predict time, memory and disk space.

        `Estimate.check` refuses what cannot fit. Nothing is kept and no Ray is started.

        Raises:
            UsageError: If a trial can never run here, or a method's steps fail.
        """
        from segadapt.platform.experiment.estimate import estimate

        return estimate(self.record, self.options)

    def run(self) -> Result:
        """Run it, or go on with it if it was begun.

        Raises:
            UsageError: If it cannot run as asked; nothing was started then.
        """
        outcome = run(self.record, self.options)
        return Result(self.record.name, self.options.place, outcome.failed, outcome.interrupted, outcome.seconds)


@dataclass(frozen=True)
class Finish:
    """How the final self-training of a trial ended."""

    results: "Sequence[FinishResult]"
    """One of each seed that began, best first."""
    failed: int
    """Seeds that failed."""
    interrupted: bool
    """Whether the same call goes on."""


def plan(
    methods: str | Sequence[str] = (),
    settings: Values | None = None,
    *,
    trials: int | None = None,
    objective: str | None = None,
    name: str | None = None,
    place: Place = HERE,
    **choices: Unpack[Choices],
) -> Plan:
    """Check a new search and return what it would do; touches nothing. It takes what `search` takes.

    Raises:
        UsageError: If a method, a setting, a range or a number is not as it must be.
    """
    running, asked = _split(choices)
    request = SearchRequest(
        methods=[methods] if isinstance(methods, str) else methods,
        settings=settings or {},
        trials=trials,
        objective=objective,
        name=name,
        dry_run=True,
        **asked,
    )
    return Plan(plan_search(request, place), Options(place=place, **running))


def search(
    methods: str | Sequence[str] = (),
    settings: Values | None = None,
    *,
    trials: int | None = None,
    objective: str | None = None,
    name: str | None = None,
    place: Place = HERE,
    **choices: Unpack[Choices],
) -> Result:
    """Search the space of one method, or of several at once; or go on with a search, extend or fork it.

    Args:
        methods: Names of the methods, or `all`; none with `resume`, `extend` or `fork`.
        settings: Settings that no trial changes, by dotted key, or ranges to search instead.
        trials: Trials to run, by default 20; with `extend`, trials to add.
        objective: What to maximise, by default target validation mIoU.
        name: Name of the search, by default made from methods and data.
        place: Where it is kept and tracked.
        choices: The other fields of `SearchRequest` and of `Options`.

    Raises:
        UsageError: If it cannot run as asked; nothing was started then.
    """
    running, asked = _split(choices)
    request = SearchRequest(
        methods=[methods] if isinstance(methods, str) else methods,
        settings=settings or {},
        trials=trials,
        objective=objective,
        name=name,
        **asked,
    )
    return Plan(plan_search(request, place), Options(place=place, **running)).run()


def _split(choices: Choices) -> tuple[Running, SearchChoices]:
    """Return what says how a search runs, and what is asked of it."""
    running = {name: value for name, value in choices.items() if name in Running.__annotations__}
    asked = {name: value for name, value in choices.items() if name not in running}
    return running, asked  # type: ignore[return-value]  # the keys of both were checked by type


def train(
    method: str | None = None,
    settings: Values | None = None,
    *,
    config: str | None = None,
    skip_bad: bool = False,
    preset: str | None = None,
    name: str | None = None,
    resume: str | None = None,
    place: Place = HERE,
    **running: Unpack[Running],
) -> Result:
    """Run one trial of a method, tracked like the trials of a search; or go on with such a run.

    Args:
        method: Name of the method; None with `resume`.
        settings: Settings by dotted key.
        config: Experiment file with more settings; `settings` override it.
        skip_bad: Leave out files that cannot be decoded.
        preset: Preset of the method to start from, by default `paper`.
        name: Name of the run, by default made from method and data.
        resume: Run to go on with.
        place: Where it is kept and tracked.
        running: The other fields of `Options`.

    Raises:
        UsageError: If it cannot run as asked; nothing was started then.
    """
    request = TrainRequest(
        method=method,
        settings=settings or {},
        config=config,
        skip_bad=skip_bad,
        preset=preset,
        name=name,
        resume=resume,
    )
    return Plan(plan_training(request, place), Options(place=place, **running)).run()


def finish(
    run: str,
    search: str,
    settings: Values | None = None,
    *,
    rounds: int | None = None,
    seeds: int = 1,
    keep_losses: bool = False,
    place: Place = HERE,
    **running: Unpack[Running],
) -> Finish:
    """Self-train from the kept checkpoint of a trial: evaluate; in rounds label the target, train on both, evaluate.

    Asked for again with the same settings, it goes on where it was interrupted.

    Args:
        run: Name of a run in the search, or `best`.
        search: The search (or single run) that holds the trial.
        settings: Settings of the method `self_training` that differ from its defaults, by dotted key. Labels are
            chosen by the rule of the trial's method, unless `method.rule` is given.
        rounds: Times the target is labelled; None leaves `method.rounds` as it is.
        seeds: How often it is done: with the trial's seed, or the one given, and those that follow it.
        keep_losses: Whether the losses of the trial's method stay, with its state, beside those on pseudo labels.
        place: Where the search is kept and tracked.
        running: The other fields of `Options`.

    Raises:
        UsageError: If there is no such trial, it left no checkpoint, or its losses cannot be kept.
    """
    from segadapt.platform.experiment.finishing import FinishRequest, finish_run

    request = FinishRequest(run, search, settings or {}, rounds, seeds, keep_losses)
    results, outcome = finish_run(request, Options(place=place, **running))
    return Finish(results, outcome.failed, outcome.interrupted)
