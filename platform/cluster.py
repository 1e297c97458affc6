"""Ray: started locally or joined, and what it offers."""

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from segadapt.platform.errors import UsageError

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


_LAUNCHED = "~/ray_bootstrap_config.yaml"
"""Where `ray up` leaves the cluster file on the head."""

_LOOPBACK = "127.0.0.1"

_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Where the workers of a trial listen for each other; without it, where the machine's name leads."""

SHORT_OF_MEMORY = "its node was short of memory, so that Ray ended its process"
"""How the error begins of a trial that this happened to."""

logger = logging.getLogger(__name__)


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
    joined: bool = False
    """Whether it ran before: it may have several machines, and an autoscaler that adds some."""

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
    defaults = dict(_DEFAULTS)
    if "OMP_WAIT_POLICY" in os.environ:  # the user's, which the number of spins would override
        del defaults["GOMP_SPINCOUNT"]
    return defaults | os.environ


def this_machine() -> Capacity:
    """Return what Ray would find on this machine, without starting it."""
    import torch

    return Capacity((Node(os.cpu_count() or 1, torch.cuda.device_count()),))


@contextlib.contextmanager
def connect(address: str | None, *, verbose: bool = False) -> Iterator[Capacity]:
    """Start Ray on this machine, or join a cluster; leave it as it was found.

    A Ray that is started here listens on 127.0.0.1 alone and asks for a token that only its own processes know. To a
    cluster that is joined, this process shows the token that Ray finds: RAY_AUTH_TOKEN, the file that
    RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token. RAY_AUTH_MODE overrides both.

    Args:
        address: Of a running cluster, as seen from one of its machines: `auto` or HOST:PORT. None takes RAY_ADDRESS,
            which Ray sets in its jobs, or else starts a local one that ends with this command.
        verbose: Show what the workers print.

    Raises:
        UsageError: If the cluster cannot be reached.
    """
    os.environ.update(worker_environment())
    import ray
    from ray._private import ray_constants

    # Ray reads this one at import, which may have been before: then workers would be built anew by `uv run`.
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] not in ("0", "false")
    address = address or os.environ.get("RAY_ADDRESS")
    if address is not None:
        check_address(address)
    logging.getLogger("ray").setLevel(logging.INFO if verbose else logging.ERROR)
    local: dict[str, Any] = {} if address else {"include_dashboard": False}
    with authenticated(local=address is None):
        try:
            with contextlib.nullcontext() if address else _on_loopback():
                # "local", or Ray would join whatever cluster was started on this machine last
                ray.init(address=address or "local", log_to_driver=verbose, logging_level=logging.ERROR, **local)
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise UsageError(
                f"--address must name a running Ray cluster that takes this machine's token, but {address!r} did not "
                f"answer: {_first_line(error)}. Is it started, and is its token in ~/.ray/auth_token or "
                "RAY_AUTH_TOKEN_PATH? Without --address Ray is started here."
            ) from error
        treat_termination_as_interrupt()
        try:
            if address is not None and os.environ["RAY_AUTH_MODE"] == "disabled":
                logger.warning(
                    "The Ray cluster %s is joined without a token: if it needs none, whoever reaches its ports runs "
                    "code on it. docs/security.md tells how to close it.",
                    address,
                )
            with _environment_of_trials(joined=address is not None), _memory_kills_are_deaths():
                yield _capacity(joined=address is not None)
        finally:
            ray.shutdown()


def check_address(address: str) -> None:
    """Refuse the addresses of Ray's other services.

    Raises:
        UsageError: If the address is neither `auto` nor HOST:PORT.
    """
    if "://" in address:
        raise UsageError(
            f"--address must be auto or HOST:PORT, on a machine of the cluster, but got {address!r}. A search needs a "
            "process there: `segadapt submit --address http://127.0.0.1:8265 -- search ...` starts it from here, "
            "through a tunnel to the head's port 8265."
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _capacity(*, joined: bool) -> Capacity:
    """Return the nodes that run, and those that the cluster's autoscaler would start."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    running = Counter(Node(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in alive)
    here = any("node:__internal_head__" in node and f"node:{ray.util.get_node_ip_address()}" in node for node in alive)  # type: ignore[no-untyped-call]
    launched = Path(_LAUNCHED).expanduser()
    planned = planned_nodes(yaml.safe_load(launched.read_text())) if here and launched.is_file() else Counter()
    return Capacity(tuple((running | planned).elements()), joined)


def planned_nodes(cluster: Mapping[str, Any]) -> Counter[Node]:
    """Return the workers that a cluster may have at most, by the content of its file for `ray up`."""
    types = {name: kind for name, kind in cluster["available_node_types"].items() if name != cluster["head_node_type"]}
    preferred = sorted(types.values(), key=lambda kind: -kind.get("priority", 0))
    nodes = [
        Node(kind["resources"].get("CPU", 0), kind["resources"].get("GPU", 0))
        for kind in preferred
        for _ in range(kind.get("max_workers", 0))
    ]
    return Counter(nodes[: cluster["max_workers"]])


@contextlib.contextmanager
def authenticated(*, local: bool) -> Iterator[None]:
    """Decide how Ray authenticates: its own default depends on what ran before on the machine."""
    if "RAY_AUTH_MODE" in os.environ:
        told = {}
    elif local:
        told = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    else:
        told = {"RAY_AUTH_MODE": "token" if has_token() else "disabled"}
    try:
        with _environment(told):
            _read_again()
            yield
    finally:
        _read_again()


def has_token() -> bool:
    """Return whether Ray finds a token in the environment or in a file."""
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    return bool(AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))


def _read_again() -> None:
    """Have Ray look at the environment again: it keeps the mode and token that it once read."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Have the Ray that is started meanwhile listen on 127.0.0.1 alone, on a port that its processes are told.

    Without its dashboard and its autoscaler: Ray would start both and wait until the former answers, having told it to
    offer nothing.

    Its processes look for "the" Ray of the machine; where several run, as two users' searches, they would find none.
    """
    from ray._private import node, ray_constants, services

    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port = str(probe.getsockname()[1])
    told = {"RAY_GCS_SERVER_PORT": port, "RAY_ADDRESS": f"{_LOOPBACK}:{port}"}
    told[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # on all systems: Ray then takes 127.0.0.1 as its address
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    told |= {name: loopback for name in _INTERFACES if name not in os.environ}
    unused = (
        (node.Node, "start_monitor", lambda node: None),
        (services, "start_api_server", lambda *words, **options: (None, None)),  # as after a failure that it forgives
    )
    read_at_import = (ray_constants, "ENABLE_RAY_CLUSTER", False)
    with _environment(told), _changed(read_at_import, *unused):
        yield


@contextlib.contextmanager
def _environment_of_trials(*, joined: bool) -> Iterator[None]:
    """Have Tune send trials no secrets, and none of this machine's variables where they inherit them.

    Ray writes what is sent into a log in /tmp that all users of a machine may read. On this machine trials have the
    variables of this process, and one that is sent any could not take a process that is ready. On a cluster, AWS_* must
    be in the environment in which Ray was started there.
    """
    from ray.tune.execution import class_cache

    sent = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if joined and not name.startswith("AWS_")}
    fixed = class_cache.DEFAULT_ENV_VARS if joined else {}
    with _changed((class_cache, "ENV_VARS_TO_PROPAGATE", sent), (class_cache, "DEFAULT_ENV_VARS", fixed)):
        yield


@contextlib.contextmanager
def _memory_kills_are_deaths() -> Iterator[None]:
    """Have Tune start a trial again whose process Ray has ended since its node was short of memory.

    Ray has an error of its own for that, at which Tune would give up all trials.
    """
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError

    failed = RayActorManager._actor_task_failed

    def task_failed(manager: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=f"{SHORT_OF_MEMORY}: {exception}")
        failed(manager, tracked_actor_task, exception)

    with _changed((RayActorManager, "_actor_task_failed", task_failed)):
        yield


@contextlib.contextmanager
def _changed(*attributes: tuple[Any, str, Any]) -> Iterator[None]:
    """Give attributes of Ray's modules and classes other values meanwhile."""
    before = [getattr(owner, name) for owner, name, _ in attributes]
    for owner, name, value in attributes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(attributes, before, strict=True):
            setattr(owner, name, value)


@contextlib.contextmanager
def _environment(told: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process's environment meanwhile."""
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def treat_termination_as_interrupt() -> None:
    """Make SIGTERM end this process as Ctrl-C does, with everything it started; Ray's own handler aborts it instead."""
    if threading.current_thread() is threading.main_thread():  # Python allows it there alone
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell script's background jobs
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)
