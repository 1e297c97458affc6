"""Entropy of predictions, to be made small on unlabelled pixels."""

# B batch, C classes, H x W pixels.

import torch
from torch import Tensor

from segadapt.trainables.core.distributed import global_mean


def softened_entropy(logits: Tensor) -> Tensor:
    """Return the cross entropy of the class probabilities q with softmax(q), averaged over all pixels.

    A log-softmax of probabilities takes the place of their logarithm. With log softmax(q)_k = q_k - log Σ_j exp(q_j)
    and Σ q = 1:

        loss = log Σ_k exp(q_k) - Σ_k q_k²

    It equals log C at the uniform distribution, as the Shannon entropy does, but falls only to log(e + C - 1) - 1 for a
    certain prediction (about 2.03 at C = 19), with far smaller gradients.

    Args:
        logits: Class scores, (B, C, H, W), any floating type; computed in float32 or wider.

    Returns:
        Scalar in nats, averaged over the pixels of the whole batch, all data-parallel workers included.

    Source:
        Lee et al., Bi-directional Contrastive Learning (BiCL), ECCV 2022, arXiv 2207.10892; the formula is that of the
        code, cvlab-yonsei/DASS@f544686, written without the logarithms of softmax(q).
    """
    probabilities = _full_precision(logits).softmax(dim=1)
    return _pixel_mean(probabilities.logsumexp(dim=1) - probabilities.square().sum(dim=1))


def shannon_entropy(logits: Tensor) -> Tensor:
    """Return the entropy -Σ_k q_k log q_k of the class probabilities q, averaged over all pixels.

    Args:
        logits: Class scores, (B, C, H, W), any floating type; computed in float32 or wider.

    Returns:
        Scalar in nats, averaged over the pixels of the whole batch, all data-parallel workers included.
    """
    log_probabilities = _full_precision(logits).log_softmax(dim=1)
    return _pixel_mean(-(log_probabilities.exp() * log_probabilities).sum(dim=1))


def _pixel_mean(values: Tensor) -> Tensor:
    total = values.sum(dtype=torch.float64).to(values.dtype)
    return global_mean(total, torch.full((), values.numel(), device=values.device))


def _full_precision(values: Tensor) -> Tensor:
    """Return `values` as float32, or as they are when float64."""
    return values if values.dtype == torch.float64 else values.float()
