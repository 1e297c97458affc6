"""How a network is asked about images: at several sizes, mirrored, in windows; and what it decides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from segadapt.trainables.core.data.transforms import Size
from segadapt.trainables.core.networks import Segmenter
from segadapt.trainables.core.validation import check


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How a network is asked about an image: once, or several times with the class probabilities averaged."""

    scales: tuple[float, ...] = (1.0,)
    """Sizes at which the image is shown, as factors of its own size per side."""
    flip: bool = False
    """Whether each size is also shown mirrored left to right."""
    window: Size | None = None
    """Height and width of the overlapping windows in which an image is shown; None: whole."""
    stride: Size | None = None
    """Rows and columns from one window to the next, the last of which ends with the image; None: two thirds of one."""

    def __post_init__(self) -> None:
        check(len(self.scales) > 0, "at least one scale must be given", self.scales)
        check(len(set(self.scales)) == len(self.scales), "scales must differ from each other", self.scales)
        for scale in self.scales:
            check(0.1 <= scale <= 10, "a scale must lie in [0.1, 10]", scale)
        check(self.window is None or min(self.window) >= 1, "a window must have at least one pixel", self.window)
        self._check_stride()

    def _check_stride(self) -> None:
        """Make sure that windows leave no gap between them."""
        if self.stride is not None:
            sides = (0, 0) if self.window is None else self.window
            check(
                all(1 <= step <= side for step, side in zip(self.stride, sides, strict=True)),
                "trainer.eval_stride must be at least 1 and at most trainer.eval_window, which is "
                f"{None if self.window is None else list(self.window)}",
                list(self.stride),
            )

    def __str__(self) -> str:
        scales = "single scale" if self.scales == (1.0,) else f"scales {' '.join(f'{s:g}' for s in self.scales)}"
        window = f", windows of {self.window[0]}x{self.window[1]}" if self.window else ""
        window += f" every {self.stride[0]}x{self.stride[1]}" if self.stride else ""
        return f"{scales}, {'flip' if self.flip else 'no flip'}{window}"


ONCE = Inference()
"""The image as it is, which is how the papers evaluate."""


def views(segmenter: Segmenter, images: Tensor, inference: Inference = ONCE) -> list[Tensor]:
    """Return what a network says of RGB images in 0 to 255, (B, 3, H, W), each time it is asked.

    Images are resized bilinearly, with antialiasing where they shrink; mirrored answers are mirrored back.

    Returns:
        Logits at feature resolution, (B, C, h, w) float32 each; h and w differ between scales. Where several windows
        were needed they have the resolution of the image that was shown.
    """
    normalised = segmenter.normalise(images)
    answers = []
    for scale in inference.scales:
        size = [max(1, round(side * scale)) for side in images.shape[-2:]]
        shown = normalised if scale == 1 else F.interpolate(normalised, size=size, mode="bilinear", antialias=True)
        answers.append(_logits(segmenter, shown, inference))
        if inference.flip:
            answers.append(_logits(segmenter, shown.flip(-1), inference).flip(-1))
    return answers


def _logits(segmenter: Segmenter, shown: Tensor, inference: Inference) -> Tensor:
    """Return logits of normalised images (B, 3, H, W); in windows (B, C, H, W), averaged where windows overlap."""
    window = inference.window
    if window is None or all(side <= most for side, most in zip(shown.shape[-2:], window, strict=True)):
        return cast(Tensor, segmenter(shown).logits.float())
    height, width = (min(side, most) for side, most in zip(shown.shape[-2:], window, strict=True))
    down, right = inference.stride or (max(1, 2 * window[0] // 3), max(1, 2 * window[1] // 3))
    total = shown.new_zeros((len(shown), segmenter.num_classes, *shown.shape[-2:]), dtype=torch.float32)
    times = total.new_zeros(shown.shape[-2:])
    for top in _starts(shown.shape[-2], height, down):
        for left in _starts(shown.shape[-1], width, right):
            part = (..., slice(top, top + height), slice(left, left + width))
            total[part] += segmenter.upsample(segmenter(shown[part]).logits.float(), (height, width))
            times[part] += 1
    return total.div_(times)


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows of a side begin so that they cover `length` pixels."""
    return [*range(0, length - window, stride), length - window]


def mean_probabilities(segmenter: Segmenter, answers: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Return class probabilities (B, C, *size), averaged over `answers`, logits (B, C, h, w) of any resolution each."""
    total = segmenter.upsample(answers[0], size).softmax(1)
    for logits in answers[1:]:
        total += segmenter.upsample(logits, size).softmax(1)
    return total.div_(len(answers)) if len(answers) > 1 else total


def decide(segmenter: Segmenter, answers: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Return class indices, (B, *size) int64, of one or more `answers`, logits (B, C, h, w)."""
    if len(answers) == 1:
        return segmenter.upsample(answers[0], size).argmax(1)
    return mean_probabilities(segmenter, answers, size).argmax(1)


def predict(segmenter: Segmenter, images: Tensor, size: tuple[int, int], inference: Inference = ONCE) -> Tensor:
    """Return class indices, (B, *size) int64, of uint8 images (B, 3, H, W)."""
    return decide(segmenter, views(segmenter, images, inference), size)
