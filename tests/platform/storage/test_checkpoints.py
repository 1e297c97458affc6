"""Where checkpoints lie and what their files say: one owner of the folder's format."""

import json
from pathlib import Path

import pytest

from segadapt.platform.errors import UsageError
from segadapt.platform.storage import checkpoints
from segadapt.platform.storage.checkpoints import (
    best_checkpoint,
    checkpoint_folder,
    checkpoint_name,
    put_away,
    trial_of,
)
from segadapt.platform.storage.folders import Storage
from segadapt.trainables.core.training.checkpoint import EVALUATION, save_state

NAME = "ray/town/abc/checkpoint_000003"


def a_checkpoint(storage: Storage, name: str = NAME) -> Path:
    folder = storage.root / name
    folder.mkdir(parents=True)
    save_state(folder, {})
    content = {
        "metrics": {"step": 4, "target_val/miou": 0.5, "target_val/iou/road": 0.7},
        "classes": ["road", "car"],
        "colors": [[128, 64, 128], [0, 0, 142]],
        "target_val": {"confusion": [[3, 1], [0, 2]]},
    }
    (folder / EVALUATION).write_text(json.dumps(content))
    return folder


def test_a_checkpoint_is_noted_by_its_path_below_the_storage_folder(tmp_path: Path) -> None:
    storage, moved = Storage(tmp_path / "runs"), Storage(tmp_path / "moved")
    folder = a_checkpoint(storage)
    noted = checkpoint_name(storage, folder)
    assert noted == NAME
    assert checkpoint_folder(storage, noted) == folder
    storage.root.rename(moved.root)
    assert (checkpoint_folder(moved, noted) / EVALUATION).is_file()
    assert trial_of(noted) == "abc"


@pytest.mark.parametrize("name", [NAME, "ray/town/train/abc/checkpoint_000003", "ray/ray/ray/checkpoint_000003"])
@pytest.mark.parametrize("former", ["/gone/runs", "/home/ray/runs"])
def test_an_absolute_path_of_an_earlier_version_is_found_below_the_experiments(
    name: str, former: str, tmp_path: Path
) -> None:
    storage = Storage(tmp_path / "ray" / "runs")
    folder = a_checkpoint(storage, name)
    assert checkpoint_folder(storage, str(folder)) == folder, "where it was"
    assert checkpoint_folder(storage, f"{former}/{name}") == folder, "where it was moved"


def test_a_storage_folder_that_is_named_by_a_way_up_keeps_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    storage = Storage(tmp_path / "project" / ".." / "runs")
    folder = a_checkpoint(storage)
    assert checkpoint_folder(storage, checkpoint_name(storage, folder)) == folder
    assert checkpoint_folder(storage, str(folder)) == folder


def test_a_checkpoint_that_is_gone_is_named_where_it_should_be(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert checkpoint_folder(storage, NAME) == checkpoint_folder(storage, f"/gone/{NAME}") == tmp_path / NAME


@pytest.mark.parametrize(
    "noted",
    [
        "../elsewhere",
        "ray/../../elsewhere",
        "/etc",
        "/gone/ray/../../elsewhere",
        "/etc/runs/checkpoint_000001",
        "{}/..",
        "{}",
        "",
        ".",
        "ray",
        "ray/town",
        "ray/town/abc",
        "ray/town/artifacts/abc/checkpoint_000001",
        "stages/town/abc/checkpoint_000001",
        "/gone/ray/town",
        "ray/town/abc/checkpoint_\0",
        "ray/town/.hidden/checkpoint_000001",
    ],
)
def test_what_is_noted_and_is_no_checkpoint_in_the_storage_folder_is_refused(noted: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"A checkpoint must lie in the storage folder .*, but is noted as"):
        checkpoint_folder(Storage(tmp_path), noted.format(tmp_path))


def test_what_was_removed_is_noted_by_its_path_below_the_storage_folder(tmp_path: Path) -> None:
    storage, moved = Storage(tmp_path / "runs"), Storage(tmp_path / "moved")
    a_checkpoint(storage)
    put_away(storage.experiment("town"), "abc", "target_val/miou")
    record = storage.experiment("town") / checkpoints.REMOVED / "abc.json"
    assert json.loads(record.read_text())["path"] == NAME
    storage.root.rename(moved.root)
    best = best_checkpoint(moved.experiment("town"), "abc", "target_val/miou")
    assert best is not None
    assert (best.path, best.kept, best.metrics["step"]) == (moved.root / NAME, False, 4)


def test_the_files_of_a_checkpoint_are_read_by_what_they_say(tmp_path: Path) -> None:
    folder = a_checkpoint(Storage(tmp_path))
    checkpoints.write_configuration(folder, {"method_name": "sdca", "seed": 0})
    assert checkpoints.configuration(folder) == {"method_name": "sdca", "seed": 0}
    assert checkpoints.read_metrics(folder)["step"] == 4
    assert checkpoints.class_names(folder) == ("road", "car")
    assert checkpoints.class_colors(folder) == ((128, 64, 128), (0, 0, 142))
    assert checkpoints.confusion(folder, "target_val") == [[3, 1], [0, 2]]
    assert checkpoints.iou_table(folder)["data"] == [["road", 0.7], ["car", None]]
    assert checkpoints.label_table(folder) is None
    assert checkpoints.is_sound(folder)
    assert len(checkpoints.state_hash(folder)) == 64
