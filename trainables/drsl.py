"""DRSL: distribution-regularised self-supervised learning, modes of classes beside class-balanced self-training.

Source: Iqbal et al., Distribution Regularized Self-Supervised Learning for Domain Adaptation of Semantic Segmentation,
Image and Vision Computing 2022, arXiv 2206.09683. No code of it was public and of the paper only the abstract and a
figure's caption could be read. The losses of the modes follow Karlinsky et al., RepMet, CVPR 2019; pseudo labels and
training follow Zou et al., Confidence Regularized Self-Training, ICCV 2019, yzou2/CRST, whose rule the authors' earlier
engrjavediqbal/MLSL shares. What is our own choice is marked in the settings.
Differs from those: every batch has as many source as target images and any source image may come, there 3 % of them
per round; target images are enlarged around rare classes, and by default not scaled otherwise; the learning rate
follows the trainer's schedule, there it is constant.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segadapt.trainables.core.data.batch import DomainBatch
from segadapt.trainables.core.data.sampling import generator
from segadapt.trainables.core.labelling.features import labels_at_features
from segadapt.trainables.core.labelling.quality import LabelRule
from segadapt.trainables.core.labelling.rules import written_rule
from segadapt.trainables.core.labelling.self_paced import label_self_paced, self_paced_labels
from segadapt.trainables.core.losses.mode_alignment import (
    ModeMargin,
    confidence_regulariser,
    draw_pairs,
    mode_alignment,
    mode_margin,
    sampled_mode_alignment,
)
from segadapt.trainables.core.losses.segmentation import segmentation_cross_entropy
from segadapt.trainables.core.method import SOURCE_ONLY, Method, ParameterGroup, Stage, StageData, WarmupConfig
from segadapt.trainables.core.networks import Segmenter
from segadapt.trainables.core.state.class_modes import ClassModes
from segadapt.trainables.core.validation import check

_HIDDEN_CHANNELS = 256
_VERY_RARE_SHARE = 0.001


@dataclass(frozen=True, kw_only=True)
class Round(Stage):
    """Pseudo labels, then training with them."""

    portion: float
    """Portion π of each class's predictions that the thresholds admit."""


class DRSL(Method):
    """Let each class have several modes in an embedding space, and pull both domains to the modes they share.

    A second head embeds every cell. A margin loss pulls cells to the nearest mode of their label, true or pseudo, and
    away from other classes' modes; cells of both domains in the same mode are drawn together. Both regularise the
    backbone while it trains on class-balanced pseudo labels, in rounds. Head and modes are not deployed.
    """

    name = "drsl"
    stages: ClassVar[tuple[Stage, ...]] = (SOURCE_ONLY,)

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Settings of DRSL. The paper's values are unknown."""

        metric_weight: float = 0.1
        """Weight λ_d of the margin loss of each domain; 0 turns it off. Our choice: 0.1."""
        alignment_weight: float = 0.1
        """Weight λ_a of the alignment within modes; 0 turns it off. Our choice: 0.1."""
        target_weight: float = 1.0
        """Weight λ_t of the cross entropy on pseudo labels. CRST: 1."""
        modes_per_class: int = 5
        """Modes M of each class. RepMet: 5."""
        margin: float = 0.5
        """Margin between squared distances on the unit sphere. RepMet: 0.5."""
        embedding_channels: int = 256
        """Size D of the embedding. RepMet: 256."""
        alignment: Literal["expected", "sampled"] = "expected"
        """`expected` takes all pairs of a mode, `sampled` draws some: the same with noise. Our choice: expected."""
        alignment_pairs: int = 16
        """Pairs K drawn per mode, in `sampled`. Our choice: 16."""
        stop_source: bool = True
        """Whether the alignment leaves source embeddings in place. Our choice: yes."""
        reseed_after: int = 2000
        """Idle steps of its class after which an unused mode moves to a random source cell. Our choice: 2000."""
        mode_warmup_share: float = 0.3
        """Share of `trainer.steps` that trains the modes on the source before the rounds. Our choice: 5000 steps."""
        rounds: int = 3
        """Times the target is labelled anew; the rounds share the other steps equally. CRST: 3, of 2 epochs each."""
        portion: float = 0.2
        """Portion π_0 of each class's predictions that is labelled in the first round. CRST: 0.2."""
        portion_step: float = 0.05
        """Growth of the portion from round to round. CRST: 0.05."""
        portion_cap: float = 0.5
        """Largest portion. CRST: 0.5."""
        mirrored: bool = False
        """Whether pseudo labels come from the mean over the image and its mirror image. CRST: yes."""
        confidence_weight: float = 0.0
        """Weight of the pull of pseudo-labelled pixels to the uniform distribution. CRST: 0.1; off by default."""
        rare_crop_chance: float = 0.8
        """Probability that a target image is enlarged around a rare class, if it shows one. CRST: 0.8."""
        rare_classes: int = 3
        """Number of least predicted classes that count as rare. CRST: 3."""
        rare_crop_zoom: float = 1.5
        """Enlargement is U(1, this). CRST: 1.5 is the largest of its random scales."""

        def __post_init__(self) -> None:
            weights = ("metric_weight", "alignment_weight", "target_weight", "confidence_weight")
            for name in (*weights, "margin", "portion_step", "rare_classes"):
                check(getattr(self, name) >= 0, f"method.{name} must not be negative", getattr(self, name))
            for name in ("modes_per_class", "embedding_channels", "alignment_pairs", "reseed_after", "rounds"):
                check(getattr(self, name) >= 1, f"method.{name} must be at least 1", getattr(self, name))
            for name in ("portion", "portion_cap", "rare_crop_chance"):
                check(0 <= getattr(self, name) <= 1, f"method.{name} must lie in [0, 1]", getattr(self, name))
            check(self.portion <= self.portion_cap, "method.portion must not exceed method.portion_cap", self.portion)
            check(
                0 <= self.mode_warmup_share < 1, "method.mode_warmup_share must lie in [0, 1)", self.mode_warmup_share
            )
            check(self.rare_crop_zoom >= 1, "method.rare_crop_zoom must be at least 1", self.rare_crop_zoom)

        def portion_of(self, number: int) -> float:
            """Return the portion of a round, counted from 0."""
            return min(self.portion + self.portion_step * number, self.portion_cap)

        @property
        def embeds(self) -> bool:
            """Whether any loss acts on embeddings."""
            return self.metric_weight > 0 or self.alignment_weight > 0

    config: Config
    attached: Tensor
    predicted: Tensor

    def __init__(self, segmenter: Segmenter, config: Config, warmup: WarmupConfig) -> None:
        super().__init__(segmenter, config, warmup)
        self.embedding = nn.Sequential(
            nn.Conv2d(segmenter.feature_channels, _HIDDEN_CHANNELS, 1),
            nn.ReLU(),
            nn.Conv2d(_HIDDEN_CHANNELS, config.embedding_channels, 1),
        )
        self.modes = ClassModes(segmenter.num_classes, config.modes_per_class, config.embedding_channels)
        # Whether the embedding takes part in stages without target, and the pixels of each class in the last labelling.
        self.register_buffer("attached", torch.tensor(0))
        self.register_buffer("predicted", torch.zeros(segmenter.num_classes, dtype=torch.int64))
        self._attached = False  # the same on the host, which would wait for a GPU to read the buffer
        self.register_load_state_dict_post_hook(DRSL._after_load)  # type: ignore[no-untyped-call]

    @classmethod
    def plan(cls, config: Config) -> tuple[Stage, ...]:
        """Return the warm-up, the training of the modes on the source and the rounds; each starts a new optimiser."""
        trains = ["segmenter"]
        trains += ["embedding"] if config.embeds else []
        trains += ["modes"] if config.metric_weight > 0 else []
        share = config.mode_warmup_share if config.metric_weight > 0 else 0.0
        modes = Stage(name="modes", share=share, domains=("source",), trains=tuple(trains), flipped=True)
        rounds = tuple(
            Round(
                name=f"round_{number + 1}",
                share=(1 - share) / config.rounds,
                trains=tuple(trains),
                flipped=True,
                pseudo_labels=True,
                portion=config.portion_of(number),
            )
            for number in range(config.rounds)
        )
        return (SOURCE_ONLY, *([modes] if share > 0 else []), *rounds)

    @classmethod
    def labelling(cls, config: Config) -> dict[str, Any]:
        """Return the rule of §6."""
        return {"rule": "self_paced", "share": config.portion, "share_step": config.portion_step}

    def prepare_stage(self, stage: Stage, data: StageData) -> None:
        """Label the target set before every round (§6)."""
        self.attach(stage is not SOURCE_ONLY)
        if not isinstance(stage, Round):
            return
        predicted = label_self_paced(
            self._probabilities,
            data,
            self.segmenter.num_classes,
            portion=stage.portion,
            notes={"active_modes": self.modes.active_share()},
        )
        self.predicted.copy_(predicted)

    def attach(self, attached: bool) -> None:
        """Say whether the embedding takes part in stages without target."""
        self.attached.fill_(attached)
        self._attached = attached

    def _after_load(self, _: Any) -> None:
        self._attached = bool(self.attached)

    def label_rule(self, stage: Stage, provenance: Mapping[str, Any] | None) -> LabelRule | None:
        """Return the rule of the round's labels, with the mirror image where they were made with it."""
        if provenance is None:
            return None
        if not self.config.mirrored:
            return written_rule(provenance, self.segmenter)
        thresholds = torch.tensor(provenance["thresholds"])

        def label(image: Tensor, logits: Tensor, size: tuple[int, int]) -> Tensor:
            mirrored = self.segmenter(self.segmenter.normalise(image.flip(-1))).logits.float()
            probabilities, other = (self.segmenter.upsample(answer, size).softmax(1) for answer in (logits, mirrored))
            return self_paced_labels((probabilities + other.flip(-1)) / 2, thresholds)

        return label

    def forward(self, batch: DomainBatch, step: int) -> dict[str, Tensor]:
        """Return the weighted terms of the stage (§5.5); the modes are warmed up with the source's alone.

        Terms: `cross_entropy`, `target_cross_entropy`, `confidence`, `metric_source`, `metric_target`, `alignment`.
        """
        if batch.target_images is not None:
            return self._round_terms(batch, step)
        return self._mode_terms(batch, step) if self._attached else self.source_only_terms(batch)

    def _mode_terms(self, batch: DomainBatch, step: int) -> dict[str, Tensor]:
        output = self.segmenter(batch.source_images)
        terms = self.supervised_terms(output.logits, batch.source_labels, 0.0)
        embeddings, margin = self._margin(output.features, batch.source_labels, self.modes())
        terms["metric_source"] = self.config.metric_weight * margin.loss
        self._track(embeddings, margin.nearest, None, batch, step)
        return terms

    def _round_terms(self, batch: DomainBatch, step: int) -> dict[str, Tensor]:
        config = self.config
        images, labels = self._enlarge_rare_classes(batch, step)
        source, target = self.segmenter(batch.source_images), self.segmenter(images)
        terms = self.supervised_terms(source.logits, batch.source_labels, 0.0)
        target_logits = self._upsampled(target.logits, labels)
        terms["target_cross_entropy"] = config.target_weight * segmentation_cross_entropy(target_logits, labels)
        if config.confidence_weight > 0:
            terms["confidence"] = config.confidence_weight * confidence_regulariser(target_logits, labels)
        if not config.embeds:
            return terms

        modes = self.modes()
        source_embeddings, source_margin = self._margin(source.features, batch.source_labels, modes)
        target_embeddings, target_margin = self._margin(target.features, labels, modes)
        if config.metric_weight > 0:
            terms["metric_source"] = config.metric_weight * source_margin.loss
            terms["metric_target"] = config.metric_weight * target_margin.loss
            self._track(source_embeddings, source_margin.nearest, target_margin.nearest, batch, step)
        if config.alignment_weight > 0:
            cells = (source_embeddings, source_margin.nearest, target_embeddings, target_margin.nearest)
            terms["alignment"] = config.alignment_weight * self._alignment(*cells, batch, step)
        return terms

    def parameter_groups(self) -> list[ParameterGroup]:
        """Add the embedding head and the modes, which learn like the segmentation head."""
        return [
            *super().parameter_groups(),
            ParameterGroup("embedding", tuple(self.embedding.parameters()), fresh=True),
            ParameterGroup("modes", tuple(self.modes.parameters()), fresh=True),
        ]

    def _margin(self, features: Tensor, labels: Tensor, modes: Tensor) -> tuple[Tensor, ModeMargin]:
        """Return embeddings (B, D, h, w), and their margin loss and modes."""
        embeddings: Tensor = self.embedding(features)
        small = labels_at_features(labels, (features.shape[-2], features.shape[-1]))
        return embeddings, mode_margin(embeddings, small, modes, margin=self.config.margin)

    def _track(
        self, embeddings: Tensor, nearest: Tensor, target_nearest: Tensor | None, batch: DomainBatch, step: int
    ) -> None:
        draw = generator(*batch.key, "class_modes", step)
        self.modes.track(embeddings, nearest, target_nearest, patience=self.config.reseed_after, generator=draw)

    def _alignment(
        self,
        source: Tensor,
        source_modes: Tensor,
        target: Tensor,
        target_modes: Tensor,
        batch: DomainBatch,
        step: int,
    ) -> Tensor:
        num_modes, stop_source = self.modes.idle_steps.numel(), self.config.stop_source
        cells = (source, source_modes, target, target_modes)
        if self.config.alignment == "expected":
            return mode_alignment(*cells, num_modes=num_modes, stop_source=stop_source)
        pairs = draw_pairs(
            source_modes,
            target_modes,
            num_modes=num_modes,
            pairs=self.config.alignment_pairs,
            generator=generator(*batch.key, "mode_pairs", step),
        )
        return sampled_mode_alignment(*cells, pairs, num_modes=num_modes, stop_source=stop_source)

    def _enlarge_rare_classes(self, batch: DomainBatch, step: int) -> tuple[Tensor, Tensor]:
        """Return target images and pseudo labels, some of them enlarged around a pixel of a rare class.

        The least predicted classes are rare; those below 0.1 % of the predictions go first. What is drawn depends on
        the trial's seed, stage, step and image alone, so that it is the same on any number of workers. Where a class is
        found stays on the device, which nothing here waits for.
        """
        images, labels, indices = batch.target_images, batch.target_pseudo_labels, batch.target_indices
        assert images is not None
        assert labels is not None
        assert indices is not None
        config = self.config
        if config.rare_crop_chance == 0 or config.rare_classes == 0:
            return images, labels
        shares = self.predicted / self.predicted.sum().clamp(min=1)
        rare = shares.masked_fill(shares == 0, torch.inf).argsort(stable=True)[: config.rare_classes]
        images, labels = images.clone(), labels.clone()
        for image, label, index in zip(images, labels, indices.tolist(), strict=True):
            draw = generator(*batch.key, "rare_crop", step, index)
            chance, choice, position, zoom = torch.rand(4, generator=draw, dtype=torch.float64).tolist()
            if chance >= config.rare_crop_chance:
                continue
            shown = (label == rare[:, None, None]).flatten(1).any(dim=1) & (shares[rare] > 0)
            very_rare = shown & (shares[rare] < _VERY_RARE_SHARE)
            shown = torch.where(very_rare.any(), very_rare, shown)
            pixels = label.flatten() == rare[_place_of(shown, choice)]
            enlarged = _window(label, _place_of(pixels, position), 1 + zoom * (config.rare_crop_zoom - 1))
            size = (label.shape[0], label.shape[1])
            image.copy_(torch.where(shown.any(), _resized(_cut(image, *enlarged), size), image))
            label.copy_(torch.where(shown.any(), labels_at_features(_cut(label, *enlarged), size), label))
        return images, labels

    def _probabilities(self, images: Tensor) -> Tensor:
        """Return class probabilities at image size, (B, C, H, W)."""
        probabilities = self._upsampled(self.segmenter(images).logits, images).softmax(dim=1)
        if self.config.mirrored:
            mirrored = self._upsampled(self.segmenter(images.flip(-1)).logits, images).softmax(dim=1)
            probabilities = (probabilities + mirrored.flip(-1)) / 2
        return probabilities

    def _upsampled(self, logits: Tensor, like: Tensor) -> Tensor:
        return self.segmenter.upsample(logits, (like.shape[-2], like.shape[-1]))


def _place_of(chosen: Tensor, position: float) -> Tensor:
    """Return the index, (1,), of one of the true entries of `chosen`, (n,): that at `position` in [0, 1) among them."""
    counts = chosen.cumsum(0)
    number = (position * counts[-1:].double()).long() + 1
    return torch.searchsorted(counts, number).clamp(max=len(chosen) - 1)


def _window(label: Tensor, center: Tensor, zoom: float) -> tuple[Tensor, Tensor]:
    """Return rows and columns of a window with 1 / `zoom` of each side, around pixel `center`, (1,), if that fits."""
    windows = []
    for position, full in zip((center // label.shape[1], center % label.shape[1]), label.shape, strict=True):
        length = max(1, round(full / zoom))
        start = (position - length // 2).clamp(0, full - length)
        windows.append(start + torch.arange(length, device=label.device))
    return windows[0], windows[1]


def _cut(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return maps.index_select(-2, rows).index_select(-1, columns)


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(image.unsqueeze(0), size=size, mode="bilinear", align_corners=False)[0]
