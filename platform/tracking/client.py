"""How the tracking server is reached."""

import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from segadapt.platform.storage.folders import Place


def waiting_folder(place: Place) -> Path:
    """Return the folder of records that wait for a server, named after it without the password it may hold."""
    if place.tracking_uri is None:
        return place.folders.tracking / "local"
    parts = urlsplit(place.tracking_uri.rstrip("/"))
    server = parts.netloc.rpartition("@")[2] + parts.path
    digest = hashlib.sha256(f"{parts.scheme}://{server}".encode()).hexdigest()[:8]
    return place.folders.tracking / f"{re.sub('[^A-Za-z0-9.]+', '-', server).strip('-')[-60:]}-{digest}"


def mlflow_client(uri: str) -> Any:
    """Return an `MlflowClient` that gives up on an absent server at once.

    It never repeats a request by itself: a repeated "create" whose first answer was lost would make a second run.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output is ours
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # else it tells its makers which functions are called
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)
