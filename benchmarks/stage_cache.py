"""What the stage cache saves: processor seconds of a search's trainings with and without it.

    python benchmarks/stage_cache.py [KEY=VALUE ...] [--trials 20] [--methods sdca bicl drsl clst plca] [--json PATH]

A real search (Ray, Optuna, ASHA) of small trials is run first; it gives the configurations, and the steps after which
each trial ended or was stopped. Its trainings are then replayed twice in this process, one after another, by the
function that every trial calls: once with the store of shared stages kept from trial to trial, once with the store
emptied before each trial, which then computes its own warm-up (and for SDCA its own statistics). Counted is
`time.process_time` of this process from building the networks to the last checkpoint of each training: no Ray, no
tracking, and data that is made once beforehand. Both replays train the same configurations for the same steps.
"""

import argparse
import ast
import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import segadapt as api
from measuring import emit
from segadapt.platform.experiment.record import Options, Record
from segadapt.platform.settings.config import parse_assignments
from segadapt.platform.settings.reported import Reported
from segadapt.platform.storage.folders import Place, Storage
from segadapt.platform.storage.stage_keys import stage_keys
from segadapt.platform.storage.stages import longest_prefix
from segadapt.platform.tracking.client import mlflow_client
from segadapt.platform.trial.environment import machine
from segadapt.platform.trial.spec import TrialSpec
from segadapt.platform.trial.training import train
from segadapt.trainables.core.data.datasets import load_data

SMALL = {
    "data.streets.edition": 1,
    "data.streets.height": 32,
    "data.streets.width": 64,
    "warmup.steps": 50,
    "trainer.steps": 40,
    "trainer.eval_every": 20,
}
"""Steps in the default proportion of warm-up to adaptation (300 to 240), on small images."""


class _EnoughError(Exception):
    """A replayed trial has taken the steps that it took in the search."""


@dataclass(frozen=True)
class Trial:
    """A trial of the search."""

    name: str
    values: Mapping[str, Any]
    steps: int


def searched(record: Record, folder: Path) -> list[Trial]:
    """Run the search; returns its trials in the order of their names' numbers."""
    api.Plan(record, Options(Place(folder))).run()
    client = mlflow_client(Place(folder).tracking_url)
    trials = []
    for row in api.runs(record.name, place=Place(str(folder))).rows:
        if row.kind == "trial":
            history = client.get_metric_history(row.run_id, record.objective)
            values = {key: typed(text) for key, text in row.params.items()}
            trials.append(Trial(row.name, values, max(entry.step for entry in history)))
    return sorted(trials, key=lambda trial: trial.name[-3:])


def typed(text: str) -> Any:
    """Return a setting from the text that MLflow keeps of it."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def replay(spec: TrialSpec, trials: Sequence[Trial], *, cached: bool) -> dict[str, float]:
    """Train the trials' shared stages and then the trials; returns processor seconds of both."""
    seconds = {"shared_stages": 0.0, "trials": 0.0}
    computed = 0
    for trial in trials:
        if not cached:
            shutil.rmtree(spec.storage.stages, ignore_errors=True)
        method = spec.method(trial.values)
        config = spec.shared_config(method)
        keys = stage_keys(config, load_data(config.data)[0].fingerprint)
        missing = len(keys) - len(longest_prefix(spec.storage, keys))
        if missing:
            stages_spec = TrialSpec(spec.storage, "replay", {method: config}, shared_stages=True)
            seconds["shared_stages"] += training(stages_spec, trial.name, {}, None)
            computed += missing
        seconds["trials"] += training(spec, trial.name, trial.values, trial.steps)
    return {**seconds, "total": sum(seconds.values()), "stages_computed": computed}


def training(spec: TrialSpec, name: str, values: Mapping[str, Any], steps: int | None) -> float:
    """Train once, at most so many steps; returns processor seconds."""

    def report(reported: Reported, write: Callable[[Path], None] | None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            assert write is not None
            write(Path(folder))
        if steps is not None and reported.step is not None and reported.step >= steps:
            raise _EnoughError

    started = time.process_time()
    with contextlib.suppress(_EnoughError):
        train(spec.trial(name, values), report, None)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--methods", nargs="+", default=["sdca", "bicl", "drsl", "clst", "plca"])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = {**SMALL, **parse_assignments(options.settings)}
    with tempfile.TemporaryDirectory() as name:
        record = api.plan(options.methods, settings, trials=options.trials, place=Place(name)).record
        trials = searched(record, Path(name))
        spec = TrialSpec(Storage(Path(name) / "replay"), "replay", record.shared_configs)
        replay(spec, trials[:1], cached=False)  # what is loaded and allocated once
        shutil.rmtree(spec.storage.root)
        rows = {"with": replay(spec, trials, cached=True), "without": replay(spec, trials, cached=False)}
    result = {
        "settings": settings,
        "trials": {trial.name: trial.steps for trial in trials},
        "cpu_seconds": {row: {key: round(value, 2) for key, value in found.items()} for row, found in rows.items()},
        "ratio": round(rows["without"]["total"] / rows["with"]["total"], 2),
        "environment": machine(),
    }
    emit(result, options.json)


if __name__ == "__main__":
    main()
