"""The one trainer of all methods: devices, precision, data parallelism, optimisation, stages, checkpoints, reports.

It knows neither Ray nor MLflow: results leave through a `Report` function.
"""

import contextlib
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from segadapt.trainables.core import distributed
from segadapt.trainables.core.data.batch import IGNORE_INDEX, DomainBatch, DomainData, EvaluationData
from segadapt.trainables.core.data.loading import (
    BatchSource,
    ResizedImages,
    ResizedTargetImages,
    evaluation_for_network,
    in_step,
    one_pass,
)
from segadapt.trainables.core.data.sampling import derived_seed
from segadapt.trainables.core.evaluation.evaluate import Evaluation, evaluate
from segadapt.trainables.core.evaluation.gallery import save_gallery
from segadapt.trainables.core.evaluation.inference import Inference
from segadapt.trainables.core.evaluation.label_free import ScoredImages, label_free_scores
from segadapt.trainables.core.journal import note
from segadapt.trainables.core.labelling.files import PseudoLabelFolder, read_provenance
from segadapt.trainables.core.labelling.rules import by_network
from segadapt.trainables.core.method import SOURCE_ONLY, Method, Stage, StageData, trained_parameters
from segadapt.trainables.core.networks import recompute_blocks
from segadapt.trainables.core.training import interruption
from segadapt.trainables.core.training.checkpoint import (
    EVALUATION,
    GALLERY,
    is_whole,
    load_state,
    save_state,
    tensors_hash,
)
from segadapt.trainables.core.training.config import TrainerSettings, stage_steps
from segadapt.trainables.core.training.gradients import (
    InfeasibleError,
    SmallerMicroBatchError,
    Snapshot,
    note_micro_batch,
    noted_micro_batch,
    smaller_micro_batch,
)
from segadapt.trainables.core.training.interruption import PreemptedError
from segadapt.trainables.core.training.reporting import NonFiniteLossError, Progress, Report
from segadapt.trainables.core.training.timing import StepTimes
from segadapt.trainables.core.validation import check

_ASK_EVERY = 8
"""Steps after which several workers ask each other whether one of them must leave."""


class Trainer:
    """Walk a method through its stages.

    Args:
        method: The method, on the CPU; moved to this worker's device.
        plan: The stages to do, in order.
        data: Labelled source and unlabelled target.
        evaluation: Labelled validation images, never shown to the method.
        settings: Lengths, optimiser, augmentation, seed.
        report: Called with each evaluation.
        folder: For what stages write, such as pseudo labels; shared by the workers and kept over restarts.
        device: Where to train; default: this worker's GPU if there is one.
    """

    def __init__(
        self,
        method: Method,
        plan: tuple[Stage, ...],
        data: DomainData,
        evaluation: EvaluationData,
        settings: TrainerSettings,
        report: Report,
        folder: Path,
        device: torch.device | None = None,
    ) -> None:
        workers = distributed.world_size()
        batch_size = settings.trainer.batch_size
        check(batch_size % workers == 0, f"trainer.batch_size must be a multiple of the {workers} workers", batch_size)
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.memory_format = torch.channels_last if settings.trainer.channels_last else torch.contiguous_format
        self.method = method.to(device=self.device)
        for module in self.method.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=self.memory_format)
        if settings.trainer.recompute:
            recompute_blocks(self.method)
        self.trainable = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
        self.plan = plan
        self.steps = stage_steps(plan, method.warmup.steps, settings.trainer.steps)
        self.data = data
        self.evaluation = evaluation
        self.settings = settings
        self.report = report
        self.folder = folder
        self._times = StepTimes(self.device)
        self.micro_batch = noted_micro_batch(folder) or batch_size
        """Images of each domain per micro-batch over all workers; smaller than asked for once memory was short."""

    def start_from(self, checkpoint: Path) -> None:
        """Begin with what an earlier trial or stage ended with: see `Method.take_over`."""
        self.method.take_over(load_state(checkpoint))

    def run(self, resume: Path | None = None) -> None:
        """Train all planned stages, from the start or from a checkpoint this plan wrote.

        Raises:
            InfeasibleError: If the device's memory is too small, even for single images.
            SmallerMicroBatchError: If it is for one of several workers: run all again, from the last checkpoint.
            PreemptedError: If a worker was asked to end: the step it was in is saved, run all again from there.
        """
        state = self._later_of(load_state(resume) if resume is not None else None)
        first = [stage.name for stage in self.plan].index(state["stage"]) if state is not None else 0
        done = sum(self.steps[stage.name] for stage in self.plan[:first])
        used = state.get("micro_batch", self.micro_batch) if state is not None else self.micro_batch
        if used % distributed.world_size() == 0:  # otherwise there were fewer workers then
            self.micro_batch = min(self.micro_batch, used)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # a trial's process is reused
        try:
            for stage in self.plan[first:]:
                self._run_stage(stage, done, state)
                state = None
                done += self.steps[stage.name]
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise InfeasibleError(
                f"Evaluation, the preparation of stages and the optimiser must fit the device, but: {reason} "
                "Lower trainer.eval_batch_size or the images' size."
            ) from error

    def _run_stage(self, stage: Stage, done: int, state: dict[str, Any] | None) -> None:
        """Prepare and train one stage; `done` steps precede it in the trial, `state` resumes in the middle of it."""
        config, steps = self.settings.trainer, self.steps[stage.name]
        folder = self.folder / stage.name
        self._select_trained(stage)
        optimizer = self._optimizer(stage)
        if state is not None:
            self.method.load_state_dict(state["state"])
            optimizer.load_state_dict(state["optimizer"])
            start = state["step"]
            message = f"Stage '{stage.name}' goes on after {start} of {steps} steps."
            note("resumed", message, stage=stage.name, step=done + start, steps=steps)
        else:
            start = 0
            message = f"Stage '{stage.name}' of {steps} steps begins."
            note("stage_begun", message, stage=stage.name, step=done, steps=steps)
            self._seed(stage, 0)
            self.method.eval()
            with torch.no_grad():
                self.method.prepare_stage(stage, self._stage_data(stage, folder))
            distributed.barrier()
            if steps == 0 or (config.evaluate_start and done == 0):
                self._evaluate_and_report(stage, done, 0, optimizer, Progress())
        train_step = self._parallel()
        batches = self._micro_batches(stage, folder, start)
        workers = distributed.world_size()
        again = workers == 1 and smaller_micro_batch(self.micro_batch, workers) is not None
        before = Snapshot(self.method) if again else None
        self._seed(stage, start)
        progress = Progress()
        if state is not None and "interrupted" in state:
            self._take_up(state["interrupted"], progress)
        self._times.restart()
        for step in range(start, steps):
            if self._must_leave(step):
                self._save_and_leave(stage, done, step, optimizer, progress)
            self.method.train()
            self._set_learning_rate(stage, optimizer, step, steps)
            if before is not None:
                before.take()
            while (terms := self._gradients(train_step, batches, step)) is None:
                self._use_smaller_micro_batches(stage, step)
                assert before is not None
                before.restore()
                optimizer.zero_grad(set_to_none=True)
                batches = self._micro_batches(stage, folder, step)
            progress.add(terms)
            if self.settings.optimizer.clip_norm is not None:
                parameters = [p for _, p in trained_parameters(self.method, stage) if p.requires_grad]
                nn.utils.clip_grad_norm_(parameters, self.settings.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.method.after_step(step)
            self._times.step_ended()
            if (done + step + 1) % config.eval_every == 0 or step + 1 == steps:
                self._evaluate_and_report(stage, done, step + 1, optimizer, progress)
                self._seed(stage, step + 1)
                progress = Progress()
                self._times.restart()
        note("stage_ended", f"Stage '{stage.name}' has ended.", stage=stage.name, step=done + steps)

    @property
    def _interrupted(self) -> Path:
        """Folder of the step that the trial was asked to leave at."""
        return self.folder / "interrupted"

    def _later_of(self, state: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return the state of a checkpoint, or the one that an interrupted process saved after it."""
        if not is_whole(self._interrupted):
            return state
        saved = load_state(self._interrupted)
        names = [stage.name for stage in self.plan]
        if saved["stage"] not in names:  # it was finished since
            return state
        place = (names.index(saved["stage"]), saved["step"])
        return saved if state is None or place > (names.index(state["stage"]), state["step"]) else state

    def _must_leave(self, step: int) -> bool:
        """Return whether a worker was asked to end; several agree on it every few steps, for asking takes time."""
        if distributed.world_size() == 1:
            return interruption.asked_to_leave()
        if step % _ASK_EVERY:
            return False
        return bool(distributed.sum_over_workers(torch.tensor(float(interruption.asked_to_leave()))) > 0)

    def _save_and_leave(
        self, stage: Stage, done: int, step: int, optimizer: torch.optim.Optimizer, progress: Progress
    ) -> NoReturn:
        """Save the middle of an evaluation interval: one worker goes on as if it had never left.

        Several keep the first one's running statistics and draw other random numbers until the next evaluation.
        """
        self._agree_on_buffers()
        terms = {name: distributed.sum_over_workers(total) for name, total in sorted(progress.terms.items())}
        state = self._state(stage, step, optimizer)
        state["interrupted"] = {
            "terms": terms,
            "steps": progress.steps,
            "seconds": time.perf_counter() - progress.started,
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }
        if distributed.rank() == 0:
            temporary = self._interrupted.with_name(".interrupted")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_state(temporary, state)
            shutil.rmtree(self._interrupted, ignore_errors=True)
            temporary.rename(self._interrupted)
            interruption.note_preemption(self.folder)
        message = f"Asked to end: the trial is saved after step {done + step} and leaves."
        note("preempted", message, level=logging.WARNING, stage=stage.name, step=done + step)
        distributed.barrier()
        raise PreemptedError(f"The process was asked to end; the trial is saved after step {done + step}.")

    def _take_up(self, kept: dict[str, Any], progress: Progress) -> None:
        """Go on with the sums and random numbers of an interrupted process."""
        if distributed.world_size() == 1:
            torch.set_rng_state(kept["random"])
            if kept["cuda_random"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(kept["cuda_random"])
        if distributed.rank() == 0:  # the sums are those of all workers
            progress.terms = {name: total.to(self.device) for name, total in kept["terms"].items()}
        else:
            progress.terms = {name: torch.zeros_like(total).to(self.device) for name, total in kept["terms"].items()}
        progress.steps = kept["steps"]
        progress.started -= kept["seconds"]

    def _micro_batches(self, stage: Stage, folder: Path, step: int) -> Iterator[DomainBatch]:
        """Yield the micro-batches of the stage from a step on; a step sees the same images however it is parted."""
        batches, parts = self._batches(stage, folder), self._parts
        found = batches.batches(step * parts, self.steps[stage.name] * parts, threads=self._loader_threads)
        return self._times.waiting(found)

    @property
    def _parts(self) -> int:
        """Micro-batches per optimiser step."""
        config = self.settings.trainer
        return config.batch_size * config.accumulate // self.micro_batch

    def _gradients(self, train_step: nn.Module, batches: Iterator[DomainBatch], step: int) -> dict[str, Tensor] | None:
        """Accumulate the gradients of one step; returns the mean of each term, or None if the device has no room.

        When this has returned, nothing of a failed attempt is on the device but the gradients of its first parts.
        """
        parts, means = self._parts, dict[str, Tensor]()
        try:
            for part in range(parts):
                batch = self._on_device(next(batches))
                with self._synchronised(train_step, part == parts - 1):
                    terms = self._terms(train_step, batch, step)
                    torch.autograd.backward(torch.stack(list(terms.values())).sum() / parts)
                for name, value in terms.items():
                    means[name] = means.get(name, 0.0) + value.detach().double() / parts
        except torch.OutOfMemoryError:
            return None
        return means

    def _use_smaller_micro_batches(self, stage: Stage, step: int) -> None:
        """Part the steps further, since one did not fit.

        Several workers cannot do so in the middle of a step: the others may wait in a reduction, of gradients or of
        the method's own statistics, for the one that failed. They begin again from the last checkpoint.
        """
        workers = distributed.world_size()
        size = smaller_micro_batch(self.micro_batch, workers)
        where = f"step {step} of stage '{stage.name}'"
        if size is None:
            raise InfeasibleError(
                f"One image of each domain must fit the device, but {where} does not. Lower augmentation.crop or "
                "augmentation.source_size and target_size, or choose a smaller network."
            )
        message = f"{self.micro_batch} images of each domain do not fit the device; going on with {size}."
        note("smaller_micro_batch", message, level=logging.WARNING, stage=stage.name, micro_batch=size)
        if workers > 1:
            note_micro_batch(self.folder, size)
            raise SmallerMicroBatchError(f"{self.micro_batch} images do not fit the device in {where}; {size} may.")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.micro_batch = size

    def _describe_memory(self) -> dict[str, Any]:
        """Return what is reported about memory: the micro-batch, the peak, and what parting the batch has changed."""
        found: dict[str, Any] = {"memory/micro_batch": self.micro_batch}
        if self.device.type == "cuda":
            found["memory/peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        asked = self.settings.trainer.batch_size
        if self.micro_batch < asked:
            normalised = any(isinstance(module, _BatchNorm) and module.training for module in self.method.modules())
            found["memory_note"] = (
                f"Micro-batches of {self.micro_batch} instead of {asked} images, since the device's memory is short. "
                + ("Batch normalisation sees micro-batches, so do losses" if normalised else "Losses")
                + " that sort, contrast or average within a batch; the sum over them weighs micro-batches equally."
            )
        return found

    def _seed(self, stage: Stage, step: int) -> None:
        """Seed anew at every checkpoint, so that resuming draws what going on would have drawn, on every worker."""
        torch.manual_seed(derived_seed(self.settings.seed, stage.name, step, distributed.rank()))

    def _select_trained(self, stage: Stage) -> None:
        trained = {name for name, _ in trained_parameters(self.method, stage)}
        for name, parameter in self.method.named_parameters():
            parameter.requires_grad_(name in self.trainable and name in trained)

    def _optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        config = self.settings.optimizer
        groups = []
        for group in self.method.parameter_groups():
            parameters = [parameter for parameter in group.parameters if parameter.requires_grad]
            factor = (config.head_lr_factor or 1.0) if group.fresh else 1.0
            if parameters:
                groups.append({"params": parameters, "name": group.name, "factor": factor})
        return torch.optim.SGD(
            groups,
            lr=self._base_lr(stage),
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda",
        )

    def _base_lr(self, stage: Stage) -> float:
        config = self.settings.optimizer
        if config.lr is None:
            raise ValueError("optimizer.lr must be set, but got None. Take `base_lr(network)`.")
        return (
            config.lr * stage.lr_factor * (self.method.warmup.lr_factor if stage is SOURCE_ONLY else config.lr_factor)
        )

    def _set_learning_rate(self, stage: Stage, optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
        config = self.settings.optimizer
        rate = self._base_lr(stage) * (1 - step / (config.horizon * steps)) ** config.poly_power
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]

    def _parallel(self) -> nn.Module:
        """Wrap the whole method, so that one forward is one step; statistics and losses reduce themselves."""
        if distributed.world_size() == 1:
            return self.method
        devices = [self.device] if self.device.type == "cuda" else None
        # Gradients lie in the buckets that are exchanged: no copy there and back, and no second one in memory.
        wrapped = DistributedDataParallel(self.method, device_ids=devices, gradient_as_bucket_view=True)
        wrapped.broadcast_buffers = False  # set here, since torch 2.15 warns of the argument and 2.11 has no other
        return wrapped

    @staticmethod
    def _synchronised(train_step: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Average gradients over workers in the last micro-batch only."""
        if last or not isinstance(train_step, DistributedDataParallel):
            return contextlib.nullcontext()
        skipped: contextlib.AbstractContextManager[None] = train_step.no_sync()
        return skipped

    def _terms(self, train_step: nn.Module, batch: DomainBatch, step: int) -> dict[str, Tensor]:
        with self._autocast():
            terms: dict[str, Tensor] = train_step(batch, step)
        return terms

    def _autocast(self) -> torch.autocast:
        precision = self.settings.trainer.precision
        if precision == "auto":
            precision = "bf16" if self.device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    def _batches(self, stage: Stage, folder: Path) -> BatchSource:
        pseudo_labels = PseudoLabelFolder(folder, self.data.target.ids) if stage.pseudo_labels else None
        return BatchSource(
            data=self.data,
            augmentation=self.settings.augmentation,
            key=(self.settings.seed, stage.name),
            batch_size=self.micro_batch,
            domains=stage.domains,
            colored=stage.colored,
            flipped=stage.flipped,
            pseudo_labels=pseudo_labels.read if pseudo_labels is not None else None,
        )

    @property
    def _loader_threads(self) -> int:
        threads = self.settings.trainer.loader_threads
        if threads is None:
            return torch.get_num_threads() if self.device.type == "cuda" else 0
        return threads

    def _normalised(self, images: Tensor) -> Tensor:
        return self.method.segmenter.normalise(images.to(self.device, non_blocking=True)).contiguous(
            memory_format=self.memory_format
        )

    def _on_device(self, batch: DomainBatch) -> DomainBatch:
        moved = batch.to(self.device)
        target = moved.target_images
        return replace(
            moved,
            source_images=self._normalised(moved.source_images),
            target_images=self._normalised(target) if target is not None else None,
        )

    def _stage_data(self, stage: Stage, folder: Path) -> StageData:
        augmentation, batch_size = self.settings.augmentation, self.settings.trainer.eval_batch_size
        source_images = ResizedImages(self.data.source, augmentation, "source", labels=True)
        target_images = ResizedTargetImages(self.data.target, augmentation)

        def source() -> Iterator[tuple[Tensor, Tensor]]:
            for images, indices in one_pass(source_images, batch_size, threads=self._loader_threads):
                labels = torch.stack([source_images.label(index) for index in indices])
                yield self._normalised(images), labels.to(self.device, torch.int64)

        def source_in_step() -> Iterator[tuple[Tensor, Tensor]]:
            return in_step(source(), lambda last: (last[0], torch.full_like(last[1], IGNORE_INDEX)))

        def target() -> Iterator[tuple[Tensor, Tensor]]:
            for images, indices in one_pass(target_images, batch_size, threads=self._loader_threads):
                yield self._normalised(images), torch.tensor(indices)

        return StageData(
            folder=folder,
            target_ids=self.data.target.ids,
            source_batches=source_in_step,
            target_batches=target,
            made_by=self._made_by(stage) if stage.pseudo_labels else {},
        )

    def _made_by(self, stage: Stage) -> dict[str, str]:
        """Return what pseudo labels of the stage are labelled with; `network` is that of the labelling weights."""
        return {
            "stage": stage.name,
            "method": self.method.name,
            "network": tensors_hash(self.method.labeller(stage).state_dict()),
            "data": self.data.fingerprint,
        }

    def _evaluate_and_report(
        self, stage: Stage, done: int, step: int, optimizer: torch.optim.Optimizer, progress: Progress
    ) -> None:
        elapsed = time.perf_counter() - progress.started
        memory = self._describe_memory()  # of training; evaluation's own peak comes on top from the next time on
        losses = progress.losses()
        times = self._times.summary()
        for name, value in losses.items():
            if not torch.isfinite(torch.tensor(value)):
                raise NonFiniteLossError(
                    f"Loss terms must be finite, but '{name}' became {value} within the last {progress.steps} "
                    f"steps before step {step} of stage '{stage.name}'. Lower the learning rate or its weight."
                )
        self._agree_on_buffers()
        started = time.perf_counter()
        config = self.settings.trainer
        shown = evaluation_for_network(self.evaluation, self.settings.augmentation)
        batch_size, threads = config.eval_batch_size, self._loader_threads
        provenance = read_provenance(self.folder / stage.name) if stage.pseudo_labels else None
        rule = self.method.label_rule(stage, provenance)
        inference = Inference(window=config.eval_window)
        if rule is not None and inference.window is not None:
            rule = by_network(rule, self.method.deployed)  # labels are made of whole images
        evaluation = evaluate(
            self.method.deployed, shown, self.device, batch_size, threads=threads, inference=inference, rule=rule
        )
        evaluated = time.perf_counter()
        scores = label_free_scores(
            self.method.deployed, ScoredImages(shown.target), self.device, batch_size, threads=threads
        )
        if not all(map(math.isfinite, scores.values())):
            raise NonFiniteLossError(
                f"Predictions must be finite, but those on target images are not after step {step} of stage "
                f"'{stage.name}'. Lower the learning rate."
            )
        metrics: dict[str, Any] = {
            "step": done + step,
            "stage": stage.name,
            "stage_finished": step == self.steps[stage.name],
            "finished": stage is self.plan[-1] and step == self.steps[stage.name],
            **evaluation.metrics(),
            **{f"score/{name}": value for name, value in scores.items()},
            **{f"loss/{name}": value for name, value in losses.items()},
            "time/evaluation": evaluated - started,
            "time/scores": time.perf_counter() - evaluated,
            **memory,
        }
        if progress.steps:
            metrics["loss/total"] = sum(losses.values())
            images = config.batch_size * config.accumulate * (2 if "target" in stage.domains else 1)
            metrics["time/step"] = elapsed / progress.steps
            metrics["time/images_per_second"] = images * progress.steps / elapsed
            metrics |= times
            metrics["lr"] = optimizer.param_groups[0]["lr"]

        def write(folder: Path) -> None:
            self._write_checkpoint(folder, stage, step, optimizer, metrics, evaluation)

        if distributed.rank() == 0:
            self._note_evaluation(metrics)
        self.report(metrics, write if distributed.rank() == 0 else None)
        if distributed.rank() == 0:
            shutil.rmtree(self._interrupted, ignore_errors=True)  # what was reported is later

    @staticmethod
    def _note_evaluation(metrics: dict[str, Any]) -> None:
        target, source = metrics["target_val/miou"], metrics["source_val/miou"]
        shown = ("target_val/miou", "source_val/miou", "loss/total", "time/step", "time/evaluation")
        note(
            "evaluation",
            f"target_val/miou {target:.4f}, source_val/miou {source:.4f}",
            stage=metrics["stage"],
            step=metrics["step"],
            **{name: metrics[name] for name in shown if name in metrics},
        )

    def _agree_on_buffers(self) -> None:
        """Take the first worker's buffers: running statistics of batch normalisation differ between workers."""
        if distributed.world_size() > 1:
            for buffer in self.method.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _state(self, stage: Stage, step: int, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return all that going on from a step needs."""
        deployed = next(name for name, module in self.method.named_modules() if module is self.method.deployed)
        return {
            "method": self.method.name,
            "stage": stage.name,
            "step": step,
            "deployed": deployed,
            "micro_batch": self.micro_batch,
            "state": self.method.state_dict(),
            "optimizer": optimizer.state_dict(),
        }

    def _write_checkpoint(
        self,
        folder: Path,
        stage: Stage,
        step: int,
        optimizer: torch.optim.Optimizer,
        metrics: dict[str, Any],
        evaluation: Evaluation,
    ) -> None:
        save_state(folder, self._state(stage, step, optimizer))
        shown = evaluation_for_network(self.evaluation, self.settings.augmentation)
        save_gallery(self.method.deployed, shown, self.device, folder / GALLERY)
        summary = {
            "metrics": metrics,
            "classes": evaluation.classes.names,
            "colors": evaluation.classes.colors,
            "target_val": {"confusion": evaluation.target_val.confusion.tolist()},
            "source_val": {"confusion": evaluation.source_val.confusion.tolist()},
        }
        if evaluation.target_val.pseudo_labels is not None:
            summary["pseudo_labels"] = evaluation.target_val.pseudo_labels.by_class(evaluation.classes.names)
        (folder / EVALUATION).write_text(json.dumps(summary))
        size = sum(path.stat().st_size for path in folder.iterdir())
        message = f"Wrote a checkpoint of {size / 2**20:.1f} MiB."
        note("checkpoint", message, stage=stage.name, step=metrics["step"], bytes=size)
