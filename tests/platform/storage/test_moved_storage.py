"""A storage folder that is moved, or copied and mounted elsewhere, is used as before."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import TINY_WORDS
from mlflow import MlflowClient
from searching import COMMAND, command, tracked, wait_for

import segadapt as api
from segadapt.platform.experiment.finishing import FinishRequest, plan_finish
from segadapt.platform.storage.folders import Place
from segadapt.platform.tracking.client import waiting_folder
from segadapt.platform.tracking.outbox import Outbox
from segadapt.platform.tracking.sender import send_waiting
from segadapt.trainables.core.training.checkpoint import file_hash

pytestmark = pytest.mark.slow

LONG = [word for word in TINY_WORDS if not word.startswith("trainer.steps=")] + ["trainer.steps=30"]


def interrupted_search(folder: Path) -> None:
    """Leave a search of two trials in the middle of the second."""
    options = ["--name", "town", "--trials", "2", "--concurrent", "1", "--scheduler", "none"]
    with (folder / "said.txt").open("w") as output:
        driver = subprocess.Popen(
            [COMMAND, "search", "sdca", *options, *LONG], cwd=folder, stdout=output, stderr=output, process_group=0
        )
    try:
        wait_for(lambda: "sdca-002 step 4/" in (folder / "said.txt").read_text(), "the second trial", timeout_s=600)
        driver.terminate()
        assert driver.wait(timeout=300) == 130
    finally:
        driver.kill()
        driver.wait()


def contents(folder: Path) -> dict[str, str]:
    """What lies in a folder, but for locks and what looking at a database leaves beside it."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: file_hash(path) for name, path in files.items() if not name.endswith((".lock", "-shm", "-wal"))}


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the storage folder of a search that was interrupted, moved, and resumed there."""
    first = tmp_path_factory.mktemp("first")
    interrupted_search(first)
    folder = tmp_path_factory.mktemp("mounts") / "elsewhere"
    folder.mkdir()
    (first / "runs").rename(folder / "runs")
    done = command(folder, "search", "--resume", "town")
    assert done.returncode == 0, done.stderr
    assert "going on, 1/2 trials done" in done.stdout
    assert "sdca-001 step" not in done.stdout, "what had ended is not run again"
    assert "sdca-002 step 2/" not in done.stdout, "the other goes on from its checkpoint"
    assert not (first / "runs").exists(), "nothing is written where the folder was"
    return folder


def test_a_search_goes_on_where_its_folder_is_now(moved: Path) -> None:
    runs = tracked(moved, "town")
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    client = MlflowClient(f"sqlite:///{moved}/runs/mlflow.db")
    for name in ("sdca-001", "sdca-002"):
        noted = Path(runs[name].data.tags["segadapt.checkpoint"])
        assert (noted.parts[:2], (moved / "runs" / noted / "state.pt").is_file()) == (("ray", "town"), True)
        assert runs[name].info.artifact_uri.startswith((moved / "runs" / "mlartifacts").as_uri())
        assert "gallery.png" in {entry.path for entry in client.list_artifacts(runs[name].info.run_id)}


def test_its_results_are_shown_evaluated_finished_and_exported(moved: Path) -> None:
    place = Place(str(moved / "runs"))
    best = api.runs("town", place=place).rows[0]
    assert best.checkpoint is not None
    assert Path(best.checkpoint).is_dir()
    assert Path(best.checkpoint).is_relative_to(moved / "runs" / "ray" / "town")
    evaluated = api.evaluate("best", "town", place=place)
    assert evaluated.metrics["target_val/miou"] == pytest.approx(best.best, abs=1e-6)
    exported = api.export("best", "town", out=str(moved / "exported"), place=place)
    assert (Path(exported.folder) / "model.onnx").is_file()
    assert "data:image/png" in api.report("town", str(moved / "town.html"), place=place).read_text()
    done = command(moved, "finish", "best", "--search", "town", "--rounds", "1", "trainer.steps=2")
    assert done.returncode == 0, done.stderr
    shown = re.search(r"best checkpoint: (.+)", done.stdout)
    assert shown is not None
    assert Path(shown[1]).is_dir()
    (record,) = (moved / "runs" / "ray").glob("town.finish-*/record.json")
    assert not Path(json.loads(record.read_text())["start"]).is_absolute()


def test_a_finish_has_the_same_name_wherever_the_folder_lies(moved: Path, tmp_path: Path) -> None:
    shutil.copytree(moved / "runs", tmp_path / "runs")
    request = FinishRequest("sdca-001", "town", {"trainer.steps": 2})
    records = [plan_finish(request, Place(str(folder / "runs")))[0] for folder in (moved, tmp_path)]
    assert records[0].name == records[1].name, "so that it goes on with what it began"
    assert records[0].start == records[1].start


def test_a_copy_is_another_storage_folder(moved: Path, tmp_path: Path) -> None:
    shutil.copytree(moved / "runs", tmp_path / "runs")
    before = contents(moved / "runs")
    done = command(tmp_path, "search", "--extend", "town", "--trials", "1")
    assert done.returncode == 0, done.stderr
    assert "3/3 trials done" in done.stdout
    place = Place(str(tmp_path / "runs"))
    rows = [row for row in api.runs("town", place=place).rows if row.kind == "trial"]
    assert len(rows) == 3
    assert {Path(str(row.checkpoint)).is_relative_to(tmp_path) for row in rows} == {True}
    api.evaluate("sdca-001", "town", place=place)
    assert contents(moved / "runs") == before, "what was copied is left alone"


def test_another_mount_of_a_folder_that_is_in_use_changes_nothing(moved: Path, tmp_path: Path) -> None:
    shutil.copytree(moved / "runs", tmp_path / "runs")
    place = Place(str(tmp_path / "runs"))
    driver = Outbox.create(waiting_folder(place))
    send_waiting(place)
    runs = tracked(tmp_path, "town")
    assert {run.info.artifact_uri.startswith(moved.as_uri()) for run in runs.values()} == {True}
    driver.finish_input()
    driver.close()
    send_waiting(place)
    runs = tracked(tmp_path, "town")
    assert {run.info.artifact_uri.startswith(tmp_path.as_uri()) for run in runs.values()} == {True}
