"""Target mIoU on streets: source-only, oracle and adaptation methods over seeds.

    python benchmarks/streets.py [--methods sdca ...] [--seeds 0 1 2] [--preset streets] [--json PATH] [KEY=VALUE ...]

Every number is the last evaluation of a trial at the default budget, on the target validation set. A seed decides
initialisation, sample order and augmentation; the images stay the same. All methods of a seed start from that seed's
source-only network, as trials of a search do. With `--preset streets`, methods that have such a preset are shown at it
beside their published setting; `method.*` settings act on the adaptation methods.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from segadapt import search_spaces
from segadapt.platform.settings.config import Values, parse_assignments, resolve
from segadapt.platform.trial.environment import machine
from segadapt.platform.trial.training import build_method
from segadapt.trainables import METHODS, method_class
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.method import SOURCE_ONLY
from segadapt.trainables.core.training.config import TrainerSettings
from segadapt.trainables.core.training.trainer import Trainer

BASELINE = "source_only"


def settings_of(methods: list[str], preset: str | None, values: Mapping[str, Any]) -> dict[str, tuple[str, Values]]:
    """Return method and settings of each row of the table, source-only training first."""
    common = {key: value for key, value in values.items() if not key.startswith("method.")}
    rows: dict[str, tuple[str, Values]] = {
        BASELINE: (BASELINE, common),
        "oracle": (BASELINE, {**common, "data.oracle": True}),
    }
    for method in methods:
        rows[method] = (method, values)
        if preset is not None and preset in (presets := search_spaces.load(method)[1]):
            rows[f"{method} ({preset})"] = (method, {**presets[preset], **values})
    return rows


def run_seed(seed: int, rows: Mapping[str, tuple[str, Values]]) -> dict[str, dict[str, Any]]:
    """Return the last metrics of each row."""
    import torch

    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        warmup = Path(name) / "warmup"
        for row, (method, values) in rows.items():
            config = resolve(method, {**values, "seed": seed})
            data, evaluation = load_data(config.data)
            plan = method_class(method).plan(config.method)
            if method != BASELINE:
                plan = tuple(stage for stage in plan if stage is not SOURCE_ONLY)

            def report(metrics: dict[str, Any], write: Any, row: str = row) -> None:
                results[row] = metrics
                if row == BASELINE and metrics["finished"]:
                    warmup.mkdir()
                    write(warmup)

            settings = TrainerSettings(config.trainer, config.optimizer, config.augmentation, config.seed)
            trainer = Trainer(
                build_method(config, len(data.classes)), plan, data, evaluation, settings, report, Path(name) / row
            )
            if method != BASELINE:
                trainer.start_from(warmup)
            trainer.run()
            print(f"seed {seed} {row:14} {results[row]['target_val/miou']:.3f}", file=sys.stderr, flush=True)
    return results


def table(results: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return the results as a Markdown table: mean ± sample standard deviation over seeds."""
    seeds = sorted(results)
    lines = [
        "| method | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + " | mean ± sd | over source-only | source mIoU |",
        "|---|" + "---|" * (len(seeds) + 3),
    ]
    baseline = [results[seed][BASELINE]["target_val/miou"] for seed in seeds]
    for method in results[seeds[0]]:
        scores = [results[seed][method]["target_val/miou"] for seed in seeds]
        source = statistics.mean(results[seed][method]["source_val/miou"] for seed in seeds)
        spread = statistics.stdev(scores) if len(seeds) > 1 else 0.0
        gain = statistics.mean(scores) - statistics.mean(baseline)
        cells = [f"{score:.3f}" for score in scores]
        cells += [f"{statistics.mean(scores):.3f} ± {spread:.3f}", f"{gain:+.3f}", f"{source:.3f}"]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    adaptation = [method.name for method in METHODS if method.name != BASELINE]
    parser.add_argument("--methods", nargs="+", default=adaptation, choices=adaptation)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--preset")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    values = parse_assignments(options.settings)
    rows = settings_of(options.methods, options.preset, values)
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        futures = {seed: pool.submit(run_seed, seed, rows) for seed in options.seeds}
        results = {seed: future.result() for seed, future in futures.items()}
    print(table(results))
    if options.json:
        content = {
            "rows": rows,
            "results": results,
            "environment": machine(),
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
