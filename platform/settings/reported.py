"""What a trial's process reports, on its way from the trainer through Tune to all that reads it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from segadapt.platform.settings.states import TrialState

_METRIC_PREFIXES = (
    "target_val/",
    "source_val/",
    "score/",
    "pseudo_labels/",
    "loss/",
    "time/",
    "memory/",
    "system/",
    "lr",
)
"""How the names of reported numbers begin; Tune adds bookkeeping of its own."""

_TEXTS = ("stage", "fingerprint", "memory_note", "reason")


class End(StrEnum):
    """Why a process of a trial reports no more."""

    FINISHED = "finished"
    FAILED = "failed"
    INFEASIBLE = "infeasible"
    PREEMPTED = "preempted"

    @property
    def state(self) -> TrialState | None:
        """The state that the trial ends in; None if it goes on in another process."""
        return None if self is End.PREEMPTED else TrialState(self.value)


@dataclass(frozen=True, kw_only=True)
class Reported:
    """An evaluation of a trial, or why its process ends without one."""

    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Numbers by name."""
    step: int | None = None
    """Training steps done, not Tune's count of reports, which restarts with a trial; None if nothing was evaluated."""
    stage: str | None = None
    stage_finished: bool = False
    end: End | None = None
    """None if the trial goes on."""
    reason: str | None = None
    """Why the process ended, where it had to."""
    checkpoint: Path | None = None
    """Folder of the checkpoint, where Tune is not handed it: that of a trial that Ray Train runs."""
    fingerprint: str | None = None
    """Fingerprint of the data."""
    memory_note: str | None = None
    """What was changed since the device's memory is short."""

    @property
    def failure(self) -> str | None:
        """Why the trial failed, as the tag of its run says it; None if it did not."""
        match self.end:
            case End.FAILED:
                return self.reason
            case End.INFEASIBLE:
                return f"{self.end}: {self.reason}"
        return None

    def as_result(self) -> dict[str, Any]:
        """Return the flat result that Tune and Ray Train take and save."""
        texts = {name: getattr(self, name) for name in _TEXTS if getattr(self, name) is not None}
        checkpoint = {"checkpoint_path": str(self.checkpoint)} if self.checkpoint is not None else {}
        if self.step is None:
            return {"end": str(self.end), **texts}
        progress = {"step": self.step, "stage_finished": self.stage_finished, "finished": self.end is End.FINISHED}
        return {**progress, **texts, **self.metrics, **checkpoint}

    @classmethod
    def from_result(cls, result: Mapping[str, Any]) -> Self:
        """Read what `as_result` returned, Tune's own entries aside; the trainer's metrics have the same form.

        Also reads what an earlier version reported of a failure, which Tune may have saved.
        """
        texts = {name: str(result[name]) for name in _TEXTS if name in result}
        end = End(result["end"]) if "end" in result else End.FINISHED if result.get("finished") else None
        if "failure" in result:
            is_infeasible = str(result["failure"]).startswith("infeasible: ")
            end = End.INFEASIBLE if is_infeasible else End.FAILED
            texts["reason"] = str(result["failure"]).removeprefix("infeasible: ")
        return cls(
            metrics={name: value for name, value in result.items() if name.startswith(_METRIC_PREFIXES)},
            step=int(result["step"]) if "step" in result else None,
            stage_finished=bool(result.get("stage_finished")),
            end=end,
            checkpoint=Path(result["checkpoint_path"]) if "checkpoint_path" in result else None,
            **texts,
        )
