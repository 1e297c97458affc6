"""Time and peak memory of BiCL's contrast: the exact cheap form against the literal one.

One training step's worth of work without a network: both directions of all pairs, forward and backward, on one thread.
Each form runs in a fresh process, so that its peak memory is its own.

    python benchmarks/bicl_loss.py --json benchmarks/results/bicl_loss.json
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

from segadapt.trainables.core.losses.prototype_contrast import prototype_contrast

HERE = Path(__file__).parent
FORMS = ("literal", "cheap")
WEIGHT = 0.2


def load_literal() -> ModuleType:
    spec = importlib.util.spec_from_file_location("literal_bicl", HERE / "literal" / "bicl.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Inputs = dict[str, tuple[Tensor, Tensor]]
"""Features (B, D, h, w) and labels (B, H, W) by domain."""


def make_inputs(setting: dict[str, Any]) -> Inputs:
    """Return features and blocks of labels: all of the source and half of the target labelled."""
    torch.manual_seed(0)
    batch, side, pixels = setting["batch"], setting["grid"], setting["pixels"]

    def domain() -> tuple[Tensor, Tensor]:
        features = torch.randn(batch, setting["channels"], side, side).requires_grad_()
        blocks = torch.randint(0, setting["classes"], (batch, 12, 12))
        places = torch.arange(pixels) * 12 // pixels
        return features, blocks[:, places[:, None], places]

    inputs = {"source": domain(), "target": domain()}
    inputs["target"][1][:, ::2] = 255
    return inputs


def cheap_step(inputs: Inputs, classes: int) -> Tensor:
    contrast = prototype_contrast(*inputs["source"], *inputs["target"], num_classes=classes)
    loss = WEIGHT * (contrast.forward + contrast.backward)
    loss.backward()
    return loss.detach()


def literal_step(inputs: Inputs, classes: int) -> Tensor:
    literal = load_literal()
    pairs = [
        sum(literal.contrast(*pair, num_classes=classes))
        for pair in zip(*inputs["source"], *inputs["target"], strict=True)
    ]
    loss = WEIGHT * torch.stack(pairs).mean()
    loss.backward()
    return loss.detach()


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(form: str, setting: dict[str, Any]) -> dict[str, Any]:
    """Return peak memory beyond the inputs in the first step, then wall and CPU times of the others."""
    torch.set_num_threads(setting["threads"])
    inputs = make_inputs(setting)
    step = {"cheap": cheap_step, "literal": literal_step}[form]
    before = peak_bytes()
    loss = step(inputs, setting["classes"]).item()
    extra = peak_bytes() - before
    seconds, cpu_seconds = [], []
    for _ in range(setting["repeats"]):
        for features, _ in inputs.values():
            features.grad = None
        start, cpu_start = time.perf_counter(), time.process_time()
        step(inputs, setting["classes"])
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {
        "loss": loss,
        "extra_peak_mb": extra / 1e6,
        "median_s": statistics.median(seconds),
        "median_cpu_s": statistics.median(cpu_seconds),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure BiCL's contrast, cheap form against literal.")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--grid", type=int, default=92, help="cells of the feature map per side")
    parser.add_argument("--pixels", type=int, default=730, help="pixels of the label map per side")
    parser.add_argument("--channels", type=int, default=76)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--repeats", type=int, default=7)
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
    measured = ("median_s", "median_cpu_s", "extra_peak_mb")
    ratios = {key: results["literal"][key] / results["cheap"][key] for key in measured}

    print(f"{'form':<10}{'median s':>10}{'of CPU':>10}{'extra peak MB':>16}{'loss':>14}")
    for form in FORMS:
        row = results[form]
        print(
            f"{form:<10}{row['median_s']:>10.3f}{row['median_cpu_s']:>10.3f}{row['extra_peak_mb']:>16.0f}{row['loss']:>14.6f}"
        )
    print(f"{'ratio':<10}{ratios['median_s']:>9.1f}x{ratios['median_cpu_s']:>9.1f}x{ratios['extra_peak_mb']:>15.1f}x")
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
