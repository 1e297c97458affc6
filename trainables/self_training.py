"""Class-balanced self-training: label the target with the network's own confident predictions, then train on both.

Source: Zou et al., Unsupervised Domain Adaptation for Semantic Segmentation via Class-Balanced Self-Training, ECCV 2018
(one threshold per class); thresholds as in SDCA's last stage, BIT-DA/SDCA@d00e7ba.
Differs: SDCA trains on the target alone and from ImageNet weights again; here labelled source images stay in the batch
and training goes on from the labelling network. `restart=true source_weight=0` does as SDCA.
The rounds may keep the losses of the method that trained the labelling network, with its state (our choice).
"""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from segadapt.trainables.core.data.batch import DomainBatch
from segadapt.trainables.core.labelling.ensemble import label_ensemble
from segadapt.trainables.core.labelling.quality import LabelRule
from segadapt.trainables.core.labelling.quantile import label_fixed, label_target
from segadapt.trainables.core.labelling.rules import by_network, written_rule
from segadapt.trainables.core.labelling.self_paced import label_self_paced
from segadapt.trainables.core.labelling.share import label_confident_share
from segadapt.trainables.core.losses.segmentation import segmentation_cross_entropy
from segadapt.trainables.core.method import SOURCE_ONLY, Method, ParameterGroup, Stage, StageData, WarmupConfig
from segadapt.trainables.core.networks import Segmenter, split_backbone, with_stem
from segadapt.trainables.core.state.mean_teacher import MeanTeacher
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
        """Weight of the cross entropy on pseudo labels; beside kept losses it multiplies their method's own weight."""
        source_weight: float = 1.0
        """Weight of the source's terms; 0 trains on the target alone. Paper (SDCA): 0."""
        lovasz_weight: float = 0.75
        """Weight of Lovász-Softmax on the source."""
        split_stem: bool = False
        """Whether source images pass shallow layers of their own, as in BiCL; set by `segadapt finish`."""
        kept_method: str | None = None
        """Method whose losses and state stay in the rounds; null: none. `segadapt finish --keep-losses` sets it."""
        kept_settings: dict[str, Any] | None = None
        """Settings of that method, each as `method.kept_settings.NAME`; those of the trial that is finished."""

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
            if self.kept_method is not None:
                self._check_kept(self.kept_method)

        def _check_kept(self, name: str) -> None:
            kept, config = self.kept_class(), self.kept_config()
            check(
                kept is not SelfTraining and kept.plan(config)[-1] is not SOURCE_ONLY,
                "method.kept_method must be one with losses of its own on the target",
                name,
                "Leave out --keep-losses.",
            )
            weight = getattr(config, "target_weight", 1.0)
            check(weight > 0, f"method.target_weight of {name} must be positive where its losses are kept", weight)
            check(not self.split_stem, f"method.split_stem must be false: {name} has its own layers", self.split_stem)
            check(not self.restart, f"method.restart must be false: {name}'s state is of the trained network", True)
            for setting in ("source_weight", "lovasz_weight"):
                value, default = getattr(self, setting), getattr(type(self), setting)
                check(value == default, f"method.{setting} must stay {default}: {name} weighs its own losses", value)

        def kept_class(self) -> type[Method]:
            """Return the method whose losses are kept."""
            from segadapt.trainables import method_class  # its list of methods holds this one

            assert self.kept_method is not None
            return method_class(self.kept_method)

        def kept_config(self) -> Method.Config:
            """Return the settings of the method whose losses are kept."""
            config, settings = self.kept_class().Config, self.kept_settings or {}
            unknown = settings.keys() - {setting.name for setting in dataclasses.fields(config)}
            check(not unknown, f"method.kept_settings must be settings of {self.kept_method}", sorted(unknown))
            plain = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
            return config(**plain)  # JSON, which settings come from, has lists alone

        def share_of(self, number: int) -> float:
            """Return the share in a round, counted from 1; everything at most."""
            return min(1.0, self.share + self.share_step * (number - 1))

    config: Config

    def __init__(self, segmenter: Segmenter, config: Config, warmup: WarmupConfig) -> None:
        super().__init__(segmenter, config, warmup)
        keeps = config.kept_method is not None
        self.kept = config.kept_class()(segmenter, config.kept_config(), warmup) if keeps else None
        self.teacher = MeanTeacher(self.deployed) if config.teacher else None
        splits = config.split_stem and config.source_weight > 0
        self.source_stem = copy.deepcopy(split_backbone(segmenter).stem) if splits else None
        self._source_stem_is_trained = False
        # No part of the state: it is what any process builds from the trial's settings.
        self._first = {name: t.clone() for name, t in segmenter.state_dict().items()} if config.restart else None

    @classmethod
    def plan(cls, config: Config) -> tuple[Stage, ...]:
        """Return the warm-up and the rounds; each starts a new optimiser and schedule."""
        trains = _trained_parts(config)
        rounds = tuple(
            Round(
                name=_round_name(number),
                share=1 / config.rounds,
                trains=trains,
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
        starts_anew = self._first is not None or (stage.number == 1 and not self._source_stem_is_trained)
        if self.source_stem is not None and starts_anew:
            self.source_stem.load_state_dict(split_backbone(self.segmenter).stem.state_dict())
        if self.teacher is not None and (stage.number == 1 or self._first is not None):
            self.teacher.start_from(self.deployed)

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Begin with a checkpoint; one of the method whose losses are kept gives its whole state.

        Raises:
            ValueError: If losses are kept and it is of another method, or of the warm-up.
        """
        if self.kept is None:
            super().take_over(state)
            self._take_over_source_stem(state)
            return
        check(
            state["method"] == self.kept.name and state["stage"] != SOURCE_ONLY.name,
            f"method.kept_method={self.kept.name} must start from a checkpoint of that method's own stages",
            (state["method"], state["stage"]),
            "Finish a trial of it with `segadapt finish --keep-losses`.",
        )
        self.kept.take_over(state)

    def _take_over_source_stem(self, state: Mapping[str, Any]) -> None:
        """Take over the layers of source images where a checkpoint has trained ones: a warm-up's are not."""
        prefix = "source_stem."
        weights = {name.removeprefix(prefix): t for name, t in state["state"].items() if name.startswith(prefix)}
        if self.source_stem is not None and weights and state["stage"] != SOURCE_ONLY.name:
            self.source_stem.load_state_dict(weights)
            self._source_stem_is_trained = True

    @classmethod
    def splits_stem(cls, config: Config) -> bool:
        """Return the setting of that name."""
        return config.split_stem

    def source_network(self, stage: Stage) -> Segmenter:
        """Return the network as the method shows it source images whose losses are kept, or with their own stem."""
        if self.kept is not None:
            return self.kept.source_network(self.kept.plan(self.kept.config)[-1])
        if self.source_stem is None or not isinstance(stage, Round):
            return self.segmenter
        return with_stem(self.segmenter, self.source_stem)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Name the parameters as the method does whose losses are kept; the source's own stem is a group."""
        if self.kept is not None:
            return self.kept.parameter_groups()
        groups = super().parameter_groups()
        if self.source_stem is not None:
            groups.append(ParameterGroup("source_stem", tuple(self.source_stem.parameters())))
        return groups

    @property
    def deployed(self) -> Segmenter:
        """The network as the method deploys it whose losses are kept."""
        return self.kept.deployed if self.kept is not None else self.segmenter

    def labeller(self, stage: Stage) -> Segmenter:
        """Return the network that labels: the average of the weights in the rounds after the first, if there is one."""
        if self.teacher is None or not isinstance(stage, Round) or stage.number == 1:
            return self.deployed
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
        rule, network = written_rule(provenance, self.deployed), self.labeller(stage)
        return rule if network is self.deployed else by_network(rule, network)

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
        """Return `cross_entropy` and `lovasz` of the source, and `target_cross_entropy` of the pseudo labels.

        Where losses are kept, all of their terms instead, among them `target_cross_entropy`.
        """
        if batch.target_images is None:
            return self.source_only_terms(batch)
        assert batch.target_pseudo_labels is not None
        terms, config = dict[str, Tensor](), self.config
        if self.kept is not None:
            kept: dict[str, Tensor] = self.kept(batch, step)
            return {**kept, "target_cross_entropy": config.target_weight * kept["target_cross_entropy"]}
        if config.source_weight > 0:
            stem = self.source_stem
            network = self.segmenter if stem is None else with_stem(self.segmenter, stem)
            source = network(batch.source_images)
            supervised = self.supervised_terms(source.logits, batch.source_labels, config.lovasz_weight)
            terms = {name: config.source_weight * term for name, term in supervised.items()}
        logits = self.segmenter(batch.target_images).logits
        labels = batch.target_pseudo_labels
        upsampled = self.segmenter.upsample(logits, (labels.shape[-2], labels.shape[-1]))
        terms["target_cross_entropy"] = config.target_weight * segmentation_cross_entropy(upsampled, labels)
        return terms

    def after_step(self, step: int) -> None:
        """Let the average follow the network; its weights from the warm-up are forgotten when it starts."""
        if self.kept is not None:
            self.kept.after_step(step)
        if self.teacher is not None:
            self.teacher.follow(self.deployed, momentum=self.config.teacher_momentum)


def _round_name(number: int) -> str:
    return f"round_{number}"


def _trained_parts(config: SelfTraining.Config) -> tuple[str, ...] | None:
    """Return what the rounds train: what the last stage of the method does whose losses are kept."""
    if config.kept_method is None:
        return None
    trains = config.kept_class().plan(config.kept_config())[-1].trains
    return None if trains is None else tuple(part if part == "segmenter" else f"kept.{part}" for part in trains)
