"""How the Ray that a command starts listens and authenticates."""

import contextlib
import os
import secrets
import socket
from collections.abc import Collection, Iterator, Mapping
from typing import Any

LEFT_BY_RAY = ("PYTHONBREAKPOINT", "RAY_CLIENT_MODE")
"""Variables that Ray sets in a process that imports or starts it; the first takes `breakpoint()` away from a user."""

_LOOPBACK = "127.0.0.1"


_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Where the workers of a trial listen for each other; without it, where the machine's name leads."""


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
        with variables_set(told):
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
def on_loopback() -> Iterator[None]:
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
    with variables_set(told), attributes_changed(read_at_import, *unused):
        yield


@contextlib.contextmanager
def attributes_changed(*attributes: tuple[Any, str, Any]) -> Iterator[None]:
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
def variables_set(told: Mapping[str, str], left_by_others: Collection[str] = ()) -> Iterator[None]:
    """Set variables of this process's environment meanwhile, and restore those that others set in it meanwhile."""
    before = {name: os.environ.get(name) for name in (*told, *left_by_others)}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
