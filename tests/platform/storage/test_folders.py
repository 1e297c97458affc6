"""Storage folders by any name: databases, artifacts and files lie in them and nowhere else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import TINY_WORDS
from searching import Watched, command

import segadapt as api
from segadapt.platform.errors import UsageError
from segadapt.platform.search.study_storage import open_study_storage
from segadapt.platform.storage.folders import Place, open_storage
from segadapt.platform.tracking.client import mlflow_client
from segadapt.platform.tracking.tracker import RunInfo, Tracker

ODD = "a%25b%2Fc ?#&+;'\"é[x]{y}*:@=,~$!(z)|<t>"
"""A folder as CI servers and people name them: all that means something in an address, a pattern, a shell or markup."""


@pytest.mark.parametrize("name", [ODD, "feature%2Fx?mode=memory", "file:a\\b\n%"])
def test_a_storage_folder_of_any_name_holds_its_databases_and_artifacts(name: str, tmp_path: Path) -> None:
    place = Place(tmp_path / name)
    tracker = Tracker(place)
    tracker.start(RunInfo("town", "town", "town", {}, {"lr": 1}))
    tracker.log_json("town", {"a": 1}, "sub/a.json")
    tracker.end("town", "FINISHED", {})
    tracker.close()
    optuna.create_study(study_name="town", storage=open_study_storage(place.study_url))
    client = mlflow_client(place.tracking_url)
    (run,) = client.search_runs([client.get_experiment_by_name("town").experiment_id])
    assert run.info.status == "FINISHED"
    assert [entry.path for entry in client.list_artifacts(run.info.run_id, "sub")] == ["sub/a.json"]
    assert Path(client.download_artifacts(run.info.run_id, "sub/a.json", str(tmp_path))).is_file()
    assert optuna.get_all_study_names(open_study_storage(place.study_url)) == ["town"]
    assert {path.name for path in tmp_path.iterdir()} == {name, "a.json"}, "nothing lies outside"
    assert {path.name for path in (tmp_path / name).iterdir() if not path.name.startswith(".")} == {
        "mlartifacts",
        "mlflow.db",
        "optuna.db",
        "tracking",
    }


def test_every_command_that_reads_takes_a_storage_folder_of_any_name(watched: Watched, tmp_path: Path) -> None:
    place = Place(tmp_path / ODD / "runs")
    watched.copy_storage(Path(place.storage))
    board = api.runs(Watched.NAME, place=place)
    assert len([row for row in board.rows if row.state == "finished"]) >= 1
    assert api.status(Watched.NAME, place=place).state == "finished"
    assert list(api.trial_log("best", Watched.NAME, place=place))
    assert api.cache_list(place=place).stages
    assert not [finding for finding in api.doctor(place=place) if finding.level == "fault"]
    assert "sdca-001" in api.report(Watched.NAME, str(tmp_path / ODD / "report.html"), place=place).read_text()
    planned = api.plan(fork=Watched.NAME, trials=1, name="again", place=place)
    assert planned.record.forked_from == Watched.NAME
    assert [path.name for path in tmp_path.iterdir()] == [ODD]


@pytest.mark.slow
def test_a_training_and_its_use_stay_in_folders_of_any_name(tmp_path: Path) -> None:
    runs, labels, exported = (f"{ODD}/{name}" for name in ("runs", "labels", "exported"))
    trained = command(tmp_path, "train", "source_only", "--name", "tiny", "--storage", runs, *TINY_WORDS, timeout=600)
    assert trained.returncode == 0, trained.stderr
    done = command(tmp_path, "export", "best", "--search", "tiny", "--storage", runs, "--out", exported, timeout=600)
    assert done.returncode == 0, done.stderr
    made = command(tmp_path, "data", "make", f"{ODD}/town", "data.streets.train_images=2", "data.streets.val_images=2")
    assert made.returncode == 0, made.stderr
    photos = f"{ODD}/town/target/val/images"
    predicted = command(tmp_path, "predict", f"{exported}/model.onnx", photos, labels, timeout=600)
    assert predicted.returncode == 0, predicted.stderr
    assert len(list((tmp_path / labels / "labels").iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == [ODD]


@pytest.mark.parametrize("use", [Place, open_storage])
def test_an_empty_storage_is_refused_and_not_taken_for_the_current_folder(
    use: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="--storage must be a path, but got ''"):
        use("")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["x", "-1", "1.5"])
def test_room_that_is_no_number_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGADAPT_MIN_FREE_BYTES", "")
    open_storage(str(tmp_path))
    monkeypatch.setenv("SEGADAPT_MIN_FREE_BYTES", text)
    with pytest.raises(UsageError, match="SEGADAPT_MIN_FREE_BYTES must be a number of bytes, but is"):
        open_storage(str(tmp_path))
