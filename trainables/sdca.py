"""SDCA: semantic distribution-aware contrastive adaptation.

Source: Li et al., Semantic Distribution-aware Contrastive Adaptation for Semantic Segmentation, arXiv 2105.05013, 2021;
BIT-DA/SDCA@d00e7ba.
Differs: class statistics are summed over data-parallel workers (the official code keeps one set per process) and pixel
counts are exact (the official float32 counts stop at 1.7e7). The final self-training from pseudo labels (the
paper's last stage) is the method `self_training`, which `segadapt finish` runs for every method.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from segadapt.trainables.core.data.batch import DomainBatch
from segadapt.trainables.core.labelling.features import confident_labels, labels_at_features
from segadapt.trainables.core.losses.distribution_contrast import distribution_contrast
from segadapt.trainables.core.losses.segmentation import segmentation_cross_entropy
from segadapt.trainables.core.method import SOURCE_ONLY, Method, Stage, StageData, WarmupConfig
from segadapt.trainables.core.networks import Segmenter
from segadapt.trainables.core.state.class_statistics import ClassStatistics
from segadapt.trainables.core.validation import check

STATISTICS = Stage(name="statistics", share=0.0, shared=True)
ADAPT = Stage(name="adapt", colored=("source",))


class SDCA(Method):
    """Pull pixels of both domains towards the feature distribution of their class on the source.

    Every class is a Gaussian with diagonal covariance over source pixels. Two representations are adapted: the feature
    map, and (optionally) the logits. Target pixels take their own confident prediction as label.
    """

    name = "sdca"
    stages: ClassVar[tuple[Stage, ...]] = (SOURCE_ONLY, STATISTICS, ADAPT)

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Settings of SDCA; weights in the coordinates that matter, gain = weight / temperature (§11)."""

        temperature: float = 100.0
        """Temperature τ of the contrast; the variance term acts at relative order 1 / (2τ). Paper: 100."""
        feature_gain: float = 0.01
        """Gain g = λ_feat / τ of the contrast on features; 0 turns it off. Paper: 0.01 (λ_feat = 1)."""
        output_gain: float = 0.01
        """Gain g = λ_out / τ of the contrast on logits; 0 turns it off. Paper: 0.01 (λ_out = 1)."""
        covariance_factor: float = 1.0
        """Multiplies the normalised variance; 0 leaves class means only. Paper: 1."""
        confidence_threshold: float = 0.9
        """Smallest softmax maximum δ of a target pixel that takes part. Paper: 0.9."""
        lovasz_weight: float = 0.75
        """Weight λ_lov of Lovász-Softmax on the source while adapting. Paper: 0.75."""

        def __post_init__(self) -> None:
            check(self.temperature > 0, "method.temperature must be positive", self.temperature)
            for name in ("feature_gain", "output_gain", "covariance_factor", "lovasz_weight"):
                check(getattr(self, name) >= 0, f"method.{name} must not be negative", getattr(self, name))
            threshold = self.confidence_threshold
            check(0 <= threshold <= 1, "method.confidence_threshold must lie in [0, 1]", threshold)

    config: Config

    def __init__(self, segmenter: Segmenter, config: Config, warmup: WarmupConfig) -> None:
        super().__init__(segmenter, config, warmup)
        classes = segmenter.num_classes
        self.feature_statistics = ClassStatistics(classes, segmenter.feature_channels)
        self.output_statistics = ClassStatistics(classes, classes)

    def prepare_stage(self, stage: Stage, data: StageData) -> None:
        """Fill the statistics with one pass of the source-only network over the source set (§6)."""
        if stage is not STATISTICS:
            return
        for images, labels in data.source_batches():
            output = self.segmenter(images)
            small = labels_at_features(labels, (output.features.shape[-2], output.features.shape[-1]))
            self.feature_statistics.update(output.features, small)
            self.output_statistics.update(output.logits, small)

    def forward(self, batch: DomainBatch, step: int) -> dict[str, Tensor]:
        """Return the supervised terms and the weighted contrast of both domains and levels (§5.4, §5.5).

        Terms: `cross_entropy`, `lovasz`, `feature_source`, `feature_target`, `output_source`, `output_target`; with
        pseudo labels, which SDCA's own stages have none of, `target_cross_entropy`.
        """
        if batch.target_images is None:
            return self.source_only_terms(batch)
        source = self.segmenter(batch.source_images)
        target = self.segmenter(batch.target_images)
        source_labels = labels_at_features(batch.source_labels, (source.features.shape[-2], source.features.shape[-1]))
        target_labels = confident_labels(target.logits, self.config.confidence_threshold)
        terms = self.supervised_terms(source.logits, batch.source_labels, self.config.lovasz_weight)
        if (pseudo_labels := batch.target_pseudo_labels) is not None:
            upsampled = self.segmenter.upsample(target.logits, (pseudo_labels.shape[-2], pseudo_labels.shape[-1]))
            terms["target_cross_entropy"] = segmentation_cross_entropy(upsampled, pseudo_labels)
        levels = (
            ("feature", self.feature_statistics, source.features, target.features, self.config.feature_gain),
            ("output", self.output_statistics, source.logits, target.logits, self.config.output_gain),
        )
        for level, statistics, source_values, target_values, gain in levels:
            statistics.update(source_values.detach(), source_labels)
            if gain == 0:
                continue
            for domain, values, labels in (
                ("source", source_values, source_labels),
                ("target", target_values, target_labels),
            ):
                contrast = distribution_contrast(
                    values,
                    labels,
                    statistics.mean,
                    statistics.variance,
                    temperature=self.config.temperature,
                    covariance_factor=self.config.covariance_factor,
                )
                terms[f"{level}_{domain}"] = gain * self.config.temperature * contrast
        return terms
