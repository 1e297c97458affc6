"""Leaving a machine that is about to go: a process that is asked to end finishes its step, saves, and leaves.

Cloud providers, schedulers and container runtimes announce the end of a machine with SIGTERM and kill some time later.
"""

import contextlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from segadapt.trainables.core import distributed
from segadapt.trainables.core.training.checkpoint import is_whole, load_state, save_state
from segadapt.trainables.core.training.progress import Progress

_NOTE = "preemptions.json"

_FOLDER = "interrupted"
"""Folder, in that of a trial, of the step that the trial was asked to leave at."""

_asked = threading.Event()

_training = threading.Event()


class PreemptedError(RuntimeError):
    """The process was asked to end and has saved its trial, which can go on elsewhere."""


def leave_when_terminated() -> None:
    """Let SIGTERM end the training of this process after its step; outside training, SIGTERM does what it did before.

    Python allows this in the main thread alone.
    """
    before = signal.getsignal(signal.SIGTERM)

    def ask(number: int, frame: FrameType | None) -> None:
        if _training.is_set():
            _asked.set()
        elif callable(before):
            before(number, frame)

    signal.signal(signal.SIGTERM, ask)


@contextlib.contextmanager
def training() -> Iterator[None]:
    """Say that this process trains within the context, in any of its threads."""
    _training.set()
    try:
        yield
    finally:
        _training.clear()
        _asked.clear()


def asked_to_leave() -> bool:
    """Return whether this process was asked to end since its training began."""
    return _asked.is_set()


def note_preemption(folder: Path) -> None:
    """Count, in the folder of a trial, that it was saved and left."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{_NOTE}"
    temporary.write_text(json.dumps(noted_preemptions(folder) + 1))
    temporary.replace(folder / _NOTE)


def noted_preemptions(folder: Path) -> int:
    """Return how often a trial was saved and left."""
    try:
        return int(json.loads((folder / _NOTE).read_text()))
    except FileNotFoundError:
        return 0


def interval_so_far(progress: Progress, device: torch.device) -> dict[str, Any]:
    """Return the sums and random numbers since the last report, for a process that goes on from here.

    Every worker must call this.
    """
    terms = {name: distributed.sum_over_workers(total) for name, total in sorted(progress.terms.items())}
    return {
        "terms": terms,
        "steps": progress.steps,
        "seconds": time.perf_counter() - progress.started,
        "random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state() if device.type == "cuda" else None,
    }


def take_up(interval: dict[str, Any], progress: Progress, device: torch.device) -> None:
    """Go on with the sums and random numbers of an interrupted process.

    Args:
        interval: What `interval_so_far` returned in that process.
        progress: Receives the sums.
        device: Device of this process.
    """
    if distributed.world_size() == 1:
        torch.set_rng_state(interval["random"])
        if interval["cuda_random"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(interval["cuda_random"])
    if distributed.rank() == 0:  # the sums are those of all workers
        progress.terms = {name: total.to(device) for name, total in interval["terms"].items()}
    else:
        progress.terms = {name: torch.zeros_like(total).to(device) for name, total in interval["terms"].items()}
    progress.steps = interval["steps"]
    progress.started -= interval["seconds"]


def save_interrupted(folder: Path, state: dict[str, Any]) -> None:
    """Save the state of a trial that leaves in the middle of a stage, whole or not at all, and count the preemption.

    Args:
        folder: Folder of the trial.
        state: All that going on needs.
    """
    saved, temporary = folder / _FOLDER, folder / f".{_FOLDER}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_state(temporary, state)
    shutil.rmtree(saved, ignore_errors=True)
    temporary.rename(saved)
    note_preemption(folder)


def forget_interrupted(folder: Path) -> None:
    """Remove what `save_interrupted` left in the folder of a trial, since a later step was reported."""
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)


def later_state(folder: Path, state: dict[str, Any] | None, stage_names: Sequence[str]) -> dict[str, Any] | None:
    """Return the state of a checkpoint, or the one that an interrupted process saved after it.

    Args:
        folder: Folder of the trial.
        state: State of the checkpoint; None without one.
        stage_names: Names of the planned stages in order.
    """
    if not is_whole(folder / _FOLDER):
        return state
    saved = load_state(folder / _FOLDER)
    if saved["stage"] not in stage_names:  # it was finished since
        return state
    place = (stage_names.index(saved["stage"]), saved["step"])
    return saved if state is None or place > (stage_names.index(state["stage"]), state["step"]) else state
