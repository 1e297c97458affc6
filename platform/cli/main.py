"""The commands by name, and what becomes of errors."""

import sys
import traceback

import typer

from segadapt.platform.cli import cache, data, doctor, jobs, models, runs, search, weights
from segadapt.platform.cli.options import LateHelp
from segadapt.platform.settings.termination import treat_termination_as_interrupt

app = typer.Typer(
    name="segadapt",
    help="Search, track and finish unsupervised domain-adaptive semantic segmentation on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Exit status: 0 finished, 1 a trial failed or a file has faults, 2 wrong usage, 3 Ray did not start on this "
    "machine, 130 interrupted.",
)
_BEGIN, _SEE, _USE, _KEEP = "Begin", "See what came out", "Use a model", "Data, storage and clusters"

app.command("list", rich_help_panel=_BEGIN)(runs.list_methods)
app.command(rich_help_panel=_BEGIN)(runs.describe)
app.command(cls=LateHelp, rich_help_panel=_BEGIN)(search.search)
app.command(cls=LateHelp, rich_help_panel=_BEGIN)(search.train)
app.command(rich_help_panel=_BEGIN)(search.plan)
app.command(rich_help_panel=_SEE)(runs.status)
app.command(rich_help_panel=_SEE)(runs.runs)
app.command(rich_help_panel=_SEE)(runs.report)
app.command(rich_help_panel=_SEE)(runs.ui)
app.command(rich_help_panel=_SEE)(jobs.logs)
app.command(cls=LateHelp, rich_help_panel=_USE)(search.finish)
app.command(rich_help_panel=_USE)(models.evaluate)
app.command(rich_help_panel=_USE)(models.export)
app.command(rich_help_panel=_USE)(models.predict)
app.add_typer(data.app, rich_help_panel=_KEEP)
app.add_typer(cache.app, rich_help_panel=_KEEP)
app.add_typer(weights.app, rich_help_panel=_KEEP)
app.command(rich_help_panel=_KEEP)(doctor.doctor)
app.command(rich_help_panel=_KEEP)(jobs.submit)
app.command(rich_help_panel=_KEEP)(jobs.jobs)
app.command(rich_help_panel=_KEEP)(jobs.stop)


def main() -> None:
    """Run the command line; see `app` for the exit status."""
    treat_termination_as_interrupt()
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        _fail(error)


def _fail(error: Exception) -> None:
    from segadapt.platform.cli.tables import console
    from segadapt.platform.errors import UsageError, redacted

    screen = console(stderr=True)
    if isinstance(error, UsageError):
        screen.print(f"error: {redacted(error)}", markup=False, soft_wrap=True)
        sys.exit(error.exit_status)
    screen.print(f"error: {type(error).__name__}: {redacted(error)}", markup=False)
    where = traceback.extract_tb(error.__traceback__)[-1]
    screen.print(f"(raised at {where.filename}:{where.lineno}; --debug shows the whole traceback)", markup=False)
    sys.exit(1)
