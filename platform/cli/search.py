"""The commands that train: search, train and finish."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from segadapt.platform.cli.jobs import hand_over
from segadapt.platform.cli.next_steps import after_experiment, after_finish, after_plan, show_next
from segadapt.platform.cli.options import (
    RARE,
    Assignments,
    ConfigFile,
    Preset,
    Search,
    SkipBad,
    assignments,
    folder,
    place,
    running,
    shared,
    tracked_place,
)
from segadapt.platform.cli.tables import show_estimate, show_finish, show_leaderboard, show_plan, show_seeds

if TYPE_CHECKING:
    from segadapt.platform.api.training import Result, Running
    from segadapt.platform.storage.folders import Place

_Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="METHOD... [KEY=VALUE]...",
        help="Names shown by `segadapt list`, or `all`; left out with --resume. Then settings that no trial changes; "
        "`segadapt describe METHOD` lists keys, defaults, ranges. METHOD.KEY=VALUE sets one method's.",
    ),
]
_Trials = Annotated[
    int | None, typer.Option(help="Trials to run, those stopped early included; default: 20. With --extend: more.")
]
_TimeBudget = Annotated[float | None, typer.Option(help="Stop the search after this many seconds.")]
_MaxGpuHours = Annotated[
    float | None,
    typer.Option(help="Stop the search when its trials have held GPUs for so many hours.", rich_help_panel=RARE),
]
_Concurrent = Annotated[
    int | None, typer.Option(help="Trials at a time; default: as many as fit.", rich_help_panel=RARE)
]
_Objective = Annotated[
    str | None,
    typer.Option(
        help="What to maximise: target_val/miou (default), or without target labels {label_free}; or {costs} to "
        "minimise beside one of them. "
        "A,B searches the Pareto front of several, A+B the best mean rank."
    ),
]
_TrainObjective = Annotated[
    str | None,
    typer.Option(
        help="What the kept checkpoint is the best by: target_val/miou (default), or without target labels "
        "{label_free}."
    ),
]
_Sampler = Annotated[
    str | None,
    typer.Option(
        help="What proposes: {samplers}; default: auto, which is tpe. priorband draws anywhere, around the published "
        "setting and around the best trial.",
        rich_help_panel=RARE,
    ),
]
_Scheduler = Annotated[
    str | None,
    typer.Option(
        help="What stops trials: {schedulers}; default: asha. asha-promote pauses them, and goes on with those that "
        "later trials show to be good.",
        rich_help_panel=RARE,
    ),
]
_Seed = Annotated[
    int | None,
    typer.Option(
        help="Seed of the sampler, default 0; `seed=N` as a setting seeds the training.", rich_help_panel=RARE
    ),
]
_Rerank = Annotated[
    int | None,
    typer.Option(metavar="K", help="Train the K best configurations again on other seeds; the mean decides."),
]
_Seeds = Annotated[int | None, typer.Option(help="Seeds of --rerank; default: 3.", rich_help_panel=RARE)]
_KeepTop = Annotated[
    int | None,
    typer.Option(
        metavar="K", help="Keep the checkpoints of the K best trials alone; default: of all.", rich_help_panel=RARE
    ),
]
_Name = Annotated[str | None, typer.Option(help="Name of the search; default: METHOD-DATA, numbered.")]
_Resume = Annotated[str | None, typer.Option(metavar="NAME", help="Go on with this search.")]
_Extend = Annotated[str | None, typer.Option(metavar="NAME", help="Run --trials more trials of this search.")]
_Fork = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Begin with this search's settings and ranges, changed by KEY=VALUE.", rich_help_panel=RARE
    ),
]
_WarmStart = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Count this search's trials as prior points where they fit; repeatable.",
        rich_help_panel=RARE,
    ),
]
_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would run, measure a few steps and what follows; keep nothing.")
]
_Method = Annotated[str | None, typer.Argument(help="A name shown by `segadapt list`; left out with --resume.")]
_RunName = Annotated[str | None, typer.Option(help="Name of the run; default: train-METHOD-DATA, numbered.")]
_ResumeRun = Annotated[str | None, typer.Option(metavar="NAME", help="Go on with this run.")]
_Run = Annotated[str, typer.Argument(help="`best`, or the name or id of a run in the search.", metavar="RUN")]
_Rounds = Annotated[
    int | None, typer.Option(help="Times the target is labelled, trained on and evaluated; default: 1.")
]
_FinishSeeds = Annotated[int, typer.Option(help="Do it on so many seeds: the trial's and those that follow it.")]
_KeepLosses = Annotated[
    bool, typer.Option("--keep-losses", help="Train with the losses of the trial's method too, from its state.")
]


@shared(place=place, running=running)
def search(
    place: "Place",
    running: "Running",
    words: _Words = None,
    preset: Preset = None,
    trials: _Trials = None,
    time_budget: _TimeBudget = None,
    max_gpu_hours: _MaxGpuHours = None,
    concurrent: _Concurrent = None,
    objective: _Objective = None,
    sampler: _Sampler = None,
    scheduler: _Scheduler = None,
    seed: _Seed = None,
    rerank: _Rerank = None,
    seeds: _Seeds = None,
    keep_top: _KeepTop = None,
    name: _Name = None,
    resume: _Resume = None,
    extend: _Extend = None,
    fork: _Fork = None,
    warm_start: _WarmStart = None,
    dry_run: _DryRun = False,
    skip_bad: SkipBad = False,
    config: ConfigFile = None,
) -> None:
    """Search the space of one method, or of several at once, with Optuna under ASHA; MLflow tracks every trial.

    The published setting of each method is tried first, and all trials start from one source-only warm-up.
    KEY=interval(LOW,HIGH), log_interval(LOW,HIGH) or choice(A,B) searches a setting, or changes its range.

    Examples: segadapt search sdca --trials 4 trainer.steps=120; segadapt search sdca plca --trials 40;
    segadapt search --extend sdca-streets --trials 20 --rerank 3
    """
    asked = {name: value for name, value in locals().items() if name not in ("running", "words", "dry_run")}
    asked |= {"time_budget_s": asked.pop("time_budget"), "warm_start": warm_start or ()}
    hand_over(running["address"])
    from segadapt.platform.api import training

    methods, settings = _split(words)
    if dry_run:
        plan = training.plan(methods, assignments(settings), **asked, **running)
        show_plan(plan.record)
        estimate = plan.estimate()
        show_estimate(estimate)
        estimate.check()
        options = {"--preset": preset, "--config": config, "--fork": fork, "--storage": fork and str(place.storage)}
        named = [part for option, value in options.items() if value is not None for part in (option, value)]
        show_next(after_plan([*(words or []), *named]))
    else:
        _conclude(training.search(methods, assignments(settings), **asked, **running), running, resume_by="search")


@shared(place=folder)
def plan(
    place: "Place",
    words: _Words = None,
    preset: Preset = None,
    fork: _Fork = None,
    config: ConfigFile = None,
) -> None:
    """Print every setting of a search as an experiment file: those that are searched as their ranges.

    Change it, then give it to a search, with the options that are no settings.

    Example: segadapt plan sdca trainer.steps=400 > my.yaml; segadapt search sdca --config my.yaml --trials 40
    """
    from segadapt.platform.api import training

    methods, settings = _split(words)
    planned = training.plan(methods, assignments(settings), preset=preset, fork=fork, config=config, place=place)
    print(planned.experiment_file(), end="")


def _split(words: list[str] | None) -> tuple[list[str], list[str]]:
    """Return the names of methods, and the settings."""
    return [word for word in words or [] if "=" not in word], [word for word in words or [] if "=" in word]


@shared(place=tracked_place, running=running)
def train(
    place: "Place",
    running: "Running",
    method: _Method = None,
    settings: Assignments = None,
    preset: Preset = None,
    objective: _TrainObjective = None,
    name: _RunName = None,
    resume: _ResumeRun = None,
    skip_bad: SkipBad = False,
    config: ConfigFile = None,
) -> None:
    """Run one trial of a method, tracked like the trials of a search.

    Example: segadapt train sdca seed=1 method.temperature=1
    """
    hand_over(running["address"])
    from segadapt.platform.api import training

    result = training.train(
        method,
        assignments(settings),
        config=config,
        skip_bad=skip_bad,
        preset=preset,
        objective=objective,
        name=name,
        resume=resume,
        place=place,
        **running,
    )
    _conclude(result, running, resume_by="train")


@shared(place=tracked_place, running=running)
def finish(
    place: "Place",
    running: "Running",
    run: _Run,
    search_name: Search,
    settings: Assignments = None,
    rounds: _Rounds = None,
    seeds: _FinishSeeds = 1,
    keep_losses: _KeepLosses = False,
) -> None:
    """Self-train the best trial: evaluate; in rounds label the target, train on both domains, evaluate.

    The same command after a kill goes on where it was.

    Example: segadapt finish best --search sdca-streets --rounds 2 trainer.steps=400
    """
    hand_over(running["address"])
    from segadapt.platform.api import training

    finished = training.finish(
        run,
        search_name,
        assignments(settings),
        rounds=rounds,
        seeds=seeds,
        keep_losses=keep_losses,
        place=place,
        **running,
    )
    results = [result for result in finished.results if result.after]
    if results:
        show_finish(results[0])
    if len(results) > 1:
        show_seeds(results)
    if not running["quiet"]:
        show_next(after_finish(results, search_name, place, interrupted=finished.interrupted))
    sys.exit(_status(finished.failed, interrupted=finished.interrupted))


def _conclude(result: "Result", running: "Running", *, resume_by: str) -> None:
    """Show what came out and what to do next, and exit."""
    from segadapt.platform.errors import redacted
    from segadapt.platform.storage.command_lines import command_line

    place, name, say = result.place, result.name, running["say"]
    status = _status(result.failed, interrupted=result.interrupted)
    try:
        board = result.leaderboard()
    except Exception as error:
        if place.tracking_uri is None:
            raise
        say(
            f"{name} ended, but its MLflow server does not answer: {redacted(error)}\n"
            f"{command_line('runs', name, place=place)} shows it later."
        )
        sys.exit(status)
    show_leaderboard(board)
    parts = ", ".join(f"{part} {seconds:.0f}" for part, seconds in result.seconds.items())
    say(f"\n{name} took {sum(result.seconds.values()):.0f} s ({parts}).")
    if not running["quiet"]:
        show_next(after_experiment(result, board, resume_by))
    sys.exit(status)


def _status(failed: int, *, interrupted: bool) -> int:
    if interrupted:
        return 130
    return 1 if failed else 0
