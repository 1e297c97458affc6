"""Packed datasets: the same batches as from the files, the same bytes after a kill, and errors that name the shard."""

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor

from segadapt.trainables.core.data import packing
from segadapt.trainables.core.data.batch import DomainData, EvaluationData, LabelledImages
from segadapt.trainables.core.data.checking import check_dataset
from segadapt.trainables.core.data.dataset import Dataset
from segadapt.trainables.core.data.datasets import DataConfig, load_data, open_dataset, packed_size
from segadapt.trainables.core.data.decoding import UnreadableError
from segadapt.trainables.core.data.loading import BatchSource, one_pass
from segadapt.trainables.core.data.packing import PackConfig, pack
from segadapt.trainables.core.data.readers.cityscapes import write_cityscapes
from segadapt.trainables.core.data.readers.folder import write_folder
from segadapt.trainables.core.data.readers.gta5 import write_gta5
from segadapt.trainables.core.data.readers.shard_format import Shard
from segadapt.trainables.core.data.readers.shards import (
    Column,
    ShardDataset,
    ShardImages,
    ShardTargetImages,
    _opened,
    open_shards,
)
from segadapt.trainables.core.data.readers.synthia import write_synthia
from segadapt.trainables.core.data.sampling import label_counts
from segadapt.trainables.core.data.streets import StreetsConfig, load_streets
from segadapt.trainables.core.data.streets.v1.classes import CLASSES_V1 as CLASSES
from segadapt.trainables.core.data.transforms import AugmentationConfig, resized, resized_label

CONFIG = StreetsConfig(edition=1, height=32, width=64, train_images=9, val_images=3)
STREETS, STREETS_EVALUATION = load_streets(CONFIG)
TARGET_TRAIN = load_streets(CONFIG, oracle=True)[0].source
PNG = PackConfig()


@pytest.fixture
def gta5(tmp_path: Path) -> Path:
    write_gta5(tmp_path / "gta5", STREETS.source, CLASSES.names)
    return tmp_path / "gta5"


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    write_cityscapes(tmp_path / "cityscapes", TARGET_TRAIN, STREETS_EVALUATION.target, CLASSES.names)
    return tmp_path / "cityscapes"


@pytest.fixture
def packed(cityscapes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cityscapes in shards of five rows and groups of two."""
    monkeypatch.setattr(packing, "ROWS_PER_SHARD", 5)
    monkeypatch.setattr(packing, "ROWS_PER_GROUP", 2)
    pack(open_dataset("cityscapes", str(cityscapes)), cityscapes.with_name("packed"), PNG)
    return cityscapes.with_name("packed")


def load(source: str, target: str, **settings: object) -> tuple[DomainData, EvaluationData]:
    return load_data.__wrapped__(DataConfig(source=source, target=target, **settings))  # type: ignore[arg-type]


def labelled(root: str | Path, split: str = "train") -> ShardImages:
    dataset = open_shards(str(root))
    return dataset.labelled(dataset.splits[split], dataset.classes.names)


def bytes_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def assert_same(read: LabelledImages, written: LabelledImages) -> None:
    assert list(read.ids) == list(written.ids)
    for index in range(len(written)):
        assert torch.equal(read.image(index), written.image(index))
        assert torch.equal(read.label(index), written.label(index))


# --- The same data ---------------------------------------------------------------------------------------------------


def test_batches_from_shards_are_those_from_the_files_bit_by_bit(gta5: Path, cityscapes: Path, packed: Path) -> None:
    pack(open_dataset("gta5", str(gta5)), gta5.with_name("packed-gta5"), PNG)
    from_files, files_evaluation = load(f"gta5:{gta5}", f"cityscapes:{cityscapes}")
    from_shards, shards_evaluation = load(f"shards:{gta5.with_name('packed-gta5')}", f"shards:{packed}")
    assert from_shards.classes == from_files.classes
    augmentation = AugmentationConfig(
        scale=(0.8, 1.5), crop=(24, 32), rare_crop=0.5, class_balanced=True, source_size=(32, 64)
    )
    read = [
        BatchSource(data, augmentation, (3, "adapt"), 2, ("source", "target"), ("source",), flipped=True)
        for data in (from_files, from_shards)
    ]
    for threads in (0, 2):
        pairs = zip(*(source.batches(2, 14, threads=threads) for source in read), strict=True)
        for expected, batch in pairs:
            for name, value in vars(expected).items():
                other = getattr(batch, name)
                assert torch.equal(other, value) if isinstance(value, Tensor) else other == value
    assert_same(shards_evaluation.target, files_evaluation.target)
    assert_same(shards_evaluation.source, files_evaluation.source)


@pytest.mark.parametrize("kind", ["synthia", "folder"])
def test_every_kind_packs_to_the_same_images(kind: str, tmp_path: Path) -> None:
    if kind == "synthia":
        write_synthia(tmp_path / kind, STREETS.source, CLASSES.names)
    else:
        write_folder(tmp_path / kind, STREETS.source, STREETS_EVALUATION.source, CLASSES)
    dataset = open_dataset(kind, str(tmp_path / kind))
    manifest = pack(dataset, tmp_path / "packed", PNG)
    assert (manifest.kind, manifest.classes) == (kind, dataset.classes)
    assert_same(labelled(tmp_path / "packed"), dataset.labelled(dataset.splits["train"], dataset.classes.names))


def test_an_image_of_the_right_format_is_stored_as_it_is(tmp_path: Path) -> None:
    write_folder(tmp_path / "own", STREETS.source, STREETS_EVALUATION.source, CLASSES)
    first = tmp_path / "own" / "train" / "images" / f"{STREETS.source.ids[0]}.png"
    Image.open(first).save(first.with_suffix(".jpg"), quality=60)
    first.unlink()
    dataset = open_dataset("folder", str(tmp_path / "own"))
    for image_format in ("png", "jpeg"):
        out = tmp_path / image_format
        pack(dataset, out, PackConfig(image_format=image_format))  # type: ignore[arg-type]
        opened = open_shards(str(out))
        column = Column(opened.location, opened.manifest, "image")
        for row, path in enumerate(dataset.splits["train"].images):
            assert (column[row] == path.read_bytes()) == (path.suffix[1:].replace("jpg", "jpeg") == image_format)
    for index in range(9):
        lossless, lossy = (labelled(tmp_path / name).image(index) for name in ("png", "jpeg"))
        assert torch.equal(lossless, dataset.unlabelled(dataset.splits["train"]).image(index))
        assert 0 <= float((lossless.float() - lossy.float()).abs().mean()) < 4


def test_a_resized_training_split_is_what_training_resizes_to(cityscapes: Path, tmp_path: Path) -> None:
    dataset = open_dataset("cityscapes", str(cityscapes))
    pack(dataset, tmp_path / "small", PackConfig(size=(20, 30)))
    names = dataset.classes.names
    small, full = labelled(tmp_path / "small"), dataset.labelled(dataset.splits["train"], names)
    for index in range(len(full)):
        assert torch.equal(small.image(index), resized(full.image(index), (20, 30)))
        assert torch.equal(small.label(index), resized_label(full.label(index), (20, 30)))
    assert_same(labelled(tmp_path / "small", "val"), dataset.labelled(dataset.splits["val"], names))
    assert open_shards(str(tmp_path / "small")).notes == ("packed from cityscapes, resized to 30x20 for training.",)
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text())
    assert manifest["resize"]["size"] == [20, 30]
    assert manifest["splits"] == {"train": {"images": 9, "labels": 9}, "val": {"images": 3, "labels": 3}}
    assert [shard["rows"] for shard in manifest["shards"]] == [9, 3]


def test_class_counts_are_known_without_reading(packed: Path, cityscapes: Path) -> None:
    data, _ = load(f"shards:{packed}", f"cityscapes:{cityscapes}", classes="16")
    expected = label_counts(data.source.label, range(len(data.source)), 16)
    for shard in packed.glob("train-*.parquet"):
        shard.unlink()
    assert isinstance(data.source, ShardImages)
    assert torch.equal(data.source.class_counts(16), expected)
    assert int(expected.sum()) > 0


def test_unlabelled_images_pack_without_labels(cityscapes: Path, gta5: Path, tmp_path: Path) -> None:
    some = sorted((cityscapes / "gtFine" / "train").rglob("*.png"))
    some[0].unlink()
    manifest = pack(open_dataset("cityscapes", str(cityscapes)), tmp_path / "packed", PNG)
    assert manifest.splits["train"] == {"images": 9, "labels": 8}
    data, _ = load(f"gta5:{gta5}", f"shards:{tmp_path / 'packed'}")
    assert len(data.target) == 9
    with pytest.raises(ValueError, match="Every image of target train must have a label, but 1 of 9 do not"):
        load(f"gta5:{gta5}", f"shards:{tmp_path / 'packed'}", oracle=True)


def test_a_target_without_labels_packs_and_is_scored_without(cityscapes: Path, gta5: Path, tmp_path: Path) -> None:
    shutil.rmtree(cityscapes / "gtFine")
    manifest = pack(open_dataset("cityscapes", str(cityscapes)), tmp_path / "packed", PackConfig(size=(16, 32)))
    assert manifest.splits == {"train": {"images": 9, "labels": 0}, "val": {"images": 3, "labels": 0}}
    report = check_dataset("shards", str(tmp_path / "packed"))
    assert report.faults == ()
    assert report.notes[-1] == "12 images without labels: fine for adaptation, nothing to evaluate with."
    _, evaluation = load(f"gta5:{gta5}", f"shards:{tmp_path / 'packed'}", skip_bad=True)
    assert (len(evaluation.scored), len(evaluation.target)) == (3, 0)
    assert torch.equal(evaluation.scored.image(1), STREETS_EVALUATION.target.image(1))
    assert packed_size(f"shards:{tmp_path / 'packed'}") == (16, 32)
    assert packed_size(f"cityscapes:{cityscapes}") is packed_size("shards:/nowhere") is packed_size(None) is None


def test_training_has_no_way_to_a_packed_target_label(gta5: Path, cityscapes: Path, packed: Path) -> None:
    data, _ = load(f"gta5:{gta5}", f"shards:{packed}")
    assert type(data.target) is ShardTargetImages
    assert not hasattr(data.target, "label")
    assert not any("label" in name for name in vars(data.target))
    for label in (cityscapes / "gtFine" / "train").rglob("*.png"):
        Image.fromarray(np.full((32, 64), 7, np.uint8)).save(label)
    other = cityscapes.with_name("other")
    pack(open_dataset("cityscapes", str(cityscapes)), other, PNG)
    same, _ = load(f"gta5:{gta5}", f"shards:{other}")
    assert same.fingerprint == data.fingerprint, "labels of the training set do not count"
    oracles = [load(f"gta5:{gta5}", f"shards:{root}", oracle=True)[0] for root in (packed, other)]
    assert oracles[0].fingerprint != oracles[1].fingerprint


def test_the_fingerprint_follows_content_and_not_the_place(gta5: Path, packed: Path) -> None:
    first, _ = load(f"gta5:{gta5}", f"shards:{packed}")
    moved, _ = load(f"gta5:{gta5}", f"shards:{packed.rename(packed.with_name('moved'))}")
    assert moved.fingerprint == first.fingerprint


# --- Reading ---------------------------------------------------------------------------------------------------------


def test_threads_and_spawned_processes_read_the_same(packed: Path) -> None:
    images = labelled(packed)
    order = [random.Random(1).randrange(len(images)) for _ in range(200)]
    with ThreadPoolExecutor(8) as pool:
        for index, image in zip(order, pool.map(images.image, order), strict=True):
            assert torch.equal(image, TARGET_TRAIN.image(index))
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again.label(3), images.label(3))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        assert torch.equal(torch.from_numpy(processes.submit(_read, images, 4).result()), images.image(4))


def _read(images: ShardImages, index: int) -> np.ndarray:  # type: ignore[type-arg]
    return images.image(index).numpy()


def test_few_row_groups_are_kept_and_a_pass_reads_each_once(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_shards(str(packed))
    images = dataset.unlabelled(dataset.splits["train"])
    read = []
    original = Column._read

    def counted(column: Column, shard: Shard, number: int) -> object:
        read.append((shard.name, number))
        return original(column, shard, number)

    monkeypatch.setattr(Column, "_read", counted)
    assert sum(len(indices) for _, indices in one_pass(images, 2, threads=3)) == 9
    assert sorted(read) == [("train-00000.parquet", n) for n in (0, 1, 2)] + [
        ("train-00001.parquet", n) for n in (0, 1)
    ]
    assert len(images._images._groups) == 4


# --- Packing ---------------------------------------------------------------------------------------------------------


def test_packing_twice_gives_the_same_bytes_whatever_the_threads(cityscapes: Path, tmp_path: Path) -> None:
    dataset = open_dataset("cityscapes", str(cityscapes))
    for threads, name in ((1, "a"), (4, "b")):
        pack(dataset, tmp_path / name, PackConfig(size=(16, 32), image_format="jpeg"), threads=threads)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    seen: list[tuple[int, int]] = []
    pack(
        dataset,
        tmp_path / "a",
        PackConfig(size=(16, 32), image_format="jpeg"),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(12, 12)], "nothing is written again"


_SLOW_PACK = """
import sys, time
from pathlib import Path
from segadapt.trainables.core.data import packing
from segadapt.trainables.core.data.datasets import open_dataset
packing.ROWS_PER_SHARD, packing.ROWS_PER_GROUP = 2, 1
row = packing._row
def slow(*arguments):
    time.sleep(0.02)
    return row(*arguments)
packing._row = slow
print("started", flush=True)
packing.pack(open_dataset("cityscapes", sys.argv[1]), Path(sys.argv[2]), packing.PackConfig(), threads=1)
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.05, None])
def test_a_killed_pack_goes_on_to_the_same_bytes(
    delay_s: float | None, cityscapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "ROWS_PER_SHARD", 2)
    monkeypatch.setattr(packing, "ROWS_PER_GROUP", 1)
    dataset = open_dataset("cityscapes", str(cityscapes))
    pack(dataset, tmp_path / "whole", PNG)
    command = [sys.executable, "-c", _SLOW_PACK, str(cityscapes), str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    delay_s = random.uniform(0.0, 0.2) if delay_s is None else delay_s  # packing takes 12 times 0.02 s at least
    time.sleep(delay_s)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"finished within {delay_s} s"
    if (tmp_path / "killed").exists():
        assert not (tmp_path / "killed" / "manifest.json").exists()
        with pytest.raises(ValueError, match=r"must hold manifest.json.* run the same command again"):
            open_dataset("shards", str(tmp_path / "killed"))
    pack(dataset, tmp_path / "killed", PNG)
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


def test_finished_shards_are_not_written_again(cityscapes: Path, packed: Path) -> None:
    manifest, plan = packed / "manifest.json", json.loads((packed / "manifest.json").read_text())
    whole = bytes_of(packed)
    for name in ("written_with", "index", "shards"):
        del plan[name]
    (packed / "packing.json").write_text(json.dumps(plan))
    manifest.unlink()
    (packed / "train-00001.parquet").unlink()
    kept = (packed / "train-00000.parquet").stat().st_mtime_ns
    seen: list[int] = []
    pack(open_dataset("cityscapes", str(cityscapes)), packed, PNG, progress=lambda done, total: seen.append(done))
    assert (packed / "train-00000.parquet").stat().st_mtime_ns == kept
    assert seen == [8, 1, 1, 1, 1]
    assert bytes_of(packed) == whole


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": (16, 32)}, "--size differs"),
        ({"image_format": "jpeg"}, "--format or --quality differs"),
        ({"splits": ["val"]}, "--split differs"),
        ({}, "the content of the dataset or the version of segadapt differs"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    change: dict[str, object], said: str, cityscapes: Path, packed: Path
) -> None:
    if not change:
        label = next((cityscapes / "gtFine" / "train").rglob("*.png"))
        Image.fromarray(np.full((32, 64), 7, np.uint8)).save(label)
    splits = change.pop("splits", None)
    before = bytes_of(packed)
    with pytest.raises(ValueError, match=f"must be given the same dataset and settings, but {said}"):
        pack(open_dataset("cityscapes", str(cityscapes)), packed, replace(PNG, **change), splits=splits)  # type: ignore[arg-type]
    assert bytes_of(packed) == before


def test_a_folder_with_something_else_is_refused(cityscapes: Path, tmp_path: Path) -> None:
    dataset = open_dataset("cityscapes", str(cityscapes))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"must be new, empty or begun, but .*notes is not"):
        pack(dataset, tmp_path / "notes", PNG)
    with pytest.raises(ValueError, match=r"must be a folder, but .*a.txt is a file"):
        pack(dataset, tmp_path / "notes" / "a.txt", PNG)
    with pytest.raises(ValueError, match=r"--split must be one of train, val, but got test"):
        pack(dataset, tmp_path / "out", PNG, splits=["test"])
    (tmp_path / "empty" / "images").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"must hold images/\*.png .*has none. `segadapt data check gta5"):
        pack(open_dataset("gta5", str(tmp_path / "empty")), tmp_path / "out", PNG)


def test_two_packs_into_one_folder_at_a_time_are_refused(cityscapes: Path, tmp_path: Path) -> None:
    dataset = open_dataset("cityscapes", str(cityscapes))

    def meanwhile(done: int, total: int) -> None:
        with pytest.raises(ValueError, match="by one process at a time, but another packs"):
            pack(dataset, tmp_path / "out", PNG)

    pack(dataset, tmp_path / "out", PNG, progress=meanwhile)
    assert check_dataset("shards", str(tmp_path / "out")).faults == ()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": (0, 5)}, "--size must be HEIGHT WIDTH in pixels, but got"),
        ({"image_format": "webp"}, "--format must be png or jpeg"),
        ({"quality": 0}, r"--quality must lie in \[1, 100\]"),
    ],
)
def test_a_bad_setting_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PackConfig(**settings)  # type: ignore[arg-type]


def test_a_broken_file_ends_packing_by_its_name(cityscapes: Path, tmp_path: Path) -> None:
    victim = sorted((cityscapes / "leftImg8bit" / "train").rglob("*.png"))[4]
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(UnreadableError, match=f"{victim.name} is not: it is cut off"):
        pack(open_dataset("cityscapes", str(cityscapes)), tmp_path / "out", PNG)
    assert not (tmp_path / "out" / "manifest.json").exists()


# --- Damage ----------------------------------------------------------------------------------------------------------


def read_all(root: str | Path) -> None:
    images = labelled(root)
    for index in range(len(images)):
        images.image(index)
        images.label(index)


def test_no_changed_byte_of_a_shard_is_trained_on(packed: Path) -> None:
    """The footer and the padding of a shard may change unnoticed; what is decoded may not."""
    shard = packed / "train-00001.parquet"
    content, expected = shard.read_bytes(), [labelled(packed).image(index) for index in range(5, 9)]
    for place in range(0, len(content), max(1, len(content) // 60)):
        shard.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        _opened.cache_clear()
        images = labelled(packed)
        with contextlib.suppress(UnreadableError):
            assert all(torch.equal(images.image(index), known) for index, known in enumerate(expected, start=5))


def test_damage_is_found_by_the_checker_and_named_in_training(gta5: Path, packed: Path) -> None:
    whole = check_dataset("shards", str(packed))
    assert whole.faults == ()
    assert whole.splits["train"].sizes == {"64x32": 9}
    assert sum(whole.splits["train"].pixels.values()) == 9 * 32 * 64
    assert whole.splits["train"].images_with["road"] == 9
    flipped, cut, gone = sorted(packed.glob("*.parquet"))[1:]
    content = bytearray(flipped.read_bytes())
    content[len(content) // 3] ^= 1
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-30])
    gone.unlink()
    report = check_dataset("shards", str(packed))
    assert [(fault.problem, Path(fault.path).name) for fault in report.faults] == [
        ("shard with a wrong checksum", flipped.name),
        ("shard with a wrong checksum", cut.name),
        ("unreadable shard", gone.name),
    ]
    _opened.cache_clear()
    with pytest.raises(UnreadableError, match=f"{flipped.name} in .* is not: .*segadapt data check shards"):
        read_all(packed)
    shutil.copy(packed / "index.parquet", flipped)
    _opened.cache_clear()
    with pytest.raises(UnreadableError, match=f"{flipped.name} in .* is not: it has [0-9]+ bytes and not"):
        read_all(packed)
    flipped.unlink()
    _opened.cache_clear()
    with pytest.raises(FileNotFoundError):
        read_all(packed)


def test_bad_rows_are_left_out_if_asked_for(gta5: Path, packed: Path) -> None:
    shard = packed / "train-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-30])
    data, _ = load(f"gta5:{gta5}", f"shards:{packed}", skip_bad=True)
    assert len(data.target) == 5
    assert data.notes[-1].startswith("4 of 9 images of target train are left out as bad: streets-train_000005")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("manifest.json", b"{", "manifest.json in .* must be readable, but is not"),
        ("manifest.json", b'{"version": 1}', "must be as `segadapt data pack` wrote it"),
        ("manifest.json", b'{"version": 9}', "must have version 1 of the format, but .* has 9"),
        ("index.parquet", b"", "index.parquet in .* must have the checksum"),
    ],
)
def test_a_malformed_folder_is_refused(name: str, content: bytes, said: str, packed: Path) -> None:
    (packed / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        open_dataset("shards", str(packed))
    (packed / name).unlink()
    with pytest.raises(ValueError, match=f"{name}"):
        open_dataset("shards", str(packed))
    with pytest.raises(ValueError, match="must be an existing folder, but got 'nowhere'"):
        open_dataset("shards", "nowhere")


# --- A bucket --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../train-00000.parquet", "/etc/passwd", "a/b", "..", ""])
def test_files_and_images_that_lead_out_of_the_folder_are_refused(name: str, packed: Path) -> None:
    sound = json.loads((packed / "manifest.json").read_text())
    shards = [{**sound["shards"][0], "name": name}, *sound["shards"][1:]]
    (packed / "manifest.json").write_text(json.dumps({**sound, "shards": shards}))
    with pytest.raises(ValueError, match=r"must be relative and stay in their folder, but .* has"):
        open_shards(str(packed))
    if name == "a/b":  # as images of datasets in folders are called
        return
    table = parquet.read_table(packed / "index.parquet")
    ids = pyarrow.array([name, *table["id"].to_pylist()[1:]])
    parquet.write_table(table.set_column(table.schema.get_field_index("id"), "id", ids), packed / "index.parquet")
    index = {**sound["index"], "sha256": hashlib.sha256((packed / "index.parquet").read_bytes()).hexdigest()}
    (packed / "manifest.json").write_text(json.dumps({**sound, "index": index}))
    with pytest.raises(ValueError, match=r"must be relative and stay in their folder, but .* has"):
        open_shards(str(packed))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the URI of an empty bucket on an S3 server of this machine, with a `{}` for the path in it."""
    from moto.server import ThreadedMotoServer

    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    from pyarrow import fs

    options = {"endpoint_override": f"{host}:{port}", "scheme": "http", "region": "us-east-1"}
    fs.S3FileSystem(**options, allow_bucket_creation=True).create_dir("data")
    yield "s3://data/{}?" + "&".join(f"{name}={value}" for name, value in options.items())
    server.stop()


def test_a_bucket_reads_as_the_folder_does(bucket: str, gta5: Path, packed: Path) -> None:
    from pyarrow import fs

    root = bucket.format("sets/city")
    filesystem, folder = fs.FileSystem.from_uri(root)
    with pytest.raises(ValueError, match=r"must hold manifest\.json"):
        open_dataset("shards", root)
    fs.copy_files(str(packed), folder, destination_filesystem=filesystem)
    assert check_dataset("shards", root).faults == ()
    remote, remote_evaluation = load(f"gta5:{gta5}", f"shards:{root}")
    local, local_evaluation = load(f"gta5:{gta5}", f"shards:{packed}")
    assert remote.fingerprint == local.fingerprint
    assert_same(remote_evaluation.target, local_evaluation.target)
    with ThreadPoolExecutor(6) as pool:
        order = list(itertools.islice(itertools.cycle(range(9)), 40))
        for index, image in zip(order, pool.map(remote.target.image, order), strict=True):
            assert torch.equal(image, local.target.image(index))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        assert torch.equal(torch.from_numpy(processes.submit(_read, labelled(root), 4).result()), TARGET_TRAIN.image(4))

    damaged = bytearray((packed / "train-00001.parquet").read_bytes())
    damaged[len(damaged) // 3] ^= 1
    with filesystem.open_output_stream(f"{folder}/train-00001.parquet") as file:
        file.write(bytes(damaged))
    filesystem.delete_file(f"{folder}/val-00000.parquet")
    report = check_dataset("shards", root)
    assert [fault.problem for fault in report.faults] == ["shard with a wrong checksum", "unreadable shard"]
    _opened.cache_clear()
    with pytest.raises(UnreadableError, match=r"train-00001.parquet in s3://data/sets/city"):
        read_all(root)
    with pytest.raises(FileNotFoundError):
        labelled(root, "val").image(0)


def test_an_address_of_no_filesystem_is_refused() -> None:
    with pytest.raises(ValueError, match=r"manifest.json in gopher://x must be readable, but is not"):
        open_dataset("shards", "gopher://x")


def test_a_dataset_of_shards_is_a_dataset(packed: Path) -> None:
    dataset: Dataset = open_dataset("shards", str(packed))
    assert isinstance(dataset, ShardDataset)
    assert dataset.notes == ()
    file_uri = open_dataset("shards", f"file://{packed}")
    assert file_uri.splits == dataset.splits
    images = file_uri.labelled(file_uri.splits["train"], CLASSES.names)
    assert torch.equal(images.image(2), TARGET_TRAIN.image(2))
