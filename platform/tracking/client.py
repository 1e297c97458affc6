"""How the tracking server is reached, and what follows from its errors."""

import contextlib
import enum
import errno
import functools
import hashlib
import itertools
import logging
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from segadapt.platform.errors import UsageError, redacted
from segadapt.platform.ray_internals.start import empty_variables, variable, variables_set
from segadapt.platform.settings.addresses import direct_to_loopback
from segadapt.platform.settings.text import first_line
from segadapt.platform.storage.folders import Place
from segadapt.platform.storage.retries import retry

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

_ANSWER_S = 10.0
"""Seconds within which a server must answer a command that reads."""

_REQUEST_S = 60.0
"""Seconds that a server which has just answered may take for a request: the runs of a large search are one."""

_RETRY_S = 3.0
"""Seconds for which a command tries a request to read again, since a server may fail some."""

_READS = ("get_", "search_", "list_")
"""How the client's methods begin that change nothing, so that they may be repeated."""


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


def reading_client(place: Place) -> Any:
    """Return a client for a command that shows what is tracked; a server answers it now.

    A server that is away, hangs or refuses the login is told in one sentence, now and at each later request.

    Raises:
        UsageError: If the server does not answer within ten seconds.
    """
    if place.tracking_uri is None:
        return mlflow_client(place.tracking_url)
    try:
        client = _AskingClient(mlflow_client(place.tracking_url), place)
        client.search_experiments(max_results=1)
    except UsageError:
        raise
    except Exception as error:  # whatever MLflow raises for an address that is none of a server's
        raise absence(place, first_line(error)) from error
    client.limit_s = _REQUEST_S
    return client


class _AskingClient:
    """An `MlflowClient` whose failures are one sentence, and whose requests to read are repeated and never hang."""

    def __init__(self, client: Any, place: Place) -> None:
        self._client, self._place = client, place
        self.limit_s = _ANSWER_S

    def __getattr__(self, name: str) -> Any:
        request = getattr(self._client, name)
        return functools.partial(self._read if name.startswith(_READS) else self._write, request)

    def _read(self, request: Callable[..., Any], *words: Any, **options: Any) -> Any:
        def attempt() -> Any:
            return _within(self.limit_s, functools.partial(self._ask, request, *words, **options))

        try:
            return retry(attempt, _FailedRequestError, _RETRY_S, pauses=itertools.repeat(0.3), level=logging.DEBUG)
        except _FailedRequestError as error:
            raise absence(self._place, str(error)) from error
        except TimeoutError as error:
            raise absence(self._place, f"no answer within {self.limit_s:g} s") from error

    def _write(self, request: Callable[..., Any], *words: Any, **options: Any) -> Any:
        try:
            return self._ask(request, *words, **options)
        except _FailedRequestError as error:
            raise absence(self._place, str(error)) from error

    def _ask(self, request: Callable[..., Any], *words: Any, **options: Any) -> Any:
        try:
            return request(*words, **options)
        except Exception as error:
            if failure_of(error) is Failure.REFUSED:  # the server answers, and means this request
                raise
            raise _FailedRequestError(_cause(error)) from error


def absence(place: Place, reason: str) -> UsageError:
    """Return the error that a tracking server does not answer, with what works without it."""
    return UsageError(
        f"--tracking-uri must name an MLflow server that answers, but {redacted(place.tracking_uri)} does not "
        f"({reason}). Start it again or correct the address; meanwhile `--resume` and running commands go on, with "
        f"records that wait in {place.folders.tracking}; `doctor`, `cache`, `data` and `predict FILE` need no server."
    )


def _cause(error: BaseException) -> str:
    """Return what went wrong first, such as a connection that was refused: MLflow wraps it in four errors."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return first_line(error)[:300]


class _FailedRequestError(Exception):
    """A server did not do what it was asked for, though nothing is wrong with the request as far as one knows."""


def _within(limit_s: float, request: Callable[[], Any]) -> Any:
    """Return what a request returns.

    Raises:
        TimeoutError: If it takes longer; it goes on in a thread that keeps no process alive.
    """
    answer: Future[Any] = Future()

    def ask() -> None:
        try:
            answer.set_result(request())
        except BaseException as error:  # whoever waits gets it
            answer.set_exception(error)

    threading.Thread(target=ask, name="segadapt-request", daemon=True).start()
    return answer.result(limit_s)


class Failure(enum.Enum):
    """What follows from an error of MLflow's client."""

    AWAY = enum.auto()
    """The server or its database is away or busy, or refuses the login: it will be there again."""
    DOUBTFUL = enum.auto()
    """The server failed or the connection broke: chance, or this record's own fault."""
    REFUSED = enum.auto()
    """The server says what is wrong with this record: it will say so again."""


_AWAY = (401, 403, 408, 425, 429, 502, 503, 504)
"""Statuses that say nothing about a request: no login, no permission, too slow, too much, nobody behind the proxy."""


def failure_of(error: Exception) -> Failure:
    """Return what follows from an error of MLflow's client."""
    from mlflow.exceptions import MlflowException
    from requests import HTTPError
    from sqlalchemy.exc import OperationalError

    if isinstance(error, MlflowException):  # a connection that fails or breaks has status 500
        status: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
        says_why = error.error_code not in ("BAD_REQUEST", "ENDPOINT_NOT_FOUND")  # its database, or a proxy, failed
        return _failure_of_status(status, says_why=says_why)
    if isinstance(error, HTTPError):  # an upload through the server
        return Failure.AWAY if error.response is None else _failure_of_status(error.response.status_code, says_why=True)
    if isinstance(error, OperationalError):
        return Failure.AWAY
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return Failure.AWAY if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO) else Failure.DOUBTFUL
    return Failure.REFUSED


def _failure_of_status(status: int, *, says_why: bool) -> Failure:
    if status in _AWAY:
        return Failure.AWAY
    return Failure.REFUSED if 400 <= status < 500 and says_why else Failure.DOUBTFUL


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
