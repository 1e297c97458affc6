"""Class-balanced self-training: label the target with the network's own confident predictions, then train on both.

Source: Zou et al., Unsupervised Domain Adaptation for Semantic Segmentation via Class-Balanced Self-Training, ECCV 2018
(one threshold per class); thresholds as in SDCA's last stage, BIT-DA/SDCA@d00e7ba.
Differs: SDCA trains on the target alone and from ImageNet weights again; here labelled source images stay in the batch
and training goes on from the labelling network. `restart=true source_weight=0` does as SDCA.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from segadapt.trainables.core.data.batch import DomainBatch
from segadapt.trainables.core.label_quality import LabelRule
from segadapt.trainables.core.label_rules import by_network, written_rule
from segadapt.trainables.core.losses.segmentation import segmentation_cross_entropy
from segadapt.trainables.core.method import SOURCE_ONLY, Method, Stage, StageData, WarmupConfig
from segadapt.trainables.core.networks import Segmenter
from segadapt.trainables.core.pseudo_labels import label_fixed, label_target
from segadapt.trainables.core.state.confident_share import label_confident_share
from segadapt.trainables.core.state.mean_teacher import MeanTeacher
from segadapt.trainables.core.state.prediction_ensemble import label_ensemble
from segadapt.trainables.core.state.self_paced_labels import label_self_paced
from segadapt.trainables.core.validation import check


@dataclass(frozen=True, kw_only=True)
class Round(Stage):
    """Labelling of the target set, then training with the labels."""

    number: int
    """From 1."""


class SelfTraining(Method):
    """Train on source labels and on the network's confident target predictions, chosen per class, in rounds."""

    name = "self_training"
    stages: ClassVar[tuple[Stage, ...]] = (SOURCE_ONLY,)

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Settings of self-training."""

        rounds: int = 1
        """Times the target is labelled anew; `trainer.steps` are shared equally."""
        rule: Literal["quantile", "fixed", "global_local", "self_paced", "ensemble"] = "quantile"
        """Which pixels get a label, as SDCA, every pixel above a confidence, BiCL, DRSL or CLST choose them."""
        quantile: float = 0.5
        """Share of each class's predicted pixels below its threshold, in `quantile`, `ensemble`. Paper (SDCA): 0.5."""
        confidence_cap: float = 0.9
        """Largest threshold of a class, in `quantile`, `ensemble`; the threshold in `fixed`. Paper (SDCA): 0.9."""
        share: float = 0.2
        """Share of each class that is labelled in the first round, in `global_local`, `self_paced`. CRST: 0.2."""
        share_step: float = 0.0
        """Growth of the share from round to round. Our choice: 0."""
        local_share: float = 0.1
        """Share of each image that is labelled, in `global_local`. Paper (BiCL): 0.1."""
        excluded_classes: tuple[int, ...] = ()
        """Classes that no pixel gets labelled by the share per class, in `global_local`."""
        ensemble_momentum: float = 0.6
        """Share of the averaged predictions that stays from round to round, in `ensemble`. Our choice: 0.6."""
        restart: bool = False
        """Whether the network gets its first weights again after each labelling. Paper (SDCA): yes."""
        teacher: bool = False
        """Whether the running average of the weights, not the network, labels the rounds after the first."""
        teacher_momentum: float = 0.99
        """Share of the averaged weights that a step leaves. Our choice: 0.99."""
        target_weight: float = 1.0
        """Weight of the cross entropy on pseudo labels beside the source's terms."""
        source_weight: float = 1.0
        """Weight of the source's terms; 0 trains on the target alone. Paper (SDCA): 0."""
        lovasz_weight: float = 0.75
        """Weight of Lovász-Softmax on the source."""

        def __post_init__(self) -> None:
            check(self.rounds >= 1, "method.rounds must be at least 1", self.rounds)
            for name in ("quantile", "confidence_cap", "share", "local_share", "teacher_momentum"):
                check(0 <= getattr(self, name) <= 1, f"method.{name} must lie in [0, 1]", getattr(self, name))
            check(
                0 <= self.ensemble_momentum <= 0.9,
                "method.ensemble_momentum must lie in [0, 0.9]",
                self.ensemble_momentum,
            )
            for name in ("target_weight", "source_weight", "lovasz_weight", "share_step"):
                check(getattr(self, name) >= 0, f"method.{name} must not be negative", getattr(self, name))
            check(
                self.target_weight + self.source_weight > 0,
                "method.target_weight or method.source_weight must be positive",
                (self.target_weight, self.source_weight),
            )

        def share_of(self, number: int) -> float:
            """Return the share in a round, counted from 1; everything at most."""
            return min(1.0, self.share + self.share_step * (number - 1))

    config: Config

    def __init__(self, segmenter: Segmenter, config: Config, warmup: WarmupConfig) -> None:
        super().__init__(segmenter, config, warmup)
        self.teacher = MeanTeacher(segmenter) if config.teacher else None
        # No part of the state: it is what any process builds from the trial's settings.
        self._first = {name: t.clone() for name, t in segmenter.state_dict().items()} if config.restart else None

    @classmethod
    def plan(cls, config: Config) -> tuple[Stage, ...]:
        """Return the warm-up and the rounds; each starts a new optimiser and schedule."""
        rounds = tuple(
            Round(
                name=_round_name(number),
                share=1 / config.rounds,
                colored=("target",),
                flipped=True,
                pseudo_labels=True,
                number=number,
            )
            for number in range(1, config.rounds + 1)
        )
        return (SOURCE_ONLY, *rounds)

    @classmethod
    def labelling(cls, config: Config) -> dict[str, Any]:
        """Return its own rule."""
        names = ("rule", "quantile", "confidence_cap", "share", "share_step", "local_share", "excluded_classes")
        return {name: getattr(config, name) for name in (*names, "ensemble_momentum")}

    def prepare_stage(self, stage: Stage, data: StageData) -> None:
        """Label the whole target set; then start the network and its average, where that is asked for."""
        if not isinstance(stage, Round):
            return
        self._label(stage, data)
        if self._first is not None:
            self.segmenter.load_state_dict(self._first)
        if self.teacher is not None and (stage.number == 1 or self._first is not None):
            self.teacher.start_from(self.segmenter)

    def labeller(self, stage: Stage) -> Segmenter:
        """Return the network that labels: the average of the weights in the rounds after the first, if there is one."""
        if self.teacher is None or not isinstance(stage, Round) or stage.number == 1:
            return self.segmenter
        network = self.teacher.network
        assert isinstance(network, Segmenter)
        return network

    def label_rule(self, stage: Stage, provenance: Mapping[str, Any] | None) -> LabelRule | None:
        """Return the rule of the round's labels, asked of the network that labels.

        Of `ensemble`, the rounds after the first label by predictions averaged over rounds, and only training images
        have those.
        """
        if not isinstance(stage, Round) or provenance is None:
            return None
        if self.config.rule == "ensemble" and stage.number > 1 and self.config.ensemble_momentum > 0:
            return None
        rule, network = written_rule(provenance, self.segmenter), self.labeller(stage)
        return rule if network is self.segmenter else by_network(rule, network)

    def _label(self, stage: Round, data: StageData) -> None:
        config, classes, network = self.config, self.segmenter.num_classes, self.labeller(stage)

        def logits(images: Tensor) -> Tensor:
            return network.upsample(network(images).logits, (images.shape[-2], images.shape[-1]))

        match config.rule:
            case "quantile":
                label_target(logits, data, classes, quantile=config.quantile, cap=config.confidence_cap)
            case "fixed":
                label_fixed(logits, data, classes, threshold=config.confidence_cap)
            case "global_local":
                share, excluded = config.share_of(stage.number), config.excluded_classes
                label_confident_share(
                    logits, data, classes, share=share, local_share=config.local_share, excluded=excluded
                )
            case "self_paced":
                label_self_paced(
                    lambda images: logits(images).softmax(dim=1), data, classes, portion=config.share_of(stage.number)
                )
            case "ensemble":
                # The folders of a trial's stages lie beside each other.
                previous = data.folder.with_name(_round_name(stage.number - 1)) if stage.number > 1 else None
                label_ensemble(
                    lambda images: network(images).logits,
                    data,
                    classes,
                    previous=previous,
                    momentum=config.ensemble_momentum,
                    share=1 - config.quantile,
                    cap=config.confidence_cap,
                    align_corners=network.align_corners,
                )

    def forward(self, batch: DomainBatch, step: int) -> dict[str, Tensor]:
        """Return `cross_entropy` and `lovasz` of the source, and `target_cross_entropy` of the pseudo labels."""
        if batch.target_images is None:
            return self.source_only_terms(batch)
        assert batch.target_pseudo_labels is not None
        terms, config = dict[str, Tensor](), self.config
        if config.source_weight > 0:
            source = self.segmenter(batch.source_images)
            supervised = self.supervised_terms(source.logits, batch.source_labels, config.lovasz_weight)
            terms = {name: config.source_weight * term for name, term in supervised.items()}
        logits = self.segmenter(batch.target_images).logits
        labels = batch.target_pseudo_labels
        upsampled = self.segmenter.upsample(logits, (labels.shape[-2], labels.shape[-1]))
        terms["target_cross_entropy"] = config.target_weight * segmentation_cross_entropy(upsampled, labels)
        return terms

    def after_step(self, step: int) -> None:
        """Let the average follow. What it does in the warm-up is forgotten when it starts."""
        if self.teacher is not None:
            self.teacher.follow(self.segmenter, momentum=self.config.teacher_momentum)


def _round_name(number: int) -> str:
    return f"round_{number}"
