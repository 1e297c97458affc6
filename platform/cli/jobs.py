"""The commands about a cluster's jobs, and the logs of jobs and trials."""

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from segadapt.platform.cli.next_steps import after_submit, show_next
from segadapt.platform.cli.options import JOBS, AsJson, JobsAddress, refuse_idle, shared, tracked_place
from segadapt.platform.cli.tables import console

if TYPE_CHECKING:
    from segadapt.platform.storage.folders import Place

_JobName = Annotated[str, typer.Argument(metavar="JOB", help="A name that `segadapt jobs` shows.")]


def submit(
    words: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="A search, train or finish command.")],
    address: JobsAddress = JOBS,
    name: Annotated[str | None, typer.Option(help="Name of the job; default: made of command and time.")] = None,
    follow_job: Annotated[
        bool, typer.Option("--follow", help="Show what it prints; Ctrl-C leaves it running.")
    ] = False,
) -> None:
    """Run a command on a Ray cluster as a job, which goes on when this machine is switched off.

    Example: segadapt submit -- search sdca --storage /mnt/segadapt/runs
    """
    from segadapt.platform.api import operation

    job = operation.submit(words, address=address, name=name)
    print(f"{job} is submitted.", flush=True)
    show_next(after_submit(job, address))
    if follow_job:
        follow(job, address)


def jobs(address: JobsAddress = JOBS, as_json: AsJson = False) -> None:
    """List the jobs of a Ray cluster."""
    from rich.table import Table

    from segadapt.platform.api import operation

    entries = operation.jobs(address=address)
    if as_json:
        print(json.dumps([dataclasses.asdict(job) for job in entries], indent=1))
        return
    table = Table("job", "state", "started (UTC)", "command", box=None)
    for job in entries:
        table.add_row(job.name, job.state, job.started or "-", job.command)
    console().print(table if entries else "no jobs")


@shared(place=tracked_place)
def logs(
    place: "Place",
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(metavar="JOB|TRIAL", help="As `segadapt jobs` shows it; with --search a run's name or `best`."),
    ],
    search_name: Annotated[
        str | None, typer.Option("--search", metavar="SEARCH", help="Show the log of this search's trial instead.")
    ] = None,
    follow_log: Annotated[bool, typer.Option("--follow", help="Until it ends; Ctrl-C leaves it running.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --search: a line of JSON per entry.")] = False,
    address: JobsAddress = JOBS,
) -> None:
    """Show what a job printed, or with --search what a trial noted: start, stages, scores, checkpoints, faults, end.

    Of a job, with --follow, exit status 1 if it failed or was stopped.

    Example: segadapt logs sdca-003 --search sdca-streets
    """
    from segadapt.platform.api import operation, results
    from segadapt.platform.errors import UsageError
    from segadapt.platform.trial.log import as_text

    if search_name is None:
        refuse_idle(context, "--json", "--storage", "--tracking-uri", why="go with --search, for the log of a trial")
    else:
        refuse_idle(context, "--address", why="names the cluster of a job, but --search a trial's log in the storage")
    if search_name is not None:
        for entry in results.trial_log(name, search_name, follow=follow_log, place=place):
            print(json.dumps(entry) if as_json else as_text(entry), flush=follow_log)
        return
    try:
        if follow_log:
            follow(name, address)
        for text in operation.logs(name, address=address):
            print(text, end="")
    except UsageError as error:
        raise UsageError(f"{error}\nThe log of a trial: segadapt logs {name} --search SEARCH") from error


def stop(job: _JobName, address: JobsAddress = JOBS) -> None:
    """End a job; `segadapt submit -- search --resume NAME --storage ...` goes on where it was."""
    from segadapt.platform.api import operation

    print(f"{job} is told to stop" if operation.stop(job, address=address) else f"{job} had ended")


def hand_over(address: str | None) -> None:
    """Submit this command line to the cluster whose Ray Jobs `address` names, follow it and exit; else do nothing."""
    if address is None:
        return
    from segadapt.platform.cluster.jobs import is_jobs_address, without_option

    if not is_jobs_address(address):
        return
    from segadapt.platform.api.operation import submit
    from segadapt.platform.errors import redacted

    job = submit(without_option(sys.argv[1:], "--address"), address=address)
    print(f"{job} runs on {redacted(address)}; Ctrl-C leaves it running", flush=True)
    show_next(after_submit(job, address))
    follow(job, address)


def follow(job: str, address: str) -> None:
    """Show what a job prints until it ends, and exit with 1 unless it succeeded."""
    from segadapt.platform.api import operation

    for text in operation.logs(job, address=address, follow=True):
        print(text, end="", flush=True)
    ended = next(entry for entry in operation.jobs(address=address) if entry.name == job)
    if ended.state != "succeeded":
        console(stderr=True).print(f"{job} {ended.state}: {ended.message}", markup=False, soft_wrap=True)
    sys.exit(0 if ended.state == "succeeded" else 1)
