"""`import segadapt`: quick, typed, and the same room behind the door as behind the command line's."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import segadapt

ROOT = Path(__file__).parents[3]

IMPORTED = """
import sys, threading, time

started = time.perf_counter()
import segadapt
seconds = time.perf_counter() - started

assert not {"torch", "ray", "mlflow", "optuna", "numpy", "pydantic", "yaml"} & set(sys.modules)
assert threading.active_count() == 1
segadapt.Place, segadapt.Resources, segadapt.Tolerance, segadapt.UsageError
assert not {"torch", "ray", "mlflow", "optuna", "numpy"} & set(sys.modules)
print(seconds)
"""

TYPED = '''
"""Uses every public name as its types say."""

from pathlib import Path
from typing import assert_type

import segadapt

place: segadapt.Place = segadapt.Place(Path("runs"), tracking_uri="http://127.0.0.1:5000")
resources = segadapt.Resources(workers=2, gpus=1, launcher="train")
tolerance = segadapt.Tolerance(max_failures=0, timeout_s=600)
assert_type(segadapt.__version__, str)

planned = segadapt.plan(["sdca", "plca"], {"trainer.steps": 400}, trials=20, place=place, resources=resources)
assert_type(planned, segadapt.Plan)
assert_type(planned.estimate().search_s, float)
result = segadapt.search("sdca", place=place, seed=0, keep_top=3, warm_start=["a"], tolerance=tolerance, say=print)
assert_type(result, segadapt.Result)
if result.best is not None:
    assert_type(result.best.best, float | None)
assert_type(segadapt.train("sdca", {"seed": 1}, place=place, debug=True), segadapt.Result)
finished = segadapt.finish("best", result.name, rounds=2, place=place)
assert_type(finished, segadapt.Finish)
assert_type(finished.results[0].checkpoint, str | None)
assert_type(segadapt.runs(result.name, selection=True, place=place).rows[0].name, str)
assert_type(segadapt.status(result.name, place=place).state, str)
assert_type(segadapt.report(result.name, place=place), Path)
assert_type([entry["event"] for entry in segadapt.trial_log("best", result.name)][:0] == [], bool)
assert_type(segadapt.evaluate("best", result.name, scales=[1.0, 1.25]).metrics["target_val/miou"], float)
assert_type(segadapt.export("best", result.name, out="out").version, str)
assert_type(segadapt.predict("out/model.onnx", "photos", "labels", confidence=True).written, int)
assert_type([finding.level == "fault" for finding in segadapt.doctor(place=place, fix=True)], list[bool])
assert_type(segadapt.cache_list(place=place).bytes, int)
assert_type(segadapt.cache_prune(older_than_days=30.0, dry_run=True).bytes, int)
assert_type(segadapt.submit(["search", "sdca"], address="http://127.0.0.1:8265"), str)
assert_type([job.state for job in segadapt.jobs(address="http://127.0.0.1:8265")], list[str])
assert_type("".join(segadapt.logs("job", address="http://127.0.0.1:8265", follow=True)), str)
assert_type(segadapt.stop("job", address="http://127.0.0.1:8265"), bool)
assert_type(segadapt.ui(port=5000), int)
assert_type(segadapt.data_make("town", {}, layout="gta5"), Path)
assert_type(len(segadapt.data_check("folder", "town").faults), int)
assert_type(segadapt.data_recognise("camvid").kind, str | None)
assert_type(segadapt.data_adopt("camvid", "town").layout, str)
assert_type(len(segadapt.data_pack("folder", "town", "packed", size=(32, 64)).shards), int)
assert_type(segadapt.data_show("sheet.png", {}), Path)
assert_type(segadapt.weights_fetch("timm:test_vit", "vit.pth", licence="mit", place=place).sha256, str)
assert_type([stored.licence for stored in segadapt.weights_list(place=place)], list[str])
assert_type(segadapt.list_methods(), list[tuple[str, str]])
assert_type(segadapt.describe("sdca")[0][0].doc, str)
assert_type(segadapt.network_size("sdca", {"network.name": "compact"}).trained, int)
try:
    segadapt.search("sdca", resume="x")
except segadapt.UsageError as error:
    print(error)

segadapt.serch("sdca")  # type: ignore[attr-defined]
segadapt.search("sdca", trials="many")  # type: ignore[arg-type]
segadapt.search("sdca", trails=3)  # type: ignore[call-arg]
segadapt.train("sdca", rerank=3)  # type: ignore[call-arg]
'''


def test_importing_takes_a_tenth_of_a_second_and_starts_nothing() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True) for _ in range(5)
    ]
    assert min(float(done.stdout) for done in runs) <= 0.1


def test_every_name_is_there_and_only_those() -> None:
    assert {name for name in dir(segadapt) if not name.startswith("_")} >= set(segadapt.__all__)
    assert sorted(segadapt._MODULE_OF) == sorted(segadapt.__all__)
    for name in segadapt.__all__:
        assert getattr(segadapt, name).__name__ == name
    assert segadapt.__version__ == version("segadapt")
    with pytest.raises(AttributeError, match="module 'segadapt' has no attribute 'serch'; it offers Finish, Place"):
        getattr(segadapt, "serch")  # noqa: B009  # a type checker refuses `segadapt.serch`


def test_a_users_script_is_checked_by_its_types(tmp_path: Path) -> None:
    assert all(f"segadapt.{name}" in TYPED for name in segadapt.__all__)
    (tmp_path / "script.py").write_text(TYPED)
    words = ["--strict", "--config-file", str(ROOT / "pyproject.toml"), str(tmp_path / "script.py")]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *words], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert checked.returncode == 0, checked.stdout
