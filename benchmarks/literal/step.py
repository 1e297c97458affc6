"""A training step of each method the way the public codes write one, without regard to time or memory.

PIL reads and resizes each image in a worker of torch's `DataLoader`, as floats; every domain passes the network on its
own; tensors are float32 and contiguous; constant batch norm is batch norm in evaluation mode; each class has a loop
turn; pixels are picked by masks; losses are logged in every step. Networks and heads are those of the measured method.
"""

# B images per domain, C classes, H x W pixels of a label, h x w cells of a feature map.

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from literal import bicl, clst, drsl, plca, sdca
from segadapt.trainables.core.method import Method

IGNORE_INDEX = 255
Size = tuple[int, int]
Terms = dict[str, Tensor]


class PilImages(Dataset[tuple[Tensor, Tensor]]):
    """Image and label files of one domain, resized and normalised as they are read.

    Args:
        images: Files.
        labels: Files of the images' labels.
        ids: Stored value of each class, in order of the classes.
        size: Height and width that images are resized to.
        crop: Height and width cut out at a random place; None takes whole images.
    """

    def __init__(
        self, images: list[Path], labels: list[Path], ids: list[int], size: Size, crop: Size | None = None
    ) -> None:
        self.images, self.labels, self.ids, self.size, self.crop = images, labels, ids, size, crop

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = Image.open(self.images[index]).convert("RGB").resize(self.size[::-1], Image.Resampling.BICUBIC)
        stored = np.array(Image.open(self.labels[index]).resize(self.size[::-1], Image.Resampling.NEAREST))
        pixels = np.asarray(image, np.float32) / 255.0
        pixels -= np.array([0.485, 0.456, 0.406], np.float32)
        pixels /= np.array([0.229, 0.224, 0.225], np.float32)
        label = IGNORE_INDEX * np.ones(stored.shape, np.int64)
        for train_id, label_id in enumerate(self.ids):
            label[stored == label_id] = train_id
        pixels = pixels.transpose(2, 0, 1)
        if self.crop is not None:
            top, left = (int(torch.randint(full - cut + 1, ())) for full, cut in zip(self.size, self.crop, strict=True))
            window = np.s_[..., top : top + self.crop[0], left : left + self.crop[1]]
            pixels, label = pixels[window], label[window]
        return torch.from_numpy(pixels.copy()), torch.from_numpy(label.copy())


def endless(images: PilImages, batch_size: int, workers: int) -> Iterator[list[Tensor]]:
    """Yield shuffled batches for ever."""
    loader = DataLoader(
        images,
        batch_size,
        shuffle=True,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


def make_literal(network: nn.Module) -> None:
    """Bring a network to the form of the public codes: contiguous, batch norm constant by evaluation mode."""
    network.to(memory_format=torch.contiguous_format)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)


def keep_batch_norm(network: nn.Module) -> None:
    """Train, but for batch norm."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


class LiteralStep:
    """Optimiser steps of a method in the literal form.

    Args:
        method: Whose networks and heads are trained; its `forward` is not called.
        source: Endless batches of the labelled domain.
        target: Endless batches of the other one; what comes as their labels serves as pseudo labels.
        device: Where to train.
        lr: Learning rate.
    """

    def __init__(
        self,
        method: Method,
        source: Iterator[list[Tensor]],
        target: Iterator[list[Tensor]],
        device: torch.device,
        lr: float,
    ) -> None:
        self.method: Any = method.to(device)
        self.source, self.target, self.device = source, target, device
        make_literal(method)
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=lr, momentum=0.9, weight_decay=5e-4)
        self.classes = self.method.segmenter.num_classes
        self.channels = self.method.segmenter.feature_channels
        self.state = self._state()

    def __call__(self) -> dict[str, float]:
        """Take one step; returns the terms, as they would be logged."""
        keep_batch_norm(self.method)
        images, labels = (part.to(self.device) for part in next(self.source))
        forward: Callable[..., Terms] = getattr(self, f"_{self.method.name}")
        if self.method.name == "source_only":
            terms = forward(images, labels)
        else:
            target_images, pseudo = (part.to(self.device) for part in next(self.target))
            terms = forward(images, labels, target_images, pseudo)
        self.optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        self.optimizer.step()
        return {name: term.item() for name, term in terms.items()}

    def _state(self) -> dict[str, tuple[Tensor, ...]]:
        """Return class statistics by level, all zero."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, device=self.device)

        return {
            level: (zeros(self.classes), zeros(self.classes, width), zeros(self.classes, width))
            for level, width in (("features", self.channels), ("logits", self.classes))
        }

    def _source_only(self, images: Tensor, labels: Tensor) -> Terms:
        logits = self._upsampled(self.method.segmenter(images).logits, labels)
        return {"cross_entropy": cross_entropy(logits, labels), "lovasz": 0.75 * lovasz_softmax(logits, labels)}

    def _sdca(self, images: Tensor, labels: Tensor, target_images: Tensor, _: Tensor) -> Terms:
        source, target = self.method.segmenter(images), self.method.segmenter(target_images)
        upsampled = self._upsampled(source.logits, labels)
        terms = {"cross_entropy": cross_entropy(upsampled, labels), "lovasz": 0.75 * lovasz_softmax(upsampled, labels)}
        cells = F.interpolate(labels[:, None].float(), source.logits.shape[-2:], mode="nearest")[:, 0].long()
        confidence, predicted = target.logits.softmax(dim=1).max(dim=1)
        predicted[confidence < 0.9] = IGNORE_INDEX
        for level, own, other in (
            ("features", source.features, target.features),
            ("logits", source.logits, target.logits),
        ):
            self.state[level] = sdca.merge_statistics(own.detach(), cells, *self.state[level])
            mean, variance = self.state[level][1:]
            terms[f"{level}_source"] = sdca.distribution_contrast(own, cells, mean, variance)
            if (predicted != IGNORE_INDEX).any():
                terms[f"{level}_target"] = sdca.distribution_contrast(other, predicted, mean, variance)
        return terms

    def _bicl(self, images: Tensor, labels: Tensor, target_images: Tensor, pseudo: Tensor) -> Terms:
        segmenter = self.method.segmenter
        stem = self.method.source_stem or segmenter.backbone.stem
        source_hidden = segmenter.backbone.stages(stem(images))
        source_branches = segmenter.head.branches(source_hidden)
        target_branches = segmenter.head.branches(segmenter.backbone(target_images))
        source = self._upsampled(sum(source_branches), labels)
        target = self._upsampled(sum(target_branches), pseudo)
        features = torch.cat(source_branches, dim=1), torch.cat(target_branches, dim=1)
        pairs = [
            bicl.contrast(*pair, num_classes=self.classes)
            for pair in zip(features[0], labels, features[1], pseudo, strict=True)
        ]
        return {
            "cross_entropy": cross_entropy(source, labels),
            "target_cross_entropy": 0.3 * cross_entropy(target, pseudo),
            "entropy": 0.4 * bicl.softened_entropy(source),
            "target_entropy": 0.12 * bicl.softened_entropy(target),
            "forward_contrast": 0.2 * torch.stack([forward for forward, _ in pairs]).mean(),
            "backward_contrast": 0.2 * torch.stack([backward for _, backward in pairs]).mean(),
        }

    def _drsl(self, images: Tensor, labels: Tensor, target_images: Tensor, pseudo: Tensor) -> Terms:
        source, target = self.method.segmenter(images), self.method.segmenter(target_images)
        terms = {
            "cross_entropy": cross_entropy(self._upsampled(source.logits, labels), labels),
            "target_cross_entropy": cross_entropy(self._upsampled(target.logits, pseudo), pseudo),
        }
        modes = self.method.modes.base + self.method.modes.change
        found = []
        for domain, features, full in (("source", source.features, labels), ("target", target.features, pseudo)):
            embeddings = self.method.embedding(features)
            cells = F.interpolate(full[:, None].float(), features.shape[-2:], mode="nearest")[:, 0].long()
            loss, nearest = drsl.mode_margin(embeddings, cells, modes)
            terms[f"metric_{domain}"] = 0.1 * loss
            found += [embeddings, nearest]
        terms["alignment"] = 0.1 * drsl.mode_alignment(*found, num_modes=modes.shape[0] * modes.shape[1])
        return terms

    def _clst(self, images: Tensor, labels: Tensor, target_images: Tensor, pseudo: Tensor) -> Terms:
        source, target = self.method.segmenter(images), self.method.segmenter(target_images)
        terms = {
            "cross_entropy": cross_entropy(self._upsampled(source.logits, labels), labels),
            "target_cross_entropy": cross_entropy(self._upsampled(target.logits, pseudo), pseudo),
        }
        count, centroids, _ = self.state["features"]
        for domain, features, full in (("source", source.features, labels), ("target", target.features, pseudo)):
            cells = F.interpolate(full[:, None].float(), features.shape[-2:], mode="nearest")[:, 0].long()
            if domain == "source":
                centroids, count = clst.update_centroids(features, cells, centroids, count.bool(), momentum=0.99)
                self.state["features"] = count, centroids, centroids
            terms[f"contrast_{domain}"] = 0.1 * clst.centroid_contrast(features, cells, centroids, count)
        return terms

    def _plca(self, images: Tensor, labels: Tensor, target_images: Tensor, _: Tensor) -> Terms:
        source, target = self.method.segmenter(images), self.method.segmenter(target_images)
        upsampled = F.interpolate(source.logits, labels.shape[-2:], mode="bilinear", align_corners=False)
        cells = F.interpolate(labels[:, None].float(), source.logits.shape[-2:], mode="nearest")[:, 0].long()
        return {
            "cross_entropy": cross_entropy(upsampled, labels),
            "lovasz": 3.0 * lovasz_softmax(upsampled, labels),
            "feature_association": 0.1 * plca.feature_association(source.features, target.features, cells),
            "output_association": 0.1 * plca.output_association(source.logits, target.logits, cells),
            "regulariser_source": 0.01 * plca.overconfidence_regulariser(source.logits),
            "regulariser_target": 0.01 * plca.overconfidence_regulariser(target.logits),
        }

    @staticmethod
    def _upsampled(logits: Tensor, labels: Tensor) -> Tensor:
        return F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=True)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over labelled pixels, picked by a mask: logits (B, C, H, W), labels (B, H, W)."""
    kept = labels != IGNORE_INDEX
    return F.cross_entropy(logits.permute(0, 2, 3, 1)[kept], labels[kept])


def lovasz_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the Lovász extension of the Jaccard distance, averaged over the present classes, one sort per class.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W), 255 = ignore.
    """
    kept = labels != IGNORE_INDEX
    probabilities, targets = logits.softmax(dim=1).permute(0, 2, 3, 1)[kept], labels[kept]
    losses = []
    for index in range(probabilities.shape[1]):
        foreground = (targets == index).float()
        if foreground.sum() == 0:
            continue
        errors, order = (foreground - probabilities[:, index]).abs().sort(descending=True)
        hits = foreground[order]
        intersection = hits.sum() - hits.cumsum(0)
        union = hits.sum() + (1 - hits).cumsum(0)
        jaccard = 1 - intersection / union
        steps = torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])
        losses.append(torch.dot(errors, steps))
    return torch.stack(losses).mean()
