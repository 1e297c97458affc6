"""The stages that all trials of a method begin from: loaded, waited for or computed before the first trial."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segadapt.platform.experiment.record import BEGUN, Options, Record
from segadapt.platform.experiment.tune_state import mend
from segadapt.platform.settings.config import override
from segadapt.platform.settings.resources import Allocation
from segadapt.platform.storage.checkpoints import iou_table, read_metrics
from segadapt.platform.storage.files import write_whole
from segadapt.platform.storage.stage_keys import StageKey, stage_experiment, stage_keys
from segadapt.platform.storage.stages import (
    describe,
    longest_prefix,
    mark_used,
    need,
    put_damaged_aside,
    turn_to_compute,
)
from segadapt.platform.storage.weights import weights_hash
from segadapt.platform.tracking.tags import CACHE_TAGS, STAGE_TAGS
from segadapt.platform.trial.spec import TrialSpec
from segadapt.trainables.core.training.checkpoint import GALLERY
from segadapt.trainables.core.training.config import stage_steps


class StageFailedError(RuntimeError):
    """A stage that all trials need could not be computed."""


@dataclass(frozen=True)
class SharedStages:
    """The shared stages of an experiment's methods."""

    record: Record
    spec: TrialSpec
    """What the trials share that begin from them."""
    resources: Allocation
    """What a trial takes that computes them: the whole machine."""
    tracker: Any
    options: Options
    parent_key: str
    """Key of the run that the experiment's trials hang under."""

    def ensure(self, seeds: Sequence[int | None] = (None,), methods: Iterable[str] = ()) -> bool:
        """Have the shared stages of methods in the store; returns False if interrupted.

        Args:
            seeds: Training seeds; None is the experiment's own.
            methods: Names of methods; none for all.

        Raises:
            StageFailedError: If one of them fails.
        """
        usual = {method: self._keys(method, None) for method in self.record.candidates}
        wanted = [(method, seed, self._keys(method, seed)) for method in methods or usual for seed in seeds]
        needed = itertools.chain(*usual.values(), *(keys for _, _, keys in wanted))
        need(self.spec.storage, self.record.name, needed)
        return all(self._ensure_of(method, seed, keys) for method, seed, keys in wanted)

    def start(self) -> dict[str, float]:
        """Return what the network reached that all trials begin from, by goal; nothing where no stage is shared."""
        for method in self.record.candidates:
            for folder in longest_prefix(self.spec.storage, self._keys(method, None))[:1]:
                return self._goals(folder)
        return {}

    def _goals(self, folder: Path) -> dict[str, float]:
        metrics = read_metrics(folder)
        values = {goal: metrics.get(goal) for goal in self.spec.objective.goals}
        return {goal: value for goal, value in values.items() if value is not None}

    def _keys(self, method: str, seed: int | None) -> list[StageKey]:
        from segadapt.trainables.core.data.datasets import load_data

        config = self.spec.shared_config(method, seed)
        weights = weights_hash(config.network, self.spec.storage)
        return stage_keys(config, load_data(config.data)[0].fingerprint, self.spec.code, weights)

    def _ensure_of(self, method: str, seed: int | None, keys: list[StageKey]) -> bool:
        """Load a method's shared stages, wait for those that others compute, and compute what is missing."""
        storage, say = self.spec.storage, self.options.say
        for name in put_damaged_aside(storage, keys):
            say(f"{method}: the files of the stage {name} are damaged; it is computed anew.")
        try:
            with turn_to_compute(storage, keys, self.record.name, say) as done:
                if done:
                    names = ", ".join(key.stage.name for key in keys[: len(done)])
                    say(f"{method}: stages computed earlier are loaded: {names}.")
                if len(done) < len(keys):
                    self._compute(method, seed, keys, len(done))
                else:
                    self._close_lost_run(method, seed)
        except KeyboardInterrupt:  # while it waited for others
            return False
        done = longest_prefix(storage, keys)
        if len(done) < len(keys):
            return False
        for folder in done:
            mark_used(folder)
        if done and seed is None:
            self._log_baseline(keys, done)
        return True

    def _compute(self, method: str, seed: int | None, keys: list[StageKey], done: int) -> None:
        """Compute a method's shared stages but the first `done`, as a trial of its own that uses the whole machine.

        What this experiment began before is continued, if the stages are the same.

        Raises:
            StageFailedError: If the trial fails.
        """
        from segadapt.platform.experiment.naming import Labels
        from segadapt.platform.experiment.tuning import run_experiment

        config = self.spec.shared_config(method, seed)
        spec = dataclasses.replace(
            self.spec,
            experiment=stage_experiment(self.record.name, method, seed),
            configs={method: override(self.spec.configs[method], {"seed": config.seed})},
            resources=self.resources,
            shared_stages=True,
        )
        self._clear(spec.folder, keys)
        missing = tuple(key.stage for key in keys[done:])
        steps = sum(stage_steps(missing, config.warmup.steps, config.trainer.steps).values())
        names = [stage.name for stage in missing]
        labels = Labels(self.record.name, "stage", names[:1], {}, self.parent_key)
        title = None if self.options.quiet else f"shared stages {', '.join(names)}"
        results = run_experiment(spec, labels, steps, self.tracker, title)
        reason = next((result.error for result in results if result.error), None)
        if reason is not None:
            raise StageFailedError(f"The shared stages did not finish: {reason}")
        if all(result.ended for result in results):
            (spec.folder / BEGUN).unlink()

    def _clear(self, folder: Path, keys: Sequence[StageKey]) -> None:
        """Make a folder ready to compute stages in; what was begun there goes on if the stages are the same."""
        begun, hashes = folder / BEGUN, json.dumps([key.hash for key in keys])
        if folder.exists() and not (begun.exists() and begun.read_text() == hashes):
            shutil.rmtree(folder)  # it was finished and pruned since, or the code was edited
        if mended := mend(folder):
            self.options.say(mended)
        folder.mkdir(exist_ok=True)
        write_whole(begun, hashes)

    def _close_lost_run(self, method: str, seed: int | None) -> None:
        """Close the run of stages that this experiment began and, after it was killed, another one computed."""
        name = stage_experiment(self.record.name, method, seed)
        self.tracker.end_lost(self.record.name, f"{name}/", known=())

    def _log_baseline(self, keys: list[StageKey], folders: list[Path]) -> None:
        """Record what the trials start from on the parent run, and whether the cache had it."""
        key = self.record.name
        self.tracker.log_summary(key, {f"start/{goal}": value for goal, value in self._goals(folders[0]).items()}, 0)
        self.tracker.log_file(key, folders[0] / GALLERY, "start")
        self.tracker.log_json(key, iou_table(folders[0]), "start/per_class_iou.json")
        experiments = {stage_experiment(self.record.name, method) for method in self.record.candidates}
        tags = {}
        for stage, folder in zip(keys, folders, strict=True):
            description = describe(folder)
            computed = description is not None and description.experiment in experiments
            tags[f"{STAGE_TAGS}{stage.stage.name}"] = stage.hash
            tags[f"{CACHE_TAGS}{stage.stage.name}"] = "computed here" if computed else "hit"
        self.tracker.set_tags(key, tags)
