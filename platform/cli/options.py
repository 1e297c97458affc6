"""The options that commands share, each declared once.

`shared` gives a command the options of a group; the command receives what the group makes of them.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperArgument, TyperCommand, TyperOption

if TYPE_CHECKING:
    from segadapt.platform.api.training import Running
    from segadapt.platform.storage.folders import Place

RARE = "In rare cases"
"""Panel of the options that `--help` leaves out and `--help-all` shows."""

JOBS = "http://127.0.0.1:8265"
"""Ray's dashboard on a cluster's head, by way of a tunnel."""

_Storage = Annotated[str, typer.Option(help="Folder that keeps everything; all nodes must see it.")]
_StudyUri = Annotated[
    str | None,
    typer.Option(
        help="Optuna storage, e.g. postgresql+psycopg://...; default: a file in --storage.", rich_help_panel=RARE
    ),
]
_TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow server; default: a database in the storage folder.", rich_help_panel=RARE)
]
_Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster to join, from one of its machines: auto or HOST:PORT; http://HOST:PORT submits this command "
        "to it as `segadapt submit` does and follows it. Default: start Ray here.",
        rich_help_panel=RARE,
    ),
]
_Launcher = Annotated[
    str,
    typer.Option(
        help="auto, train (Ray Train's TorchTrainer) or inprocess (the trial's own process).", rich_help_panel=RARE
    ),
]
_Workers = Annotated[
    int, typer.Option("--workers-per-trial", help="Data-parallel workers of each trial.", rich_help_panel=RARE)
]
_Gpus = Annotated[
    float | None, typer.Option("--gpus-per-trial", help="GPUs of each worker; default: 1 if any.", rich_help_panel=RARE)
]
_MaxFailures = Annotated[
    int,
    typer.Option(help="Start a trial again so often when its process or node dies, or it hangs.", rich_help_panel=RARE),
]
_TrialTimeout = Annotated[
    float,
    typer.Option(
        metavar="SECONDS", help="A trial that reports nothing for so long hangs: start it again.", rich_help_panel=RARE
    ),
]
_HelpAll = Annotated[
    bool,
    typer.Option(
        "--help-all",
        is_eager=True,
        callback=lambda context, value: _show_all_help(context) if value else None,
        help="Show all options: clusters, GPUs, samplers, schedulers, servers, faults.",
    ),
]
_Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress, only what came out.")]
_Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and what workers print.", rich_help_panel=RARE)]

Assignments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings; `segadapt describe METHOD` lists keys, defaults, ranges."),
]
JobsAddress = Annotated[str, typer.Option(help="Ray's dashboard on the cluster's head, through a tunnel.")]
Preset = Annotated[
    str | None, typer.Option(help="Where to start from; `segadapt describe METHOD` shows the presets. Default: paper.")
]
SkipBad = Annotated[
    bool,
    typer.Option(
        "--skip-bad", help="Leave out files that cannot be decoded; data.skip_bad=true.", rich_help_panel=RARE
    ),
]
ConfigFile = Annotated[str | None, typer.Option("--config", help="YAML experiment file; KEY=VALUE overrides it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Search = Annotated[str, typer.Option("--search", help="The search that holds the run.")]
TrialOrFinish = Annotated[
    str, typer.Argument(help="`best`, or the name or id of a trial or finish in the search.", metavar="RUN")
]


_ALL = "segadapt.help_all"
"""Key in a context that asks for all help."""


class LateHelp(TyperCommand):
    """A command whose help names what the code knows, which takes seconds to import: when help is asked for.

    `{kinds}` in the help of a parameter stands for the kinds of datasets, and so on, as `_known` says. Options of rare
    cases are left out unless all are asked for.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Fill in the names, then show the help."""
        names = _known()
        for parameter in self.params:
            if isinstance(parameter, TyperArgument | TyperOption) and parameter.help:
                parameter.help = parameter.help.format_map(names)
            if isinstance(parameter, TyperOption) and parameter.rich_help_panel == RARE:
                parameter.hidden = _ALL not in ctx.meta
        super().format_help(ctx, formatter)


def _show_all_help(context: typer.Context) -> None:
    """Show the help of a command with the options of rare cases, and end it."""
    context.meta[_ALL] = True
    context.get_help()  # which prints it
    raise typer.Exit


def _known() -> dict[str, str]:
    """Return the names that help texts list."""
    from segadapt.platform.search.samplers import SAMPLERS
    from segadapt.platform.search.schedulers import SCHEDULERS
    from segadapt.platform.settings.objective import COSTS, LABEL_FREE
    from segadapt.trainables.core.data.datasets import KINDS

    return {
        "kinds": _alternatives(KINDS),
        "readable": _alternatives([*KINDS, "shards"]),
        "written": ", ".join(f"{name} ({kind.written})" for name, kind in KINDS.items()),
        "samplers": _alternatives(SAMPLERS),
        "schedulers": _alternatives(SCHEDULERS),
        "label_free": _alternatives(LABEL_FREE),
        "costs": _alternatives(COSTS),
    }


def _alternatives(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


Command = TypeVar("Command", bound=Callable[..., None])


def shared(**groups: Callable[..., Any]) -> Callable[[Command], Command]:
    """Give a command the options of some groups.

    Args:
        groups: By the name of the command's parameter, the function that makes its value; the function's parameters are
            the options.

    Raises:
        TypeError: If the command has no such parameter, or two of its options have one name.
    """

    def decorate(command: Command) -> Command:
        parameters = inspect.signature(command).parameters
        options_of = {name: list(inspect.signature(group).parameters.values()) for name, group in groups.items()}
        entries = [entry for entry in parameters.values() if entry.name not in groups]
        entries += [entry for options in options_of.values() for entry in options]
        names = [entry.name for entry in entries]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or not groups.keys() <= parameters.keys():
            raise TypeError(
                f"{command.__name__} must have the parameters {', '.join(groups)} and each option once, but has "
                f"{', '.join(parameters)} and twice {', '.join(twice) or 'none'}."
            )

        @functools.wraps(command)
        def call(**values: Any) -> None:
            for name, group in groups.items():
                values[name] = group(**{entry.name: values.pop(entry.name) for entry in options_of[name]})
            command(**values)

        call.__signature__ = inspect.Signature(entries)  # type: ignore[attr-defined]
        call.__annotations__ = {entry.name: entry.annotation for entry in entries}
        return call  # type: ignore[return-value]  # called by name, as typer does

    return decorate


def place(storage: _Storage = "runs", study_uri: _StudyUri = None, tracking_uri: _TrackingUri = None) -> "Place":
    """Return where experiments are kept and tracked."""
    from segadapt.platform.storage.folders import Place

    return Place(storage, tracking_uri, study_uri)


def tracked_place(storage: _Storage = "runs", tracking_uri: _TrackingUri = None) -> "Place":
    """Return where experiments are kept and tracked, for commands that ask no study."""
    return place(storage, None, tracking_uri)


def folder(storage: _Storage = "runs") -> "Place":
    """Return where experiments are kept, for commands that ask no server."""
    return place(storage)


def running(
    address: _Address = None,
    launcher: _Launcher = "auto",
    workers: _Workers = 1,
    gpus: _Gpus = None,
    max_failures: _MaxFailures = 2,
    trial_timeout: _TrialTimeout = 7200.0,
    quiet: _Quiet = False,
    debug: _Debug = False,
    help_all: _HelpAll = False,
) -> "Running":
    """Return how an experiment runs; `help_all` has ended the command before."""
    from segadapt.platform.cli.tables import console
    from segadapt.platform.settings.resources import Resources, Tolerance

    return {
        "address": address,
        "resources": Resources(workers, gpus, launcher),  # type: ignore[arg-type]  # it looks at the launcher
        "tolerance": Tolerance(max_failures, trial_timeout),
        "debug": debug,
        "say": lambda text: None if quiet else console().print(text, markup=False),
        "quiet": quiet,
    }


def debug(debug: _Debug = False) -> bool:
    """Return whether tracebacks are shown, which `main` sees to."""
    return debug


def refuse_idle(context: typer.Context, *options: str, why: str) -> None:
    """Refuse options that this command line holds and that cannot act in it.

    Raises:
        UsageError: If there are any; `why` tells what they are for.
    """
    from segadapt.platform.errors import UsageError

    typed = [
        option
        for parameter in context.command.params
        for option in parameter.opts
        if option in options and getattr(context.get_parameter_source(str(parameter.name)), "name", "") == "COMMANDLINE"
    ]
    if typed:
        raise UsageError(f"{', '.join(options)} {why}, but got {' '.join(typed)}. Leave it out.")


def scales(options: list[str] | None, words: list[str]) -> list[float]:
    """Return the scales of `--scales 0.75 1.0` or `--scales 0.75,1.0`; an option takes the first word alone."""
    from segadapt.platform.errors import UsageError

    parts = [part for option in options or [] for part in option.replace(",", " ").split()]
    wrong = [part for part in parts if not is_number(part)] if options else words
    if wrong:
        raise UsageError(
            f"Numbers must follow --scales, and only numbers, but got {' '.join(wrong)}. Example: --scales 0.75 1 1.25"
        )
    return [float(part) for part in [*parts, *words]] or [1.0]


def is_number(text: str) -> bool:
    """Return whether a word is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def assignments(words: list[str] | None) -> dict[str, Any]:
    """Return the settings that KEY=VALUE words name."""
    from segadapt.platform.settings.config import parse_assignments

    return parse_assignments(words or [])
