"""What it takes until training begins: a command's first step, and the start and end of each trial.

    python benchmarks/startup.py [--turns 3] [--parts command single pair] [--json PATH]

Trials are tiny: SDCA on streets of 32x64, 20 steps, four evaluations with checkpoints, one at a time, none stopped.
Forms take turns, each a process of its own, and call the same training function:

* `command`: from `segadapt train` in a fresh folder to the first result shown, which follows the first step, its
  evaluation and its checkpoint. Beside it a script that runs the function in Ray Tune, and `segadapt --help`.
* `single`: trials in one process, with a thread for each core. `bare` calls the function again and again without Ray,
  and writes checkpoints; `plain` is Ray Tune with `reuse_actors`, Optuna's searcher in memory and nothing recorded;
  `segadapt` a search.
* `pair`: trials of two workers. `nested` is Ray Train's `TorchTrainer` in a function of Ray Tune, with health checks
  each 0.1 s and without the preemption watcher; `segadapt` a search.

A trial's time is that from its start to the next one's, the first left out: it imports. CPU time is that of all
processes which descend from the form's. Parts of a trial: `prepare` from the function's start to the trainer's,
`train`, `report` inside reports, `end` to the function's end, `between` from there to the start of the next one.
"""

from __future__ import annotations  # evaluated, those of a class would lack their names in Ray's processes

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from search_overhead import TINY, plain_ray
from segadapt.platform.trial.environment import machine

SETTINGS = {**TINY, "trainer.steps": 20, "trainer.eval_every": 5}
METHOD = "sdca"
METRIC = "target_val/miou"
FORMS = {
    "command": ("help", "script", "segadapt"),
    "single": ("bare", "plain", "segadapt"),
    "pair": ("nested", "segadapt"),
}
TRIALS = {"single": 8, "pair": 3}
ALL_CORES = os.cpu_count() or 1
"""Threads of a trial that runs alone, as `segadapt` gives it."""


class Notes:
    """A file to which all processes of a form add when something happened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, what: str) -> None:
        """Add a line."""
        with self.path.open("a") as file:
            file.write(json.dumps([what, time.time()]) + "\n")

    def read(self) -> list[tuple[str, float]]:
        """Return what was added, with its time."""
        return [tuple(json.loads(line)) for line in self.path.read_text().splitlines()]


def noted_training(notes: Notes) -> None:
    """Have this process's trainings note when they begin, report and end."""
    from segadapt.platform.trial import training

    class NotedTrainer(training.Trainer):
        def __init__(self, *, report: Callable[..., None], **parts: Any) -> None:
            def noted(metrics: Any, write: Any) -> None:
                notes.add("report")
                report(metrics, write)
                notes.add("reported")

            super().__init__(report=noted, **parts)

        def run(self, resume: Path | None = None) -> None:
            notes.add("train")
            super().run(resume)
            notes.add("trained")

    if training.Trainer.__name__ != "NotedTrainer":
        training.Trainer = NotedTrainer  # type: ignore[misc]


def trial_spec(folder: Path, threads: int) -> Any:
    """Return what the trials share, their shared stages computed; each worker has so many threads."""
    from segadapt.platform.settings.config import resolve
    from segadapt.platform.settings.resources import Allocation
    from segadapt.platform.storage.folders import Storage
    from segadapt.platform.trial import training
    from segadapt.platform.trial.spec import TrialSpec

    resources = Allocation(cpus=threads)
    spec = TrialSpec(
        storage=Storage(folder), experiment="startup", configs={METHOD: resolve(METHOD, SETTINGS)}, resources=resources
    )
    spec.folder.mkdir(parents=True)
    stages = TrialSpec(spec.storage, "stages", spec.configs, shared_stages=True)
    training.train(stages.trial("stages", {}), kept_in(folder / "stages-checkpoint"), None)
    return spec


def kept_in(folder: Path) -> Callable[..., None]:
    """Return a report that writes checkpoints into a folder, each over the last."""

    def report(reported: Any, write: Any) -> None:
        if write is not None:
            folder.mkdir(exist_ok=True)
            write(folder)

    return report


def reported_to_train() -> Callable[..., None]:
    """Return a report that hands results and checkpoints to Ray Train; it needs nothing of this file in a worker."""

    def report(reported: Any, write: Any) -> None:
        import ray.train

        if write is None:
            ray.train.report(reported.as_result())
            return
        with tempfile.TemporaryDirectory() as name:
            write(Path(name))
            ray.train.report(reported.as_result(), checkpoint=ray.train.Checkpoint.from_directory(name))

    return report


def run_bare(folder: Path, notes: Notes, trials: int) -> None:
    from segadapt.platform.trial import training

    spec = trial_spec(folder, ALL_CORES)
    noted_training(notes)
    for number in range(trials):
        notes.add("start")
        training.train(spec.trial(f"{number}", {}), kept_in(folder / "checkpoint"), None)
        notes.add("end")


def tuned(function: Callable[..., None], resources: Any, folder: Path, trials: int) -> None:
    """Run a function in Ray Tune as its documentation has it."""
    import optuna
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    from segadapt import search_spaces

    space, presets = search_spaces.load(METHOD)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searcher = OptunaSearch(
        space=space,
        metric=METRIC,
        mode="max",
        points_to_evaluate=[{key: presets["paper"][key] for key in space}],
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    results = tune.Tuner(
        tune.with_resources(function, resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            metric=METRIC,
            mode="max",
            num_samples=trials,
            max_concurrent_trials=1,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="startup",
            storage_path=str(folder / "ray"),
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
        ),
    ).fit()
    for error in results.errors:
        raise error


def run_plain(folder: Path, notes: Notes, trials: int) -> None:
    spec = trial_spec(folder, ALL_CORES)

    def function(values: dict[str, Any]) -> None:
        from ray import tune

        from segadapt.platform.trial import training

        notes.add("start")
        noted_training(notes)

        def report(reported: Any, write: Any) -> None:
            with tempfile.TemporaryDirectory() as name:
                write(Path(name))
                tune.report(reported.as_result(), checkpoint=tune.Checkpoint.from_directory(name))

        training.train(spec.trial(tune.get_context().get_trial_id(), values), report, None)
        notes.add("end")

    with plain_ray(dashboard=False):
        tuned(function, {"cpu": ALL_CORES}, folder, trials)


def run_nested(folder: Path, notes: Notes, trials: int) -> None:
    os.environ |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    spec = trial_spec(folder, 1)

    report = reported_to_train()

    def worker(loop: dict[str, Any]) -> None:
        import ray.train

        from segadapt.platform.trial import training

        if ray.train.get_context().get_world_rank() == 0:
            noted_training(notes)

        training.train(spec.trial(loop["trial"], loop["values"]), report, None)

    def function(values: dict[str, Any]) -> None:
        import ray.train
        from ray import tune
        from ray.train.torch import TorchTrainer
        from ray.tune.integration.ray_train import TuneReportCallback

        notes.add("start")
        name = tune.get_context().get_trial_id()
        TorchTrainer(
            worker,
            train_loop_config={"trial": name, "values": values},
            scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=str(folder / "train"),
                callbacks=[TuneReportCallback()],
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            ),
        ).fit()
        notes.add("end")

    with plain_ray(dashboard=True):
        tuned(function, {"node:__internal_head__": 0.001}, folder, trials)


def run_segadapt(folder: Path, notes: Notes, trials: int, workers: int) -> None:
    import segadapt as api
    from segadapt.platform.experiment import tuning
    from segadapt.platform.settings.resources import Resources
    from segadapt.platform.storage.folders import Place
    from segadapt.platform.trial import launchers

    def noted(run: Callable[..., None]) -> Callable[..., None]:
        def function(values: dict[str, Any], spec: Any) -> None:
            from segadapt.platform.trial import launchers

            if spec.shared_stages:
                run(values, spec=spec)
                return
            notes.add("start")
            noted_training(notes)
            launchers.train_worker = noted_worker
            run(values, spec=spec)
            notes.add("end")

        return function

    def noted_worker(loop: dict[str, Any], run: Callable[..., None] = launchers.train_worker) -> None:
        import ray.train

        if ray.train.get_context().get_world_rank() == 0:
            noted_training(notes)
        run(loop)

    tuning.run_in_process = noted(launchers.run_in_process)
    tuning.run_with_ray_train = noted(launchers.run_with_ray_train)
    api.search(
        METHOD,
        SETTINGS,
        trials=trials,
        concurrent=1,
        sampler="random",
        scheduler="none",
        place=Place(folder / "runs"),
        resources=Resources(workers),
        say=lambda line: None,
    )


def run_script(folder: Path, notes: Notes) -> None:
    """What `command` compares with: the same first step in Ray Tune, its shared stages among what it does."""
    from segadapt.platform.settings.config import resolve
    from segadapt.platform.storage.folders import Storage
    from segadapt.platform.trial import training
    from segadapt.platform.trial.spec import TrialSpec

    spec = TrialSpec(Storage(folder), "startup", {METHOD: resolve(METHOD, SETTINGS | {"trainer.eval_every": 1})})

    def function(values: dict[str, Any]) -> None:
        from ray import tune

        from segadapt.platform.trial.spec import TrialSpec

        def report(reported: Any, write: Any) -> None:
            kept_in(folder / "checkpoint")(reported, write)
            tune.report(reported.as_result())
            notes.add("result")

        stages = TrialSpec(spec.storage, "stages", spec.configs, shared_stages=True)
        training.train(stages.trial("stages", {}), report, None)

    with plain_ray(dashboard=False):
        tuned(function, {"cpu": 1}, folder, 1)


def processor_seconds(root: int, known: dict[tuple[int, int], float]) -> float:
    """Return the processor time of a process and its descendants; `known` keeps that of each, for when it has ended."""
    parents, spent = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        process = int(path.parent.name)
        parents[process] = int(fields[1])
        spent[process] = int(fields[19]), sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    family = {root}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    known |= {(process, spent[process][0]): spent[process][1] for process in family & spent.keys()}
    return sum(known.values())


def watched(command: list[str], folder: Path) -> tuple[list[tuple[float, float]], list[tuple[float, str]]]:
    """Run a command in a folder; returns moments with the processor time until then, and with the lines it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "10000"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    samples, lines, known = [(time.time(), 0.0)], [], {}

    def read(output: Any) -> None:
        lines.extend((time.time(), line) for line in output)

    reader = threading.Thread(target=read, args=(process.stdout,))
    reader.start()
    while process.poll() is None:
        samples.append((time.time(), processor_seconds(process.pid, known)))
        time.sleep(0.1)
    reader.join()
    if process.returncode != 0:
        raise SystemExit("".join(line for _, line in lines))
    return samples, lines


def measure_command(form: str, folder: Path) -> dict[str, float]:
    """Return seconds from the command to its first result and to its end."""
    segadapt = str(Path(sys.executable).with_name("segadapt"))
    words = [f"{key}={value}" for key, value in (SETTINGS | {"trainer.eval_every": 1}).items()]
    notes = Notes(folder / "notes")
    command = {
        "help": [segadapt, "--help"],
        "script": [sys.executable, __file__, "--form", "script", "--folder", str(folder)],
        "segadapt": [segadapt, "train", METHOD, *words],
    }[form]
    samples, lines = watched(command, folder)
    begun, ended = samples[0][0], samples[-1][0]
    row = {"total_s": ended - begun, "cpu_s": samples[-1][1]}
    if form == "help":
        return row
    firsts = [at for at, line in lines if " step 1/" in line] if form == "segadapt" else [at for _, at in notes.read()]
    return {"first_s": firsts[0] - begun, "first_cpu_s": spent_until(samples, firsts[0])} | row


def measure_trials(form: str, workers: int, trials: int, folder: Path) -> dict[str, Any]:
    """Return seconds of a trial: wall, processor, and wall of its parts."""
    command = [sys.executable, __file__, "--form", form, "--folder", str(folder)]
    command += ["--trials", str(trials), "--workers", str(workers)]
    samples, _ = watched(command, folder)
    noted = Notes(folder / "notes").read()
    starts = [at for what, at in noted if what == "start"]
    ends = [at for what, at in noted if what == "end"]
    rows = []
    for number in range(1, trials - 1):
        first, last = starts[number], starts[number + 1]
        own = [(what, at) for what, at in noted if first <= at < last]
        begun, done = ([at for what, at in own if what == found] for found in ("train", "trained"))
        reports = [at for what, at in own if what == "report"], [at for what, at in own if what == "reported"]
        in_reports = sum(reports[1]) - sum(reports[0])
        rows.append(
            {
                "wall_s": last - first,
                "cpu_s": spent_until(samples, last) - spent_until(samples, first),
                "prepare_s": begun[0] - first,
                "train_s": done[0] - begun[0] - in_reports,
                "report_s": in_reports,
                "end_s": ends[number] - done[0],
                "between_s": last - ends[number],
            }
        )
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]} | {"trials": rows}


def spent_until(samples: list[tuple[float, float]], moment: float) -> float:
    return next((spent for at, spent in samples if at >= moment), samples[-1][1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--trials", type=int, help="of a form, at least 3; default: 8, of two workers 3")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--form", help=argparse.SUPPRESS)  # what the measuring processes are called with
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.form:
        run_form(options)
        return
    results: dict[str, dict[str, list[dict[str, Any]]]] = {part: {} for part in options.parts}
    for _, part in itertools.product(range(options.turns), options.parts):
        for form in FORMS[part]:
            load = os.getloadavg()[0]
            with tempfile.TemporaryDirectory() as name:
                if part == "command":
                    row = measure_command(form, Path(name))
                else:
                    trials = options.trials or TRIALS[part]
                    row = measure_trials(form, 2 if part == "pair" else 1, trials, Path(name))
            results[part].setdefault(form, []).append({"load": load, **row})
            shown = {key: round(value, 2) for key, value in row.items() if key != "trials"}
            print(part, form, f"load {load:.1f}", shown, flush=True)
        if options.json:  # after each turn: a later one may fail on a busy machine
            record = {"settings": SETTINGS, "environment": machine(), "results": results, "summary": summary(results)}
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(summary(results), indent=1))


def run_form(options: argparse.Namespace) -> None:
    """Run one form in this process."""
    notes = Notes(options.folder / "notes")
    match options.form:
        case "script":
            run_script(options.folder, notes)
        case "bare":
            run_bare(options.folder, notes, options.trials)
        case "plain":
            run_plain(options.folder, notes, options.trials)
        case "nested":
            run_nested(options.folder, notes, options.trials)
        case "segadapt":
            run_segadapt(options.folder, notes, options.trials, options.workers)


def summary(results: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Return median, lowest and highest of each number, and segadapt's ratio to the others, turn by turn."""
    found: dict[str, Any] = {}
    for part, forms in results.items():
        for form, rows in forms.items():
            numbers = {key: [row[key] for row in rows] for key in rows[0] if key != "trials"}
            found[f"{part}/{form}"] = {key: spread(values) for key, values in numbers.items()}
            if form in ("segadapt", "help"):
                continue
            for key in numbers.keys() & {"first_s", "first_cpu_s", "wall_s", "cpu_s"}:
                ratios = [own[key] / other[key] for own, other in zip(forms["segadapt"], rows, strict=True)]
                found[f"{part}/segadapt by {form}"] = found.get(f"{part}/segadapt by {form}", {}) | {
                    key: spread(ratios)
                }
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


if __name__ == "__main__":
    main()
