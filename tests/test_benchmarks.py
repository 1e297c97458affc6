"""Every script in `benchmarks/` runs through at its smallest size and writes what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PARTS = {"gpu_checks", "measuring", "surrogate/model"}
"""Modules that others import."""
WORLD = ("data.streets.train_images=4", "data.streets.val_images=2", "trainer.batch_size=2", "warmup.steps=1")
SMALL = (*WORLD, "data.streets.height=32", "data.streets.width=64")
TINY = (*SMALL, "trainer.steps=2", "trainer.eval_every=2")
MAPS = ("--grid", "4", "5", "--channels=8", "--classes=3", "--repeats=1")
SMALLEST: dict[str, tuple[str, ...]] = {
    "bicl_loss": ("--batch=1", "--grid=4", "--pixels=24", "--channels=8", "--classes=3", "--repeats=1"),
    "busy": (*TINY, "--trials=1"),
    "clst_loss": ("--batch=1", *MAPS),
    "confusion": ("--width=64", "--height=32", "--repeats=1"),
    "drsl_loss": ("--batch=1", "--modes=2", *MAPS),
    "finish": ("trainer.steps=2", "--methods", "bicl", "--seeds", "0", "--rounds=1", "--trial", *TINY),
    "first_gpu": ("--toy", "--out", "toy"),
    "input": ("--width=64", "--height=32", "--images=2", "--repeats=1"),
    "kernels": ("--grid", "4", "4", "--channels=32"),
    "memory": ("--methods", "sdca", "--sizes", "32x64", "--steps=2", "--networks", "timm:test_resnet"),
    "networks": ("--networks", "timm:test_vit", "--sizes", "32x32", "--batch-size=1", "--repeats=1"),
    "predicted": ("--methods", "plca", "--network", "compact", "--scale=0.1"),
    "online": ("--size=32x64", "--batch-size=1", "--steps=1", "--rounds=1"),
    "overhead": (*SMALL, "--trials=1", "--steps=2"),
    "plca_loss": ("--images=1", *MAPS),
    "recovery": ("--turns=1", "--faults", "worker"),
    "scale": ("--trials=2", "--nodes=1"),
    "scaling": ("--methods", "sdca", "--steps=1", "--rounds=1", "--batch-size=1"),
    "sdca_loss": ("--batch=1", *MAPS),
    "search_efficiency": ("--seeds=1", "--trials=2"),
    "search_efficiency_streets": (*WORLD, "--seeds", "0", "--steps=2", "--eval-every=1", "--random-trials=1"),
    "search_overhead": ("--trials=12", "--reports=2", "--samplers", "random", "--repeats=1"),
    "shift": (*SMALL, "data.streets.edition=2", "--seeds", "1000", "--processes=1"),
    "stage_cache": (*TINY, "--methods", "sdca", "--trials=1"),
    "startup": ("--turns=1", "--trials=3", "--parts", "command", "single"),
    "step": ("--setting=streets", "--methods", "sdca", "--steps=1", "--rounds=1", "--batch-size=1"),
    "streets": (*TINY, "--methods", "sdca", "--seeds", "0", "--processes=1"),
    "surrogate/collect": (*TINY, "--trials=1", "--processes=1"),
    "surrogate/fit": (),
    "threads": ("--others=1", "--turns=1", "--steps=1", "--waits", "sleep"),
    "tracking": ("--trials=1", "--evaluations=1"),
}


def test_every_benchmark_is_run() -> None:
    scripts = [*BENCHMARKS.glob("*.py"), *BENCHMARKS.glob("surrogate/*.py")]
    assert SMALLEST.keys() | PARTS == {str(path.relative_to(BENCHMARKS).with_suffix("")) for path in scripts}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_runs_at_its_smallest_size(name: str, tmp_path: Path) -> None:
    if name == "kernels":
        pytest.importorskip("triton")
    results = tmp_path / "results.json"
    option = "--file" if name.startswith("surrogate/") else "--json"
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *SMALLEST[name], option, str(results)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False)
    output = ran.stdout + ran.stderr
    assert ran.returncode == 0, output
    assert "has changed in a part that segadapt uses" not in output
    assert json.loads(results.read_text())
