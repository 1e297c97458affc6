"""MLflow's pages for a storage folder."""

import contextlib
import itertools
import logging
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Mapping

from segadapt.platform.errors import UsageError
from segadapt.platform.ray_internals.start import empty_variables, variables_set
from segadapt.platform.settings.addresses import direct_to_loopback
from segadapt.platform.storage.folders import Place
from segadapt.platform.storage.retries import retry
from segadapt.platform.tracking.sender import send_waiting

_POLL_S = 0.2
"""Between two looks at whether the server answers."""


def serve(place: Place, port: int, pages: Mapping[str, str]) -> int:
    """Serve MLflow's pages for a storage folder on 127.0.0.1 until interrupted; returns the server's exit status.

    Args:
        place: Where the storage folder is.
        port: Port of the pages.
        pages: Pages that are named, by what they show.

    Raises:
        UsageError: If there is nothing to show, or the port is taken.
    """
    opened = place.folders
    send_waiting(place)
    if not opened.mlflow_database.is_file():
        raise UsageError(
            f"--storage must hold runs, but {opened.root} has none yet. `segadapt search sdca` makes some."
        )
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UsageError(f"--port must be free, but {port} is in use. Choose another, e.g. --port {port + 1}.")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--allowed-hosts", f"127.0.0.1:{port},localhost:{port}"]  # no other site's name leads here
    command += ["--backend-store-uri", place.tracking_url]
    command += ["--artifacts-destination", opened.mlflow_artifacts.as_uri()]
    filled = {name: value for name, value in os.environ.items() if name not in empty_variables("MLFLOW_")}
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true", **filled, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _wait_for_health(f"http://127.0.0.1:{port}", server)
        print(f"MLflow shows {opened.root} at http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
        for name, page in pages.items():
            print(f"  {name}: http://127.0.0.1:{port}/{page}", flush=True)
        _wait_for_end(server)
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()
        server.wait(timeout=30)
    return 0


def _wait_for_end(server: "subprocess.Popen[str]") -> None:
    """Read what a server tells until it ends, looking up now and then.

    A signal that comes between two reads is seen when the next one returns, which without a limit may be never.
    """
    while server.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.communicate(timeout=_POLL_S)


def _wait_for_health(address: str, server: "subprocess.Popen[str]", timeout_s: float = 90.0) -> None:
    def ask() -> None:
        if server.poll() is not None:
            message = server.stderr.read() if server.stderr else ""
            raise UsageError(f"The MLflow server must start, but ended: {message.strip()[-2000:]}")
        with variables_set(direct_to_loopback()):
            urllib.request.urlopen(f"{address}/health", timeout=2).close()

    try:
        retry(ask, OSError, timeout_s, pauses=itertools.repeat(_POLL_S), level=logging.DEBUG)
    except OSError as error:
        raise UsageError(
            f"The MLflow server must answer within {timeout_s:.0f} s, but did not. Is the machine busy?"
        ) from error
