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
    """Write a picture of target validation samples, one row each: input, label, prediction; large ones are reduced."""
    training = segmenter.training
    segmenter.eval()
    rows = []
    step = max(1, len(data.target) // samples)
    for index in range(0, len(data.target), step)[:samples]:
        image, label = data.target.image(index), data.target.label(index)
        every = -(-label.shape[-1] // _GALLERY_WIDTH)
        label = label[::every, ::every]
        size = (label.shape[-2], label.shape[-1])
        prediction = predict(segmenter, image[None].to(device), size)[0].cpu()
        shown = torch.nn.functional.interpolate(image[None].float(), size).byte()[0].permute(1, 2, 0)
        prediction = torch.where(label == IGNORE_INDEX, IGNORE_INDEX, prediction)
        rows.append(torch.cat([shown, colorize(label, data.classes), colorize(prediction, data.classes)], dim=1))
    segmenter.train(training)
    width = min(row.shape[1] for row in rows)
    sheet = torch.cat([row[:, :width] for row in rows])
    Image.fromarray(sheet.numpy()).save(path)
