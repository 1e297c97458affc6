"""Time and peak memory of CLST's contrast and centroids: the exact cheap form against the literal one.

One training step's worth of work without a network: the source centroids move, then the mean feature of each class in
each image of both domains is contrasted with them, forward and backward, on one thread. Each form runs in a fresh
process, so that its peak memory is its own.

    python benchmarks/clst_loss.py --json benchmarks/results/clst_loss.json
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
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from segadapt.trainables.core.losses.centroid_contrast import centroid_contrast
from segadapt.trainables.core.state.class_centroids import ClassCentroids

HERE = Path(__file__).parent
FORMS = ("literal", "cheap")
DOMAINS = ("source", "target")
COLUMNS = {"median_s": "median s", "median_cpu_s": "median CPU s", "extra_peak_mb": "extra peak MB"}


def load_literal() -> ModuleType:
    spec = importlib.util.spec_from_file_location("literal_clst", HERE / "literal" / "clst.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_inputs(setting: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return features and labels by domain: all source and half of the target cells labelled."""
    torch.manual_seed(0)
    batch, (rows, columns) = setting["batch"], setting["grid"]
    features = {
        domain: torch.randn(batch, setting["channels"], rows, columns).relu_().requires_grad_() for domain in DOMAINS
    }
    labels = {domain: torch.randint(0, setting["classes"], (batch, rows, columns)) for domain in DOMAINS}
    labels["target"][:, ::2] = 255
    return features, labels


def cheap_step(setting: dict[str, Any]) -> Callable[..., Tensor]:
    state = ClassCentroids(setting["classes"], setting["channels"])

    def step(features: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
        state.update(features["source"], labels["source"])
        losses = [
            centroid_contrast(features[domain], labels[domain], state.centroids, state.seen) for domain in DOMAINS
        ]
        loss = torch.stack(losses).sum()
        loss.backward()
        return loss.detach()

    return step


def literal_step(setting: dict[str, Any]) -> Callable[..., Tensor]:
    literal = load_literal()
    classes, channels = setting["classes"], setting["channels"]
    state = torch.zeros(classes, channels), torch.zeros(classes, dtype=torch.bool)

    def step(features: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
        nonlocal state
        state = literal.update_centroids(features["source"], labels["source"], *state, momentum=0.99)
        losses = [literal.centroid_contrast(features[domain], labels[domain], *state) for domain in DOMAINS]
        loss = torch.stack(losses).sum()
        loss.backward()
        return loss.detach()

    return step


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(form: str, setting: dict[str, Any]) -> dict[str, Any]:
    """Return peak memory beyond the inputs in the first step, then wall and processor times of the others.

    The two times differ where other programs compete for the machine; trust the processor time there. Gradients by the
    inputs count as extra memory. A tiny step beforehand loads the libraries' code.
    """
    torch.set_num_threads(setting["threads"])
    make_step = {"cheap": cheap_step, "literal": literal_step}[form]
    tiny = {**setting, "grid": (3, 3), "channels": 8}
    make_step(tiny)(*make_inputs(tiny))
    features, labels = make_inputs(setting)
    step = make_step(setting)
    before = peak_bytes()
    loss = step(features, labels).item()
    extra = peak_bytes() - before
    seconds, cpu_seconds = [], []
    for _ in range(setting["repeats"]):
        for feature in features.values():
            feature.grad = None
        start, cpu_start = time.perf_counter(), time.process_time()
        step(features, labels)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {
        "loss": loss,
        "extra_peak_mb": extra / 1e6,
        "median_s": statistics.median(seconds),
        "median_cpu_s": statistics.median(cpu_seconds),
        "seconds": seconds,
    }


def cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure CLST's contrast and centroids, cheap form against literal.")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--grid", type=int, nargs=2, default=[65, 129], metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)  # what the measuring processes are called with
    arguments = parser.parse_args()
    setting = {name: value for name, value in vars(arguments).items() if name not in ("json", "form")}
    if arguments.form:
        print(json.dumps(measure(arguments.form, setting)))
        return

    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    results = {}
    for form in FORMS:
        command = [sys.executable, __file__, *sys.argv[1:], "--form", form]
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        results[form] = json.loads(output)
    ratios = {key: results["literal"][key] / results["cheap"][key] for key in COLUMNS}

    print(f"{'form':<10}" + "".join(f"{title:>16}" for title in COLUMNS.values()) + f"{'loss':>14}")
    for form, row in results.items():
        print(f"{form:<10}" + "".join(f"{row[key]:>16.3f}" for key in COLUMNS) + f"{row['loss']:>14.6f}")
    print(f"{'ratio':<10}" + "".join(f"{ratio:>15.1f}x" for ratio in ratios.values()))
    if arguments.json:
        record = {
            "setting": setting,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "cpu": cpu_model(),
            "results": results,
            "ratios": ratios,
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
