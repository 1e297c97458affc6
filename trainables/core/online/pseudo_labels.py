"""Labels that a teacher gives in every step, and how much each pixel's label weighs."""

# B batch, C classes, H x W pixels.

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from segadapt.trainables.core.distributed import sum_over_workers

Quality = Literal["image", "batch"]


class WeightedLabels(NamedTuple):
    """A label and a weight for every pixel."""

    labels: Tensor  # (B, H, W) int64
    weights: Tensor  # (B, H, W) float, in [0, 1]


@torch.no_grad()
def weighted_pseudo_labels(
    probabilities: Tensor, threshold: float = 0.968, *, quality: Quality = "image", trusted: Tensor | None = None
) -> WeightedLabels:
    """Label every pixel with its likeliest class, and weigh it by the share of confident pixels around.

    q = #{pixels: max_c p_c >= threshold} / #{pixels}, where all pixels count, those that are not trusted too. No pixel
    is left out for its own lack of confidence: early in training, q is small for all of them.

    Args:
        probabilities: Class probabilities of the teacher on the image as it is, (B, C, H, W).
        threshold: Probability from which on a pixel is confident, inclusive; in [0, 1]. Paper: 0.968.
        quality: Whether q is an image's own, so that it does not depend on how a batch is shared out among workers, or
            one for the batch of all workers, as in the released code.
        trusted: Which pixels may be labelled, (B, H, W) bool: False where labels are unreliable, such as on a
            camera's own bonnet. None trusts all. Others get the weight 0.

    Returns:
        Labels and weights, without gradient.

    Source:
        Tranheden et al., DACS, WACV 2021; Hoyer et al., DAFormer, CVPR 2022; lhoyer/MIC@2f932a9,
        mmseg/models/uda/dacs.py.
        Differs: q is an image's own by default, as the papers define it.
    """
    confidence, labels = probabilities.max(1)
    confident = (confidence >= threshold).flatten(1).sum(1).double()
    share = confident / confidence[0].numel()
    if quality == "batch":
        counts = sum_over_workers(torch.stack([share.sum(), torch.ones_like(share).sum()]))
        share = (counts[0] / counts[1]).expand_as(share)
    weights = share.to(probabilities.dtype)[:, None, None].expand_as(confidence)
    return WeightedLabels(labels, weights.clone() if trusted is None else weights * trusted)
