"""The commands about datasets."""

import dataclasses
import json
import re
import sys
from typing import Annotated

import typer

from segadapt.platform.cli.inventories import show_dataset, show_recognised
from segadapt.platform.cli.next_steps import (
    after_data_check,
    after_data_make,
    after_data_pack,
    after_recognition,
    show_next,
)
from segadapt.platform.cli.options import AsJson, Assignments, LateHelp, assignments
from segadapt.platform.cli.tables import console, progress_bar
from segadapt.platform.settings.text import size_text

_SETTING = re.compile(r"\w+(\.\w+)+=|seed=")
"""How a word begins that is no path but a setting."""

app = typer.Typer(
    name="data", help="Datasets: write streets, check and pack what is on disk, look at samples.", no_args_is_help=True
)


@app.command(cls=LateHelp)
def make(
    folder: Annotated[str, typer.Argument(help="A new or empty folder.")],
    settings: Assignments = None,
    layout: Annotated[
        str, typer.Option("--format", help="Layout, and what of the images it holds: {written}.")
    ] = "folder",
) -> None:
    """Write the streets benchmark as files, in the layout for own data or exactly as a known dataset is stored.

    Example: segadapt data make town; segadapt search sdca data.source=folder:town/source data.target=folder:town/target
    """
    from segadapt.platform.api import data

    print(f"Wrote {data.data_make(folder, assignments(settings), layout=layout)}")
    show_next(after_data_make(folder, layout))


@app.command(cls=LateHelp)
def check(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[KIND] ROOT",
            help="{readable}, by default told from what is there; and its folder, of shards also a URI such as "
            "s3://bucket/path.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Decode every file of a dataset: what it holds, and all that is wrong. Of shards, the checksums are verified.

    Without KIND the layout is told from the folder. One that cannot be read as it is, as CamVid's or PASCAL VOC's, is
    described, and `segadapt data adopt` brings it into the layout of own data.

    Exit status: 0 no faults, though there may be warnings, 1 faults were found, or it must be adopted, 2 wrong usage.

    Examples: segadapt data check gta5 /data/GTA5; segadapt data check /data/camvid
    """
    from segadapt.platform.api import data
    from segadapt.platform.errors import UsageError

    if len(words) > 2:
        raise UsageError(f"A dataset must be [KIND] ROOT, but got {' '.join(words)}. Quote a path that has spaces.")
    root = words[-1]
    kind = words[0] if len(words) == 2 else "shards" if "://" in root else None
    if kind is None:
        recognised = data.data_recognise(root)
        kind = recognised.kind
        if kind is None:
            if as_json:
                print(json.dumps(dataclasses.asdict(recognised), default=str, indent=1))
            else:
                show_recognised(recognised, root)
                show_next(after_recognition(root))
            sys.exit(1)
    with progress_bar(f"{kind} {root}") as progress:
        report = data.data_check(kind, root, progress=progress)
    if as_json:
        print(json.dumps(dataclasses.asdict(report), indent=1))
    else:
        show_dataset(report)
        if any(split.images for split in report.splits.values()):
            show_next(after_data_check(kind, root))
    sys.exit(1 if report.faults else 0)


@app.command()
def adopt(
    root: Annotated[str, typer.Argument(help="Folder of the dataset.")],
    out: Annotated[str, typer.Argument(help="A new or empty folder.")],
) -> None:
    """Bring a dataset of a known layout into that of own data: links to its files, and the class list it proposes.

    Example: segadapt data adopt /data/camvid camvid
    """
    from segadapt.platform.api import data

    show_recognised(data.data_adopt(root, out), root)
    print(f"Wrote {out}: correct {out}/classes.yaml where names of classes are wrong.")
    show_next(after_data_pack("folder", out))


@app.command(cls=LateHelp)
def pack(
    kind: Annotated[str, typer.Argument(help="{kinds}.")],
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
    quality: Annotated[int | None, typer.Option(help="Quality of JPEG, 1 to 100; default: 95.")] = None,
) -> None:
    """Write a dataset as Parquet shards, which are read several times faster: data.source=shards:OUT.

    After an interruption the same command goes on with what is missing.

    Example: segadapt data pack cityscapes /data/cityscapes packed/cityscapes --size 512 1024 --format jpeg
    """
    from segadapt.platform.api import data

    with progress_bar(f"packing {root}") as progress:
        manifest = data.data_pack(
            kind, root, out, splits=split, size=size, image_format=image_format, quality=quality, progress=progress
        )
    held = ", ".join(f"{name} {counts['images']} images" for name, counts in manifest.splits.items())
    packed = size_text(sum(shard.bytes for shard in manifest.shards))
    console().print(f"{out}: {held}, {packed} in {len(manifest.shards)} shards", markup=False, soft_wrap=True)
    show_next(after_data_pack("shards", out))


@app.command(cls=LateHelp)
def show(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KIND ROOT] [PATH] [KEY=VALUE]...",
            help="A dataset, {readable}, and its folder; the PNG to write; or settings of `data`. Default: streets.",
        ),
    ] = None,
) -> None:
    """Write a contact sheet: images beside their labels, in the colours of their classes.

    Shown is one dataset, or both domains of a training: data.source=KIND:ROOT data.target=KIND:ROOT.

    Example: segadapt data show cityscapes /data/cityscapes sheet.png
    """
    from segadapt.platform.api import data
    from segadapt.platform.errors import UsageError
    from segadapt.trainables.core.data.datasets import READABLE

    settings = [word for word in words or [] if _SETTING.match(word)]
    others = [word for word in words or [] if word not in settings]
    if len(others) > 3 or (len(others) == 1 and others[0] in READABLE):
        raise UsageError(f"A dataset must be KIND ROOT, and a picture PATH may follow, but got {' '.join(others)}.")
    kind, root, path = (*others, None)[:3] if len(others) > 1 else (None, None, others[0] if others else None)
    print(f"Wrote {data.data_show(path, assignments(settings), kind=kind, root=root)}")
