"""Counting the pixels of one image by true and predicted class: ours, cityscapesscripts' and torchmetrics'.

    python benchmarks/confusion.py [--width 2048 --height 1024] [--repeats 20] [--json PATH]

The label has blocks of the 19 Cityscapes classes and a part that is ignored; a fifth of the pixels is predicted at
random. Each counts from memory what it is made for: ours the int64 indices that argmax returns, torchmetrics the same,
cityscapesscripts (its Python path: the Cython one must be built by hand) 8-bit images of label ids, without the time to
decode them. torchmetrics is shown with and without its check of the values. They take turns; all must count the same.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import torch
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official  # noqa: N813
from cityscapesscripts.helpers.labels import trainId2label
from PIL import Image
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from measuring import parse, write_record
from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.evaluation.metrics import confusion_matrix

CLASSES = 19
LABEL_IDS = torch.tensor([trainId2label[index].id for index in range(CLASSES)])


def pair(width: int, height: int) -> tuple[Tensor, Tensor]:
    """Return prediction, int64, and label, uint8, both (height, width)."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, CLASSES, (height // 32, width // 32), generator=generator)
    truth = blocks.repeat_interleave(32, 0).repeat_interleave(32, 1)
    anything = torch.randint(0, CLASSES, truth.shape, generator=generator)
    prediction = torch.where(torch.rand(truth.shape, generator=generator) < 0.2, anything, truth)
    label = truth.to(torch.uint8)
    label[-height // 8 :] = IGNORE_INDEX
    return prediction, label


def contenders(prediction: Tensor, label: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return functions that count the pair, (C, C) each."""
    label_ids = torch.cat([LABEL_IDS, torch.zeros(256 - CLASSES, dtype=torch.int64)])  # id 0: ignored
    images = {
        "prediction": Image.fromarray(label_ids[prediction].byte().numpy()),
        "truth": Image.fromarray(label_ids[label.long()].byte().numpy()),
    }
    arguments = official.CArgs()
    arguments.__dict__.update(vars(official.args), evalInstLevelScore=False)
    official.Image = SimpleNamespace(open=images.__getitem__)

    def cityscapesscripts() -> Tensor:
        counts = official.generateMatrix(arguments)
        official.evaluatePair("prediction", "truth", counts, {}, {}, arguments)
        return torch.from_numpy(counts.astype(np.int64))[LABEL_IDS][:, LABEL_IDS]

    def torchmetrics(*, check: bool) -> Tensor:
        metric = MulticlassConfusionMatrix(CLASSES, ignore_index=IGNORE_INDEX, validate_args=check)
        metric.update(prediction, wide_label)
        return metric.compute()

    wide_label = label.long()
    return {
        "segadapt": lambda: confusion_matrix(prediction, label, CLASSES),
        "cityscapesscripts": cityscapesscripts,
        "torchmetrics": lambda: torchmetrics(check=True),
        "torchmetrics, unchecked": lambda: torchmetrics(check=False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=20)
    arguments, setting = parse(parser)
    prediction, label = pair(arguments.width, arguments.height)
    count = contenders(prediction, label)
    expected = count["segadapt"]()
    for name, counts in count.items():
        if not torch.equal(counts(), expected):
            raise SystemExit(f"{name} counts differently.")

    seconds: dict[str, list[float]] = {name: [] for name in count}
    for _ in range(arguments.repeats):
        for name, counts in count.items():
            start = time.process_time()
            counts()
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: median / medians["segadapt"] for name, median in medians.items()}
    for name, median in medians.items():
        print(f"{name:<26}{1e3 * median:>10.2f} ms CPU{ratios[name]:>8.1f}x")
    versions = {name: version(name) for name in ("torch", "numpy", "cityscapesscripts", "torchmetrics")}
    write_record(arguments.json, setting, versions=versions, median_cpu_s=medians, ratios=ratios)


if __name__ == "__main__":
    main()
