"""What a search will take: a few real steps of each method in a process of their own, and what follows from them.

Started as `python -m segadapt.platform.cost REQUEST ANSWER`, it is that process.
"""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from segadapt.platform import stages
from segadapt.platform.cluster import this_machine, worker_environment
from segadapt.platform.config import TrialConfig, resolve
from segadapt.platform.errors import UsageError
from segadapt.platform.experiments import Options, Record, check_gpu_hours, resources_of
from segadapt.platform.objective import Objective
from segadapt.platform.storage import Storage
from segadapt.platform.trial import Resources, build_method
from segadapt.trainables.core.data.batch import LabelledImages, TargetImages
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.method import Stage, StageData
from segadapt.trainables.core.training.config import TrainerSettings, stage_steps
from segadapt.trainables.core.training.trainer import Trainer

PROBE_STEPS = 4
"""Steps measured of each kind of stage; the first is left out of the median."""

PROBE_IMAGES = 16
"""Images of each set that the preparation of stages and the evaluation of a probe look at; times are scaled up."""

KEPT_CHECKPOINTS = 2
"""Checkpoints that are kept of a trial: the best and the last one."""


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
    """By name; stages of one kind are measured once."""
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
        found = {name: StageProbe(**stage) for name, stage in content["stages"].items()}
        return cls(**{**content, "stages": found})


@dataclass(frozen=True)
class MethodCost:
    """What the trials of one method are predicted to take, at the settings of its first trial."""

    probe: Probe
    trial_s: float
    """A full trial, without the shared stages."""
    first_rung_s: float
    """From its start to the first comparison with other trials."""
    early_stopped_s: float
    """A trial on average, if half of the trials end at each rung."""
    shared_s: float
    """Its shared stages, those left out that are computed already or come with a method before it."""
    trial_bytes: int
    """The checkpoints of a trial and what its stages write."""
    checkpoints_bytes: int
    """The checkpoints alone."""
    shared_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What a search is predicted to take. Times are wall times in seconds."""

    methods: Mapping[str, MethodCost]
    concurrent: int
    """Trials at a time."""
    device: str
    """What the memory is of: `GPU` or `process`."""
    memory_limit: int | None
    """Bytes that a worker may take; None for a cluster that was not asked."""
    free_bytes: int
    """On the disk of the storage folder."""
    shared_s: float
    search_s: float
    """Shared stages, all trials without early stopping, equally many of each method, and those of `--rerank`."""
    early_stopped_s: float
    """The same if half of the trials end at each rung."""
    gpu_hours: float
    """Of `search_s`."""
    storage_bytes: int
    notes: Sequence[str]
    problems: Sequence[str]
    """Why the search cannot run as asked."""

    def check(self) -> None:
        """Refuse what cannot fit.

        Raises:
            UsageError: If there are problems; names all of them.
        """
        if self.problems:
            raise UsageError("\n".join(self.problems))


def estimate(record: Record, options: Options) -> Estimate:
    """Measure a few steps of each method of a planned search on this machine and predict what the search takes.

    Leaves nothing behind and starts no Ray.

    Raises:
        UsageError: If this machine can never run a trial, or a probe fails.
    """
    capacity = this_machine()
    resources, concurrent = _resources(record, options)
    threads = resources_of(options, capacity, 1, 1)[0].cpus if options.address is None else capacity.cpus
    configs = record.configs()
    probes = {}
    for method, config in configs.items():
        options.say(f"measuring {PROBE_STEPS} steps of each stage of {method} ...")
        probes[method] = run_probe(method, _one_worker(config, resources.workers), resources.cpus, threads)

    storage = Storage(Path(options.storage).expanduser().absolute())
    computed: set[str] = set()
    methods = {}
    for method, probe in probes.items():
        shared_config = resolve(method, record.candidates[method].fixed)
        keys = stages.stage_keys(shared_config, probe.fingerprint)
        missing = [key for key in keys if key.hash not in computed and stages.find(storage, key) is None]
        computed |= {key.hash for key in keys}
        rungs = _rungs(configs) if record.scheduler != "none" else []
        methods[method] = _method_cost(configs[method], probe, rungs, tuple(key.stage for key in missing))

    shared_s = sum(cost.shared_s for cost in methods.values())
    shared_bytes = sum(cost.shared_bytes for cost in methods.values())
    per_trial = record.trials / len(methods)
    trial_s = mean(cost.trial_s for cost in methods.values())
    stopped_s = mean(cost.early_stopped_s for cost in methods.values())
    waves = math.ceil(record.trials / concurrent)
    again = record.rerank * record.seeds
    warm_ups_s = record.seeds * mean(_warm_ups(configs, probes))
    again_s = math.ceil(again / concurrent) * trial_s + warm_ups_s
    longest = max(cost.trial_s for cost in methods.values())
    on_gpu = resources.gpus > 0 and torch.cuda.is_available()
    found = Estimate(
        methods=methods,
        concurrent=concurrent,
        device="GPU" if on_gpu else "process",
        memory_limit=None if options.address else _memory_limit(resources, concurrent, on_gpu=on_gpu),
        free_bytes=shutil.disk_usage(_existing(storage.root)).free,
        shared_s=shared_s,
        search_s=shared_s + waves * trial_s + again_s,
        early_stopped_s=shared_s + max(longest, record.trials / concurrent * stopped_s) + again_s,
        gpu_hours=(shared_s + warm_ups_s + (record.trials + again) * trial_s)
        * resources.workers
        * resources.gpus
        / 3600,
        storage_bytes=round(
            shared_bytes
            + (per_trial + again / len(methods)) * sum(cost.trial_bytes for cost in methods.values())
            - _removed(record, concurrent) * mean(cost.checkpoints_bytes for cost in methods.values())
            + max(probe.checkpoint_bytes for probe in probes.values())  # the best one's copy in MLflow
        ),
        notes=tuple(_notes(record, options, resources, probes, configs)),
        problems=(),
    )
    return dataclasses.replace(found, problems=tuple(_problems(found, record, storage)))


def _resources(record: Record, options: Options) -> tuple[Resources, int]:
    """Return what a trial takes and how many run at a time; on a cluster that is not asked, what this machine can."""
    capacity = this_machine()
    if options.address is None:
        resources, concurrent = resources_of(options, capacity, record.trials, record.concurrent)
        check_gpu_hours(record, resources)
        return resources, concurrent
    gpus = options.gpus if options.gpus is not None else float(capacity.gpus > 0)
    return Resources(options.workers, gpus, 1, options.launcher), min(record.concurrent or 1, record.trials)


def _one_worker(config: TrialConfig, workers: int) -> TrialConfig:
    """Return the configuration of the share that one of several workers has."""
    size = max(1, config.trainer.batch_size // workers)
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, batch_size=size))


def _method_cost(config: TrialConfig, probe: Probe, rungs: Sequence[int], missing: tuple[Stage, ...]) -> MethodCost:
    own = stages.split_plan(config)[1]
    steps = stage_steps(own, config.warmup.steps, config.trainer.steps)
    total = sum(steps.values())
    levels = [rung for rung in rungs if rung < total]
    shared_steps = stage_steps(missing, config.warmup.steps, config.trainer.steps)
    return MethodCost(
        probe=probe,
        trial_s=_seconds(probe, own, steps, config, total),
        first_rung_s=_seconds(probe, own, steps, config, levels[0] if levels else total),
        early_stopped_s=_early_stopped([_seconds(probe, own, steps, config, step) for step in (*levels, total)]),
        shared_s=_seconds(probe, missing, shared_steps, config, sum(shared_steps.values())) if missing else 0.0,
        trial_bytes=KEPT_CHECKPOINTS * probe.checkpoint_bytes + sum(probe.stages[s.name].artifact_bytes for s in own),
        checkpoints_bytes=KEPT_CHECKPOINTS * probe.checkpoint_bytes,
        shared_bytes=(len(missing) + KEPT_CHECKPOINTS) * probe.checkpoint_bytes if missing else 0,
    )


def _removed(record: Record, concurrent: int) -> int:
    """Return the trials whose checkpoints are gone when the search ends and takes the most space.

    Paused trials keep theirs until the end, and of several goals nobody knows beforehand how many trials are best.
    """
    if (
        record.keep_top is None
        or record.scheduler == "asha-promote"
        or len(Objective.parse(record.objective).goals) > 1
    ):
        return 0
    held = max(record.keep_top, record.rerank) + concurrent
    return max(0, record.trials - held) + max(0, record.rerank * record.seeds - held)


def _warm_ups(configs: Mapping[str, TrialConfig], probes: Mapping[str, Probe]) -> list[float]:
    """Return how long the shared stages of each method take, computed anew."""
    seconds = []
    for method, config in configs.items():
        shared = stages.split_plan(config)[0]
        steps = stage_steps(shared, config.warmup.steps, config.trainer.steps)
        seconds.append(_seconds(probes[method], shared, steps, config, sum(steps.values())) if shared else 0.0)
    return seconds


def _rungs(configs: Mapping[str, TrialConfig]) -> list[int]:
    """Return the steps at which the search compares trials, as `experiments` plans them."""
    from segadapt.platform.rungs import levels

    steps = max(stages.own_steps(config) for config in configs.values())
    return levels(min(steps, *(config.trainer.eval_every for config in configs.values())), steps)


def _early_stopped(seconds: Sequence[float]) -> float:
    """Return the mean time of a trial; `seconds` is what it takes to reach each rung and the end."""
    from segadapt.platform.rungs import REDUCTION_FACTOR

    parts = [after - before for before, after in zip((0.0, *seconds), seconds, strict=False)]
    return sum((part / REDUCTION_FACTOR**passed for passed, part in enumerate(parts)), 0.0)


def _seconds(probe: Probe, plan: Sequence[Stage], steps: Mapping[str, int], config: TrialConfig, until: int) -> float:
    """Return the time from the start of a trial of these stages to the evaluation at step `until`."""
    done, seconds = 0, probe.start_s + probe.evaluation_s * config.trainer.evaluate_start
    for stage in plan:
        if done >= until and steps[stage.name] > 0:
            break
        taken = min(steps[stage.name], until - done)
        found, every = probe.stages[stage.name], config.trainer.eval_every
        evaluations = (done + taken) // every - done // every
        ends_between = taken == steps[stage.name] and (taken == 0 or (done + taken) % every != 0)
        seconds += found.preparation_s + taken * found.step_s + (evaluations + ends_between) * probe.evaluation_s
        done += taken
    return seconds


def _memory_limit(resources: Resources, concurrent: int, *, on_gpu: bool) -> int:
    if on_gpu:
        return int(torch.cuda.get_device_properties(0).total_memory * min(1.0, resources.gpus))
    return available_memory() // (concurrent * resources.workers)


def available_memory() -> int:
    """Return the bytes of memory that new processes may take on this machine, or in this container."""
    found = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if Path("/proc/meminfo").is_file():  # counts what the system would give up, such as cached files
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found = [int(lines["MemAvailable"].split()[0]) * 1024]
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()) != "max":
        found.append(int(limit) - int((group / "memory.current").read_text()))
    return max(0, min(found))


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)


def _notes(
    record: Record,
    options: Options,
    resources: Resources,
    probes: Mapping[str, Probe],
    configs: Mapping[str, TrialConfig],
) -> Iterator[str]:
    if options.address is not None:
        yield (
            f"The probe ran on this machine; the cluster {options.address} was not asked. Counted with "
            f"{record.concurrent or 1} trials at a time (--concurrent)."
        )
    if resources.workers > 1:
        yield "The probe ran one worker's share of the batch; what workers exchange is not in its times."
    if resources.gpus < 1 and torch.cuda.is_available() and resources.gpus > 0:
        yield "The probe had the GPU to itself; trials that share one are slower than its times."
    for method, probe in probes.items():
        asked = _one_worker(configs[method], resources.workers).trainer.batch_size
        if probe.micro_batch < asked:
            yield f"{method}: {asked} images do not fit the device; micro-batches of {probe.micro_batch} are used."


def _problems(found: Estimate, record: Record, storage: Storage) -> Iterator[str]:
    for method, cost in found.methods.items():
        if found.memory_limit is not None and cost.probe.memory_bytes > found.memory_limit:
            yield (
                f"A worker of {method} must fit {_gib(found.memory_limit)} ({found.device} memory, {found.concurrent} "
                f"trials at a time), but takes {_gib(cost.probe.memory_bytes)}. Lower --concurrent, "
                "trainer.batch_size (and raise trainer.accumulate) or augmentation.crop, or raise --gpus-per-trial."
            )
        if record.time_budget_s is not None and record.time_budget_s < cost.first_rung_s:
            yield (
                f"--time-budget must let a trial of {method} reach the first rung, after about "
                f"{cost.first_rung_s:.0f} s, but is {record.time_budget_s:g} s. Raise it, or lower trainer.eval_every."
            )
    if found.storage_bytes > found.free_bytes:
        yield (
            f"The disk of --storage must have about {_gib(found.storage_bytes)} free, but {storage.root} has "
            f"{_gib(found.free_bytes)}. Free some space, choose another folder, lower --trials or take --keep-top."
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def run_probe(method: str, config: TrialConfig, threads: float, shared_threads: float) -> Probe:
    """Measure a method in a fresh process.

    Args:
        method: Its name.
        config: Of one worker.
        threads: Of a trial's worker.
        shared_threads: Of the trial that computes the shared stages.

    Raises:
        UsageError: If it fails; says why.
    """
    with tempfile.TemporaryDirectory(prefix="segadapt-probe-") as name:
        request, answer = Path(name) / "request.json", Path(name) / "answer.json"
        values = flat(config)
        request.write_text(
            json.dumps({"method": method, "values": values, "threads": threads, "shared_threads": shared_threads})
        )
        done = subprocess.run(
            [sys.executable, "-m", "segadapt.platform.cost", str(request), str(answer)],
            cwd=name,
            env=worker_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return Probe.from_dict(json.loads(answer.read_text()))
    lines = done.stderr.strip().splitlines()
    reason = "it was killed, as a rule for want of memory" if done.returncode < 0 else lines[-1] if lines else "unknown"
    raise UsageError(
        f"A few steps of {method} must run on this machine, but: {reason}. "
        "Change its settings; --no-probe prints the plan alone."
    )


def flat(config: TrialConfig) -> dict[str, Any]:
    """Return a configuration as settings by dotted key."""
    from segadapt.platform.config import flatten

    content = config.as_dict()
    content.pop("method_name")
    return dict(flatten(content))


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
        self.factor = len(images) / len(self.ids)
        self.reads = 0
        self._images = images

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> torch.Tensor:
        self.reads += 1
        return self._images.image(index)


class _FirstLabelled(_First):
    """The same with labels."""

    def __init__(self, images: LabelledImages) -> None:
        super().__init__(images)
        self._labelled = images

    def label(self, index: int) -> torch.Tensor:
        return self._labelled.label(index)


def measure(config: TrialConfig, folder: Path, threads: float, shared_threads: float) -> Probe:
    """Run a few steps of each kind of stage of a method in this process.

    Args:
        config: Of one worker.
        folder: For what stages write, and for checkpoints.
        threads: Of a trial's worker.
        shared_threads: Of the trial that computes the shared stages.
    """
    torch.set_num_threads(max(1, int(threads)))
    started = time.perf_counter()
    data, evaluation = load_data(config.data)
    method = build_method(config, len(data.classes))
    start_s = time.perf_counter() - started
    source, target = _FirstLabelled(data.source), _First(data.target)
    shown = _FirstLabelled(evaluation.source), _FirstLabelled(evaluation.target)
    plan = [stage for part in stages.split_plan(config) for stage in part]
    representative = {stage.name: next(s for s in plan if _kind(s) == _kind(stage)) for stage in plan}
    sizes: list[int] = []

    def report(metrics: dict[str, Any], write: Any) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            write(Path(name))
            sizes.append(_size(Path(name)))

    trainer = _TimedTrainer(
        method,
        tuple(stage for stage in plan if representative[stage.name] is stage),
        dataclasses.replace(data, source=source, target=target),
        dataclasses.replace(evaluation, source=shown[0], target=shown[1]),
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
        name: _stage_probe(timing, (source.factor, target.factor), _size(trainer.folder / name))
        for name, timing in trainer.timings.items()
    }
    return Probe(
        start_s=start_s,
        stages={stage.name: measured[representative[stage.name].name] for stage in plan},
        evaluation_s=median(trainer.evaluations) * mean(images.factor for images in shown),
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


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def peak_memory() -> int:
    """Return the most memory this process had, in bytes."""
    if Path("/proc/self/status").is_file():  # getrusage would count what the starting process had
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(request: str, answer: str) -> None:
    """Measure what the file `request` asks for and write the result to the file `answer`."""
    import ray.tune  # noqa: F401  # a trial's process holds it as well

    content = json.loads(Path(request).read_text())
    config = resolve(content["method"], content["values"])
    probe = measure(config, Path(request).parent, content["threads"], content["shared_threads"])
    Path(answer).write_text(json.dumps(dataclasses.asdict(probe)))


if __name__ == "__main__":
    main(*sys.argv[1:])
