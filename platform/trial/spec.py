"""What the trials of an experiment share, and what one of them is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from segadapt.platform.settings.config import METHOD, TrialConfig, Values, override
from segadapt.platform.settings.objective import Objective
from segadapt.platform.settings.resources import Allocation, Tolerance
from segadapt.platform.storage.folders import Storage
from segadapt.platform.storage.stage_keys import CodeVersions


@dataclass(frozen=True)
class TrialSpec:
    """What is common to the trials of an experiment; travels to the trial's processes."""

    storage: Storage
    experiment: str
    configs: Mapping[str, TrialConfig]
    """The experiment's methods, each with the configuration that its trials change by their own values."""
    resources: Allocation = field(default_factory=Allocation)
    objective: Objective = field(default_factory=Objective)
    """What checkpoints are kept and trials compared by."""
    start: Path | None = None
    """Checkpoint folder to begin from; None begins from the shared stages."""
    shared_stages: bool = False
    """Compute the method's shared stages instead of its own."""
    tolerance: Tolerance = field(default_factory=Tolerance)
    code: CodeVersions | None = None
    """Code of the shared stages, as the driver read it: an edit while trials run must not hide their stages."""

    def method(self, values: Values) -> str:
        """Return the method of the trial with these values."""
        return str(values.get(METHOD, next(iter(self.configs))))

    def config(self, values: Values) -> TrialConfig:
        """Return the configuration of the trial with these values: searched ones, or a seed."""
        shared = self.configs[self.method(values)]
        return override(shared, {key: value for key, value in values.items() if key != METHOD})

    def trial(self, trial_id: str, values: Values) -> "Trial":
        """Return the trial with this id and these values."""
        return Trial(self, trial_id, values, self.config(values))

    def shared_config(self, method: str, seed: int | None = None) -> TrialConfig:
        """Return the configuration that the shared stages of a method's trials are computed with.

        Args:
            method: Its name.
            seed: Seed of the trial, where trials differ in it.
        """
        config = self.configs[method]
        return config if seed in (None, config.seed) else override(config, {"seed": seed})

    @property
    def folder(self) -> Path:
        """The experiment's folder."""
        return self.storage.experiment(self.experiment)

    def artifacts(self, trial_id: str) -> Path:
        """Folder for what a trial's stages write."""
        return trial_artifacts(self.folder, trial_id)


@dataclass(frozen=True)
class Trial:
    """One trial, as its processes are handed it."""

    spec: TrialSpec
    trial_id: str
    values: Values
    """What distinguishes it from the others, by dotted key."""
    config: TrialConfig

    @property
    def shared_config(self) -> TrialConfig:
        """The configuration that its shared stages are computed with."""
        return self.spec.shared_config(self.config.method_name, self.config.seed)

    @property
    def artifacts(self) -> Path:
        """Folder for what its stages write."""
        return self.spec.artifacts(self.trial_id)


def trial_artifacts(experiment: Path, trial_id: str) -> Path:
    """Return the folder for what a trial's stages write, in that of its experiment."""
    return experiment / "artifacts" / trial_id
