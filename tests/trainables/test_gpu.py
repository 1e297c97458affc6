"""What must hold on a GPU, and the script that shows it to a machine that has one for ten minutes."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name: str) -> ModuleType:
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))  # scripts import what lies beside them
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


gpu_checks = script("gpu_checks")
first_gpu = script("first_gpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", gpu_checks.CHECKS)
def test_a_check_holds_on_a_gpu(name: str) -> None:
    gpu_checks.CHECKS[name](torch.device("cuda"))


def test_a_check_refuses_a_step_that_is_not_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    build = gpu_checks.build

    def other_weights(*arguments: object, **keywords: object) -> object:
        method, stage = build(*arguments, **keywords)
        with torch.no_grad():
            next(iter(method.segmenter.head.parameters())).mul_(1.0 + len(built))
        built.append(method)
        return method, stage

    built: list[object] = []
    monkeypatch.setattr(gpu_checks, "build", other_weights)
    with pytest.raises(AssertionError, match="differ by"):
        gpu_checks.CHECKS["step of source_only in fp32"](torch.device("cpu"))


def test_the_limits_of_all_stages_fit_ten_minutes() -> None:
    assert sum(stage.limit_s for stage in first_gpu.STAGES.values()) <= 560


def test_a_stage_that_is_ended_at_its_limit_is_run_again_and_one_that_is_done_is_not(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    ended = first_gpu.run_stage("environment", tmp_path, True, 0.3)
    assert ended["status"] == "ended at its limit"
    assert not first_gpu.is_done(path, True)
    done = first_gpu.run_stage("environment", tmp_path, True, 300.0)
    assert done["status"] == "done"
    assert done["rows"]["product in bfloat16"]["teraflops"] > 0
    assert json.loads(path.read_text()) == done
    assert first_gpu.is_done(path, True)
    assert not first_gpu.is_done(path, False)  # the toy proves no GPU


def test_a_row_that_fails_leaves_the_others_and_fails_its_stage(tmp_path: Path) -> None:
    record = first_gpu.Record(tmp_path / "stage.json")
    record.measure("bad", lambda: 1 / 0)
    record.measure("good", lambda: {"value": 1})
    rows = json.loads((tmp_path / "stage.json").read_text())["rows"]
    assert rows["bad"]["error"] == "ZeroDivisionError: division by zero"
    assert rows["good"]["value"] == 1
