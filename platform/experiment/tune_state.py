"""What Tune saves of an experiment, kept a second time, whole.

Tune writes its files into a folder of its own and copies them one by one over those in storage: a kill, or a disk that
is full, leaves some of them cut short. One archive of them, replaced in one step, is never in part.
"""

import contextlib
import importlib.util
import json
import logging
import pickletools
import re
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from segadapt.platform.errors import UsageError
from segadapt.platform.storage.checkpoints import REMOVED, TRAIN_FOLDER
from segadapt.platform.storage.files import write_whole, written_whole
from segadapt.platform.storage.folders import Storage

logger = logging.getLogger(__name__)

ARCHIVE = "tune_state.zip"
"""File in an experiment's folder."""

TUNER = "tuner.pkl"
"""What Tune writes once, before the first trial: with it, an experiment was begun."""

_EVERY_S = 1.0
"""Between two looks at whether Tune has saved, which it does no more often."""

_NAME = re.compile(
    r"(experiment_state|callback-states|searcher-state|search_gen_state|basic-variant-state)-"
    r"(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)\.(?:json|pkl)"
)

_TEXTS = ("experiment_state", "searcher-state")
"""Kinds that are JSON; the others are pickles, which are looked at but never loaded here."""

_EVENTS = "events_of_session"
"""What stands for the events of an experiment in Tune's pickle; earlier versions had pickled the events themselves."""

_MODULE = re.compile(r"segadapt\.(?:platform|trainables|search_spaces)(?:\.[a-z_]+)+")

_ALWAYS = {"experiment_state", "callback-states"}

_REACHED = ("*/checkpoint_*", f"{TRAIN_FOLDER}/*/checkpoint_*", f"{REMOVED}/*.json")
"""What trials leave that have got anywhere."""


@dataclass(frozen=True)
class _File:
    path: Path
    kind: str
    session: str
    """When the command began that wrote it."""

    @property
    def is_whole(self) -> bool:
        return _is_json(self.path) if self.kind in _TEXTS else _is_pickle(self.path)


class StateArchive:
    """The state that Tune last saved, kept a second time; lives in the driver.

    Args:
        folder: Folder of the experiment.
    """

    def __init__(self, folder: Path) -> None:
        self._archive = folder / ARCHIVE
        self._kept: int | None = None
        self._next = 0.0

    def keep(self, staging: Path, *, at_once: bool = False) -> None:
        """Archive Tune's files, if it has written them since; call between two of its writes.

        Args:
            staging: Tune's own folder, where it writes them before it copies them; it also has one of each trial there.
            at_once: Look now, rather than once a second.
        """
        now = time.monotonic()
        if now < self._next and not at_once:
            return
        self._next = now + _EVERY_S
        files = _newest(_files(staging))
        written = max((file.path.stat().st_mtime_ns for file in files), default=None)
        if written is None or written == self._kept:
            return
        try:
            with written_whole(self._archive) as partial, zipfile.ZipFile(partial, "w") as archive:
                for file in files:
                    archive.write(file.path, file.path.name)
            self._kept = written
        except OSError as error:  # tried again soon: storage that is away for a while ends no search
            logger.warning("Tune's state is not kept in %s: %s", self._archive, error)


def is_begun(folder: Path) -> bool:
    """Return whether Tune has saved what an experiment goes on from; without it, the experiment begins anew."""
    return (folder / TUNER).is_file() and bool(_files(folder))


def damaged(folder: Path) -> list[str]:
    """Return what of Tune's newest state in an experiment's folder is missing or cut short; nothing is unpickled."""
    files = _files(folder)
    newest = _newest(files)
    if not newest:
        return []
    missing = ({file.kind for file in files} | _ALWAYS) - {file.kind for file in newest}
    cut_short = [file.path.name for file in newest if not file.is_whole]
    return [f"{kind} (missing)" for kind in sorted(missing)] + sorted(cut_short)


def mend(folder: Path) -> str | None:
    """Make good what a kill left of Tune's files in an experiment's folder, so that Tune can go on.

    The archived state takes the place of a damaged one. Without an archive, an experiment whose trials left no
    checkpoint is begun anew.

    Returns:
        What was done, for the user; None if there was nothing to do.

    Raises:
        UsageError: If trials left checkpoints, but Tune's state is damaged and there is no archive of it.
    """
    tuner = folder / TUNER
    if not tuner.is_file():
        return None
    faults = damaged(folder)
    if not _is_pickle(tuner):
        faults.append(TUNER)
    elif archived := _archived(folder) if faults else {}:
        saved = _put_back(folder, archived)
        return f"A kill cut Tune's files short ({', '.join(faults)}): going on from what it saved before, {saved}."
    if not faults and _files(folder):
        return None
    names = ", ".join(faults) or "experiment_state"
    if any(any(folder.glob(pattern)) for pattern in _REACHED):
        raise UsageError(
            f"Tune's state of an experiment must be whole to go on, but {names} in {folder} is cut short or missing, "
            f"and there is no whole {ARCHIVE}. Put back a copy of these files, or begin anew under another name (a "
            "search with `--warm-start`, which counts the trials of this one)."
        )
    for path in (*(file.path for file in _files(folder)), tuner):
        path.unlink()
    return f"A kill cut Tune's files short ({names}) before a trial had a checkpoint: beginning anew."


def of_another_version(storage: Storage, name: str) -> str | None:
    """Return why an experiment cannot go on whose saved state another version of segadapt wrote; None if it can.

    Tune's pickles name the modules of segadapt that they are made of: they are compared with those that there are, and
    nothing is unpickled.
    """
    folders = (storage.experiment(name), *storage.experiments.glob(f"{name}.stages-*"))
    folders += tuple(storage.experiments.glob(f"{name}.rerank-*"))
    if all(_is_readable(folder / TUNER) for folder in folders):
        return None
    return (
        f"{name!r} was begun by another version of segadapt, which saved its state in a form that this one cannot "
        "read: go on with it by that version, or begin anew under another name (a search with `--warm-start "
        f"{name}`, which counts the trials of this one)."
    )


def _is_readable(tuner: Path) -> bool:
    """Return whether a pickle of Tune's is of this version; one that is missing or cut short is `mend`'s."""
    try:
        with tuner.open("rb") as file:
            texts = {text for _, text, _ in pickletools.genops(file) if isinstance(text, str)}
    except (OSError, ValueError):
        return True
    modules = {text for text in texts if _MODULE.fullmatch(text)}
    return _EVENTS in texts and all(map(_is_module, modules))


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _files(folder: Path) -> list[_File]:
    named = [(path, _NAME.fullmatch(path.name)) for path in sorted(folder.glob("*-*"))]
    return [_File(path, name[1], name[2]) for path, name in named if name is not None]


def _newest(files: list[_File]) -> list[_File]:
    """Return the files of the newest session; Tune takes the newest file of each kind."""
    newest = max((file.session for file in files), default=None)
    return [file for file in files if file.session == newest]


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def _is_pickle(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            for _ in pickletools.genops(file):
                pass
    except ValueError:
        return False
    return True


def _archived(folder: Path) -> dict[str, bytes]:
    """Return the archived files by name; none if there is no archive, or it is damaged itself."""
    with contextlib.suppress(FileNotFoundError, zipfile.BadZipFile), zipfile.ZipFile(folder / ARCHIVE) as archive:
        return {name: archive.read(name) for name in archive.namelist() if _NAME.fullmatch(name)}
    return {}


def _put_back(folder: Path, archived: dict[str, bytes]) -> str:
    """Write archived files, each whole or not at all, and set those of later sessions aside; returns their time."""
    for name, content in archived.items():
        write_whole(folder / name, content)
    session = next(file.session for file in _files(folder) if file.path.name in archived)
    for file in _files(folder):
        if file.session > session:
            file.path.rename(file.path.with_name(f"broken_{file.path.name}"))
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((folder / ARCHIVE).stat().st_mtime))
