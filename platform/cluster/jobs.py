"""Commands handed to a cluster as Ray Jobs: they run there, on after this machine is switched off."""

import contextlib
import itertools
import json
import logging
import secrets
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from segadapt.platform.errors import UsageError, holds_password, redacted
from segadapt.platform.ray_internals.start import LEFT_BY_RAY, authenticated, empty_variables, variables_set
from segadapt.platform.settings.addresses import direct_to_loopback
from segadapt.platform.settings.config import read_experiment
from segadapt.platform.settings.text import first_line
from segadapt.platform.storage.folders import check_name
from segadapt.platform.storage.retries import retry

_COMMANDS = ("search", "train", "finish")
"""Commands that train."""

_ENDED = ("succeeded", "failed", "stopped")

_POLL_S = 1.0
"""Seconds between two looks at a job's log."""

_ANSWER_S = 10.0
"""Seconds in which Ray's dashboard must answer."""

_READY_S = 120.0
"""Seconds that a head which was just started may need until it takes jobs."""


class _NotReadyError(RuntimeError):
    """The head was just started and takes no jobs yet."""


@dataclass(frozen=True)
class Job:
    """A command on a cluster."""

    name: str
    state: str
    """pending, running, succeeded, failed or stopped."""
    command: str
    started: str | None
    """Time of its start in UTC."""
    message: str


def is_jobs_address(address: str | None) -> bool:
    """Return whether an address is that of Ray Jobs rather than of a cluster to join."""
    return address is not None and address.startswith(("http://", "https://"))


def submit(words: Sequence[str], *, address: str, name: str | None = None) -> str:
    """Start a command on a cluster and return the job's name.

    Nothing but the command is sent; an experiment file's settings become part of it.

    Args:
        words: The command, such as `search sdca --storage /mnt/segadapt/runs`.
        address: Address of the cluster's Ray Jobs, http://HOST:PORT.
        name: Name of the job; None makes one.

    Raises:
        UsageError: If the command cannot run there, or the cluster does not answer.
    """
    _check_command(words)
    if name is not None:
        check_name(name)
    words = _self_contained(words)
    _check_passwords(words)
    name = name or f"{words[0]}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    command = shlex.join(["python", "-m", "segadapt.platform.cli", *words])
    with _client(address) as client:
        if any(job.submission_id == name for job in client.list_jobs()):
            raise UsageError(f"--name must be new, but the cluster has a job {name!r}. Choose another.")
        _start(client, f"PYTHONUNBUFFERED=1 exec {command}", name)
    return name


def _start(client: Any, command: str, name: str) -> None:
    """Start a job, as soon as the head's agent is ready for one."""

    def submit() -> None:
        try:
            client.submit_job(entrypoint=command, submission_id=name)
        except RuntimeError as error:
            if "No available agent" in str(error):
                raise _NotReadyError(str(error)) from error
            raise

    retry(submit, _NotReadyError, _READY_S, pauses=itertools.repeat(_POLL_S), level=logging.DEBUG)


def jobs(address: str) -> list[Job]:
    """Return the jobs that a cluster knows, oldest first.

    Raises:
        UsageError: If the cluster does not answer.
    """
    with _client(address) as client:
        listed = [job for job in client.list_jobs() if job.submission_id is not None]
    return [_job(job) for job in sorted(listed, key=lambda job: job.start_time or 0)]


def logs(name: str, address: str, *, follow: bool) -> Iterator[str]:
    """Yield what a job has printed, and with `follow` what it prints until it ends.

    Raises:
        UsageError: If there is no such job, or the cluster does not answer.
    """
    shown = 0
    with _client(address) as client:
        while True:
            state = _known(client, name).state
            text = client.get_job_logs(name)
            yield text[shown:]
            shown = len(text)
            if not follow or state in _ENDED:
                return
            time.sleep(_POLL_S)


def stop(name: str, address: str) -> bool:
    """End a job as SIGTERM does; returns False if it had ended. What it was doing goes on with `--resume`.

    Raises:
        UsageError: If there is no such job, or the cluster does not answer.
    """
    with _client(address) as client:
        _known(client, name)
        return bool(client.stop_job(name))


@contextlib.contextmanager
def _client(address: str) -> Iterator[Any]:
    """Connect to Ray Jobs, with the token that Ray finds.

    Raises:
        UsageError: If it does not answer, or refuses a request.
    """
    with variables_set(empty_variables("RAY_"), LEFT_BY_RAY):
        from ray.exceptions import RayError

    if not is_jobs_address(address):
        raise UsageError(
            f"--address must be that of Ray's dashboard, such as http://127.0.0.1:8265, but got {address!r}. "
            "`ssh -N -L 8265:127.0.0.1:8265 HEAD` brings it here."
        )
    logging.getLogger("ray").setLevel(logging.ERROR)
    with authenticated(local=False), variables_set(direct_to_loopback()):
        try:
            _wait_for_answer(address)
            yield _connected(address)
        except (ConnectionError, RuntimeError, RayError) as error:
            answer = redacted(error).strip().splitlines()[0]
            raise UsageError(
                f"--address must be Ray's dashboard on the cluster's head, but {redacted(address)} answered: {answer}\n"
                "Is the tunnel open (`ssh -N -L 8265:127.0.0.1:8265 HEAD`), and the cluster's token in "
                "~/.ray/auth_token, RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN?"
            ) from error


def _connected(address: str) -> Any:
    """Return Ray's client.

    Raises:
        ConnectionError: If what answers is something else.
    """
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (KeyError, ValueError) as error:  # it looks for a version in whatever comes
        raise ConnectionError(f"not as Ray's dashboard does ({error!r})") from error


def _wait_for_answer(address: str) -> None:
    """Wait until somebody answers at an address: Ray's own client would wait for ever.

    Raises:
        ConnectionError: If nobody does within `_ANSWER_S` seconds.
    """
    import requests

    try:
        requests.head(address, timeout=_ANSWER_S).close()  # whatever the answer says, a missing token included
    except requests.RequestException as error:
        raise ConnectionError(f"nothing within {_ANSWER_S:.0f} s ({first_line(error)})") from error


def _known(client: Any, name: str) -> Job:
    by_name = {job.submission_id: job for job in client.list_jobs() if job.submission_id is not None}
    if name not in by_name:
        raise UsageError(f"JOB must be known to the cluster, but got {name!r}. Known: {', '.join(by_name) or 'none'}.")
    return _job(by_name[name])


def _job(details: Any) -> Job:
    started = details.start_time and f"{datetime.fromtimestamp(details.start_time / 1000, UTC):%Y-%m-%d %H:%M:%S}"
    command = details.entrypoint.partition(" -m segadapt.platform.cli ")[2] or details.entrypoint
    state, message = str(details.status.value).lower(), redacted(details.message or "")
    return Job(details.submission_id, state, redacted(command), started, message)


def _check_command(words: Sequence[str]) -> None:
    """Refuse what would run elsewhere than meant, or show a password to whoever lists the jobs."""
    if not words or words[0] not in _COMMANDS:
        raise UsageError(
            f"A command to submit must be one of {', '.join(_COMMANDS)}, but got {' '.join(words[:1]) or 'none'}. "
            "Example: segadapt submit -- search sdca --storage /mnt/segadapt/runs"
        )
    if _values(words, "--address"):
        raise UsageError("A command to submit must have no --address, since it runs where it is sent to. Leave it out.")
    storages = _values(words, "--storage")
    if not storages or not all(Path(storage).is_absolute() for storage in storages):
        raise UsageError(
            "A command to submit must have --storage with an absolute path, a folder that all nodes see, but "
            f"got {' and '.join(storages) or 'none'}. Example: --storage /mnt/segadapt/runs"
        )


def _check_passwords(words: Sequence[str]) -> None:
    """Refuse a password in any word of a command: the cluster shows commands to whoever reaches it."""
    for word in words:
        if holds_password(word):
            raise UsageError(
                "A command to submit must hold no password, since the cluster shows commands to whoever reaches it, "
                f"but got one in {redacted(word)}. PostgreSQL's is read from ~/.pgpass or PGPASSWORD on the head, "
                "MLflow's from MLFLOW_TRACKING_PASSWORD, and those of buckets from AWS_*."
            )


def _values(words: Sequence[str], name: str) -> list[str]:
    """Return the values of an option in a command; it may be repeated, and the last one would count."""
    following = [after for word, after in zip(words, [*words[1:], ""], strict=True) if word == name]
    return following + [word.removeprefix(f"{name}=") for word in words if word.startswith(f"{name}=")]


def without_option(words: Sequence[str], name: str) -> list[str]:
    """Return a command without an option and its value."""
    kept = [word for word in words if not word.startswith(f"{name}=")]
    while name in kept:
        index = kept.index(name)
        del kept[index : index + 2]
    return kept


def _self_contained(words: Sequence[str]) -> list[str]:
    """Return a command that holds the settings of its experiment file: the cluster does not have the file."""
    paths = _values(words, "--config")
    if not paths:
        return list(words)
    if len(paths) > 1:
        raise UsageError(f"--config must be given once, but got {' and '.join(paths)}. Keep one.")
    kept = without_option(words, "--config")
    typed = {word.partition("=")[0] for word in kept}
    settings = read_experiment(Path(paths[0]))
    return [*kept, *(f"{key}={json.dumps(value)}" for key, value in settings.items() if key not in typed)]
