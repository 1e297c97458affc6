"""What the commands show on the screen."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from segadapt.platform.settings.text import duration_text, number_text, setting_text, short_text, size_text, span_text

if TYPE_CHECKING:
    from rich.console import Console

    from segadapt.platform.deployment.evaluation import EvaluationResult
    from segadapt.platform.deployment.prediction import PredictionResult
    from segadapt.platform.experiment.estimate import Estimate
    from segadapt.platform.experiment.finishing import FinishResult
    from segadapt.platform.experiment.record import Record
    from segadapt.platform.results.leaderboard import Leaderboard, Row
    from segadapt.platform.results.status import SearchStatus

_SHOWN_PARAMS = 8
"""Most searched settings that a leaderboard shows as columns; of more, those of each method's best trial."""


_TEXT_WIDTH = 100
"""Characters of a line of settings."""


def console(*, stderr: bool = False) -> "Console":
    """Return a console as wide as the terminal."""
    from segadapt.platform.experiment.progress import console

    return console(stderr=stderr)


def show_plan(record: "Record") -> None:
    """Show what a search would do: what is set, what is searched; `segadapt plan` prints every setting."""
    from segadapt.platform.search.ranges import show_range

    screen = console()
    screen.print(f"search {record.name}: {record.trials} trials, for {record.objective}")
    screen.print(f"sampler {record.sampler}, scheduler {record.scheduler}")
    if record.keep_top is not None:
        screen.print(f"checkpoints of the {record.keep_top} best trials are kept")
    for name in record.warm_start:
        screen.print(f"trials of {name} that fit count as prior points")
    for method, candidate in record.candidates.items():
        screen.print(f"\n{method}, all else as by default:" if candidate.fixed else f"\n{method}, as by default:")
        settings = (f"{key}={setting_text(value)}" for key, value in sorted(candidate.fixed.items()))
        for line in _lines_of(settings):
            screen.print(line, soft_wrap=True)
        screen.print("searched:")
        for key, distribution in candidate.space.items():
            screen.print(f"  {key:32} {show_range(distribution):24} first {candidate.first[key]}")


def show_estimate(estimate: "Estimate") -> None:
    """Show what a search is predicted to take."""
    from rich.table import Table

    screen = console()
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
            size_text(cost.probe.memory_bytes),
            size_text(cost.probe.checkpoint_bytes),
            *map(duration_text, (cost.trial_s, cost.early_stopped_s, cost.shared_s)),
            size_text(cost.trial_bytes),
        )
    screen.print(table)
    limit = "" if estimate.memory_limit is None else f" of {size_text(estimate.memory_limit)} that a worker may take"
    most = max(cost.probe.memory_bytes for cost in estimate.methods.values())
    lines = [
        f"search, {estimate.concurrent} trials at a time: at most {duration_text(estimate.search_s)} (no trial stopped "
        f"early), about {duration_text(estimate.early_stopped_s)} if half of the trials end at each rung",
        f"memory: {size_text(most)}{limit} ({estimate.device})",
        f"disk: {size_text(estimate.storage_bytes)} of {size_text(estimate.free_bytes)} free",
    ]
    if estimate.gpu_hours > 0:
        lines.insert(1, f"GPU hours: at most {estimate.gpu_hours:.3g}")
    for line in (*lines, *(f"note: {note}" for note in estimate.notes)):
        screen.print(line, markup=False, soft_wrap=True)


def show_leaderboard(board: "Leaderboard") -> None:
    """Show the trials of a search, best first, and how they failed."""
    from rich.table import Table

    trials = [row for row in board.rows if row.kind == "trial"]
    varied = sorted({key for row in trials for key in row.params})
    as_columns = varied if board.kind == "search" and len(varied) <= _SHOWN_PARAMS else []
    table = Table(title=f"{board.search}: {board.objective}", box=None)
    goals = list(next((row.goals for row in trials if len(row.goals) > 1), []))  # one goal is the column "best"
    columns = ["run", "state", *(goals or ["best"]), *(["mean rank"] if "+" in board.objective else [])]
    columns += [board.judged_by] if board.judged_by else []
    for column in (*columns, "at step", "last", *_short_names(as_columns)):
        table.add_column(column, justify="left" if column in ("run", "state") else "right", overflow="fold")
    for row in board.rows:
        values = [short_text(row.params.get(key, "")) if row.kind == "trial" else "" for key in as_columns]
        reached = [number_text(row.goals.get(goal)) for goal in goals] or [number_text(row.best)]
        ranks = [number_text(None if row.score is None else -row.score)] if "+" in board.objective else []
        ranks += [number_text(row.target_miou)] if board.judged_by else []
        name = f"{row.name} *" if row.on_front else row.name
        state = f"{row.state}, checkpoint not kept" if row.checkpoint_removed else row.state
        table.add_row(name, state, *reached, *ranks, str(row.best_step or "-"), number_text(row.last), *values)
    screen = console()
    screen.print(table)
    if any(row.on_front for row in board.rows):
        screen.print("* on the Pareto front")
    if board.baseline is not None:
        screen.print(f"start (source-only): {number_text(board.baseline)}")
    if board.unknown is not None:
        screen.print(board.unknown, soft_wrap=True)
    if board.methods:
        compared = ", ".join(f"{method} {value:.3f}" for method, value in board.methods.items())
        screen.print(f"best of each method after {board.equal_steps} steps: {compared}", soft_wrap=True)
    if board.additions:
        shown = ", ".join(map(str, board.additions))
        screen.print(f"what losses add to {board.ground}: {shown}", soft_wrap=True)
    if not as_columns:
        for line in _best_of_each_method(trials, board.kind):
            screen.print(line, markup=False, soft_wrap=True)
    for row in board.rows:
        if row.failure:
            screen.print(f"{row.name} failed: {row.failure}", markup=False)
    show_reranked(board)


def _short_names(keys: Sequence[str]) -> list[str]:
    """Return the ends of dotted names, as long as they must be to differ."""
    names = []
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        others = [f".{other}" for other in keys if other != key]
        names.append(next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), key))
    return names


def _best_of_each_method(trials: "Sequence[Row]", kind: str) -> "Iterator[str]":
    """Yield the best trial of each method with its settings, in lines that can be read."""
    for method in dict.fromkeys(row.method for row in trials):
        of_method = [row for row in trials if row.method == method]
        best = of_method[0]
        values = [
            f"{key.removeprefix(f'{method}.')}={short_text(value)}"
            for key, value in sorted(best.params.items())
            if key != "method"
        ]
        if kind == "search":
            yield f"{method}: {len(of_method)} trials, best {number_text(best.best)} ({best.name}) with"
        elif values:
            yield f"settings of {best.name} that were given:"
        yield from _lines_of(values)


def _lines_of(settings: Iterable[str]) -> list[str]:
    """Return KEY=VALUE words in indented lines that can be read."""
    import textwrap

    wrapped = textwrap.wrap(" ".join(settings), _TEXT_WIDTH, break_long_words=False, break_on_hyphens=False)
    return [f"  {line}" for line in wrapped]


def show_status(status: "SearchStatus", *, clear: bool) -> None:
    """Show how a search stands; `clear` wipes a terminal before."""
    from rich.table import Table

    screen = console()
    if clear and screen.is_terminal:
        screen.clear()
    states = ", ".join(f"{count} {state}" for state, count in status.states.items()) or "none yet"
    screen.print(f"{status.search}: {status.state} · trials, of {status.asked}: {states}", markup=False)
    if status.best is not None:
        screen.print(f"best so far {status.best:.3f} ({status.best_name}), for {status.objective}", markup=False)
    if status.left_s is not None:
        screen.print(f"{span_text(*status.left_s)} left")
    if status.state == "running" and not status.states and not status.stages:
        screen.print("shared stages, which all trials start from, are about to begin")
    if status.running or status.stages:
        table = Table(box=None)
        for column in ("trial or shared stage", "state", "step", "best", "last heard"):
            table.add_column(column, justify="right" if column in ("step", "best", "last heard") else "left")
        for trial in (*status.stages, *status.running):
            heard = f"{duration_text(trial.heard_s)} ago" + (" (stalled)" if trial.stalled else "")
            table.add_row(trial.name, trial.state, str(trial.step), number_text(trial.value), heard)
        screen.print(table)
    for rung in status.rungs:
        screen.print(f"rung {rung.step}: {rung.reached} came, {rung.continued} went on")
    for name, reason in status.failures.items():
        screen.print(f"{name} failed: {reason}", markup=False, soft_wrap=True)


def show_reranked(board: "Leaderboard") -> None:
    """Show the configurations that were trained again on other seeds, if there are any."""
    from rich.table import Table

    if not board.reranked:
        return
    table = Table(title=f"trained again on {len(board.reranked[0].values)} other seeds", box=None)
    for column in ("configuration of", "mean", "95 % interval", "behind the first", "by seed"):
        table.add_column(column, justify="left" if column == "configuration of" else "right")
    for entry in board.reranked:
        behind = "-" if entry.behind is None else f"{entry.behind:.3f} ± {number_text(entry.behind_half_width)}"
        by_seed = " ".join(f"{value:.3f}" for value in entry.values)
        table.add_row(
            entry.name,
            f"{entry.mean:.3f}",
            f"± {number_text(entry.half_width)}",
            behind,
            by_seed,
        )
    screen = console()
    screen.print(table)
    screen.print(board.verdict)


def show_selection(board: "Leaderboard") -> None:
    """Show what each label-free score would have chosen and lost."""
    from rich.table import Table

    screen = console()
    if not board.selection:
        screen.print("Nothing to compare: no trial has both label-free scores and target mIoU.")
        return
    table = Table(title="choosing by a label-free score instead, judged by target_val/miou", box=None)
    for column in ("score", "trials", "rank correlation", "would choose", "its target_val/miou", "regret"):
        table.add_column(column, justify="left" if column in ("score", "would choose") else "right")
    for choice in board.selection:
        numbers = (number_text(value) for value in (choice.target_miou, choice.regret))
        table.add_row(choice.score, str(choice.trials), number_text(choice.correlation), choice.chosen, *numbers)
    screen.print(table)


def show_finish(result: "FinishResult") -> None:
    """Show a model before and after self-training."""
    from rich.table import Table

    table = Table(title=f"{result.name}: self-training of {result.from_run}", box=None)
    for column in ("metric", "before", "after", "change"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for metric in sorted(result.after, key=lambda text: ("/iou/" in text, text)):
        before, after = result.before[metric], result.after[metric]
        table.add_row(metric, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    screen = console()
    screen.print(table)
    for number, metrics in enumerate(result.rounds, 1):
        miou = metrics.get("target_val/miou")
        reached = "target_val/miou unknown" if miou is None else f"target_val/miou {miou:.3f}"
        screen.print(f"round {number}: {metrics['labelled_share']:.1%} of the target labelled, {reached}")
    for name, path in (("best", result.checkpoint), ("last", result.last)):
        if path:
            screen.print(f"{name} checkpoint: {path}", soft_wrap=True)


def show_seeds(results: "Sequence[FinishResult]") -> None:
    """Show what several seeds of a finish, best first, have reached after the last step."""
    from statistics import mean, stdev

    screen = console()
    for metric in ("target_val/miou", "source_val/miou"):
        values = [result.after[metric] for result in results if metric in result.after]
        if len(values) > 1:
            each = ", ".join(f"{value:.3f}" for value in values)
            screen.print(f"{metric} over {len(values)} seeds: {mean(values):.3f} +- {stdev(values):.3f} ({each})")
    screen.print(f"best: {results[0].name}")


def show_evaluation(result: "EvaluationResult") -> None:
    """Show how well a network labels a set."""
    from rich.table import Table

    screen = console()
    title = f"{result.run} at step {result.step} on {result.images} target images: {result.protocol}, {result.how}"
    screen.print(title, markup=False, soft_wrap=True)
    table = Table("class", box=None)
    table.add_column("IoU", justify="right")
    for name, iou in result.iou.items():
        table.add_row(name, number_text(iou))
    screen.print(table)
    for name, value in result.metrics.items():
        if "/iou/" not in name:
            screen.print(f"{name} {value:.4f}    in MLflow: {result.tracked}/{name}", soft_wrap=True)
    if result.predictions is not None:
        screen.print(f"predictions: {result.predictions}", soft_wrap=True, markup=False)


def show_prediction(result: "PredictionResult") -> None:
    """Show how many images were labelled, and which could not be read."""
    screen = console()
    for image in result.unreadable:
        screen.print(f"unreadable: {image.path}: {image.reason}", markup=False, soft_wrap=True)
    parts = [f"{result.written} images labelled in {result.folder}"]
    parts += [f"{result.skipped} were before"] * (result.skipped > 0)
    parts += [f"{len(result.unreadable)} unreadable"] * (len(result.unreadable) > 0)
    screen.print(", ".join(parts), markup=False, soft_wrap=True)


@contextlib.contextmanager
def progress_bar(title: str) -> "Iterator[Callable[[int, int], None]]":
    """Show a bar on a terminal; yields what moves it by a number of steps out of a total."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    screen = console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, advance=done, total=total)
