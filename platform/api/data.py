"""Datasets: write streets, check and pack what is on disk, look at samples."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from segadapt.platform.errors import UsageError, check_no_password
from segadapt.platform.settings.config import Values, resolve
from segadapt.platform.storage.folders import user_path

if TYPE_CHECKING:
    from segadapt.trainables.core.data.checking import DatasetReport
    from segadapt.trainables.core.data.readers.shard_format import Manifest
    from segadapt.trainables.core.data.recognition import Recognised


def data_make(folder: str, values: Values, *, layout: str = "folder") -> Path:
    """Write the streets benchmark in the layout of a kind of dataset.

    Args:
        folder: A new or empty folder.
        values: Settings of `data.streets`, by dotted key.
        layout: `folder` writes both domains, in the layout for own data. `gta5` and `synthia` write the source's
            training set, `cityscapes` the target, exactly as those datasets are stored.

    Returns:
        The folder that was written.

    Raises:
        UsageError: If the folder holds something already, or a setting or the layout is not known.

    Example:
        >>> import segadapt
        >>> small = {"data.streets.train_images": 4, "data.streets.val_images": 2}
        >>> sorted(path.name for path in segadapt.data_make("town", small).iterdir())
        ['source', 'target']
    """
    from segadapt.trainables.core.data.datasets import KINDS
    from segadapt.trainables.core.data.streets import labelled_streets

    if layout not in KINDS:
        raise UsageError(f"--format must be one of {', '.join(KINDS)}, but got {layout!r}.")
    config = resolve("source_only", values)
    root = user_path("FOLDER", folder)
    _check_new(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as temporary:
        whole = Path(temporary) / "whole"
        KINDS[layout].write(whole, labelled_streets(config.data.streets))
        _put(whole, root)
    return root


def data_check(
    kind: str, root: str, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> "DatasetReport":
    """Decode every file of a dataset and report what it holds and all that is wrong.

    Args:
        kind: gta5, synthia, cityscapes, folder or shards.
        root: Folder of the dataset, or the URI of packed shards.
        progress: Called with the number of images just done and of all.

    Returns:
        The report: images, labels, sizes as (H, W) and pixels of each class, by split; notes; warnings of labels that
        look wrong; and all faults.

    Raises:
        UsageError: If there is no such kind or folder, or its class list cannot be read.

    Example:
        >>> import segadapt
        >>> report = segadapt.data_check("folder", "town/source")
        >>> report.splits["train"].images, report.faults
        (4, ())
    """
    from segadapt.trainables.core.data.checking import check_dataset

    try:
        return check_dataset(kind, _root(root), progress)
    except ValueError as error:
        raise UsageError(str(error)) from error


def data_recognise(root: str) -> "Recognised":
    """Tell which dataset a folder holds, from its names and a few labels.

    Args:
        root: The folder.

    Returns:
        The layout; the kind that reads it as it is, or None if `data_adopt` has to bring it into that of own data; of
        the latter images and labels by split, classes, and what is missing.

    Raises:
        UsageError: If there is no such folder, or its layout is not known.

    Example:
        >>> import segadapt
        >>> segadapt.data_recognise("town/source").kind
        'folder'
    """
    from segadapt.trainables.core.data.recognition import recognise

    try:
        return recognise(Path(_root(root)))
    except ValueError as error:
        raise UsageError(str(error)) from error


def data_adopt(root: str, out: str) -> "Recognised":
    """Write a folder of own data that links to another dataset's images and labels, with the class list it proposes.

    Args:
        root: Folder of the dataset.
        out: A new or empty folder.

    Returns:
        What `data_recognise` tells of the dataset.

    Raises:
        UsageError: If its layout is not known or can be read as it is, or the folder to write is not empty.

    Example:
        >>> import segadapt
        >>> segadapt.data_adopt("town/source", "adopted")
        Traceback (most recent call last):
        ...
        segadapt.platform.errors.UsageError: A dataset to adopt must be of a layout that has no reader, but ...
    """
    from segadapt.trainables.core.data.recognition import adopt

    target = user_path("OUT", out)
    _check_new(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        whole = Path(temporary) / "whole"
        try:
            recognised = adopt(Path(_root(root)), whole)
        except ValueError as error:
            raise UsageError(str(error)) from error
        _put(whole, target)
    return recognised


def _check_new(root: Path) -> None:
    """Refuse a folder to write that holds something.

    Raises:
        UsageError: If it does.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UsageError(f"The folder to write must be new or empty, but {root} is not. Choose another.")


def _put(whole: Path, root: Path) -> None:
    """Put a folder that was written whole where it is to be.

    Raises:
        UsageError: If another command was there first.
    """
    try:
        whole.rename(root)
    except OSError as error:
        raise UsageError(
            f"The folder to write must be new or empty, but {root} was written by another command meanwhile. "
            "Choose another."
        ) from error


def data_pack(
    kind: str,
    root: str,
    out: str,
    *,
    splits: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    image_format: str = "png",
    quality: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> "Manifest":
    """Write a dataset as Parquet shards, which are read several times faster; go on if it was interrupted.

    Args:
        kind: gta5, synthia, cityscapes or folder.
        root: Folder of the dataset.
        out: A new or empty folder, or one in which the same was packed before.
        splits: Splits to pack, train or val; None packs all.
        size: (H, W) the training split is resized to. The validation split keeps its size, and scores their meaning.
        image_format: png, without loss, or jpeg.
        quality: Quality of JPEG, 1 to 100, by default 95.
        progress: Called with the number of images just done and of all.

    Returns:
        The manifest of the shards, which is also written.

    Raises:
        UsageError: If there is no such dataset, a file of it is broken, the folder holds something else, or a size or
            quality is given that could not act.

    Example:
        >>> import segadapt
        >>> manifest = segadapt.data_pack("folder", "town/source", "packed", size=(32, 64))
        >>> {name: split["images"] for name, split in manifest.splits.items()}
        {'train': 4, 'val': 2}
    """
    from segadapt.trainables.core.data.datasets import KINDS, open_dataset
    from segadapt.trainables.core.data.packing import PackConfig, pack

    if kind not in KINDS:
        raise UsageError(f"The kind of a dataset to pack must be one of {', '.join(KINDS)}, but got {kind!r}.")
    if quality is not None and image_format == "png":
        raise UsageError(f"--quality must come with --format jpeg, but got --quality {quality} for PNG. Leave it out.")
    if size is not None and splits is not None and "train" not in splits:
        raise UsageError(
            f"--size resizes the split train alone, but got --size {size[0]} {size[1]} for {', '.join(splits)}. "
            "Leave it out."
        )
    out_folder = user_path("OUT", out)
    try:
        config = PackConfig(size, image_format, 95 if quality is None else quality)  # type: ignore[arg-type]  # checked
        return pack(open_dataset(kind, _root(root)), out_folder, config, splits=splits, progress=progress)
    except ValueError as error:
        raise UsageError(str(error)) from error


def data_show(
    path: str | None = None, values: Values | None = None, *, kind: str | None = None, root: str | None = None
) -> Path:
    """Write a contact sheet of datasets: images beside their labels, in the colours of their classes.

    Args:
        path: The PNG to write, in a folder that exists; None: a name after what is shown, here.
        values: Settings of `data`, by dotted key: both domains are shown, of streets or of `data.source` and
            `data.target`. Of each, the validation images where there are any.
        kind: Shows this dataset alone, all its splits: gta5, synthia, cityscapes, folder or shards.
        root: Folder of that dataset, or the URI of packed shards.

    Returns:
        The path that was written.

    Raises:
        UsageError: If the folder does not exist, a setting is not known, or there is no such dataset or no image in it.

    Example:
        >>> import segadapt
        >>> segadapt.data_show("sheet.png", {"data.streets.height": 32, "data.streets.width": 64}).stat().st_size > 1000
        True
    """
    from segadapt.trainables.core.data.sheet import contact_sheet, panels_of_config, panels_of_dataset

    config = resolve("source_only", values or {}).data
    if (kind is None) != (root is None) or (kind is not None and values):
        raise UsageError(
            "What is shown must be named by KIND and ROOT or by KEY=VALUE, but got "
            f"{' '.join(filter(None, (kind, root, *(values or {}))))}."
        )
    target = user_path("PATH", f"{kind or config.name}.png" if path is None else path)
    if not target.parent.is_dir():
        raise UsageError(f"The folder of the picture must exist, but {target.parent} does not. Make it first.")
    if target.is_dir():
        raise UsageError(f"The picture must be a new file or replace one, but {target} is a folder. Name a PNG.")
    try:
        panels = panels_of_config(config) if kind is None or root is None else panels_of_dataset(kind, root)
    except ValueError as error:
        raise UsageError(str(error)) from error
    contact_sheet(panels, target)
    return target


def _root(root: str) -> str:
    """Return the root of a dataset: a folder, or an address as it stands.

    Raises:
        UsageError: If it is empty, or an address that holds a password.
    """
    check_no_password("ROOT", root)
    return root if "://" in root else str(user_path("ROOT", root))
