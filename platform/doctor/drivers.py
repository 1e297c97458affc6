"""The commands that run now."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from segadapt.platform.experiment.record import RECORD
from segadapt.platform.storage.folders import Storage
from segadapt.platform.tracking import outbox


@dataclass(frozen=True)
class Drivers:
    """The commands that run now and write to tracking: each holds the lock of its queue on disk until it ends."""

    names: frozenset[str]
    """The experiments_to_compare, and folders of experiments_to_compare, that they write about."""
    starting: bool
    """Whether one has not said yet what it works on."""

    @classmethod
    def of(cls, storage: Storage) -> "Drivers":
        """Look for the drivers that use a storage folder, on whatever node: the lock is the file system's."""
        names: set[str] = set()
        starting = False
        for server in storage.tracking.glob("*"):
            for box in outbox.box_contents(server):
                if box.alive:
                    announced = [content["arguments"] for content in box.contents]
                    starting = starting or not announced
                    for key in (part.get(name) for part in announced for name in ("key", "experiment", "prefix")):
                        names.add((key or "").split("/")[0])
        return cls(frozenset(names | {experiment_of(storage, name) for name in names}), starting)

    def drive(self, name: str) -> bool:
        """Return whether one works, or may be about to work, on an experiment or a part of it."""
        return self.starting or name in self.names


def experiment_of(storage: Storage, folder: str) -> str:
    """Return the experiment that a folder belongs to: shared stages, repetitions and finishes have their own."""
    try:
        record = json.loads((storage.experiments / folder / RECORD).read_text())
        return str(record["search"] or folder)
    except (OSError, ValueError, KeyError, TypeError):
        return re.split(r"\.(?:stages|rerank|finish)-", folder, maxsplit=1)[0]


def folders_of(storage: Storage, name: str) -> list[Path]:
    """Return the folders of an experiment: its own, its shared stages', its repetitions' and its finishes'."""
    return [path for path in sorted(storage.experiments.glob(f"{name}*")) if experiment_of(storage, path.name) == name]
