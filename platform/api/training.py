"""Plan, search, train and finish."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypedDict, Unpack

from segadapt.platform.experiment.naming import begun
from segadapt.platform.experiment.planning import (
    SearchChoices,
    SearchRequest,
    TrainRequest,
    plan_search,
    plan_training,
)
from segadapt.platform.experiment.record import Options, Record
from segadapt.platform.experiment.session import check_version, run
from segadapt.platform.results.leaderboard import (
    Leaderboard,
    Row,
    leaderboard,
)
from segadapt.platform.settings.config import Values
from segadapt.platform.settings.resources import Resources, Tolerance
from segadapt.platform.storage.driving import driving
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
    quiet: bool


class Choices(Running, SearchChoices, total=False):
    """What may be asked of a search besides what `search` names, and how it runs."""


@dataclass(frozen=True)
class Result:
    """How an experiment ended.

    Example:
        >>> import segadapt
        >>> result = segadapt.search(resume="demo")  # which has ended: nothing runs again
        sdca: stages computed earlier are loaded: source_only, statistics.
        search demo (sdca, 1 at a time): 0/1 trials done, 8 steps each...
        >>> result.failed, result.interrupted, list(result.seconds)
        (0, False, ['start', 'shared stages', 'trials', 'tracking'])
        >>> [row.name for row in result.leaderboard().rows if row.kind == "trial"]
        ['sdca-001']
    """

    name: str
    """Name of the search or single run."""
    place: Place
    """Where it is kept and tracked."""
    failed: int
    """Trials that failed."""
    interrupted: bool
    """Whether it can go on."""
    seconds: Mapping[str, float]
    """Wall time of each part, in order: start, shared stages, trials, and with them `rerank`, tracking."""

    def leaderboard(self) -> Leaderboard:
        """Return the trials of the experiment, best first.

        Raises:
            UsageError: If the MLflow server does not know the experiment, as when it was away all the time.
        """
        return leaderboard(self.name, self.place)

    @property
    def best(self) -> Row | None:
        """The best trial; None if no trial has been evaluated."""
        return next((row for row in self.leaderboard().rows if row.kind == "trial" and row.best is not None), None)


@dataclass(frozen=True)
class Plan:
    """What a search or single run would do.

    Example:
        >>> import segadapt
        >>> few = {"data.streets.train_images": 16, "data.streets.val_images": 6, "warmup.steps": 4, "trainer.steps": 8}
        >>> planned = segadapt.plan("sdca", few, trials=40)
        >>> estimate = planned.estimate()
        measuring 4 steps of each stage of sdca ...
        >>> estimate.search_s > estimate.methods["sdca"].trial_s > 0, estimate.problems
        (True, ())
        >>> planned.experiment_file().splitlines()[:2]
        ['data:', '  source: null']
    """

    record: Record
    options: Options
    named: bool = True
    """Whether it must have the name of the record; otherwise another that is free, if that is taken when it begins."""

    def estimate(self) -> "Estimate":
        """Measure a few real steps of each method and predict time, memory and disk space.

        Nothing is kept and no Ray is started.

        Returns:
            The estimate, in seconds and bytes; its `check` refuses what cannot fit.

        Raises:
            UsageError: If a trial can never run here, or a method's steps fail.
        """
        from segadapt.platform.experiment.estimate import estimate

        return estimate(self.record, self.options)

    def experiment_file(self) -> str:
        """Return all settings of the search as YAML, ranges where they are searched; `config` takes such a file."""
        from segadapt.platform.experiment.experiment_file import experiment_file

        return experiment_file(self.record)

    def run(self) -> Result:
        """Take its name and run it.

        Raises:
            UsageError: If it cannot run as asked, or its name was taken since; nothing was started then.
        """
        with begun(self.record, self.options.place, named=self.named) as record:
            return _ended(record, self.options)


@dataclass(frozen=True)
class Finish:
    """How the final self-training of a trial ended.

    Example:
        >>> import segadapt
        >>> again = segadapt.finish("best", "demo", {"trainer.steps": 8})  # which has ended: nothing runs again
        finish ...
        >>> [(entry.name, entry.seed) for entry in again.results], again.interrupted
        ([('finish-sdca-001', 0)], False)
    """

    results: "Sequence[FinishResult]"
    """One result for each seed that began, best first; metrics before and after lie between 0 and 1."""
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
    """Check a new search and return what it would do; touches nothing.

    Args:
        methods: Names of the methods, or `all`.
        settings: Settings that no trial changes, by dotted key, or ranges to search instead.
        trials: Trials to run, by default 20.
        objective: What to maximise, by default target validation mIoU.
        name: Name of the search, by default made from methods and data.
        place: Where it would be kept and tracked.
        choices: The other fields of `SearchRequest` and of `Options`. A search that goes on cannot be planned.

    Returns:
        The plan, whose `estimate` measures a few steps and whose `run` runs it.

    Raises:
        UsageError: If a method, a setting, a range or a number is not as it must be, or something that is asked for
            could not act.

    Example:
        >>> import segadapt
        >>> planned = segadapt.plan("sdca", {"method.temperature": 5.0}, trials=4)
        >>> planned.record.name, planned.record.trials, "method.temperature" in planned.record.candidates["sdca"].space
        ('sdca-streets', 4, False)
        >>> segadapt.plan("sdca", {"method.temp": 5.0})
        Traceback (most recent call last):
        ...
        segadapt.platform.errors.UsageError: There is no setting 'method.temp'. Did you mean 'method.temperature'? ...
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
    return Plan(plan_search(request, place), Options(place=place, **running), named=name is not None)


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

    Progress is printed. Ctrl-C ends it in good order: the result says `interrupted`, and `resume` goes on.

    Args:
        methods: Names of the methods, or `all`; none with `resume`, `extend` or `fork`.
        settings: Settings that no trial changes, by dotted key, or ranges to search instead.
        trials: Trials to run, by default 20; with `extend`, trials to add.
        objective: What to maximise, by default target validation mIoU.
        name: Name of the search, by default made from methods and data.
        place: Where it is kept and tracked.
        choices: The other fields of `SearchRequest` and of `Options`.

    Returns:
        How it ended; its `best` is the best trial.

    Raises:
        UsageError: If it cannot run as asked, or something that is asked for could not act; nothing was started then.

    Example:
        >>> import segadapt
        >>> few = {"data.streets.train_images": 16, "data.streets.val_images": 6, "warmup.steps": 4, "trainer.steps": 8}
        >>> result = segadapt.search("sdca", few, trials=1, name="demo")
        shared stages source_only, statistics: 0/1 trials done, 4 steps each
        ...
        >>> result.best.name, result.best.best_step, 0 <= result.best.best <= 1
        ('sdca-001', 8, True)
        >>> segadapt.search(resume="demo", seed=0)
        Traceback (most recent call last):
        ...
        segadapt.platform.errors.UsageError: --resume takes methods and settings from the search 'demo', but got ...
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
    options = Options(place=place, **running)
    if request.resume is not None or request.extend is not None:
        return _gone_on(partial(plan_search, request, place), options)
    return Plan(plan_search(request, place), options, named=name is not None).run()


def _gone_on(plan: Callable[[], Record], options: Options) -> Result:
    """Go on with an experiment, as the only command that works on it.

    Args:
        plan: Returns what is to be done. It is asked again once nobody else can change what is there.
        options: Where it runs and is kept.
    """
    name = plan().name  # what cannot be done is refused before anything is made
    check_version(name, options.place)
    with driving(options.place.prepared(), name):
        return _ended(plan(), options)


def _ended(record: Record, options: Options) -> Result:
    """Run an experiment that nobody else works on to its end."""
    outcome = run(record, options)
    return Result(record.name, options.place, outcome.failed, outcome.interrupted, outcome.seconds)


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
    objective: str | None = None,
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
        objective: What the kept checkpoint is the best by, by default target validation mIoU.
        name: Name of the run, by default made from method and data.
        resume: Run to go on with.
        place: Where it is kept and tracked.
        running: The other fields of `Options`.

    Returns:
        How it ended; its `best` is the trial.

    Raises:
        UsageError: If it cannot run as asked, or something that is asked for could not act; nothing was started then.

    Example:
        >>> import segadapt
        >>> few = {"data.streets.train_images": 16, "data.streets.val_images": 6, "warmup.steps": 4, "trainer.steps": 8}
        >>> single = segadapt.train("source_only", few, name="alone")
        train alone (source_only): 0/1 trials done, ...
        >>> single.failed, single.best.method
        (0, 'source_only')
    """
    request = TrainRequest(
        method=method,
        settings=settings or {},
        config=config,
        skip_bad=skip_bad,
        preset=preset,
        objective=objective,
        name=name,
        resume=resume,
    )
    options = Options(place=place, **running)
    if resume is not None:
        return _gone_on(partial(plan_training, request, place), options)
    return Plan(plan_training(request, place), options, named=name is not None).run()


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

    Returns:
        One result for each seed, best first: metrics before and after, of each round, and the checkpoints.

    Raises:
        UsageError: If there is no such trial, it left no checkpoint, or its losses cannot be kept.

    Example:
        >>> import segadapt
        >>> finished = segadapt.finish("best", "demo", {"trainer.steps": 8})
        finish ...
        >>> outcome = finished.results[0]
        >>> outcome.from_run, sorted(outcome.after)[-1], len(outcome.rounds)
        ('sdca-001', 'target_val/miou', 1)
    """
    from segadapt.platform.experiment.finishing import FinishRequest, finish_run

    request = FinishRequest(run, search, settings or {}, rounds, seeds, keep_losses)
    results, outcome = finish_run(request, Options(place=place, **running))
    return Finish(results, outcome.failed, outcome.interrupted)
