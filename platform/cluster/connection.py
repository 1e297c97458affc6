"""Ray, started on this machine or joined."""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator

from segadapt.platform.cluster.capacity import Capacity, capacity_of_cluster, this_machine
from segadapt.platform.errors import NotStartedError, UsageError
from segadapt.platform.ray_internals.start import (
    LEFT_BY_RAY,
    authenticated,
    cluster_address,
    empty_variables,
    keep_uv_out,
    leave,
    on_loopback,
    patience_with_ray,
    private_session,
    variable,
    variables_set,
)
from segadapt.platform.ray_internals.tune import memory_kills_are_deaths, no_secrets_for_trials
from segadapt.platform.settings.addresses import direct_to_loopback
from segadapt.platform.settings.resources import Allocation, Resources
from segadapt.platform.settings.termination import (
    hangup_held_back,
    signal_handlers_kept,
    treat_termination_as_interrupt,
)
from segadapt.platform.settings.text import first_line

_DEFAULTS = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers use this environment instead of building one each
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # with `verbose=0`: what is shown is ours
    "TUNE_GLOBAL_CHECKPOINT_S": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_MAX_PENDING_TRIALS_PG": "16",
    "RAY_worker_niceness": "0",  # that of the command: Ray's own 15 starves trials wherever anybody else is at work
    "OMP_NUM_THREADS": "1",
    "GOMP_SPINCOUNT": "10000",  # 0.25 ms: spinning for long slows busy machines down, without it threads wake late
}

_PATIENCE_S = 300
"""Seconds that Ray has to start at the second try; at the first one it has the 30 of its own."""

_ANSWER_S = 10.0
"""Seconds in which whoever listens at a cluster's address must say that it understands HTTP/2, as Ray does."""

_HTTP2_FRAME_BYTES = 9
"""Length of the head of a frame; its fourth byte is the kind."""

_HTTP2_SETTINGS = b"\x04"

_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _HTTP2_SETTINGS + b"\0\0\0\0\0"
"""What a client says first (RFC 9113, section 3.4), and no settings; a server answers with its own."""

_READ_BY_RAY = ("RAY_", "TUNE_", "OMP_", "GOMP_", "GLOO_", "NCCL_")
"""How variables begin that Ray and the processes of trials read. An empty one is as one that is not set."""

logger = logging.getLogger(__name__)


def worker_environment() -> dict[str, str]:
    """Return the environment that trials run in."""
    filled = {name: value for name, value in os.environ.items() if name not in empty_variables(*_READ_BY_RAY)}
    return {**filled, **_missing_variables()}


def _missing_variables() -> dict[str, str]:
    """Return the variables that trials need and the user has not set."""
    missing = {name: value for name, value in _DEFAULTS.items() if variable(name) is None}
    if variable("OMP_WAIT_POLICY") is not None:  # the user's, which the number of spins would override
        missing.pop("GOMP_SPINCOUNT", None)
    return missing


@contextlib.contextmanager
def connect(address: str | None, *, verbose: bool = False, resources: Resources | None = None) -> Iterator[Capacity]:
    """Start Ray on this machine, or join a cluster; leave it, the environment and signal handlers as they were found.

    A Ray that is started here listens on 127.0.0.1 alone and asks for a token that only its own processes know. To a
    cluster that is joined, this process shows the token that Ray finds: RAY_AUTH_TOKEN, the file that
    RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token. RAY_AUTH_MODE overrides both.

    Args:
        address: Running cluster, as seen from one of its machines: `auto` or HOST:PORT. None takes RAY_ADDRESS,
            which Ray sets in its jobs, or else starts a local one that ends with this command.
        verbose: Show what the workers print.
        resources: What a trial is to take; None if no trial will run.

    Raises:
        UsageError: If the cluster cannot be reached, or this process is in a cluster already.
        NotStartedError: If Ray does not start.
    """
    with (
        variables_set(empty_variables(*_READ_BY_RAY) | _missing_variables() | direct_to_loopback(), LEFT_BY_RAY),
        signal_handlers_kept(),
        _connected(address, verbose, resources) as capacity,
    ):
        yield capacity


@contextlib.contextmanager
def _connected(address: str | None, verbose: bool, resources: Resources | None) -> Iterator[Capacity]:
    import ray

    if ray.is_initialized():  # of whoever calls: leaving it would end theirs
        raise UsageError(
            "This process must not be in a Ray cluster yet, since it is to start or join one, but it is in one. Call "
            "`ray.shutdown()` first, or run the command in a shell."
        )
    keep_uv_out()
    address, named_by = _named(address)
    if address is not None:
        check_address(address, named_by)
    logging.getLogger("ray").setLevel(logging.INFO if verbose else logging.ERROR)
    with authenticated(local=address is None), contextlib.nullcontext() if address else private_session():
        try:
            with hangup_held_back():
                if address is None:
                    _start(verbose, dashboard=_needs_dashboard(resources))
                else:
                    _join(address, named_by, verbose)
                treat_termination_as_interrupt()
            if address is not None and variable("RAY_AUTH_MODE") == "disabled":
                logger.warning(
                    "The Ray cluster %s is joined without a token: if it needs none, whoever reaches its ports runs "
                    "code on it. docs/security.md tells how to close it.",
                    address,
                )
            with no_secrets_for_trials(joined=address is not None), memory_kills_are_deaths():
                yield capacity_of_cluster(joined=address is not None)
        finally:
            leave()


def _named(address: str | None) -> tuple[str | None, str]:
    """Return the address of the cluster to join, None if there is none, and what named it."""
    if address in (None, "auto") and (set_for_all := variable("RAY_ADDRESS")):  # which Ray takes for `auto` as well
        return set_for_all, "RAY_ADDRESS"
    return address, "--address"


def _start(verbose: bool, *, dashboard: bool) -> None:
    """Start Ray on this machine; a busy one is given more time at a second try.

    Raises:
        NotStartedError: If Ray does not start either time.
    """
    import ray

    for seconds in (None, _PATIENCE_S):
        try:
            with on_loopback(dashboard=dashboard), patience_with_ray(seconds):
                # "local", or Ray would join whatever cluster was started on this machine last
                ray.init(
                    address="local", log_to_driver=verbose, logging_level=logging.ERROR, include_dashboard=dashboard
                )
            return
        except UsageError:
            raise
        except Exception as error:  # Ray has no type of its own for what did not come up in time
            ray.shutdown()
            if seconds is not None:
                raise NotStartedError(
                    f"Ray must start on this machine, but did not, not even with {seconds} s for it at a second try: "
                    f"{first_line(error).rstrip('.')}. Is the machine short of processors, memory or room in its "
                    "temporary folder? Free some, then repeat the command."
                ) from error
            logger.warning(
                "Ray did not start (%s); trying again, with %d s for it.", first_line(error).rstrip("."), _PATIENCE_S
            )


def _join(address: str, named_by: str, verbose: bool) -> None:
    """Join a cluster.

    Raises:
        UsageError: If it does not answer, or refuses.
    """
    import ray

    try:
        if (lack := why_no_cluster(address)) is not None:  # Ray itself would try for minutes, deaf to signals
            raise ConnectionError(lack)
        ray.init(address=address, log_to_driver=verbose, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        instead = "Without --address" if named_by == "--address" else f"Without it (`unset {named_by}`)"
        raise UsageError(
            f"{named_by} must name a running Ray cluster that takes this machine's token, but {address!r} did not "
            f"answer: {first_line(error).rstrip('.')}. Is it started, and is its token in ~/.ray/auth_token or "
            f"RAY_AUTH_TOKEN_PATH? {instead} Ray is started here."
        ) from error


def why_no_cluster(address: str) -> str | None:
    """Return why there can be no Ray cluster at an address, found within `_ANSWER_S` seconds; None if there may be one.

    Args:
        address: `auto` or HOST:PORT.

    Raises:
        ConnectionError: If there is none that `auto` could mean.
        ValueError: If it is no address.
    """
    if (where := cluster_address(address)) is None:
        return None
    host, _, port = where.rpartition(":")
    deadline, answer = time.monotonic() + _ANSWER_S, b""
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):  # it says nothing to who does not
                return None
            connection.sendall(_HTTP2_GREETING)
            while len(answer) < _HTTP2_FRAME_BYTES:
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                if not (part := connection.recv(_HTTP2_FRAME_BYTES - len(answer))):
                    break
                answer += part
    except TimeoutError:
        return f"{where} says nothing within {_ANSWER_S:.0f} s"
    except OSError as error:
        return f"nothing listens at {where} ({error.strerror or error})"
    return None if answer[3:4] == _HTTP2_SETTINGS else f"what listens at {where} is no Ray cluster"


def _needs_dashboard(resources: Resources | None) -> bool:
    """Return whether a Ray that is started here must have its dashboard.

    Ray Train's own trainer leaves cleaning up after a trial that is stopped to a process that asks the dashboard.
    """
    if resources is None:
        return False
    gpus = float(this_machine().gpus > 0) if resources.gpus is None else resources.gpus
    if not Allocation(resources.workers, gpus, launcher=resources.launcher).uses_train:
        return False
    from segadapt.platform.ray_internals.train import workers_are_in_the_trial

    return not workers_are_in_the_trial()


def check_address(address: str, named_by: str = "--address") -> None:
    """Refuse the addresses of Ray's other services.

    Raises:
        UsageError: If the address is neither `auto` nor HOST:PORT.
    """
    if not address or address == "local" or "://" in address:
        raise UsageError(
            f"{named_by} must be auto or HOST:PORT, on a machine of the cluster, but got {address!r}. A search needs a "
            "process there: `segadapt submit --address http://127.0.0.1:8265 -- search ...` starts it from here, "
            "through a tunnel to the head's port 8265."
        )
