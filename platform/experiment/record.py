"""What an experiment was asked to do, kept in its folder."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_type_hints

from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from pydantic import TypeAdapter

from segadapt.platform.errors import UsageError
from segadapt.platform.search.samplers import SamplerName
from segadapt.platform.search.warm_start import SearchSettings
from segadapt.platform.settings.config import TrialConfig, Values, override, resolve
from segadapt.platform.settings.resources import Resources, Tolerance
from segadapt.platform.storage.checkpoints import checkpoint_folder, trial_of
from segadapt.platform.storage.files import write_whole
from segadapt.platform.storage.folders import Place, Storage
from segadapt.platform.storage.retention import locked
from segadapt.platform.storage.stage_keys import own_steps
from segadapt.platform.tracking.tags import FORKED_FROM_TAG, GROUND_TAG, TRIALS_TAG, WARM_START_TAG
from segadapt.trainables import method_class

RECORD = "record.json"

BEGUN = "begun.json"
"""File in the folder of a trial that computes shared stages, with their hashes, until it has ended well."""


@dataclass(frozen=True)
class Options:
    """Where an experiment runs and is kept; the same for every command that trains."""

    place: Place = field(default_factory=Place)
    address: str | None = None
    """Ray cluster; None starts one on this machine."""
    resources: Resources = field(default_factory=Resources)
    """What each trial takes."""
    tolerance: Tolerance = field(default_factory=Tolerance)
    """What may go wrong with machines before a trial has failed."""
    debug: bool = False
    say: Callable[[str], None] = print
    """Receives what is told to the user besides the live progress."""
    quiet: bool = False
    """Whether no progress is shown."""


@dataclass(frozen=True)
class Candidate:
    """A method in an experiment."""

    fixed: Values
    """Settings that none of its trials changes, by dotted key."""
    space: Mapping[str, BaseDistribution] = field(default_factory=dict)
    """What its trials vary; empty for a single run."""
    first: Values = field(default_factory=dict)
    """The varied settings of its first trial."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as they are kept and logged."""
        space = {key: json.loads(distribution_to_json(value)) for key, value in self.space.items()}
        return {"fixed": dict(self.fixed), "space": space, "first": dict(self.first)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Candidate":
        """Rebuild what `as_dict` returned."""
        space = {key: json_to_distribution(json.dumps(value)) for key, value in content["space"].items()}
        return cls(dict(content["fixed"]), space, dict(content["first"]))


@dataclass(frozen=True)
class Record:
    """What an experiment was asked to do; kept in its folder, so that resuming needs its name alone."""

    kind: Literal["search", "train", "finish"]
    name: str
    """Name of the experiment and of its folder."""
    candidates: Mapping[str, Candidate]
    """The methods it tries."""
    objective: str
    seed: int = 0
    """Seed of the sampler."""
    trials: int = 1
    concurrent: int | None = None
    """Trials at a time; None takes as many as the cluster runs."""
    time_budget_s: float | None = None
    max_gpu_hours: float | None = None
    """Of all trials and shared stages, over all sessions."""
    sampler: SamplerName = "auto"
    scheduler: str = "asha"
    """One of `SCHEDULERS`."""
    forked_from: str | None = None
    """Search whose settings this one began with."""
    warm_start: Sequence[str] = ()
    """Searches whose trials count as prior points, the one forked from included."""
    rerank: int = 0
    """So many of the best configurations are trained again after the search, on other seeds."""
    seeds: int = 0
    """How many seeds; of a finish, on how many it is done."""
    keep_top: int | None = None
    """So many of the best trials keep their checkpoints; None keeps those of all."""
    search: str | None = None
    """Of a finish: the experiment in MLflow that it belongs to."""
    start: str | None = None
    """Path below the storage folder of the checkpoint that the trial begins from."""
    from_key: str | None = None
    """Of a finish: key of the run it continues."""
    from_name: str | None = None
    number: int = 1
    """Of a finish: which of those of its trial, as it is numbered when it begins."""
    study: str | None = None
    """Database of its study, as `study_database_name` notes it; None before it runs, and where an earlier version ran
    it."""

    @property
    def steps(self) -> int:
        """Steps of the longest trial."""
        return max(own_steps(config) for config in self.configs.values())

    @property
    def grace_steps(self) -> int:
        """Steps before a trial may be stopped: the first rung."""
        return min(self.steps, *(config.trainer.eval_every for config in self.configs.values()))

    @property
    def methods(self) -> str:
        """Names of the methods, for people."""
        return ", ".join(self.candidates)

    @cached_property
    def shared_configs(self) -> dict[str, TrialConfig]:
        """The configuration that all trials of each method share, without searched values."""
        return {name: resolve(name, candidate.fixed) for name, candidate in self.candidates.items()}

    @cached_property
    def configs(self) -> dict[str, TrialConfig]:
        """The configuration of each method's first trial."""
        return {name: override(self.shared_configs[name], each.first) for name, each in self.candidates.items()}

    @property
    def ground(self) -> str | None:
        """The method to whose training all others add their losses: online self-training, where each has its terms."""
        alone = next((name for name in self.candidates if method_class(name).always_online), None)
        if alone is None or len(self.candidates) == 1:
            return None
        varied = any("online.enabled" in candidate.space for candidate in self.candidates.values())
        return alone if not varied and all(config.online.enabled for config in self.shared_configs.values()) else None

    @property
    def repetitions(self) -> int:
        """How many trials `rerank` asks for at most."""
        return (self.rerank + (self.ground is not None)) * self.seeds if self.rerank else 0

    def lineage(self) -> dict[str, str]:
        """Return tags that say what a search builds on."""
        tags = {TRIALS_TAG: str(self.trials)}
        if (ground := self.ground) is not None:
            tags[GROUND_TAG] = ground
        if self.forked_from is not None:
            tags[FORKED_FROM_TAG] = self.forked_from
        if self.warm_start:
            tags[WARM_START_TAG] = ", ".join(self.warm_start)
        return tags

    def fresh_seeds(self) -> list[int]:
        """Return the seeds of `rerank`: none of them is the search's own."""
        used = {config.seed for config in self.configs.values()}
        return [seed for seed in range(self.seeds + len(used)) if seed not in used][: self.seeds]

    def settings(self) -> SearchSettings:
        """Return what decides whether its trials may be compared with another search's."""
        fixed = {name: candidate.fixed for name, candidate in self.candidates.items()}
        spaces = {name: candidate.space for name, candidate in self.candidates.items()}
        return SearchSettings(fixed, spaces, self.objective)

    def save(self, storage: Storage) -> None:
        """Write the record, whole or not at all."""
        folder = storage.experiment(self.name)
        folder.mkdir(parents=True, exist_ok=True)
        content = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        content["candidates"] = {name: candidate.as_dict() for name, candidate in self.candidates.items()}
        write_whole(folder / RECORD, json.dumps(content, indent=1))

    @classmethod
    def load(cls, storage: Storage, name: str) -> "Record":
        """Read the record of an experiment.

        Raises:
            UsageError: If there is none of this name; lists those there are.
        """
        try:
            content = json.loads((storage.experiment(name) / RECORD).read_text())
        except FileNotFoundError as error:
            known = ", ".join(sorted(path.parent.name for path in storage.experiments.glob(f"*/{RECORD}"))) or "none"
            raise UsageError(
                f"There must be an experiment {name!r} in {storage.root}, but there is not. Known: {known}."
            ) from error
        except ValueError as error:
            raise _damaged(storage, name, error) from error
        try:
            content["candidates"] = {name: Candidate.from_dict(each) for name, each in content["candidates"].items()}
            hints = {**get_type_hints(cls), "candidates": dict[str, Any]}
            return cls(**{name: TypeAdapter(hints[name]).validate_python(value) for name, value in content.items()})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _damaged(storage, name, error) from error


def _damaged(storage: Storage, name: str, error: Exception) -> UsageError:
    return UsageError(
        f"{storage.experiment(name) / RECORD} must be as segadapt wrote it, but is not: {error!r}. "
        "Restore it from a backup, or begin a new search."
    )


@dataclass(frozen=True)
class Outcome:
    """How an experiment ended."""

    failed: int
    """Trials that failed."""
    interrupted: bool
    seconds: Mapping[str, float]
    """Wall time of each part, in order: start, shared stages, trials, tracking."""


def save_record(record: Record, storage: Storage) -> Record:
    """Write the record and return it; a finish has its number now.

    From then on, what a finish starts from is not removed; until then it may have been.
    """
    with locked(storage):
        is_new = not (storage.experiment(record.name) / RECORD).is_file()
        if record.start is not None and is_new and not checkpoint_folder(storage, record.start).is_dir():
            raise UsageError(
                f"The checkpoint of {record.from_name} must be there, but was removed just now (--keep-top). "
                "Finish another run."
            )
        if record.kind == "finish":
            record = dataclasses.replace(record, number=_finish_number(record, storage))
        record.save(storage)
    return record


def _finish_number(record: Record, storage: Storage) -> int:
    """Return the number of a finish among those of its trial: the one it has, or the next."""
    others = {}
    for path in storage.experiments.glob(f"{record.search}.finish-*/{RECORD}"):
        content = json.loads(path.read_text())
        if content.get("from_name") == record.from_name:
            others[path.parent.name] = content.get("number", 1)
    return int(others.get(record.name, max(others.values(), default=0) + 1))


def finished_trials(storage: Storage, search: str) -> set[str]:
    """Return the ids of a search's trials that some finish starts from, whether it has ended or not."""
    trials = set()
    for path in storage.experiments.glob(f"{search}.finish-*/{RECORD}"):
        start = json.loads(path.read_text())["start"]
        if start is not None:
            trials.add(trial_of(start))
    return trials
