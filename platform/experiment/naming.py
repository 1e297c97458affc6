"""How the runs of an experiment's trials are named and found again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Labels:
    """How the runs of an experiment are named and tagged."""

    experiment: str
    """MLflow experiment."""
    kind: str
    """What the trials are: trial, stage, rerank or finish."""
    names: Sequence[str]
    """Names of the runs, where they are known beforehand; others are named after their method, `sdca-001`, ..."""
    tags: Mapping[str, str]
    parent_key: str | None


class RunNames:
    """The names of an experiment's runs, which stay the same over restarts.

    Args:
        labels: How runs are named.
        experiment: Name of the experiment's folder.
    """

    def __init__(self, labels: Labels, experiment: str) -> None:
        self._labels = labels
        self._experiment = experiment
        self.names: dict[str, str] = {}
        """Names of the runs of trials that were started, by trial."""
        self.numbers: dict[str, int] = {}
        """Which proposal each trial is, from 1."""

    def key(self, trial_id: str) -> str:
        """Return the key of a trial's run."""
        return f"{self._experiment}/{trial_id}"

    def name(self, trial_id: str) -> str:
        """Return the name of a trial's run; the id of a trial that was never started."""
        return self.names.get(trial_id, trial_id)

    def number(self, trials: Sequence[Any], trial_id: str) -> int:
        """Return which proposal a trial is, from 1; Tune puts a trial that it starts again at the end of its list."""
        if trial_id not in self.numbers:
            for trial in trials:
                self.numbers.setdefault(trial.trial_id, len(self.numbers) + 1)
        return self.numbers[trial_id]

    def take(self, trials: Sequence[Any], trial_id: str, method: str) -> str:
        """Return the name of the run of a trial that starts; it is given one if it has none."""
        number, listed = self.number(trials, trial_id), self._labels.names
        return self.names.setdefault(trial_id, listed[number - 1] if listed else f"{method}-{number:03d}")
