"""Train PLCA on streets at many settings and keep what each evaluation said: the data behind the surrogate.

    python benchmarks/surrogate/collect.py [--trials 96] [--minutes 35] [--processes 2] [--file PATH] [KEY=VALUE ...]

Settings come from a scrambled Sobol sequence over PLCA's search space, so that any number of trials covers it evenly;
the published and the streets preset are repeated, which shows the spread over seeds. Every trial has a seed of its own
and starts from the same source-only network. Finished trials are appended to `trials.jsonl`; a second call goes on with
those that are missing.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from segadapt import search_spaces
from segadapt.platform.settings.config import parse_assignments, resolve
from segadapt.platform.trial.training import build_method
from segadapt.trainables import method_class
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.method import SOURCE_ONLY
from segadapt.trainables.core.training.config import TrainerSettings
from segadapt.trainables.core.training.trainer import Trainer

METHOD = "plca"
SETTINGS: dict[str, Any] = {
    "trainer.steps": 120,
    "trainer.eval_every": 15,
    "trainer.batch_size": 4,
    "data.streets.edition": 1,
    "data.streets.height": 48,
    "data.streets.width": 96,
    "data.streets.val_images": 40,
}
"""Half the default's steps and images per step, on smaller images: about a fifth of its time."""
TRIALS = Path(__file__).with_name("trials.jsonl")
FIRST_SEED = 1000
REPEAT_EVERY = 6
"""One trial in so many repeats a preset."""


def proposals(seed: int = 1) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where settings come from and the settings, without end."""
    import optuna
    from optuna.exceptions import ExperimentalWarning

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space, presets = search_spaces.load(METHOD)
    warnings.simplefilter("ignore", ExperimentalWarning)
    study = optuna.create_study(sampler=optuna.samplers.QMCSampler(qmc_type="sobol", scramble=True, seed=seed))
    repeated = 0
    for number in range(sys.maxsize):
        if number % REPEAT_EVERY == REPEAT_EVERY - 1:
            name = ("paper", "streets")[repeated % 2]
            repeated += 1
            yield name, presets[name]
        else:
            trial = study.ask(fixed_distributions=space)
            study.tell(trial, 0.0)
            yield "sobol", trial.params


def run(values: dict[str, Any], seed: int, start: Path | None, leave: Path | None) -> list[list[float]]:
    """Train one trial, or with `leave` the warm-up; return step and target mIoU of each evaluation."""
    import torch

    torch.set_num_threads(1)
    config = resolve(METHOD, {**SETTINGS, **values, "seed": seed})
    data, evaluation = load_data(config.data)
    plan = method_class(METHOD).plan(config.method)
    plan = tuple(stage for stage in plan if (stage is SOURCE_ONLY) == (leave is not None))
    curve: list[list[float]] = []

    def report(metrics: dict[str, Any], write: Any) -> None:
        curve.append([metrics["step"], round(metrics["target_val/miou"], 5)])
        if leave is not None and metrics["finished"]:
            leave.mkdir()
            write(leave)

    settings = TrainerSettings(config.trainer, config.optimizer, config.augmentation, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            build_method(config, len(data.classes)), plan, data, evaluation, settings, report, Path(folder)
        )
        if start is not None:
            trainer.start_from(start)
        trainer.run()
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=96)
    parser.add_argument("--minutes", type=float, default=35)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--file", type=Path, default=TRIALS)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of all trials")
    options = parser.parse_intermixed_args()
    settings = parse_assignments(options.settings)
    deadline = time.monotonic() + 60 * options.minutes
    known = options.file.read_text().splitlines() if options.file.is_file() else []
    done = [json.loads(line)["seed"] for line in known]
    wanted = {FIRST_SEED + number: found for number, found in zip(range(options.trials), proposals(), strict=False)}
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool,
        options.file.open("a") as records,
    ):
        warmup = Path(folder) / "warmup"
        print(
            "warm-up", pool.submit(run, {"trainer.eval_every": 300, **settings}, 0, None, warmup).result(), flush=True
        )
        futures = {
            pool.submit(run, {**settings, **values}, seed, warmup, None): (kind, seed, values)
            for seed, (kind, values) in wanted.items()
            if seed not in done
        }
        for future in as_completed(futures):
            if future.cancelled():
                continue
            kind, seed, values = futures[future]
            record = {"kind": kind, "seed": seed, "values": values, "curve": future.result()}
            records.write(json.dumps(record) + "\n")
            records.flush()
            print(f"{deadline - time.monotonic():6.0f} s left, seed {seed} {kind} {record['curve'][-1]}", flush=True)
            if time.monotonic() > deadline:
                pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    main()
