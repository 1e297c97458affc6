"""How addresses that users name are reached."""

import os

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def direct_to_loopback() -> dict[str, str]:
    """Return variables of the environment under which requests to this machine itself pass no proxy.

    HTTP_PROXY and its like hold for all addresses that NO_PROXY does not list, those of this machine too. A proxy
    cannot reach these: they would seem not to answer, and it would be sent their logins.
    """
    listed = [part for name in ("no_proxy", "NO_PROXY") for part in os.environ.get(name, "").split(",") if part.strip()]
    if any(part.strip() == "*" for part in listed):
        return {}
    hosts = ",".join(dict.fromkeys([*(part.strip() for part in listed), *_LOOPBACK]))
    return {"no_proxy": hosts, "NO_PROXY": hosts}
