"""What the platform costs: a search against the same trainings, one after another, in one bare process.

    python benchmarks/overhead.py [--trials 4] [--steps 400] [--json PATH] [KEY=VALUE ...]

The bare process walks the same warm-up, statistics and trials with `trainables` alone: no Ray, no Optuna, no MLflow, no
checkpoint, all CPUs for each training. The search runs as many one-CPU trials at a time as there are CPUs. Early
stopping is off in both, so that both take the same steps and evaluations. Each is started anew as its own process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import emit
from segadapt.platform.settings.config import parse_assignments
from segadapt.platform.trial.environment import machine

BARE = """
import json, sys, time
from pathlib import Path
import torch
from segadapt.platform.settings.config import resolve
from segadapt.platform.trial.training import build_method
from segadapt.trainables import method_class
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.training.config import TrainerSettings
from segadapt.trainables.core.training.trainer import Trainer

settings = json.loads(sys.argv[1])
state = None
for proposal in [None, *settings["proposals"]]:
    config = resolve("sdca", settings["values"] | (proposal or {}))
    data, evaluation = load_data(config.data)
    method = build_method(config, len(data.classes))
    plan = tuple(s for s in method_class("sdca").plan(config.method) if s.shared == (proposal is None))
    parts = TrainerSettings(config.trainer, config.optimizer, config.augmentation, config.seed)
    trainer = Trainer(method, plan, data, evaluation, parts, lambda metrics, write: None, Path(sys.argv[2]))
    if state is not None:
        method.load_state_dict(state)
    trainer.run()
    state = {k: v.clone() for k, v in method.state_dict().items()} if state is None else state
"""


def timed(command: list[str], folder: Path) -> tuple[float, str]:
    """Run a command; returns its wall time in seconds and what it printed."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return time.perf_counter() - started, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    values = {"trainer.steps": options.steps, "trainer.eval_every": options.steps}
    values |= parse_assignments(options.settings)
    words = [f"{key}={value}" for key, value in values.items()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        segadapt = str(Path(sys.executable).with_name("segadapt"))
        search, printed = timed([segadapt, "search", "sdca", "--trials", str(options.trials), *words], folder)
        _, board = timed([segadapt, "runs", "sdca-streets", "--json"], folder)
        proposals = [
            {key: float(value) for key, value in row["params"].items()}
            for row in json.loads(board)["rows"]
            if row["kind"] == "trial"
        ]
        settings = json.dumps({"values": values, "proposals": proposals})
        bare, _ = timed([sys.executable, "-c", BARE, settings, str(folder)], folder)
    parts = next(line for line in printed.splitlines() if " took " in line)
    result = {
        "trials": options.trials,
        "steps": options.steps,
        "search_s": round(search, 1),
        "bare_s": round(bare, 1),
        "ratio": round(search / bare, 3),
        "search_parts": parts,
        "environment": machine(),
    }
    emit(result, options.json)


if __name__ == "__main__":
    main()
