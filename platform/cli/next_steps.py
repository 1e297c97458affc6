"""What each command ends with: the commands that come next, whole, so that they can be pasted."""

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segadapt.platform.api.training import Result
    from segadapt.platform.experiment.finishing import FinishResult
    from segadapt.platform.results.leaderboard import Leaderboard
    from segadapt.platform.results.status import SearchStatus
    from segadapt.platform.storage.folders import Place

Step = tuple[str, str]
"""What for, and the command."""


def show_next(steps: Iterable[Step]) -> None:
    """Show commands, each alone on its line below what it is for."""
    from segadapt.platform.cli.tables import console

    shown = list(steps)
    lines = ["Next:"] * bool(shown)
    for reason, command in shown:
        lines += [f"  {reason}", f"    {command}"]
    for line in lines:
        console().print(line, markup=False, soft_wrap=True)


def same_command(*, without: str = "") -> str:
    """Return the command that runs, without one of its words."""
    from segadapt.platform.storage.command_lines import command_line

    return command_line(*(word for word in sys.argv[1:] if word != without))


def after_list() -> list[Step]:
    """Return what follows the list of methods."""
    from segadapt.platform.storage.command_lines import command_line

    return [
        ("the settings of one", command_line("describe", "sdca")),
        ("a first search: minutes, without data or a GPU", command_line("search", "sdca", "--trials", 4)),
    ]


def after_describe(method: str) -> list[Step]:
    """Return what follows the settings of a method."""
    from segadapt.platform.storage.command_lines import command_line

    command = "train" if method == "self_training" else "search"
    return [("run it", command_line(command, method))]


def after_experiment(result: "Result", board: "Leaderboard", resume_by: str) -> list[Step]:
    """Return what follows a search or single run.

    Args:
        result: How it ended.
        board: Its trials.
        resume_by: The command that goes on with it.
    """
    from segadapt.platform.storage.command_lines import command_line

    name, place = result.name, result.place
    steps = []
    if result.interrupted:
        steps.append(("go on where it stopped", command_line(resume_by, "--resume", name, place=place)))
    elif resume_by == "search":
        steps.append(("one page: what came out, how sure it is", command_line("report", name, place=place)))
    steps += _best(board, place, finished=not result.interrupted)
    if place.tracking_uri is None:
        steps.append(("every trial in the browser", command_line("ui", name, place=place)))
    return steps


def after_runs(board: "Leaderboard", place: "Place") -> list[Step]:
    """Return what follows a leaderboard."""
    return _best(board, place, finished=True)


def _best(board: "Leaderboard", place: "Place", *, finished: bool) -> list[Step]:
    from segadapt.platform.storage.command_lines import command_line

    if finished and any(row.kind == "trial" and row.checkpoint for row in board.rows):
        return [("self-train the best trial", command_line("finish", "best", "--search", board.search, place=place))]
    return []


def after_status(status: "SearchStatus", place: "Place") -> list[Step]:
    """Return what follows the status of a search."""
    from segadapt.platform.storage.command_lines import command_line

    name = status.search
    if status.state == "running":
        stalled = [trial.name for trial in status.running if trial.stalled]
        return [
            (f"what {trial} did last", command_line("logs", trial, "--search", name, place=place)) for trial in stalled
        ] or [("follow it", command_line("status", name, "--watch", place=place))]
    if status.state == "finished":
        return [("one page: what came out, how sure it is", command_line("report", name, place=place))]
    return [("go on where it stopped", command_line("search", "--resume", name, place=place))]


def after_report(search: str, place: "Place") -> list[Step]:
    """Return what follows a report; the page says more."""
    from segadapt.platform.storage.command_lines import command_line

    if place.tracking_uri is not None:
        return []
    return [("every trial in the browser", command_line("ui", search, place=place))]


def after_finish(results: "Sequence[FinishResult]", search: str, place: "Place", *, interrupted: bool) -> list[Step]:
    """Return what follows a finish.

    Args:
        results: Of each seed, best first.
        search: The search that holds the trial.
        place: Where it is kept and tracked.
        interrupted: Whether the same command goes on.
    """
    from segadapt.platform.storage.command_lines import command_line

    if interrupted:
        return [("go on where it stopped", same_command())]
    if not results or results[0].checkpoint is None:
        return []
    name = results[0].name
    return [
        ("evaluate it as papers do", command_line("evaluate", name, "--search", search, place=place)),
        ("write it as ONNX and torch.export", command_line("export", name, "--search", search, place=place)),
    ]


def after_evaluation(run: str, search: str, place: "Place") -> list[Step]:
    """Return what follows an evaluation."""
    from segadapt.platform.storage.command_lines import command_line

    return [("write it as ONNX and torch.export", command_line("export", run, "--search", search, place=place))]


def after_data_make(folder: str, layout: str) -> list[Step]:
    """Return what follows writing streets as files."""
    from segadapt.platform.storage.command_lines import command_line

    if layout != "folder":
        return after_data_pack(layout, folder)
    source, target = (f"{folder.rstrip('/')}/{domain}" for domain in ("source", "target"))
    return [
        *after_data_pack(layout, source),
        (
            "search on it",
            command_line("search", "sdca", f"data.source=folder:{source}", f"data.target=folder:{target}"),
        ),
    ]


def after_data_pack(kind: str, root: str) -> list[Step]:
    """Return what follows writing a dataset."""
    from segadapt.platform.storage.command_lines import command_line

    return [("decode every file of it", command_line("data", "check", kind, root))]


def after_data_check(kind: str, root: str) -> list[Step]:
    """Return what follows checking a dataset in which some image can be read."""
    from segadapt.platform.storage.command_lines import command_line

    return [("look at its images and labels", command_line("data", "show", kind, root))]


def after_recognition(root: str) -> list[Step]:
    """Return what follows telling a layout that cannot be read as it is."""
    from pathlib import Path

    from segadapt.platform.storage.command_lines import command_line

    out = f"{Path(root).absolute().name}-adopted"
    return [("bring it into the layout of own data, by links", command_line("data", "adopt", root, out))]


def after_submit(job: str, address: str) -> list[Step]:
    """Return what follows submitting a job."""
    from segadapt.platform.cli.options import JOBS
    from segadapt.platform.storage.command_lines import command_line

    where = [] if address == JOBS else ["--address", address]
    return [
        ("follow what it prints", command_line("logs", job, "--follow", *where)),
        ("end it", command_line("stop", job, *where)),
    ]


def after_plan(words: Sequence[str]) -> list[Step]:
    """Return what follows a dry run.

    Args:
        words: Of the command that prints all settings.
    """
    from segadapt.platform.storage.command_lines import command_line

    settings = "every setting, as an experiment file that --config takes"
    return [("run it", same_command(without="--dry-run")), (settings, command_line("plan", *words))]
