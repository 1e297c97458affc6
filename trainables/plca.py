"""PLCA: pixel-level cycle association.

Source: Kang et al., Pixel-Level Cycle Association: A New Perspective for Domain Adaptive Semantic Segmentation,
NeurIPS 2020, arXiv 2011.00147; kgl-prml/Pixel-Level-Cycle-Association@e01d77a.
Differs: adaptation starts from the source-only warm-up that all methods share, there from ImageNet weights. The Lovász
weight does not depend on the number of workers and micro-batches: 3 is what the official run amounts to (0.75 times 2
workers times 2 micro-batches). Means and Lovász-Softmax are those of the joined batch of all workers.
"""

from dataclasses import dataclass
from types import EllipsisType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from segadapt.trainables.core.data.batch import DomainBatch
from segadapt.trainables.core.labelling.features import labels_at_features
from segadapt.trainables.core.losses.cycle_association import (
    feature_association,
    output_association,
    overconfidence_regulariser,
)
from segadapt.trainables.core.losses.pixel_similarity import PROBABILITY_FLOOR, Kernels, precise
from segadapt.trainables.core.losses.segmentation import lovasz_softmax, segmentation_cross_entropy
from segadapt.trainables.core.losses.spatial_aggregation import aggregate_features, aggregate_probabilities
from segadapt.trainables.core.method import SOURCE_ONLY, Method, Stage, WarmupConfig
from segadapt.trainables.core.networks import Segmenter, SegmenterOutput
from segadapt.trainables.core.validation import check

ADAPT = Stage(name="adapt", flipped=True)


class AggregatingSegmenter(Segmenter):
    """The network as PLCA evaluates it: parts of another, corners not aligned, predictions optionally aggregated.

    With aggregation, features and then class probabilities are mixed with those of similar pixels of the same image,
    which reads no other image: transductive over one image. The returned logits are logarithms of the probabilities,
    and `upsample` interpolates probabilities.

    Args:
        segmenter: The network whose backbone and head are used, not copied.
        weight: Share of the average in [0, 1]; 0 predicts plainly.
        temperature_factor: See `aggregate_features`.
        floor: See `aggregate_probabilities`.
    """

    def __init__(self, segmenter: Segmenter, weight: float, temperature_factor: float, floor: float) -> None:
        super().__init__(
            segmenter.backbone,
            segmenter.head,
            feature_channels=segmenter.feature_channels,
            num_classes=segmenter.num_classes,
            align_corners=False,
            normalisation=segmenter.normalisation,
        )
        self.mean, self.std = segmenter.mean, segmenter.std
        self._parts = type(segmenter)  # knows how its backbone and head fit together
        self.weight = weight
        self.temperature_factor = temperature_factor
        self.floor = floor

    def forward(self, images: Tensor) -> SegmenterOutput:
        """Return logits and features of normalised images, (B, 3, H, W) float."""
        if self.weight == 0:
            return super().forward(images)
        plain_features = self.features(images)
        features = aggregate_features(plain_features, weight=self.weight, temperature_factor=self.temperature_factor)
        logits = self.classify(features.to(plain_features.dtype))
        probabilities = aggregate_probabilities(_probabilities(logits), weight=self.weight, floor=self.floor)
        return SegmenterOutput(_logarithm(probabilities), features)

    def decode(self, hidden: Any) -> Tensor:
        """Return the given network's features, (B, D, h, w), of what its backbone gives."""
        return self._parts.decode(self, hidden)

    def classify(self, features: Tensor) -> Tensor:
        """Return the given network's logits, (B, C, h, w), of features."""
        return self._parts.classify(self, features)

    def upsample(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Return `logits`, (B, C, h, w), brought to (B, C, *size)."""
        if self.weight == 0:
            return super().upsample(logits, size)
        return _logarithm(super().upsample(_probabilities(logits), size))


class PLCA(Method):
    """Associate pixels in cycles, from source to the most similar target pixel and back to the most similar source one.

    Cycles that end in the class they started from are strengthened against all other pixels, on features and on class
    probabilities. There are no pseudo labels, no memory and no second network.
    """

    name = "plca"
    stages: ClassVar[tuple[Stage, ...]] = (SOURCE_ONLY, ADAPT)
    aligns_corners: ClassVar[bool | None] = False

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Settings of PLCA."""

        feature_association_weight: float = 0.1
        """Weight β_feat of the association on features; 0 turns it off. Paper: 0.1 (one β_asso for both levels)."""
        output_association_weight: float = 0.1
        """Weight β_out of the association on class probabilities; 0 turns it off. Paper: 0.1."""
        output_level: bool = True
        """Whether class probabilities are adapted: their association and the regulariser. Paper: true."""
        lovasz_weight: float = 3.0
        """Weight ω of Lovász-Softmax while adapting. Paper: 0.75 times 2 workers times 2 micro-batches."""
        regulariser_weight: float = 0.01
        """Weight β_lsr of the regulariser of overconfident predictions, per domain; 0 turns it off. Paper: 0.01."""
        regulariser_level: float = 10.0
        """Mean negative log probability M that the regulariser drives to, in nats. Paper: 10."""
        aggregation_weight: float = 0.5
        """Share of the average of similar pixels in a target pixel; 0 turns aggregation off. Paper: 0.5."""
        temperature_factor: float = 1.0
        """Multiplies the deviation by which similarities are divided, κ; smaller is sharper. Paper: 1."""
        probability_floor: float = PROBABILITY_FLOOR
        """Added to probabilities before the logarithm, ε. Paper: 1e-10."""
        grid_scale: float = 1.0
        """Bilinear down-scaling of the maps that are associated, per side; cost falls with its 4th power. Paper: 1."""
        grid_share: float = 1.0
        """Share of rows and of columns, drawn at random, of the maps that are associated. Paper: 1."""
        kernels: Kernels = "reference"
        """What computes the associations: PyTorch, or fused "triton" kernels on CUDA, which no GPU has run yet."""
        inference_aggregation: float = 0.0
        """Aggregation weight of the deployed network. Paper: 0.5 in the final test, 0 in tests while training."""

        def __post_init__(self) -> None:
            for name in (
                "feature_association_weight",
                "output_association_weight",
                "lovasz_weight",
                "regulariser_weight",
            ):
                check(getattr(self, name) >= 0, f"method.{name} must not be negative", getattr(self, name))
            for name in ("regulariser_level", "temperature_factor", "probability_floor"):
                check(getattr(self, name) > 0, f"method.{name} must be positive", getattr(self, name))
            for name in ("aggregation_weight", "inference_aggregation"):
                check(0 <= getattr(self, name) <= 1, f"method.{name} must lie in [0, 1]", getattr(self, name))
            for name in ("grid_scale", "grid_share"):
                check(0 < getattr(self, name) <= 1, f"method.{name} must lie in (0, 1]", getattr(self, name))

    config: Config

    def __init__(self, segmenter: Segmenter, config: Config, warmup: WarmupConfig) -> None:
        super().__init__(segmenter, config, warmup)
        self.aggregating_segmenter = AggregatingSegmenter(
            segmenter, config.inference_aggregation, config.temperature_factor, config.probability_floor
        )

    @property
    def deployed(self) -> Segmenter:
        """The segmenter's own parts, with the corner rule and the aggregation of this method."""
        return self.aggregating_segmenter

    def source_network(self, stage: Stage) -> Segmenter:
        """Return the deployed network without aggregation, which is for target images alone."""
        config = self.config
        return AggregatingSegmenter(self.segmenter, 0.0, config.temperature_factor, config.probability_floor)

    def forward(self, batch: DomainBatch, step: int) -> dict[str, Tensor]:
        """Return the supervised terms, the weighted association of both levels and the regulariser of both domains.

        Terms: `cross_entropy`, `lovasz`, `feature_association`, `output_association`, `regulariser_source`,
        `regulariser_target`. Those of weight 0 are left out. With pseudo labels, which PLCA's own stages have none of,
        `target_cross_entropy`.
        """
        if batch.target_images is None:
            return self.source_only_terms(batch)
        config = self.config
        # Target first: batch norm's running statistics then lean towards the source, as in the original.
        target = self.segmenter(batch.target_images)
        source = self.segmenter(batch.source_images)
        terms = self._supervised_terms(source.logits, batch.source_labels)
        if (pseudo_labels := batch.target_pseudo_labels) is not None:
            upsampled = _upsampled(target.logits, pseudo_labels)
            terms["target_cross_entropy"] = segmentation_cross_entropy(upsampled, pseudo_labels)
        terms |= self._association_terms(source, target, batch.source_labels)
        if config.output_level and config.regulariser_weight > 0:
            for domain, output in (("source", source), ("target", target)):
                regulariser = overconfidence_regulariser(output.logits, level=config.regulariser_level)
                terms[f"regulariser_{domain}"] = config.regulariser_weight * regulariser
        return terms

    def _supervised_terms(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return `supervised_terms` under this method's corner rule: the warm-up keeps the network's."""
        upsampled = _upsampled(logits, labels)
        terms = {"cross_entropy": segmentation_cross_entropy(upsampled, labels)}
        if self.config.lovasz_weight > 0:
            terms["lovasz"] = self.config.lovasz_weight * lovasz_softmax(upsampled, labels)
        return terms

    def _association_terms(self, source: SegmenterOutput, target: SegmenterOutput, labels: Tensor) -> dict[str, Tensor]:
        config = self.config
        source, target = (_scaled(output, config.grid_scale) for output in (source, target))
        labels = labels_at_features(labels, (source.logits.shape[-2], source.logits.shape[-1]))
        if config.grid_share < 1:
            source_cells, target_cells = (_random_cells(output, config.grid_share) for output in (source, target))
            source, labels = SegmenterOutput(*(values[source_cells] for values in source)), labels[source_cells]
            target = SegmenterOutput(*(values[target_cells] for values in target))
        terms = {}
        if config.feature_association_weight > 0:
            association = feature_association(
                source.features,
                target.features,
                labels,
                aggregation_weight=config.aggregation_weight,
                temperature_factor=config.temperature_factor,
                kernels=config.kernels,
            )
            terms["feature_association"] = config.feature_association_weight * association
        if config.output_level and config.output_association_weight > 0:
            association = output_association(
                source.logits,
                target.logits,
                labels,
                aggregation_weight=config.aggregation_weight,
                temperature_factor=config.temperature_factor,
                floor=config.probability_floor,
                kernels=config.kernels,
            )
            terms["output_association"] = config.output_association_weight * association
        return terms


def _upsampled(logits: Tensor, labels: Tensor) -> Tensor:
    """Return logits at the size of labels, (B, C, H, W), corners not aligned."""
    size = (labels.shape[-2], labels.shape[-1])
    return F.interpolate(logits.to(precise(logits.dtype)), size=size, mode="bilinear", align_corners=False)


def _scaled(output: SegmenterOutput, scale: float) -> SegmenterOutput:
    """Return features and logits on a grid `scale` times as fine per side."""
    if scale == 1:
        return output
    size = [max(1, round(cells * scale)) for cells in output.logits.shape[-2:]]
    return SegmenterOutput(
        *(F.interpolate(values, size=size, mode="bilinear", align_corners=False) for values in output)
    )


def _random_cells(output: SegmenterOutput, share: float) -> tuple[EllipsisType, Tensor, Tensor]:
    """Draw whole rows and columns of a map, and return the index that picks their crossings."""
    device = output.logits.device
    rows, columns = (
        torch.randperm(cells)[: max(1, round(cells * share))].sort().values.to(device)
        for cells in output.logits.shape[-2:]
    )
    return ..., rows[:, None], columns


def _probabilities(logits: Tensor) -> Tensor:
    return logits.to(precise(logits.dtype)).softmax(dim=1)


def _logarithm(probabilities: Tensor) -> Tensor:
    """Return a finite logarithm, also of 0."""
    return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()
