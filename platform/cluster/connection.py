"""Ray, started on this machine or joined."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from segadapt.platform.cluster.capacity import Capacity, capacity_of_cluster, this_machine
from segadapt.platform.errors import UsageError
from segadapt.platform.ray_internals.start import (
    LEFT_BY_RAY,
    authenticated,
    empty_variables,
    keep_uv_out,
    on_loopback,
    private_session,
    variable,
    variables_set,
)
from segadapt.platform.ray_internals.tune import memory_kills_are_deaths, no_secrets_for_trials
from segadapt.platform.settings.resources import Allocation, Resources
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
    "OMP_NUM_THREADS": "1",
    "GOMP_SPINCOUNT": "10000",  # 0.25 ms: spinning for long slows busy machines down, without it threads wake late
}

_READ_BY_RAY = ("RAY_", "TUNE_", "OMP_", "GOMP_", "GLOO_", "NCCL_")
"""How variables begin that Ray and the processes of trials read. An empty one is as one that is not set."""

logger = logging.getLogger(__name__)


def worker_environment() -> dict[str, str]:
    """Return the environment that trials run in."""
    given = {name: value for name, value in os.environ.items() if name not in empty_variables(*_READ_BY_RAY)}
    return {**given, **_missing_variables()}


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
        UsageError: If the cluster cannot be reached.
    """
    with (
        variables_set(empty_variables(*_READ_BY_RAY) | _missing_variables(), LEFT_BY_RAY),
        signal_handlers_kept(),
        _connected(address, verbose, resources) as capacity,
    ):
        yield capacity


@contextlib.contextmanager
def _connected(address: str | None, verbose: bool, resources: Resources | None) -> Iterator[Capacity]:
    import ray

    keep_uv_out()
    address = variable("RAY_ADDRESS") if address is None else address
    if address is not None:
        check_address(address)
    logging.getLogger("ray").setLevel(logging.INFO if verbose else logging.ERROR)
    local: dict[str, Any] = {} if address else {"include_dashboard": _needs_dashboard(resources)}
    with authenticated(local=address is None), contextlib.nullcontext() if address else private_session():
        try:
            with contextlib.nullcontext() if address else on_loopback(dashboard=local["include_dashboard"]):
                # "local", or Ray would join whatever cluster was started on this machine last
                ray.init(address=address or "local", log_to_driver=verbose, logging_level=logging.ERROR, **local)
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise UsageError(
                f"--address must name a running Ray cluster that takes this machine's token, but {address!r} did not "
                f"answer: {first_line(error).rstrip('.')}. Is it started, and is its token in ~/.ray/auth_token or "
                "RAY_AUTH_TOKEN_PATH? Without --address Ray is started here."
            ) from error
        treat_termination_as_interrupt()
        try:
            if address is not None and variable("RAY_AUTH_MODE") == "disabled":
                logger.warning(
                    "The Ray cluster %s is joined without a token: if it needs none, whoever reaches its ports runs "
                    "code on it. docs/security.md tells how to close it.",
                    address,
                )
            with no_secrets_for_trials(joined=address is not None), memory_kills_are_deaths():
                yield capacity_of_cluster(joined=address is not None)
        finally:
            ray.shutdown()


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


def check_address(address: str) -> None:
    """Refuse the addresses of Ray's other services.

    Raises:
        UsageError: If the address is neither `auto` nor HOST:PORT.
    """
    if not address or "://" in address:
        raise UsageError(
            f"--address must be auto or HOST:PORT, on a machine of the cluster, but got {address!r}. A search needs a "
            "process there: `segadapt submit --address http://127.0.0.1:8265 -- search ...` starts it from here, "
            "through a tunnel to the head's port 8265."
        )


def treat_termination_as_interrupt() -> None:
    """Make SIGTERM end this process as Ctrl-C does, with everything it started; Ray's own handler aborts it instead."""
    if threading.current_thread() is threading.main_thread():  # Python allows it there alone
        signal.signal(signal.SIGTERM, _interrupt)


@contextlib.contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Restore what Ray, Tune and this module replace meanwhile: a notebook or prompt lives on."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:  # else it was set outside of Python
                    signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell script's background jobs
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)
