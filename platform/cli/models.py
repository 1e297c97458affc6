"""The commands that use a trained network: evaluate, export and predict."""

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from segadapt.platform.cli.next_steps import after_evaluation, show_next
from segadapt.platform.cli.options import (
    AsJson,
    Search,
    TrialOrFinish,
    assignments,
    debug,
    is_number,
    scales,
    shared,
    tracked_place,
)
from segadapt.platform.cli.tables import progress_bar, show_evaluation, show_prediction

if TYPE_CHECKING:
    from segadapt.platform.storage.folders import Place

_Changes = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="What differs from the run: data.*, augmentation.target_size, trainer.eval_window, trainer.eval_stride.",
    ),
]
_Shown = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="What differs from the run: augmentation.target_size, trainer.eval_window, trainer.eval_stride.",
    ),
]
_Protocol = Annotated[
    str,
    typer.Option(
        help="Classes to average over: cityscapes-19, cityscapes-16 or cityscapes-13 (SYNTHIA), or auto, all that "
        "the run has."
    ),
]
_Scales = Annotated[
    list[str] | None,
    typer.Option("--scales", help="Show each image at these sizes and average, e.g. 0.75 1.0 1.25; default: as it is."),
]
_Flip = Annotated[bool, typer.Option("--flip", help="Show each image mirrored as well, and average.")]
_Aggregation = Annotated[
    float | None, typer.Option(help="PLCA's aggregation when predicting, e.g. 0.5; default: as the run has it.")
]
_Predictions = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Write labelIds PNGs, as the Cityscapes server takes them.")
]


@shared(place=tracked_place, _debug=debug)
def evaluate(
    place: "Place",
    _debug: bool,
    run: TrialOrFinish,
    search_name: Search,
    settings: _Changes = None,
    protocol: _Protocol = "auto",
    scale_words: _Scales = None,
    flip: _Flip = False,
    aggregation: _Aggregation = None,
    save_predictions: _Predictions = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run on the target validation set, at full label resolution and single scale unless told otherwise.

    Example: segadapt evaluate best --search plca-gta5-cityscapes --protocol cityscapes-19 --aggregation 0.5
    """
    from segadapt.platform.api import models

    words = settings or []
    result = models.evaluate(
        run,
        search_name,
        assignments([word for word in words if not is_number(word)]),
        protocol=protocol,
        scales=scales(scale_words, [word for word in words if is_number(word)]),
        flip=flip,
        aggregation=aggregation,
        save_predictions=save_predictions,
        place=place,
    )
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=1))
    else:
        show_evaluation(result)
        show_next(after_evaluation(run, search_name, place))


@shared(place=tracked_place, _debug=debug)
def export(
    place: "Place",
    _debug: bool,
    run: TrialOrFinish,
    search_name: Search,
    out: Annotated[str | None, typer.Option(metavar="FOLDER", help="New or empty; default: SEARCH-RUN here.")] = None,
    register: Annotated[
        str | None, typer.Option(metavar="MODEL_NAME", help="In MLflow's registry; default: the search's name.")
    ] = None,
) -> None:
    """Write a run's network as ONNX and torch.export files, checked against PyTorch, and register it in MLflow.

    Example: segadapt export best --search sdca-streets --out sdca
    """
    from segadapt.platform.api import models

    result = models.export(run, search_name, out=out, register=register, place=place)
    for name, difference in result.differences.items():
        print(f"{result.folder}/{name}: class probabilities within {difference:.1e} of the run's network")
    print(f"registered in MLflow: models:/{result.model}/{result.version}")
    if result.licence is not None:
        print(result.licence)


@shared(place=tracked_place, _debug=debug)
def predict(
    place: "Place",
    _debug: bool,
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|FILE|FOLDER",
            help="`best`, a run's name or id; an exported .onnx file; or a checkpoint folder.",
        ),
    ],
    images: Annotated[str, typer.Argument(help="An image, or a folder that is searched recursively.")],
    out: Annotated[str, typer.Argument(help="A new folder, or one in which this was interrupted.")],
    settings: _Shown = None,
    search_name: Annotated[str | None, typer.Option("--search", help="The search that holds the run.")] = None,
    scale_words: _Scales = None,
    flip: _Flip = False,
    batch_size: Annotated[int, typer.Option(help="Images of equal size predicted at a time, at most.")] = 8,
    overlay: Annotated[bool, typer.Option(help="Write the images under their classes' colours.")] = True,
    confidence: Annotated[
        bool, typer.Option("--confidence", help="Write the probability of the predicted class, 0 to 255.")
    ] = False,
) -> None:
    """Label images of any size: palette PNGs of class indices, colour overlays, confidence.

    Exit status: 0 finished, 1 an image could not be read, 2 wrong usage.

    Example: segadapt predict best photos labels --search sdca-streets; segadapt predict sdca/model.onnx photos labels
    """
    from segadapt.platform.api import models

    words = settings or []
    with progress_bar(f"labelling {images}") as progress:
        result = models.predict(
            source,
            images,
            out,
            assignments([word for word in words if not is_number(word)]),
            search=search_name,
            scales=scales(scale_words, [word for word in words if is_number(word)]),
            flip=flip,
            batch_size=batch_size,
            overlay=overlay,
            confidence=confidence,
            place=place,
            progress=progress,
        )
    show_prediction(result)
    sys.exit(1 if result.unreadable else 0)
