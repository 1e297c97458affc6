"""How the Ray that a command starts listens and authenticates."""

import contextlib
import gc
import hashlib
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from segadapt.platform.errors import UsageError, warn_of_change

LEFT_BY_RAY = ("PYTHONBREAKPOINT", "RAY_CLIENT_MODE")
"""Variables that Ray sets in a process that imports or starts it; the first takes `breakpoint()` away from a user."""

PRIVATE = (
    ("ray._raylet", "AuthenticationTokenLoader", "see whether there is a token, and have Ray read it"),
    ("ray._raylet", "Config", "have Ray read again how to authenticate"),
    ("ray._private.ray_constants", "ENABLE_RAY_CLUSTERS_ENV_VAR", "have Ray listen on 127.0.0.1 alone"),
    ("ray._private.ray_constants", "ENABLE_RAY_CLUSTER", "have Ray listen on 127.0.0.1 alone"),
    ("ray._private.ray_constants", "RAY_ENABLE_UV_RUN_RUNTIME_ENV", "have workers use the environment that is there"),
    ("ray._private.node", "Node.start_monitor", "start Ray without its autoscaler"),
    ("ray._private.services", "start_api_server", "start Ray without its dashboard"),
    (
        "ray._private.services",
        "canonicalize_bootstrap_address",
        "see whether a cluster answers before Ray waits for it",
    ),
    ("ray._private.services", "get_node", "wait longer for a Ray that starts on a busy machine"),
)
"""Parts of Ray that are not public: module, name and what they are for."""

_LOOPBACK = "127.0.0.1"

_POLL_S = 0.5
"""Between two looks at whether a node is known."""

_END_S = 10.0
"""Seconds that processes of Ray have to end."""

_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Where the workers of a trial listen for each other; without it, where the machine's name leads."""


_SOCKET_PATH_BYTES = 107
"""Most that the path of a socket may have."""

_BELOW_BYTES = 80
"""Of these, what Ray may need below its folder: /ray/session_<date>_<process>/sockets/plasma_store."""

_SHORT = Path("/tmp")


@contextlib.contextmanager
def private_session() -> Iterator[None]:
    """Have the Ray that is started meanwhile keep its sockets and logs where no other user of the machine reaches them.

    Ray makes its folders writable for all, so they lie in one that is closed to others.

    Raises:
        UsageError: If there can be no such folder.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if variable(name) is not None), None)
    base = Path(variable(name) or _SHORT).absolute() if name is not None else _SHORT
    folder = _own_folder(base, name)
    if len(os.fsencode(folder)) > _SOCKET_PATH_BYTES - _BELOW_BYTES:
        link = _own_folder(_SHORT, None) / hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]
        with contextlib.suppress(FileExistsError):
            link.symlink_to(folder)
        folder = link
    with variables_set({"RAY_TMPDIR": str(folder)}):
        yield


def _own_folder(base: Path, variable_name: str | None) -> Path:
    """Make the folder in `base` that only this user may enter, and return it.

    Raises:
        UsageError: If `base` cannot be written, or another user made that folder.
    """
    folder = base / f"segadapt-{os.getuid()}"
    try:
        base.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if status.st_uid == os.getuid() and stat.S_ISDIR(status.st_mode):
            folder.chmod(0o700)
            return folder
        reason = "it is another user's, or a link"
    except OSError as error:
        reason = str(error.strerror)
    raise UsageError(
        f"Ray must have a folder of this user alone at {folder}, but: {reason}. "
        + (f"Correct {variable_name}." if variable_name else "Set RAY_TMPDIR to a folder of yours.")
    )


@contextlib.contextmanager
def authenticated(*, local: bool) -> Iterator[None]:
    """Decide how Ray authenticates: its own default depends on what ran before on the machine."""
    with variables_set(empty_variables("RAY_")):  # at one that should be a number, Ray ends the process
        variables: dict[str, str] = {}
        if variable("RAY_AUTH_MODE") is None:
            if local:
                variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            else:
                variables = {"RAY_AUTH_MODE": "token" if has_token() else "disabled"}
        if variables and not _reads_again():
            variables = {}  # processes that are started would ask for a token that this one does not show
        try:
            with variables_set(variables):
                _read_again()
                yield
        finally:
            _read_again()


def has_token() -> bool:
    """Return whether Ray finds a token in the environment or in a file."""
    try:
        from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
    except ImportError:
        file = Path(variable("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
        return variable("RAY_AUTH_TOKEN") is not None or file.is_file()
    return bool(AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))


def _reads_again() -> bool:
    """Return whether Ray can be had to look at the environment again; say so if not."""
    try:
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # noqa: F401
    except ImportError as error:
        warn_of_change(
            "ray",
            str(error),
            "Ray authenticates as it does by itself. If it does not, whoever reaches its ports runs code as you. Set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with a token, before this command.",
        )
        return False
    return True


def _read_again() -> None:
    """Have Ray look at the environment again: it keeps the mode and token that it once read."""
    with contextlib.suppress(ImportError):
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def keep_uv_out() -> None:
    """Have Ray heed RAY_ENABLE_UV_RUN_RUNTIME_ENV: it reads it when it is imported, which may have been before."""
    try:
        from ray._private import ray_constants
        from ray._private.ray_constants import RAY_ENABLE_UV_RUN_RUNTIME_ENV  # noqa: F401
    except ImportError as error:
        warn_of_change(
            "ray", str(error), "under `uv run`, Ray may build an environment for each process, which is slow."
        )
        return
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] not in ("0", "false")


@contextlib.contextmanager
def on_loopback(*, dashboard: bool) -> Iterator[None]:
    """Have the Ray that is started meanwhile listen on 127.0.0.1 alone, on a port that its processes are told.

    Its processes look for "the" Ray of the machine; where several run, as two users' searches, they would find none.

    Args:
        dashboard: Start it; otherwise Ray would start it all the same, and wait until it answers, having told it to
            offer nothing.

    Raises:
        UsageError: If Ray can neither be kept to 127.0.0.1 nor asks for a token.
    """
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port = str(probe.getsockname()[1])
    variables = {"RAY_GCS_SERVER_PORT": port}
    changes: list[tuple[Any, str, Any]] = []
    try:
        from ray._private import ray_constants
        from ray._private.ray_constants import ENABLE_RAY_CLUSTER, ENABLE_RAY_CLUSTERS_ENV_VAR  # noqa: F401
    except ImportError as error:
        _listen_beyond_loopback(error)
    else:
        variables["RAY_ADDRESS"] = f"{_LOOPBACK}:{port}"
        variables[ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # on all systems: Ray then takes 127.0.0.1 as its address
        changes.append((ray_constants, "ENABLE_RAY_CLUSTER", False))  # Ray read it when it was imported
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    variables |= {name: loopback for name in _INTERFACES if variable(name) is None}
    with variables_set(variables), attributes_changed(*changes, *_without_services(dashboard=dashboard)):
        yield


def leave() -> None:
    """Leave Ray, and end the one that was started here.

    Ray ends this process with status 1 if an object reference is given up while it shuts down, as by a thread that
    collects garbage just then. So all garbage is collected before, and none until Ray has shut down.
    """
    import ray

    collects = gc.isenabled()
    gc.disable()
    try:
        while not _garbage_collected():  # another thread is about it, and may be giving references up
            time.sleep(0.001)
        ray.shutdown()
    finally:
        if collects:
            gc.enable()


def _garbage_collected() -> bool:
    """Collect all garbage; returns False if another thread does it at this moment, at which Python does nothing."""
    here, collections = threading.get_ident(), []

    def note(phase: str, info: Mapping[str, int]) -> None:
        if phase == "stop" and threading.get_ident() == here:
            collections.append(info)

    gc.callbacks.append(note)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(note)
    return bool(collections)


def cluster_address(address: str) -> str | None:
    """Return HOST:PORT of the cluster that Ray would join; None if Ray cannot be had to tell.

    Args:
        address: `auto` or HOST:PORT.

    Raises:
        ConnectionError: If no cluster was started on this machine, and `auto` asks for it.
        ValueError: If it is no address.
    """
    try:
        from ray._private.services import canonicalize_bootstrap_address
    except ImportError as error:
        warn_of_change("ray", str(error), "at an address where nothing listens, it may be waited for minutes.")
        return None
    return str(canonicalize_bootstrap_address(address))


@contextlib.contextmanager
def patience_with_ray(seconds: int | None) -> Iterator[None]:
    """Have the Ray that is started meanwhile so much time for that; what was started is ended if it does not suffice.

    Args:
        seconds: For each part that is waited for; None leaves Ray's own 30.
    """
    before = set(psutil.Process().children())
    changes: list[tuple[Any, str, Any]] = []
    variables: dict[str, str] = {}
    if seconds is not None:
        variables = {"RAY_gcs_server_port_wait_time_s": str(seconds)}
        changes = _waiting_for_node(seconds)
    try:
        with variables_set(variables), attributes_changed(*changes):
            yield
    except Exception:
        started = [process for process in psutil.Process().children() if process not in before]
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started, timeout=_END_S)
        raise


def _waiting_for_node(seconds: int) -> list[tuple[Any, str, Any]]:
    """Return what to change so that Ray waits so long until a node that starts is known."""
    try:
        from ray._private import services
        from ray._private.services import get_node
    except ImportError as error:
        warn_of_change("ray", str(error), "Ray has no more time to start at a second try than at the first.")
        return []

    ask: Any = get_node

    def patient(*arguments: Any, **options: Any) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            try:
                return ask(*arguments, **options)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)

    return [(services, "get_node", patient)]


def _listen_beyond_loopback(error: Exception) -> None:
    """Say that Ray will listen where other machines reach it.

    Raises:
        UsageError: If it does not ask for a token there.
    """
    if variable("RAY_AUTH_MODE") != "token":
        raise UsageError(
            "The Ray that is started here must listen on 127.0.0.1 alone or ask for a token, but this version of Ray "
            f"can be had to do neither ({error}): whoever reaches this machine would run code on it. Set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with a token."
        ) from error
    warn_of_change(
        "ray",
        str(error),
        "Ray may listen on this machine's network address rather than on 127.0.0.1, guarded by its token alone. Have a "
        "firewall close its ports.",
    )


def _without_services(*, dashboard: bool) -> list[tuple[Any, str, Any]]:
    """Return what to change so that Ray starts neither its autoscaler nor, unless it is needed, its dashboard."""
    try:
        from ray._private import services
        from ray._private.node import Node
        from ray._private.services import start_api_server  # noqa: F401
    except ImportError as error:
        warn_of_change("ray", str(error), "Ray starts more processes than it needs, which takes longer.")
        return []
    changes: list[tuple[Any, str, Any]] = [(Node, "start_monitor", lambda node: None)]
    if not dashboard:  # as after a failure that Ray forgives
        changes.append((services, "start_api_server", lambda *words, **options: (None, None)))
    return changes


@contextlib.contextmanager
def attributes_changed(*attributes: tuple[Any, str, Any]) -> Iterator[None]:
    """Give attributes of Ray's modules and classes other values meanwhile."""
    before = [getattr(owner, name) for owner, name, _ in attributes]
    for owner, name, changed in attributes:
        setattr(owner, name, changed)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(attributes, before, strict=True):
            setattr(owner, name, value)


def variable(name: str) -> str | None:
    """Return a variable of the environment; None if it is not set, or empty, which means the same."""
    return os.environ.get(name) or None


def empty_variables(*prefixes: str) -> dict[str, str | None]:
    """Return the variables that are set to nothing and begin so; the programs they are for would stumble over them."""
    return {name: None for name, value in os.environ.items() if value == "" and name.startswith(prefixes)}


@contextlib.contextmanager
def variables_set(variables: Mapping[str, str | None], left_by_others: Collection[str] = ()) -> Iterator[None]:
    """Set variables of this process's environment meanwhile, and restore those that others set in it meanwhile.

    Args:
        variables: Values by name; None unsets one.
        left_by_others: Names of those that others set.
    """
    before = {name: os.environ.get(name) for name in (*variables, *left_by_others)}
    _set_variables(variables)
    try:
        yield
    finally:
        _set_variables(before)


def _set_variables(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
