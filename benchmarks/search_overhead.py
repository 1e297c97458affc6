"""What a search costs beside its training: trials that do nothing, by segadapt's search and by plain Ray Tune.

    python benchmarks/search_overhead.py [--trials 200] [--samplers tpe random] [--repeats 2] [--json PATH]

Both run the same trials two at a time in reused processes, each a few reports without a checkpoint, over PLCA's search
space, with the same Optuna sampler, and stop trials at the same rungs. segadapt's side is
`platform.search.run_experiment`: the study in SQLite, MLflow in SQLite, state saved each second. Plain Ray Tune's is
`OptunaSearch` and `ASHAScheduler` as documented: study and rungs in memory, Tune's loggers on, no MLflow. `recorded`
is the same with the study in SQLite and Ray's `MLflowLoggerCallback` to SQLite. Each search is a process of its own;
they take turns. Times count from the first trial's start, without the start of Ray, to the last record in MLflow.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

METHOD = "plca"
METRIC = "target_val/miou"
STEPS = 240
GRACE = 60
FACTOR = 2
CONCURRENT = 2
FORMS = ("segadapt", "plain", "recorded")
TINY = {
    "data.streets.edition": 1,
    "data.streets.height": 32,
    "data.streets.width": 64,
    "data.streets.train_images": 16,
    "data.streets.val_images": 6,
    "warmup.steps": 2,
    "trainer.batch_size": 4,
}
"""Settings of trials that take hardly any time."""
WINDOW = 100


def noop(values: dict[str, Any], starts: str, reports: int) -> None:
    """Report a value that depends on the settings alone, and end."""
    from ray import tune

    with Path(starts).open("a") as file:
        file.write(f"{time.time()}\n")
    value = 0.5 + 0.1 * values["method.aggregation_weight"] - 0.01 * abs(values["method.regulariser_level"] - 9)
    for report in range(1, reports + 1):
        tune.report(
            {"step": STEPS * report // reports, METRIC: value * report / reports, "finished": report == reports}
        )


def trainable(starts: Path, reports: int) -> Any:
    from ray import tune

    return tune.with_resources(tune.with_parameters(noop, starts=str(starts), reports=reports), {"cpu": 1})


def run_segadapt(folder: Path, trials: int, reports: int, sampler: str) -> None:
    from segadapt import search_spaces
    from segadapt.platform.experiment import tuning as search
    from segadapt.platform.experiment.naming import Labels
    from segadapt.platform.settings.config import resolve
    from segadapt.platform.storage.folders import Place, Storage
    from segadapt.platform.tracking.tracker import RunInfo, Tracker
    from segadapt.platform.trial.spec import TrialSpec

    space, presets = search_spaces.load(METHOD)
    storage = Storage(folder)
    spec = TrialSpec(storage=storage, experiment="overhead", configs={METHOD: resolve(METHOD, {})})
    plan = search.SearchPlan(
        spaces={METHOD: space},
        first={METHOD: presets["paper"]},
        trials=trials,
        concurrent=CONCURRENT,
        seed=0,
        steps=STEPS,
        grace_steps=GRACE,
        study_url=Place(storage.root).study_url,
        sampler=sampler,
    )
    search._trainable = lambda spec: trainable(folder / "starts", reports)
    tracker = Tracker(Place(storage.root))  # makes MLflow's database, which is part of the start
    tracker.start(RunInfo("overhead", "overhead", "overhead", {}, {}))
    tracker.close(3600)
    tracker = Tracker(Place(storage.root))
    labels = Labels(experiment="overhead", kind="trial", names=[], tags={}, parent_key="overhead")
    search.run_experiment(spec, labels, STEPS, tracker, "overhead", plan)
    (folder / "fitted").write_text(str(time.time()))
    tracker.close(3600)


def run_plain(folder: Path, trials: int, reports: int, sampler: str, *, recorded: bool = False) -> None:
    import optuna
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    from segadapt import search_spaces

    samplers = {
        "random": optuna.samplers.RandomSampler(seed=0),
        "tpe": optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=0),  # as segadapt's is
    }
    space, presets = search_spaces.load(METHOD)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    callbacks, storage = [], None
    if recorded:
        from mlflow import MlflowClient
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        uri = f"sqlite:///{folder / 'mlflow.db'}"
        MlflowClient(uri).create_experiment("overhead", artifact_location=(folder / "artifacts").as_uri())
        callbacks = [MLflowLoggerCallback(tracking_uri=uri, experiment_name="overhead")]
        storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'optuna.db'}")
    tuner = tune.Tuner(
        trainable(folder / "starts", reports),
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="max",
            search_alg=OptunaSearch(
                space=space,
                metric=METRIC,
                mode="max",
                points_to_evaluate=[presets["paper"]],
                sampler=samplers[sampler],
                storage=storage,
            ),
            scheduler=ASHAScheduler(time_attr="step", max_t=STEPS, grace_period=GRACE, reduction_factor=FACTOR),
            num_samples=trials,
            max_concurrent_trials=CONCURRENT,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="overhead", storage_path=str(folder / "ray"), verbose=0, callbacks=callbacks),
    )
    tuner.fit()
    (folder / "fitted").write_text(str(time.time()))


@contextmanager
def plain_ray(*, dashboard: bool, address: str = "local") -> Iterator[None]:
    """Start Ray, or join it, with what a benchmark needs on any machine; none of it acts on speed."""
    for name, value in {
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
    }.items():
        os.environ[name] = value
    import ray

    ray.init(address, log_to_driver=False, **({"include_dashboard": dashboard} if address == "local" else {}))
    yield
    ray.shutdown()


def measure(form: str, trials: int, reports: int, sampler: str) -> dict[str, Any]:
    """Run one search in this process and say what it took."""
    if form == "segadapt":
        from segadapt.platform.cluster.connection import connect
    else:

        def connect(address: None) -> Any:
            return plain_ray(dashboard=False)

    with tempfile.TemporaryDirectory() as name, connect(None):
        folder = Path(name)
        samples: list[tuple[float, float, int]] = []
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.1):
                samples.append(
                    (time.time(), time.process_time(), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
                )

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        match form:
            case "segadapt":
                run_segadapt(folder, trials, reports, sampler)
            case _:
                run_plain(folder, trials, reports, sampler, recorded=form == "recorded")
        end = time.time()
        ended.set()
        watcher.join()
        starts = sorted(map(float, (folder / "starts").read_text().split()))
        fitted = float((folder / "fitted").read_text())
    return summary(starts, fitted, end, samples)


def summary(starts: list[float], fitted: float, end: float, samples: list[tuple[float, float, int]]) -> dict[str, Any]:
    """Return times per trial, overall and by window of `WINDOW` trials, and the driver's memory."""

    def driver(moment: float) -> tuple[float, int]:
        return next(((cpu, peak) for at, cpu, peak in samples if at >= moment), samples[-1][1:])

    edges = [*starts[::WINDOW], fitted]
    windows = []
    for number, (left, right) in enumerate(itertools.pairwise(edges)):
        count = min(WINDOW, len(starts) - number * WINDOW)
        (cpu_left, _), (cpu_right, peak) = driver(left), driver(right)
        windows.append(
            {
                "trials": count,
                "wall_ms": 1e3 * (right - left) / count,
                "driver_cpu_ms": 1e3 * (cpu_right - cpu_left) / count,
                "driver_peak_mb": peak / 1e6,
            }
        )
    trials = len(starts)
    return {
        "trials": trials,
        "wall_ms": 1e3 * (end - starts[0]) / trials,
        "wall_without_drain_ms": 1e3 * (fitted - starts[0]) / trials,
        "driver_cpu_ms": 1e3 * (samples[-1][1] - driver(starts[0])[0]) / trials,
        "driver_mb_first": driver(starts[0])[1] / 1e6,
        "driver_mb_last": samples[-1][2] / 1e6,
        "windows": windows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--reports", type=int, default=4, help="of a trial that is not stopped")
    parser.add_argument("--samplers", nargs="+", default=["tpe", "random"])
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)  # what the measuring processes are called with
    options = parser.parse_args()
    if options.form:
        row = measure(options.form, options.trials, options.reports, options.samplers[0])
        Path(options.json).write_text(json.dumps(row))
        return
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {name: {form: [] for form in FORMS} for name in options.samplers}
    with tempfile.TemporaryDirectory() as folder:
        for _, sampler, form in itertools.product(range(options.repeats), options.samplers, options.forms):
            record = Path(folder) / "row.json"
            command = [sys.executable, __file__, "--form", form, "--samplers", sampler, "--json", str(record)]
            command += ["--trials", str(options.trials), "--reports", str(options.reports)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            row = json.loads(record.read_text())
            rows[sampler][form].append(row)
            print(f"{sampler:8}{form:10}" + text(row), flush=True)
    ratios = {
        name: {
            form: {
                key: statistics.median(row[key] for row in found["segadapt"])
                / statistics.median(row[key] for row in found[form])
                for key in ("wall_ms", "driver_cpu_ms")
            }
            for form in FORMS[1:]
            if found["segadapt"] and found[form]
        }
        for name, found in rows.items()
    }
    print(json.dumps(ratios, indent=1))
    if options.json:
        from measuring import cpu_model  # brings torch, which must not count as memory of plain Ray Tune's driver
        from segadapt.platform.trial.environment import machine

        setting = {"trials": options.trials, "reports": options.reports, "concurrent": CONCURRENT, "cpu": cpu_model()}
        record = {"setting": setting, "environment": machine(), "results": rows, "ratios": ratios}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def text(row: dict[str, Any]) -> str:
    """Return a row for the screen."""
    keys = ("wall_ms", "wall_without_drain_ms", "driver_cpu_ms", "driver_mb_first", "driver_mb_last")
    parts = [f"{key} {row[key]:.0f}" for key in keys]
    parts.append("windows " + " ".join(f"{window['wall_ms']:.0f}" for window in row["windows"]))
    return ", ".join(parts)


if __name__ == "__main__":
    main()
