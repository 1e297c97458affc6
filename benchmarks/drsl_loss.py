"""Time and peak memory of DRSL's losses of the modes: the exact cheap form against the literal one.

One domain's margin loss and both domains' alignment, forward and backward without a network, on one thread. Each
measurement runs in a fresh process, so that its peak memory is its own.

    python benchmarks/drsl_loss.py --json benchmarks/results/drsl_loss.json
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

from segadapt.trainables.core.losses import mode_alignment

HERE = Path(__file__).parent
FORMS = ("literal", "cheap")
LOSSES = ("margin", "alignment")


def load_literal() -> ModuleType:
    spec = importlib.util.spec_from_file_location("literal_drsl", HERE / "literal" / "drsl.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_inputs(setting: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return embeddings of both domains, labels, 5 % of them ignored, and modes."""
    torch.manual_seed(0)
    shape = (setting["batch"], setting["channels"], *setting["grid"])
    source, target = (torch.randn(shape).requires_grad_() for _ in range(2))
    labels = torch.randint(0, setting["classes"], (shape[0], *shape[2:]))
    labels[torch.rand(labels.shape) < 0.05] = 255
    modes = torch.randn(setting["classes"], setting["modes"], setting["channels"]).requires_grad_()
    return source, target, labels, modes


def take_step(module: ModuleType, loss_name: str, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
    source, target, labels, modes = inputs
    if loss_name == "margin":
        loss, _ = module.mode_margin(source, labels, modes)
    else:
        per_class, num_modes = modes.shape[1], modes.shape[0] * modes.shape[1]
        cells = torch.where(labels == 255, -1, labels * per_class + torch.arange(labels.shape[-1]) % per_class)
        loss = module.mode_alignment(source, cells, target, cells.flip(-1), num_modes=num_modes)
    loss.backward()
    return float(loss)


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(form: str, loss_name: str, setting: dict[str, Any]) -> dict[str, Any]:
    """Return peak memory beyond the inputs in the first step, then the CPU times of the others.

    Gradients by the inputs count as extra memory. A tiny step beforehand loads the libraries' code.
    """
    torch.set_num_threads(setting["threads"])
    module = {"cheap": mode_alignment, "literal": load_literal()}[form]
    take_step(module, loss_name, make_inputs({**setting, "grid": (3, 3), "channels": 8}))
    inputs = make_inputs(setting)
    before = peak_bytes()
    value = take_step(module, loss_name, inputs)
    extra = peak_bytes() - before
    seconds = []
    for _ in range(setting["repeats"]):
        for tensor in inputs:
            tensor.grad = None
        start = time.process_time()
        take_step(module, loss_name, inputs)
        seconds.append(time.process_time() - start)
    return {"loss": value, "extra_peak_mb": extra / 1e6, "median_cpu_s": statistics.median(seconds), "cpu_s": seconds}


def cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure DRSL's losses of the modes, cheap form against literal.")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--grid", type=int, nargs=2, default=[65, 129], metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--modes", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)  # what the measuring processes are called with
    arguments = parser.parse_args()
    setting = {name: value for name, value in vars(arguments).items() if name not in ("json", "form", "losses")}
    if arguments.form:
        print(json.dumps(measure(arguments.form, arguments.losses[0], setting)))
        return

    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    results: dict[str, dict[str, Any]] = {}
    print(f"{'loss':<11}{'form':<10}{'median CPU s':>14}{'extra peak MB':>16}{'value':>14}")
    for loss in arguments.losses:
        results[loss] = {}
        for form in FORMS:
            command = [sys.executable, __file__, *sys.argv[1:], "--losses", loss, "--form", form]
            output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            row = results[loss][form] = json.loads(output)
            print(f"{loss:<11}{form:<10}{row['median_cpu_s']:>14.3f}{row['extra_peak_mb']:>16.0f}{row['loss']:>14.6f}")
        literal, cheap = results[loss]["literal"], results[loss]["cheap"]
        ratios = {key: literal[key] / cheap[key] for key in ("median_cpu_s", "extra_peak_mb")}
        results[loss]["ratios"] = ratios
        print(f"{loss:<11}{'ratio':<10}{ratios['median_cpu_s']:>13.1f}x{ratios['extra_peak_mb']:>15.1f}x")
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
