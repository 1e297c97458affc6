"""Exported networks in MLflow's registry."""

import logging
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from segadapt.platform.deployment.card import Card
from segadapt.platform.errors import UsageError
from segadapt.platform.storage.weights import WeightsOrigin
from segadapt.platform.tracking.client import mlflow_settings
from segadapt.platform.tracking.descriptions import weights_tags
from segadapt.platform.tracking.tags import DATA_TAG, MODEL_CHECKPOINT_TAG, MODEL_SEARCH_TAG, MODEL_TRIAL_TAG

_SERVED_EXAMPLE_SIZE = (64, 96)


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
        name: Name of the registered model; made if there is none.
        card: What is known of the network.
        onnx: The exported file.
    """
    from mlflow.exceptions import MlflowException

    tags = {
        MODEL_SEARCH_TAG: card.search,
        MODEL_TRIAL_TAG: card.run,
        MODEL_CHECKPOINT_TAG: card.checkpoint_sha256,
        DATA_TAG: card.data_fingerprint,
    }
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise

    def versions() -> list[int]:
        known = client.search_model_versions(f"name = '{name}'")
        same = (each for each in known if each.run_id == card.run_id and tags.items() <= each.tags.items())
        return sorted(int(each.version) for each in same)

    if earlier := versions():
        return str(earlier[0])
    place = f"exported-{card.checkpoint_sha256[:8]}"
    with tempfile.TemporaryDirectory(prefix="segadapt-") as temporary:
        with mlflow_settings():
            _save_pyfunc(Path(temporary) / "model", card, onnx)
        client.log_artifacts(card.run_id, str(Path(temporary) / "model"), place)
    source = f"{client.get_run(card.run_id).info.artifact_uri}/{place}"
    miou = card.metrics.get("target_val/miou")
    described = f"{card.run} of {card.search} at step {card.step}, target mIoU "
    described += f"{miou:.3f}" if miou is not None else "unknown: no target label to measure it by"
    if card.weights is not None:
        described += f"; began from {card.weights}, licence {card.weights_licence}"
        tags |= weights_tags(WeightsOrigin(card.weights, str(card.weights_licence), card.weights_sha256))
    made = int(client.create_model_version(name, source, card.run_id, tags, description=described).version)
    first = min(versions(), default=made)
    if first < made:  # another export of the same checkpoint registered it meanwhile
        client.delete_model_version(name, str(made))
    return str(min(first, made))


def _save_pyfunc(folder: Path, card: Card, onnx: Path) -> None:
    """Write the model as MLflow loads and serves it: the ONNX file and code that needs no segadapt."""
    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)  # it misses pip, which uv leaves out
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    images, labels = (TensorSpec(np.dtype(np.uint8), shape) for shape in ((-1, 3, -1, -1), (-1, -1, -1)))
    mlflow.pyfunc.save_model(
        str(folder),
        python_model=str(Path(__file__).with_name("served_model.py")),
        artifacts={"network": onnx.absolute().as_uri()},
        signature=ModelSignature(Schema([images]), Schema([labels])),
        input_example=np.random.default_rng(0).integers(0, 256, (1, 3, *_SERVED_EXAMPLE_SIZE), np.uint8),
        pip_requirements=[f"{package}=={version(package)}" for package in ("mlflow", "numpy", "onnxruntime")],
        metadata=card.as_dict(),
    )
