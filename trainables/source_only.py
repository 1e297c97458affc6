"""Training on labelled source images alone: the warm-up of every method, and the baseline that adaptation must beat."""

from typing import ClassVar

from torch import Tensor

from segadapt.trainables.core.data.batch import DomainBatch
from segadapt.trainables.core.method import SOURCE_ONLY, Method, Stage


class SourceOnly(Method):
    """Cross entropy and Lovász-Softmax on source images; its settings are the warm-up's (`warmup.*`)."""

    name = "source_only"
    stages: ClassVar[tuple[Stage, ...]] = (SOURCE_ONLY,)

    def forward(self, batch: DomainBatch, step: int) -> dict[str, Tensor]:
        """Return `cross_entropy` and `lovasz`."""
        return self.source_only_terms(batch)
