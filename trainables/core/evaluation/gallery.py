"""A picture of validation images beside their labels and predictions."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX, ClassList, EvaluationData
from segadapt.trainables.core.evaluation.inference import predict
from segadapt.trainables.core.networks import Segmenter

_GALLERY_WIDTH = 512
"""Widest picture in a gallery: a checkpoint carries one, and Cityscapes' own size would take it 20 MB."""


def colorize(labels: Tensor, classes: ClassList) -> Tensor:
    """Paint class indices (H, W) in the classes' colours: (H, W, 3) uint8; ignored pixels are black."""
    palette = torch.zeros(256, 3, dtype=torch.uint8)
    palette[: len(classes)] = torch.tensor(classes.colors, dtype=torch.uint8)
    return palette[labels.long()]


@torch.no_grad()
def save_gallery(
    segmenter: Segmenter, data: EvaluationData, device: torch.device, path: Path, samples: int = 6
) -> None:
    """Write a picture of target validation samples, one row each: input, label, prediction; large ones are reduced.

    Where no sample has a label, a row is input and prediction.
    """
    training = segmenter.training
    segmenter.eval()
    rows = []
    images = data.target if len(data.target) else data.scored
    step = max(1, len(images) // samples)
    for index in range(0, len(images), step)[:samples]:
        image = images.image(index)
        label = data.target.label(index) if len(data.target) else None
        full = image if label is None else label
        every = -(-full.shape[-1] // _GALLERY_WIDTH)
        size = (-(-full.shape[-2] // every), -(-full.shape[-1] // every))
        prediction = predict(segmenter, image[None].to(device), size)[0].cpu()
        row = [torch.nn.functional.interpolate(image[None].float(), size).byte()[0].permute(1, 2, 0)]
        if label is not None:
            label = label[::every, ::every]
            prediction = torch.where(label == IGNORE_INDEX, IGNORE_INDEX, prediction)
            row.append(colorize(label, data.classes))
        rows.append(torch.cat([*row, colorize(prediction, data.classes)], dim=1))
    segmenter.train(training)
    width = min(row.shape[1] for row in rows)
    sheet = torch.cat([row[:, :width] for row in rows])
    Image.fromarray(sheet.numpy()).save(path)
