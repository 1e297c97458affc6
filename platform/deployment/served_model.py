"""What MLflow serves of an exported network. Copied into each registered model: needs onnxruntime and numpy alone."""

from typing import Any

import numpy as np
import onnxruntime
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel


class ServedSegmenter(PythonModel):
    """Labels images with the ONNX file among its artifacts, `network`."""

    def load_context(self, context: Any) -> None:
        """Open the file, on a GPU if this onnxruntime knows one."""
        providers = onnxruntime.get_available_providers()
        self._session = onnxruntime.InferenceSession(context.artifacts["network"], providers=providers)

    # mlflow takes the type hint of the input for a schema, and leaves it to the signature if it is this one
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> Any:
        """Return class indices, (B, H, W) uint8, of RGB images, (B, 3, H, W) uint8."""
        (probabilities,) = self._session.run(None, {"images": np.asarray(model_input, np.uint8)})
        return probabilities.argmax(1).astype(np.uint8)


set_model(ServedSegmenter())
