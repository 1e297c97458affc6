"""The method contract: what an adaptation method owns. The trainer owns the rest."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from segadapt.trainables.core.data.batch import DomainBatch
from segadapt.trainables.core.labelling.quality import LabelRule
from segadapt.trainables.core.losses.segmentation import lovasz_softmax, segmentation_cross_entropy
from segadapt.trainables.core.networks import Segmenter
from segadapt.trainables.core.online.terms import OnlineTerms
from segadapt.trainables.core.validation import check


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a method's training, walked by the trainer.

    A stage first lets the method prepare (`Method.prepare_stage`), then takes its steps. Shared stages depend on no
    searched setting: they are computed once and loaded by every other trial.
    """

    name: str
    share: float = 1.0
    """Share of `trainer.steps` this stage takes; 0 for a stage that only prepares."""
    domains: tuple[str, ...] = ("source", "target")
    """Domains whose images a step receives."""
    trains: tuple[str, ...] | None = None
    """Sub-modules that are trained, by dotted name; the others are frozen. None trains what requires gradients."""
    colored: tuple[str, ...] = ()
    """Domains whose training images get colour augmentation."""
    flipped: bool = False
    """Whether training images are flipped at random."""
    pseudo_labels: bool = False
    """Whether batches carry the pseudo labels that `prepare_stage` wrote."""
    shared: bool = False
    lr_factor: float = 1.0
    """Multiplies the learning rate of the stage."""


SOURCE_ONLY = Stage(name="source_only", domains=("source",), trains=("segmenter",), shared=True)
"""The warm-up on labelled source images that all methods start from; takes `warmup.steps`."""


_ONLINE = "online."
"""What the names of the parts of `Method.online` begin with."""


@dataclass(frozen=True, kw_only=True)
class WarmupConfig:
    """The source-only warm-up, shared by all methods and trials that agree on it."""

    steps: int = 300
    """Optimiser steps of the warm-up; 0 starts from the network's first weights."""
    lr_factor: float = 2.0
    """Multiplies `optimizer.lr` in the warm-up. Paper (SDCA): 5e-4 against 2.5e-4."""
    lovasz_weight: float = 0.75
    """Weight of the Lovász-Softmax term beside cross entropy. Paper (SDCA): 0.75."""

    def __post_init__(self) -> None:
        check(self.steps >= 0, "warmup.steps must not be negative", self.steps)
        check(self.lr_factor > 0, "warmup.lr_factor must be positive", self.lr_factor)
        check(self.lovasz_weight >= 0, "warmup.lovasz_weight must not be negative", self.lovasz_weight)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    fresh: bool = False
    """Randomly initialised: learns at `optimizer.head_lr_factor` times the base rate."""


@dataclass(frozen=True)
class StageData:
    """What a method may look at before a stage: both domains un-augmented, and a folder for what it writes.

    Images have the size of `augmentation.source_size` and `augmentation.target_size`, where those are set.
    """

    folder: Path
    target_ids: Sequence[str]
    source_batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    """Starts a pass over this worker's share of the source set: images (B, 3, H, W) normalised, labels (B, H, W).

    All workers get equally many batches, if need be with nothing but ignored labels: batches may be reduced.
    """
    target_batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    """Starts a pass over this worker's share of the target set: images (B, 3, H, W) normalised, indices (B,)."""
    made_by: Mapping[str, str] = field(default_factory=dict)
    """What pseudo labels are labelled with: stage, method, hash of the network, fingerprint of the data."""


class Method(nn.Module, ABC):
    """One adaptation method: what each step optimises and the state that needs.

    Sub-modules, parameters and buffers are the whole state: `state_dict()` saves it and resuming is exact.
    """

    name: ClassVar[str]
    stages: ClassVar[tuple[Stage, ...]]
    aligns_corners: ClassVar[bool | None] = None
    """Corner rule of the deployed network; None follows `network.align_corners`."""
    always_online: ClassVar[bool] = False
    """Whether the terms of online self-training belong to the method, rather than being added on request."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of the method; subclasses document theirs."""

    def __init__(self, segmenter: Segmenter, config: Any, warmup: WarmupConfig) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.config = config
        self.warmup = warmup
        self.online: OnlineTerms | None = None
        """Terms of online self-training that are added to the method's own."""

    @classmethod
    def plan(cls, config: Any) -> tuple[Stage, ...]:
        """Return the stages of a trial with this method's `config`."""
        return cls.stages

    @abstractmethod
    def forward(self, batch: DomainBatch, step: int) -> dict[str, Tensor]:
        """Return the weighted scalar terms of one step; the trainer minimises their sum and logs each.

        Args:
            batch: Normalised images on this method's device; `target_images` is None in the source-only stage. A batch
                with pseudo labels adds the term `target_cross_entropy`, also in methods whose own stages have none.
            step: Steps taken in this stage so far, from 0.
        """

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Begin with what an earlier trial or stage ended with.

        A checkpoint of the same method is taken over whole, without a teacher of online self-training; of another
        method, its deployed network is.

        Args:
            state: Content of the checkpoint.
        """
        if state["method"] == self.name and state["stage"] != SOURCE_ONLY.name:
            present = {name: value for name, value in self.state_dict().items() if name.startswith(_ONLINE)}
            self.load_state_dict(
                present | {name: value for name, value in state["state"].items() if not name.startswith(_ONLINE)}
            )
            if state["deployed"].startswith(_ONLINE):
                self.deployed.load_state_dict(deployed_weights(state))
            return
        self.segmenter.load_state_dict(deployed_weights(state))

    def prepare_stage(self, stage: Stage, data: StageData) -> None:
        """Fill buffers or write pseudo labels before the stage's first step, without gradient. Default: nothing."""

    def after_step(self, step: int) -> None:
        """Follow the optimiser: move a teacher, anneal a threshold. Default: nothing."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """Name the trained parameters; a parameter belongs to one group. Default: the segmenter's two parts."""
        return [
            ParameterGroup("backbone", tuple(self.segmenter.backbone.parameters())),
            ParameterGroup("head", tuple(self.segmenter.head.parameters()), fresh=True),
        ]

    @property
    def deployed(self) -> Segmenter:
        """The network that is exported, and evaluated on target images."""
        return self.segmenter

    def online_in(self, stage: Stage) -> OnlineTerms | None:
        """Return the terms of online self-training that a stage has beside the method's own."""
        return self.online if "target" in stage.domains else None

    @property
    def exported(self) -> Segmenter:
        """The network that is evaluated on target images and exported: `deployed`, or the teacher that follows it."""
        online = self.online
        if online is None or online.config.deploys == "student" or online.steps == 0:
            return self.deployed
        return cast(Segmenter, online.teacher.network)

    def source_network(self, stage: Stage) -> Segmenter:
        """Return the network as source images pass it in a stage, which is what they are evaluated with.

        Default: the deployed one.
        """
        return self.deployed

    @classmethod
    def splits_stem(cls, config: Any) -> bool:
        """Return whether source images pass shallow layers of their own, the module `source_stem`. Default: no."""
        return False

    def labeller(self, stage: Stage) -> Segmenter:
        """Return the network that makes the pseudo labels of a stage."""
        return self.segmenter

    def label_rule(self, stage: Stage, provenance: Mapping[str, Any] | None) -> LabelRule | None:
        """Return how this method labels a target image at this moment; evaluation measures it on validation images.

        Args:
            stage: The stage that is trained.
            provenance: How the pseudo labels before the stage were written; None if none were.

        Returns:
            The rule with the thresholds in force; None where none is defined for single images. Default: None.
        """
        return None

    @classmethod
    def labelling(cls, config: Any) -> dict[str, Any]:
        """Return the settings of `self_training` that label as a trial with this method's `config` does."""
        return {"rule": "quantile"}

    def supervised_terms(self, logits: Tensor, labels: Tensor, lovasz_weight: float) -> dict[str, Tensor]:
        """Return cross entropy and weighted Lovász-Softmax of up-sampled logits against source labels (SDCA §5.3).

        Args:
            logits: At feature resolution, (B, C, h, w).
            labels: (B, H, W) int64, 255 = ignore.
            lovasz_weight: 0 leaves the term out.
        """
        upsampled = self.segmenter.upsample(logits, (labels.shape[-2], labels.shape[-1]))
        terms = {"cross_entropy": segmentation_cross_entropy(upsampled, labels)}
        if lovasz_weight > 0:
            terms["lovasz"] = lovasz_weight * lovasz_softmax(upsampled, labels)
        return terms

    def source_only_terms(self, batch: DomainBatch) -> dict[str, Tensor]:
        """Return the terms of the source-only stage, the same for all methods."""
        return self.supervised_terms(
            self.segmenter(batch.source_images).logits, batch.source_labels, self.warmup.lovasz_weight
        )


def deployed_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of the deployed network in the content of a checkpoint, by their name in the network."""
    prefix = state["deployed"] + "."
    return {name.removeprefix(prefix): value for name, value in state["state"].items() if name.startswith(prefix)}


def trained_parameters(method: Method, stage: Stage) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the names and parameters that `stage` trains."""
    for name, parameter in method.named_parameters():
        if name.startswith(_ONLINE):
            trains = "target" in stage.domains
        else:
            trains = stage.trains is None or any(name.startswith(f"{part}.") for part in stage.trains)
        if trains:
            yield name, parameter
