"""What the trainer is told: optimiser, length, batches, precision; and how steps are shared out among stages."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from segadapt.trainables.core.data.transforms import AugmentationConfig, Size
from segadapt.trainables.core.evaluation.inference import Inference
from segadapt.trainables.core.method import SOURCE_ONLY, Stage
from segadapt.trainables.core.validation import check

Precision = Literal["auto", "bf16", "fp16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights move: SGD with a poly schedule, as the papers of 2021 use it, or AdamW with a linear one."""

    name: Literal["sgd", "adamw"] | None = None
    """SGD with momentum, or AdamW with betas 0.9 and 0.999; null: the network's, AdamW for the models of timm."""
    lr: float | None = None
    """Base learning rate of the adaptation stages; null takes the network's recommended one."""
    lr_factor: float = 1.0
    """Multiplies `lr`: the searched coordinate, comparable between networks."""
    head_lr_factor: float | None = None
    """Learning rate of the head over the base rate; null: 10 beside a pretrained backbone (paper), else 1."""
    backbone_lr_factor: float = 1.0
    """Learning rate of the backbone over the base rate. VFM-UDA: 0.1."""
    layer_decay: float = 1.0
    """Multiplies the learning rate from each block of a timm backbone to the one before it. VFM-UDA++: 0.9."""
    momentum: float = 0.9
    """SGD momentum. Paper: 0.9."""
    weight_decay: float | None = None
    """On trained parameters. Null: 5e-4 under SGD (paper), 0.01 under AdamW (DAFormer)."""
    decay_norms: bool | None = None
    """Whether norm layers and embeddings decay too; null: under SGD, where the papers do."""
    schedule: Literal["poly", "linear", "cosine", "constant"] | None = None
    """How the learning rate falls over `horizon`; null: poly under SGD, linear under AdamW."""
    poly_power: float = 0.9
    """Poly: learning rate = base * (1 - step / horizon) ** poly_power. Paper: 0.9."""
    horizon: float | None = None
    """Schedule length over the steps of a stage. Null: 1.5625 of poly (SDCA: 62500 / 40000), else 1."""
    warmup_steps: int | None = None
    """First steps of each stage whose learning rate rises linearly. Null: none under SGD; under AdamW 1500 (DAFormer),
    but at most a tenth of the stage."""
    warmup_start: float = 1e-6
    """Factor of the learning rate in the first of those steps. DAFormer: 1e-6; VFM-UDA: 1e-3."""
    warmup_decays: bool = True
    """Whether the schedule falls meanwhile, as DAFormer's; else it sets in after the rise, as VFM-UDA's."""
    clip_norm: float | None = None
    """Largest gradient norm; null does not clip."""

    def __post_init__(self) -> None:
        for name in ("lr_factor", "backbone_lr_factor"):
            check(getattr(self, name) > 0, f"optimizer.{name} must be positive", getattr(self, name))
        for name in ("lr", "head_lr_factor", "clip_norm"):
            value = getattr(self, name)
            check(value is None or value > 0, f"optimizer.{name} must be positive or null", value)
        check(0 < self.layer_decay <= 1, "optimizer.layer_decay must lie in (0, 1]", self.layer_decay)
        check(0 <= self.momentum < 1, "optimizer.momentum must lie in [0, 1)", self.momentum)
        decay, horizon, rise = self.weight_decay, self.horizon, self.warmup_steps
        check(decay is None or decay >= 0, "optimizer.weight_decay must not be negative", decay)
        check(horizon is None or horizon >= 1, "optimizer.horizon must be at least 1", horizon)
        check(rise is None or rise >= 0, "optimizer.warmup_steps must be null or not negative", rise)
        check(0 < self.warmup_start <= 1, "optimizer.warmup_start must lie in (0, 1]", self.warmup_start)

    def filled(self, name: Literal["sgd", "adamw"]) -> "OptimizerConfig":
        """Return these settings with `name` and what follows from it, where they are null; `warmup_steps` stays."""
        name = self.name or name
        schedule = self.schedule or ("poly" if name == "sgd" else "linear")
        follows: dict[str, Any] = {
            "name": name,
            "weight_decay": 5e-4 if name == "sgd" else 0.01,
            "decay_norms": name == "sgd",
            "schedule": schedule,
            "horizon": 1.5625 if schedule == "poly" else 1.0,
        }
        return replace(self, **{key: value for key, value in follows.items() if getattr(self, key) is None})


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Length and mechanics of a trial."""

    steps: int = 240
    """Optimiser steps after the warm-up, over all stages of the method."""
    batch_size: int = 8
    """Images of each domain per micro-batch, over all workers; halved by itself where the device's memory is short."""
    accumulate: int = 1
    """Micro-batches per optimiser step; more by themselves where micro-batches were halved."""
    eval_every: int = 60
    """Steps between evaluations; every evaluation leaves a checkpoint."""
    eval_batch_size: int = 8
    """Images per evaluation batch and worker."""
    eval_window: Size | None = None
    """Height and width of overlapping windows in which evaluations show an image; null: whole, as the papers do."""
    eval_stride: Size | None = None
    """Rows and columns from one such window to the next; null: two thirds of the window."""
    loader_threads: int | None = None
    """Threads that read and augment ahead; 0 does so between steps; null: the worker's CPUs beside a GPU, else 0."""
    evaluate_start: bool = False
    """Also evaluate before the first step."""
    precision: Precision = "auto"
    """Precision of the networks; auto is bf16 on GPUs that compute in it, fp16 on those before, fp32 on CPUs. In fp16
    losses are scaled before the backward pass, and a step whose gradients overflow is left out. Losses are float32."""
    deterministic: bool = False
    """Whether results repeat to the bit on a GPU, with kernels that are slower. On a CPU they always do."""
    channels_last: bool = True
    """Memory format of images and weights."""
    recompute: bool = False
    """Compute residual blocks anew in the backward pass, rather than keep what is inside: less memory, more time."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "eval_every", "eval_batch_size"):
            check(getattr(self, name) >= 1, f"trainer.{name} must be at least 1", getattr(self, name))
        check(
            self.loader_threads is None or self.loader_threads >= 0,
            "trainer.loader_threads must be null or not negative",
            self.loader_threads,
        )
        check(
            self.eval_window is None or min(self.eval_window) >= 1,
            "trainer.eval_window must be null or two sides of at least 1",
            self.eval_window,
        )
        _ = self.inference  # refuses a stride that does not fit the window

    @property
    def inference(self) -> Inference:
        """How evaluations ask a network about an image."""
        return Inference(window=self.eval_window, stride=self.eval_stride)

    def check_workers(self, workers: int, least_images: int) -> None:
        """Make sure that workers can share a batch.

        Args:
            workers: Data-parallel workers.
            least_images: Images that the network must see at a time in training.

        Raises:
            ValueError: If they cannot.
        """
        check(
            self.batch_size % workers == 0,
            f"trainer.batch_size must be a multiple of the {workers} workers",
            self.batch_size,
        )
        check(
            self.batch_size // workers >= least_images,
            f"trainer.batch_size must be at least {least_images * workers} with {workers} worker(s) and this network, "
            f"which normalises what it pools over {least_images} or more images",
            self.batch_size,
        )


@dataclass(frozen=True)
class TrainerSettings:
    """Everything the trainer needs beside the method and the data."""

    trainer: TrainerConfig
    optimizer: OptimizerConfig
    augmentation: AugmentationConfig
    seed: int


def stage_steps(plan: tuple[Stage, ...], warmup_steps: int, trainer_steps: int) -> dict[str, int]:
    """Return the optimiser steps of each stage by name.

    Shares that sum to 1 give `trainer_steps` in all; a stage with a share takes at least one step.
    """
    steps: dict[str, int] = {}
    share, steps_before = 0.0, 0
    for stage in plan:
        if stage is SOURCE_ONLY:
            steps[stage.name] = warmup_steps
            continue
        share += stage.share
        steps[stage.name] = max(1, round(share * trainer_steps) - steps_before) if stage.share > 0 else 0
        steps_before += steps[stage.name]
    return steps
