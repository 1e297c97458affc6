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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from segadapt.platform.errors import UsageError
from segadapt.platform.ray_internals.trials import HASHES
from segadapt.platform.storage.checkpoints import REMOVED, TRAIN_FOLDER
from segadapt.platform.storage.files import write_whole, written_whole
from segadapt.platform.storage.folders import Storage
from segadapt.trainables.core.training.checkpoint import file_hash

logger = logging.getLogger(__name__)

ARCHIVE = "tune_state.zip"
"""File in an experiment's folder."""

TUNER = "tuner.pkl"
"""What Tune writes once, before the first trial: with it, an experiment was begun."""

_TUNER_HASH = f"{TUNER}.sha256"

_EVERY_S = 1.0
"""Between two looks at whether Tune has saved, which it does no more often."""

_NAME = re.compile(
    r"(experiment_state|callback-states|searcher-state|search_gen_state|basic-variant-state)-"
    r"(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d|session-\d{6})\.(?:json|pkl)"
)
"""Earlier versions let Tune name a session by its local time; those names come before these."""

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
    """Which command wrote it; of two, the later one comes after the other."""

    def is_whole(self, hashes: Mapping[str, str]) -> bool:
        """Return whether it is as it was written; without its hash, whether it ends as it must.

        Args:
            hashes: By name; earlier versions noted none.
        """
        if (expected := hashes.get(self.path.name)) is not None:
            return file_hash(self.path) == expected
        return _is_json(self.path) if self.kind in _TEXTS else _is_pickle(self.path)


def next_session(folder: Path) -> str:
    """Return the name of the session of a command that goes on with an experiment, or begins it.

    Sessions are counted, and no clock decides which was the last.
    """
    numbers = [int(file.session.removeprefix("session-")) for file in _files(folder) if "session-" in file.session]
    return f"session-{max(numbers, default=0) + 1:06d}"


class StateArchive:
    """The state that Tune last saved, kept a second time; lives in the driver.

    Args:
        folder: Folder of the experiment.
    """

    def __init__(self, folder: Path) -> None:
        self._archive = folder / ARCHIVE
        self._tuner = folder / TUNER
        self._kept: list[int] = []
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
        written = [file.path.stat().st_mtime_ns for file in files]
        if written == self._kept:  # nothing is written anew; which time is later says nothing
            return
        try:
            with written_whole(self._archive) as partial, zipfile.ZipFile(partial, "w") as archive:
                for path in (*(file.path for file in files), staging / HASHES, self._tuner):
                    if path.is_file():  # where Tune saves at its own pace, there are no hashes
                        archive.write(path, path.name)
            self._kept = written
        except OSError as error:  # tried again soon: storage that is away for a while ends no search
            logger.warning("Tune's state is not kept in %s: %s", self._archive, error)


def is_begun(folder: Path) -> bool:
    """Return whether Tune has saved what an experiment goes on from; without it, the experiment begins anew."""
    return bool(_files(folder)) or _has_trials(folder)


def damaged(folder: Path) -> list[str]:
    """Return what of Tune's newest state in an experiment's folder is missing or damaged; nothing is unpickled."""
    files, tuner = _files(folder), folder / TUNER
    newest, hashes = _newest(files), _hashes(folder)
    faults = []
    if newest:
        noted = {name[1] for name in map(_NAME.fullmatch, hashes) if name and name[2] == newest[0].session}
        missing = ({file.kind for file in files} | noted | _ALWAYS) - {file.kind for file in newest}
        faults = [f"{kind} (missing)" for kind in sorted(missing)]
        faults += sorted(file.path.name for file in newest if not file.is_whole(hashes))
    elif _has_trials(folder):
        faults = ["experiment_state (missing)"]
    if tuner.is_file():
        return faults if _is_tuner(tuner) else [*faults, TUNER]
    return [*faults, f"{TUNER} (missing)"] if faults or newest else []


def mend(folder: Path) -> str | None:
    """Make good what a kill left of Tune's files in an experiment's folder, so that Tune can go on.

    The archived state takes the place of a damaged one. Without an archive, an experiment whose trials left no
    checkpoint is begun anew.

    Returns:
        What was done, for the user; None if there was nothing to do.

    Raises:
        UsageError: If trials left checkpoints, but Tune's state is damaged and there is no archive of it.
    """
    faults = damaged(folder)
    if not faults and not (folder / TUNER).is_file():
        return None
    for path in folder.glob("*/error.pkl"):
        path.unlink()  # Tune would load it, damaged or not, for errors that nobody asks it for; error.txt says the same
    archived = _archived(folder) if faults else {}
    if archived and (TUNER in archived or not any(fault.startswith(TUNER) for fault in faults)):
        saved = _put_back(folder, archived)
        return f"Tune's files are damaged ({', '.join(faults)}): going on from what it saved before, {saved}."
    if not faults and _files(folder):
        return None
    names = ", ".join(faults) or "experiment_state"
    if _has_trials(folder):
        raise UsageError(
            f"Tune's state of an experiment must be whole to go on, but {names} in {folder} is damaged or missing, "
            f"and there is no whole {ARCHIVE}. Put back a copy of these files, or begin anew under another name (a "
            "search with `--warm-start`, which counts the trials of this one)."
        )
    for path in (*(file.path for file in _files(folder)), folder / HASHES, folder / TUNER, folder / _TUNER_HASH):
        path.unlink(missing_ok=True)
    return f"Tune's files are damaged ({names}), and no trial had a checkpoint: beginning anew."


def _has_trials(folder: Path) -> bool:
    """Return whether a trial of an experiment has got anywhere."""
    return any(any(folder.glob(pattern)) for pattern in _REACHED)


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
    texts = _texts_of_pickle(tuner) if tuner.is_file() else None
    if texts is None or not _is_tuner(tuner):
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


def note_tuner(folder: Path) -> None:
    """Keep a hash beside what Tune has just written of an experiment, once for all its sessions."""
    write_whole(folder / _TUNER_HASH, file_hash(folder / TUNER))


def _is_tuner(tuner: Path) -> bool:
    """Return whether what Tune wrote first is as it was written; without its hash, whether it ends as a pickle must."""
    try:
        return (tuner.parent / _TUNER_HASH).read_text() == file_hash(tuner)
    except FileNotFoundError:  # an earlier version wrote it, or a kill came in between
        return _is_pickle(tuner)


def _hashes(folder: Path) -> dict[str, str]:
    """Return the hashes of Tune's state by the names of its files; none where they are missing or cut short."""
    try:
        return {str(name): str(value) for name, value in json.loads((folder / HASHES).read_bytes()).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def _is_pickle(path: Path) -> bool:
    return _texts_of_pickle(path) is not None


def _texts_of_pickle(path: Path) -> set[str] | None:
    """Return the texts in a pickle, which is gone through and never loaded; None if it is none."""
    content = path.read_bytes()
    try:
        return {text for _, text, _ in pickletools.genops(content) if isinstance(text, str)}
    except Exception:  # it reads lengths that damage may have made anything of
        return None


def _archived(folder: Path) -> dict[str, bytes]:
    """Return the archived files by name; none if there is no archive, or it is damaged itself."""
    with contextlib.suppress(FileNotFoundError, zipfile.BadZipFile), zipfile.ZipFile(folder / ARCHIVE) as archive:
        return {name: archive.read(name) for name in archive.namelist() if _is_state(name)}
    return {}


def _is_state(name: str) -> bool:
    return name in (HASHES, TUNER) or _NAME.fullmatch(name) is not None


def _put_back(folder: Path, archived: dict[str, bytes]) -> str:
    """Write archived files, each whole or not at all, and set those of later sessions aside; returns their time."""
    for name, content in archived.items():
        write_whole(folder / name, content)
    session = next(file.session for file in _files(folder) if file.path.name in archived)
    for file in _files(folder):
        if file.session > session:
            file.path.rename(file.path.with_name(f"broken_{file.path.name}"))
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((folder / ARCHIVE).stat().st_mtime))
