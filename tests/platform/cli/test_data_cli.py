"""Datasets on the command line: written, checked, and trained from."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

import segadapt as api
from segadapt.platform.errors import UsageError
from segadapt.platform.settings.config import anchored, resolve
from segadapt.trainables.core.data.datasets import load_data

Call = Callable[..., CompletedProcess[str]]

SMALL = {
    "data.streets.height": 32,
    "data.streets.width": 64,
    "data.streets.train_images": 6,
    "data.streets.val_images": 2,
}
SMALL_WORDS = [f"{key}={value}" for key, value in SMALL.items()]


def test_streets_as_own_data_reads_back(segadapt: Call, tmp_path: Path) -> None:
    assert segadapt("data", "make", "town", *SMALL_WORDS).returncode == 0
    assert "must be new or empty" in segadapt("data", "make", "town").stderr
    values = {"data.source": f"folder:{tmp_path}/town/source", "data.target": f"folder:{tmp_path}/town/target"}
    data, evaluation = load_data(resolve("sdca", values).data)
    streets, streets_evaluation = load_data(resolve("sdca", SMALL).data)
    assert data.classes == streets.classes
    assert (len(data.source), len(data.target), len(evaluation.target)) == (6, 6, 2)
    for index in range(6):
        assert torch.equal(data.source.image(index), streets.source.image(index))
        assert torch.equal(data.source.label(index), streets.source.label(index))
        assert torch.equal(data.target.image(index), streets.target.image(index))
    assert torch.equal(evaluation.target.label(1), streets_evaluation.target.label(1))


@pytest.mark.parametrize("kind", ["gta5", "synthia", "cityscapes"])
def test_streets_can_be_written_as_every_known_dataset(kind: str, tmp_path: Path) -> None:
    root = api.data_make(str(tmp_path / kind), SMALL, layout=kind)
    report = api.data_check(kind, str(root))
    assert report.faults == ()
    assert report.splits["train"].images == 6


def test_check_shows_a_sound_dataset(segadapt: Call, tmp_path: Path) -> None:
    api.data_make(str(tmp_path / "gta5"), SMALL, layout="gta5")
    done = segadapt("data", "check", "gta5", "gta5")
    assert done.returncode == 0, done.stderr
    assert "train: 6 images, 6 labels, about" in done.stdout
    assert "64x32 (3), 64x26 (3)" in done.stdout
    assert "vegetation" in done.stdout
    assert "note: Labels of train that differ in size from their image" in done.stdout
    assert "gta5 is sound." in done.stdout


def test_check_lists_every_fault_and_exits_with_status_1(segadapt: Call, tmp_path: Path) -> None:
    root = api.data_make(str(tmp_path / "city"), SMALL, layout="cityscapes")
    labels = sorted((root / "gtFine").rglob("*.png"))
    for label in labels[:3]:
        label.write_bytes(label.read_bytes()[:60])
    labels[-1].unlink()
    done = segadapt("data", "check", "cityscapes", "city")
    assert done.returncode == 1
    assert "unreadable label (3):" in done.stdout
    assert "image without a label (1):" in done.stdout
    assert all(label.name in done.stdout for label in labels[:3])
    assert "4 faults in city" in done.stdout

    done = segadapt("data", "check", "cityscapes", "city", "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert len(report["faults"]) == 4
    assert report["faults"][0].keys() == {"problem", "path", "detail"}
    assert report["splits"]["train"]["images"] == 6
    assert report["splits"]["val"]["labels"] == 1


def test_roots_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"data.source": "gta5:a", "data.target": "cityscapes:/b", "seed": 1}
    expected = {"data.source": f"gta5:{tmp_path}/a", "data.target": "cityscapes:/b", "seed": 1}
    assert anchored(values) == expected
    assert anchored({"data.source": None}) == {"data.source": None}


def test_a_broken_class_list_is_wrong_usage(tmp_path: Path) -> None:
    root = api.data_make(str(tmp_path / "town"), SMALL)
    (root / "source" / "classes.yaml").write_text("[]")
    with pytest.raises(UsageError, match=r"classes.yaml must list the classes"):
        api.data_check("folder", str(root / "source"))


@pytest.mark.slow
def test_a_run_says_what_it_trains_and_what_it_left_out(segadapt: Call, tmp_path: Path) -> None:
    import mlflow

    synthia = api.data_make(str(tmp_path / "synthia"), SMALL, layout="synthia")
    api.data_make(str(tmp_path / "city"), SMALL, layout="cityscapes")
    (synthia / "RGB" / "0000003.png").write_bytes(b"")
    words = ["data.source=synthia:synthia", "data.target=cityscapes:city", "trainer.steps=2", "trainer.eval_every=2"]
    words += ["trainer.batch_size=2", "warmup.steps=2"]
    done = segadapt("train", "source_only", *words, "--skip-bad")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "16 classes are trained: road, sidewalk" in said
    assert "ignored in the target: terrain, truck, train." in said
    assert "of source train are left out as bad: 0000003.png." in said
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("train-source_only-synthia-cityscapes")
    tags = [run.data.tags for run in client.search_runs([experiment.experiment_id])]
    assert any("16 classes are trained" in tag.get("segadapt.data_notes", "") for tag in tags)


def test_a_packed_dataset_is_checked(segadapt: Call, tmp_path: Path) -> None:
    api.data_make(str(tmp_path / "gta5"), SMALL, layout="gta5")
    api.data_make(str(tmp_path / "city"), SMALL, layout="cityscapes")
    done = segadapt("data", "pack", "gta5", "gta5", "packed/gta5")
    assert done.returncode == 0, done.stderr
    assert "packed/gta5: train 6 images, " in done.stdout
    words = ["data", "pack", "cityscapes", "city", "packed/city", "--size", "16", "32", "--format", "jpeg"]
    done = segadapt(*words, "--quality", "90")
    assert done.returncode == 0, done.stderr
    assert "packed/city: train 6 images, val 2 images, " in done.stdout
    done = segadapt(*words)
    assert done.returncode == 2
    assert "but --format or --quality differs from what packed/city was begun with" in done.stderr

    done = segadapt("data", "check", "shards", "packed/city")
    assert done.returncode == 0, done.stderr
    assert "train: 6 images, 6 labels, about" in done.stdout
    assert "sizes: 32x16 (6)" in done.stdout
    assert "note: packed from cityscapes, resized to 32x16 for training and images compressed as JPEG." in done.stdout
    assert "packed/city is sound." in done.stdout

    shard = tmp_path / "packed" / "city" / "train-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    done = segadapt("data", "check", "shards", "packed/city", "--json")
    assert done.returncode == 1
    assert [fault["problem"] for fault in json.loads(done.stdout)["faults"]] == ["shard with a wrong checksum"]


def test_packing_what_cannot_be_packed_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be one of gta5, synthia, cityscapes, folder, but got 'shards'"):
        api.data_pack("shards", "a", "b")
    with pytest.raises(UsageError, match="must be an existing folder"):
        api.data_pack("gta5", str(tmp_path / "absent"), str(tmp_path / "out"))
    root = api.data_make(str(tmp_path / "gta5"), SMALL, layout="gta5")
    with pytest.raises(UsageError, match="--format must be png or jpeg"):
        api.data_pack("gta5", str(root), str(tmp_path / "out"), image_format="tiff")
    with pytest.raises(UsageError, match="`segadapt data pack` writes last"):
        api.data_check("shards", str(root))


def test_an_address_of_shards_is_not_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"data.source": "shards:s3://bucket/gta5", "data.target": "shards:packed"}
    assert anchored(values) == {"data.source": "shards:s3://bucket/gta5", "data.target": f"shards:{tmp_path}/packed"}
