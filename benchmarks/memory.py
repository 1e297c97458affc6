"""Memory that `--dry-run` predicts for a trial's process against what a whole trial takes.

    python benchmarks/memory.py [--methods sdca ...] [--sizes 64x128 128x256] [--networks compact timm:MODEL ...]
                                [--recompute] [--json PATH]

The prediction is the probe of `segadapt search --dry-run`: a few steps of each kind of stage and sixteen images in a
fresh process. The trial runs all stages in another fresh process, with all images, evaluations and checkpoints. Both
are the peak of the process's memory, Ray's modules included. `--recompute` measures each network both ways: with all
that the backward pass needs kept, and with the inside of blocks computed once more.
"""

import argparse
import json
import subprocess
import sys
from itertools import product
from typing import Any

from torch import nn

from measuring import parse, write_record
from segadapt.platform.cluster.connection import worker_environment
from segadapt.platform.experiment.probe import run_probe
from segadapt.platform.settings.config import resolve
from segadapt.trainables import METHODS
from segadapt.trainables.core.networks import build_segmenter

TRIAL = """
import json, sys, tempfile
from pathlib import Path
import ray.tune
import torch
from segadapt.platform.experiment.probe import peak_memory
from segadapt.platform.settings.config import resolve
from segadapt.platform.trial.training import build_method
from segadapt.trainables import method_class
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.training.config import TrainerSettings
from segadapt.trainables.core.training.trainer import Trainer

torch.set_num_threads(1)
config = resolve(sys.argv[1], json.loads(sys.argv[2]))
data, evaluation = load_data(config.data)
settings = TrainerSettings(config.trainer, config.optimizer, config.augmentation, config.seed)

def report(metrics, write):
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))

with tempfile.TemporaryDirectory() as folder:
    method = build_method(config, len(data.classes))
    plan = method_class(config.method_name).plan(config.method)
    Trainer(method, plan, data, evaluation, settings, report, Path(folder)).run()
print(peak_memory())
"""


def compare(method: str, values: dict[str, Any]) -> dict[str, float]:
    """Return the predicted and the real peak in bytes, and their ratio."""
    predicted = run_probe(method, resolve(method, values), 1, 1).memory_bytes
    command = [sys.executable, "-c", TRIAL, method, json.dumps(values)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=worker_environment())
    real = int(done.stdout.split()[-1])
    return {"predicted_bytes": predicted, "real_bytes": real, "ratio": predicted / real}


def has_batch_norm(network: str) -> bool:
    return any(isinstance(part, nn.BatchNorm2d) for part in build_segmenter(network, 2).backbone.modules())


def main() -> None:
    names = [method.name for method in METHODS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--sizes", nargs="+", default=["64x128", "128x256"], metavar="HEIGHTxWIDTH")
    parser.add_argument("--networks", nargs="+", default=["compact"], metavar="NAME")
    parser.add_argument("--recompute", action="store_true", help="measure with and without trainer.recompute")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    arguments, setting = parse(parser)
    results: dict[str, dict[str, Any]] = {}
    recomputed = (False, True) if arguments.recompute else (False,)
    for size, network, recompute, method in product(arguments.sizes, arguments.networks, recomputed, arguments.methods):
        height, width = map(int, size.split("x"))
        values = {
            "data.streets.edition": 1,
            "data.streets.height": height,
            "data.streets.width": width,
            "warmup.steps": arguments.steps,
            "trainer.steps": arguments.steps,
            "trainer.eval_every": max(1, arguments.steps // 2),
            "trainer.batch_size": arguments.batch_size,
            "trainer.recompute": recompute,
            "network.name": network,
        }
        if has_batch_norm(network):
            values["network.freeze_norm"] = True  # as with pretrained weights; recomputing needs it
        name = " ".join([method, *([network] if network != "compact" else []), *(["recomputed"] if recompute else [])])
        peaks = results.setdefault(size, {})[name] = compare(method, values)
        print(f"{size:<10}{name:<45}", *(f"{key} {value:>13.6g}" for key, value in peaks.items()), flush=True)
        write_record(arguments.json, setting, results=results)


if __name__ == "__main__":
    main()
