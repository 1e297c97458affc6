"""Training steps until a search finds what random search finds, with real trainings on a small streets and real Ray.

    python benchmarks/search_efficiency_streets.py [--seeds 0 1 2] [--minutes 60] [--json PATH]

For each seed, three searches of PLCA, two trials at a time, as small as they go: trainings as for the surrogate
(`surrogate/collect.py`) on smaller images and with about half the steps, but as many evaluations:

- random: `segadapt search --sampler random --scheduler none`, 16 trials besides the published setting. Target mIoU of
  the best of the 16 after its last step is what the others look for; the published setting is left out of it.
- plain: `tune.Tuner` with `OptunaSearch` and `ASHAScheduler` (reduction factor 3), as Ray's documentation has them. Its
  trainable is the platform's own, so that both train the same.
- segadapt: `segadapt search` as it comes.

The two try the published setting first. They are stopped when a full-length trial of another setting has reached the
target, and given up after the steps of 16 full trials. Counted are the steps that all trials had reported by then, in
the order in which the driver heard of them; the source-only warm-up, which all trials of a seed start from, is computed
once and not counted. The seed is that of the trainings (the same in all searches) and of the samplers; random search
has other ones, since TPE begins with random settings, which would be the same.

Searches that the JSON file already has are not run again.
"""

import argparse
import itertools
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ray import tune

import segadapt as api
from segadapt import search_spaces
from segadapt.platform.experiment.record import Record
from segadapt.platform.experiment.tuning import load_study
from segadapt.platform.settings.config import parse_assignments
from segadapt.platform.storage.folders import Place, Storage
from segadapt.platform.tracking.client import mlflow_client
from segadapt.platform.trial.environment import machine
from segadapt.platform.trial.launchers import run_in_process
from segadapt.platform.trial.spec import TrialSpec
from surrogate.collect import METHOD
from surrogate.collect import SETTINGS as SURROGATE_SETTINGS

METRIC = "target_val/miou"
RANDOM_SEED = 1000
"""Added to the seed for random search."""
MOST_TRIALS = 300
CONCURRENT = 2
INTERRUPTED = 130
"""Exit status of a search that was ended by SIGINT."""
ARMS = 3


class Size(NamedTuple):
    """How much is trained."""

    full: int = 64
    """Steps of a trial that is not stopped."""
    grace: int = 8
    """Steps between its evaluations, before the first of which none is stopped."""
    random_trials: int = 16
    others: Mapping[str, Any] = {}
    """Further settings of all trials."""

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings of all trials."""
        lengths = {"trainer.steps": self.full, "trainer.eval_every": self.grace}
        return {**SURROGATE_SETTINGS, **lengths, "data.streets.height": 32, "data.streets.width": 64, **self.others}

    def is_over(self, steps: int) -> bool:
        """Return whether a search is given up: it has taken the steps of random search."""
        return steps > self.random_trials * self.full


class Report(NamedTuple):
    """An evaluation, as the driver heard of it."""

    time: float
    trial: str
    published: bool
    """Whether the trial has the published setting."""
    step: int
    miou: float


def steps_to_match(reports: Sequence[Report], target: float, size: Size, *, published: bool) -> dict[str, int] | None:
    """Return the steps and trials until a full-length trial has reached the target; None if none has.

    Args:
        reports: In the order of their times.
        target: Target mIoU.
        size: How much is trained.
        published: Whether the published setting counts.
    """
    done: dict[str, int] = {}
    for report in reports:
        done[report.trial] = report.step
        if report.step == size.full and report.miou >= target and (published or not report.published):
            return {"steps": sum(done.values()), "trials": len(done)}
    return None


class Watch(tune.Stopper):
    """Keep what trials report, and end the search when it has matched or is given up."""

    def __init__(self, published: Mapping[str, Any], target: float, size: Size) -> None:
        self.reports: list[Report] = []
        self._size = size
        self._published = published
        self._target = target

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Keep a report; stops no trial by itself."""
        published = result["config"] == self._published
        self.reports.append(Report(time.time(), trial_id, published, result["step"], result[METRIC]))
        return False

    def stop_all(self) -> bool:
        """Return whether the search is over."""
        done = {report.trial: report.step for report in self.reports}
        matched = steps_to_match(self.reports, self._target, self._size, published=False)
        return matched is not None or self._size.is_over(sum(done.values()))


def run_plain(folder: Path, seed: int, target: float, size: Size) -> list[Report]:
    """Search by Ray Tune as documented; the folder has the seed's warm-up."""
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    from segadapt.platform.cluster.connection import connect

    storage = Storage(folder)
    spec = TrialSpec(storage, "plain", Record.load(storage, "random").shared_configs)
    space, presets = search_spaces.load(METHOD)
    watch = Watch(presets["paper"], target, size)
    with connect(None):
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(run_in_process, spec=spec), {"cpu": 1}),
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                search_alg=OptunaSearch(
                    space=space, metric=METRIC, mode="max", points_to_evaluate=[presets["paper"]], seed=seed
                ),
                scheduler=ASHAScheduler(time_attr="step", max_t=size.full, grace_period=size.grace, reduction_factor=3),
                num_samples=MOST_TRIALS,
                max_concurrent_trials=CONCURRENT,
                reuse_actors=True,  # saves the start of a process for each trial; acts on no step
            ),
            run_config=tune.RunConfig(
                name="plain",
                storage_path=str(storage.experiments),
                verbose=0,
                stop=watch,
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            ),
        )
        tuner.fit()
    return watch.reports


def run_segadapt(
    folder: Path,
    name: str,
    seeds: tuple[int, int],
    trials: int,
    size: Size,
    *options: str,
    target: float | None = None,
) -> list[Report]:
    """Search by the command; with a target, interrupt it when it has matched or is given up.

    Args:
        folder: Its storage.
        name: Of the search.
        seeds: Of the trainings, and of the sampler.
        trials: At most.
        size: How much is trained.
        options: Further ones of the command.
        target: Target mIoU.
    """
    settings = [f"{key}={value}" for key, value in {**size.settings, "seed": seeds[0]}.items()]
    command = [str(Path(sys.executable).with_name("segadapt")), "search", METHOD, "--name", name, *settings, *options]
    command += [
        "--trials",
        str(trials),
        "--seed",
        str(seeds[1]),
        "--concurrent",
        str(CONCURRENT),
        "--storage",
        str(folder),
    ]
    storage = Storage(folder)
    with (folder / f"{name}.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        while process.poll() is None:
            time.sleep(1)
            if target is not None and has_ended(storage, name, target, size):
                process.send_signal(signal.SIGINT)
                process.wait()
    if process.returncode not in (0, INTERRUPTED):
        raise SystemExit(f"The search failed:\n{(folder / f'{name}.log').read_text()}")
    return reports_of(storage, name)


def has_ended(storage: Storage, name: str, target: float, size: Size) -> bool:
    """Return whether a search has matched or is to be given up."""
    import optuna

    url = Place(storage.root).study_url
    if name not in optuna.get_all_study_names(url):
        return False
    trials = load_study(name, url).get_trials(deepcopy=False)
    matched = any(trial.number > 0 and trial.intermediate_values.get(size.full, 0) >= target for trial in trials)
    return matched or size.is_over(sum(max(trial.intermediate_values, default=0) for trial in trials))


def reports_of(storage: Storage, name: str) -> list[Report]:
    """Return what the trials of a segadapt search reported, in order of time, from MLflow."""
    client = mlflow_client(Place(storage.root).tracking_url)
    return sorted(
        Report(entry.timestamp / 1000, row.name, row.name == f"{METHOD}-001", entry.step, entry.value)
        for row in api.runs(name, place=Place(str(storage.root))).rows
        if row.kind == "trial"
        for entry in client.get_metric_history(row.run_id, METRIC)
    )


def ends(reports: Sequence[Report]) -> list[list[float]]:
    """Return step and mIoU of each trial's last report, the published setting first, then in order of their begin."""
    found = {(not report.published, report.trial): report for report in reports}
    first = {key: min(r.time for r in reports if r.trial == key[1]) for key in found}
    order = sorted(found, key=lambda key: (key[0], first[key]))
    return [[found[key].step, found[key].miou] for key in order]


def summary(reports: Sequence[Report], target: float, size: Size) -> dict[str, Any]:
    """Return what a search took by both readings, and how its trials ended."""
    return {
        "matched": steps_to_match(reports, target, size, published=True),
        "matched_without_published": steps_to_match(reports, target, size, published=False),
        "ends": ends(reports),
    }


def measure(seed: int, size: Size) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the searches of a seed; yields the name and what is known of each when it has ended."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = ("--sampler", "random", "--scheduler", "none")
        seeds = seed, RANDOM_SEED + seed
        reports = run_segadapt(folder, "random", seeds, size.random_trials + 1, size, *options)
        (_, published), *others = ends(reports)
        target = max(miou for _, miou in others)
        yield "random", {"target": target, "published": published, "ends": [miou for _, miou in others]}
        yield "plain", summary(run_plain(folder, seed, target, size), target, size)
        reports = run_segadapt(folder, "segadapt", (seed, seed), MOST_TRIALS, size, target=target)
        yield "segadapt", summary(reports, target, size)


def text(row: Mapping[str, Any]) -> str:
    """Return a row for the screen."""
    if "target" in row:
        return f"target {row['target']:.4f}, published setting {row['published']:.4f}"
    return f"matched {row['matched']}, without the published setting {row['matched_without_published']}"


def medians(seeds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the median steps over the seeds of each arm and reading; a search given up counts as infinite."""
    found: dict[str, Any] = {}
    for arm, reading in itertools.product(("plain", "segadapt"), ("matched", "matched_without_published")):
        steps = [row[arm][reading]["steps"] if row[arm][reading] else float("inf") for row in seeds.values()]
        middle = statistics.median(steps)
        found[f"{arm} {reading}"] = None if math.isinf(middle) else middle
    return found


def record_of(rows: Mapping[str, Mapping[str, Any]], size: Size) -> dict[str, Any]:
    """Return what is written; medians are of the seeds whose searches have all ended."""
    setting = {
        "method": METHOD,
        **size.settings,
        "random_trials": size.random_trials,
        "given_up_after_steps": size.random_trials * size.full,
        "concurrent": CONCURRENT,
    }
    whole = {seed: row for seed, row in rows.items() if len(row) == ARMS}
    found = medians(whole) if whole else None
    return {"setting": setting, "environment": machine(), "median_steps": found, "seeds": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=60, help="after which no further seed is begun")
    parser.add_argument("--steps", type=int, default=Size().full, help="of a trial that is not stopped")
    parser.add_argument("--eval-every", type=int, default=Size().grace)
    parser.add_argument("--random-trials", type=int, default=Size().random_trials)
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    others = parse_assignments(options.settings)
    size = Size(options.steps, options.eval_every, options.random_trials, others)
    deadline = time.monotonic() + 60 * options.minutes
    known = json.loads(options.json.read_text())["seeds"] if options.json and options.json.is_file() else {}
    rows: dict[str, dict[str, Any]] = {seed: row for seed, row in known.items() if len(row) == ARMS}
    for seed in map(str, options.seeds):
        if seed in rows or time.monotonic() > deadline:
            continue
        rows[seed] = {}
        for arm, row in measure(int(seed), size):
            rows[seed][arm] = row
            print(f"seed {seed} {arm:9} {text(row)}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(record_of(rows, size), indent=1) + "\n")


if __name__ == "__main__":
    main()
