"""Evaluate, export and use a trained network."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypedDict, Unpack

from segadapt.platform.errors import UsageError
from segadapt.platform.settings.config import Values
from segadapt.platform.storage.folders import HERE, Place, user_path

if TYPE_CHECKING:
    from segadapt.platform.deployment.evaluation import EvaluationResult
    from segadapt.platform.deployment.export import ExportResult
    from segadapt.platform.deployment.prediction import Labeller, PredictionResult
    from segadapt.trainables.core.evaluation.inference import Inference


def evaluate(
    run: str,
    search: str,
    settings: Values | None = None,
    *,
    protocol: str = "auto",
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    aggregation: float | None = None,
    save_predictions: str | None = None,
    place: Place = HERE,
) -> "EvaluationResult":
    """Evaluate a run's network on the target validation set at full label resolution, and note it in its MLflow run.

    Args:
        run: `best` for the best trial, or the name or id of a trial or finish in the search.
        search: The search (or single run) that holds the run.
        settings: What differs from the run's settings, by dotted key: other data, another size of the images.
        protocol: One of `deployment.evaluation.PROTOCOLS`.
        scales: Sizes at which an image is shown; class probabilities are averaged.
        flip: Show each image mirrored as well.
        aggregation: Share of similar pixels' average in the prediction, for networks that offer it.
        save_predictions: New folder for the predictions as files for the Cityscapes server.
        place: Where the search is kept and tracked.

    Returns:
        The result: `metrics` by name and `iou` by class, between 0 and 1 (None for a class that nobody saw), and
        `confusion`, counts of pixels as (C, C), true classes in rows.

    Raises:
        UsageError: If there is no such run, or it cannot be evaluated as asked.

    Example:
        >>> import segadapt
        >>> result = segadapt.evaluate("best", "demo", flip=True)
        >>> result.images, sorted(result.iou)[:2], 0 <= result.metrics["target_val/miou"] <= 1
        (6, ['building', 'car'], True)
    """
    from segadapt.platform.deployment.evaluation import evaluate_run

    return evaluate_run(
        run,
        search,
        settings or {},
        protocol=protocol,
        scales=scales,
        flip=flip,
        aggregation=aggregation,
        save_predictions=save_predictions,
        place=place,
    )


def export(
    run: str, search: str, *, out: str | None = None, register: str | None = None, place: Place = HERE
) -> "ExportResult":
    """Write a run's network as ONNX and torch.export files and register it in MLflow, as a version linked to the run.

    The network alone: no teacher, no extra heads; normalisation, resizing and up-sampling are part of it. The files are
    compared with the run's network at several sizes before they are kept.

    Args:
        run: `best` for the best trial, or the name or id of a trial or finish in the search.
        search: The search (or single run) that holds the run.
        out: New or empty folder; None makes one named after search and run here.
        register: Name of the registered model; None takes the search's.
        place: Where the search is kept and tracked.

    Returns:
        The result: the folder, the largest difference of a class probability from the run's network by file, and name
        and version of the registered model. The files take uint8 RGB images (B, 3, H, W) of any size and return class
        probabilities (B, C, H, W).

    Raises:
        UsageError: If there is no such run, it cannot be exported, or the folder holds something.
        ExportError: If an exported file differs from the network; nothing is written.

    Example:
        >>> import segadapt
        >>> exported = segadapt.export("best", "demo", out="exported")
        >>> sorted(exported.differences), exported.model, exported.version
        (['model.onnx', 'model.pt2'], 'demo', '1')
    """
    from segadapt.platform.deployment.export import export_run

    return export_run(run, search, out, register, place)


class Labelling(TypedDict, total=False):
    """How images are labelled, and what is written of each."""

    scales: Sequence[float]
    """Sizes at which an image is shown; class probabilities are averaged."""
    flip: bool
    """Show each image mirrored as well."""
    batch_size: int
    """Images of equal size that are predicted at a time, at most; by default 8."""
    overlay: bool
    """Also write the images under their classes' colours, as is done by default."""
    confidence: bool
    """Also write the probability of the predicted class, 0 to 255."""


def predict(
    source: str,
    images: str,
    out: str,
    settings: Values | None = None,
    *,
    search: str | None = None,
    place: Place = HERE,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **labelling: Unpack[Labelling],
) -> "PredictionResult":
    """Label an image or a folder of images, on a GPU if there is one, and go on if that was interrupted.

    Args:
        source: An exported .onnx file, or a checkpoint folder; or, with `search`, `best` or the name or id of a trial
            or finish.
        images: An image, or a folder that is searched recursively.
        out: New, empty, or begun by the same command. Gets `labels`, `overlays` and `confidence`, with the images'
            paths.
        settings: What differs from the run's settings, by dotted key: another size of the images, other windows.
        search: The search (or single run) that holds the run; None for a file.
        place: Where the search is kept and tracked.
        progress: Called with the number of images just done and of all.
        labelling: `scales`, `flip`, `batch_size`, `overlay`, `confidence`; see `Labelling`. An exported file is asked
            once about an image: only a run or a checkpoint folder takes settings, scales and flip.

    Returns:
        The result: how many images were labelled and how many had been before, and which could not be read. A label is
        a palette PNG (H, W) of class indices, of the image's size.

    Raises:
        UsageError: If there is no such run, file or folder, there are no images, or `out` holds something else.

    Example:
        >>> import segadapt
        >>> labelled = segadapt.predict("exported/model.onnx", "town/target/val/images", "labels")
        >>> labelled.written, labelled.unreadable
        (2, ())
    """
    from segadapt.platform.deployment import evaluation, prediction

    shown, written = user_path("IMAGES", images), user_path("OUT", out)
    settings = evaluation.prediction_settings(settings or {})
    inference = evaluation.asked(labelling.get("scales", (1.0,)), flip=labelling.get("flip", False))
    return prediction.predict(
        _labeller(source, search, place, settings, inference),
        shown,
        written,
        batch_size=labelling.get("batch_size", 8),
        overlay=labelling.get("overlay", True),
        confidence=labelling.get("confidence", False),
        progress=progress,
    )


def _labeller(source: str, search: str | None, place: Place, settings: Values, inference: "Inference") -> "Labeller":
    """Return what labels images with the network of a file, or of a run in a search."""
    import torch

    from segadapt.platform.deployment import export, prediction
    from segadapt.trainables.core.evaluation.inference import ONCE

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = user_path("RUN", source)
    if path.suffix == ".pt2":
        raise UsageError(
            f"A network to predict with must be a run, a .onnx file or a checkpoint folder, but got {source!r}: opening"
            " a .pt2 file runs what its maker put into it. Name the model.onnx that `segadapt export` writes beside it."
        )
    is_file = path.suffix == ".onnx"
    if is_file and (settings or inference != ONCE):
        raise UsageError(
            f"--scales, --flip and KEY=VALUE need a run or a checkpoint folder, but got the file {source!r}, which is "
            "asked once about an image. Leave them out, or name the run and its --search."
        )
    if search is not None and not is_file:
        origin = export.origin_of(source, search, place)
        return prediction.Labeller(*export.from_run(origin, device, settings, inference))
    if search is not None or place != HERE:
        raise UsageError(
            f"--search, --storage and --tracking-uri say where a run is, but got {source!r}"
            f"{'' if is_file else ' without --search'}. Leave them out{'' if is_file else ', or name its search'}."
        )
    if is_file:
        return prediction.Labeller(*export.open_exported(path, device))
    if path.is_dir():
        return prediction.Labeller(*export.from_run(export.Origin(path), device, settings, inference))
    raise UsageError(
        f"RUN needs --search NAME, a file must end in .onnx and a checkpoint be a folder, but got {source!r} alone. "
        "`segadapt runs NAME` shows the runs of a search."
    )
