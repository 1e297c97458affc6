"""Ray: started locally or joined, and what it offers."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from segadapt.platform.errors import UsageError

_DEFAULTS = {
    "RAY_AUTH_MODE": "disabled",  # decided here: Ray's own default depends on what ran before on the machine
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
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while waiting slow a busy machine down tenfold
}


@dataclass(frozen=True)
class Capacity:
    """What the cluster has in all."""

    cpus: int
    gpus: int


@contextlib.contextmanager
def connect(address: str | None, *, dashboard: bool, verbose: bool = False) -> Iterator[Capacity]:
    """Start Ray on this machine, or join a cluster; leave it as it was found.

    Args:
        address: Of a running cluster, or None for a local one that ends with this command.
        dashboard: Run the dashboard process (on 127.0.0.1): Ray Train's clean-up needs it.
        verbose: Show what the workers print.

    Raises:
        UsageError: If the cluster cannot be reached.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    import ray

    logging.getLogger("ray").setLevel(logging.INFO if verbose else logging.ERROR)
    local: dict[str, Any] = {} if address else {"include_dashboard": dashboard, "dashboard_host": "127.0.0.1"}
    try:
        # "local", or Ray would join whatever cluster was started on this machine last
        ray.init(address=address or "local", log_to_driver=verbose, logging_level=logging.ERROR, **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"--address must name a running Ray cluster, but {address!r} did not answer: {error}. "
            "Start one with `ray start --head`, or leave --address out."
        ) from error
    treat_termination_as_interrupt()
    try:
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield Capacity(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))
    finally:
        ray.shutdown()


def treat_termination_as_interrupt() -> None:
    """Make SIGTERM end this process as Ctrl-C does, with everything it started; Ray's own handler aborts it instead."""
    if threading.current_thread() is threading.main_thread():  # Python allows it there alone
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
