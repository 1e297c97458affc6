"""How much of streets' shift goes without learning: a colour map, histogram matching, an exchange of amplitudes.

    python benchmarks/shift.py [KEY=VALUE ...] [--seeds 0 1 2] [--trained] [--json PATH]

For each seed, which decides scenes and initialisation, a source-only network and the oracle, which has the target's
labels, are trained for `warmup.steps`. The source-only network then also sees the target's validation images restyled
to the source's look. `--trained` adds networks that were trained on source images restyled to the target's look. Each
row shows target mIoU and the share of the gap, oracle minus source-only, that it closes.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from segadapt.platform.settings.config import Values, parse_assignments, resolve
from segadapt.platform.trial.environment import machine
from segadapt.platform.trial.training import build_method
from segadapt.trainables import method_class
from segadapt.trainables.core.data.appearance import RESTYLINGS, Restyled, pixels_of
from segadapt.trainables.core.data.batch import DomainData, EvaluationData, LabelledImages
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.evaluation.evaluate import evaluate_domain
from segadapt.trainables.core.training.config import TrainerSettings
from segadapt.trainables.core.training.trainer import Trainer

SOURCE_ONLY, ORACLE = "source-only", "oracle"


def train(values: Values, data: DomainData, evaluation: EvaluationData) -> Trainer:
    """Return the trainer of a source-only network that is trained."""
    config = resolve("source_only", values)
    method = build_method(config, len(data.classes))
    settings = TrainerSettings(config.trainer, config.optimizer, config.augmentation, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        plan = method_class("source_only").plan(config.method)
        trainer = Trainer(method, plan, data, evaluation, settings, lambda *_: None, Path(folder))
        trainer.run()
    return trainer


def target_miou(trainer: Trainer, images: LabelledImages, evaluation: EvaluationData) -> float:
    """Return the mIoU of a trainer's network on labelled images."""
    segmenter = trainer.method.deployed
    return evaluate_domain(segmenter, images, evaluation.classes, trainer.device, 8).miou


def run_seed(seed: int, values: Values, trained: bool) -> dict[str, float]:
    """Return the target mIoU of each row."""
    import torch

    torch.set_num_threads(1)
    values = {**values, "seed": seed, "data.streets.seed": seed}
    data, evaluation = load_data(resolve("source_only", values).data)
    rows: dict[str, float] = {}

    def note(row: str, miou: float) -> None:
        rows[row] = miou
        print(f"seed {seed} {row:34} {miou:.3f}", file=sys.stderr, flush=True)

    network = train(values, data, evaluation)
    note(SOURCE_ONLY, target_miou(network, evaluation.target, evaluation))
    source, target = pixels_of(data.source), pixels_of(data.target)
    for name, restyling in RESTYLINGS.items():
        restyled = Restyled(evaluation.target, restyling(target, source))
        note(name, target_miou(network, restyled, evaluation))
        if trained:
            moved = replace(data, source=Restyled(data.source, restyling(source, target)))
            note(f"{name}, trained", target_miou(train(values, moved, evaluation), evaluation.target, evaluation))
    oracle_data, _ = load_data(resolve("source_only", {**values, "data.oracle": True}).data)
    note(ORACLE, target_miou(train(values, oracle_data, evaluation), evaluation.target, evaluation))
    return rows


def closed(rows: Mapping[str, float], row: str) -> float:
    """Return the share of the gap between source-only and oracle that a row closes."""
    return (rows[row] - rows[SOURCE_ONLY]) / (rows[ORACLE] - rows[SOURCE_ONLY])


def table(results: Mapping[int, Mapping[str, float]]) -> str:
    """Return the results as a Markdown table."""
    seeds: Sequence[int] = sorted(results)
    lines = ["| row | " + " | ".join(f"seed {seed}" for seed in seeds) + " | share of the gap |"]
    lines.append("|---|" + "---|" * (len(seeds) + 1))
    for row in results[seeds[0]]:
        shares = ", ".join(f"{closed(results[seed], row):.0%}" for seed in seeds)
        lines.append(f"| {row} | " + " | ".join(f"{results[seed][row]:.3f}" for seed in seeds) + f" | {shares} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    values: dict[str, Any] = dict(parse_assignments(options.settings))
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        futures = {seed: pool.submit(run_seed, seed, values, options.trained) for seed in options.seeds}
        results = {seed: future.result() for seed, future in futures.items()}
    print(table(results))
    if options.json:
        content = {"settings": values, "results": results, "environment": machine()}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
