"""The passes of a training step forward and backward: one by one, each freed before the next one begins."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from segadapt.trainables.core.data.batch import DomainBatch
from segadapt.trainables.core.method import Method
from segadapt.trainables.core.online.terms import PrecisionContext
from segadapt.trainables.core.training.gradients import batch_norm_explained, synchronised

Scale = Callable[[Tensor], Tensor]
"""Raises a loss before it is passed back."""


def pass_step(
    method: Method,
    train_step: nn.Module,
    batches: Iterator[DomainBatch],
    step: int,
    parts: int,
    *,
    precision: PrecisionContext,
    scale: Scale,
) -> dict[str, Tensor]:
    """Pass the micro-batches of a step forward and backward, which adds up their gradients.

    Args:
        method: The method.
        train_step: The method, as it is wrapped for several workers.
        batches: Micro-batches, of which one step's are taken.
        step: Steps taken in the stage before.
        parts: Micro-batches of a step.
        precision: Context in which networks compute.
        scale: Raises losses so that gradients in half precision do not vanish.

    Returns:
        The mean of each loss term over the micro-batches.
    """
    means = dict[str, Tensor]()

    def back(loss: Tensor) -> None:
        torch.autograd.backward(scale(loss / parts))

    for part in range(parts):
        batch = next(batches)
        with synchronised(train_step, part == parts - 1), batch_norm_explained():
            for name, term in _pass_back(method, train_step, batch, step, precision, back).items():
                means[name] = means.get(name, 0.0) + term.detach().double() / parts
    return means


def _pass_back(
    method: Method,
    train_step: nn.Module,
    batch: DomainBatch,
    step: int,
    precision: PrecisionContext,
    back: Callable[[Tensor], None],
) -> dict[str, Tensor]:
    """Pass a micro-batch forward and backward and return its terms.

    Those of online self-training come first, so that data-parallel workers exchange the sum of all gradients in the
    method's own pass.
    """
    online = method.online if batch.target_images is not None else None
    if online is None:
        with precision():
            terms: dict[str, Tensor] = train_step(batch, step)
        back(torch.stack(list(terms.values())).sum())
        return terms
    labelled = dict[str, Tensor]()
    for name, term in online.terms(method.segmenter, batch, step, precision):
        back(term)
        labelled[name] = term.detach()
    with online.watched(method.segmenter.backbone, batch.source_images) as maps, precision():
        terms = train_step(batch, step)
    terms = {**terms, **online.feature_term(method.segmenter, batch, maps, precision)}
    total = torch.stack(list(terms.values())).sum()
    if online.mask_token is not None:  # workers exchange what this pass reaches
        total = total + 0 * online.mask_token.sum()
    back(total)
    return {**labelled, **terms}
