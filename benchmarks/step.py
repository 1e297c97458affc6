"""The training step: speed, where its time goes, and memory; against a literal step and a bare loop.

    python benchmarks/step.py [--setting streets|paper] [--methods sdca ...] [--networks ...] [--json PATH]

Needs torch, torchvision and `segadapt.trainables` alone. Forms, all with the same network and images of the same size:

* trainer: `segadapt`'s own trainer, in the last stage of the method.
* bare: a loop written by hand around the same method, data and optimiser. What the trainer adds is its overhead.
* literal: the step as public codes write it (`literal/step.py`), BiCL in the variant that is public.

`streets` is streets_v1; `paper` has the papers' sizes (source 1280x720, target 1024x512; PLCA crops of
730x730 of both) and is generated, so that it needs no dataset; `--scale 0.2` shrinks it, as without a GPU. The forms
take turns, `--rounds` times `--steps` steps each. Without a GPU, times are processor times, which other programs on the
machine disturb less, and memory is that of tensors at its peak in one step, parameters, gradients and momentum
included; with one, times are wall times and memory is the device's. Parts are measured in further steps of the trainer,
on a GPU between events in its queue: `data` then is what the device waits for, and what is copied to it.

On streets, one evaluation with its scores and checkpoint is measured too, as a share of what the trainer does from one
to the next at the default interval.
"""

import argparse
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from literal.step import LiteralStep, PilImages, endless
from measuring import cpu_model, peak_tensor_bytes
from segadapt.trainables import METHODS, method_class
from segadapt.trainables.core.data.batch import DomainBatch, DomainData, EvaluationData
from segadapt.trainables.core.data.class_lists import CITYSCAPES, CITYSCAPES_IDS
from segadapt.trainables.core.data.datasets import DataConfig, load_data, open_dataset
from segadapt.trainables.core.data.loading import BatchSource
from segadapt.trainables.core.data.readers.cityscapes import write_cityscapes
from segadapt.trainables.core.data.streets import StreetsConfig, load_streets
from segadapt.trainables.core.data.transforms import AugmentationConfig, Size
from segadapt.trainables.core.method import Method, Stage, WarmupConfig
from segadapt.trainables.core.networks import NETWORKS, base_lr, build_segmenter
from segadapt.trainables.core.training.config import OptimizerConfig, TrainerConfig, TrainerSettings
from segadapt.trainables.core.training.trainer import Trainer

MEASURED = [method.name for method in METHODS if method.name != "self_training" and not method.always_online]
FORMS = ("trainer", "bare", "literal")
PARTS = ("data", "forward", "losses", "backward", "optimiser")
NETWORK_OF = {"streets": "compact", "paper": "deeplabv2_resnet101"}
BATCH_SIZES = {"streets": 8, "paper": 2}
LONGEST_TURN_S = 10.0
PSEUDO_BLOCK = 32  # side of the squares of equal pseudo labels, in pixels


@dataclass(frozen=True)
class World:
    """The images of both domains, for our loading and as files for the literal one."""

    data: DomainData
    evaluation: EvaluationData
    files: dict[str, Path]
    label_ids: list[int]
    """Stored value of each trained class."""
    sizes: dict[str, Size]
    """Of each domain, before the crop."""
    crop: Size | None

    @property
    def augmentation(self) -> AugmentationConfig:
        """How our loading resizes and crops; colours vary as by default."""
        return AugmentationConfig(source_size=self.sizes["source"], target_size=self.sizes["target"], crop=self.crop)

    def pil(self, domain: str) -> PilImages:
        """Return a domain's training images for the literal loading, the target's with `pseudo_label`."""
        split = open_dataset("cityscapes", str(self.files[domain])).splits["train"]
        labels = [path for path in split.labels if path is not None]
        if domain == "target":
            stored = torch.full((256,), 255, dtype=torch.uint8)
            stored[: len(self.label_ids)] = torch.tensor(self.label_ids, dtype=torch.uint8)
            path = self.files[domain] / "pseudo.png"
            Image.fromarray(stored[pseudo_label(self).long()].numpy()).save(path)
            labels = [path] * len(labels)
        return PilImages(list(split.images), labels, self.label_ids, self.sizes[domain], self.crop)


def streets_world(folder: Path) -> World:
    config = StreetsConfig(edition=1)
    data, evaluation = load_streets(config)
    files = write_domains(folder, config, config)
    size = config.size
    ids = [CITYSCAPES_IDS[name] for name in data.classes.names]
    return World(data, evaluation, files, ids, {"source": size, "target": size}, None)


def paper_world(folder: Path, scale: float, crop: bool) -> World:
    """Return images stored at the size of GTA5 and Cityscapes, of which the network sees what the papers show it."""

    def scaled(*size: int, multiple: int = 1) -> Size:
        height, width = (max(32, round(side * scale / multiple) * multiple) for side in size)
        return height, width

    stored = [scaled(1056, 1920, multiple=8), scaled(1024, 2048, multiple=8)]
    configs = [StreetsConfig(edition=1, height=h, width=w, train_images=4, val_images=1) for h, w in stored]
    files = write_domains(folder, *configs)
    data, evaluation = load_data(
        DataConfig(source=f"cityscapes:{files['source']}", target=f"cityscapes:{files['target']}")
    )
    sizes = {"source": scaled(720, 1280), "target": scaled(512, 1024)}
    if crop:
        sizes = {"source": scaled(760, 1352), "target": scaled(730, 1460)}
    ids = [CITYSCAPES_IDS[name] for name in CITYSCAPES.names]
    return World(data, evaluation, files, ids, sizes, scaled(730, 730) if crop else None)


def write_domains(folder: Path, source: StreetsConfig, target: StreetsConfig) -> dict[str, Path]:
    files = {"source": folder / "source", "target": folder / "target"}
    for domain, config in (("source", source), ("target", target)):
        if not files[domain].exists():
            data, evaluation = load_streets(config, oracle=domain == "target")
            validation = evaluation.target if domain == "target" else evaluation.source
            write_cityscapes(files[domain], data.source, validation, data.classes.names)
    return files


def pseudo_label(world: World) -> Tensor:
    """Return blocks of random classes, (H, W) uint8, half of them ignored: they give every loss its work."""
    height, width = world.sizes["target"]
    classes, draw = len(world.data.classes), torch.Generator().manual_seed(0)
    side = min(PSEUDO_BLOCK, height // 2)
    blocks = torch.randint(0, 2 * classes, (-(-height // side), -(-width // side)), generator=draw)
    blocks[blocks >= classes] = 255
    full = blocks.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return full[:height, :width].to(torch.uint8).contiguous()


def build(
    name: str, network: str, classes: int, *, literal: bool, freeze_norm: bool, kernels: str = "reference"
) -> tuple[Method, Stage]:
    """Return a method with the published settings and its last stage, equal for equal arguments."""
    torch.manual_seed(0)
    # The literal form has batch norm in evaluation mode, which `freeze_norm` says in another way.
    segmenter = build_segmenter(network, classes, freeze_norm=True if freeze_norm and not literal else None)
    cls = method_class(name)
    settings = {"bicl": {"variant": "released"}, "plca": {"kernels": kernels}}
    config = cls.Config(**settings.get(name, {}))
    method: Any = cls(segmenter, config, WarmupConfig())
    method.prepare_stage = lambda *_: None  # what it would prepare is not what is measured
    if name == "drsl":
        method.attach(True)
        method.predicted.copy_(torch.arange(classes))
    return method, cls.plan(config)[-1]


class Clock:
    """Points in time: of this process's processors, or in the queue of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """Return this point."""
        if self.device.type != "cuda":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Any, last: Any) -> float:
        """Return the time between two points that have passed."""
        return first.elapsed_time(last) / 1e3 if self.device.type == "cuda" else last - first

    def now(self) -> float:
        """Return when all that was asked for is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()


class MeasuredTrainer(Trainer):
    """The trainer with a clock around its steps, and where asked for also within them."""

    pseudo_label: Tensor
    inner: "Inner | None" = None
    evaluates = False
    clock_type = Clock

    def take(self, steps: int) -> float:
        """Take so many steps of the only stage; returns their seconds."""
        self.clock = self.clock_type(self.device)
        self.started: float | None = None
        self.steps = {stage.name: steps for stage in self.plan}
        self.run()
        assert self.started is not None
        return self.ended - self.started

    def evaluate_and_report(self, stage: Stage, *arguments: Any) -> None:
        """End the time of the steps; evaluate where that is measured."""
        self.ended = self.clock.now()
        if self.inner is not None:
            self.inner.mark("end")
        if self.evaluates:
            super().evaluate_and_report(replace(stage, pseudo_labels=False), *arguments)  # nor were labels written
            self.evaluation_s = self.clock.now() - self.ended

    def pseudo_labels(self, stage: Stage) -> Callable[[str], Tensor] | None:
        """Return the same label for every image: none were written."""
        return (lambda _: self.pseudo_label) if stage.pseudo_labels else None

    def batches(self, *arguments: Any) -> Iterator[DomainBatch]:
        """Begin the time of the steps."""
        if self.started is None:
            self.started = self.clock.now()
        return super().batches(*arguments)

    def step(self, *arguments: Any) -> dict[str, Tensor] | None:
        """Mark where reading the data begins, and where the passes have ended."""
        if self.inner is None:
            return super().step(*arguments)
        self.inner.mark("data")
        terms = super().step(*arguments)
        self.inner.mark("optimiser")
        return terms


class Inner:
    """Marks within steps: each names the part that begins. What runs in the network's modules is its forward."""

    def __init__(self, clock: Clock, method: Method) -> None:
        self.clock = clock
        self.marks: list[tuple[str, Any]] = []
        self._depth = 0
        self._handles = [
            method.register_forward_pre_hook(lambda *_: self.mark("losses")),
            method.register_forward_hook(lambda *_: self.mark("backward")),
        ]
        for module in network_parts(method):
            self._handles += [module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave)]

    def mark(self, part: str) -> None:
        """Let a part begin."""
        self.marks.append((part, self.clock.mark()))

    def remove(self) -> None:
        """Measure no longer."""
        for handle in self._handles:
            handle.remove()

    def seconds(self) -> dict[str, float]:
        """Return the time of each part, the first step left out, and of all."""
        self.clock.now()
        begins = [index for index, (part, _) in enumerate(self.marks) if part == "data"]
        kept = self.marks[begins[1] :]
        found = dict.fromkeys(PARTS, 0.0)
        for (part, begin), (_, end) in itertools.pairwise(kept):
            found[part] += self.clock.seconds(begin, end)
        return {part: seconds / (len(begins) - 1) for part, seconds in found.items()}

    def _enter(self, *_: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            self.mark("forward")

    def _leave(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.mark("losses")


def network_parts(method: Any) -> Iterator[nn.Module]:
    """Yield the modules by which a method enters its networks; some call a part alone."""
    segmenter = method.segmenter
    yield from (segmenter, segmenter.backbone, *segmenter.backbone.children(), segmenter.head)
    yield from getattr(segmenter.head, "convolutions", segmenter.head.children())
    for name in ("source_stem", "embedding", "projection", "teacher"):
        if getattr(method, name, None) is not None:
            yield getattr(method, name)


class BareLoop:
    """Optimiser steps in a loop written by hand: the method's networks and losses, our data, SGD."""

    def __init__(self, method: Method, stage: Stage, trainer: MeasuredTrainer) -> None:
        self.device = trainer.device
        self.method = method.to(device=self.device)
        self.stage = stage
        self.batches = BatchSource(
            data=trainer.data,
            augmentation=trainer.settings.augmentation,
            key=(trainer.settings.seed, stage.name),
            batch_size=trainer.micro_batch,
            domains=stage.domains,
            colored=stage.colored,
            flipped=stage.flipped,
            pseudo_labels=trainer.pseudo_labels(stage),
        )
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in method.parameters() if parameter.requires_grad],
            lr=trainer.settings.optimizer.lr or 0.0,
            momentum=0.9,
            weight_decay=5e-4,
            fused=self.device.type == "cuda",
        )

    def take(self, steps: int) -> float:
        """Take so many steps; returns their seconds."""
        clock, normalise = Clock(self.device), self.method.segmenter.normalise
        self.method.train()
        batches = self.batches.batches(0, steps)
        begin = clock.now()
        for step, batch in enumerate(batches):
            batch = batch.to(self.device)
            source = normalise(batch.source_images).contiguous(memory_format=torch.channels_last)
            target = batch.target_images
            if target is not None:
                target = normalise(target).contiguous(memory_format=torch.channels_last)
            terms = self.method(replace(batch, source_images=source, target_images=target), step)
            torch.stack(list(terms.values())).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.method.after_step(step)
        return clock.now() - begin


class LiteralLoop:
    """Steps of the literal form."""

    def __init__(self, method: Method, world: World, batch_size: int, device: torch.device, lr: float) -> None:
        workers = 4 if device.type == "cuda" else 0
        batches = [endless(world.pil(domain), batch_size, workers) for domain in ("source", "target")]
        self.device = device
        self.step = LiteralStep(method, batches[0], batches[1], device, lr)

    def take(self, steps: int) -> float:
        """Take so many steps; returns their seconds."""
        clock = Clock(self.device)
        begin = clock.now()
        for _ in range(steps):
            self.step()
        return clock.now() - begin


def measure(name: str, network: str, world: World, options: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured of a method and a network, form by form."""
    device = torch.device(options.device)
    freeze = options.setting == "paper" and NETWORKS[network].batch_norm
    lr = base_lr(network) * 0.01  # weights start at random: the rate of trained ones would make them diverge
    classes = len(world.data.classes)
    folder = Path(tempfile.gettempdir())
    settings = TrainerSettings(
        trainer=TrainerConfig(batch_size=options.batch_size, precision=options.precision, recompute=options.recompute),
        optimizer=OptimizerConfig(lr=lr),
        augmentation=world.augmentation,
        seed=0,
    )
    forms: dict[str, Any] = {}
    ours = {"literal": False, "freeze_norm": freeze, "kernels": options.kernels}
    method, stage = build(name, network, classes, **ours)
    if options.compile:
        method.segmenter.backbone.compile()
    trainer = MeasuredTrainer(
        method, (stage,), world.data, world.evaluation, settings, write_checkpoint, folder, device=device
    )
    trainer.pseudo_label = pseudo_label(world)
    forms["trainer"] = trainer
    if "bare" in options.forms:
        other, _ = build(name, network, classes, **ours)
        forms["bare"] = BareLoop(other, stage, trainer)
    if "literal" in options.forms:
        other, _ = build(name, network, classes, literal=True, freeze_norm=freeze)
        forms["literal"] = LiteralLoop(other, world, options.batch_size, device, lr)

    images = options.batch_size * len(stage.domains)
    rows, seconds = memory_of(forms, device), turns(forms, options)
    for form, per_step in seconds.items():
        rows[form] |= {"images_per_s": images / statistics.median(per_step), "step_s": per_step}
    trainer.inner = Inner(Clock(device), method)
    trainer.take(options.steps + 1)
    rows["trainer"]["parts_s"] = trainer.inner.seconds()
    trainer.inner.remove()
    if options.setting == "streets":
        trainer.inner, trainer.evaluates = None, True
        trainer.take(1)
        between = settings.trainer.eval_every * statistics.median(seconds["trainer"])
        rows["trainer"] |= {
            "evaluation_s": trainer.evaluation_s,
            "evaluation_share": trainer.evaluation_s / (trainer.evaluation_s + between),
        }
    ratios = {
        form: sorted(own / other for own, other in zip(seconds["trainer"], seconds[form], strict=True))
        for form in forms
        if form != "trainer" and form in seconds
    }
    return {"method": name, "network": network, "forms": rows, "trainer_to": ratios}


def write_checkpoint(_: Any, write: Callable[[Path], None] | None) -> None:
    assert write is not None
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))


def turns(forms: dict[str, Any], options: argparse.Namespace) -> dict[str, list[float]]:
    """Let the forms take turns, in changing order; returns the seconds of a step in each turn.

    A form whose steps take seconds takes fewer of them.
    """
    steps = {
        form: max(1, min(options.steps, round(LONGEST_TURN_S / forms[form].take(1))))
        for form in forms
        if forms[form] is not None
    }
    seconds: dict[str, list[float]] = {form: [] for form in steps}
    for round_number in range(options.rounds):
        for form in sorted(seconds, reverse=bool(round_number % 2)):
            seconds[form].append(forms[form].take(steps[form]) / steps[form])
    return seconds


def memory_of(forms: dict[str, Any], device: torch.device) -> dict[str, dict[str, Any]]:
    """Return the peak memory of a step of each form, after a first one; a form that does not fit is left out."""
    rows: dict[str, dict[str, Any]] = {}
    for form in list(forms):
        try:
            forms[form].take(1)
            rows[form] = {"peak_mb": peak_bytes(forms[form], device) / 1e6}
        except torch.OutOfMemoryError:
            rows[form] = {"out_of_memory": True}
            forms[form] = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def peak_bytes(form: Any, device: torch.device) -> float:
    """Return the bytes that a step has at its peak, beside other forms: on a GPU of the device, else of tensors."""
    if device.type == "cuda":
        others = torch.cuda.memory_allocated(device) - standing_bytes(form)
        torch.cuda.reset_peak_memory_stats(device)
        form.take(1)
        return torch.cuda.max_memory_allocated(device) - others
    return standing_bytes(form) + peak_tensor_bytes(lambda: form.take(1))


def standing_bytes(form: Any) -> int:
    """Return the bytes of parameters, buffers and, where the form keeps its optimiser between turns, momentum."""
    method = form.step.method if isinstance(form, LiteralLoop) else form.method
    tensors = [*method.parameters(), *method.buffers()]
    if not isinstance(form, MeasuredTrainer):
        optimizer = form.step.optimizer if isinstance(form, LiteralLoop) else form.optimizer
        tensors += [value for state in optimizer.state.values() for value in state.values() if value is not None]
        tensors += [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def table(results: list[dict[str, Any]]) -> str:
    """Return the results for people."""
    lines = [
        f"{'method':<12}{'network':<22}{'form':<9}{'images/s':>10}{'peak MB':>10}  "
        + "".join(f"{part:>10}" for part in PARTS)
        + "  trainer's time over it, median (range)"
    ]
    for result in results:
        for form, row in result["forms"].items():
            if "images_per_s" not in row:
                lines.append(f"{result['method']:<12}{result['network']:<22}{form:<9}   does not fit")
                continue
            line = f"{result['method']:<12}{result['network']:<22}{form:<9}"
            line += f"{row['images_per_s']:>10.2f}{row['peak_mb']:>10.0f}  "
            parts = row.get("parts_s", {})
            total = sum(parts.values())
            line += "".join(f"{parts[part] / total:>9.1%} " if parts else " " * 10 for part in PARTS)
            if ratios := result["trainer_to"].get(form):
                line += f"  {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
            if "evaluation_share" in row:
                line += f"  evaluation {row['evaluation_share']:.1%}"
            lines.append(line)
    return "\n".join(lines)


def machine(device: torch.device) -> dict[str, Any]:
    hardware: dict[str, Any] = {"cpu": cpu_model(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy", "pillow")}
    return {"hardware": hardware, "versions": {"python": platform.python_version(), **versions}}


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=NETWORK_OF, help="default: paper on a GPU, else streets")
    parser.add_argument("--methods", nargs="+", choices=MEASURED, default=MEASURED)
    parser.add_argument("--networks", nargs="+", help="default: compact for streets, deeplabv2_resnet101 for paper")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, help="images per domain; default: 8 for streets, 2 for paper")
    parser.add_argument("--scale", type=float, help="of the sides of paper's images; default: 1 on a GPU, else 0.2")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--recompute", action="store_true", help="trainer.recompute, in the trainer alone")
    parser.add_argument(
        "--kernels", choices=("reference", "triton"), default="reference", help="method.kernels of PLCA"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the trainer's backbone")
    parser.add_argument("--threads", type=int, help="default: 1 without a GPU, else torch's own")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    options.device = options.device or ("cuda" if on_gpu else "cpu")
    on_gpu = options.device == "cuda"
    options.setting = options.setting or ("paper" if on_gpu else "streets")
    options.networks = options.networks or [NETWORK_OF[options.setting]]
    options.batch_size = options.batch_size or BATCH_SIZES[options.setting]
    options.scale = options.scale or (1.0 if on_gpu else 0.2)
    options.threads = options.threads or (torch.get_num_threads() if on_gpu else 1)
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all that is asked for; prints a table and returns the record."""
    torch.set_num_threads(options.threads)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for network in options.networks:
            for method in options.methods:
                crop = method == "plca"
                if options.setting == "streets":
                    world = streets_world(Path(name))
                else:
                    world = paper_world(Path(name), options.scale, crop)
                results.append(measure(method, network, world, options))
                print(table(results[-1:]), flush=True)
                gc.collect()
    print("\n" + table(results))
    setting = {key: value for key, value in vars(options).items() if key != "json"}
    return {"setting": setting, **machine(torch.device(options.device)), "results": results}


def main() -> None:
    options = options_of()
    record = run(options)
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
