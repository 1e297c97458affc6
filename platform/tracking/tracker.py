"""MLflow, written from the driver through a queue on disk: a slow or absent server delays records, never a trial.

Runs are addressed by a key of ours (`experiment/trial id`), kept as a tag; a run that exists is continued. Only
explicit run ids are used, never MLflow's process-wide active run.

What a process could not send, because the server was away or it was killed, is sent by the next one that tracks to the
same server from the same storage folder, before its own records. A kill between sending a record and noting that
repeats the record, so each kind may be repeated: see `RunWriter`.
"""

import contextlib
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from segadapt.platform.errors import redacted
from segadapt.platform.ray_internals.start import variable
from segadapt.platform.settings.states import MlflowStatus, TrialState
from segadapt.platform.storage.checkpoints import TRACKED
from segadapt.platform.storage.folders import Place
from segadapt.platform.tracking.client import mlflow_settings, waiting_folder
from segadapt.platform.tracking.moved import point_artifacts_here
from segadapt.platform.tracking.outbox import Outbox
from segadapt.platform.tracking.sender import Sender
from segadapt.platform.tracking.tags import STATE_TAG
from segadapt.trainables.core.training.checkpoint import GALLERY

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInfo:
    """What identifies a run and is known at its start."""

    key: str
    experiment: str
    name: str
    tags: Mapping[str, str]
    params: Mapping[str, Any]
    parent_key: str | None = None


class Tracker:
    """Write runs from a queue in one thread, in order. The queue is on disk: what is logged outlives the process.

    Args:
        place: Says where the queue and local artifacts go, and which tracking server receives them.
    """

    def __init__(self, place: Place) -> None:
        point_artifacts_here(place)
        self._uri = place.tracking_url
        self._outbox = Outbox.create(waiting_folder(place))
        self._open: dict[str, None] = {}
        self._sender = Sender(place)
        self._settings = contextlib.ExitStack()
        self._settings.enter_context(mlflow_settings())
        self._thread = threading.Thread(
            target=self._sender.send_all, args=(self._outbox,), name="segadapt-tracking", daemon=True
        )
        self._thread.start()

    def start(self, info: RunInfo) -> None:
        """Create the run, or continue the one that has its key; its tags are set anew, its params are kept."""
        self._open[info.key] = None
        params = {name: str(value) for name, value in info.params.items()}
        tags = {"mlflow.user": variable("USER") or "segadapt", **info.tags}
        self._record("start", **{**asdict(info), "tags": tags, "params": params}, timestamp=_now())

    def log_metrics(self, key: str, metrics: Mapping[str, Any], step: int) -> None:
        """Log finite numbers at a training step; a step that the run has is a repeat and left out."""
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }
        self._record("log_metrics", key=key, numbers=numbers, step=step, timestamp=_now())

    def log_summary(self, key: str, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers that sum a run up; may repeat."""
        numbers = {name: float(value) for name, value in metrics.items()}
        self._record("log_summary", key=key, numbers=numbers, step=step, timestamp=_now())

    def set_tags(self, key: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        self._record("set_tags", key=key, tags=dict(tags))

    def log_datasets(self, key: str, datasets: Sequence[Mapping[str, str]]) -> None:
        """Log on which data a run works.

        Args:
            key: Key of the run.
            datasets: Each with `name`, `digest`, `source_type`, `source`, and as `context` training or evaluation.
        """
        self._record("log_datasets", key=key, datasets=[dict(dataset) for dataset in datasets])

    def log_gallery(self, key: str, checkpoint: Path, step: int) -> None:
        """Store the gallery in a checkpoint folder as the one of a training step."""

        def keep(files: Path) -> None:
            _link(checkpoint / GALLERY, files / GALLERY)

        self._record("log_gallery", keep, key=key, step=step, timestamp=_now())

    def log_json(self, key: str, content: Any, name: str) -> None:
        """Store `content` as a JSON or YAML artifact, by the ending of `name`."""
        self._record("log_json", key=key, content=content, name=name)

    def log_file(self, key: str, path: Path, folder: str | None = None) -> None:
        """Copy a file or folder into the run's artifacts.

        Until it is sent, a file is kept as a copy. A folder's files must not be written again, but may be removed.
        """

        def keep(files: Path) -> None:
            if path.is_dir():
                shutil.copytree(path, files / path.name, copy_function=_link)
            elif path.exists():  # else sending it tells
                shutil.copy(path, files)

        self._record("log_file", keep, key=key, path=str(path), folder=folder)

    def log_evaluation(self, key: str, checkpoint: Path) -> None:
        """Store the gallery, the confusion matrix and the per-class table that lie in a checkpoint folder."""

        def keep(files: Path) -> None:
            for name in TRACKED:
                _link(checkpoint / name, files / name)

        self._record("log_evaluation", keep, key=key)

    def log_figure(self, key: str, make: Callable[[], Any], name: str) -> None:
        """Store the figure that `make` returns (plotly for .html, matplotlib for .png); it is drawn at once."""
        folder, _, file = name.rpartition("/")

        def keep(files: Path) -> None:
            figure = make()
            if file.endswith(".html"):
                figure.write_html(files / file, auto_open=False)  # with its script: clusters may have no internet
            else:
                figure.savefig(files / file)

        self._record("log_file", keep, key=key, path=file, folder=folder or None)

    def end(self, key: str, status: MlflowStatus, tags: Mapping[str, str]) -> None:
        """Close a run.

        Args:
            key: Key of the run.
            status: How MLflow shows it.
            tags: What says how it ended. They are one record with the status, so that a kill leaves both or none.
        """
        self._open.pop(key, None)
        self._record("end", key=key, status=status, tags=dict(tags), timestamp=_now())

    def end_lost(self, experiment: str, prefix: str, known: Collection[str]) -> None:
        """Mark unfinished runs whose key has `prefix` and is not `known` as lost: nobody will go on with them."""
        self._record("end_lost", experiment=experiment, prefix=prefix, known=list(known))

    def close(self, timeout_s: float = 120.0) -> None:
        """Close the runs that are still open and send what is queued; after `timeout_s` seconds the rest is left.

        What is left is sent by the next process that tracks there.
        """
        for key in list(self._open):
            self.end(key, TrialState.INTERRUPTED.mlflow, {STATE_TAG: str(TrialState.INTERRUPTED)})
        self._outbox.finish_input()
        self._thread.join(timeout_s)
        self._sender.given_up.set()
        self._settings.close()
        if waiting := self._outbox.waiting:
            logger.warning(
                "The tracking server %s did not take %d records within %g s. They wait in %s; the next segadapt "
                "command that tracks there sends them.",
                redacted(self._uri),
                waiting,
                timeout_s,
                self._outbox.folder,
            )

    def _record(self, operation: str, keep: Callable[[Path], None] | None = None, **arguments: Any) -> None:
        try:
            self._outbox.append(operation, arguments, keep)
        except Exception:  # tracking never ends a search
            logger.exception("A record for tracking (%s) could not be made; it is left out.", operation)


def _link(source: str | Path, target: str | Path) -> None:
    """Give a file that is never written again a second name, or copy it where the disk cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def _now() -> int:
    """Return the time as MLflow counts it; a record that waits keeps the time at which it was made."""
    return int(time.time() * 1000)
