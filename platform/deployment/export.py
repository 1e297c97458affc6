"""Bring a run's network into use: as files that any program can load, and in MLflow's registry."""

import contextlib
import json
import math
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from segadapt.platform.deployment import evaluation as evaluating
from segadapt.platform.deployment import registry
from segadapt.platform.deployment.card import Card
from segadapt.platform.deployment.deployed import AGGREGATION, Deployed, load_deployed
from segadapt.platform.errors import UsageError
from segadapt.platform.ray_internals.start import variables_set
from segadapt.platform.results.leaderboard import find_run, open_client, run_tags
from segadapt.platform.settings.config import TrialConfig, Values
from segadapt.platform.settings.objective import MIOUS
from segadapt.platform.settings.text import first_line
from segadapt.platform.storage.checkpoints import class_colors, read_metrics, state_hash
from segadapt.platform.storage.folders import Place, Storage, user_path
from segadapt.platform.storage.weights import WeightsOrigin, licence_note
from segadapt.platform.tracking.descriptions import origin_of_tags
from segadapt.platform.tracking.tags import DATA_TAG
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.evaluation.deployed import DeployedNetwork, smallest_side, stride
from segadapt.trainables.core.evaluation.inference import Inference
from segadapt.trainables.core.networks.hub import UNKNOWN

ONNX = "model.onnx"

PT2 = "model.pt2"

CARD = "model.json"

OPSET = 18
"""Version of ONNX's operators; what PyTorch's exporter writes without conversion."""

TOLERANCE = 1e-3
"""Largest difference of a class probability between an exported file and the network it was made from."""

LARGEST_SIDE = 2**15

_LARGEST_BATCH = 1024

_WHOLE_PIXELS = 2**22

_WHOLE_CELLS = 2**14
"""Cells of the feature map, if they are aggregated: the exported network holds two matrices of this number squared."""

_CHECKED_SHAPES = ((2, 64, 96), (1, 131, 173))
"""Batch, height and width of the images that exported files are compared on."""

_SHOWN_METRICS = ("target_val/", "source_val/", "score/")
"""How the names of the metrics begin that a card shows."""

_EXAMPLE_SHAPE = (2, 96, 128)


class ExportError(RuntimeError):
    """An exported file does not compute what the network computes."""


@dataclass(frozen=True)
class Origin:
    """Where a network comes from; of a checkpoint alone, the rest is not known."""

    checkpoint: Path
    search: str = ""
    run: str = ""
    run_id: str = ""
    data_fingerprint: str = ""
    weights: WeightsOrigin | None = None
    """What its training began from; None at random numbers, or where nothing tells."""
    storage: Storage | None = None
    """Where the pretrained weights of a frozen backbone may be kept."""


def load_network(origin: Origin, device: torch.device) -> tuple[DeployedNetwork, Card]:
    """Return the network that a run deploys, without teacher and extra heads, and what is known of it.

    Raises:
        UsageError: If its checkpoint is missing or damaged.
    """
    deployed = load_deployed(origin.checkpoint, {}, device, origin.storage)
    size, interpolation = deployed.config.augmentation.target_size, deployed.config.augmentation.interpolation
    return DeployedNetwork(deployed.network, size, interpolation).to(device), _card(deployed, origin)


def _card(deployed: Deployed, origin: Origin) -> Card:
    """Return what is known of a run's network."""
    network, config = deployed.network, deployed.config
    metrics = read_metrics(origin.checkpoint)
    aggregation = float(getattr(config.method, AGGREGATION.removeprefix("method."), 0.0))
    size = config.augmentation.target_size
    pixels = _WHOLE_PIXELS
    if aggregation and size is None:
        pixels = min(pixels, _WHOLE_CELLS * stride(network) ** 2)
    weights = origin.weights or _noted_weights(config)
    mean, std = (part.flatten().tolist() for part in (network.mean, network.std))
    return Card(
        classes=deployed.names,
        colors=class_colors(origin.checkpoint) or _data_colors(config),
        whole_pixels=pixels,
        input_size=size,
        smallest_side=smallest_side(network),
        normalisation={"bgr": network.normalisation.bgr, "mean": mean, "std": std},
        aggregation=aggregation,
        metrics={name: value for name, value in metrics.items() if name.startswith(_SHOWN_METRICS)},
        unknown=tuple(name for name in MIOUS if not math.isfinite(metrics.get(name, math.nan))),
        search=origin.search,
        run=origin.run,
        run_id=origin.run_id,
        checkpoint_sha256=state_hash(origin.checkpoint),
        step=deployed.step,
        data_fingerprint=origin.data_fingerprint,
        config=config.as_dict(),
        weights=weights.source if weights is not None else None,
        weights_licence=weights.licence if weights is not None else None,
        weights_sha256=weights.sha256 if weights is not None else None,
    )


def _noted_weights(config: TrialConfig) -> WeightsOrigin | None:
    """Return what a configuration alone says of the weights that the training began from."""
    weights = config.network.weights
    return None if weights in (None, "none") else WeightsOrigin(f"{config.network.name} {weights}", UNKNOWN)


def from_run(
    origin: Origin, device: torch.device, settings: Values, inference: Inference
) -> tuple["Predict", Card, Inference]:
    """Return what `open_exported` returns of the run's file, without exporting it, and how the network is asked.

    Args:
        origin: Where the network comes from.
        device: Where it computes.
        settings: What differs from the run's settings, by dotted key.
        inference: Scales and flip; the windows are those of the run.

    Raises:
        UsageError: If the checkpoint is missing or damaged, or a setting is not as it must be.
    """
    deployed = load_deployed(origin.checkpoint, settings, device, origin.storage)
    inference = evaluating.in_windows(deployed, inference)
    size, interpolation = deployed.config.augmentation.target_size, deployed.config.augmentation.interpolation
    network = DeployedNetwork(deployed.network, size, interpolation, inference).to(device)

    def predict(images: Tensor) -> Tensor:
        with torch.no_grad():
            probabilities: Tensor = network(images.to(device))
        return probabilities

    return predict, _card(deployed, origin), inference


def _data_colors(config: TrialConfig) -> tuple[tuple[int, int, int], ...]:
    """Return the colours of the classes of a trial's data."""
    try:
        return load_data(config.data)[0].classes.colors
    except ValueError as error:
        raise UsageError(str(error)) from error


def write(network: DeployedNetwork, card: Card, folder: Path) -> dict[str, float]:
    """Write a network in both formats with its card, compare them with it, and return their largest differences.

    Args:
        network: On the CPU.
        card: What is written beside and into the files.
        folder: New or empty. Written whole or not at all.

    Raises:
        UsageError: If the folder holds something, or the network has an operation that cannot be exported.
        ExportError: If a file computes something else than the network.
    """
    target = evaluating.new_folder(folder.absolute())
    with contextlib.suppress(OSError):  # another command is at it: one of both will be first
        target.rmdir()  # it appears with its content
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        content = json.dumps(card.as_dict(), indent=1)
        (whole / CARD).write_text(content)
        with warnings.catch_warnings():  # about PyTorch's own use of its exporter
            warnings.simplefilter("ignore")
            program = _program(network)
            torch.export.save(program, whole / PT2, extra_files={CARD: content})
            _write_onnx(program, card, whole / ONNX)
        differences = {
            PT2: _difference(network, _open_own_pt2(whole / PT2)),
            ONNX: _difference(network, open_exported(whole / ONNX)[0]),
        }
        wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE}
        if wrong:
            raise ExportError(
                f"Class probabilities of exported files must be within {TOLERANCE:g} of the network's, but "
                + ", ".join(f"those of {name} differ by {value:.3g}" for name, value in wrong.items())
                + ". Nothing was written."
            )
        try:
            whole.rename(target)
        except OSError as error:
            raise UsageError(
                f"The folder to write must be new or empty, but {target} was written by another command meanwhile. "
                "Choose another."
            ) from error
    return differences


def _program(network: DeployedNetwork) -> ExportedProgram:
    batch, height, width = _EXAMPLE_SHAPE
    least = smallest_side(network.network)
    sides = {2: Dim("height", min=least, max=LARGEST_SIDE), 3: Dim("width", min=least, max=LARGEST_SIDE)}
    shapes = ({0: Dim("batch", min=1, max=_LARGEST_BATCH), **sides},)
    example = torch.zeros(batch, 3, max(height, least), max(width, least), dtype=torch.uint8)
    try:
        with torch.no_grad():
            return torch.export.export(network, (example,), dynamic_shapes=shapes)
    except Exception as error:  # torch.export has many and names no common one
        raise _not_exportable("torch.export", error) from error


def _write_onnx(program: ExportedProgram, card: Card, path: Path) -> None:
    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise _not_exportable("ONNX", error) from error
    assert exported is not None
    exported.model.metadata_props.update(card.as_strings())
    exported.save(path)


def _not_exportable(form: str, error: Exception) -> UsageError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UsageError(
        f"A network must consist of operations that {form} takes, but this one does not: {reason} "
        "`segadapt predict` takes the run itself, or its checkpoint folder."
    )


def _difference(network: DeployedNetwork, exported: "Predict") -> float:
    """Return the largest difference of a class probability over images of several sizes."""
    generator = torch.Generator().manual_seed(0)
    differences = []
    least = smallest_side(network.network)
    for batch, *sides in _CHECKED_SHAPES:
        shape = (batch, 3, *(max(side, least) for side in sides))
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        with torch.no_grad():
            expected = network(images)
        actual = exported(images)
        if actual.shape != expected.shape:
            return float("inf")
        differences.append((actual - expected).abs().max())
    return float(torch.stack(differences).max())  # NaN if one is


Predict = Callable[[Tensor], Tensor]
"""Class probabilities, (B, C, H, W) float32, of RGB images, (B, 3, H, W) uint8 on the CPU."""


def open_exported(path: Path, device: torch.device | None = None) -> tuple[Predict, Card]:
    """Open an ONNX file that `write` made. Whoever made it, nothing in it is run but its operators.

    Args:
        path: Ends in .onnx.
        device: Where it computes; None for the CPU. A GPU is taken only with a build of onnxruntime for it.

    Raises:
        UsageError: If it is missing, damaged, or was made by another program.
    """
    if not path.is_file():
        raise UsageError(f"An exported network must be a file, but there is none at {path}. Correct the path.")
    try:
        return _open_onnx(path, device or torch.device("cpu"))
    except Exception as error:  # onnxruntime has many, and the file may hold anything
        raise UsageError(
            f"An exported network must be a whole file that `segadapt export` wrote, but {path} is not: "
            f"{type(error).__name__}: {first_line(error).rstrip('.')}. Export the run again."
        ) from error


def _open_onnx(path: Path, device: torch.device) -> tuple[Predict, Card]:
    import onnxruntime

    providers = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    session = onnxruntime.InferenceSession(path, providers=providers)

    def predict(images: Tensor) -> Tensor:
        (probabilities,) = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(probabilities)

    return predict, Card.from_strings(session.get_modelmeta().custom_metadata_map)


def _open_own_pt2(path: Path) -> Predict:
    """Open a .pt2 file that this process has just written: loading one unpickles and evaluates what is in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.export.load(path).module()

    def predict(images: Tensor) -> Tensor:
        with torch.no_grad():
            probabilities: Tensor = module(images)
        return probabilities

    return predict


@dataclass(frozen=True)
class ExportResult:
    """A run's network in files and in MLflow's registry."""

    run: str
    folder: str
    """Holds model.onnx, model.pt2 and model.json."""
    differences: Mapping[str, float]
    """Largest difference of a class probability from the run's network, by file."""
    model: str
    """Name in the registry."""
    version: str
    licence: str | None = None
    """What to know of the licence of the weights that the training began from; None if everybody may use them."""


def origin_of(run: str, search: str, place: Place) -> Origin:
    """Return where the network of a run comes from.

    Raises:
        UsageError: If there is no such run.
    """
    row = find_run(run, search, place, kinds=("trial", "finish"))
    assert row.checkpoint is not None
    tags = run_tags(row, place)
    weights = origin_of_tags(tags)
    return Origin(Path(row.checkpoint), search, row.name, row.run_id, tags.get(DATA_TAG, ""), weights, place.folders)


def export_run(run: str, search: str, out: str | None, register: str | None, place: Place) -> ExportResult:
    """Export a run's network and register it in MLflow; see `api.export`."""
    name = search if register is None else register
    registry.check_name(name)
    folder = None if out is None else user_path("--out", out)
    origin = origin_of(run, search, place)
    network, card = load_network(origin, torch.device("cpu"))
    folder = folder or Path(re.sub(r"[^\w.-]", "-", f"{origin.search}-{origin.run}"))  # a server named it
    with variables_set({}, ("TORCHINDUCTOR_CACHE_DIR",)):  # PyTorch's exporter leaves it behind
        differences = write(network, card, folder)
    version = registry.register(open_client(place), name, card, folder / ONNX)
    licence = licence_note(str(card.weights), card.weights_licence) if card.weights_licence is not None else None
    return ExportResult(origin.run, str(folder), differences, name, version, licence)
