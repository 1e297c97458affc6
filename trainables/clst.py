"""CLST: contrast of class centroids plus self-training from a temporal ensemble.

Source: Marsden et al., Contrastive Learning and Self-Training for Unsupervised Domain Adaptation in Semantic
Segmentation, arXiv 2105.02001, IJCNN 2022. No official code was found; only title and abstract could be read. They fix
a contrastive loss on category-wise centroids across domains, and pseudo labels from a memory-efficient temporal
ensemble; the formulas here are ours, some values are from the authors' mariodoebler/test-time-adaptation.
Differs: the learning rate starts anew in each round, as do the optimiser's moments; the schedule's length is
`optimizer.horizon`. Scale, crop, blur and colour follow `augmentation.*`. Batch norm follows the network's setting. The
warm-up is the one all methods share, with its Lovász-Softmax.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from segadapt.trainables.core.data.batch import DomainBatch
from segadapt.trainables.core.distributed import rank, world_size
from segadapt.trainables.core.labelling.ensemble import label_ensemble
from segadapt.trainables.core.labelling.features import labels_at_features
from segadapt.trainables.core.labelling.quality import LabelRule
from segadapt.trainables.core.labelling.rules import written_rule
from segadapt.trainables.core.labelling.thresholds import confidence_at, keep_confident
from segadapt.trainables.core.losses.centroid_contrast import centroid_contrast
from segadapt.trainables.core.losses.segmentation import segmentation_cross_entropy
from segadapt.trainables.core.method import SOURCE_ONLY, Method, ParameterGroup, Stage, StageData, WarmupConfig
from segadapt.trainables.core.networks import Segmenter
from segadapt.trainables.core.state.class_centroids import ClassCentroids
from segadapt.trainables.core.state.mean_teacher import MeanTeacher
from segadapt.trainables.core.state.running_confidence import RunningConfidence
from segadapt.trainables.core.validation import check


@dataclass(frozen=True, kw_only=True)
class Round(Stage):
    """Pseudo labels from the ensemble, then training with them."""

    number: int
    """From 1."""

    @property
    def previous(self) -> str | None:
        """Name of the round before, if any."""
        return _round_name(self.number - 1) if self.number > 1 else None


CENTROIDS = Stage(name="centroids", share=0.0)
ADAPT = Stage(name="adapt", colored=("source", "target"), flipped=True)


class CLST(Method):
    """Pull the mean feature of each class in each image to the running source centroid of its class.

    Source images give classes by their labels, target images by pseudo labels. These come from predictions that are
    averaged over rounds for every target image, or from a teacher whose weights are averaged over steps.
    """

    name = "clst"
    stages: ClassVar[tuple[Stage, ...]] = (SOURCE_ONLY, CENTROIDS)

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Settings of CLST. The paper's values are unknown: "authors" means their later code, other values are ours."""

        temperature: float = 0.1
        """Temperature τ of the cosine similarities. Authors: 0.1."""
        contrast_weight: float = 0.1
        """Weight λ_con of the contrast; 0 turns it off. Our choice: 0.1."""
        target_weight: float = 1.0
        """Weight λ_st of the target's cross entropy with pseudo labels; 0 turns it off. Authors: 1."""
        source_share: float = 1.0
        """Weight gamma of the contrast of source images beside that of target images; 0 turns it off. Our choice: 1."""
        centroid_momentum: float = 0.99
        """Share β of a source centroid that a step leaves. Our choice: 0.99."""
        min_cells: int = 1
        """Smallest number n_min of cells of a class in an image for its contrast. Our choice: 1."""
        projection: int = 0
        """Channels of a two-layer projection of the contrasted features; 0 contrasts the features. Our choice: 0."""
        centroid_images: int = 2000
        """Source images that the first centroids are the mean of. Our choice: 2000."""
        ensemble: Literal["predictions", "weights"] = "predictions"
        """What is averaged: predictions, image by image over rounds, or weights over steps. Our choice: predictions."""
        ensemble_momentum: float = 0.6
        """Share alpha of the averaged predictions that a round leaves. Our choice: 0.6."""
        rounds: int = 6
        """Rounds R of predictions, which share `trainer.steps` equally. Our choice: 6, of 10000 steps each."""
        teacher_momentum: float = 0.999
        """Share a of the averaged weights that a step leaves. Authors: 0.999."""
        threshold: Literal["quantile", "sqrt_mean"] = "quantile"
        """Confidence a label needs: a quantile per class, or the root of the mean (authors). Our choice: quantile."""
        kept_share: float = 0.5
        """Share rho of each class's predicted cells above its quantile. Our choice: 0.5."""
        confidence_cap: float = 0.9
        """Largest quantile θ_max: cells above it are always kept. Our choice: 0.9."""

        def __post_init__(self) -> None:
            check(self.temperature > 0, "method.temperature must be positive", self.temperature)
            for name in ("contrast_weight", "target_weight", "source_share", "projection"):
                check(getattr(self, name) >= 0, f"method.{name} must not be negative", getattr(self, name))
            for name in ("centroid_momentum", "teacher_momentum", "kept_share", "confidence_cap"):
                check(0 <= getattr(self, name) <= 1, f"method.{name} must lie in [0, 1]", getattr(self, name))
            for name in ("min_cells", "centroid_images", "rounds"):
                check(getattr(self, name) >= 1, f"method.{name} must be at least 1", getattr(self, name))
            check(
                0 <= self.ensemble_momentum <= 0.9,
                "method.ensemble_momentum must lie in [0, 0.9]",
                self.ensemble_momentum,
                "Above, small changes are lost in the rounding of what is stored.",
            )

    config: Config

    def __init__(self, segmenter: Segmenter, config: Config, warmup: WarmupConfig) -> None:
        super().__init__(segmenter, config, warmup)
        classes, channels = segmenter.num_classes, segmenter.feature_channels
        projected = config.projection > 0 and config.contrast_weight > 0
        self.projection = _projection(channels, config.projection) if projected else None
        self.source_centroids = ClassCentroids(classes, config.projection if projected else channels)
        averages_weights = config.ensemble == "weights"
        self.teacher = MeanTeacher(segmenter) if averages_weights else None
        self.running_confidence = RunningConfidence(classes) if averages_weights else None

    @classmethod
    def plan(cls, config: Config) -> tuple[Stage, ...]:
        """Return the warm-up, the first centroids, and the rounds or, when weights are averaged, one long stage."""
        if config.ensemble == "weights":
            return (*cls.stages, ADAPT)
        rounds = tuple(
            Round(
                name=_round_name(number),
                share=1 / config.rounds,
                colored=ADAPT.colored,
                flipped=ADAPT.flipped,
                pseudo_labels=True,
                number=number,
            )
            for number in range(1, config.rounds + 1)
        )
        return (*cls.stages, *rounds)

    @classmethod
    def labelling(cls, config: Config) -> dict[str, Any]:
        """Return the rule of §7, with the quantile."""
        return {
            "rule": "ensemble",
            "quantile": 1 - config.kept_share,
            "confidence_cap": config.confidence_cap,
            "ensemble_momentum": config.ensemble_momentum,
        }

    def prepare_stage(self, stage: Stage, data: StageData) -> None:
        """Fill the centroids; label the target set before a round; start the teacher (§6, §7)."""
        if stage is CENTROIDS:
            self.source_centroids.fill(self._source_features(data))
        elif isinstance(stage, Round):
            self._label_target(stage, data)
        elif stage is ADAPT and self.teacher is not None and self.running_confidence is not None:
            self.teacher.start_from(self.segmenter)
            self.running_confidence.reset()

    def label_rule(self, stage: Stage, provenance: Mapping[str, Any] | None) -> LabelRule | None:
        """Return the teacher's rule, or that of the first round's labels.

        Later rounds label by predictions averaged over rounds, and only training images have those.
        """
        if stage is ADAPT and self.teacher is not None:
            return self._teacher_rule
        if not isinstance(stage, Round) or provenance is None:
            return None
        averages = stage.previous is not None and self.config.ensemble_momentum > 0
        return None if averages else written_rule(provenance, self.segmenter)

    def forward(self, batch: DomainBatch, step: int) -> dict[str, Tensor]:
        """Return the weighted terms (§5): `cross_entropy`, and those whose weight is not 0 of the others.

        Terms: `cross_entropy`, `target_cross_entropy`, `contrast_target`, `contrast_source`.
        """
        if batch.target_images is None:
            return self.source_only_terms(batch)
        config = self.config
        target_labels = batch.target_pseudo_labels
        if target_labels is None:
            target_labels = self._teacher_labels(batch.target_images)
        source = self.segmenter(batch.source_images)
        target = self.segmenter(batch.target_images)
        terms = self.supervised_terms(source.logits, batch.source_labels, lovasz_weight=0.0)
        if config.target_weight > 0:
            cross_entropy = segmentation_cross_entropy(self._upsampled(target.logits, target_labels), target_labels)
            terms["target_cross_entropy"] = config.target_weight * cross_entropy
        if config.contrast_weight > 0:
            source_features, target_features = self._contrasted(source.features), self._contrasted(target.features)
            source_cells = labels_at_features(batch.source_labels, _size(source_features))
            # Before the contrast: then every class of the source batch has a centroid.
            self.source_centroids.update(source_features, source_cells, momentum=config.centroid_momentum)
            target_cells = labels_at_features(target_labels, _size(target_features))
            terms["contrast_target"] = config.contrast_weight * self._contrast(target_features, target_cells)
            if config.source_share > 0:
                weight = config.contrast_weight * config.source_share
                terms["contrast_source"] = weight * self._contrast(source_features, source_cells)
        return terms

    def after_step(self, step: int) -> None:
        """Let the teacher follow the student; its weights from the warm-up are forgotten when it starts."""
        if self.teacher is not None:
            self.teacher.follow(self.segmenter, momentum=self.config.teacher_momentum)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Add the projection to the segmenter's parts."""
        groups = super().parameter_groups()
        if self.projection is not None:
            groups.append(ParameterGroup("projection", tuple(self.projection.parameters()), fresh=True))
        return groups

    def _contrast(self, features: Tensor, cells: Tensor) -> Tensor:
        return centroid_contrast(
            features,
            cells,
            self.source_centroids.centroids,
            self.source_centroids.seen,
            temperature=self.config.temperature,
            min_cells=self.config.min_cells,
        )

    def _contrasted(self, features: Tensor) -> Tensor:
        """Return the features to contrast, (B, D or projection, h, w)."""
        if self.projection is None:
            return features
        projected: Tensor = self.projection(features)
        return projected

    def _upsampled(self, logits: Tensor, like: Tensor) -> Tensor:
        return self.segmenter.upsample(logits, _size(like))

    def _source_features(self, data: StageData) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features and labels of the first source images; the same images, however many workers share them."""
        remaining = len(range(rank(), self.config.centroid_images, world_size()))
        for images, labels in data.source_batches():
            if remaining == 0:
                return
            images, labels = images[:remaining], labels[:remaining]
            remaining -= len(images)
            features = self._contrasted(self.segmenter(images).features)
            yield features, labels_at_features(labels, _size(features))

    @torch.no_grad()
    def _teacher_labels(self, images: Tensor) -> Tensor:
        """Label target images with the teacher, by the confidences of the recent batches; (B, H, W) int64."""
        assert self.teacher is not None
        assert self.running_confidence is not None
        probabilities = self.teacher(images).logits.float().softmax(dim=1)
        self.running_confidence.update(*probabilities.max(dim=1))
        confidence, prediction = self._confidence_at(probabilities, _size(images))
        return keep_confident(confidence, prediction, self._thresholds(self.running_confidence))

    def _teacher_rule(self, image: Tensor, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Label an image as `_teacher_labels`, by the confidences as they are."""
        assert self.teacher is not None
        assert self.running_confidence is not None
        probabilities = self.teacher(self.segmenter.normalise(image)).logits.float().softmax(dim=1)
        confidence, prediction = self._confidence_at(probabilities, size)
        return keep_confident(confidence, prediction, self._thresholds(self.running_confidence))

    def _label_target(self, stage: Round, data: StageData) -> None:
        """Average new predictions into the ensemble of the round before, and label the target set with the result.

        The network passes over the set once. All workers call this for their share.
        """
        # The folders of a trial's stages lie beside each other.
        previous = data.folder.with_name(stage.previous) if stage.previous is not None else None
        label_ensemble(
            lambda images: self.segmenter(images).logits,
            data,
            self.segmenter.num_classes,
            previous=previous,
            momentum=self.config.ensemble_momentum,
            threshold=self.config.threshold,
            share=self.config.kept_share,
            cap=self.config.confidence_cap,
            align_corners=self.segmenter.align_corners,
            notes={"round": stage.number},
        )

    def _thresholds(self, confidences: RunningConfidence) -> Tensor:
        """Return the smallest confidence of a label of each class, (C,) float64."""
        if self.config.threshold == "sqrt_mean":
            return confidences.sqrt_mean_thresholds()
        return confidences.share_thresholds(share=self.config.kept_share, cap=self.config.confidence_cap)

    def _confidence_at(self, probabilities: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return confidence_at(probabilities, size, align_corners=self.segmenter.align_corners)


def _round_name(number: int) -> str:
    return f"round_{number}"


def _projection(channels: int, projected: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, projected, 1), nn.ReLU(), nn.Conv2d(projected, projected, 1))


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]
