"""Class-balanced self-training: label the target with the network's own confident predictions, then train on both.

Source: Zou et al., Unsupervised Domain Adaptation for Semantic Segmentation via Class-Balanced Self-Training, ECCV 2018
(one threshold per class); thresholds as in SDCA's last stage, BIT-DA/SDCA@d00e7ba.
Differs: SDCA trains on the target alone and from ImageNet weights again; here labelled source images stay in the batch
and training goes on from the labelling network.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from segadapt.trainables.core.data.batch import DomainBatch
from segadapt.trainables.core.losses.segmentation import segmentation_cross_entropy
from segadapt.trainables.core.method import SOURCE_ONLY, Method, Stage, StageData
from segadapt.trainables.core.pseudo_labels import label_target
from segadapt.trainables.core.validation import check


class SelfTraining(Method):
    """Train on source labels and on the network's confident target predictions, chosen per class, in rounds."""

    name = "self_training"
    stages: ClassVar[tuple[Stage, ...]] = (SOURCE_ONLY,)

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Settings of self-training."""

        rounds: int = 1
        """Times the target is labelled anew; `trainer.steps` are shared equally."""
        quantile: float = 0.5
        """Share of each class's predicted pixels below its threshold. Paper (SDCA): 0.5."""
        confidence_cap: float = 0.9
        """Largest threshold of a class: pixels above it are always kept. Paper (SDCA): 0.9."""
        target_weight: float = 1.0
        """Weight of the cross entropy on pseudo labels beside the source's terms."""
        lovasz_weight: float = 0.75
        """Weight of Lovász-Softmax on the source."""

        def __post_init__(self) -> None:
            check(self.rounds >= 1, "method.rounds must be at least 1", self.rounds)
            check(0 <= self.quantile <= 1, "method.quantile must lie in [0, 1]", self.quantile)
            check(0 <= self.confidence_cap <= 1, "method.confidence_cap must lie in [0, 1]", self.confidence_cap)
            for name in ("target_weight", "lovasz_weight"):
                check(getattr(self, name) >= 0, f"method.{name} must not be negative", getattr(self, name))

    config: Config

    @classmethod
    def plan(cls, config: Config) -> tuple[Stage, ...]:
        """Return the warm-up and the rounds."""
        rounds = tuple(
            Stage(
                name=f"round_{number}",
                share=1 / config.rounds,
                colored=("target",),
                flipped=True,
                pseudo_labels=True,
            )
            for number in range(1, config.rounds + 1)
        )
        return (SOURCE_ONLY, *rounds)

    def prepare_stage(self, stage: Stage, data: StageData) -> None:
        """Label the whole target set with the network as it is now."""
        if stage.pseudo_labels:
            label_target(
                self._predict,
                data,
                self.segmenter.num_classes,
                quantile=self.config.quantile,
                cap=self.config.confidence_cap,
            )

    def _predict(self, images: Tensor) -> Tensor:
        """Return logits at image size, (B, C, H, W)."""
        return self.segmenter.upsample(self.segmenter(images).logits, (images.shape[-2], images.shape[-1]))

    def forward(self, batch: DomainBatch, step: int) -> dict[str, Tensor]:
        """Return `cross_entropy` and `lovasz` of the source, and `target_cross_entropy` of the pseudo labels."""
        if batch.target_images is None:
            return self.source_only_terms(batch)
        assert batch.target_pseudo_labels is not None
        source = self.segmenter(batch.source_images)
        terms = self.supervised_terms(source.logits, batch.source_labels, self.config.lovasz_weight)
        target = segmentation_cross_entropy(self._predict(batch.target_images), batch.target_pseudo_labels)
        terms["target_cross_entropy"] = self.config.target_weight * target
        return terms
