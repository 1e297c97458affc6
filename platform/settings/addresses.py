"""How addresses that users name are reached."""

import os

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def direct_to_loopback() -> dict[str, str]:
    """Return variables of the environment under which requests to this machine itself pass no proxy.

    HTTP_PROXY and its like hold for all addresses that NO_PROXY does not list, those of this machine too. A proxy
    cannot reach these: they would seem not to answer, and it would be sent their logins.
    """
    listed = {name: _parts(os.environ.get(name, "")) for name in ("no_proxy", "NO_PROXY")}
    every = dict.fromkeys(part for parts in listed.values() for part in parts)
    if "*" in every or all(set(_LOOPBACK) <= set(parts) for parts in listed.values()):
        return {}  # nothing to set, and so nothing to restore by whoever set it later than another
    hosts = ",".join([*every, *(host for host in _LOOPBACK if host not in every)])
    return {"no_proxy": hosts, "NO_PROXY": hosts}


def _parts(hosts: str) -> list[str]:
    return [part.strip() for part in hosts.split(",") if part.strip()]
