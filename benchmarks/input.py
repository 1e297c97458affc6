"""Training crops per second and core: plain PNG reading, segadapt from the folder, segadapt from packed shards.

    python benchmarks/input.py [--width 2048 --height 1024] [--images 16] [--repeats 5] [--folder DIR] [--json PATH]

Streets are written in Cityscapes' layout. Every form delivers the same images with their labels at half the size, in
one thread, the files being in the system's cache; what counts is processor time. Forms:

* official: as JDAI-CV/FADA@98336a6 and the codes built on it (SDCA's among them) read a sample: PIL decodes, label ids
  become classes one class after the other in floats at full size, PIL resizes (bilinear image, nearest label), and
  torchvision makes normalised floats of the image.
* lean: the least that PIL and torchvision can do: no floats, ids are looked up in a table after resizing.
* folder: `segadapt` from the files, resized as `augmentation.*_size` does. Images stay uint8, the device normalises.
* shards jpeg, shards png: `segadapt` from shards packed at half the size.
* ..., batch: the same with all that training does beside (drawing, pairing, stacking, int64 labels), per image.

Goals, against `official`: 1.5 times from the folder, 8 times from shards.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from measuring import parse, write_record
from segadapt.trainables.core.data.batch import DomainData, LabelledImages
from segadapt.trainables.core.data.class_lists import CITYSCAPES, CITYSCAPES_IDS
from segadapt.trainables.core.data.dataset import Dataset
from segadapt.trainables.core.data.datasets import open_dataset
from segadapt.trainables.core.data.loading import BatchSource
from segadapt.trainables.core.data.packing import PackConfig, pack
from segadapt.trainables.core.data.readers.cityscapes import write_cityscapes
from segadapt.trainables.core.data.streets import StreetsConfig, load_streets
from segadapt.trainables.core.data.transforms import AugmentationConfig, Size, resized, resized_label

Sample = tuple[Tensor, Tensor]

BASE, LEAN = "official", "lean"
GOALS = {"folder": 1.5, "shards jpeg": 8.0, "shards png": 8.0}
TRAIN_IDS = {CITYSCAPES_IDS[name]: index for index, name in enumerate(CITYSCAPES.names)}


def lean_reader(dataset: Dataset, size: Size) -> Callable[[int], Sample]:
    from torchvision.transforms.functional import pil_to_tensor

    split = dataset.splits["train"]
    table = torch.full((256,), 255, dtype=torch.uint8)
    table[list(TRAIN_IDS)] = torch.tensor(list(TRAIN_IDS.values()), dtype=torch.uint8)

    def read(index: int) -> Sample:
        image = Image.open(split.images[index]).convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)
        label = Image.open(split.labels[index]).resize(size[::-1], Image.Resampling.NEAREST)
        return pil_to_tensor(image), table[pil_to_tensor(label)[0].long()]

    return read


def official_reader(dataset: Dataset, size: Size) -> Callable[[int], Sample]:
    from torchvision.transforms.functional import normalize, to_tensor

    split = dataset.splits["train"]

    def read(index: int) -> Sample:
        image = Image.open(split.images[index]).convert("RGB")
        stored = np.array(Image.open(split.labels[index]), dtype=np.float32)
        classes = np.full(stored.shape, 255, np.float32)
        for label_id, train_id in TRAIN_IDS.items():
            classes[stored == label_id] = train_id
        label = Image.fromarray(classes).resize(size[::-1], Image.Resampling.NEAREST)
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
        normalised = normalize(to_tensor(image), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        return normalised, torch.from_numpy(np.array(label)).long()

    return read


def our_reader(dataset: Dataset, size: Size) -> Callable[[int], Sample]:
    images = dataset.labelled(dataset.splits["train"], dataset.classes.names)
    return lambda index: (resized(images.image(index), size), resized_label(images.label(index), size))


def batch_reader(dataset: Dataset, size: Size) -> Callable[[int], Sample]:
    split = dataset.splits["train"]
    images = dataset.labelled(split, dataset.classes.names)
    data = DomainData(images, dataset.unlabelled(split), dataset.classes, "")
    augmentation = AugmentationConfig(source_size=size)
    source = BatchSource(data, augmentation, (0, "benchmark"), 1, ("source",), (), flipped=False)

    def read(index: int) -> Sample:
        batch = source.batch(index)
        return batch.source_images[0], batch.source_labels[0]

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keep the files here; default: a temporary folder")
    arguments, setting = parse(parser)
    setting["folder"] = None
    with tempfile.TemporaryDirectory() as temporary:
        measure(arguments, setting, arguments.folder or Path(temporary))


def measure(arguments: argparse.Namespace, setting: dict[str, object], folder: Path) -> None:
    size = (arguments.height // 2, arguments.width // 2)
    root = folder / "cityscapes"
    if not root.exists():
        config = StreetsConfig(
            edition=1, height=arguments.height, width=arguments.width, train_images=arguments.images, val_images=1
        )
        write_cityscapes(root, *written(config))
    dataset = open_dataset("cityscapes", str(root))
    for image_format in ("jpeg", "png"):
        config = PackConfig(size, image_format)  # type: ignore[arg-type]
        pack(dataset, folder / image_format, config, splits=["train"])
    packed = {name: open_dataset("shards", str(folder / name)) for name in ("jpeg", "png")}
    forms = {
        BASE: official_reader(dataset, size),
        LEAN: lean_reader(dataset, size),
        "folder": our_reader(dataset, size),
        "folder, batch": batch_reader(dataset, size),
        "shards jpeg": our_reader(packed["jpeg"], size),
        "shards jpeg, batch": batch_reader(packed["jpeg"], size),
        "shards png": our_reader(packed["png"], size),
        "shards png, batch": batch_reader(packed["png"], size),
    }
    for index in range(arguments.images):
        image, label = forms["folder"](index)
        assert torch.equal(label, forms[LEAN](index)[1])
        assert torch.equal(label.long(), forms[BASE](index)[1])
        assert float((image.float() - forms[LEAN](index)[0].float()).abs().mean()) < 1
        assert all(torch.equal(*pair) for pair in zip((image, label), forms["shards png"](index), strict=True))
    cpu_seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(arguments.repeats):
        order = torch.randperm(arguments.images).tolist()
        for name, read in forms.items():
            read(0)
            start = time.process_time()
            for index in order:
                read(index)
            cpu_seconds[name].append((time.process_time() - start) / arguments.images)
    medians = {name: statistics.median(values) for name, values in cpu_seconds.items()}
    rates = {name: 1 / median for name, median in medians.items()}
    ratios = {name: {base: rate / rates[base] for base in (BASE, LEAN)} for name, rate in rates.items()}
    print(f"{'':<48}{BASE:>8}{LEAN:>8}")
    for name, rate in rates.items():
        goal = f"   goal {GOALS[name]:g}x" if name in GOALS else ""
        by_base = "".join(f"{ratio:>7.2f}x" for ratio in ratios[name].values())
        print(f"{name:<26}{1e3 * medians[name]:>8.1f} ms{rate:>8.1f} images/s{by_base}{goal}")
    paths = dataset.splits["train"]
    stored = {
        "folder": sum(path.stat().st_size for path in (*paths.images, *paths.labels) if path is not None),
        **{f"shards {name}": sum(path.stat().st_size for path in (folder / name).iterdir()) for name in packed},
    }
    versions = {name: version(name) for name in ("torch", "torchvision", "pillow", "pyarrow", "numpy")}
    write_record(
        arguments.json,
        setting,
        versions=versions,
        median_cpu_s=medians,
        images_per_s_and_core=rates,
        ratios=ratios,
        bytes_per_image={name: round(size / arguments.images) for name, size in stored.items()},
    )


def written(config: StreetsConfig) -> tuple[LabelledImages, LabelledImages, tuple[str, ...]]:
    """Return the labelled target, training and validation set, and the names of its classes."""
    data, evaluation = load_streets(config, oracle=True)
    return data.source, evaluation.target, data.classes.names


if __name__ == "__main__":
    main()
