"""What the trials of an experiment share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from segadapt.platform.settings.config import METHOD, TrialConfig, Values, resolve
from segadapt.platform.settings.objective import Objective
from segadapt.platform.settings.resources import Allocation, Tolerance
from segadapt.platform.storage.folders import Storage
from segadapt.platform.storage.stage_keys import CodeVersions


@dataclass(frozen=True)
class TrialSpec:
    """What is common to the trials of an experiment; travels to the trial's processes."""

    storage: Storage
    experiment: str
    fixed: Mapping[str, Values]
    """The experiment's methods, each with the settings that none of its trials changes."""
    resources: Allocation = field(default_factory=Allocation)
    objective: Objective = field(default_factory=Objective)
    """By which checkpoints are kept and trials compared."""
    start: Path | None = None
    """Checkpoint folder to begin from; None begins from the shared stages."""
    shared_stages: bool = False
    """Compute the method's shared stages instead of its own."""
    tolerance: Tolerance = field(default_factory=Tolerance)
    code: CodeVersions | None = None
    """Of the shared stages, as the driver found it: an edit while trials run must not hide their stages from them."""

    def method(self, values: Values) -> str:
        """Return the method of the trial with these searched values."""
        return str(values.get(METHOD, next(iter(self.fixed))))

    def config(self, values: Values) -> TrialConfig:
        """Return the configuration of the trial with these searched values."""
        method = self.method(values)
        own = {key: value for key, value in values.items() if key != METHOD}
        return resolve(method, {**self.fixed[method], **own})

    def shared_config(self, method: str, seed: int | None = None) -> TrialConfig:
        """Return the configuration that the shared stages of a method's trials are computed with.

        Args:
            method: Its name.
            seed: Of the trial, where trials differ in it.
        """
        return resolve(method, self.fixed[method] if seed is None else {**self.fixed[method], "seed": seed})

    @property
    def folder(self) -> Path:
        """The experiment's folder."""
        return self.storage.experiment(self.experiment)

    def artifacts(self, trial_id: str) -> Path:
        """Folder for what a trial's stages write."""
        return trial_artifacts(self.folder, trial_id)


def trial_artifacts(experiment: Path, trial_id: str) -> Path:
    """Return the folder for what a trial's stages write, in that of its experiment."""
    return experiment / "artifacts" / trial_id
