"""What leaves the trainer at an evaluation: metrics, and the function that writes a checkpoint."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from segadapt.trainables.core.data.batch import EvaluationData
from segadapt.trainables.core.evaluation.evaluate import Evaluation, evaluate
from segadapt.trainables.core.evaluation.gallery import save_gallery
from segadapt.trainables.core.evaluation.label_free import ScoredImages, label_free_scores
from segadapt.trainables.core.journal import note
from segadapt.trainables.core.labelling.files import read_provenance
from segadapt.trainables.core.labelling.rules import by_network
from segadapt.trainables.core.method import Method, Stage
from segadapt.trainables.core.training.checkpoint import EVALUATION, GALLERY, save_state
from segadapt.trainables.core.training.config import TrainerConfig

Report = Callable[[dict[str, Any], Callable[[Path], None] | None], None]
"""Receives the metrics of an evaluation and, on the first worker, a function that writes the checkpoint to a folder."""


class NonFiniteLossError(ArithmeticError):
    """A loss term or the network's predictions became NaN or infinite; the trial cannot recover."""


@dataclass(frozen=True)
class EvaluatedMethod:
    """What one evaluation tells of a method's deployed network, with and without labels."""

    evaluation: Evaluation
    scores: Mapping[str, float]
    """The label-free scores."""
    seconds: Mapping[str, float]
    """Seconds that the evaluation and the scores took."""

    def metrics(self) -> dict[str, float]:
        """Return the numbers to report, by their tracked names, but for the seconds."""
        return {
            **self.evaluation.metrics(),
            **{f"score/{name}": value for name, value in self.scores.items()},
        }


def evaluate_method(
    method: Method,
    stage: Stage,
    folder: Path,
    data: EvaluationData,
    config: TrainerConfig,
    device: torch.device,
    threads: int,
) -> EvaluatedMethod:
    """Evaluate a method on both validation sets, and its pseudo labels and label-free scores.

    Args:
        method: The method.
        stage: The stage that is trained.
        folder: Folder of the stage, with its pseudo labels.
        data: Validation images at the size that the network sees.
        config: Settings of evaluations.
        device: Device of the method.
        threads: Number of threads that read ahead.
    """
    started = time.perf_counter()
    network = method.exported
    provenance = read_provenance(folder) if stage.pseudo_labels else None
    rule = method.label_rule(stage, provenance)
    inference = config.inference
    if rule is not None and (inference.window is not None or network is not method.deployed):
        rule = by_network(rule, method.deployed)  # labels are made of whole images, by the network that is trained
    batch_size = config.eval_batch_size
    evaluation = evaluate(
        network,
        data,
        device,
        batch_size,
        threads=threads,
        inference=inference,
        rule=rule,
        source_network=method.source_network(stage) if network is method.deployed else network,
    )
    evaluated = time.perf_counter()
    scores = label_free_scores(network, ScoredImages(data.scored), device, batch_size, threads=threads)
    seconds = {"evaluation": evaluated - started, "scores": time.perf_counter() - evaluated}
    return EvaluatedMethod(evaluation, scores, seconds)


def refuse_non_finite_losses(losses: Mapping[str, float], stage: Stage, step: int, interval: int) -> None:
    """Raise a NonFiniteLossError if the mean of a loss term over the last `interval` steps is NaN or infinite."""
    for name, value in losses.items():
        if not torch.isfinite(torch.tensor(value)):
            raise NonFiniteLossError(
                f"Loss terms must be finite, but '{name}' became {value} within the last {interval} "
                f"steps before step {step} of stage '{stage.name}'. Lower the learning rate or its weight."
            )


def refuse_non_finite_scores(scores: Mapping[str, float], stage: Stage, step: int) -> None:
    """Raise a NonFiniteLossError if a score is NaN or infinite, for then predictions on target images are."""
    if not all(map(math.isfinite, scores.values())):
        raise NonFiniteLossError(
            f"Predictions must be finite, but those on target images are not after step {step} of stage "
            f"'{stage.name}'. Lower the learning rate."
        )


def note_evaluation(metrics: Mapping[str, Any]) -> None:
    """Tell the journal of an evaluation."""
    target, source = (
        f"{name} {metrics[name]:.4f}" if name in metrics else f"{name} unknown"
        for name in ("target_val/miou", "source_val/miou")
    )
    noted = ("target_val/miou", "source_val/miou", "loss/total", "time/step", "time/evaluation")
    note(
        "evaluation",
        f"{target}, {source}",
        stage=metrics["stage"],
        step=metrics["step"],
        **{name: metrics[name] for name in noted if name in metrics},
    )


def write_checkpoint(
    folder: Path,
    state: dict[str, Any],
    method: Method,
    data: EvaluationData,
    evaluation: Evaluation,
    metrics: Mapping[str, Any],
    device: torch.device,
) -> None:
    """Write a checkpoint with its metrics, confusion matrices and gallery.

    Args:
        folder: Existing folder to write to.
        state: All that going on from here needs.
        method: The method.
        data: Validation images at the size that the network sees.
        evaluation: What was counted on them.
        metrics: What is reported.
        device: Device of the method.
    """
    save_state(folder, state)
    save_gallery(method.exported, data, device, folder / GALLERY)
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
    note("checkpoint", message, stage=metrics["stage"], step=metrics["step"], bytes=size)
