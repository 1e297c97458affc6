"""Prove a GPU and fill every empty figure of docs/performance.md in ten minutes: `make gpu`.

    python benchmarks/first_gpu.py [--out FOLDER] [--toy] [--stages NAME ...]

Needs what a GPU machine usually carries: torch, torchvision, timm and numpy. Stages run in order of their worth, each
in a process of its own and ended at its limit; 560 s in all:

* environment (20 s): card, versions, native types, one product of matrices.
* checks (120 s): `gpu_checks.py`: steps equal to the CPU's, no waits, resumption to the bit, kernels, short memory.
* steps (230 s): `step.py` with DeepLab-v2 on ResNet-101 at the papers' sizes against the literal step, each method.
* choices (100 s): PLCA's kernels and torch.compile, on and off.
* search (90 s): a real search of four trials; skipped where the platform's packages are not installed.

Each stage leaves `FOLDER/<stage>.json`, written anew after every row, so that a stage that is ended keeps what it had.
Called again, it goes on: stages that are done are not repeated. `--toy` runs every stage at a toy size on the CPU.
Exit status: 0 all done or skipped, 1 a stage failed or was ended at its limit.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PARTS_OF_THE_PACKAGE = ("trainables", "search_spaces", "platform")
TOY_METHODS = ("sdca",)


class Record:
    """The rows of a stage, on disk after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Any] = {}

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Add a row and write all."""
        self.rows[name] = row
        write(self.path, {"rows": self.rows})

    def measure(self, name: str, measured: Callable[[], dict[str, Any]]) -> None:
        """Add what a function returns and how long it took, or why it failed."""
        began = time.perf_counter()
        try:
            row = measured()
        except Exception as error:  # the other rows are of worth as well
            row = {"error": f"{type(error).__name__}: {error}"}
        self.add(name, {**row, "seconds": time.perf_counter() - began})


def environment(record: Record, toy: bool) -> None:
    """Describe the machine."""
    import torch

    from step import machine

    device = torch.device("cpu" if toy else "cuda")
    record.add("machine", machine(device))
    if not toy:
        card = torch.cuda.get_device_properties(device)
        record.add(
            "card",
            {
                "capability": f"{card.major}.{card.minor}",
                "shared_bytes_per_block": card.shared_memory_per_block_optin,
                "multiprocessors": card.multi_processor_count,
                "native_bf16": torch.cuda.is_bf16_supported(including_emulation=False),
                "triton": importlib.util.find_spec("triton") is not None,
            },
        )

    def product() -> dict[str, Any]:
        side = 64 if toy else 8192
        matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
        seconds = fastest(lambda: matrix @ matrix, device)
        return {"teraflops": 2 * side**3 / seconds / 1e12}

    record.measure("product in bfloat16", product)


def fastest(step: Callable[[], object], device: Any) -> float:
    """Return the seconds of the fastest of five calls, after a first one."""
    from step import Clock

    step()
    times = []
    for _ in range(5):
        clock = Clock(device)
        began = clock.now()
        step()
        times.append(max(clock.now() - began, 1e-9))
    return min(times)


def checks(record: Record, toy: bool) -> None:
    """Run the checks."""
    import torch

    import gpu_checks

    device = torch.device("cpu" if toy else "cuda")
    for name, check in gpu_checks.CHECKS.items():
        if toy and name.startswith("resume") and "sdca" not in name:
            continue

        def checked(check: gpu_checks.Check = check) -> dict[str, Any]:
            try:
                return {"figures": check(device)}
            except gpu_checks.SkippedError as reason:
                return {"skipped": str(reason)}

        record.measure(name, checked)


def steps(record: Record, toy: bool) -> None:
    """Measure every method's step against the literal one."""
    from step import MEASURED

    for name in TOY_METHODS if toy else MEASURED:
        record.measure(name, lambda name=name: measured_step(toy, ["--methods", name]))


def choices(record: Record, toy: bool) -> None:
    """Measure what can be switched on, in the trainer alone; what is off stands in the stage before."""
    kernels = [] if toy else [("plca with kernels", ["--methods", "plca", "--kernels", "triton"])]
    compiled = [(f"{name} compiled", ["--methods", name, "--compile"]) for name in ("source_only", "sdca")]
    recomputed = [("sdca recomputed", ["--methods", "sdca", "--recompute"])]
    for name, words in [*kernels, *([] if toy else compiled), *recomputed]:
        record.measure(name, lambda words=words: measured_step(toy, [*words, "--forms", "trainer"]))


def measured_step(toy: bool, words: list[str]) -> dict[str, Any]:
    """Return what `step.py` measures with some words on its command line."""
    import step

    step.LONGEST_TURN_S = 0.1 if toy else 3.0
    size = ["--device", "cpu", "--setting", "paper", "--scale", "0.05", "--networks", "compact"] if toy else []
    turns = ["--steps", "1", "--rounds", "1"] if toy else ["--steps", "8", "--rounds", "3"]
    return step.run(step.options_of([*size, *turns, *words]))


def search(record: Record, toy: bool) -> None:
    """Run a real search on the GPU."""
    missing = [name for name in ("ray", "mlflow", "optuna") if importlib.util.find_spec(name) is None]
    if missing:
        record.add("search", {"skipped": f"not installed here: {', '.join(missing)}"})
        return
    tiny = ["data.streets.height=32", "data.streets.width=64", "data.streets.train_images=4"]
    tiny += ["data.streets.val_images=2", "trainer.batch_size=2", "warmup.steps=1", "trainer.steps=2"]
    words = ["sdca", "--trials", "1" if toy else "4", *(tiny if toy else ["trainer.steps=120"])]

    def searched() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "segadapt.platform.cli", "search", *words]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError((done.stdout + done.stderr)[-2000:])
        return {"command": " ".join(words), "output": done.stdout[-4000:]}

    record.measure("search", searched)


@dataclass(frozen=True)
class Stage:
    """A part of the ten minutes."""

    run: Callable[[Record, bool], None]
    limit_s: float


STAGES = {
    "environment": Stage(environment, 20),
    "checks": Stage(checks, 120),
    "steps": Stage(steps, 230),
    "choices": Stage(choices, 100),
    "search": Stage(search, 90),
}
TOY_LIMIT_S = 600.0
"""Of each stage on the CPU, which others may be using."""


def run_stage(name: str, folder: Path, toy: bool, limit_s: float) -> dict[str, Any]:
    """Run a stage in a process of its own and return its record, whole or as far as it came."""
    path = folder / f"{name}.json"
    with package_on_path() as environment:
        command = [sys.executable, __file__, "--out", str(folder), "--run", name, *(["--toy"] if toy else [])]
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            status = "done" if process.wait(limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "ended at its limit"
        finally:
            end(process)
    rows = json.loads(path.read_text())["rows"] if path.is_file() else {}
    if status == "done" and any("error" in row for row in rows.values()):
        status = "failed"
    record = {"status": status, "seconds": time.perf_counter() - began, "limit_s": limit_s, "toy": toy, "rows": rows}
    write(path, record)
    return record


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and what it started, which is its group."""
    for ending in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, ending)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


@contextlib.contextmanager
def package_on_path() -> Iterator[dict[str, str]]:
    """Yield an environment in which `segadapt` can be imported: as it is installed, or else from this repository."""
    environment = dict(os.environ)
    if importlib.util.find_spec("segadapt") is not None:
        yield environment
        return
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "segadapt")
        package.mkdir()
        for part in PARTS_OF_THE_PACKAGE:
            (package / part).symlink_to(ROOT / part)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, environment.get("PYTHONPATH"))))
        yield environment


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1, default=str) + "\n")
    partial.replace(path)


def is_done(path: Path, toy: bool) -> bool:
    """Return whether a stage has been done, at the size that is asked for."""
    if not path.is_file():
        return False
    record = json.loads(path.read_text())
    return record.get("status") == "done" and record.get("toy") == toy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "first_gpu")
    parser.add_argument("--toy", action="store_true", help="every stage at a toy size on the CPU")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--json", type=Path, help="write all stages to this file as well")
    parser.add_argument("--run", choices=STAGES, help=argparse.SUPPRESS)  # what a stage's process is called with
    options = parser.parse_args()
    if options.run:
        STAGES[options.run].run(Record(options.out / f"{options.run}.json"), options.toy)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    records = {}
    for name in options.stages:
        path = options.out / f"{name}.json"
        if is_done(path, options.toy):
            records[name] = json.loads(path.read_text())
            print(f"{name}: done before")
            continue
        path.unlink(missing_ok=True)
        limit_s = TOY_LIMIT_S if options.toy else STAGES[name].limit_s
        records[name] = record = run_stage(name, options.out, options.toy, limit_s)
        print(f"{name}: {record['status']} in {record['seconds']:.0f} s of {limit_s:.0f}, {len(record['rows'])} rows")
        for row, content in record["rows"].items():
            if problem := content.get("error") or content.get("skipped"):
                print(f"  {row}: {problem}")
    if options.json is not None:
        write(options.json, records)
    sys.exit(any(record["status"] != "done" for record in records.values()))


if __name__ == "__main__":
    main()
