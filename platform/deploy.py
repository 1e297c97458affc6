"""Bring a run's network into use: as files that any program can load, and in MLflow's registry."""

import dataclasses
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from segadapt.platform import evaluating
from segadapt.platform.checkpoints import EVALUATION
from segadapt.platform.errors import UsageError
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.evaluation.deployed import SMALLEST_SIDE, DeployedNetwork, stride
from segadapt.trainables.core.training.checkpoint import MANIFEST, STATE

ONNX = "model.onnx"
PT2 = "model.pt2"
CARD = "model.json"

OPSET = 18
"""Of ONNX; what PyTorch's exporter writes without conversion."""

TOLERANCE = 1e-3
"""Largest difference of a class probability between an exported file and the network it was made from."""

LARGEST_SIDE = 2**15
_LARGEST_BATCH = 1024
_WHOLE_PIXELS = 2**22
_WHOLE_CELLS = 2**14
"""Of the feature map, if they are aggregated: the exported network holds two matrices of this number squared."""

_CHECKED_SHAPES = ((2, 64, 96), (1, 131, 173))
"""Batch, height and width of the images that exported files are compared on."""

_EXAMPLE_SHAPE = (2, 96, 128)

_SERVED_EXAMPLE_SIZE = (64, 96)

_PREFIX = "segadapt."


class ExportError(RuntimeError):
    """An exported file does not compute what the network computes."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a deployed network says about itself; the metadata of an exported file."""

    classes: tuple[str, ...]
    """In the order of the channels of the output; a label is the index of its class."""
    colors: tuple[tuple[int, int, int], ...]
    """RGB, of each class."""
    input: str = "images: uint8 (batch, 3, height, width), RGB, 0 to 255"
    output: str = "probabilities: float32 (batch, class, height, width), of the size of the image"
    smallest_side: int = SMALLEST_SIDE
    """Least height and width of an image, in pixels."""
    whole_pixels: int
    """`segadapt predict` looks at larger images in parts, or reduced if `input_size` is given."""
    input_size: tuple[int, int] | None
    """Height and width that the network itself brings images to, as in training; None leaves them as they are."""
    normalisation: Mapping[str, Any]
    """What the network itself does with pixel values: bgr, then (value - mean) / std."""
    aggregation: float
    """Weight of similar pixels of the same image in the prediction (PLCA); 0 if there is none."""
    metrics: Mapping[str, float]
    """Of the checkpoint: mIoU on both validation sets and, on the target's, IoU of each class."""
    search: str
    run: str
    run_id: str
    """In MLflow."""
    checkpoint_sha256: str
    step: int
    """Training steps of the checkpoint."""
    data_fingerprint: str
    """Of the data it was trained on."""
    config: Mapping[str, Any]
    """Configuration of the run."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)

    def as_strings(self) -> dict[str, str]:
        """Return what ONNX takes: each field as JSON."""
        return {_PREFIX + name: json.dumps(value) for name, value in self.as_dict().items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Card":
        """Rebuild what `as_dict` returned, also after a way through JSON."""
        size = content["input_size"]
        own = {
            "classes": tuple(content["classes"]),
            "colors": tuple(tuple(color) for color in content["colors"]),
            "input_size": None if size is None else tuple(size),
        }
        return cls(**{**content, **own})

    @classmethod
    def from_strings(cls, content: Mapping[str, str]) -> "Card":
        """Rebuild what `as_strings` returned."""
        return cls.from_dict(
            {
                name.removeprefix(_PREFIX): json.loads(value)
                for name, value in content.items()
                if name.startswith(_PREFIX)
            }
        )


@dataclass(frozen=True)
class Origin:
    """Where a network comes from."""

    search: str
    run: str
    run_id: str
    checkpoint: Path
    data_fingerprint: str


def load_network(origin: Origin, device: torch.device) -> tuple[DeployedNetwork, Card]:
    """Return the network that a run deploys, without teacher and extra heads, and what is known of it.

    Raises:
        UsageError: If its checkpoint is missing or damaged.
    """
    deployed = evaluating.load_deployed(origin.checkpoint, {}, device)
    network, config = deployed.network, deployed.config
    summary = json.loads((origin.checkpoint / EVALUATION).read_text())
    aggregation = float(getattr(config.method, evaluating.AGGREGATION.removeprefix("method."), 0.0))
    size = config.augmentation.target_size
    pixels = _WHOLE_PIXELS
    if aggregation and size is None:
        pixels = min(pixels, _WHOLE_CELLS * stride(network) ** 2)
    mean, std = (part.flatten().tolist() for part in (network.mean, network.std))
    card = Card(
        classes=deployed.names,
        colors=_colors(summary, deployed),
        whole_pixels=pixels,
        input_size=size,
        normalisation={"bgr": network.normalisation.bgr, "mean": mean, "std": std},
        aggregation=aggregation,
        metrics={
            name: value for name, value in summary["metrics"].items() if name.startswith(("target_val/", "source_val/"))
        },
        search=origin.search,
        run=origin.run,
        run_id=origin.run_id,
        checkpoint_sha256=json.loads((origin.checkpoint / MANIFEST).read_text())["sha256"][STATE],
        step=deployed.step,
        data_fingerprint=origin.data_fingerprint,
        config=config.as_dict(),
    )
    return DeployedNetwork(network, size, config.augmentation.interpolation).to(device), card


def from_run(origin: Origin, device: torch.device) -> tuple["Predict", Card]:
    """Return what `open_exported` returns of the run's file, without exporting it."""
    network, card = load_network(origin, device)

    def predict(images: Tensor) -> Tensor:
        with torch.no_grad():
            probabilities: Tensor = network(images.to(device))
        return probabilities

    return predict, card


def _colors(summary: Mapping[str, Any], deployed: evaluating.Deployed) -> tuple[tuple[int, int, int], ...]:
    """Return the classes' colours, from the data if the checkpoint is older than colours in checkpoints."""
    if "colors" in summary:
        return tuple(tuple(color) for color in summary["colors"])
    try:
        return load_data(deployed.config.data)[0].classes.colors
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
    target = evaluating.new_folder(folder.expanduser().absolute())
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
        differences = {name: _difference(network, open_exported(whole / name)[0]) for name in (PT2, ONNX)}
        wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE}
        if wrong:
            raise ExportError(
                f"Class probabilities of exported files must be within {TOLERANCE:g} of the network's, but "
                + ", ".join(f"those of {name} differ by {value:.3g}" for name, value in wrong.items())
                + ". Nothing was written."
            )
        whole.rename(target)
    return differences


def _program(network: DeployedNetwork) -> ExportedProgram:
    batch, height, width = _EXAMPLE_SHAPE
    sides = {
        2: Dim("height", min=SMALLEST_SIDE, max=LARGEST_SIDE),
        3: Dim("width", min=SMALLEST_SIDE, max=LARGEST_SIDE),
    }
    shapes = ({0: Dim("batch", min=1, max=_LARGEST_BATCH), **sides},)
    example = torch.zeros(batch, 3, height, width, dtype=torch.uint8)
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
        "`segadapt predict` takes the run itself."
    )


def _difference(network: DeployedNetwork, exported: "Predict") -> float:
    """Return the largest difference of a class probability over images of several sizes."""
    generator = torch.Generator().manual_seed(0)
    differences = []
    for batch, height, width in _CHECKED_SHAPES:
        images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)
        with torch.no_grad():
            expected = network(images)
        found = exported(images)
        if found.shape != expected.shape:
            return float("inf")
        differences.append((found - expected).abs().max())
    return float(torch.stack(differences).max())  # NaN if one is


Predict = Callable[[Tensor], Tensor]
"""Class probabilities, (B, C, H, W) float32, of RGB images, (B, 3, H, W) uint8 on the CPU."""


def open_exported(path: Path, device: torch.device | None = None) -> tuple[Predict, Card]:
    """Open a file that `write` made.

    Args:
        path: Ends in .onnx or .pt2.
        device: Where it computes; None for the CPU. ONNX takes a GPU only with a build of onnxruntime for it.

    Raises:
        UsageError: If it is missing, damaged, or was made by another program.
    """
    if not path.is_file():
        raise UsageError(f"An exported network must be a file, but there is none at {path}. Correct the path.")
    device = device or torch.device("cpu")
    try:
        return _open_onnx(path, device) if path.suffix == ".onnx" else _open_pt2(path, device)
    except Exception as error:  # both libraries have many, and the file may hold anything
        raise UsageError(
            f"An exported network must be a whole file that `segadapt export` wrote, but {path} is not: "
            f"{type(error).__name__}: {error}. Export the run again."
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


def _open_pt2(path: Path, device: torch.device) -> tuple[Predict, Card]:
    from torch.export.passes import move_to_device_pass

    extra = {CARD: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.load(path, extra_files=extra)
    if device.type != "cpu":
        program = move_to_device_pass(program, device)
    module = program.module()

    def predict(images: Tensor) -> Tensor:
        with torch.no_grad():
            probabilities: Tensor = module(images.to(device))
        return probabilities

    return predict, Card.from_dict(json.loads(extra[CARD]))


def check_name(name: str) -> None:
    """Raise a UsageError unless MLflow and its search expressions take `name` for a model."""
    if not re.fullmatch(r"[\w .-]+", name):
        raise UsageError(
            f"--register must be letters, digits, spaces, '.', '_' or '-', but got {name!r}. Choose another name."
        )


def register(client: Any, name: str, card: Card, onnx: Path) -> str:
    """Put an exported network into MLflow's registry as a version that links to its run; returns the version.

    A checkpoint that is a version of that name already gets no second one.

    Args:
        client: An `MlflowClient`.
        name: Of the registered model; made if there is none.
        card: Of the network.
        onnx: The exported file.
    """
    from mlflow.exceptions import MlflowException

    tags = {
        "segadapt.search": card.search,
        "segadapt.trial": card.run,
        "segadapt.checkpoint_sha256": card.checkpoint_sha256,
        "segadapt.data": card.data_fingerprint,
    }
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for known in client.search_model_versions(f"name = '{name}'"):
        if known.run_id == card.run_id and tags.items() <= known.tags.items():
            return str(known.version)
    place = f"exported-{card.checkpoint_sha256[:8]}"
    with tempfile.TemporaryDirectory(prefix="segadapt-") as temporary:
        _save_pyfunc(Path(temporary) / "model", card, onnx)
        client.log_artifacts(card.run_id, str(Path(temporary) / "model"), place)
    source = f"{client.get_run(card.run_id).info.artifact_uri}/{place}"
    miou = card.metrics.get("target_val/miou")
    described = f"{card.run} of {card.search} at step {card.step}" + (f", target mIoU {miou:.3f}" if miou else "")
    return str(client.create_model_version(name, source, card.run_id, tags, description=described).version)


def _save_pyfunc(folder: Path, card: Card, onnx: Path) -> None:
    """Write the model as MLflow loads and serves it: the ONNX file and code that needs no segadapt."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # standard output is ours
    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)  # it misses pip, which uv leaves out
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    images, labels = (TensorSpec(np.dtype(np.uint8), shape) for shape in ((-1, 3, -1, -1), (-1, -1, -1)))
    mlflow.pyfunc.save_model(
        str(folder),
        python_model=str(Path(__file__).with_name("served_model.py")),
        artifacts={"network": str(onnx)},
        signature=ModelSignature(Schema([images]), Schema([labels])),
        input_example=np.random.default_rng(0).integers(0, 256, (1, 3, *_SERVED_EXAMPLE_SIZE), np.uint8),
        pip_requirements=[f"{package}=={version(package)}" for package in ("mlflow", "numpy", "onnxruntime")],
        metadata=card.as_dict(),
    )
