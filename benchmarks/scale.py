"""What a search of many trials on many nodes costs its driver, its databases and whoever looks at it.

    python benchmarks/scale.py [--trials 2000] [--nodes 16] [--repeats 1] [--json PATH]

A Ray cluster of a head and `--nodes` raylets on loopback, each with 8 GPUs and 16 CPUs that Ray only counts; a trial
takes a node. Trials train nothing: each reports up to four evaluations of 58 numbers with a checkpoint of the files
that a real one has, and imports no torch, so that 16 of them fit in memory. All else is `segadapt.platform`: the
search by `api.search` with its shared stage, sampler, scheduler, study and MLflow in SQLite, plots. Then, each in a
process of its own: `segadapt status`, `segadapt runs`, `--resume` of the ended search, `--extend` by 16 trials.

Times are wall and processor time. `driver` is the thread that runs Tune's loop, `sender` the one that writes to MLflow,
`process` the whole driver process. They are given per block of 200 trials.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import segadapt as api
from search_overhead import METRIC, TINY
from segadapt.platform.settings.resources import Resources
from segadapt.platform.storage.folders import Place
from segadapt.platform.tracking.tracker import Tracker

NAME = "scale"
METHOD = "plca"
BLOCK = 200
REPORTS = 4
GPUS, CPUS = 8, 16
MORE = 16
STATE_BYTES = 100_000
SETTINGS = {**TINY, "trainer.steps": 240, "trainer.eval_every": 60}
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on all systems: Ray then takes 127.0.0.1 as its address
    "RAY_enable_worker_prestart": "0",  # else each raylet starts a process for each of its CPUs
    "RAY_prestart_worker_first_driver": "0",
    "SEGADAPT_MIN_FREE_BYTES": "0",
}


def tiny_trial(values: dict[str, Any], template: str, starts: str) -> None:
    """Report what depends on the settings alone, each time with a checkpoint."""
    from ray import tune

    with Path(starts).open("a") as file:
        file.write(f"{time.time()}\n")
    summary = json.loads((Path(template) / "evaluation.json").read_text())
    value = 0.5 + 0.1 * values["method.aggregation_weight"] - 0.01 * abs(values["method.regulariser_level"] - 9)
    for report in range(1, REPORTS + 1):
        step = SETTINGS["trainer.steps"] * report // REPORTS
        metrics = {**summary["metrics"], METRIC: value * report / REPORTS, "time/evaluation": 0.1, "step": step}
        metrics |= {"stage": "adapt", "stage_finished": report == REPORTS, "finished": report == REPORTS}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shutil.copytree(template, folder, dirs_exist_ok=True)
            (folder / "evaluation.json").write_text(json.dumps({**summary, "metrics": metrics}))
            tune.report({**metrics, "fingerprint": "scale"}, checkpoint=tune.Checkpoint.from_directory(folder))


def write_template(folder: Path) -> None:
    """Write the files of a checkpoint of a trial with 19 classes, but a small state."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    classes = [f"class {number}" for number in range(19)]
    confusion = np.eye(19, dtype=int) * 10**6 + random.integers(0, 20_000, (19, 19))
    names = [f"{domain}/iou/{name}" for domain in ("target_val", "source_val") for name in classes]
    names += [f"loss/term_{number}" for number in range(18)]
    domain = {"confusion": confusion.tolist()}
    summary = {"classes": classes, "target_val": domain, "source_val": domain, "metrics": dict.fromkeys(names, 0.5)}
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(summary))
    blocks = random.integers(0, 255, (64, 96, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    Image.fromarray(blocks).save(folder / "gallery.png")
    (folder / "state.pt").write_bytes(random.bytes(STATE_BYTES))
    digest = hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"sha256": {"state.pt": digest}}))


class Sample(NamedTuple):
    """The driver process at a moment."""

    time: float
    driver_s: float
    sender_s: float
    process_s: float
    resident_mb: float
    waiting: int
    """Records in the outbox that MLflow does not have."""
    results: int
    """Reports that the driver has dealt with."""
    records: int
    """Records that MLflow has."""
    snapshots: int
    snapshot_s: float
    """Wall time of all snapshots of Tune's state so far, in the driver's thread."""
    study_mb: float
    mlflow_mb: float
    load: float


class Watch:
    """Samples this process; knows the tracker once the search has made it."""

    def __init__(self, storage: Path) -> None:
        self.samples: list[Sample] = []
        self.results = 0
        self.snapshots: list[float] = []
        self._tracker: Any = None
        self._storage = storage
        self._driver = time.pthread_getcpuclockid(threading.main_thread().ident or 0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        from ray.tune.execution.tune_controller import TuneController

        from segadapt.platform.experiment.events import Events
        from segadapt.platform.tracking.tracker import Tracker

        def made(tracker: Any, *_: Any) -> None:
            self._tracker = tracker

        def heard(*_: Any) -> None:
            self.results += 1

        _after(Tracker, "__init__", made)
        _after(Events, "on_trial_result", heard)
        _timed(TuneController, "save_to_dir", self.snapshots)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.samples.append(self._sample())

    def at(self, moment: float) -> Sample:
        """Return the first sample at a time or later."""
        return next((sample for sample in self.samples if sample.time >= moment), self.samples[-1])

    def _run(self) -> None:
        while not self._ended.wait(0.2):
            self.samples.append(self._sample())

    def _sample(self) -> Sample:
        box, sender = (self._tracker._outbox, self._tracker._thread) if self._tracker else (None, None)
        is_sending = sender is not None and sender.is_alive()
        before = self.samples[-1].sender_s if self.samples else 0.0
        return Sample(
            time=time.time(),
            driver_s=time.clock_gettime(self._driver),
            sender_s=time.clock_gettime(time.pthread_getcpuclockid(sender.ident)) if is_sending else before,
            process_s=time.process_time(),
            resident_mb=int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6,
            waiting=box.waiting if box else 0,
            results=self.results,
            records=box._delivered if box else 0,
            snapshots=len(self.snapshots),
            snapshot_s=sum(self.snapshots),
            study_mb=_megabytes(self._storage / "optuna.db"),
            mlflow_mb=_megabytes(self._storage / "mlflow.db"),
            load=os.getloadavg()[0],
        )


def _after(owner: type, name: str, call: Callable[..., None]) -> None:
    """Have a method tell when it has returned."""
    method = getattr(owner, name)

    def told(*arguments: Any, **named: Any) -> Any:
        found = method(*arguments, **named)
        call(*arguments)
        return found

    setattr(owner, name, told)


def _timed(owner: type, name: str, seconds: list[float]) -> None:
    method = getattr(owner, name)

    def timed(*arguments: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        found = method(*arguments, **named)
        seconds.append(time.perf_counter() - begun)
        return found

    setattr(owner, name, timed)


def _megabytes(path: Path) -> float:
    return path.stat().st_size / 1e6 if path.is_file() else 0.0


@dataclass(frozen=True)
class Paths:
    """Files that the benchmark's processes share."""

    root: Path

    @property
    def storage(self) -> Path:
        """Of the search."""
        return self.root / "runs"

    @property
    def template(self) -> Path:
        """Of checkpoints."""
        return self.root / "template"

    @property
    def starts(self) -> Path:
        """Times at which trials began."""
        return self.root / "starts"

    @property
    def row(self) -> Path:
        """What a process has measured."""
        return self.root / "row.json"


def run_session(kind: str, paths: Paths, address: str, trials: int, sampler: str, profile: Path | None) -> None:
    """Search, resume or extend in this process, and write down what it took."""
    begun = time.time()
    from segadapt.platform.experiment import tuning as search

    real = search._trainable
    search._trainable = lambda spec: real(spec) if spec.shared_stages else _tiny(paths)
    Tracker.close.__defaults__ = (36_000.0,)  # all of it is to be written, however long it takes
    place = Place(paths.storage)
    running: Any = {"address": address, "resources": Resources(launcher="inprocess", gpus=float(GPUS))}
    known = len(_starts(paths))
    with Watch(paths.storage) as watch, _profiled(profile):
        match kind:
            case "search":
                outcome = api.search(
                    METHOD, SETTINGS, trials=trials, sampler=sampler, name=NAME, place=place, **running
                )
            case "resume":
                outcome = api.search(resume=NAME, place=place, **running)
            case "extend":
                outcome = api.search(extend=NAME, trials=MORE, place=place, **running)
    row: dict[str, Any] = {"parts_s": dict(outcome.seconds), "seconds": time.time() - begun}
    starts = _starts(paths)[known:]
    if starts:
        row["until_first_trial_s"] = starts[0] - begun
    if kind == "search":
        row |= {"blocks": blocks(starts, watch), **totals(starts, watch, paths)}
    paths.row.write_text(json.dumps(row))


def _tiny(paths: Paths) -> Any:
    from ray import tune

    trial = tune.with_parameters(tiny_trial, template=str(paths.template), starts=str(paths.starts))
    return tune.with_resources(trial, {"cpu": CPUS, "gpu": GPUS})


def _starts(paths: Paths) -> list[float]:
    return sorted(map(float, paths.starts.read_text().split())) if paths.starts.is_file() else []


@contextmanager
def _profiled(path: Path | None) -> Iterator[None]:
    """Profile this thread, if asked for."""
    if path is None:
        yield
        return
    import cProfile

    with cProfile.Profile() as profile:
        yield
    profile.dump_stats(path)


def blocks(starts: Sequence[float], watch: Watch) -> list[dict[str, float]]:
    """Return what each block of trials took, from the first one's start to that of the next block's first."""
    last = next(sample.time for sample in watch.samples if sample.results == watch.results)
    found = []
    for number in range(0, len(starts), BLOCK):
        count = len(starts[number : number + BLOCK])
        edges = [starts[number], (*starts, last)[number + count]]
        left, right = map(watch.at, edges)
        wall_s = edges[1] - edges[0]
        found.append(
            {
                "trials": count,
                "wall_ms": 1e3 * wall_s / count,
                "driver_cpu_ms": 1e3 * (right.driver_s - left.driver_s) / count,
                "sender_cpu_ms": 1e3 * (right.sender_s - left.sender_s) / count,
                "process_cpu_ms": 1e3 * (right.process_s - left.process_s) / count,
                "results_per_s": (right.results - left.results) / wall_s,
                "records_per_s": (right.records - left.records) / wall_s,
                "records_waiting": right.waiting,
                "snapshots": right.snapshots - left.snapshots,
                "snapshots_wall_ms": 1e3 * (right.snapshot_s - left.snapshot_s) / count,
                "resident_mb": right.resident_mb,
                "study_mb": right.study_mb,
                "mlflow_mb": right.mlflow_mb,
                "load": right.load,
            }
        )
    return found


def totals(starts: Sequence[float], watch: Watch, paths: Paths) -> dict[str, Any]:
    """Return what the whole search took and left."""
    last = watch.samples[-1]
    heard = next(sample for sample in watch.samples if sample.results == watch.results)
    wall_s = heard.time - starts[0]
    states = sorted((paths.storage / "ray" / NAME).glob("experiment_state-*.json"))
    return {
        "trials": len(starts),
        "reports": watch.results,
        "results_per_s": watch.results / wall_s,
        "records": last.records,
        "records_per_s": last.records / (last.time - starts[0]),
        "records_waiting_at_the_last_report": heard.waiting,
        "drained_after_s": last.time - heard.time,
        "study_mb": last.study_mb,
        "mlflow_mb": last.mlflow_mb,
        "artifacts_mb": _folder_mb(paths.storage / "mlartifacts"),
        "ray_mb": _folder_mb(paths.storage / "ray"),
        "tune_state_mb": _megabytes(states[-1]),
        "resident_mb_at_most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }


def _folder_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def time_command(*words: str, cwd: Path) -> dict[str, float]:
    """Return what a command took."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd=cwd)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": time.time() - begun, "cpu_s": cpu_s}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the cluster, the search on it and the commands after it."""
    from segadapt.platform.cluster.connection import worker_environment

    os.environ.update(worker_environment() | ENVIRONMENT)
    from ray.cluster_utils import Cluster  # reads the environment

    program = str(Path(sys.executable).with_name("segadapt"))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        paths = Paths(Path(folder))
        write_template(paths.template)
        head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(arguments.nodes):
                cluster.add_node(num_cpus=CPUS, num_gpus=GPUS)
            cluster.wait_for_nodes()

            def session(kind: str) -> dict[str, Any]:
                command = [sys.executable, __file__, "--session", kind, "--address", cluster.address]
                command += ["--folder", str(folder), "--trials", str(arguments.trials), "--sampler", arguments.sampler]
                if arguments.profile and kind == "search":
                    command += ["--profile", str(arguments.profile)]
                subprocess.run(command, check=True, stdout=sys.stderr, stderr=subprocess.STDOUT)
                return dict(json.loads(paths.row.read_text()))

            row: dict[str, Any] = {"search": session("search")}
            for name in ("status", "runs"):
                row[name] = time_command(program, name, NAME, "--storage", str(paths.storage), cwd=paths.root)
            row |= {kind: session(kind) for kind in ("resume", "extend")}
        finally:
            cluster.shutdown()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--nodes", type=int, default=16, help="as many trials run at a time")
    parser.add_argument("--sampler", default="auto")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", help="on the disk that is to be measured; a temporary one is made in it")
    parser.add_argument("--profile", type=Path, help="write where the driver's thread spent its time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--session", help=argparse.SUPPRESS)  # what the measuring processes are called with
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.session:
        paths = Paths(Path(arguments.folder))
        run_session(arguments.session, paths, arguments.address, arguments.trials, arguments.sampler, arguments.profile)
        return
    rows = []
    for _ in range(arguments.repeats):
        rows.append(measure(arguments))
        show(rows[-1])
    if arguments.json:
        from measuring import cpu_model
        from segadapt.platform.trial.environment import machine

        setting = {name: vars(arguments)[name] for name in ("trials", "nodes", "sampler")}
        setting |= {"reports": REPORTS, "block": BLOCK, "gpus_of_a_node": GPUS, "cpu": cpu_model()}
        arguments.json.write_text(
            json.dumps({"setting": setting, "environment": machine(), "results": rows}, indent=1) + "\n"
        )


def show(row: Mapping[str, Any]) -> None:
    """Print a row."""
    found = row["search"]
    columns = [name for name in found["blocks"][0] if name != "trials"]
    print(" ".join(f"{name:>16}" for name in columns))
    for block in found["blocks"]:
        print(" ".join(f"{block[name]:>16.1f}" for name in columns))
    print(json.dumps({name: value for name, value in found.items() if name != "blocks"}, indent=1))
    print(json.dumps({name: value for name, value in row.items() if name != "search"}, indent=1), flush=True)


if __name__ == "__main__":
    main()
