"""What a search will take: what follows from a few measured steps of each method."""

import dataclasses
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from segadapt.platform.cluster.capacity import resources_of, this_machine
from segadapt.platform.errors import UsageError
from segadapt.platform.experiment.probe import PROBE_STEPS, Probe, run_probe
from segadapt.platform.experiment.record import Options, Record
from segadapt.platform.experiment.session import check_gpu_hours, check_workers
from segadapt.platform.search.horizon import REDUCTION_FACTOR, levels
from segadapt.platform.search.schedulers import SCHEDULERS
from segadapt.platform.settings.config import TrialConfig
from segadapt.platform.settings.objective import Objective
from segadapt.platform.settings.resources import Allocation
from segadapt.platform.storage.folders import Storage
from segadapt.platform.storage.stage_keys import own_steps, split_plan, stage_keys
from segadapt.platform.storage.stages import find
from segadapt.platform.storage.weights import weights_hash, weights_origin, with_stored_weights
from segadapt.trainables.core.method import Stage
from segadapt.trainables.core.training.config import stage_steps

KEPT_CHECKPOINTS = 2
"""Checkpoints that are kept of a trial: the best and the last one."""


@dataclass(frozen=True)
class MethodCost:
    """What the trials of one method are predicted to take, at the settings of its first trial."""

    probe: Probe
    trial_s: float
    """A full trial, without the shared stages."""
    first_rung_s: float
    """A trial from its start to the first comparison with other trials."""
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
    """Whose memory is meant: that of a `GPU` or of a `process`."""
    memory_limit: int | None
    """Bytes that a worker may take; None for a cluster that was not asked."""
    free_bytes: int
    """Free bytes on the disk of the storage folder."""
    shared_s: float
    search_s: float
    """Shared stages, all trials without early stopping, equally many of each method, and those of `--rerank`."""
    early_stopped_s: float
    """The search if half of the trials end at each rung."""
    gpu_hours: float
    """GPU hours that are spent in `search_s`."""
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
    check_workers(record, options.resources.workers)
    resources, concurrent = _resources(record, options)
    configs = record.configs
    probes = _probes(record, options, resources)
    storage = options.place.folders
    methods = _method_costs(record, storage, probes)

    shared_s = sum(cost.shared_s for cost in methods.values())
    trial_s = mean(cost.trial_s for cost in methods.values())
    stopped_s = mean(cost.early_stopped_s for cost in methods.values())
    longest_s = max(cost.trial_s for cost in methods.values())
    again = record.repetitions
    warm_ups_s = record.seeds * mean(_warm_ups(configs, probes))
    again_s = math.ceil(again / concurrent) * trial_s + warm_ups_s
    busy_s = shared_s + warm_ups_s + (record.trials + again) * trial_s
    on_gpu = resources.gpus > 0 and torch.cuda.is_available()
    estimated = Estimate(
        methods=methods,
        concurrent=concurrent,
        device="GPU" if on_gpu else "process",
        memory_limit=None if options.address is not None else _memory_limit(resources, concurrent, on_gpu=on_gpu),
        free_bytes=shutil.disk_usage(_existing(storage.root)).free,
        shared_s=shared_s,
        search_s=shared_s + math.ceil(record.trials / concurrent) * trial_s + again_s,
        early_stopped_s=shared_s + max(longest_s, record.trials / concurrent * stopped_s) + again_s,
        gpu_hours=busy_s * resources.workers * resources.gpus / 3600,
        storage_bytes=_storage_bytes(record, concurrent, methods),
        notes=tuple(_notes(record, options, resources, probes, configs)),
        problems=(),
    )
    return dataclasses.replace(estimated, problems=tuple(_problems(estimated, record, storage)))


def _probes(record: Record, options: Options, resources: Allocation) -> dict[str, Probe]:
    """Measure each method, as one worker of its trials would run it."""
    capacity = this_machine()
    threads = resources_of(options.resources, capacity, 1, 1)[0].cpus if options.address is None else capacity.cpus
    probes = {}
    for method, config in record.configs.items():
        options.say(f"measuring {PROBE_STEPS} steps of each stage of {method} ...")
        network = with_stored_weights(config.network, options.place.folders)
        measured = _one_worker(dataclasses.replace(config, network=network), resources.workers)
        probes[method] = run_probe(method, measured, resources.cpus, threads)
    return probes


def _method_costs(record: Record, storage: Storage, probes: Mapping[str, Probe]) -> dict[str, MethodCost]:
    """Return what the trials of each method take; shared stages count for the first method that needs them."""
    configs = record.configs
    rungs = _rungs(configs) if SCHEDULERS[record.scheduler].compares else []
    computed: set[str] = set()
    costs = {}
    for method, probe in probes.items():
        config = record.shared_configs[method]
        keys = stage_keys(config, probe.fingerprint, weights=weights_hash(config.network, storage))
        missing = [key for key in keys if key.hash not in computed and find(storage, key) is None]
        computed |= {key.hash for key in keys}
        costs[method] = _method_cost(configs[method], probe, rungs, tuple(key.stage for key in missing))
    return costs


def _storage_bytes(record: Record, concurrent: int, methods: Mapping[str, MethodCost]) -> int:
    """Return what the search leaves on the disk, the copy of the best checkpoint in MLflow included."""
    trials_of_each = (record.trials + record.repetitions) / len(methods)
    removed = _removed(record, concurrent) * mean(cost.checkpoints_bytes for cost in methods.values())
    return round(
        sum(cost.shared_bytes + trials_of_each * cost.trial_bytes for cost in methods.values())
        - removed
        + max(cost.probe.checkpoint_bytes for cost in methods.values())
    )


def _resources(record: Record, options: Options) -> tuple[Allocation, int]:
    """Return what a trial takes and how many run at a time; on a cluster that is not asked, what this machine can."""
    capacity = this_machine()
    if options.address is None:
        resources, concurrent = resources_of(options.resources, capacity, record.trials, record.concurrent)
        check_gpu_hours(record, resources)
        return resources, concurrent
    gpus = options.resources.gpus if options.resources.gpus is not None else float(capacity.gpus > 0)
    return Allocation(options.resources.workers, gpus, 1, options.resources.launcher), min(
        record.concurrent or 1, record.trials
    )


def _one_worker(config: TrialConfig, workers: int) -> TrialConfig:
    """Return the configuration of the share that one of several workers has."""
    size = max(1, config.trainer.batch_size // workers)
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, batch_size=size))


def _method_cost(config: TrialConfig, probe: Probe, rungs: Sequence[int], missing: tuple[Stage, ...]) -> MethodCost:
    plan = split_plan(config)[1]
    steps = stage_steps(plan, config.warmup.steps, config.trainer.steps)
    total = sum(steps.values())
    levels = [rung for rung in rungs if rung < total]
    shared_steps = stage_steps(missing, config.warmup.steps, config.trainer.steps)
    return MethodCost(
        probe=probe,
        trial_s=_seconds(probe, plan, steps, config, total),
        first_rung_s=_seconds(probe, plan, steps, config, levels[0] if levels else total),
        early_stopped_s=_early_stopped([_seconds(probe, plan, steps, config, step) for step in (*levels, total)]),
        shared_s=_seconds(probe, missing, shared_steps, config, sum(shared_steps.values())) if missing else 0.0,
        trial_bytes=KEPT_CHECKPOINTS * probe.checkpoint_bytes + sum(probe.stages[s.name].artifact_bytes for s in plan),
        checkpoints_bytes=KEPT_CHECKPOINTS * probe.checkpoint_bytes,
        shared_bytes=(len(missing) + KEPT_CHECKPOINTS) * probe.checkpoint_bytes if missing else 0,
    )


def _removed(record: Record, concurrent: int) -> int:
    """Return the trials whose checkpoints are gone when the search ends and takes the most space.

    Paused trials keep theirs until the end, and of several goals nobody knows beforehand how many trials are best.
    """
    if (
        record.keep_top is None
        or SCHEDULERS[record.scheduler].keeps_paused
        or len(Objective.parse(record.objective).goals) > 1
    ):
        return 0
    held = max(record.keep_top, record.rerank) + concurrent
    return max(0, record.trials - held) + max(0, record.repetitions - held)


def _warm_ups(configs: Mapping[str, TrialConfig], probes: Mapping[str, Probe]) -> list[float]:
    """Return how long the shared stages of each method take, computed anew."""
    seconds = []
    for method, config in configs.items():
        shared = split_plan(config)[0]
        steps = stage_steps(shared, config.warmup.steps, config.trainer.steps)
        seconds.append(_seconds(probes[method], shared, steps, config, sum(steps.values())) if shared else 0.0)
    return seconds


def _rungs(configs: Mapping[str, TrialConfig]) -> list[int]:
    """Return the steps at which the search compares trials, as `session` plans them."""
    steps = max(own_steps(config) for config in configs.values())
    return levels(min(steps, *(config.trainer.eval_every for config in configs.values())), steps)


def _early_stopped(seconds: Sequence[float]) -> float:
    """Return the mean time of a trial; `seconds` is what it takes to reach each rung and the end."""
    parts = [after - before for before, after in zip((0.0, *seconds), seconds, strict=False)]
    return sum((part / REDUCTION_FACTOR**passed for passed, part in enumerate(parts)), 0.0)


def _seconds(probe: Probe, plan: Sequence[Stage], steps: Mapping[str, int], config: TrialConfig, until: int) -> float:
    """Return the time from the start of a trial of these stages to the evaluation at step `until`."""
    done, seconds = 0, probe.start_s + probe.evaluation_s * config.trainer.evaluate_start
    for stage in plan:
        if done >= until and steps[stage.name] > 0:
            break
        taken = min(steps[stage.name], until - done)
        measured, every = probe.stages[stage.name], config.trainer.eval_every
        evaluations = (done + taken) // every - done // every
        ends_between = taken == steps[stage.name] and (taken == 0 or (done + taken) % every != 0)
        seconds += measured.preparation_s + taken * measured.step_s + (evaluations + ends_between) * probe.evaluation_s
        done += taken
    return seconds


def _memory_limit(resources: Allocation, concurrent: int, *, on_gpu: bool) -> int:
    if on_gpu:
        return int(torch.cuda.get_device_properties(0).total_memory * min(1.0, resources.gpus))
    return available_memory() // (concurrent * resources.workers)


def available_memory() -> int:
    """Return the bytes of memory that new processes may take on this machine, or in this container."""
    limits = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if Path("/proc/meminfo").is_file():  # counts what the system would give up, such as cached files
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        limits = [int(lines["MemAvailable"].split()[0]) * 1024]
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()) != "max":
        limits.append(int(limit) - int((group / "memory.current").read_text()))
    return max(0, min(limits))


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)


def _notes(
    record: Record,
    options: Options,
    resources: Allocation,
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
    yield from weights_notes(configs, options.place.folders)


def weights_notes(configs: Mapping[str, TrialConfig], storage: Storage) -> list[str]:
    """Return what the networks of methods start from, and under which licences that is."""
    origins = {method: weights_origin(config.network, storage) for method, config in configs.items()}
    return [
        f"{method} starts from the weights of {origin.source}, licence {origin.licence}."
        for method, origin in origins.items()
        if origin is not None
    ]


def _problems(estimated: Estimate, record: Record, storage: Storage) -> Iterator[str]:
    for method, cost in estimated.methods.items():
        if estimated.memory_limit is not None and cost.probe.memory_bytes > estimated.memory_limit:
            yield (
                f"A worker of {method} must fit {_gib(estimated.memory_limit)} ({estimated.device} memory, "
                f"{estimated.concurrent} trials at a time), but takes {_gib(cost.probe.memory_bytes)}. "
                "Lower --concurrent, trainer.batch_size (and raise trainer.accumulate) or augmentation.crop, or raise "
                "--gpus-per-trial."
            )
        if record.time_budget_s is not None and record.time_budget_s < cost.first_rung_s:
            yield (
                f"--time-budget must let a trial of {method} reach the first rung, after about "
                f"{cost.first_rung_s:.0f} s, but is {record.time_budget_s:g} s. Raise it, or lower trainer.eval_every."
            )
    if estimated.storage_bytes > estimated.free_bytes:
        yield (
            f"The disk of --storage must have about {_gib(estimated.storage_bytes)} free, but {storage.root} has "
            f"{_gib(estimated.free_bytes)}. Free some space, choose another folder, lower --trials or take --keep-top."
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
