"""Online self-training: a teacher labels target images in every step, which the network learns mixed and masked.

Sources: Tranheden et al., DACS, WACV 2021; Hoyer et al., DAFormer, CVPR 2022; Hoyer et al., MIC, CVPR 2023;
lhoyer/MIC@2f932a9; Englert et al., VFM-UDA, 2024, tue-mps/vfm-uda@e154d8f.
The terms on target images are `core.online`'s and their settings `online.*`, as beside any other method: this one adds
the cross entropy of source images alone, and is what those methods' own losses are to be compared with.
Differs: adaptation starts from the source-only warm-up that all methods share, there from the first step
(`warmup.steps=0`).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from segadapt.trainables.core.data.batch import DomainBatch
from segadapt.trainables.core.losses.segmentation import segmentation_cross_entropy, weighted_cross_entropy
from segadapt.trainables.core.method import SOURCE_ONLY, Method, Stage


class OnlineSelfTraining(Method):
    """Cross entropy on source images, beside the terms of online self-training."""

    name = "online_self_training"
    stages: ClassVar[tuple[Stage, ...]] = (SOURCE_ONLY, Stage(name="adapt", flipped=True))
    always_online: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Settings of the source's term; those of the target's terms are `online.*`."""

        mean_over: Literal["all", "valid"] = "all"
        """What the sum over source pixels is divided by: all of them (DACS, DAFormer, MIC), or those with a label
        (VFM-UDA)."""

    config: Config

    def forward(self, batch: DomainBatch, step: int) -> dict[str, Tensor]:
        """Return `cross_entropy`; with pseudo labels of rounds also `target_cross_entropy`."""
        if batch.target_images is None:
            return self.source_only_terms(batch)
        logits = self._upsampled(self.segmenter(batch.source_images).logits, batch.source_labels)
        terms = {"cross_entropy": weighted_cross_entropy(logits, batch.source_labels, mean_over=self.config.mean_over)}
        if (labels := batch.target_pseudo_labels) is not None:
            target_logits = self._upsampled(self.segmenter(batch.target_images).logits, labels)
            terms["target_cross_entropy"] = segmentation_cross_entropy(target_logits, labels)
        return terms

    def _upsampled(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.segmenter.upsample(logits, (labels.shape[-2], labels.shape[-1]))
