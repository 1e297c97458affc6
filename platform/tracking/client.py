"""How the tracking server is reached."""

import contextlib
import functools
import hashlib
import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from segadapt.platform.errors import redacted
from segadapt.platform.ray_internals.start import empty_variables, variable, variables_set
from segadapt.platform.settings.addresses import direct_to_loopback
from segadapt.platform.storage.folders import Place

_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # a repeated "create" whose first answer was lost would make a second run
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output is ours
    "MLFLOW_DISABLE_TELEMETRY": "true",  # else it tells its makers which functions are called
}
"""Variables of the environment that MLflow reads."""

_LEFT_BY_MLFLOW = ("_MLFLOW_TELEMETRY_SESSION_ID",)
"""Variables that MLflow sets or removes when it is imported."""


def waiting_folder(place: Place) -> Path:
    """Return the folder of records that wait for a server, named after it without the password it may hold."""
    if place.tracking_uri is None:
        return place.folders.tracking / "local"
    parts = urlsplit(redacted(place.tracking_uri.rstrip("/")))
    server = parts.netloc + parts.path
    digest = hashlib.sha256(f"{parts.scheme}://{server}".encode()).hexdigest()[:8]
    return place.folders.tracking / f"{re.sub('[^A-Za-z0-9.]+', '-', server).strip('-')[-60:]}-{digest}"


def mlflow_client(uri: str) -> Any:
    """Return an `MlflowClient` that gives up on an absent server at once; each request has `mlflow_settings`."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with mlflow_settings():
        return _client_class()(tracking_uri=uri)


@functools.cache
def _client_class() -> Any:
    """Return the class of clients; a function, since importing MLflow takes long."""
    from mlflow import MlflowClient

    class Client(MlflowClient):
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            return value if name.startswith("_") or not callable(value) else _with_settings(value)

    return Client


def _with_settings(request: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(request)
    def call(*words: Any, **options: Any) -> Any:
        with mlflow_settings():
            return request(*words, **options)

    return call


class _Settings:
    """Variables of the environment that are set while at least one thread needs them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._needed = 0
        self._variables = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._needed == 0:
                unset = {name: value for name, value in _SETTINGS.items() if variable(name) is None}
                settings = empty_variables("MLFLOW_") | unset | direct_to_loopback()
                self._variables.enter_context(variables_set(settings, _LEFT_BY_MLFLOW))
            self._needed += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._needed -= 1
            if self._needed == 0:
                self._variables.close()


_settings = _Settings()


def mlflow_settings() -> contextlib.AbstractContextManager[None]:
    """Have MLflow behave as `_SETTINGS` says meanwhile, in all threads; variables that the user has set win.

    MLflow reads the environment at each request. What was there before comes back when nobody needs this any more.
    """
    return _settings
