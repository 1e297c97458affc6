"""How long it takes until a trial of two workers goes on after a kill, and what is lost: segadapt and the plain stack.

    python benchmarks/recovery.py [--turns 2] [--json PATH]

The plain stack is Ray Tune with Ray Train's `TorchTrainer` in its function, each with a `FailureConfig`, health checks
each 0.5 s, the train run named after the trial so that it goes on from its checkpoint, and `Tuner.restore` after the
driver was killed; segadapt's side is a search, with `--resume`. Both train SDCA on streets of 32x64, with an evaluation
and a checkpoint every 15 steps, on a cluster of raylets on this machine: a head without CPUs and three nodes of two.
They take turns. Killed, with SIGKILL, one after another: a worker; the trial's process; Ray Train's controller, where
it is a process; the driver, which is started again at once; the node of a worker.

`seconds` run from the kill to the next result at a later step than any before, `redone` are the steps from the
checkpoint that the trial went on from to the last result before. What was trained since that result is lost everywhere.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import psutil

from search_overhead import plain_ray
from segadapt.platform.trial.environment import machine
from startup import METHOD, METRIC, SETTINGS, kept_in, reported_to_train, spread

EVERY = 15
LONG = {**SETTINGS, "trainer.steps": 100000, "trainer.eval_every": EVERY}
FAILURES = 9
FORMS = ("plain", "segadapt")
FAULTS = ("worker", "trial", "controller", "driver", "node")
PATIENCE_S = 900.0


def run_plain(folder: Path, address: str, *, restore: bool) -> None:
    """The driver of the plain stack."""
    os.environ |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "TUNE_GLOBAL_CHECKPOINT_S": "1"}
    from ray import tune

    from segadapt.platform.settings.config import resolve
    from segadapt.platform.storage.folders import Storage
    from segadapt.platform.trial import training
    from segadapt.platform.trial.spec import TrialSpec

    spec = TrialSpec(Storage(folder), "recovery", {METHOD: resolve(METHOD, LONG)})
    if not restore:
        spec.folder.mkdir(parents=True)
        stages = TrialSpec(spec.storage, "stages", spec.configs, shared_stages=True)
        training.train(stages.trial("stages", {}), kept_in(folder / "stages-checkpoint"), None)

    report = reported_to_train()

    def worker(loop: dict[str, Any]) -> None:
        import ray.train

        from segadapt.platform.trial import training

        found = ray.train.get_checkpoint()
        training.train(spec.trial(loop["trial"], {}), report, Path(found.path) if found is not None else None)

    def function(values: dict[str, Any]) -> None:
        import ray.train
        from ray import tune
        from ray.train.torch import TorchTrainer
        from ray.tune.integration.ray_train import TuneReportCallback

        name = tune.get_context().get_trial_id()
        TorchTrainer(
            worker,
            train_loop_config={"trial": name},
            scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=str(folder / "train"),
                callbacks=[TuneReportCallback()],
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
                failure_config=ray.train.FailureConfig(max_failures=FAILURES),
            ),
        ).fit()

    class Printed(tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            print(f"trial step {result['step']}/", flush=True)

    trainable = tune.with_resources(function, {"node:__internal_head__": 0.001})
    with plain_ray(dashboard=True, address=address):
        if restore:
            path = str(folder / "ray" / "recovery")
            tuner = tune.Tuner.restore(path, trainable=trainable, resume_unfinished=True, resume_errored=True)
        else:
            tuner = tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(metric=METRIC, mode="max"),
                run_config=tune.RunConfig(
                    name="recovery",
                    storage_path=str(folder / "ray"),
                    verbose=0,
                    callbacks=[Printed()],
                    failure_config=tune.FailureConfig(max_failures=FAILURES),
                ),
            )
        tuner.fit()


class Driver:
    """A search in the background, started again when it was killed, and the steps of its results."""

    def __init__(self, form: str, folder: Path, address: str) -> None:
        self.form, self.folder, self.address = form, folder, address
        self.results: list[tuple[float, int]] = []
        self.said: list[str] = []
        self.start(again=False)

    def start(self, *, again: bool) -> None:
        """Start it for the first time, or let it go on."""
        if self.form == "plain":
            command = [sys.executable, __file__, "--form", "plain", "--folder", str(self.folder)]
            command += ["--address", self.address, *(["--restore"] if again else [])]
        else:
            words = [METHOD, "--trials", "1", "--name", "recovery", "--workers-per-trial", "2"]
            words += [f"{key}={value}" for key, value in LONG.items()]
            command = [str(Path(sys.executable).with_name("segadapt")), "search", "--max-failures", str(FAILURES)]
            command += ["--address", self.address]
            command += ["--resume", "recovery", "--workers-per-trial", "2"] if again else words
        self.process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "RAY_AUTH_MODE": "disabled"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def _read(self, output: Any) -> None:
        for line in output:
            self.said.append(line)
            if found := re.match(r"(?:trial|sdca-001) step (\d+)/", line):
                self.results.append((time.time(), int(found.group(1))))

    def wait(self, condition: Callable[[], Any]) -> Any:
        """Return what a condition gives as soon as it is true."""
        deadline = time.time() + PATIENCE_S
        while not (found := condition()):
            if time.time() > deadline or self.process.poll() is not None:
                raise TimeoutError("".join(self.said[-40:]))
            time.sleep(0.05)
        return found

    def recovers(self, kill: Callable[[], None]) -> dict[str, Any]:
        """Kill something, and return how the trial went on."""
        before = max((step for _, step in self.results), default=0)
        self.wait(lambda: self.results and self.results[-1][1] > before)  # a result since the last recovery
        reached = max(step for _, step in self.results)
        count, began = len(self.results), time.time()
        kill()
        self.wait(lambda: self.results[-1][1] > reached)
        after = self.results[count:]
        later = next((at, step) for at, step in after if step > reached)
        begun_from = min((step for _, step in after), default=reached)  # that of the checkpoint is reported once more
        return {"seconds": later[0] - began, "redone": max(0, reached - begun_from)}


def started_by(raylet: int, title: str) -> list[int]:
    """Return processes of a raylet by a part of their title."""
    found = []
    for process in psutil.Process(raylet).children():
        with contextlib.suppress(psutil.Error):
            if title in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


@contextlib.contextmanager
def cluster() -> Iterator[tuple[Any, list[Any]]]:
    """Run a head without CPUs, with its dashboard, which the plain stack needs, and three nodes of two CPUs.

    With one each, the plain stack can wait for ever: what Ray Train starts to free the CPUs of a killed trial looks for
    "the" Ray of the machine, and may find another one.
    """
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port}
    found = Cluster(initialize_head=True, head_node_args=head)  # type: ignore[no-untyped-call]
    try:
        yield found, [found.add_node(num_cpus=2) for _ in range(3)]
    finally:
        found.shutdown()  # type: ignore[no-untyped-call]


def measure(form: str, folder: Path, faults: Collection[str]) -> dict[str, Any]:
    """Inflict each of the faults on one trial."""
    rows: dict[str, Any] = {}
    with cluster() as (found, nodes):
        raylets = {node.all_processes["raylet"][0].process.pid: node for node in nodes}
        head = found.head_node.all_processes["raylet"][0].process.pid
        driver = Driver(form, folder, found.address)

        def kill(raylet: int, title: str) -> None:
            os.kill(started_by(raylet, title)[0], signal.SIGKILL)

        def kill_worker() -> None:
            kill(next(raylet for raylet in raylets if started_by(raylet, "RayTrainWorker")), "RayTrainWorker")

        def kill_driver() -> None:
            driver.process.kill()
            driver.process.wait()
            driver.start(again=True)

        def kill_node() -> None:
            raylet = next(raylet for raylet in raylets if started_by(raylet, "RayTrainWorker"))
            node = raylets.pop(raylet)
            os.kill(raylet, signal.SIGKILL)
            found.remove_node(node, allow_graceful=False)

        known = {"worker": kill_worker, "trial": lambda: kill(head, "ImplicitFunc")}
        if form == "plain":
            known["controller"] = lambda: kill(head, "TrainController")
        known |= {"driver": kill_driver, "node": kill_node}
        try:
            for name, inflict in known.items():
                if name not in faults:
                    continue
                load = os.getloadavg()[0]
                rows[name] = {"load": load, **driver.recovers(inflict)}
                print(form, name, rows[name], flush=True)
        finally:
            driver.process.terminate()
            driver.process.wait(timeout=120)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS, help="default: all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)  # what the plain driver is called with
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--restore", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.form:
        run_plain(options.folder, options.address, restore=options.restore)
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("terminated"))  # ends the cluster first
    results: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
    for _ in range(options.turns):
        for form in FORMS:
            with tempfile.TemporaryDirectory() as name:
                results[form].append(measure(form, Path(name), options.faults))
        found = summary(results)
        if options.json:  # after each turn: a later one may fail on a busy machine
            record = {"environment": machine(), "results": results, **found}
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def summary(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the median seconds of each fault, and segadapt's ratio to the plain stack, turn by turn."""
    medians = {
        form: {fault: statistics.median(row[fault]["seconds"] for row in rows) for fault in rows[0]}
        for form, rows in results.items()
    }
    ratios = {}
    for fault in medians["plain"]:
        own = "trial" if fault == "controller" else fault  # where segadapt's controller is
        pairs = zip(results["segadapt"], results["plain"], strict=True)
        ratios[fault] = spread([ours[own]["seconds"] / plain[fault]["seconds"] for ours, plain in pairs])
    return {"medians": medians, "ratios": ratios}


if __name__ == "__main__":
    main()
