"""The network as it is deployed: 8-bit images in, class probabilities out at their size, and nothing of training."""

# B images of H x W pixels, shown to the network at h x w, C classes.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segadapt.trainables.core.evaluation.inference import ONCE, Inference, mean_probabilities, views
from segadapt.trainables.core.networks import Segmenter, TimmBackbone, merged
from segadapt.trainables.core.networks.resampling import Interpolation, resampling

SMALLEST_SIDE = 32
"""Least height and width of an image."""


class DeployedNetwork(nn.Module):
    """Resizes as the run did, normalises, predicts and up-samples to the size of the image.

    Made of operations that `torch.export` and ONNX take at any size, resizing included.

    Args:
        network: The deployed network. It is copied, contiguous and on its device, with low-rank updates merged into
            its weights.
        size: (h, w) that images are resized to, as `augmentation.target_size`; None shows them as they are.
        interpolation: How images are resized, antialiased.
        inference: How the network is asked about the resized image. An exported network is asked once.
    """

    def __init__(
        self,
        network: Segmenter,
        size: tuple[int, int] | None,
        interpolation: Interpolation = "bilinear",
        inference: Inference = ONCE,
    ) -> None:
        super().__init__()
        self.network = _with_flooring_pools(merged(network)).to(memory_format=torch.contiguous_format).eval()
        self.size = size
        self.interpolation = interpolation
        self.inference = inference

    def forward(self, images: Tensor) -> Tensor:
        """Return class probabilities, (B, C, H, W) float32, of RGB images, (B, 3, H, W) uint8."""
        shown = images.float() if self.size is None else resized_antialiased(images, self.size, self.interpolation)
        answers = views(self.network, shown, self.inference)
        return mean_probabilities(self.network, answers, (images.shape[-2], images.shape[-1]))


def resized_antialiased(images: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    """Return images, (B, 3, H, W) uint8, as floats in [0, 255] at `size`, (B, 3, *size).

    A product with one matrix per side: torchvision's kernels do not export for sizes not known beforehand. Against
    those it leaves out the rounding to whole numbers, which would let two runtimes differ by a level.
    """
    height, width = (
        resampling(before, after, interpolation, images.device)
        for before, after in zip(images.shape[-2:], size, strict=True)
    )
    return (height @ (images.float() @ width.T).clamp(0, 255)).clamp(0, 255)


class _FlooringPool(nn.Module):
    """A 3x3 max-pool of stride 2 that rounds sizes up, for input that is not negative.

    The rounding up of `nn.MaxPool2d` asks whether a size is even, which a graph for all sizes cannot.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D, H // 2 + 1, W // 2 + 1)."""
        return F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 3, 2, padding=1)


def _with_flooring_pools(network: Segmenter) -> Segmenter:
    """Replace max-pools that round sizes up, in place; all of them follow a ReLU."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.MaxPool2d) and child.ceil_mode:
                setattr(module, name, _FlooringPool())
    return network


def smallest_side(network: Segmenter) -> int:
    """Return the least height and width of an image that an exported network takes.

    A graph for all sizes needs maps of more than one cell: the coarsest of a hierarchy, and the pyramid's of a plain
    transformer, which is half as fine as its patches.
    """
    backbone = network.backbone
    if not isinstance(backbone, TimmBackbone):
        return SMALLEST_SIDE
    return max(SMALLEST_SIDE, (3 if backbone.plain else 2) * backbone.cell)


def stride(network: Segmenter) -> int:
    """Return how many pixels per side a cell of the feature map stands for."""
    side = 256
    with torch.no_grad():
        logits = network(network.mean.new_zeros(1, 3, side, side)).logits
    cells: int = logits.shape[-1]
    return round(side / cells)
