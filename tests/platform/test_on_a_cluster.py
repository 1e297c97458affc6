"""A real Ray cluster of several raylets with a token: jobs, and what is looked at before trials start."""

import json
import os
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, CompletedProcess, Popen
from typing import Any

import pytest
from conftest import TINY_WORDS

from segadapt.platform import api, cluster, preflight
from segadapt.platform.errors import UsageError

Call = Callable[..., "CompletedProcess[str]"]

TOKEN = "0123456789abcdef" * 4
PROGRAMS = str(Path(sys.executable).parent)


@dataclass(frozen=True)
class Running:
    """A cluster of two nodes."""

    address: str
    jobs: str
    """Of Ray Jobs."""
    cluster: Any


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """Start a head with its dashboard, and a node; both ask for the token."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.worker_environment().items():
            patch.setenv(name, value)
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        patch.setenv("PATH", f"{PROGRAMS}:{os.environ['PATH']}")  # where jobs find `python`
        patch.delenv("RAY_ADDRESS", raising=False)
        from ray.cluster_utils import Cluster

        with cluster.authenticated(local=False):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            head = {
                "num_cpus": 1,
                "dashboard_port": port,
                "num_gpus": 0,
                "include_dashboard": True,
                "dashboard_agent_listen_port": 0,
            }
            found = Cluster(initialize_head=True, head_node_args=head)  # type: ignore[no-untyped-call]
            try:
                found.add_node(num_cpus=1, dashboard_agent_listen_port=0)
                found.wait_for_nodes()
                yield Running(found.address, f"http://{found.head_node.webui_url}", found)
            finally:
                found.shutdown()


@pytest.mark.slow
def test_a_job_runs_on_all_nodes_and_is_followed_from_elsewhere(
    running: Running, segadapt: Call, tmp_path: Path
) -> None:
    storage = tmp_path / "shared"
    experiment = tmp_path / "tiny.yaml"
    experiment.write_text("\n".join(word.replace("=", ": ") for word in TINY_WORDS))
    words = ["train", "source_only", "--name", "far", "--storage", str(storage), "--config", str(experiment)]
    at = ["--address", running.jobs]
    done = segadapt("submit", *at, "--name", "first", "--follow", "--", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "far took" in done.stdout, "what the job prints is followed"
    assert api.runs("far", storage=str(storage)).rows[0].best is not None
    listed = json.loads(segadapt("jobs", *at, "--json").stdout)
    assert [(job["name"], job["state"]) for job in listed] == [("first", "succeeded")]
    assert "far took" in segadapt("logs", "first", *at).stdout
    again = segadapt("train", "source_only", "--name", "far", "--storage", str(storage), "--address", running.jobs)
    assert again.returncode == 1, "an address of Ray Jobs submits and follows; this name is taken"
    assert "--name must be new" in again.stdout + again.stderr
    refused = segadapt("submit", *at, "--name", "first", "--", *words)
    assert refused.returncode == 2
    assert "the cluster has a job 'first'" in refused.stderr


def test_without_the_token_nobody_gets_in(
    running: Running, segadapt: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    refused = segadapt("jobs", "--address", running.jobs)
    assert refused.returncode == 2
    assert "the cluster's token in ~/.ray/auth_token" in refused.stderr
    assert TOKEN not in refused.stdout + refused.stderr
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert segadapt("jobs", "--address", running.jobs).returncode == 2


def test_a_node_that_differs_is_named_before_any_trial(running: Running, tmp_path: Path) -> None:
    """One node has other versions, one sees another folder under the storage's path."""
    data, storage, other = tmp_path / "data", tmp_path / "runs", tmp_path / "packages"
    data.mkdir()
    (other / "torch-9.9.dist-info").mkdir(parents=True)
    (other / "torch-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    (other / "segadapt" / "platform").mkdir(parents=True)
    (other / "segadapt" / "platform" / "edited.py").touch()
    storage.mkdir()
    with cluster.connect(running.address, dashboard=False) as capacity:
        assert capacity.joined
        preflight.check_nodes(storage, [str(data)])  # both nodes are alike
    differs = running.cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(other)})
    try:
        with _elsewhere(running.address, tmp_path) as alone, cluster.connect(running.address, dashboard=False):
            with pytest.raises(UsageError, match="All nodes of the cluster must have the same segadapt") as refused:
                preflight.check_nodes(storage, [str(data)])
            found = str(refused.value).splitlines()[1:-1]
            versions = [line for line in found if differs.node_id[:8] in line]
            has = [line.partition(") has ")[2].split(" ") for line in versions]
            assert [words[0] for words in has] == ["segadapt", "torch"]
            assert has[0][1] == has[0][5], "the same number, other files"
            assert has[0][3].strip("),") != has[0][7].strip(")")
            assert has[1][1] == "9.9,"
            lost = [line.partition(") ")[2] for line in found if line not in versions]
            assert lost == ([f"does not see {data}", f"does not see this machine's {storage}"] if alone else [])
    finally:
        running.cluster.remove_node(differs)
    assert not list(storage.iterdir()), "nothing is left in the storage"


class _elsewhere:  # noqa: N801  # reads as what it is: a context
    """A raylet that sees an empty folder where the others see `folder`; does nothing where that is not permitted."""

    def __init__(self, address: str, folder: Path) -> None:
        hidden = f"mount -t tmpfs none {folder}"
        self._unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
        can = subprocess.run([*self._unshare, "sh", "-c", hidden], capture_output=True, check=False).returncode == 0
        self._command = f"{hidden}; exec {PROGRAMS}/ray start --block --address={address} --num-cpus=1" if can else None

    def __enter__(self) -> bool:
        if self._command is None:
            return False
        import ray

        self._raylet = Popen([*self._unshare, "sh", "-c", self._command], stdout=DEVNULL, stderr=DEVNULL)
        deadline = time.monotonic() + 60
        with cluster.connect(self._command.partition("--address=")[2].split()[0], dashboard=False):
            while sum(node["Alive"] for node in ray.nodes()) < 4:  # type: ignore[no-untyped-call]
                assert time.monotonic() < deadline
                time.sleep(0.2)
        return True

    def __exit__(self, *_: object) -> None:
        if self._command is not None:
            self._raylet.terminate()
            self._raylet.wait(30)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ui"], "must be one of search, train, finish"),
        ([], "must be one of search, train, finish"),
        (["search", "sdca"], "--storage with an absolute path"),
        (["search", "sdca", "--storage=runs"], "--storage with an absolute path"),
        (["search", "sdca", "--storage", "/mnt/x", "--address", "auto"], "no --address"),
        (["search", "sdca", "--storage", "/mnt/x", "--study-uri=postgresql://me:secret@host/db"], "hold no password"),
        (["search", "sdca", "--storage", "/mnt/x", "--config", "none.yaml"], "none.yaml is not"),
    ],
)
def test_what_cannot_run_as_a_job_is_refused_before_the_cluster_is_asked(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        api.submit(words, address="http://127.0.0.1:1")
    assert "secret" not in str(refused.value)


def test_addresses_of_other_services_are_refused_with_what_to_do() -> None:
    with (
        pytest.raises(UsageError, match="segadapt submit --address http"),
        cluster.connect("ray://head:10001", dashboard=False),
    ):
        pass
    with pytest.raises(UsageError, match="Is the tunnel open"):
        api.jobs(address="http://127.0.0.1:1")
    with pytest.raises(UsageError, match="must be that of Ray's dashboard"):
        api.jobs(address="ray://127.0.0.1:10001")


def test_a_job_may_bring_its_own_segadapt_and_nothing_else(running: Running, tmp_path: Path) -> None:
    wheel = _marked_wheel(tmp_path)
    (tmp_path / "huge.bin").write_bytes(b"data that must stay here")
    words = ["search", "nothing", "--storage", str(tmp_path / "runs")]
    job = api.submit(words, address=running.jobs, name="brought", wheel=str(wheel))
    assert "brought: THE WHEEL'S OWN" in "".join(api.logs(job, address=running.jobs, follow=True))
    with pytest.raises(UsageError, match="--wheel must be a built segadapt"):
        api.submit(words, address=running.jobs, wheel=str(tmp_path / "huge.bin"))


def _marked_wheel(folder: Path) -> Path:
    """Return a wheel whose segadapt says that it is itself."""
    wheel = folder / "segadapt-0.0.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("segadapt/platform/cli.py", 'print("brought: THE WHEEL\'S OWN")\n')
        archive.writestr("segadapt/platform/__init__.py", "")
        archive.writestr("segadapt-0.0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: segadapt\nVersion: 0.0.1\n")
    return wheel
