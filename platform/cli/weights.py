"""The commands about pretrained weights."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from segadapt.platform.cli.options import AsJson, debug, folder, shared
from segadapt.platform.cli.tables import console

if TYPE_CHECKING:
    from segadapt.platform.storage.folders import Place

app = typer.Typer(
    name="weights", help="Pretrained weights in the storage folder, for nodes without internet.", no_args_is_help=True
)


@app.command()
@shared(place=folder, _debug=debug)
def fetch(
    place: "Place",
    _debug: bool,
    network: Annotated[str, typer.Argument(metavar="NAME", help="Value of network.name, such as timm:MODEL.")],
    weights: Annotated[
        str,
        typer.Argument(
            metavar="[FILE]", help="A .pth, .pt or .safetensors file, or torchvision's name; default: timm's weights."
        ),
    ] = "pretrained",
    licence: Annotated[
        str | None, typer.Option(help="Under which they are, such as apache-2.0; default: what timm or the hub says.")
    ] = None,
) -> None:
    """Put pretrained weights into the storage folder, where network.weights=pretrained finds them.

    Example: segadapt weights fetch timm:vit_small_patch14_dinov2
    """
    from segadapt.platform.api import weights as stored_weights
    from segadapt.platform.settings.text import size_text
    from segadapt.platform.storage.weights import licence_note

    stored = stored_weights.weights_fetch(network, weights, licence=licence, place=place)
    print(f"{stored.network}: {size_text(stored.bytes)} from {stored.source}")
    print(f"licence {stored.licence}, sha256 {stored.sha256}")
    if note := licence_note(stored.source, stored.licence):
        print(note)


@app.command("list")
@shared(place=folder)
def list_weights(place: "Place", as_json: AsJson = False) -> None:
    """List the pretrained weights in the storage folder: network, source, licence, size, hash, when they came."""
    from datetime import UTC, datetime

    from rich.table import Table

    from segadapt.platform.api import weights as stored_weights
    from segadapt.platform.settings.text import size_text

    entries = stored_weights.weights_list(place=place)
    if as_json:
        print(json.dumps([dataclasses.asdict(stored) for stored in entries], indent=1))
        return
    table = Table(box=None)
    for column in ("network", "licence", "size", "sha256", "stored", "source"):
        table.add_column(column, overflow="fold")
    for stored in entries:
        day = datetime.fromtimestamp(stored.stored, UTC).date().isoformat()
        table.add_row(stored.network, stored.licence, size_text(stored.bytes), stored.sha256[:12], day, stored.source)
    console().print(table)
