"""Evaluate a checkpoint as papers do: a deployed network, full label resolution, one of the published class subsets."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from segadapt.platform.deployment.deployed import AGGREGATION, Deployed, load_deployed
from segadapt.platform.errors import UsageError, check_no_password
from segadapt.platform.results.leaderboard import find_run, run_tags
from segadapt.platform.settings.config import TrialConfig, Values
from segadapt.platform.storage.checkpoints import checkpoint_name
from segadapt.platform.storage.folders import Place, user_path
from segadapt.platform.tracking.tags import KEY_TAG
from segadapt.platform.tracking.tracker import Tracker
from segadapt.trainables.core.data.batch import IGNORE_INDEX, ClassList, LabelledImages
from segadapt.trainables.core.data.class_lists import CITYSCAPES_IDS, SUBSETS, duplicates
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.data.label_statistics import shows_a_class
from segadapt.trainables.core.data.loading import evaluation_for_network
from segadapt.trainables.core.evaluation.evaluate import DomainEvaluation, Protocol, evaluate_domain, score
from segadapt.trainables.core.evaluation.inference import Inference
from segadapt.trainables.core.training.gradients import autocast

PROTOCOLS = ("auto", *(f"cityscapes-{size}" for size in SUBSETS))
"""Class subsets to average over; `auto` takes all classes of the run."""

_SHOWN = ("augmentation.target_size", "augmentation.interpolation", "trainer.eval_window", "trainer.eval_stride")
"""How images are shown to the network, which may differ from the run."""

_SETTINGS = ("data.", *_SHOWN, "trainer.eval_batch_size")
"""What may differ from the run in an evaluation."""

_LEAST_THREADS = 2


def data_settings(values: Values) -> Values:
    """Return `values` if an evaluation may change them.

    Raises:
        UsageError: If one decides more than what is evaluated, or holds a password: they are kept in MLflow.
    """
    for key, value in values.items():
        check_no_password(key, value)
    return _only("an evaluation", values, _SETTINGS)


def prediction_settings(values: Values) -> Values:
    """Return `values` if a prediction may change them.

    Raises:
        UsageError: If one decides more than how images are shown to the network.
    """
    return _only("a prediction", values, _SHOWN)


def _only(what: str, values: Values, known: tuple[str, ...]) -> Values:
    others = [key for key in values if not key.startswith(known)]
    if others:
        raise UsageError(
            f"Settings of {what} must start with one of {', '.join(known)}, but got {', '.join(others)}: "
            "the run has the others."
        )
    return values


def asked(scales: Sequence[float], *, flip: bool) -> Inference:
    """Return how a network is asked.

    Raises:
        UsageError: If a scale is not as it must be.
    """
    try:
        return Inference(scales=tuple(scales), flip=flip)
    except ValueError as error:
        raise UsageError(str(error)) from error


class _Renumbered:
    """A set whose labels number the classes as the network does.

    Args:
        images: The set.
        table: The network's class, or 255, of each value in a label of the set; (256,) uint8.
    """

    def __init__(self, images: LabelledImages, table: Tensor) -> None:
        self.ids = images.ids
        self._images = images
        self._table = table

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Tensor:
        """Return an RGB image, (3, H, W) uint8."""
        return self._images.image(index)

    def label(self, index: int) -> Tensor:
        """Return its class indices, (H, W) uint8, 255 = ignore."""
        return self._table[self._images.label(index).int()]


def _index_of(name: str, names: Sequence[str]) -> int | None:
    """Return the place of the class that `name` stands for, if it is among `names`."""
    return next((index for index, other in enumerate(names) if duplicates((other, name))), None)


def target_images(config: TrialConfig, names: Sequence[str]) -> tuple[LabelledImages, list[str]]:
    """Return the labelled target validation images at the size the network sees, and those of its classes they label.

    Args:
        config: Names the data.
        names: The network's classes; labels are numbered in their order.

    Raises:
        UsageError: If the data are missing or malformed, share no class with the network, or have no labelled pixel.
    """
    try:
        _, data = load_data(config.data)
    except ValueError as error:
        raise UsageError(str(error)) from error
    table = torch.full((256,), IGNORE_INDEX, dtype=torch.uint8)
    labelled = []
    for index, name in enumerate(data.classes.names):
        place = _index_of(name, names)
        if place is not None:
            table[index] = place
            labelled.append(names[place])
    if not labelled:
        raise UsageError(
            f"The data must share classes with the network, which has {', '.join(names)}, but have "
            f"{', '.join(data.classes.names)}."
        )
    images: LabelledImages = evaluation_for_network(data, config.augmentation).target
    if tuple(names) != data.classes.names:
        images = _Renumbered(images, table)
    if not shows_a_class(images, len(names)):
        raise UsageError(
            "An evaluation must have target validation labels that show a class of the network, but "
            f"{_lack_of_labels(images, len(data.scored))}. `segadapt runs SEARCH` shows the label-free scores of its "
            "runs, and `segadapt predict` labels images that have no label."
        )
    return images, labelled


def _lack_of_labels(labelled: LabelledImages, images: int) -> str:
    """Say in what way a validation set has no labels to evaluate with."""
    if len(labelled):
        return f"in none of the {len(labelled)} labels does a pixel"
    return f"none of the {images} images has a label"


def protocol_of(name: str, names: Sequence[str], labelled: Sequence[str]) -> Protocol:
    """Return what a protocol counts and averages.

    The 13 classes are averaged over what the 16 count, as the papers do: wall, fence and pole still count as misses.

    Args:
        name: One of `PROTOCOLS`.
        names: The network's classes.
        labelled: Those of them that the evaluated data label.

    Raises:
        UsageError: If a class of the protocol is missing.
    """
    if name == "auto":
        return Protocol("miou", None, frozenset(labelled))
    if name not in PROTOCOLS:
        raise UsageError(f"--protocol must be one of {', '.join(PROTOCOLS)}, but got {name!r}.")
    size = name.removeprefix("cityscapes-")
    places = {wanted: _index_of(wanted, names) for wanted in SUBSETS[size]}
    for where, having in (("network was trained for", names), ("data label", labelled)):
        missing = [wanted for wanted in places if _index_of(wanted, having) is None]
        if missing:
            raise UsageError(
                f"--protocol {name} must find its {size} classes, but lacks {', '.join(missing)}: the {where} "
                f"{len(having)} classes, {', '.join(having)}. Use --protocol auto to average over those."
            )
    averaged = frozenset(names[place] for place in places.values() if place is not None)
    counted = averaged
    if size == "13":
        counted = frozenset(category for category in names if _index_of(category, SUBSETS["16"]) is not None)
    return Protocol(f"miou_{size}", counted, averaged)


class Submission:
    """Writes predictions as Cityscapes takes them: 8-bit PNGs of `labelIds`, named as their image.

    Args:
        folder: New or empty: `cityscapesscripts` refuses two predictions of one image.
        names: The network's classes.

    Raises:
        UsageError: If the folder holds something already, or a class is none of Cityscapes'.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        known = list(CITYSCAPES_IDS)
        places = [_index_of(name, known) for name in names]
        unknown = [name for name, place in zip(names, places, strict=True) if place is None]
        if unknown:
            raise UsageError(
                f"--save-predictions needs a network of Cityscapes classes, but it also has {', '.join(unknown)}: "
                "they have no label id. Leave it out."
            )
        self._ids = torch.tensor([CITYSCAPES_IDS[known[place]] for place in places if place is not None])
        self.folder = new_folder(folder)

    def __call__(self, image_id: str, prediction: Tensor) -> None:
        """Write the prediction, (H, W) class indices, of an image."""
        ids = self._ids.to(prediction.device, torch.uint8)[prediction]
        Image.fromarray(ids.cpu().numpy()).save(self.folder / f"{Path(image_id).name}.png")


def new_folder(folder: Path) -> Path:
    """Make a folder and return it; it may exist if it is empty."""
    try:
        folder.mkdir(parents=True)  # of commands that write to it at once, one makes it
    except FileExistsError as error:
        if not folder.is_dir() or any(folder.iterdir()):
            raise UsageError(
                f"The folder to write must be new or empty, but {folder} is not. Choose another."
            ) from error
    except OSError as error:
        raise UsageError(
            f"The folder {folder} must be writable, but is not: {error.strerror}. Choose another."
        ) from error
    return folder


def variant_name(protocol_name: str, inference: Inference, aggregation: float | None, settings: Values) -> str:
    """Return what tells evaluations of a run apart in the names of their metrics, such as `cityscapes-16-flip`."""
    parts = [protocol_name]
    if inference.scales != (1.0,):
        parts.append("scales-" + "-".join(f"{scale:g}" for scale in inference.scales))
    if inference.flip:
        parts.append("flip")
    if aggregation is not None:
        parts.append(f"aggregation-{aggregation:g}")
    if settings:
        content = json.dumps(settings, sort_keys=True, default=str)
        parts.append(f"data-{hashlib.sha256(content.encode()).hexdigest()[:8]}")
    return "-".join(parts)


def in_windows(deployed: Deployed, inference: Inference) -> Inference:
    """Return how a network is asked, in the windows that its settings name."""
    trainer = deployed.config.trainer
    return dataclasses.replace(inference, window=trainer.eval_window, stride=trainer.eval_stride)


def aggregation_text(config: TrialConfig) -> str:
    """Return whether the network of a trial aggregates when it predicts."""
    weight = getattr(config.method, AGGREGATION.removeprefix("method."), 0.0)
    return f"aggregation {weight:g}" if weight else "no aggregation"


def evaluate_target(
    deployed: Deployed,
    images: LabelledImages,
    inference: Inference,
    device: torch.device,
    submission: Submission | None = None,
) -> DomainEvaluation:
    """Count what a network predicts of a set, at label size; shows its progress in a terminal."""
    from rich.progress import Progress

    from segadapt.platform.experiment.progress import console

    batch_size = deployed.config.trainer.eval_batch_size if max(inference.scales) <= 1 else 1
    threads = max(_LEAST_THREADS, torch.get_num_threads()) if device.type == "cuda" else 0
    classes = ClassList(deployed.names, ((0, 0, 0),) * len(deployed.names))
    shown = console(stderr=True)
    with Progress(console=shown, transient=True, disable=not shown.is_terminal) as progress:
        task = progress.add_task("evaluating", total=len(images))

        def see(image_id: str, prediction: Tensor) -> None:
            if submission is not None:
                submission(image_id, prediction)
            progress.advance(task)

        with autocast(device, deployed.config.trainer.precision):
            return evaluate_domain(
                deployed.network, images, classes, device, batch_size, threads=threads, inference=inference, see=see
            )


@dataclass(frozen=True)
class EvaluationResult:
    """How well a run's network labels the target validation set."""

    run: str
    checkpoint: str
    step: int
    """Training steps of the checkpoint."""
    protocol: str
    how: str
    """Scales, flip and aggregation."""
    images: int
    """Target validation images that have a label."""
    metrics: Mapping[str, float]
    """`target_val/miou`, with the size of the subset in its name, and `target_val/iou/CLASS`."""
    iou: Mapping[str, float | None]
    """IoU of the averaged classes; None for one that is neither present nor predicted, which the mean leaves out."""
    classes: Sequence[str]
    """Classes of the confusion matrix, in its order."""
    confusion: Sequence[Sequence[int]]
    """Pixels; rows are the truth, columns the prediction."""
    tracked: str
    """Prefix of the metrics in the MLflow run."""
    predictions: str | None
    """Folder of the saved predictions."""


def evaluate_run(
    run: str,
    search: str,
    settings: Values,
    *,
    protocol: str,
    scales: Sequence[float],
    flip: bool,
    aggregation: float | None,
    save_predictions: str | None,
    place: Place,
) -> EvaluationResult:
    """Evaluate a run's network on the target validation set; see `api.evaluate`."""
    inference = asked(scales, flip=flip)
    settings = data_settings(settings)
    predictions = user_path("--save-predictions", save_predictions) if save_predictions is not None else None
    overrides = dict(settings) if aggregation is None else {**settings, AGGREGATION: float(aggregation)}
    row = find_run(run, search, place, kinds=("trial", "finish"))
    assert row.checkpoint is not None
    key = run_tags(row, place)[KEY_TAG]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    deployed = load_deployed(Path(row.checkpoint), overrides, device, place.folders)
    images, labelled = target_images(deployed.config, deployed.names)
    chosen = protocol_of(protocol, deployed.names, labelled)
    submission = Submission(predictions, deployed.names) if predictions is not None else None
    inference = in_windows(deployed, inference)
    confusion = evaluate_target(deployed, images, inference, device, submission).confusion
    scored = score(confusion, deployed.names, chosen)
    result = EvaluationResult(
        run=row.name,
        checkpoint=row.checkpoint,
        step=deployed.step,
        protocol=protocol,
        how=f"{inference}, {aggregation_text(deployed.config)}",
        images=len(images),
        metrics=scored.metrics("target_val", chosen),
        iou={name: iou if iou == iou else None for name, iou in scored.iou.items()},
        classes=deployed.names,
        confusion=confusion.tolist(),
        tracked=f"evaluation/{variant_name(protocol, inference, aggregation, settings)}",
        predictions=save_predictions,
    )
    tracker = Tracker(place)
    metrics = {f"{result.tracked}/{name}": value for name, value in result.metrics.items()}
    tracker.log_summary(key, metrics, result.step)
    noted = {"checkpoint": checkpoint_name(place.folders, Path(result.checkpoint)), "settings": dict(settings)}
    tracker.log_json(key, {**dataclasses.asdict(result), **noted}, f"{result.tracked}.json")
    tracker.close()
    return result
