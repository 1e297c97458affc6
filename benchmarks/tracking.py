"""What tracking costs a search: time of the driver's thread per record, and processor time of everything it causes.

    python benchmarks/tracking.py [--trials 4] [--evaluations 20] [--every-s 30] [--cores 2] [--json PATH]

Trials at a time log what real ones do (19 classes: 57 numbers per evaluation; configuration, pictures and tables) to
the SQLite database of a fresh storage folder. After each round of evaluations the queue is emptied, so that nothing is
bundled. The share is the processor time of the whole process over a trial's life, records of its start and end
included, of the time that `cores` have while it takes an evaluation every `every-s` seconds.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from measuring import parse, write_record
from segadapt.platform.settings.config import resolve
from segadapt.platform.storage.folders import Place
from segadapt.platform.tracking.tracker import RunInfo, Tracker
from segadapt.platform.trial.environment import environment

CLASSES = [f"class {number}" for number in range(19)]


class Stopwatch:
    """Wall and processor seconds that calls took in this thread, by what they log."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}

    def time(self, what: str, call: Callable[[], None]) -> None:
        """Make the call and note what it took."""
        start, cpu_start = time.perf_counter(), time.thread_time()
        call()
        self.wall.setdefault(what, []).append(time.perf_counter() - start)
        self.cpu.setdefault(what, []).append(time.thread_time() - cpu_start)


def checkpoint(folder: Path) -> Path:
    """Write what a trial keeps of its best evaluation, with a gallery of 4 rows of 3 pictures, 256x512."""
    folder.mkdir()
    random = np.random.default_rng(0)
    domain = {"confusion": random.integers(0, 10**6, (19, 19)).tolist()}
    metrics = {f"target_val/iou/{name}": 0.5 for name in CLASSES}
    evaluation = {"classes": CLASSES, "target_val": domain, "source_val": domain, "metrics": metrics}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    blocks = random.integers(0, 255, (64, 96, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    Image.fromarray(blocks).save(folder / "gallery.png")
    return folder


def evaluation(step: int) -> dict[str, float]:
    numbers = {f"{domain}/iou/{name}": step / 1000 for domain in ("target_val", "source_val") for name in CLASSES}
    return numbers | {f"loss/term_{number}": 1 / step for number in range(18)} | {"time/evaluation": 1.0}


def empty(tracker: Tracker) -> None:
    while tracker._outbox.waiting:
        time.sleep(0.005)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4, help="at a time")
    parser.add_argument("--evaluations", type=int, default=20, help="of each trial")
    parser.add_argument("--every-s", type=float, default=30.0)
    parser.add_argument("--cores", type=int, default=2)
    arguments, setting = parse(parser)
    config, found, watch = resolve("sdca", {}).as_dict(), environment(), Stopwatch()
    keys = [f"search/{number}" for number in range(arguments.trials)]
    with tempfile.TemporaryDirectory() as folder:
        best = checkpoint(Path(folder) / "checkpoint")
        tracker = Tracker(Place(Path(folder)))
        tracker.start(RunInfo("search", "search", "search", {}, {}))
        empty(tracker)  # the database is made, MLflow imported

        def spent(log: Callable[[str], None]) -> float:
            start = time.process_time()
            for key in keys:
                log(key)
            empty(tracker)
            return (time.process_time() - start) / len(keys)

        def begin(key: str) -> None:
            watch.time("start", lambda: tracker.start(RunInfo(key, "search", key, {}, {"lr": 0.1}, "search")))
            watch.time("configuration", lambda: tracker.log_json(key, config, "config.yaml"))
            watch.time("configuration", lambda: tracker.log_json(key, found, "environment.json"))

        def evaluate(key: str, step: int) -> None:
            watch.time("evaluation", lambda: tracker.log_metrics(key, evaluation(step), step))
            watch.time("tags", lambda: tracker.set_tags(key, {"segadapt.data": "fingerprint"}))

        def finish(key: str) -> None:
            watch.time("summary", lambda: tracker.log_summary(key, {"best/miou": 0.5}, arguments.evaluations))
            watch.time("pictures", lambda: tracker.log_evaluation(key, best))
            watch.time("end", lambda: tracker.end(key, "FINISHED", {}))

        ends = spent(begin)
        rounds = [spent(lambda key, step=step: evaluate(key, step)) for step in range(1, arguments.evaluations + 1)]
        ends += spent(finish)
        tracker.close()

    cpu = ends + sum(rounds)
    life = arguments.evaluations * arguments.every_s
    share = arguments.trials * cpu / (life * arguments.cores)
    held = {what: statistics.median(seconds) for what, seconds in watch.wall.items()}
    for what, seconds in watch.wall.items():
        print(f"driver, {what:<16}{1e3 * held[what]:>8.2f} ms median{1e3 * max(seconds):>8.2f} ms at most")
    evaluated = statistics.median(rounds)
    print(f"processor time: {1e3 * evaluated:.1f} ms per evaluation, {ends:.2f} s per trial for its start and end")
    print(f"share of {arguments.cores} cores at an evaluation per {arguments.every_s:g} s: {100 * share:.2f} %")
    write_record(
        arguments.json,
        setting,
        versions={"mlflow": version("mlflow")},
        driver_median_s=held,
        driver_max_s={what: max(seconds) for what, seconds in watch.wall.items()},
        driver_median_cpu_s={what: statistics.median(seconds) for what, seconds in watch.cpu.items()},
        cpu_s_per_evaluation={"median": evaluated, "min": min(rounds), "max": max(rounds)},
        cpu_s_of_start_and_end=ends,
        share=share,
    )


if __name__ == "__main__":
    main()
