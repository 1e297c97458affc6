"""Time and peak memory of PLCA's association losses: the exact cheap form against the literal one.

One training step's worth of work without a network: aggregation, both hops, forward and backward, on one thread, for
each level alone and for both. Each measurement runs in a fresh process, so that its peak memory is its own.

    python benchmarks/plca_loss.py --json benchmarks/results/plca_loss.json
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from segadapt.trainables.core.losses import cycle_association

HERE = Path(__file__).parent
FORMS = ("literal", "cheap")
DOMAINS = ("source", "target")
LEVELS = {"features": ("features",), "output": ("output",), "both": ("features", "output")}


def load_literal() -> ModuleType:
    spec = importlib.util.spec_from_file_location("literal_plca", HERE / "literal" / "plca.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_inputs(level: str, setting: dict[str, Any]) -> tuple[dict[tuple[str, str], Tensor], Tensor]:
    """Return the level's representations by (name, domain) and source labels, 5 % ignored.

    Both domains draw pixels around the same class centres, so that most cycles return to their class: the case that
    costs the most. Written a row of pixels at a time, so that the peak memory so far is that of the result.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (setting["images"], *setting["grid"])
    labels = {domain: torch.randint(0, setting["classes"], shape, generator=generator) for domain in DOMAINS}
    sizes = {"features": setting["channels"], "output": setting["classes"]}
    maps = {}
    for name in LEVELS[level]:
        centers = torch.randn(setting["classes"], sizes[name], generator=generator)
        for domain in DOMAINS:
            values = torch.empty(shape[0], sizes[name], *shape[1:])
            for image, own_labels in zip(values, labels[domain], strict=True):
                for row, row_labels in enumerate(own_labels):
                    noise = torch.randn(sizes[name], shape[2], generator=generator)
                    image[:, row] = noise + 3.0 * centers[row_labels].T
            maps[name, domain] = (values.relu_() if name == "features" else values).requires_grad_()
    ignored = torch.rand(shape, generator=generator) < 0.05
    return maps, labels["source"].masked_fill(ignored, 255)


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(form: str, level: str, setting: dict[str, Any]) -> dict[str, Any]:
    """Return the first step's peak memory beyond the inputs, and the CPU times of all steps."""
    torch.set_num_threads(setting["threads"])
    module = {"cheap": cycle_association, "literal": load_literal()}[form]
    losses = {"features": module.feature_association, "output": module.output_association}
    maps, labels = make_inputs(level, setting)
    before = peak_bytes()
    seconds, value, extra = [], 0.0, 0
    for _ in range(setting["repeats"]):
        for representation in maps.values():
            representation.grad = None
        start = time.process_time()
        loss = torch.stack([losses[name](maps[name, "source"], maps[name, "target"], labels) for name in LEVELS[level]])
        loss.sum().backward()
        seconds.append(time.process_time() - start)
        value, extra = loss.sum().item(), extra or peak_bytes() - before
        del loss
    return {"loss": value, "extra_peak_mb": extra / 1e6, "median_cpu_s": statistics.median(seconds), "cpu_s": seconds}


def cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure PLCA's association losses, cheap form against literal.")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--grid", type=int, nargs=2, default=[92, 92], metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)  # what the measuring processes are called with
    arguments = parser.parse_args()
    setting = {name: value for name, value in vars(arguments).items() if name not in ("json", "form", "levels")}
    if arguments.form:
        print(json.dumps(measure(arguments.form, arguments.levels[0], setting)))
        return

    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    results: dict[str, dict[str, Any]] = {}
    print(f"{'level':<10}{'form':<10}{'median CPU s':>14}{'extra peak MB':>16}{'loss':>14}")
    for level in arguments.levels:
        results[level] = {}
        for form in FORMS:
            command = [sys.executable, __file__, *sys.argv[1:], "--levels", level, "--form", form]
            output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            row = results[level][form] = json.loads(output)
            print(f"{level:<10}{form:<10}{row['median_cpu_s']:>14.2f}{row['extra_peak_mb']:>16.0f}{row['loss']:>14.6f}")
        literal, cheap = results[level]["literal"], results[level]["cheap"]
        ratios = {key: literal[key] / cheap[key] for key in ("median_cpu_s", "extra_peak_mb")}
        results[level]["ratios"] = ratios
        print(f"{level:<10}{'ratio':<10}{ratios['median_cpu_s']:>13.2f}x{ratios['extra_peak_mb']:>15.1f}x")
    if arguments.json:
        record = {
            "setting": setting,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "cpu": cpu_model(),
            "results": results,
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
