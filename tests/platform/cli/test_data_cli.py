"""Datasets on the command line: written, checked, and trained from."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import yaml
from PIL import Image

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


def colors_on(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as sheet:
        return {tuple(color) for _, color in sheet.convert("RGB").getcolors(sheet.width * sheet.height) or ()}  # type: ignore[arg-type]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Source and target of own data, whose images are of one colour and whose roads have each their own."""
    root = api.data_make(str(tmp_path / "town #1"), SMALL)
    for domain, road, image in (("source", "[1, 2, 3]", (200, 0, 0)), ("target", "[4, 5, 6]", (0, 200, 0))):
        classes = root / domain / "classes.yaml"
        classes.write_text(classes.read_text().replace("[128, 64, 128]", road))
        for path in (root / domain).rglob("images/*.png"):
            Image.new("RGB", (64, 32), image).save(path)
    return root


def test_show_draws_the_data_that_are_named_with_labels_in_their_own_colours(
    own: Path, segadapt: Call, tmp_path: Path
) -> None:
    source, target = {(200, 0, 0), (1, 2, 3)}, {(0, 200, 0), (4, 5, 6)}
    both = [f"data.source=folder:{own.name}/source", f"data.target=folder:{own.name}/target"]
    for words, written, shown in (
        (both, "folder-folder.png", source | target),
        (["both.png", *both], "both.png", source | target),
        (["folder", f"{own.name}/source"], "folder.png", source),
        (["folder", f"{own.name}/target", "target.png"], "target.png", target),
    ):
        done = segadapt("data", "show", *words)
        assert done.stdout == f"Wrote {written}\n", done.stderr
        assert (source | target) & colors_on(tmp_path / written) == shown


def test_show_says_where_an_image_has_no_label_and_reads_packed_data(own: Path, tmp_path: Path) -> None:
    for label in (own / "target" / "train" / "labels").iterdir():
        label.unlink()
    api.data_show(str(tmp_path / "a.png"), kind="folder", root=str(own / "target"))
    assert (211, 211, 211) in colors_on(tmp_path / "a.png"), "the light grey of `no label`"
    api.data_pack("folder", str(own / "source"), str(tmp_path / "packed"))
    api.data_show(str(tmp_path / "b.png"), kind="shards", root=str(tmp_path / "packed"))
    assert {(200, 0, 0), (1, 2, 3)} <= colors_on(tmp_path / "b.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["folder"], "A dataset must be KIND ROOT"),
        (["folder", "absent"], "must be an existing folder"),
        (["foldr", "absent"], "The kind of a dataset must be one of"),
        (["folder", "town #1/source", "a.png", "b.png"], "A dataset must be KIND ROOT"),
        (["folder", "town #1/source", "data.holdout=3"], "by KIND and ROOT or by KEY=VALUE"),
        (["data.source=folder:town #1/source"], "data.source and data.target must be given together"),
        (["town #1"], "is a folder"),
        (["absent/a.png"], "The folder of the picture must exist"),
        (["data.sorce=x"], "There is no setting 'data.sorce'"),
    ],
)
def test_show_refuses_what_names_no_data(words: list[str], message: str, own: Path, segadapt: Call) -> None:
    done = segadapt("data", "show", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_names_of_classes_and_folders_are_shown_as_they_are(segadapt: Call, tmp_path: Path) -> None:
    names = ["[red]x", "[/b]", ":car:", "[bold]y[/bold]", "a: #b, (c)", "no", "1", "Straße"]
    root = api.data_make(str(tmp_path / "town"), SMALL) / "source"
    root = root.rename(tmp_path / "[bold]town :car: it's")
    classes = root / "classes.yaml"
    content = yaml.safe_load(classes.read_text())
    for entry, name in zip(content["classes"], names, strict=True):
        entry["name"] = name
    classes.write_text(yaml.safe_dump(content, allow_unicode=True))
    done = segadapt("data", "check", "folder", root.name)
    assert done.returncode == 0, done.stderr
    assert [name for name in names if f" {name} " not in done.stdout] == []
    assert f"{root.name} is sound." in done.stdout
    (root / "train" / "images" / "alone.png").symlink_to("nowhere")
    refused = segadapt("train", "source_only", f"data.source=folder:{root.name}", f"data.target=folder:{root.name}")
    command = refused.stderr[refused.stderr.index("`segadapt") + 1 :].partition("`")[0]
    assert shlex.split(command) == ["segadapt", "data", "check", "folder", str(root)]


@pytest.mark.parametrize("name", ["", " ", "two\nlines", "bell\a", True, None, 1.5])
def test_a_class_must_have_a_name_that_can_be_shown(name: object, tmp_path: Path) -> None:
    root = api.data_make(str(tmp_path / "town"), SMALL) / "source"
    content = yaml.safe_load((root / "classes.yaml").read_text())
    content["classes"][0]["name"] = name
    (root / "classes.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UsageError, match=r"could not be read so: names must be (visible )?text"):
        api.data_check("folder", str(root))


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
