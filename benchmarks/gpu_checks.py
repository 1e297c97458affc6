"""What must hold of a GPU before its figures count; `first_gpu.py` and `tests/trainables/test_gpu.py` run each check.

Needs torch, torchvision and `segadapt.trainables` alone. A check takes a device, raises an AssertionError where it does
not hold and returns the figures it found; on a CPU some have nothing to show and raise `SkippedError` with the reason.
The CPU's float32 is the reference. Worlds are small, the network is `compact`, weights start at random.
"""

import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segadapt.trainables import method_class
from segadapt.trainables.core.data.streets import StreetsConfig, load_streets
from segadapt.trainables.core.data.transforms import AugmentationConfig
from segadapt.trainables.core.losses import cycle_association
from segadapt.trainables.core.method import Method, Stage, WarmupConfig
from segadapt.trainables.core.networks import build_segmenter
from segadapt.trainables.core.training.config import OptimizerConfig, Precision, TrainerConfig, TrainerSettings
from segadapt.trainables.core.training.optimizer import build_optimizer, move_weights, select_trained
from segadapt.trainables.core.training.trainer import Trainer
from step import MEASURED, World, build, pseudo_label

Figures = dict[str, float]
Check = Callable[[torch.device], Figures]

CPU = torch.device("cpu")
TOLERANCES: dict[str, tuple[float, float]] = {"fp32": (1e-4, 1e-2), "bf16": (1e-2, 0.1)}
"""Of each term, by its size, and of the gradient of all weights, by its norm. TF32 is off. In bfloat16, PLCA and DRSL
may pick another pixel or mode of nearly the same likeness, and gradients are rounded in each layer."""
LEVELS = ("feature_association", "output_association")
SMALL = StreetsConfig(height=64, width=128, train_images=8, val_images=2)


class SkippedError(Exception):
    """The check has nothing to show on this device; says why."""


class Checkpoints:
    """Keeps the checkpoints that a trainer reports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[Path] = []

    def __call__(self, metrics: dict[str, Any], write: Callable[[Path], None] | None) -> None:
        """Write a checkpoint to a new folder."""
        assert write is not None
        path = self.folder / str(len(self.paths))
        path.mkdir(parents=True)
        write(path)
        self.paths.append(path)


class LabelledTrainer(Trainer):
    """A trainer whose target images all have the same pseudo label: none were written."""

    pseudo_label: Tensor

    def pseudo_labels(self, stage: Stage) -> Callable[[str], Tensor] | None:
        """Return what reads it."""
        return (lambda _: self.pseudo_label) if stage.pseudo_labels else None


def settings(batch_size: int = 4, **trainer: Any) -> TrainerSettings:
    trainer = {"steps": 6, "eval_every": 3, "batch_size": batch_size, "precision": "fp32", **trainer}
    return TrainerSettings(TrainerConfig(**trainer), OptimizerConfig(lr=0.01), AugmentationConfig(), seed=0)


def last_stage(name: str, device: torch.device, folder: Path, precision: Precision) -> Trainer:
    """Return a trainer of a method's last stage, equal on all devices."""
    data, evaluation = load_streets(SMALL)
    size = (SMALL.height, SMALL.width)
    world = World(data, evaluation, {}, [], {"source": size, "target": size}, None)
    method, stage = build(name, "compact", len(data.classes), literal=False, freeze_norm=False)
    trainer = LabelledTrainer(
        method, (stage,), data, evaluation, settings(precision=precision), Checkpoints(folder), folder, device=device
    )
    trainer.pseudo_label = pseudo_label(world)
    select_trained(method, stage, trainer.trainable)
    method.train()
    return trainer


def passed(trainer: Trainer) -> tuple[dict[str, float], Tensor]:
    """Return the terms of a first step and the gradient of all weights, on the CPU."""
    terms = trainer.step(trainer.batches(trainer.plan[0]), 0)
    assert terms is not None
    gradients = [p.grad.double().cpu().flatten() for p in trainer.method.parameters() if p.grad is not None]
    return {name: float(term) for name, term in terms.items()}, torch.cat(gradients)


def step_equals_the_cpu(name: str, precision: Precision, device: torch.device) -> Figures:
    """Compare terms and gradient of a step with the CPU's in float32."""
    cudnn, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with tempfile.TemporaryDirectory() as folder:
            terms, gradient = passed(last_stage(name, device, Path(folder, "device"), precision))
            expected, reference = passed(last_stage(name, CPU, Path(folder, "cpu"), "fp32"))
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, products
    assert terms.keys() == expected.keys()
    largest = max(abs(terms[term] - value) / max(abs(value), 0.1) for term, value in expected.items())
    distance = float((gradient - reference).norm() / reference.norm())
    allowed = TOLERANCES[precision]
    assert largest <= allowed[0], f"terms differ by {largest:.1e}: {terms} and {expected}"
    assert distance <= allowed[1], f"gradients differ by {distance:.1e} of their norm"
    return {"largest difference of a term": largest, "difference of the gradient": distance}


def step_waits_for_nothing(name: str, device: torch.device) -> Figures:
    """Take a step in which PyTorch raises an error where the host waits for the device."""
    if device.type != "cuda":
        raise SkippedError("PyTorch tells of waits on GPUs alone; tests/trainables/test_step.py simulates one")
    with tempfile.TemporaryDirectory() as folder:
        trainer = last_stage(name, device, Path(folder), "auto")
        stage = trainer.plan[0]
        optimizer = build_optimizer(trainer.method, stage, trainer.settings.optimizer, device)
        batches = trainer.batches(stage)
        for mode in ("default", "error"):  # the first step sets up libraries
            batch = next(batches)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                assert trainer.step(iter([batch]), 0) is not None
                move_weights(trainer.method, stage, optimizer, None, trainer._loss_scale)
                trainer.method.after_step(0)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return {}


def whole(name: str, device: torch.device, folder: Path, **trainer: Any) -> tuple[Trainer, Checkpoints]:
    """Return a trainer of all stages of a method."""
    torch.manual_seed(0)
    data, evaluation = load_streets(SMALL)
    cls = method_class(name)
    config = cls.Config()
    method: Method = cls(build_segmenter("compact", len(data.classes)), config, WarmupConfig(steps=3))
    kept = Checkpoints(folder / "checkpoints")
    stages = cls.plan(config)
    return Trainer(method, stages, data, evaluation, settings(**trainer), kept, folder / "artefacts", device), kept


def resumes_to_the_bit(name: str, device: torch.device) -> Figures:
    """Train deterministically, and once more from the last checkpoint but one; the states must be equal."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            first, kept = whole(name, device, Path(folder, "first"), deterministic=True, precision="auto")
            first.run()
            again, _ = whole(name, device, Path(folder, "again"), deterministic=True, precision="auto")
            again.run(kept.paths[-2])
    finally:
        torch.use_deterministic_algorithms(False)
    states = [trainer.method.state_dict() for trainer in (first, again)]
    unlike = [key for key, value in states[0].items() if not torch.equal(value, states[1][key])]
    assert not unlike, f"{len(unlike)} of {len(states[0])} tensors differ, e.g. {unlike[:3]}"
    return {}


def kernels_equal_the_reference(level: str, device: torch.device) -> Figures:
    """Compare PLCA's fused kernels with the reference, and with themselves."""
    if device.type != "cuda":
        raise SkippedError("the kernels run on GPUs alone; tests/trainables/test_kernels.py interprets them")
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 300, 37, 41), (2, 300, 33, 50))
    maps = [torch.randn(shape, generator=draw).to(device).requires_grad_() for shape in shapes]
    labels = torch.randint(0, 4, (2, 37, 41), generator=draw).to(device)
    association = getattr(cycle_association, level)
    losses = [association(*maps, labels, kernels=form) for form in ("triton", "triton", "reference")]
    ours, again, theirs = (torch.autograd.grad(loss, maps) for loss in losses)
    value = float((losses[0] - losses[2]).abs() / losses[2].abs())
    distance = max(float((our - other).norm() / other.norm()) for our, other in zip(ours, theirs, strict=True))
    assert all(torch.equal(our, other) for our, other in zip(ours, again, strict=True)), "results do not repeat"
    assert value <= 1e-5, f"values differ by {value:.1e}"
    assert distance <= 1e-3, f"gradients differ by {distance:.1e} of their norm"
    return {"difference of the value": value, "difference of the gradient": distance}


def short_memory_parts_the_batch(device: torch.device) -> Figures:
    """Allow the process so little memory that a batch of 8 does not fit, and train."""
    if device.type != "cuda":
        raise SkippedError("the memory of a CPU is not limited so; tests/trainables/test_memory.py injects the error")
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for size in (1, 8):
            trainer, _ = whole("source_only", device, Path(folder, str(size)), batch_size=size)
            trainer.run()
            peaks.append(torch.cuda.max_memory_reserved(device))
            del trainer
            torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (0.5 * sum(peaks)) / total), device)
        try:
            trainer, _ = whole("source_only", device, Path(folder, "short"), batch_size=8)
            trainer.run()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert trainer.micro_batch < 8, f"8 images fitted in {0.5 * sum(peaks) / 2**20:.0f} MiB"
    assert all(bool(weight.isfinite().all()) for weight in trainer.method.parameters())
    return {"micro-batch": trainer.micro_batch, "MiB allowed": math.floor(0.5 * sum(peaks) / 2**20)}


CHECKS: dict[str, Check] = {
    **{
        f"step of {name} in {precision}": partial(step_equals_the_cpu, name, precision)
        for name in MEASURED
        for precision in ("fp32", "bf16")
    },
    **{f"waits in a step of {name}": partial(step_waits_for_nothing, name) for name in MEASURED},
    **{f"resume of {name}": partial(resumes_to_the_bit, name) for name in ("sdca", "drsl")},
    **{f"kernels of {level}": partial(kernels_equal_the_reference, level) for level in LEVELS},
    "short memory": short_memory_parts_the_batch,
}
"""Every check by its name, those of most worth first."""
