"""Addresses at which nobody answers, or not who should: one sentence, soon, that names where it came from."""

import contextlib
import http.server
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import TINY_WORDS
from searching import COMMAND, free_port

import segadapt as api
from segadapt.platform.cluster.connection import connect
from segadapt.platform.errors import UsageError
from segadapt.platform.ray_internals.start import variables_set
from segadapt.platform.search.study_storage import open_study_storage
from segadapt.platform.settings.addresses import direct_to_loopback
from segadapt.platform.storage.folders import Place
from segadapt.platform.tracking.client import mlflow_client
from segadapt.trainables.core.data.datasets import open_dataset


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A server that takes connections and says nothing, as one that was stopped."""
    with socket.socket() as server:
        server.bind(("", 0))  # for Ray, which takes this machine's own address for 127.0.0.1
        server.listen()
        server.settimeout(60)
        yield server


def address_of(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def pages(status: int) -> Iterator[tuple[str, list[str]]]:
    """Serve pages with one status; yields the address, and what is asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *words: object) -> None:
            pass

    for method in ("GET", "HEAD", "POST", "CONNECT"):
        setattr(Handler, f"do_{method}", Handler.answer)
    with http.server.ThreadingHTTPServer(("", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def test_a_cluster_that_is_gone_is_named_with_the_variable_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pages(200) as (other, _):
        lacks = {f"127.0.0.1:{free_port()}": "nothing listens", other: "is no Ray cluster"}
        for address, lack in lacks.items():
            monkeypatch.setenv("RAY_ADDRESS", address)
            for option in (None, "auto"):
                with (
                    pytest.raises(UsageError, match=f"^RAY_ADDRESS must name .*{lack}.*unset RAY_ADDRESS"),
                    connect(option),
                ):
                    pass
            with pytest.raises(UsageError, match=f"^--address must name .*{lack}.*Without --address"), connect(address):
                pass
            (finding,) = (each for each in api.doctor(place=Place("none")) if each.subject == "cluster")
            assert f"RAY_ADDRESS={address}" in finding.text
            assert lack in finding.text
            monkeypatch.delenv("RAY_ADDRESS")


def test_a_command_that_waits_for_a_cluster_obeys_sigterm(silent: socket.socket, tmp_path: Path) -> None:
    words = [COMMAND, "train", "source_only", *TINY_WORDS]
    environment = {**os.environ, "RAY_ADDRESS": address_of(silent)}
    driver = subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    with silent.accept()[0]:
        driver.send_signal(signal.SIGTERM)
        _, errors = driver.communicate(timeout=60)
    assert driver.returncode != 0
    assert "RAY_ADDRESS" not in errors, "it did not wait for an answer first"


def test_servers_that_say_nothing_are_not_waited_for(silent: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "none")
    address, unused = address_of(silent), f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
    asked: dict[str, Callable[[], object]] = {
        "^RAY_ADDRESS must name .* says nothing within": lambda: connect(None).__enter__(),
        "^--study-uri must be a database that answers": lambda: open_study_storage(f"postgresql+psycopg://{address}/s"),
        f"the server {unused} does not answer": lambda: open_dataset(
            "shards", f"s3://bucket/set?scheme=http&endpoint_override={unused}"
        ),
        f"the server http://{address} does not answer": lambda: open_dataset("shards", "s3://bucket/set"),
        "^--address must be Ray's dashboard": lambda: api.jobs(address=f"http://{address}"),
    }
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = {refusal: threads.submit(ask) for refusal, ask in asked.items()}
    for refusal, answer in answers.items():
        with pytest.raises((UsageError, ValueError), match=refusal):
            answer.result()


def test_no_proxy_is_asked_for_addresses_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with pages(502) as (proxy, asked), pages(200) as (server, reached):
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://{proxy}")
        monkeypatch.setenv("no_proxy", "example.org")
        port = server.rpartition(":")[2]
        for host in ("127.0.0.1", "localhost"):
            mlflow_client(f"http://{host}:{port}").search_experiments(max_results=1)
            with pytest.raises(UsageError, match="dashboard"):
                api.jobs(address=f"http://{host}:{port}")
        assert len(reached) >= 4
        assert asked == [], "a proxy cannot reach them, and is told no login"
        assert os.environ["no_proxy"] == "example.org", "it is left as it was"
        with pytest.raises(Exception, match="502"):
            mlflow_client("http://mlflow.example.com").search_experiments(max_results=1)
        assert asked


def test_nothing_is_left_of_proxies_whoever_needed_them_last(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(variables_set(direct_to_loopback()))
    second.enter_context(variables_set(direct_to_loopback()))
    first.close()
    second.close()
    assert not {"NO_PROXY", "no_proxy"} & set(os.environ)
