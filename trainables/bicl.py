"""BiCL: bi-directional contrast between pixels and the class prototypes of the other domain.

Source: Lee et al., Bi-directional Contrastive Learning for Domain Adaptive Semantic Segmentation, ECCV 2022, arXiv
2207.10892; cvlab-yonsei/DASS@f544686.
Differs: the paper's dynamic labels and calibration are missing from the code; the variant `full` adds them in formulas
of our own. A pair without common class and a batch without labels cost 0, there NaN. Pseudo labels come from the
network in evaluation mode, and are made before the first round too; the target is shuffled. Batch norm follows the
network's setting. Random scale and crop are off by default. The schedule's length is `optimizer.horizon`,
1.2 in the code.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from segadapt.trainables.core.data.batch import DomainBatch
from segadapt.trainables.core.labelling.features import labels_at_features
from segadapt.trainables.core.labelling.quality import LabelRule
from segadapt.trainables.core.labelling.rules import written_rule
from segadapt.trainables.core.labelling.share import label_confident_share
from segadapt.trainables.core.losses.entropy import shannon_entropy, softened_entropy
from segadapt.trainables.core.losses.prototype_contrast import fuse_labels, grid_of, prototype_contrast
from segadapt.trainables.core.losses.segmentation import segmentation_cross_entropy
from segadapt.trainables.core.method import SOURCE_ONLY, Method, ParameterGroup, Stage, StageData, WarmupConfig
from segadapt.trainables.core.networks import (
    Segmenter,
    SegmenterOutput,
    SummedDilatedHead,
    split_backbone,
    with_stem,
)
from segadapt.trainables.core.state.prototype_calibration import PrototypeCalibration
from segadapt.trainables.core.validation import check


@dataclass(frozen=True, kw_only=True)
class Round(Stage):
    """Pseudo labels, then training with them."""

    number: int
    """From 0."""


class BiCL(Method):
    """Contrast target pixels with source prototypes and source pixels with target prototypes, in every image pair.

    Training goes in rounds. Each begins with pseudo labels of the most confident target pixels, a fixed share per class
    and image. In the variant `full`, unlabelled pixels take the label of their nearest source prototype in each step.
    The deployed network is the one that sees target images; source images may have shallow layers of their own, through
    which they are evaluated as well.
    """

    name = "bicl"
    stages: ClassVar[tuple[Stage, ...]] = (SOURCE_ONLY,)

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Settings of BiCL."""

        variant: Literal["full", "released"] = "full"
        """`full` adds dynamic target labels and calibrated prototypes; `released` is what the public code optimises."""
        temperature: float = 0.1
        """Temperature τ = 1 / κ of the cosine similarities. Paper: 0.1."""
        forward_weight: float = 0.2
        """Weight λ_F of target pixels against source prototypes. Paper: 0.2 (GTA5), 0 in the SYNTHIA configuration."""
        backward_weight: float = 0.2
        """Weight λ_B of source pixels against target prototypes. Paper: 0.2 (GTA5), 0 in the SYNTHIA configuration."""
        target_weight: float = 0.3
        """Weight λ_t of the target's cross entropy and entropy beside the source's. Paper: 0.3."""
        entropy_weight: float = 0.4
        """Weight λ_e of the entropy. Paper: 0.4."""
        entropy: Literal["released", "shannon", "none"] = "released"
        """`released` takes the log-softmax of probabilities for their logarithm; `none` leaves the term out."""
        share: float = 0.1
        """Share rho_0 of pixels that get a pseudo label: per class in the first round, per image in all. Paper: 0.1."""
        share_step: float = 0.0
        """Growth of the share per class from round to round. Paper: 0."""
        excluded_classes: tuple[int, ...] = ()
        """Classes that no pixel gets labelled by the share per class. Paper (SYNTHIA): the 3 of 19 it does not have."""
        rounds: int = 4
        """Rounds R, which share `trainer.steps` equally. Paper: 10, of 10000 steps each."""
        round_lr_factor: float = 0.5
        """Multiplies the learning rate from one round to the next. Paper: 0.5."""
        dynamic_threshold: float = 0.8
        """Confidence T_D above which a cell gets a dynamic label, in `full`. Our choice: 0.8."""
        calibration_momentum: float = 0.99
        """Share m of the calibration bias that a pair leaves, in `full`. Our choice: 0.99."""
        ce_target: Literal["fixed", "fused"] = "fixed"
        """Labels of the target's cross entropy: pseudo labels alone, or filled with dynamic ones in `full`."""
        feature: Literal["branches", "backbone"] = "branches"
        """Contrasted features: outputs of the head's parallel convolutions, or the head's input. Paper: branches."""
        split_stem: bool = True
        """Whether source images pass shallow layers of their own while adapting. Paper (code): yes."""

        def __post_init__(self) -> None:
            check(self.temperature > 0, "method.temperature must be positive", self.temperature)
            for name in ("forward_weight", "backward_weight", "target_weight", "entropy_weight", "share_step"):
                check(getattr(self, name) >= 0, f"method.{name} must not be negative", getattr(self, name))
            for name in ("share", "dynamic_threshold", "calibration_momentum"):
                check(0 <= getattr(self, name) <= 1, f"method.{name} must lie in [0, 1]", getattr(self, name))
            check(self.rounds >= 1, "method.rounds must be at least 1", self.rounds)
            check(self.round_lr_factor > 0, "method.round_lr_factor must be positive", self.round_lr_factor)
            check(
                self.share_of(self.rounds - 1) <= 1,
                "method.share + method.share_step * (method.rounds - 1) must not exceed 1",
                self.share_of(self.rounds - 1),
            )
            check(
                self.ce_target == "fixed" or self.variant == "full",
                "method.ce_target=fused needs method.variant=full",
                self.variant,
            )

        def share_of(self, number: int) -> float:
            """Return the share per class in a round, counted from 0."""
            return self.share + self.share_step * number

    config: Config

    def __init__(self, segmenter: Segmenter, config: Config, warmup: WarmupConfig) -> None:
        super().__init__(segmenter, config, warmup)
        classes, channels = segmenter.num_classes, segmenter.feature_channels
        out_of_range = [index for index in config.excluded_classes if not 0 <= index < classes]
        check(not out_of_range, f"method.excluded_classes must lie in [0, {classes})", out_of_range)
        if config.feature == "branches":
            channels = len(_dilated_head(segmenter).convolutions) * classes
        self.calibration = PrototypeCalibration(classes, channels)
        self.source_stem = copy.deepcopy(split_backbone(segmenter).stem) if config.split_stem else None

    @classmethod
    def plan(cls, config: Config) -> tuple[Stage, ...]:
        """Return the warm-up and the rounds; each round starts a new optimiser."""
        rounds = tuple(
            Round(
                name=f"round_{number + 1}",
                share=1 / config.rounds,
                flipped=True,
                pseudo_labels=True,
                number=number,
                lr_factor=config.round_lr_factor**number,
            )
            for number in range(config.rounds)
        )
        return (SOURCE_ONLY, *rounds)

    @classmethod
    def labelling(cls, config: Config) -> dict[str, Any]:
        """Return the rule of §7."""
        return {
            "rule": "global_local",
            "share": config.share,
            "share_step": config.share_step,
            "local_share": config.share,
            "excluded_classes": config.excluded_classes,
        }

    @classmethod
    def splits_stem(cls, config: Config) -> bool:
        """Return the setting of that name."""
        return config.split_stem

    def source_network(self, stage: Stage) -> Segmenter:
        """Return the network with the source's own stem, which the warm-up does not have."""
        if self.source_stem is None or not isinstance(stage, Round):
            return self.segmenter
        return with_stem(self.segmenter, self.source_stem)

    def prepare_stage(self, stage: Stage, data: StageData) -> None:
        """Split the stem before the first round; label the target set before every round (§7)."""
        if not isinstance(stage, Round):
            return
        if stage.number == 0 and self.source_stem is not None:
            self.source_stem.load_state_dict(split_backbone(self.segmenter).stem.state_dict())
        label_confident_share(
            self._predict,
            data,
            self.segmenter.num_classes,
            share=self.config.share_of(stage.number),
            local_share=self.config.share,
            excluded=self.config.excluded_classes,
        )

    def label_rule(self, stage: Stage, provenance: Mapping[str, Any] | None) -> LabelRule | None:
        """Return the rule of the round's labels. Dynamic ones exist in a pair of images alone."""
        return written_rule(provenance, self.segmenter) if provenance is not None else None

    def forward(self, batch: DomainBatch, step: int) -> dict[str, Tensor]:
        """Return the weighted terms of both domains and directions (§5, §6).

        Terms: `cross_entropy`, `target_cross_entropy`, `entropy`, `target_entropy`, `forward_contrast`,
        `backward_contrast`.
        """
        if batch.target_images is None:
            return self.source_only_terms(batch)
        config, fixed = self.config, batch.target_pseudo_labels
        assert fixed is not None
        stem = self.source_stem
        source_network = self.segmenter if stem is None else with_stem(self.segmenter, stem)
        source = self._contrasted(source_network, batch.source_images)
        target = self._contrasted(self.segmenter, batch.target_images)
        dynamic = self._dynamic_labels(source, batch.source_labels, target, fixed)

        source_logits = self._upsampled(source.logits, batch.source_labels)
        target_logits = self._upsampled(target.logits, fixed)
        target_labels = fuse_labels(fixed, dynamic) if dynamic is not None and config.ce_target == "fused" else fixed
        terms = {
            "cross_entropy": segmentation_cross_entropy(source_logits, batch.source_labels),
            "target_cross_entropy": config.target_weight * segmentation_cross_entropy(target_logits, target_labels),
        }
        if config.entropy != "none" and config.entropy_weight > 0:
            entropy = softened_entropy if config.entropy == "released" else shannon_entropy
            terms["entropy"] = config.entropy_weight * entropy(source_logits)
            terms["target_entropy"] = config.entropy_weight * config.target_weight * entropy(target_logits)
        if config.forward_weight > 0 or config.backward_weight > 0:
            contrast = prototype_contrast(
                source.features,
                batch.source_labels,
                target.features,
                fixed,
                num_classes=self.segmenter.num_classes,
                temperature=config.temperature,
                dynamic_labels=dynamic,
            )
            terms["forward_contrast"] = config.forward_weight * contrast.forward
            terms["backward_contrast"] = config.backward_weight * contrast.backward
        return terms

    def parameter_groups(self) -> list[ParameterGroup]:
        """Add the source's own stem to the segmenter's parts."""
        groups = super().parameter_groups()
        if self.source_stem is not None:
            groups.append(ParameterGroup("source_stem", tuple(self.source_stem.parameters())))
        return groups

    def _contrasted(self, network: Segmenter, images: Tensor) -> SegmenterOutput:
        """Return logits and the features to contrast."""
        features = network.features(images)
        if self.config.feature == "backbone":
            return SegmenterOutput(self.segmenter.classify(features), features)
        branches = _dilated_head(self.segmenter).branches(features)
        return SegmenterOutput(torch.stack(branches).sum(0), torch.cat(branches, dim=1))

    def _dynamic_labels(
        self, source: SegmenterOutput, source_labels: Tensor, target: SegmenterOutput, fixed: Tensor
    ) -> Tensor | None:
        """Label target cells by their nearest calibrated source prototype, in the variant `full`."""
        if self.config.variant == "released":
            return None
        return self.calibration.label_target(
            source.features,
            labels_at_features(source_labels, grid_of(source.features)),
            target.features,
            labels_at_features(fixed, grid_of(target.features)),
            temperature=self.config.temperature,
            threshold=self.config.dynamic_threshold,
            momentum=self.config.calibration_momentum,
        )

    def _predict(self, images: Tensor) -> Tensor:
        """Return logits at image size, (B, C, H, W)."""
        return self._upsampled(self.segmenter(images).logits, images)

    def _upsampled(self, logits: Tensor, like: Tensor) -> Tensor:
        return self.segmenter.upsample(logits, (like.shape[-2], like.shape[-1]))


def _dilated_head(segmenter: Segmenter) -> SummedDilatedHead:
    head = segmenter.head
    if not isinstance(head, SummedDilatedHead):
        raise ValueError(
            f"method.feature=branches needs parallel convolutions, but the head is {type(head).__name__}. "
            "Set method.feature=backbone or choose another network.name."
        )
    return head
