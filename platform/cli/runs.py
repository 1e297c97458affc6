"""The commands that show: methods and settings, leaderboard, status, report, MLflow's pages."""

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from segadapt.platform.cli.inventories import show_settings
from segadapt.platform.cli.next_steps import (
    after_describe,
    after_list,
    after_report,
    after_runs,
    after_status,
    show_next,
)
from segadapt.platform.cli.options import AsJson, Assignments, assignments, folder, place, shared, tracked_place
from segadapt.platform.cli.tables import show_leaderboard, show_selection, show_status

if TYPE_CHECKING:
    from segadapt.platform.storage.folders import Place

_WATCH_S = 5.0
"""Seconds between two looks of `status --watch`."""

_SearchOrRun = Annotated[str, typer.Argument(metavar="SEARCH", help="Name of a search or single run.")]
_SearchName = Annotated[str, typer.Argument(metavar="SEARCH", help="Name of a search.")]


def list_methods() -> None:
    """List the methods."""
    from segadapt.platform.api import methods

    for name, description in methods.list_methods():
        print(f"{name:16} {description}")
    show_next(after_list())


def describe(
    method: Annotated[str, typer.Argument(help="A name shown by `segadapt list`.")], settings: Assignments = None
) -> None:
    """List a method's settings as KEY=VALUE with their defaults: first those that a search varies, then the others.

    With settings, it also tells the network's size.
    """
    from segadapt.platform.api import methods

    show_settings(methods.describe(method))
    if settings:
        size = methods.network_size(method, assignments(settings))
        share = f"{100 * size.trained_share:.3g} %"
        print(f"{size.name}: {size.parameters:,} parameters, of which {size.trained:,} are trained ({share})")
        if size.weights is not None:
            print(f"It starts from the weights of {size.weights}, licence {size.licence}.")
    show_next(after_describe(method))


@shared(place=tracked_place)
def runs(
    place: "Place",
    search_name: _SearchOrRun,
    selection: Annotated[
        bool, typer.Option("--selection", help="Also show what each label-free score would have chosen and lost.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the leaderboard of a search."""
    from segadapt.platform.api import results

    board = results.runs(search_name, selection=selection, place=place)
    if as_json:
        print(json.dumps(dataclasses.asdict(board), default=dict, indent=1))
    else:
        show_leaderboard(board)
        if selection:
            show_selection(board)
        show_next(after_runs(board, place))


@shared(place=place)
def status(
    place: "Place",
    search_name: _SearchName,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew every few seconds until it ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show how a search stands: trials by state, best, rungs, failures, time left. Runs on any machine that sees it."""
    import time

    from segadapt.platform.api import results

    while True:
        standing = results.status(search_name, place=place)
        if as_json:
            print(json.dumps(dataclasses.asdict(standing), default=dict))
        else:
            show_status(standing, clear=watch)
        if not watch or standing.state != "running":
            break
        time.sleep(_WATCH_S)
    if not as_json:
        show_next(after_status(standing, place))


@shared(place=place)
def report(
    place: "Place",
    search_name: _SearchName,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="HTML file to write; default: SEARCH.html.")] = None,
) -> None:
    """Write a search as one HTML page that needs no network: results, how sure they are, cost, what to do next."""
    from segadapt.platform.api import results

    print(f"Wrote {results.report(search_name, out, place=place)}")
    show_next(after_report(search_name, place))


@shared(place=folder)
def ui(
    place: "Place",
    search_name: Annotated[
        str | None, typer.Argument(metavar="[SEARCH]", help="Print the page of this search; default: of the newest.")
    ] = None,
    port: Annotated[int, typer.Option(help="On 127.0.0.1.", min=1, max=65535)] = 5000,
) -> None:
    """Serve MLflow in the browser on this storage, bound to 127.0.0.1, and print where its searches are.

    Example: segadapt ui sdca-streets
    """
    from segadapt.platform.api import operation

    sys.exit(operation.ui(search_name, place=place, port=port))
