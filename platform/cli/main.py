"""The commands by name, and what becomes of errors."""

import sys
import traceback

import typer

from segadapt.platform.cli import cache, data, doctor, jobs, models, runs, search
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
app.add_typer(data.app)
app.add_typer(cache.app)
app.command("list")(runs.list_methods)
app.command()(runs.describe)
app.command(cls=LateHelp)(search.search)
app.command(cls=LateHelp)(search.train)
app.command()(runs.runs)
app.command()(runs.status)
app.command()(runs.report)
app.command()(runs.ui)
app.command()(search.finish)
app.command()(models.evaluate)
app.command()(models.export)
app.command()(models.predict)
app.command()(jobs.submit)
app.command()(jobs.jobs)
app.command()(jobs.logs)
app.command()(jobs.stop)
app.command()(doctor.doctor)


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
