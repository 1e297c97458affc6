"""Ray: started locally or joined, and what it offers."""

import contextlib
import logging
import os
import signal
import threading
from collections import Counter
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
class Node:
    """What one machine of the cluster has."""

    cpus: int
    gpus: int

    def workers(self, cpus: int, gpus: float) -> int:
        """Return how many workers of so many CPUs and GPUs run here at once; a part of a GPU is a part of one GPU."""
        if gpus == 0:
            return self.cpus // cpus
        fitting = int(self.gpus / gpus) if gpus >= 1 else self.gpus * int(1 / gpus + 1e-6)
        return min(fitting, self.cpus // cpus)


@dataclass(frozen=True)
class Capacity:
    """What the cluster has. A worker runs on one node, a trial of several workers on one or several."""

    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> int:
        """Of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        """Of all nodes."""
        return sum(node.gpus for node in self.nodes)

    def workers(self, cpus: int, gpus: float) -> int:
        """Return how many workers of so many CPUs and GPUs run at once."""
        return sum(node.workers(cpus, gpus) for node in self.nodes)

    def __str__(self) -> str:
        counts = Counter(self.nodes).most_common()
        return " and ".join(f"{count} of {node.cpus} CPUs and {node.gpus} GPUs" for node, count in counts) or "none"


def worker_environment() -> dict[str, str]:
    """Return the environment that trials run in."""
    return {**_DEFAULTS, **os.environ}


def this_machine() -> Capacity:
    """Return what Ray would find on this machine, without starting it."""
    import torch

    return Capacity((Node(os.cpu_count() or 1, torch.cuda.device_count()),))


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
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        yield Capacity(tuple(Node(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes))
    finally:
        ray.shutdown()


def treat_termination_as_interrupt() -> None:
    """Make SIGTERM end this process as Ctrl-C does, with everything it started; Ray's own handler aborts it instead."""
    if threading.current_thread() is threading.main_thread():  # Python allows it there alone
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell script's background jobs
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)
