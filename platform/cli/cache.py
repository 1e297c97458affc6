"""The commands about the stage cache."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from segadapt.platform.cli.inventories import show_cache, show_pruned
from segadapt.platform.cli.options import AsJson, folder, shared

if TYPE_CHECKING:
    from segadapt.platform.storage.folders import Place

app = typer.Typer(
    name="cache", help="The stage cache: stages that all searches in a storage folder share.", no_args_is_help=True
)


@app.command("list")
@shared(place=folder)
def list_stages(place: "Place", as_json: AsJson = False) -> None:
    """List the shared stages: what each is, its size, when it was last used and which experiments need it."""
    from segadapt.platform.api import operation

    content = operation.cache_list(place=place)
    if as_json:
        print(json.dumps(dataclasses.asdict(content), indent=1))
    else:
        show_cache(content, place)


@app.command()
@shared(place=folder)
def prune(
    place: "Place",
    older_than: Annotated[
        float | None, typer.Option(metavar="DAYS", help="Remove stages that were not used for so long.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all stages.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed; touch nothing.")] = False,
) -> None:
    """Remove shared stages that no unfinished experiment needs, and what dead processes left.

    Example: segadapt cache prune --older-than 30
    """
    from segadapt.platform.api import operation

    pruned = operation.cache_prune(older_than_days=older_than, everything=everything, dry_run=dry_run, place=place)
    show_pruned(pruned, dry_run=dry_run)
