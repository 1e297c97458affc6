"""The one trainer of all methods: devices, precision, data parallelism, optimisation, stages, checkpoints, reports.

It knows neither Ray nor MLflow: results leave through a `Report` function.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from segadapt.trainables.core import distributed
from segadapt.trainables.core.data.batch import DomainBatch, DomainData, EvaluationData
from segadapt.trainables.core.data.loading import BatchSource, evaluation_for_network
from segadapt.trainables.core.data.sampling import derived_seed
from segadapt.trainables.core.data.threads import loader_threads
from segadapt.trainables.core.journal import note
from segadapt.trainables.core.labelling.files import PseudoLabelFolder
from segadapt.trainables.core.method import Method, Stage, StageData
from segadapt.trainables.core.networks import recompute_blocks
from segadapt.trainables.core.training.checkpoint import FROZEN, check_frozen, frozen_hash, load_state
from segadapt.trainables.core.training.config import TrainerSettings, stage_steps
from segadapt.trainables.core.training.gradients import (
    InfeasibleError,
    SmallerMicroBatchError,
    Snapshot,
    autocast,
    choose_kernels,
    data_parallel,
    describe_memory,
    loss_scale,
    note_micro_batch,
    noted_micro_batch,
    smaller_micro_batch,
    take_buffers_of_first_worker,
)
from segadapt.trainables.core.training.interruption import (
    PreemptedError,
    asked_to_leave,
    forget_interrupted,
    interval_so_far,
    later_state,
    save_interrupted,
    take_up,
)
from segadapt.trainables.core.training.optimizer import (
    build_optimizer,
    learning_rate,
    move_weights,
    select_trained,
    set_learning_rate,
)
from segadapt.trainables.core.training.passes import pass_step
from segadapt.trainables.core.training.preparation import maker_of_pseudo_labels, prepare_stage_data
from segadapt.trainables.core.training.progress import Progress
from segadapt.trainables.core.training.reporting import (
    Report,
    evaluate_method,
    note_evaluation,
    refuse_non_finite_losses,
    refuse_non_finite_scores,
    write_checkpoint,
)
from segadapt.trainables.core.training.timing import StepTimes

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
        folder: Folder for what stages write, such as pseudo labels; shared by the workers and kept over restarts.
        device: Device to train on; default: this worker's GPU if there is one.
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
        self.least_images = method.segmenter.least_images
        settings.trainer.check_workers(distributed.world_size(), self.least_images)
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.memory_format = torch.channels_last if settings.trainer.channels_last else torch.contiguous_format
        self.method = method.to(device=self.device)
        for module in self.method.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=self.memory_format)
        if settings.trainer.recompute:
            recompute_blocks(self.method)
        self._frozen = frozen_hash(method.segmenter)
        self.trainable = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
        if method.online is not None:
            method.online.see_classes(data.classes.names)
        self.plan = plan
        self.steps = stage_steps(plan, method.warmup.steps, settings.trainer.steps)
        self.data = data
        self.evaluation = evaluation
        self.settings = settings
        self.report = report
        self.folder = folder
        self._loader_threads = loader_threads(settings.trainer.loader_threads, self.device)
        self._times = StepTimes(self.device)
        self._loss_scale = loss_scale(self.device, settings.trainer.precision)
        self.micro_batch = noted_micro_batch(folder) or settings.trainer.batch_size
        """Images of each domain per micro-batch over all workers; smaller than asked for once memory was short."""

    def start_from(self, checkpoint: Path) -> None:
        """Begin with what an earlier trial or stage ended with: see `Method.take_over`. A teacher goes on."""
        state = load_state(checkpoint)
        check_frozen(state, self._frozen)
        self.method.take_over(state)
        if self.method.online is not None:
            self.method.online.take_over(state)

    def run(self, resume: Path | None = None) -> None:
        """Train all planned stages, from the start or from a checkpoint this plan wrote.

        Raises:
            InfeasibleError: If the device's memory is too small, even for single images.
            SmallerMicroBatchError: If it is for one of several workers: run all again, from the last checkpoint.
            PreemptedError: If a worker was asked to end: the step it was in is saved, run all again from there.
        """
        choose_kernels(self.device, self.settings.trainer.deterministic)
        names = [stage.name for stage in self.plan]
        state = later_state(self.folder, load_state(resume) if resume is not None else None, names)
        check_frozen(state, self._frozen)
        first = names.index(state["stage"]) if state is not None else 0
        done = sum(self.steps[stage.name] for stage in self.plan[:first])
        micro_batch = state.get("micro_batch", self.micro_batch) if state is not None else self.micro_batch
        if micro_batch % distributed.world_size() == 0:  # otherwise there were fewer workers then
            self.micro_batch = min(self.micro_batch, micro_batch)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # a trial's process is reused
        try:
            for stage in self.plan[first:]:
                self.run_stage(stage, done, state)
                state = None
                done += self.steps[stage.name]
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise InfeasibleError(
                f"Evaluation, the preparation of stages and the optimiser must fit the device, but: {reason} "
                "Lower trainer.eval_batch_size or the images' size."
            ) from error

    def run_stage(self, stage: Stage, done: int, state: dict[str, Any] | None) -> None:
        """Prepare and train one stage.

        Args:
            stage: The stage.
            done: Steps of the trial that precede it.
            state: Checkpoint from the middle of the stage to go on from; None begins it.
        """
        config, steps = self.settings.trainer, self.steps[stage.name]
        select_trained(self.method, stage, self.trainable)
        optimizer = build_optimizer(self.method, stage, self.settings.optimizer, self.device)
        self._loss_scale = loss_scale(self.device, config.precision)  # anew, since another trial may begin here
        if state is not None:
            start = self._resume_stage(stage, done, optimizer, state)
        else:
            start = 0
            self._begin_stage(stage, done, optimizer)
        train_step = self.parallel()
        workers = distributed.world_size()
        may_fail = workers == 1 and smaller_micro_batch(self.micro_batch, 1, self.least_images) is not None
        before = Snapshot(self.method) if may_fail else None
        batches = self.batches(stage, start)
        self._seed(stage, start)
        progress = Progress()
        if state is not None and "interrupted" in state:
            take_up(state["interrupted"], progress, self.device)
        self._times.restart()
        for step in range(start, steps):
            if self._must_leave(step):
                self._save_and_leave(stage, done, step, optimizer, progress)
            self.method.train()
            set_learning_rate(optimizer, learning_rate(self.settings.optimizer, stage, self.method.warmup, step, steps))
            if before is not None:
                before.take()
            while (terms := self.step(batches, step, train_step)) is None:
                self._use_smaller_micro_batches(stage, step)
                assert before is not None
                before.restore()
                optimizer.zero_grad(set_to_none=True)
                batches = self.batches(stage, step)
            progress.add(terms)
            move_weights(self.method, stage, optimizer, self.settings.optimizer.clip_norm, self._loss_scale)
            self.method.after_step(step)
            if (online := self.method.online_in(stage)) is not None:
                online.follow(self.method.deployed)
            self._times.step_ended()
            if (done + step + 1) % config.eval_every == 0 or step + 1 == steps:
                self.evaluate_and_report(stage, done, step + 1, optimizer, progress)
                self._seed(stage, step + 1)
                progress = Progress()
                self._times.restart()
        note("stage_ended", f"Stage '{stage.name}' has ended.", stage=stage.name, step=done + steps)

    def _begin_stage(self, stage: Stage, done: int, optimizer: torch.optim.Optimizer) -> None:
        """Let the method prepare the stage."""
        steps = self.steps[stage.name]
        message = f"Stage '{stage.name}' of {steps} steps begins."
        note("stage_begun", message, stage=stage.name, step=done, steps=steps)
        self._seed(stage, 0)
        self.method.eval()
        with torch.no_grad(), self.precision():
            self.method.prepare_stage(stage, self.stage_data(stage))
            if (online := self.method.online_in(stage)) is not None:
                online.begin(self.method.deployed)
        distributed.barrier()
        if steps == 0 or (self.settings.trainer.evaluate_start and done == 0):
            self.evaluate_and_report(stage, done, 0, optimizer, Progress())

    def _resume_stage(self, stage: Stage, done: int, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> int:
        """Load the method and the optimiser as they were in the middle of the stage; return the steps taken."""
        self.method.load_state_dict(state["state"])
        optimizer.load_state_dict(state["optimizer"] or optimizer.state_dict())  # none where the stage has ended
        if state.get("loss_scale"):  # else it does nothing
            self._loss_scale.load_state_dict(state["loss_scale"])
        start: int = state["step"]
        steps = self.steps[stage.name]
        message = f"Stage '{stage.name}' goes on after {start} of {steps} steps."
        note("resumed", message, stage=stage.name, step=done + start, steps=steps)
        return start

    def _must_leave(self, step: int) -> bool:
        """Return whether a worker was asked to end; several agree on it every few steps, for asking takes time."""
        if distributed.world_size() == 1:
            return asked_to_leave()
        if step % _ASK_EVERY:
            return False
        return bool(distributed.sum_over_workers(torch.tensor(float(asked_to_leave()))) > 0)

    def _save_and_leave(
        self, stage: Stage, done: int, step: int, optimizer: torch.optim.Optimizer, progress: Progress
    ) -> NoReturn:
        """Save the middle of an evaluation interval: one worker goes on as if it had never left.

        Several keep the first one's running statistics and draw other random numbers until the next evaluation.
        """
        take_buffers_of_first_worker(self.method)
        interval = interval_so_far(progress, self.device)
        state = {**self._state(stage, step, optimizer), "interrupted": interval}
        if distributed.rank() == 0:
            save_interrupted(self.folder, state)
        message = f"Asked to end: the trial is saved after step {done + step} and leaves."
        note("preempted", message, level=logging.WARNING, stage=stage.name, step=done + step)
        distributed.barrier()
        raise PreemptedError(f"The process was asked to end; the trial is saved after step {done + step}.")

    def batches(self, stage: Stage, first_step: int = 0) -> Iterator[DomainBatch]:
        """Yield the micro-batches of a stage, normalised and on the device.

        A step sees the same images however it is parted.

        Args:
            stage: A planned stage; where it has pseudo labels, they must be written.
            first_step: Step of the stage to begin with.
        """
        parts = self.micro_batches_per_step
        source = BatchSource(
            data=self.data,
            augmentation=self.settings.augmentation,
            key=(self.settings.seed, stage.name),
            batch_size=self.micro_batch,
            domains=stage.domains,
            colored=stage.colored,
            flipped=stage.flipped,
            pseudo_labels=self.pseudo_labels(stage),
            online=online.config if (online := self.method.online_in(stage)) is not None else None,
        )
        last = self.steps[stage.name] * parts
        read = self._times.waiting(source.batches(first_step * parts, last, threads=self._loader_threads))
        return map(self._on_device, read)

    def pseudo_labels(self, stage: Stage) -> Callable[[str], Tensor] | None:
        """Return what reads the pseudo label of a target image by its id; None where the stage has none."""
        if not stage.pseudo_labels:
            return None
        return PseudoLabelFolder(self.folder / stage.name, self.data.target.ids).read

    @property
    def micro_batches_per_step(self) -> int:
        """Number of micro-batches in an optimiser step."""
        config = self.settings.trainer
        return config.batch_size * config.accumulate // self.micro_batch

    def step(
        self, batches: Iterator[DomainBatch], number: int, train_step: nn.Module | None = None
    ) -> dict[str, Tensor] | None:
        """Pass the micro-batches of one step forward and backward, which adds up their gradients.

        When this has returned, nothing of a failed attempt is on the device but the gradients of its first parts.

        Args:
            batches: Micro-batches as `batches` yields them, of which one step's are taken.
            number: Steps taken in the stage before.
            train_step: The method as `parallel` returns it; None takes the method itself.

        Returns:
            The mean of each loss term over the micro-batches; None if the device has no room.
        """
        module = self.method if train_step is None else train_step
        try:
            parts, scale = self.micro_batches_per_step, self._loss_scale.scale
            return pass_step(self.method, module, batches, number, parts, precision=self.precision, scale=scale)
        except torch.OutOfMemoryError:
            return None

    def precision(self) -> torch.autocast:
        """Return the context in which networks compute in the precision of the training, in evaluations as well."""
        return autocast(self.device, self.settings.trainer.precision)

    def parallel(self) -> nn.Module:
        """Return the method, wrapped for data parallelism where there are several workers."""
        return data_parallel(self.method, self.device)

    def _use_smaller_micro_batches(self, stage: Stage, step: int) -> None:
        """Part the steps further, since one did not fit.

        Several workers cannot do so in the middle of a step: the others may wait in a reduction, of gradients or of
        the method's own statistics, for the one that failed. They begin again from the last checkpoint.
        """
        workers = distributed.world_size()
        size = smaller_micro_batch(self.micro_batch, workers, self.least_images)
        where = f"step {step} of stage '{stage.name}'"
        if size is None:
            least = "One image" if self.least_images == 1 else f"{self.least_images} images"
            raise InfeasibleError(
                f"{least} of each domain must fit the device, but {where} does not. Lower augmentation.crop or "
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

    def _seed(self, stage: Stage, step: int) -> None:
        """Seed anew at every checkpoint, so that resuming draws what going on would have drawn, on every worker."""
        torch.manual_seed(derived_seed(self.settings.seed, stage.name, step, distributed.rank()))

    def _normalised(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        return self.method.segmenter.normalise(images).contiguous(memory_format=self.memory_format)

    def _on_device(self, batch: DomainBatch) -> DomainBatch:
        moved = batch.to(self.device)
        images = {name: getattr(moved, name) for name in ("source_images", "target_images")}
        shown: dict[str, Any] = {n: self._normalised(value) for n, value in images.items() if value is not None}
        return replace(moved, **shown)

    def stage_data(self, stage: Stage) -> StageData:
        """Return what the method may look at before a stage."""
        return prepare_stage_data(
            self.data,
            self.folder / stage.name,
            maker_of_pseudo_labels(self.method, stage, self.data) if stage.pseudo_labels else {},
            augmentation=self.settings.augmentation,
            batch_size=self.settings.trainer.eval_batch_size,
            threads=self._loader_threads,
            normalise=self._normalised,
        )

    def evaluate_and_report(
        self, stage: Stage, done: int, step: int, optimizer: torch.optim.Optimizer, progress: Progress
    ) -> None:
        """Evaluate the deployed network and report what is known after a step, with a checkpoint.

        Args:
            stage: The stage that is trained.
            done: Steps of the trial before the stage.
            step: Steps taken in the stage.
            optimizer: Optimiser of the stage.
            progress: Loss terms since the last report.
        """
        elapsed = time.perf_counter() - progress.started
        config = self.settings.trainer
        # Of training: evaluation's own peak comes on top from the next time on.
        memory = describe_memory(self.method, self.micro_batch, config.batch_size, self.device)
        losses, times = progress.losses(), self._times.summary()
        refuse_non_finite_losses(losses, stage, step, progress.steps)
        take_buffers_of_first_worker(self.method)
        validation = evaluation_for_network(self.evaluation, self.settings.augmentation)
        folder, threads = self.folder / stage.name, self._loader_threads
        with self.precision():
            evaluated = evaluate_method(self.method, stage, folder, validation, config, self.device, threads)
        refuse_non_finite_scores(evaluated.scores, stage, step)
        metrics: dict[str, Any] = {
            "step": done + step,
            "stage": stage.name,
            "stage_finished": step == self.steps[stage.name],
            "finished": stage is self.plan[-1] and step == self.steps[stage.name],
            **evaluated.metrics(),
            **{f"loss/{name}": value for name, value in losses.items()},
            **{f"time/{name}": value for name, value in evaluated.seconds.items()},
            **memory,
        }
        if progress.steps:
            images = config.batch_size * config.accumulate * (2 if "target" in stage.domains else 1)
            metrics |= {"loss/total": sum(losses.values()), **times, **progress.pace(elapsed, images)}
            metrics["lr"] = optimizer.param_groups[0]["lr"]

        def write(checkpoint: Path) -> None:
            state = self._state(stage, step, optimizer)
            with self.precision():
                write_checkpoint(checkpoint, state, self.method, validation, evaluated.evaluation, metrics, self.device)

        if distributed.rank() == 0:
            note_evaluation(metrics)
        self.report(metrics, write if distributed.rank() == 0 else None)
        if distributed.rank() == 0:
            forget_interrupted(self.folder)

    def _state(self, stage: Stage, step: int, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return all that going on from a step needs."""
        deployed = next(name for name, module in self.method.named_modules() if module is self.method.exported)
        return {
            "method": self.method.name,
            "stage": stage.name,
            "step": step,
            "deployed": deployed,
            "micro_batch": self.micro_batch,
            "state": self.method.state_dict(),
            "optimizer": optimizer.state_dict() if step < self.steps[stage.name] else None,
            "loss_scale": self._loss_scale.state_dict(),
            FROZEN: self._frozen,
        }
