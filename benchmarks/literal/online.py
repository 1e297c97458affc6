"""A step of online self-training the way the public codes write one, without regard to time or memory.

Per image: drawing classes, pasting, changing colours and blurring with a kernel of a tenth of the image. Shares of
confident pixels are numbers of the host, the teacher moves parameter by parameter, losses are logged in every step.
Each loss is passed back by itself, as in those codes. The networks are those of the measured method.
"""

# B images per domain, C classes, H x W pixels of a label.

import copy
import math
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import functional as vision

from segadapt.trainables.core.networks import Segmenter

IGNORE_INDEX = 255


@dataclass(frozen=True)
class Recipe:
    """Settings, MIC's by default, of which the tests switch off what is drawn at random."""

    momentum: float = 0.999
    threshold: float = 0.968
    mixes: bool = True
    mask_ratio: float = 0.7
    jitter: float = 0.2
    jitter_chance: float = 0.8
    blur_chance: float = 0.5


class LiteralOnlineStep:
    """Optimiser steps of online self-training in the literal form.

    Args:
        network: Is trained.
        lr: Learning rate.
        recipe: Settings.
    """

    def __init__(self, network: Segmenter, lr: float, recipe: Recipe | None = None) -> None:
        self.network, self.recipe = network, recipe or Recipe()
        self.teacher = copy.deepcopy(network)
        for parameter in self.teacher.parameters():
            parameter.detach_()
        self.optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        self.step = 0

    def __call__(self, images: Tensor, labels: Tensor, target: Tensor) -> dict[str, float]:
        """Take one step; returns the terms, as they would be logged.

        Args:
            images: Normalised source images, (B, 3, H, W).
            labels: (B, H, W) int64, 255 = ignore.
            target: Normalised target images, (B, 3, H, W).
        """
        self.optimizer.zero_grad()
        log = self.losses(images, labels, target)
        self.optimizer.step()
        return log

    def losses(self, images: Tensor, labels: Tensor, target: Tensor) -> dict[str, float]:
        """Pass all losses back; returns them."""
        self._move_teacher()
        self.network.train()
        log = {"cross_entropy": self._pass_back(images, labels, torch.ones_like(labels, dtype=images.dtype))}
        with torch.no_grad():
            logits = self._logits(self.teacher.train(), target, (labels.shape[-2], labels.shape[-1]))
            probability, pseudo = logits.softmax(dim=1).max(dim=1)
            confident = probability.ge(self.recipe.threshold).long() == 1
            share = torch.sum(confident).item() / np.size(pseudo.cpu().numpy())
            weight = share * torch.ones(probability.shape, device=target.device)
        if self.recipe.mixes:
            mixed = self._mixed(images, labels, target, pseudo, weight)
            log["online_mix"] = self._pass_back(*mixed)
        masked = self._masked(torch.cat([self._changed(image[None], self._chances()) for image in target]))
        log["online_mask"] = self._pass_back(masked, pseudo, weight)
        self.step += 1
        return log

    def _move_teacher(self) -> None:
        momentum = min(1 - 1 / (self.step + 1), self.recipe.momentum)
        for average, parameter in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
            average.data[:] = momentum * average[:].data[:] + (1 - momentum) * parameter[:].data[:]

    def _logits(self, network: nn.Module, images: Tensor, size: tuple[int, int]) -> Tensor:
        return self.network.upsample(network(images).logits, size)

    def _pass_back(self, images: Tensor, labels: Tensor, weight: Tensor) -> float:
        logits = self._logits(self.network, images, (labels.shape[-2], labels.shape[-1]))
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX)
        loss = (weight * losses).mean()
        loss.backward()
        return loss.item()

    def _chances(self) -> tuple[bool, bool]:
        return random.random() < self.recipe.jitter_chance, random.random() < self.recipe.blur_chance

    def _mixed(
        self, images: Tensor, labels: Tensor, target: Tensor, pseudo: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        chances = self._chances()
        mixed_images, mixed_labels, mixed_weights = [], [], []
        classes = torch.unique(labels)
        for index in range(len(images)):
            count = len(classes)
            drawn = classes[torch.from_numpy(np.random.choice(count, (count + count % 2) // 2, replace=False))]
            one_by_one = labels[index][None] == drawn[:, None, None]
            mask = one_by_one.long().sum(dim=0, keepdim=True)
            image = mask * images[index] + (1 - mask) * target[index]
            mixed_images.append(self._changed(image[None], chances))
            mixed_labels.append(mask * labels[index][None] + (1 - mask) * pseudo[index][None])
            mixed_weights.append(mask * torch.ones_like(weight[index])[None] + (1 - mask) * weight[index][None])
        return torch.cat(mixed_images), torch.cat(mixed_labels), torch.cat(mixed_weights)

    def _changed(self, image: Tensor, chances: tuple[bool, bool]) -> Tensor:
        """Return an image, (1, 3, H, W), with other colours and blurred, as by chance."""
        jitters, blurs = chances
        mean, std = self.network.mean, self.network.std
        if jitters:
            jitter = self.recipe.jitter
            colours = (image * std + mean).clamp(0, 1)
            for adjust in (vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation):
                colours = adjust(colours, 1 + random.uniform(-jitter, jitter))
            colours = vision.adjust_hue(colours, random.uniform(-jitter, jitter))
            image = (colours - mean) / std
        if blurs:
            sides = [math.ceil(0.1 * side) for side in image.shape[-2:]]
            kernel = [max(3, side - (side + 1) % 2) for side in sides]  # odd
            image = vision.gaussian_blur(image, kernel, random.uniform(0.15, 1.15))
        return image

    def _masked(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        block = max(1, round(min(height, width) / 16))
        draws = torch.rand(len(images), 1, round(height / block), round(width / block), device=images.device)
        kept = (draws > self.recipe.mask_ratio).float()
        return images * F.interpolate(kept, size=(height, width), mode="nearest")
