"""What needs no learning: moving the look of one domain's images to another's.

A shift that one of these removes is one of colour and tone. They are the baselines that a method has to beat.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segadapt.trainables.core.data.batch import LabelledImages, TargetImages

Pixels = NDArray[np.uint8]

Restyle = Callable[[Pixels, int], Pixels]
"""Takes an image, (3, H, W), and its index; returns it in the other domain's look."""


def colour_map(images: Sequence[Pixels], reference: Sequence[Pixels]) -> Restyle:
    """Return one affine map of RGB for all images: whitening by their statistics, colouring by the reference's.

    Args:
        images: Images of the domain that is to be changed, each (3, H, W).
        reference: Images of the domain whose mean and covariance of pixels are taken.
    """
    (mean, spread), (reference_mean, reference_spread) = _statistics(images), _statistics(reference)
    matrix = _root(reference_spread) @ np.linalg.inv(_root(spread))

    def restyle(image: Pixels, _: int) -> Pixels:
        mapped = np.tensordot(matrix, image - mean[:, None, None], 1) + reference_mean[:, None, None]
        return _rounded(mapped)

    return restyle


def _statistics(images: Sequence[Pixels]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean, (3,), and covariance, (3, 3), of all pixels."""
    pixels = np.concatenate([image.reshape(3, -1) for image in images], axis=1).astype(np.float32)
    return pixels.mean(axis=1, dtype=np.float64), np.cov(pixels) + 1e-3 * np.eye(3)


def _root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the symmetric square root of a covariance."""
    values, vectors = np.linalg.eigh(matrix)
    root: NDArray[np.float64] = vectors * np.sqrt(np.maximum(values, 1e-6)) @ vectors.T
    return root


def histogram_match(images: Sequence[Pixels], reference: Sequence[Pixels]) -> Restyle:
    """Return what gives each image, channel by channel, the histogram of all reference images together.

    Args:
        images: Not needed: each image is matched by its own histogram.
        reference: Images of the domain whose histogram is taken, each (3, H, W).
    """
    del images
    pooled = np.sum([_histograms(image) for image in reference], axis=0)
    wanted = np.cumsum(pooled, axis=1) / pooled.sum(axis=1, keepdims=True)

    def restyle(image: Pixels, _: int) -> Pixels:
        counts = _histograms(image)
        reached = (np.cumsum(counts, axis=1) - counts / 2) / counts.sum(axis=1, keepdims=True)
        tables = [np.interp(reached[channel], wanted[channel], np.arange(256)) for channel in range(3)]
        return _rounded(np.stack([table[plane] for table, plane in zip(tables, image, strict=True)]))

    return restyle


def _histograms(image: Pixels) -> NDArray[np.int64]:
    return np.stack([np.bincount(plane.ravel(), minlength=256) for plane in image])


def amplitude_exchange(images: Sequence[Pixels], reference: Sequence[Pixels], *, share: float = 0.05) -> Restyle:
    """Return what gives each image the low-frequency amplitudes of a reference image and keeps its phase.

    Args:
        images: Not needed: each image is changed by a reference image alone.
        reference: Images that amplitudes are taken from, in turn; of the same size, each (3, H, W).
        share: Half the side of the exchanged square of frequencies, as a share of the shorter side of the image.

    Source: Yang and Soatto, FDA: Fourier Domain Adaptation for Semantic Segmentation, CVPR 2020, Eq. 1 to 3, whose
        shares are 0.01 to 0.09.
    """
    del images

    def restyle(image: Pixels, index: int) -> Pixels:
        spectrum = np.fft.fft2(image.astype(np.float64))
        other = np.abs(np.fft.fft2(reference[index % len(reference)].astype(np.float64)))
        amplitude, phase = np.fft.fftshift(np.abs(spectrum), (1, 2)), np.angle(spectrum)
        other = np.fft.fftshift(other, (1, 2))
        height, width = image.shape[1:]
        reach = max(1, int(share * min(height, width)))
        rows = slice(height // 2 - reach, height // 2 + reach + 1)
        columns = slice(width // 2 - reach, width // 2 + reach + 1)
        amplitude[:, rows, columns] = other[:, rows, columns]
        changed = np.fft.ifft2(np.fft.ifftshift(amplitude, (1, 2)) * np.exp(1j * phase))
        return _rounded(changed.real)

    return restyle


def _rounded(image: NDArray[np.float64]) -> Pixels:
    rounded: Pixels = np.clip(image + 0.5, 0, 255).astype(np.uint8)
    return rounded


RESTYLINGS: Mapping[str, Callable[[Sequence[Pixels], Sequence[Pixels]], Restyle]] = {
    "colour map": colour_map,
    "histogram matching": histogram_match,
    "amplitude exchange": amplitude_exchange,
}
"""Each made from unlabelled images of the domain to change and of the one whose look is wanted."""


def pixels_of(images: LabelledImages | TargetImages) -> list[Pixels]:
    """Return all images of a set, each (3, H, W)."""
    return [images.image(index).numpy() for index in range(len(images))]


@dataclass(frozen=True)
class Restyled:
    """Labelled images in another look."""

    images: LabelledImages
    restyle: Restyle

    @property
    def ids(self) -> Sequence[str]:
        """Return the ids of the images."""
        return self.images.ids

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        """Return a restyled image, (3, H, W) uint8."""
        return torch.from_numpy(self.restyle(self.images.image(index).numpy(), index))

    def label(self, index: int) -> Tensor:
        """Return the label of the image, (H, W) uint8."""
        return self.images.label(index)
