"""A few real steps of a method, measured in a process of their own.

Started as `python -m segadapt.platform.experiment.probe REQUEST ANSWER`, it is that process.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from segadapt.platform.cluster.connection import worker_environment
from segadapt.platform.errors import UsageError
from segadapt.platform.settings.config import TrialConfig, flatten, resolve
from segadapt.platform.settings.termination import signal_handlers_kept, treat_termination_as_interrupt
from segadapt.platform.storage.files import folder_size
from segadapt.platform.storage.stage_keys import split_plan
from segadapt.platform.trial.training import build_method
from segadapt.trainables.core.data.batch import LabelledImages, TargetImages
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.method import Stage, StageData
from segadapt.trainables.core.training.config import TrainerSettings
from segadapt.trainables.core.training.trainer import Trainer

PROBE_STEPS = 4
"""Steps measured of each kind of stage; the first is left out of the median."""

PROBE_IMAGES = 16
"""Images of each set that the preparation of stages and the evaluation of a probe look at; times are scaled up."""


@dataclass(frozen=True)
class StageProbe:
    """One stage as it was measured; the preparation is scaled to all images."""

    step_s: float
    """Median time of a step; 0 for a stage that only prepares."""
    preparation_s: float
    artifact_bytes: int
    """What the preparation writes, such as pseudo labels."""


@dataclass(frozen=True)
class Probe:
    """What a few steps of a method took."""

    start_s: float
    """Loading the data and building the networks."""
    stages: Mapping[str, StageProbe]
    """Stages by name; those of one kind are measured once."""
    evaluation_s: float
    """An evaluation of all validation images with the writing of its checkpoint."""
    memory_bytes: int
    """Peak: of the tensors on the GPU, or of the whole process where there is no GPU."""
    checkpoint_bytes: int
    micro_batch: int
    """Images per micro-batch and worker; smaller than asked for if the device's memory was short."""
    fingerprint: str

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Probe":
        """Rebuild what `dataclasses.asdict` returned."""
        stages = {name: StageProbe(**stage) for name, stage in content["stages"].items()}
        return cls(**{**content, "stages": stages})


def run_probe(method: str, config: TrialConfig, threads: float, shared_threads: float) -> Probe:
    """Measure a method in a fresh process.

    Args:
        method: Name of the method.
        config: Configuration of one worker.
        threads: Threads of a trial's worker.
        shared_threads: Threads of the trial that computes the shared stages.

    Raises:
        UsageError: If it fails; says why.
    """
    with tempfile.TemporaryDirectory(prefix="segadapt-probe-") as name:
        request, answer = Path(name) / "request.json", Path(name) / "answer.json"
        values = dict(flatten(config.as_dict()))
        asked = {"method": values.pop("method_name"), "values": values, "threads": threads}
        request.write_text(json.dumps(asked | {"shared_threads": shared_threads}))
        done = _run_in_process(Path(name), request, answer)
        if done.returncode == 0:
            return Probe.from_dict(json.loads(answer.read_text()))
    lines = done.stderr.strip().splitlines()
    reason = "it was killed, as a rule for want of memory" if done.returncode < 0 else lines[-1] if lines else "unknown"
    raise UsageError(f"A few steps of {method} must run on this machine, but: {reason}. Change its settings.")


def _run_in_process(folder: Path, request: Path, answer: Path) -> "subprocess.CompletedProcess[str]":
    """Run this module in a process of its own, which ends when this one does, in whatever way."""
    ends_with_us, ours = os.pipe()
    try:
        with signal_handlers_kept():
            treat_termination_as_interrupt()
            return subprocess.run(
                [sys.executable, "-m", "segadapt.platform.experiment.probe", str(request), str(answer)],
                cwd=folder,
                env=worker_environment(),
                stdin=ends_with_us,
                capture_output=True,
                text=True,
                check=False,
            )
    finally:
        os.close(ends_with_us)
        os.close(ours)


@dataclass
class _Timing:
    """Marks of one stage: the begin of its preparation, of each step, of the evaluation; and what was read before."""

    marks: list[float] = field(default_factory=list)
    reads: tuple[int, int] = (0, 0)
    """Source and target images that the preparation read."""


class _TimedTrainer(Trainer):
    """The trainer with a clock."""

    def prepare(self, source: "_First", target: "_First", threads: float, shared_threads: float) -> None:
        """Say whose reads are counted, and how many threads trials and shared stages have."""
        self.timings: dict[str, _Timing] = {}
        self.evaluations: list[float] = []
        self._sets = (source, target)
        self._threads = {False: max(1, int(threads)), True: max(1, int(shared_threads))}
        self.steps = {name: PROBE_STEPS if steps > 0 else 0 for name, steps in self.steps.items()}

    def run_stage(self, stage: Stage, *arguments: Any) -> None:
        torch.set_num_threads(self._threads[stage.shared])
        self._timing = self.timings[stage.name] = _Timing()
        super().run_stage(stage, *arguments)

    def stage_data(self, *arguments: Any) -> StageData:
        self._before = [images.reads for images in self._sets]
        self._mark()  # after the optimiser, whose first one in a process takes seconds to import
        return super().stage_data(*arguments)

    def step(self, *arguments: Any) -> dict[str, torch.Tensor] | None:
        self._mark()
        return super().step(*arguments)

    def evaluate_and_report(self, *arguments: Any) -> None:
        self._mark()
        super().evaluate_and_report(*arguments)
        self._wait()
        self.evaluations.append(time.perf_counter() - self._timing.marks[-1])

    def _state(self, stage: Stage, step: int, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Add the optimiser's state, which checkpoints have except at the end of a stage."""
        return super()._state(stage, step, optimizer) | {"optimizer": optimizer.state_dict()}

    def _mark(self) -> None:
        self._wait()
        if len(self._timing.marks) == 1:
            source, target = (images.reads - before for images, before in zip(self._sets, self._before, strict=True))
            self._timing.reads = (source, target)
        self._timing.marks.append(time.perf_counter())

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _First:
    """The first images of a set; counts the reads."""

    def __init__(self, images: TargetImages) -> None:
        self.ids = images.ids[:PROBE_IMAGES]
        self.factor = len(images) / max(1, len(self.ids))  # a target may have no validation label
        self.reads = 0
        self._images = images

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> torch.Tensor:
        self.reads += 1
        return self._images.image(index)


class _FirstLabelled(_First):
    """The first images of a labelled set; counts the reads."""

    def __init__(self, images: LabelledImages) -> None:
        super().__init__(images)
        self._labelled = images

    def label(self, index: int) -> torch.Tensor:
        return self._labelled.label(index)


def measure(config: TrialConfig, folder: Path, threads: float, shared_threads: float) -> Probe:
    """Run a few steps of each kind of stage of a method in this process.

    Args:
        config: Configuration of one worker.
        folder: Folder for what stages write, and for checkpoints.
        threads: Threads of a trial's worker.
        shared_threads: Threads of the trial that computes the shared stages.
    """
    torch.set_num_threads(max(1, int(threads)))
    started = time.perf_counter()
    data, evaluation = load_data(config.data)
    method = build_method(config, len(data.classes))
    start_s = time.perf_counter() - started
    source, target = _FirstLabelled(data.source), _First(data.target)
    validation = _FirstLabelled(evaluation.source), _First(evaluation.scored)
    plan = [stage for part in split_plan(config) for stage in part]
    representative = {stage.name: next(s for s in plan if _kind(s) == _kind(stage)) for stage in plan}
    sizes: list[int] = []

    def report(metrics: dict[str, Any], write: Any) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            write(Path(name))
            sizes.append(folder_size(Path(name)))

    trainer = _TimedTrainer(
        method,
        tuple(stage for stage in plan if representative[stage.name] is stage),
        dataclasses.replace(data, source=source, target=target),
        dataclasses.replace(
            evaluation, source=validation[0], target=_FirstLabelled(evaluation.target), scored=validation[1]
        ),
        TrainerSettings(
            trainer=dataclasses.replace(config.trainer, eval_every=2**31, evaluate_start=False),
            optimizer=config.optimizer,
            augmentation=config.augmentation,
            seed=config.seed,
        ),
        report,
        folder / "artifacts",
    )
    trainer.prepare(source, target, threads, shared_threads)
    trainer.run()
    measured = {
        name: _stage_probe(timing, (source.factor, target.factor), folder_size(trainer.folder / name))
        for name, timing in trainer.timings.items()
    }
    return Probe(
        start_s=start_s,
        stages={stage.name: measured[representative[stage.name].name] for stage in plan},
        evaluation_s=median(trainer.evaluations) * mean(images.factor for images in validation),
        memory_bytes=torch.cuda.max_memory_allocated() if trainer.device.type == "cuda" else peak_memory(),
        checkpoint_bytes=max(sizes),
        micro_batch=trainer.micro_batch,
        fingerprint=data.fingerprint,
    )


def _kind(stage: Stage) -> tuple[Any, ...]:
    """Return what decides the cost of a stage: rounds of a method cost the same."""
    return type(stage), stage.shared, stage.domains, stage.trains, stage.pseudo_labels, stage.share > 0


def _stage_probe(timing: _Timing, factors: tuple[float, float], written: int) -> StageProbe:
    steps = [after - before for before, after in zip(timing.marks[1:], timing.marks[2:], strict=False)]
    read = sum(timing.reads)
    scaled = sum(count * factor for count, factor in zip(timing.reads, factors, strict=True)) / read if read else 1.0
    return StageProbe(
        step_s=median(steps[1:]) if steps else 0.0,
        preparation_s=(timing.marks[1] - timing.marks[0]) * scaled,
        artifact_bytes=round(written * factors[1]),
    )


def peak_memory() -> int:
    """Return the most memory this process had, in bytes."""
    if Path("/proc/self/status").is_file():  # getrusage would count what the starting process had
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(request: str, answer: str) -> None:
    """Measure what the file `request` asks for and write the result to the file `answer`."""
    threading.Thread(target=_end_with_starter, args=(Path(request).parent,), daemon=True).start()
    import ray.tune  # noqa: F401  # a trial's process holds it as well

    asked = json.loads(Path(request).read_text())
    config = resolve(asked["method"], asked["values"])
    probe = measure(config, Path(request).parent, asked["threads"], asked["shared_threads"])
    Path(answer).write_text(json.dumps(dataclasses.asdict(probe)))


def _end_with_starter(folder: Path) -> None:
    """End this process, and remove its folder, once the one that started it has gone: it can no longer do that."""
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written to it
    shutil.rmtree(folder, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
