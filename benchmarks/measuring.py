"""How the loss benchmarks measure: a literal and a cheap form of the same loss, each in a fresh process.

A script `<method>_loss.py` holds inputs, the steps of both forms, and settings; it hands `compare` or `compare_parts` a
function that measures one form. Started by hand, a script starts itself once per form and prints a table; the hidden
option `--form` makes it measure that form instead.

What a form's row may hold; times are those of a whole step, forward and backward:

* `loss`: the value, the same in both forms up to rounding.
* `extra_peak_mb`: by how much, in 10^6 bytes, the first step raised the process's peak memory. Gradients by the inputs
  count; so does code that libraries load in the first step, unless the script takes a tiny step beforehand.
* `median_s`, `seconds`: wall time.
* `median_cpu_s`, `cpu_seconds` or `cpu_s`: processor time; trust this one where other programs compete for the machine.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMS = ("literal", "cheap")
COLUMNS = {"median_s": "median s", "median_cpu_s": "median CPU s", "extra_peak_mb": "extra peak MB"}

Row = dict[str, Any]
"""What was measured of one form, ready for JSON."""


def first_step(step: Callable[[], Tensor]) -> Row:
    """Return `loss` and `extra_peak_mb` of the first step. Call it with the inputs made and nothing else done."""
    before = peak_bytes()
    loss = step().item()
    return {"loss": loss, "extra_peak_mb": (peak_bytes() - before) / 1e6}


def time_steps(step: Callable[[], Tensor], inputs: Iterable[Tensor], repeats: int) -> tuple[list[float], list[float]]:
    """Return wall and processor seconds of further steps, each from cleared gradients of the inputs."""
    inputs = list(inputs)
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        for tensor in inputs:
            tensor.grad = None
        start, cpu_start = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return seconds, cpu_seconds


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_tensor_bytes(step: Callable[[], object]) -> int:
    """Return by how much a step raises the bytes that tensors hold on the CPU at any time.

    What torch allocates: neither the program's code nor what the system adds to it.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def compare(parser: argparse.ArgumentParser, measure: Callable[[str, dict[str, Any]], Row]) -> None:
    """Run a script: compare both forms, print a table and, with `--json`, write the record.

    Args:
        parser: The script's settings, `--repeats` among them; the options common to all scripts are added.
        measure: Returns the row of a form, given its name and the setting.
    """
    arguments, setting = parse(parser)
    if arguments.form:
        print(json.dumps(measure(arguments.form, setting)))
        return
    rows, ratios = compare_forms("form", arguments.threads)
    write_record(arguments.json, setting, results=rows, ratios=ratios)


def compare_parts(
    parser: argparse.ArgumentParser, measure: Callable[[str, dict[str, Any], str], Row], option: str
) -> None:
    """Do as `compare` does for each part of a method on its own.

    Args:
        parser: As in `compare`.
        measure: Returns the row of a form, given its name, the setting and the part's name.
        option: The option, without dashes, that lists the parts.
    """
    arguments, setting = parse(parser)
    parts = setting.pop(option)
    if arguments.form:
        print(json.dumps(measure(arguments.form, setting, parts[0])))
        return
    results = {}
    for part in parts:
        rows, ratios = compare_forms(part, arguments.threads, f"--{option}", part)
        results[part] = {**rows, "ratios": ratios}
    write_record(arguments.json, setting, results=results)


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Add the common options and obey `--threads`; return all arguments, and those that are settings."""
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)  # what the measuring processes are called with
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments, {name: value for name, value in vars(arguments).items() if name not in ("json", "form")}


def compare_forms(title: str, threads: int, *options: str) -> tuple[dict[str, Row], dict[str, float]]:
    """Measure each form in a process of its own; print and return the rows by form and the ratios, literal by cheap."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    rows = {}
    for form in FORMS:
        command = [sys.executable, *sys.argv, *options, "--form", form]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        rows[form] = json.loads(done.stdout)
    ratios = {key: rows["literal"][key] / rows["cheap"][key] for key in COLUMNS if rows["cheap"].get(key)}

    print(f"{title:<10}" + "".join(f"{COLUMNS[key]:>16}" for key in ratios) + f"{'loss':>14}")
    for form, row in rows.items():
        print(f"{form:<10}" + "".join(f"{row[key]:>16.3f}" for key in ratios) + f"{row['loss']:>14.6f}")
    print(f"{'ratio':<10}" + "".join(f"{ratio:>15.1f}x" for ratio in ratios.values()), flush=True)
    return rows, ratios


def emit(result: dict[str, Any], path: Path | None) -> None:
    """Print what a benchmark found and, where a path is given, write it."""
    text = json.dumps(result, indent=1)
    print(text)
    if path is not None:
        path.write_text(text + "\n")


def write_record(path: Path | None, setting: dict[str, Any], **measured: Any) -> None:
    if path is None:
        return
    record = {
        "setting": setting,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "cpu": cpu_model(),
        **measured,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
