"""The command line: each command is one call of `segadapt.platform.api`."""

import contextlib
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from segadapt.platform.api import EvaluationResult, FinishResult, Leaderboard
    from segadapt.platform.cache import CacheContent, CachedStage, Pruned, RunningLease
    from segadapt.platform.cost import Estimate
    from segadapt.platform.experiments import Options, Outcome, Record
    from segadapt.platform.findings import Finding
    from segadapt.platform.predicting import PredictionResult
    from segadapt.platform.status import SearchStatus
    from segadapt.trainables.core.data.checking import DatasetReport

_SHOWN_PARAMS = 8
"""Most searched settings that a leaderboard shows as columns; of more, those of each method's best trial."""

_SHOWN_SIZES = 5
"""Most image sizes that a report on a dataset names."""

_WATCH_S = 5.0
"""Between two looks of `status --watch`."""

_JOBS = "http://127.0.0.1:8265"
"""Ray's dashboard on a cluster's head, by way of a tunnel."""

app = typer.Typer(
    name="segadapt",
    help="Search, track and finish unsupervised domain-adaptive semantic segmentation on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Exit status: 0 finished, 1 a trial failed or a file has faults, 2 wrong usage, 130 interrupted.",
)
data_app = typer.Typer(
    name="data", help="Datasets: write streets, check and pack what is on disk, look at samples.", no_args_is_help=True
)
app.add_typer(data_app)
cache_app = typer.Typer(
    name="cache", help="The stage cache: stages that all searches in a storage folder share.", no_args_is_help=True
)
app.add_typer(cache_app)

Assignments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings; `segadapt describe METHOD` lists keys, defaults, ranges."),
]
Storage = Annotated[str, typer.Option(help="Folder that keeps everything; all nodes must see it.")]
StudyUri = Annotated[
    str | None,
    typer.Option(help="Optuna storage, e.g. postgresql+psycopg://...; default: a file in --storage."),
]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow server; default: a database in the storage folder.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster to join, from one of its machines: auto or HOST:PORT; http://HOST:PORT submits this command "
        "to it as `segadapt submit` does and follows it. Default: start Ray here."
    ),
]
JobsAddress = Annotated[str, typer.Option(help="Ray's dashboard on the cluster's head, through a tunnel.")]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="A name that `segadapt jobs` shows.")]
LauncherName = Annotated[
    str, typer.Option(help="auto, train (Ray Train's TorchTrainer) or inprocess (the trial's own process).")
]
Workers = Annotated[int, typer.Option("--workers-per-trial", help="Data-parallel workers of each trial.")]
Gpus = Annotated[float | None, typer.Option("--gpus-per-trial", help="GPUs of each worker; default: 1 if any.")]
Preset = Annotated[str, typer.Option(help="Where to start from; `segadapt describe METHOD` shows the presets.")]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out files that cannot be decoded; data.skip_bad=true.")
]
ConfigFile = Annotated[str | None, typer.Option("--config", help="YAML experiment file; KEY=VALUE overrides it.")]
MaxFailures = Annotated[
    int, typer.Option(help="Start a trial again so often when its process or node dies, or it hangs.")
]
TrialTimeout = Annotated[
    float, typer.Option(metavar="SECONDS", help="A trial that reports nothing for so long hangs: start it again.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and what workers print.")]


def main() -> None:
    """Run the command line; see `app` for the exit status."""
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        _fail(error)


def _fail(error: Exception) -> None:
    from segadapt.platform.errors import UsageError
    from segadapt.platform.redaction import redacted

    console = _console(stderr=True)
    if isinstance(error, UsageError):
        console.print(f"error: {redacted(error)}", markup=False, soft_wrap=True)
        sys.exit(2)
    console.print(f"error: {type(error).__name__}: {redacted(error)}", markup=False)
    where = traceback.extract_tb(error.__traceback__)[-1]
    console.print(f"(raised at {where.filename}:{where.lineno}; --debug shows the whole traceback)", markup=False)
    sys.exit(1)


@app.command("list")
def list_command() -> None:
    """List the methods."""
    from segadapt.platform import api

    for name, description in api.list_methods():
        print(f"{name:16} {description}")


@app.command()
def describe(method: Annotated[str, typer.Argument(help="A name shown by `segadapt list`.")]) -> None:
    """List a method's settings: type, default, searched range, published value."""
    from rich.markup import escape
    from rich.table import Table

    from segadapt.platform import api

    table = Table(title=f"{method}: KEY=VALUE settings", box=None)
    for column in ("key", "type", "default", "searched", "presets", "meaning"):
        table.add_column(column, overflow="fold")
    for key, searched, presets in api.describe(method):
        shown = ", ".join(f"{name} {value}" for name, value in presets.items())
        table.add_row(*map(escape, (key.name, key.type, str(key.default), searched, shown, key.doc)))
    _console().print(table)


@app.command()
def search(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="METHOD... [KEY=VALUE]...",
            help="Names shown by `segadapt list`, or `all`; left out with --resume. Then settings that no trial "
            "changes; `segadapt describe METHOD` lists keys, defaults, ranges. METHOD.KEY=VALUE sets one method's.",
        ),
    ] = None,
    preset: Preset = "paper",
    trials: Annotated[
        int | None, typer.Option(help="Trials to run, those stopped early included; default: 20. With --extend: more.")
    ] = None,
    time_budget: Annotated[float | None, typer.Option(help="Stop the search after this many seconds.")] = None,
    max_gpu_hours: Annotated[
        float | None, typer.Option(help="Stop the search when its trials have held GPUs for so many hours.")
    ] = None,
    concurrent: Annotated[int | None, typer.Option(help="Trials at a time; default: as many as fit.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="What to maximise: target_val/miou (default), or without target labels source_val/miou, "
            "score/entropy, score/information_maximization, score/soft_neighborhood_density, "
            "score/batch_nuclear_norm or score/flip_agreement; or time/step to minimise beside one of them. "
            "A,B searches the Pareto front of several, A+B the best mean rank."
        ),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="What proposes: auto (tpe), tpe, gp, cmaes, random or qmc, all Optuna's.")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="What stops trials: asha (default), asha-promote (pauses them, and goes on with those that later "
            "trials show to be good), median, hyperband or none."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the sampler, default 0; `seed=N` as a setting seeds the training.")
    ] = None,
    rerank: Annotated[
        int, typer.Option(metavar="K", help="Train the K best configurations again on other seeds; the mean decides.")
    ] = 0,
    seeds: Annotated[int, typer.Option(help="Seeds of --rerank.")] = 3,
    keep_top: Annotated[
        int | None,
        typer.Option(metavar="K", help="Keep the checkpoints of the K best trials alone; default: of all."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the search; default: METHOD-DATA, numbered.")] = None,
    resume: Annotated[str | None, typer.Option(metavar="NAME", help="Go on with this search.")] = None,
    extend: Annotated[str | None, typer.Option(metavar="NAME", help="Run --trials more trials of this search.")] = None,
    fork: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Begin with this search's settings and ranges, changed by KEY=VALUE."),
    ] = None,
    warm_start: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Count this search's trials as prior points where they fit; repeatable."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what would run, measure a few steps and what follows; keep nothing."),
    ] = False,
    probe: Annotated[bool, typer.Option(help="With --dry-run: measure a few steps of each method.")] = True,
    skip_bad: SkipBad = False,
    config: ConfigFile = None,
    storage: Storage = "runs",
    study_uri: StudyUri = None,
    tracking_uri: TrackingUri = None,
    address: Address = None,
    launcher: LauncherName = "auto",
    workers: Workers = 1,
    gpus: Gpus = None,
    max_failures: MaxFailures = 2,
    trial_timeout: TrialTimeout = 7200.0,
    debug: Debug = False,
) -> None:
    """Search the space of one method, or of several at once, with Optuna under ASHA; MLflow tracks every trial.

    The published setting of each method is tried first, and all trials start from one source-only warm-up.
    KEY=interval(LOW,HIGH), log_interval(LOW,HIGH) or choice(A,B) searches a setting, or changes its range.

    Examples: segadapt search sdca --trials 4 trainer.steps=120; segadapt search sdca plca --trials 40;
    segadapt search --extend sdca-streets --trials 20 --rerank 3
    """
    _hand_over(address)
    from segadapt.platform import api
    from segadapt.platform.errors import UsageError
    from segadapt.platform.experiments import Record
    from segadapt.platform.storage import open_storage

    options = _options(
        storage, tracking_uri, address, launcher, workers, gpus, debug, study_uri, max_failures, trial_timeout
    )
    begun = resume or extend
    if begun is not None:
        option = "--resume" if resume is not None else "--extend"
        given: dict[str, Any] = {
            "--fork": fork,
            "--warm-start": warm_start,
            "--objective": objective,
            "--sampler": sampler,
        }
        given |= {"--scheduler": scheduler, "--seed": seed, "--name": name, "--config": config}
        given |= {"--concurrent": concurrent, "--max-gpu-hours": max_gpu_hours}
        if resume is not None:
            given |= {"--trials": trials, "--time-budget": time_budget, "--extend": extend}
        extra = [*(words or []), *(name for name, value in given.items() if value)]
        if extra:
            raise UsageError(
                f"{option} takes methods and settings from the search {begun!r}, but got {' '.join(extra)}. "
                "Leave them out; --fork begins a new search with changed settings."
            )
        record = Record.load(open_storage(storage), begun)
        if extend is None:
            outcome = api.resume(begun, options, rerank=rerank, seeds=seeds, keep_top=keep_top)
        else:
            more = 20 if trials is None else trials
            outcome = api.extend(
                begun,
                options,
                trials=more,
                time_budget_s=time_budget,
                rerank=rerank,
                seeds=seeds,
                keep_top=keep_top,
            )
    else:
        record = api.plan_search(
            [word for word in words or [] if "=" not in word],
            _values(config, [word for word in words or [] if "=" in word], skip_bad=skip_bad),
            preset=preset,
            trials=trials,
            time_budget_s=time_budget,
            max_gpu_hours=max_gpu_hours,
            concurrent=concurrent,
            objective=objective,
            sampler=sampler,
            scheduler=scheduler,
            seed=seed,
            rerank=rerank,
            seeds=seeds,
            keep_top=keep_top,
            fork=fork,
            warm_start=warm_start or [],
            name=name,
            storage=storage,
            tracking_uri=tracking_uri,
        )
        if dry_run:
            _show_plan(record)
            if probe:
                estimate = api.estimate(record, options)
                _show_estimate(estimate)
                estimate.check()
            return
        outcome = api.search(record, options)
    _conclude(record.name, outcome, options, advise=True)


@app.command()
def train(
    method: Annotated[
        str | None, typer.Argument(help="A name shown by `segadapt list`; left out with --resume.")
    ] = None,
    settings: Assignments = None,
    preset: Preset = "paper",
    name: Annotated[str | None, typer.Option(help="Of the run; default: train-METHOD-DATA, numbered.")] = None,
    resume: Annotated[str | None, typer.Option(metavar="NAME", help="Go on with this run.")] = None,
    skip_bad: SkipBad = False,
    config: ConfigFile = None,
    storage: Storage = "runs",
    tracking_uri: TrackingUri = None,
    address: Address = None,
    launcher: LauncherName = "auto",
    workers: Workers = 1,
    gpus: Gpus = None,
    max_failures: MaxFailures = 2,
    trial_timeout: TrialTimeout = 7200.0,
    debug: Debug = False,
) -> None:
    """Run one trial of a method, tracked like the trials of a search.

    Example: segadapt train sdca seed=1 method.temperature=1
    """
    _hand_over(address)
    from segadapt.platform import api
    from segadapt.platform.errors import UsageError

    options = _options(
        storage, tracking_uri, address, launcher, workers, gpus, debug, None, max_failures, trial_timeout
    )
    if resume is not None:
        outcome = api.resume(resume, options)
        name = resume
    else:
        if method is None:
            raise UsageError("METHOD must be given, or --resume NAME. `segadapt list` shows the methods.")
        name, outcome = api.train(
            method, _values(config, settings, skip_bad=skip_bad), options, preset=preset, name=name
        )
    _conclude(name, outcome, options, advise=False)


@app.command()
def runs(
    search_name: Annotated[str, typer.Argument(metavar="SEARCH", help="Name of a search or single run.")],
    selection: Annotated[
        bool, typer.Option("--selection", help="Also show what each label-free score would have chosen and lost.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    storage: Storage = "runs",
    tracking_uri: TrackingUri = None,
) -> None:
    """Show the leaderboard of a search."""
    from segadapt.platform import api

    board = api.runs(search_name, selection=selection, storage=storage, tracking_uri=tracking_uri)
    if as_json:
        print(json.dumps(dataclasses.asdict(board), default=dict, indent=1))
    else:
        _show_leaderboard(board)
        if selection:
            _show_selection(board)


@app.command()
def status(
    search_name: Annotated[str, typer.Argument(metavar="SEARCH", help="Name of a search.")],
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew every few seconds until it ends.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    storage: Storage = "runs",
    study_uri: StudyUri = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Show how a search stands: trials by state, best, rungs, failures, time left. Runs on any machine that sees it."""
    import time

    from segadapt.platform import api

    while True:
        found = api.status(search_name, storage=storage, tracking_uri=tracking_uri, study_uri=study_uri)
        if as_json:
            print(json.dumps(dataclasses.asdict(found), default=dict))
        else:
            _show_status(found, clear=watch)
        if not watch or found.state != "running":
            return
        time.sleep(_WATCH_S)


@app.command()
def report(
    search_name: Annotated[str, typer.Argument(metavar="SEARCH", help="Name of a search.")],
    out: Annotated[str | None, typer.Option(metavar="FILE", help="HTML file to write; default: SEARCH.html.")] = None,
    storage: Storage = "runs",
    study_uri: StudyUri = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write a search as one HTML page that needs no network: results, how sure they are, cost, what to do next."""
    from segadapt.platform import api

    path = api.report(search_name, out, storage=storage, tracking_uri=tracking_uri, study_uri=study_uri)
    print(f"Wrote {path}")


@app.command()
def ui(
    storage: Storage = "runs", port: Annotated[int, typer.Option(help="On 127.0.0.1.", min=1, max=65535)] = 5000
) -> None:
    """Serve MLflow in the browser on this storage, bound to 127.0.0.1."""
    from segadapt.platform import api
    from segadapt.platform.cluster import treat_termination_as_interrupt

    treat_termination_as_interrupt()
    sys.exit(api.ui(storage=storage, port=port))


@app.command()
def finish(
    run: Annotated[str, typer.Argument(help="`best`, or the name or id of a run in the search.")],
    search_name: Annotated[str, typer.Option("--search", help="The search that holds the run.")],
    settings: Assignments = None,
    rounds: Annotated[
        int | None, typer.Option(help="Times the target is labelled, trained on and evaluated; default: 1.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Do it on so many seeds: the trial's and those that follow it.")] = 1,
    keep_losses: Annotated[
        bool, typer.Option("--keep-losses", help="Train with the losses of the trial's method too, from its state.")
    ] = False,
    storage: Storage = "runs",
    tracking_uri: TrackingUri = None,
    address: Address = None,
    launcher: LauncherName = "auto",
    workers: Workers = 1,
    gpus: Gpus = None,
    max_failures: MaxFailures = 2,
    trial_timeout: TrialTimeout = 7200.0,
    debug: Debug = False,
) -> None:
    """Self-train the best trial: evaluate; in rounds label the target, train on both domains, evaluate.

    The same command after a kill goes on where it was.

    Example: segadapt finish best --search sdca-streets --rounds 2 trainer.steps=400
    """
    _hand_over(address)
    from segadapt.platform import api

    options = _options(
        storage, tracking_uri, address, launcher, workers, gpus, debug, None, max_failures, trial_timeout
    )
    found, outcome = api.finish(
        run,
        _values(None, settings),
        options,
        search_name=search_name,
        rounds=rounds,
        seeds=seeds,
        keep_losses=keep_losses,
    )
    results = [result for result in found if result.after]
    if results:
        _show_finish(results[0])
    if len(results) > 1:
        _show_seeds(results)
    sys.exit(_status(outcome))


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="`best`, or the name or id of a trial or finish in the search.")],
    search_name: Annotated[str, typer.Option("--search", help="The search that holds the run.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="What differs from the run: data.*, augmentation.target_size, trainer.eval_window.",
        ),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            help="Classes to average over: cityscapes-19, cityscapes-16 or cityscapes-13 (SYNTHIA), or auto, all that "
            "the run has."
        ),
    ] = "auto",
    scales: Annotated[
        list[str] | None,
        typer.Option(help="Show each image at these sizes and average, e.g. 0.75 1.0 1.25; default: as it is."),
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Show each image mirrored as well, and average.")] = False,
    aggregation: Annotated[
        float | None, typer.Option(help="PLCA's aggregation when predicting, e.g. 0.5; default: as the run has it.")
    ] = None,
    save_predictions: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Write labelIds PNGs, as the Cityscapes server takes them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    storage: Storage = "runs",
    tracking_uri: TrackingUri = None,
    debug: Debug = False,
) -> None:
    """Evaluate a run on the target validation set, at full label resolution and single scale unless told otherwise.

    Example: segadapt evaluate best --search plca-gta5-cityscapes --protocol cityscapes-19 --aggregation 0.5
    """
    from segadapt.platform import api

    words = settings or []
    result = api.evaluate(
        run,
        _values(None, [word for word in words if not _is_number(word)]),
        search_name=search_name,
        protocol=protocol,
        scales=_scales(scales, [word for word in words if _is_number(word)]),
        flip=flip,
        aggregation=aggregation,
        save_predictions=save_predictions,
        storage=storage,
        tracking_uri=tracking_uri,
    )
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=1))
    else:
        _show_evaluation(result)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="`best`, or the name or id of a trial or finish in the search.")],
    search_name: Annotated[str, typer.Option("--search", help="The search that holds the run.")],
    out: Annotated[str | None, typer.Option(metavar="FOLDER", help="New or empty; default: SEARCH-RUN here.")] = None,
    register: Annotated[
        str | None, typer.Option(metavar="MODEL_NAME", help="In MLflow's registry; default: the search's name.")
    ] = None,
    storage: Storage = "runs",
    tracking_uri: TrackingUri = None,
    debug: Debug = False,
) -> None:
    """Write a run's network as ONNX and torch.export files, checked against PyTorch, and register it in MLflow.

    Example: segadapt export best --search sdca-streets --out sdca
    """
    from segadapt.platform import api

    result = api.export(
        run, search_name=search_name, out=out, register=register, storage=storage, tracking_uri=tracking_uri
    )
    for name, difference in result.differences.items():
        print(f"{result.folder}/{name}: class probabilities within {difference:.1e} of the run's network")
    print(f"registered in MLflow: models:/{result.model}/{result.version}")


@app.command()
def predict(
    source: Annotated[
        str, typer.Argument(metavar="RUN|FILE", help="`best`, a run's name or id, or an exported .onnx or .pt2 file.")
    ],
    images: Annotated[str, typer.Argument(help="An image, or a folder that is searched recursively.")],
    out: Annotated[str, typer.Argument(help="A new folder, or one in which this was interrupted.")],
    search_name: Annotated[str | None, typer.Option("--search", help="The search that holds the run.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images of equal size predicted at a time, at most.")] = 8,
    overlay: Annotated[bool, typer.Option(help="Write the images under their classes' colours.")] = True,
    confidence: Annotated[
        bool, typer.Option("--confidence", help="Write the probability of the predicted class, 0 to 255.")
    ] = False,
    storage: Storage = "runs",
    tracking_uri: TrackingUri = None,
    debug: Debug = False,
) -> None:
    """Label images of any size: palette PNGs of class indices, colour overlays, confidence.

    Exit status: 0 finished, 1 an image could not be read, 2 wrong usage.

    Example: segadapt predict best photos labels --search sdca-streets; segadapt predict sdca/model.onnx photos labels
    """
    from segadapt.platform import api

    with _progress_bar(f"labelling {images}") as progress:
        result = api.predict(
            source,
            images,
            out,
            search_name=search_name,
            batch_size=batch_size,
            overlay=overlay,
            confidence=confidence,
            storage=storage,
            tracking_uri=tracking_uri,
            progress=progress,
        )
    _show_prediction(result)
    sys.exit(1 if result.unreadable else 0)


@app.command()
def submit(
    words: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="A search, train or finish command.")],
    address: JobsAddress = _JOBS,
    name: Annotated[str | None, typer.Option(help="Of the job; default: made of command and time.")] = None,
    wheel: Annotated[
        str | None, typer.Option(metavar="FILE", help="A built segadapt to run in place of the cluster's.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show what it prints; Ctrl-C leaves it running.")] = False,
) -> None:
    """Run a command on a Ray cluster as a job, which goes on when this machine is switched off.

    Example: segadapt submit -- search sdca --storage /mnt/segadapt/runs
    """
    from segadapt.platform import api

    job = api.submit(words, address=address, name=name, wheel=wheel)
    where = "" if address == _JOBS else f" --address {address}"
    print(f"{job} is submitted. Next:\n  segadapt logs {job} --follow{where}\n  segadapt stop {job}{where}", flush=True)
    if follow:
        _follow(job, address)


@app.command()
def jobs(
    address: JobsAddress = _JOBS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the jobs of a Ray cluster."""
    from rich.table import Table

    from segadapt.platform import api

    found = api.jobs(address=address)
    if as_json:
        print(json.dumps([dataclasses.asdict(job) for job in found], indent=1))
        return
    table = Table("job", "state", "started (UTC)", "command", box=None)
    for job in found:
        table.add_row(job.name, job.state, job.started or "-", job.command)
    _console().print(table if found else "no jobs")


@app.command()
def logs(
    name: Annotated[
        str,
        typer.Argument(metavar="JOB|TRIAL", help="As `segadapt jobs` shows it; with --search a run's name or `best`."),
    ],
    search_name: Annotated[
        str | None, typer.Option("--search", metavar="SEARCH", help="Show the log of this search's trial instead.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Until it ends; Ctrl-C leaves it running.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Of a trial: a line of JSON per entry.")] = False,
    address: JobsAddress = _JOBS,
    storage: Storage = "runs",
    tracking_uri: TrackingUri = None,
) -> None:
    """Show what a job printed, or with --search what a trial noted: start, stages, scores, checkpoints, faults, end.

    Of a job, with --follow, exit status 1 if it failed or was stopped.

    Example: segadapt logs sdca-003 --search sdca-streets
    """
    from segadapt.platform import api
    from segadapt.platform.errors import UsageError
    from segadapt.platform.trial_log import as_text

    if search_name is not None:
        found = api.trial_log(name, search_name, follow=follow, storage=storage, tracking_uri=tracking_uri)
        for entry in found:
            print(json.dumps(entry) if as_json else as_text(entry), flush=follow)
        return
    try:
        if follow:
            _follow(name, address)
        for text in api.logs(name, address=address):
            print(text, end="")
    except UsageError as error:
        raise UsageError(f"{error}\nThe log of a trial: segadapt logs {name} --search SEARCH") from error


@app.command()
def stop(job: JobName, address: JobsAddress = _JOBS) -> None:
    """End a job; `segadapt submit -- search --resume NAME --storage ...` goes on where it was."""
    from segadapt.platform import api

    print(f"{job} is told to stop" if api.stop(job, address=address) else f"{job} had ended")


def _hand_over(address: str | None) -> None:
    """Submit this command line to the cluster whose Ray Jobs `address` names, follow it and exit; else do nothing."""
    if address is None or not address.startswith(("http://", "https://")):
        return
    from segadapt.platform import api
    from segadapt.platform.jobs import without_option

    job = api.submit(without_option(sys.argv[1:], "--address"), address=address)
    print(f"{job} runs on {address}; Ctrl-C leaves it running, `segadapt stop {job}` ends it", flush=True)
    _follow(job, address)


def _follow(job: str, address: str) -> None:
    """Show what a job prints until it ends, and exit with 1 unless it succeeded."""
    from segadapt.platform import api

    for text in api.logs(job, address=address, follow=True):
        print(text, end="", flush=True)
    found = next(found for found in api.jobs(address=address) if found.name == job)
    if found.state != "succeeded":
        _console(stderr=True).print(f"{job} {found.state}: {found.message}", markup=False, soft_wrap=True)
    sys.exit(0 if found.state == "succeeded" else 1)


def _scales(options: list[str] | None, words: list[str]) -> list[float]:
    """Return the scales of `--scales 0.75 1.0` or `--scales 0.75,1.0`; an option takes the first word alone."""
    from segadapt.platform.errors import UsageError

    given = [part for option in options or [] for part in option.replace(",", " ").split()]
    wrong = [part for part in given if not _is_number(part)] if options else words
    if wrong:
        raise UsageError(
            f"Numbers must follow --scales, and only numbers, but got {' '.join(wrong)}. Example: --scales 0.75 1 1.25"
        )
    return [float(part) for part in [*given, *words]] or [1.0]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@data_app.command("make")
def data_make(
    folder: Annotated[str, typer.Argument(help="A new or empty folder.")],
    settings: Assignments = None,
    layout: Annotated[
        str, typer.Option("--format", help="folder (both domains), gta5, synthia (the source) or cityscapes (target).")
    ] = "folder",
) -> None:
    """Write the streets benchmark as files, in the layout for own data or exactly as a known dataset is stored.

    Example: segadapt data make town; segadapt search sdca data.source=folder:town/source data.target=folder:town/target
    """
    from segadapt.platform import api

    print(f"Wrote {api.data_make(folder, _values(None, settings), layout=layout)}")


@data_app.command("check")
def data_check(
    kind: Annotated[str, typer.Argument(help="gta5, synthia, cityscapes, folder or shards.")],
    root: Annotated[str, typer.Argument(help="Its folder; of shards also a URI such as s3://bucket/path.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Decode every file of a dataset: what it holds, and all that is wrong. Of shards, the checksums are verified.

    Exit status: 0 sound, 1 faults were found, 2 wrong usage.

    Example: segadapt data check gta5 /data/GTA5
    """
    from segadapt.platform import api

    with _progress_bar(f"{kind} {root}") as progress:
        report = api.data_check(kind, root, progress=progress)
    if as_json:
        print(json.dumps(dataclasses.asdict(report), indent=1))
    else:
        _show_report(report)
    sys.exit(1 if report.faults else 0)


@data_app.command("pack")
def data_pack(
    kind: Annotated[str, typer.Argument(help="gta5, synthia, cityscapes or folder.")],
    root: Annotated[str, typer.Argument(help="Its folder.")],
    out: Annotated[str, typer.Argument(help="A new folder, or one in which this was interrupted.")],
    split: Annotated[list[str] | None, typer.Option(help="train or val; may be repeated. Default: all.")] = None,
    size: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="HEIGHT WIDTH", help="Resize the training split; validation keeps its size."),
    ] = None,
    image_format: Annotated[str, typer.Option("--format", help="png, without loss, or jpeg, smaller and faster.")] = (
        "png"
    ),
    quality: Annotated[int, typer.Option(help="Of JPEG, 1 to 100.")] = 95,
) -> None:
    """Write a dataset as Parquet shards, which are read several times faster: data.source=shards:OUT.

    After an interruption the same command goes on with what is missing.

    Example: segadapt data pack cityscapes /data/cityscapes packed/cityscapes --size 512 1024 --format jpeg
    """
    from segadapt.platform import api

    with _progress_bar(f"packing {root}") as progress:
        manifest = api.data_pack(
            kind, root, out, splits=split, size=size, image_format=image_format, quality=quality, progress=progress
        )
    held = ", ".join(f"{name} {counts['images']} images" for name, counts in manifest.splits.items())
    size_text = _bytes(sum(shard.bytes for shard in manifest.shards))
    _console().print(f"{out}: {held}, {size_text} in {len(manifest.shards)} shards", markup=False, soft_wrap=True)


@data_app.command("show")
def data_show(
    path: Annotated[str, typer.Argument(help="The PNG to write.")] = "streets.png", settings: Assignments = None
) -> None:
    """Write a contact sheet of both domains with labels in Cityscapes colours."""
    from segadapt.platform import api

    print(f"Wrote {api.data_show(path, _values(None, settings))}")


@app.command()
def doctor(
    fix: Annotated[
        bool, typer.Option("--fix", help="Repair what can be repaired; never what a command works on.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    storage: Storage = "runs",
    study_uri: StudyUri = None,
    tracking_uri: TrackingUri = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to look at; without it none is joined.")] = None,
) -> None:
    """Look whether environment, storage, tracking and cluster are sound, and Ray, Optuna and MLflow agree.

    Exit status: 0 sound, or all repaired; 1 faults are left; 2 wrong usage.
    """
    from segadapt.platform import api

    found = api.doctor(storage=storage, tracking_uri=tracking_uri, study_uri=study_uri, address=address, fix=fix)
    findings = list(found) if as_json else _show_findings(found)
    if as_json:
        print(json.dumps([finding.as_dict() for finding in findings], indent=1))
    sys.exit(1 if any(finding.level == "fault" and not finding.repaired for finding in findings) else 0)


@cache_app.command("list")
def cache_list(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False, storage: Storage = "runs"
) -> None:
    """List the shared stages: what each is, its size, when it was last used and which experiments need it."""
    from segadapt.platform import api

    found = api.cache_list(storage=storage)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        _show_cache(found)


@cache_app.command("prune")
def cache_prune(
    older_than: Annotated[
        float | None, typer.Option(metavar="DAYS", help="Remove stages that were not used for so long.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all stages.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed; touch nothing.")] = False,
    storage: Storage = "runs",
) -> None:
    """Remove shared stages that no unfinished experiment needs, and what dead processes left.

    Example: segadapt cache prune --older-than 30
    """
    from segadapt.platform import api

    pruned = api.cache_prune(older_than_days=older_than, everything=everything, dry_run=dry_run, storage=storage)
    _show_pruned(pruned, dry_run=dry_run)


def _options(
    storage: str,
    tracking_uri: str | None,
    address: str | None,
    launcher: str,
    workers: int,
    gpus: float | None,
    debug: bool,
    study_uri: str | None = None,
    max_failures: int = 2,
    trial_timeout: float = 7200.0,
) -> "Options":
    from segadapt.platform.errors import UsageError
    from segadapt.platform.experiments import Options
    from segadapt.platform.trial import Tolerance

    if launcher not in ("auto", "train", "inprocess"):
        raise UsageError(f"--launcher must be auto, train or inprocess, but got {launcher!r}.")
    return Options(
        storage=storage,
        tracking_uri=tracking_uri,
        study_uri=study_uri,
        address=address,
        launcher=launcher,  # type: ignore[arg-type]
        workers=workers,
        gpus=gpus,
        tolerance=Tolerance(max_failures, trial_timeout),
        debug=debug,
        say=lambda text: _console().print(text, markup=False),
    )


def _values(config: str | None, settings: list[str] | None, *, skip_bad: bool = False) -> dict[str, Any]:
    from pathlib import Path

    from segadapt.platform.config import parse_assignments, read_experiment

    file_values = read_experiment(Path(config)) if config else {}
    own = {"data.skip_bad": True} if skip_bad else {}
    return {**file_values, **own, **parse_assignments(settings or [])}


def _conclude(name: str, outcome: "Outcome", options: "Options", *, advise: bool) -> None:
    """Show what came out and what to do next, and exit."""
    from segadapt.platform import api
    from segadapt.platform.redaction import redacted

    try:
        board = api.runs(name, storage=options.storage, tracking_uri=options.tracking_uri)
    except Exception as error:
        if options.tracking_uri is None:
            raise
        options.say(
            f"{name} ended, but its MLflow server does not answer: {redacted(error)}\n"
            f"`segadapt runs {name}` shows it later."
        )
        sys.exit(_status(outcome))
    _show_leaderboard(board)
    say: Callable[[str], None] = options.say
    where = "" if options.storage == "runs" else f" --storage {options.storage}"
    parts = ", ".join(f"{part} {seconds:.0f}" for part, seconds in outcome.seconds.items())
    say(f"\n{name} took {sum(outcome.seconds.values()):.0f} s ({parts}). Next:")
    segadapt = "uv run segadapt" if "UV_RUN_RECURSION_DEPTH" in os.environ else "segadapt"  # as it was called
    if options.tracking_uri is None:
        say(f"  {segadapt} ui{where}    then open experiment {name} at http://127.0.0.1:5000")
    if outcome.interrupted:
        command = "search" if advise else "train"
        say(f"  {segadapt} {command} --resume {name}{where}    goes on where it stopped")
    elif any(row.checkpoint for row in board.rows):
        say(f"  {segadapt} finish best --search {name}{where}    self-trains the best trial")
    sys.exit(_status(outcome))


def _status(outcome: "Outcome") -> int:
    if outcome.interrupted:
        return 130
    return 1 if outcome.failed else 0


def _show_plan(record: "Record") -> None:
    import yaml

    from segadapt.platform.api import show_range

    console = _console()
    console.print(f"search {record.name}: {record.trials} trials, for {record.objective}")
    console.print(f"sampler {record.sampler}, scheduler {record.scheduler}")
    if record.keep_top is not None:
        console.print(f"checkpoints of the {record.keep_top} best trials are kept")
    for name in record.warm_start:
        console.print(f"trials of {name} that fit count as prior points")
    for method, config in record.configs().items():
        console.print(f"\nconfiguration of the first trial of {method}:")
        console.print(yaml.safe_dump(config.as_dict(), sort_keys=False))
        console.print("searched:")
        candidate = record.candidates[method]
        for key, distribution in candidate.space.items():
            console.print(f"  {key:32} {show_range(distribution):24} first {candidate.first[key]}")


def _show_estimate(estimate: "Estimate") -> None:
    from rich.table import Table

    console = _console()
    table = Table(title="measured here, and predicted from it", box=None)
    columns = ("s/step", "s/evaluation", "memory", "checkpoint", "full trial", "stopped early", "shared stages", "disk")
    for column in ("method", *columns):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, cost in estimate.methods.items():
        step_s = max(stage.step_s for stage in cost.probe.stages.values())
        table.add_row(
            method,
            f"{step_s:.3g}",
            f"{cost.probe.evaluation_s:.3g}",
            _bytes(cost.probe.memory_bytes),
            _bytes(cost.probe.checkpoint_bytes),
            *map(_duration, (cost.trial_s, cost.early_stopped_s, cost.shared_s)),
            _bytes(cost.trial_bytes),
        )
    console.print(table)
    limit = "" if estimate.memory_limit is None else f" of {_bytes(estimate.memory_limit)} that a worker may take"
    most = max(cost.probe.memory_bytes for cost in estimate.methods.values())
    lines = [
        f"search, {estimate.concurrent} trials at a time: at most {_duration(estimate.search_s)} (no trial stopped "
        f"early), about {_duration(estimate.early_stopped_s)} if half of the trials end at each rung",
        f"memory: {_bytes(most)}{limit} ({estimate.device})",
        f"disk: {_bytes(estimate.storage_bytes)} of {_bytes(estimate.free_bytes)} free",
    ]
    if estimate.gpu_hours > 0:
        lines.insert(1, f"GPU hours: at most {estimate.gpu_hours:.3g}")
    for line in (*lines, *(f"note: {note}" for note in estimate.notes)):
        console.print(line, markup=False, soft_wrap=True)


def _show_leaderboard(board: "Leaderboard") -> None:
    from rich.table import Table

    trials = [row for row in board.rows if row.kind == "trial"]
    varied = sorted({key for row in trials for key in row.params})
    shown = varied if len(varied) <= _SHOWN_PARAMS else []
    table = Table(title=f"{board.search}: {board.objective}", box=None)
    goals = list(next((row.goals for row in trials if len(row.goals) > 1), []))  # one goal is the column "best"
    columns = ["run", "state", *(goals or ["best"]), *(["mean rank"] if "+" in board.objective else [])]
    for column in (*columns, "at step", "last", *(key.rsplit(".", 1)[-1] for key in shown)):
        table.add_column(column, justify="left" if column in ("run", "state") else "right", overflow="fold")
    for row in board.rows:
        values = [_short(row.params.get(key, "")) if row.kind == "trial" else "" for key in shown]
        reached = [_number(row.goals.get(goal)) for goal in goals] or [_number(row.best)]
        ranks = [_number(None if row.score is None else -row.score)] if "+" in board.objective else []
        name = f"{row.name} *" if row.on_front else row.name
        state = f"{row.state}, checkpoint not kept" if row.checkpoint_removed else row.state
        table.add_row(name, state, *reached, *ranks, str(row.best_step or "-"), _number(row.last), *values)
    console = _console()
    console.print(table)
    if any(row.on_front for row in board.rows):
        console.print("* on the Pareto front")
    if board.baseline is not None:
        console.print(f"start (source-only): {_number(board.baseline)}")
    if board.methods:
        compared = ", ".join(f"{method} {value:.3f}" for method, value in board.methods.items())
        console.print(f"best of each method after {board.equal_steps} steps: {compared}", soft_wrap=True)
    if not shown:
        for method in dict.fromkeys(row.method for row in trials):
            own = [row for row in trials if row.method == method]
            values = [f"{key}={_short(value)}" for key, value in sorted(own[0].params.items()) if key != "method"]
            text = f"{method}: {len(own)} trials, best {_number(own[0].best)} ({own[0].name}) with {' '.join(values)}"
            console.print(text, markup=False, soft_wrap=True)
    for row in board.rows:
        if row.failure:
            console.print(f"{row.name} failed: {row.failure}", markup=False)
    _show_reranked(board)


def _show_status(found: "SearchStatus", *, clear: bool) -> None:
    from rich.table import Table

    console = _console()
    if clear and console.is_terminal:
        console.clear()
    states = ", ".join(f"{count} {state}" for state, count in found.states.items()) or "none yet"
    console.print(f"{found.search}: {found.state} · trials, of {found.asked}: {states}", markup=False)
    if found.best is not None:
        console.print(f"best so far {found.best:.3f} ({found.best_name}), for {found.objective}", markup=False)
    if found.left_s is not None:
        console.print(f"about {_duration(found.left_s)} left")
    if found.running:
        table = Table(box=None)
        for column in ("trial", "state", "step", "best", "last heard"):
            table.add_column(column, justify="left" if column in ("trial", "state") else "right")
        for trial in found.running:
            heard = f"{_duration(trial.heard_s)} ago" + (" (stalled)" if trial.stalled else "")
            table.add_row(trial.name, trial.state, str(trial.step), _number(trial.value), heard)
        console.print(table)
    for rung in found.rungs:
        console.print(f"rung {rung.step}: {rung.reached} came, {rung.continued} went on")
    for name, reason in found.failures.items():
        console.print(f"{name} failed: {reason}", markup=False, soft_wrap=True)


def _show_reranked(board: "Leaderboard") -> None:
    from rich.table import Table

    if not board.reranked:
        return
    table = Table(title=f"trained again on {len(board.reranked[0].values)} other seeds", box=None)
    for column in ("configuration of", "mean", "95 % interval", "behind the first", "by seed"):
        table.add_column(column, justify="left" if column == "configuration of" else "right")
    for found in board.reranked:
        behind = "-" if found.behind is None else f"{found.behind:.3f} ± {_number(found.behind_half_width)}"
        by_seed = " ".join(f"{value:.3f}" for value in found.values)
        table.add_row(found.name, f"{found.mean:.3f}", f"± {_number(found.half_width)}", behind, by_seed)
    console = _console()
    console.print(table)
    console.print(board.verdict)


def _show_selection(board: "Leaderboard") -> None:
    from rich.table import Table

    console = _console()
    if not board.selection:
        console.print("Nothing to compare: no trial has both label-free scores and target mIoU.")
        return
    table = Table(title="choosing by a label-free score instead, judged by target_val/miou", box=None)
    for column in ("score", "trials", "rank correlation", "would choose", "its target_val/miou", "regret"):
        table.add_column(column, justify="left" if column in ("score", "would choose") else "right")
    for choice in board.selection:
        numbers = (_number(value) for value in (choice.target_miou, choice.regret))
        table.add_row(choice.score, str(choice.trials), _number(choice.correlation), choice.chosen, *numbers)
    console.print(table)


def _show_finish(result: "FinishResult") -> None:
    from rich.table import Table

    table = Table(title=f"{result.name}: self-training of {result.from_run}", box=None)
    for column in ("metric", "before", "after", "change"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for metric in sorted(result.after, key=lambda text: ("/iou/" in text, text)):
        before, after = result.before[metric], result.after[metric]
        table.add_row(metric, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    console = _console()
    console.print(table)
    for number, found in enumerate(result.rounds, 1):
        miou = _number(found.get("target_val/miou"))
        console.print(f"round {number}: {found['labelled_share']:.1%} of the target labelled, target_val/miou {miou}")
    for name, path in (("best", result.checkpoint), ("last", result.last)):
        if path:
            console.print(f"{name} checkpoint: {path}", soft_wrap=True)


def _show_seeds(results: "Sequence[FinishResult]") -> None:
    """Show what several seeds of a finish, best first, have reached after the last step."""
    from statistics import mean, stdev

    console = _console()
    for metric in ("target_val/miou", "source_val/miou"):
        values = [result.after[metric] for result in results if metric in result.after]
        if len(values) > 1:
            each = ", ".join(f"{value:.3f}" for value in values)
            console.print(f"{metric} over {len(values)} seeds: {mean(values):.3f} +- {stdev(values):.3f} ({each})")
    console.print(f"best: {results[0].name}")


def _show_evaluation(result: "EvaluationResult") -> None:
    from rich.table import Table

    console = _console()
    title = f"{result.run} at step {result.step} on {result.images} target images: {result.protocol}, {result.how}"
    console.print(title, markup=False, soft_wrap=True)
    table = Table("class", box=None)
    table.add_column("IoU", justify="right")
    for name, iou in result.iou.items():
        table.add_row(name, _number(iou))
    console.print(table)
    for name, value in result.metrics.items():
        if "/iou/" not in name:
            console.print(f"{name} {value:.4f}    in MLflow: {result.tracked}/{name}", soft_wrap=True)
    if result.predictions is not None:
        console.print(f"predictions: {result.predictions}", soft_wrap=True, markup=False)


def _show_cache(found: "CacheContent") -> None:
    from rich.table import Table

    console = _console()
    table = Table(box=None)
    for column in ("stage", "by", "data", "network", "seed", "steps", "size", "age", "unused", "hash", "needed by"):
        table.add_column(column, justify="right" if column in ("seed", "steps", "size", "age", "unused") else "left")
    for stage in found.stages:
        told = stage.description
        what = (
            [told.stage, told.method, told.data, told.network, str(told.seed), str(told.steps)] if told else ["?"] * 6
        )
        times = [_duration(stage.age_s), _duration(stage.unused_s)]
        table.add_row(*what, _bytes(stage.bytes), *times, stage.hash[:12], ", ".join(stage.needed_by) or "-")
    if found.stages:
        console.print(table)
    for lease in found.leases:
        console.print(_lease_text(lease), markup=False, soft_wrap=True)
    if found.left_over:
        console.print(f"{len(found.left_over)} left-over copies of dead processes; `segadapt cache prune` removes them")
    console.print(f"{len(found.stages)} stages, {_bytes(found.bytes)}")


def _show_pruned(pruned: "Pruned", *, dry_run: bool) -> None:
    console = _console()
    removed = "would be removed" if dry_run else "removed"
    for stage in pruned.stages:
        console.print(f"{removed}: {_stage_text(stage)}, {_bytes(stage.bytes)}", markup=False, soft_wrap=True)
    for stage in pruned.kept:
        why = f"needed by {', '.join(stage.needed_by)}" if stage.needed_by else "an experiment began to need it"
        console.print(f"kept: {_stage_text(stage)}, {why}", markup=False, soft_wrap=True)
    for lease in pruned.leases:
        console.print(f"{removed}: the lease of a dead process: {_lease_text(lease)}", markup=False, soft_wrap=True)
    if pruned.left_over:
        console.print(f"{removed}: {len(pruned.left_over)} left-over copies of dead processes")
    console.print(f"{'would free' if dry_run else 'freed'} {_bytes(pruned.bytes)}")


def _show_findings(found: "Iterable[Finding]") -> "list[Finding]":
    """Show what a check-up finds as it comes; returns it."""
    from rich.text import Text

    console = _console()
    styles = {"ok": "green", "warning": "yellow", "fault": "bold red", "repaired": "green"}
    findings = []
    for finding in found:
        findings.append(finding)
        level = "repaired" if finding.repaired else finding.level
        parts = [finding.text, finding.meaning, "" if finding.repaired else finding.advice]
        line = Text.assemble((f"{level:9}", styles[level]), (f"{finding.subject}: ", "bold"))
        console.print(line.append(". ".join(part.rstrip(".") for part in parts if part)), soft_wrap=True)
    count = {level: sum(entry.level == level and not entry.repaired for entry in findings) for level in styles}
    repaired = sum(entry.repaired for entry in findings)
    mendable = sum(entry.repair is not None for entry in findings)
    console.print(
        f"\n{count['fault']} faults, {count['warning']} warnings"
        + (f", {repaired} repaired" if repaired else "")
        + (f"; `segadapt doctor --fix` repairs {mendable}" if mendable else "")
    )
    return findings


def _stage_text(stage: "CachedStage") -> str:
    told = stage.description
    what = f"{told.stage} ({told.data}, {told.network}, seed {told.seed}, {told.steps} steps)" if told else "a stage"
    return f"{stage.hash[:12]} {what}, unused for {_duration(stage.unused_s)}"


def _lease_text(lease: "RunningLease") -> str:
    state = "computes" if lease.alive else f"gave no sign for {_duration(lease.age_s)} while computing"
    return f"{lease.owner} {state} {lease.stage} {lease.hash[:12]}"


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _show_prediction(result: "PredictionResult") -> None:
    console = _console()
    for image in result.unreadable:
        console.print(f"unreadable: {image.path}: {image.reason}", markup=False, soft_wrap=True)
    parts = [f"{result.written} images labelled in {result.folder}"]
    parts += [f"{result.skipped} were before"] * (result.skipped > 0)
    parts += [f"{len(result.unreadable)} unreadable"] * (len(result.unreadable) > 0)
    console.print(", ".join(parts), markup=False, soft_wrap=True)


@contextlib.contextmanager
def _progress_bar(title: str) -> "Iterator[Callable[[int, int], None]]":
    """Show a bar on a terminal; yields what moves it by a number of steps out of a total."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = _console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, advance=done, total=total)


def _show_report(report: "DatasetReport") -> None:
    from itertools import groupby

    from rich.table import Table

    console = _console()
    for name, split in report.splits.items():
        sizes = ", ".join(f"{size} ({count})" for size, count in list(split.sizes.items())[:_SHOWN_SIZES])
        more = len(split.sizes) - _SHOWN_SIZES
        sizes += f" and {more} more" if more > 0 else ""
        console.print(
            f"{name}: {split.images} images, {split.labels} labels, about {_bytes(split.packed_bytes)} packed"
        )
        console.print(f"  sizes: {sizes or '-'}", soft_wrap=True)
        labelled = sum(split.pixels.values())
        if labelled:
            table = Table(box=None, title=f"{report.kind} {name}: classes")
            for column in ("class", "pixels", "labels with it"):
                table.add_column(column, justify="left" if column == "class" else "right")
            for label, pixels in split.pixels.items():
                table.add_row(label, f"{pixels / labelled:.2%}", str(split.images_with.get(label, "")))
            console.print(table)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for problem, faults in groupby(sorted(report.faults, key=lambda fault: fault.problem), lambda fault: fault.problem):
        found = list(faults)
        console.print(f"\n{problem} ({len(found)}):", markup=False)
        for fault in found:
            console.print(f"  {fault.path}  {fault.detail}".rstrip(), markup=False, soft_wrap=True)
    console.print(f"\n{len(report.faults)} faults in {report.root}" if report.faults else f"{report.root} is sound.")


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def _console(*, stderr: bool = False) -> "Console":
    from segadapt.platform.progress import console

    return console(stderr=stderr)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _short(text: str) -> str:
    try:
        return f"{float(text):.3g}"
    except ValueError:
        return text


if __name__ == "__main__":
    main()
