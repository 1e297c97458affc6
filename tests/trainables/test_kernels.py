"""PLCA's fused kernels: equal to the reference in Triton's interpreter and on a GPU, and compiled for one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_plca import make_problem, toy_batch, toy_method

from segadapt.trainables.core.losses import cycle_association

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton", reason="comes with torch for CUDA")


def run(*words: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *words], env=os.environ | environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_equal_the_reference_in_the_interpreter() -> None:
    run(str(Path(__file__).with_name("interpreted_kernels.py")))


def test_kernels_compile_for_a_gpu_and_keep_their_tiles_in_registers(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    script = str(ROOT / "benchmarks" / "kernels.py")
    run(script, "--grid", "9", "9", "--channels", "256", "--json", str(found), TRITON_CACHE_DIR=str(tmp_path))
    record = json.loads(found.read_text())
    for name, needs in record["sm_90"].items():
        assert needs["stack_bytes"] == 0, name
        assert needs["registers"] <= 65536 // 256, name
        assert needs["shared_bytes"] <= 227 * 1024, name
        assert needs["tensor_core_products"] > 0, name
    for name, needs in record["smaller cards"].items():
        assert needs["shared_bytes"] <= {"sm_86": 99 * 1024, "sm_75": 64 * 1024}[name[:5]], name
    counted = record["one image pair"]
    assert counted["output, triton, float32"]["gigabytes"] < counted["output, reference, float32"]["gigabytes"]


def test_kernels_are_refused_where_they_cannot_run() -> None:
    method = toy_method(kernels="triton")
    with pytest.raises(ValueError, match=r"on a CUDA device, but got torch.float32 on cpu. Choose 'reference'"):
        method(toy_batch(0), 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("level", ["feature_association", "output_association"])
def test_kernels_equal_the_reference_on_a_gpu(level: str) -> None:
    problem = make_problem(2, 300, (37, 41), (33, 50), labelled=0.9, seed=0)
    maps = [values.detach().float().cuda().requires_grad_() for values in problem.inputs]
    association = getattr(cycle_association, level)
    losses = [association(*maps, problem.labels.cuda(), kernels=form) for form in ("triton", "triton", "reference")]
    ours, again, theirs = (torch.autograd.grad(loss, maps) for loss in losses)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-5, atol=0)
    for own, repeated, reference in zip(ours, again, theirs, strict=True):
        assert torch.equal(own, repeated)
        assert (own - reference).norm() <= 1e-3 * reference.norm()
