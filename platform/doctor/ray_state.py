"""The trials in Ray's saved state."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segadapt.platform.settings.config import Values
from segadapt.platform.settings.reported import End, Reported
from segadapt.platform.settings.states import TrialState
from segadapt.platform.storage.folders import is_name


@dataclass(frozen=True)
class RayTrial:
    """A trial in Ray's saved state."""

    trial_id: str
    status: str
    config: Values
    last: Reported | None
    """Its last report; None before the first one."""
    heard: float | None
    """Unix time of its last report."""
    error_file: str | None

    @property
    def state(self) -> TrialState | None:
        """How it ended; None if it can go on."""
        end = self.last.end if self.last is not None else None
        if self.status == "ERROR":
            return TrialState.INFEASIBLE if end is End.INFEASIBLE else TrialState.FAILED
        if self.status == "TERMINATED":
            return TrialState.FINISHED if end is End.FINISHED else TrialState.STOPPED_EARLY
        return None

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What its last report said that Tune keeps; nothing before the first one."""
        return self.last.metrics if self.last is not None else {}

    @property
    def step(self) -> int | None:
        """The training steps done at its last report; None if that was no evaluation."""
        return self.last.step if self.last is not None else None

    @property
    def reported(self) -> bool:
        """Whether it was ever evaluated, or failed; otherwise it may never have had a run."""
        return self.step is not None or self.status == "ERROR"

    @property
    def reason(self) -> str:
        """Why it failed."""
        if self.last is not None and self.last.failure is not None:
            return self.last.failure
        try:
            return Path(self.error_file or "").read_text().strip().splitlines()[-1]
        except (OSError, IndexError):
            return "unknown; see the trial's folder"


def ray_trials(folder: Path) -> dict[str, RayTrial] | None:
    """Return the trials in the last state that Ray saved of an experiment, by id and in order; None if it saved none.

    Nothing is unpickled.

    Raises:
        ValueError: If the state cannot be read.
    """
    saved = max(folder.glob("experiment_state-*.json"), default=None)
    if saved is None:
        return None
    try:
        pairs = [[json.loads(part) for part in pair] for pair in json.loads(saved.read_text())["trial_data"]]
        for trial, more in pairs:  # both become paths
            names = (trial["trial_id"], *filter(None, (more["error_filename"],)))
            if not all(is_name(name) for name in names):
                raise ValueError(f"names that lead elsewhere: {names}")
        pairs.sort(key=lambda pair: int(pair[0]["experiment_tag"].partition("_")[0]))  # `2_lr=0.1` is the second
        return {
            trial["trial_id"]: RayTrial(
                trial["trial_id"],
                trial["status"],
                trial["config"],
                Reported.from_result(more["last_result"]) if more["last_result"] else None,
                more["last_result_time"] if more["last_result"] else None,
                more["error_filename"] and str(folder / trial["trial_id"] / more["error_filename"]),
            )
            for trial, more in pairs
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{saved} cannot be read: {type(error).__name__}: {error}") from error
