"""Real Ray clusters on this machine, with a token: one that grows for a job, and one whose nodes differ."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import DEVNULL, STDOUT, CompletedProcess, Popen
from typing import Any

import psutil
import pytest
import yaml
from conftest import TINY_WORDS
from ray.tune.execution import class_cache

import segadapt as api
from segadapt.platform.cluster import preflight
from segadapt.platform.cluster.connection import connect, worker_environment
from segadapt.platform.errors import UsageError
from segadapt.platform.ray_internals.start import authenticated
from segadapt.platform.storage.folders import Place

Call = Callable[..., "CompletedProcess[str]"]

ROOT = Path(__file__).parents[3]
PROGRAMS = str(Path(sys.executable).parent)
SECURED = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4, "RAY_USAGE_STATS_ENABLED": "0"}


def free_port(host: str) -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class Autoscaled:
    """A head with the autoscaler under `ray_cluster.yaml`; the cloud is Ray's own for tests: nodes on this machine."""

    def __init__(self, folder: Path) -> None:
        import ray
        from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

        self.folder = folder
        port = free_port("")
        self.address = f"{ray.util.get_node_ip_address()}:{port}"  # type: ignore[no-untyped-call]
        self.jobs = f"http://127.0.0.1:{free_port('127.0.0.1')}"
        config = folder / "ray_bootstrap_config.yaml"  # where a head of `ray up` has it
        config.write_text(json.dumps(self._config(FAKE_HEAD_NODE_ID)))
        environment = (
            os.environ
            | SECURED
            | {
                "HOME": str(folder),
                "PATH": f"{PROGRAMS}:{os.environ['PATH']}",  # where jobs find `python`
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_enable_autoscaler_v2": "1",  # as `ray up` sets it
                "RAY_FAKE_CLUSTER": "1",
                "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            }
        )
        command = [f"{PROGRAMS}/ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=0", "--num-gpus=0"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.jobs.rpartition(':')[2]}"]
        command += ["--dashboard-agent-listen-port=0", f"--temp-dir={folder}", f"--autoscaling-config={config}"]
        with (folder / "head.log").open("w") as log:
            self.head = Popen(command, env=environment, stdout=log, stderr=STDOUT)

    def _config(self, head: str) -> dict[str, Any]:
        from ray.autoscaler._private.util import prepare_config

        config: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / "ray_cluster.yaml").read_text()))
        types = config["available_node_types"]
        types["ray.head.default"] = types.pop("head")  # the one name that this provider has for it
        for kind in types.values():
            kind["node_config"] = {}
        for name in ("gpu_spot", "gpu_on_demand"):
            types[name]["resources"] = {"CPU": 1}
        provider = {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": self.address,
            "head_node_id": head,
            "launch_multiple": True,
        }
        changed = {"head_node_type": "ray.head.default", "idle_timeout_minutes": 0.05, "provider": provider}
        return config | changed | {"docker": {}, "file_mounts": {}} | {k: [] for k in config if k.endswith("_commands")}

    def wait(self) -> None:
        """Return when it answers."""
        check = [f"{PROGRAMS}/ray", "health-check", "--address", self.address]
        deadline = time.monotonic() + 120
        while subprocess.run(check, env=os.environ | SECURED, capture_output=True, check=False).returncode != 0:
            assert self.head.poll() is None, (self.folder / "head.log").read_text()[-2000:]
            assert time.monotonic() < deadline
        while not self._dashboard_answers():  # which comes later
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def _dashboard_answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", int(self.jobs.rpartition(":")[2]))) == 0

    def end(self) -> None:
        """End it with all its nodes, by the folder that is theirs alone."""
        self.head.terminate()
        self.head.wait(timeout=60)
        for process in psutil.process_iter(["cmdline"]):
            if str(self.folder) in " ".join(process.info["cmdline"] or []):
                process.kill()


@pytest.fixture(scope="module")
def secured() -> Iterator[None]:
    """Give this process and those that it starts the token; Ray forgets it afterwards."""
    with authenticated(local=False), pytest.MonkeyPatch.context() as patch:
        for name, value in (worker_environment() | SECURED).items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def autoscaled(secured: None) -> Iterator[Autoscaled]:
    with tempfile.TemporaryDirectory(prefix="as", ignore_cleanup_errors=True) as folder:  # a socket's path is short
        found = Autoscaled(Path(folder))
        try:
            found.wait()
            yield found
        finally:
            found.end()


@pytest.mark.slow
def test_a_cluster_grows_for_a_job_and_shrinks_after_it(
    autoscaled: Autoscaled, segadapt: Call, start_segadapt: Callable[..., "Popen[str]"], tmp_path: Path
) -> None:
    import ray

    storage, experiment, at = tmp_path / "shared", tmp_path / "tiny.yaml", ["--address", autoscaled.jobs]
    experiment.write_text("\n".join(word.replace("=", ": ") for word in TINY_WORDS))
    words = ["search", "sdca", "--trials", "2", "--launcher", "inprocess", "--gpus-per-trial", "0"]
    words += ["--storage", str(storage), "--config", str(experiment)]
    job = start_segadapt("submit", *at, "--name", "first", "--follow", "--", *words)
    with connect(autoscaled.address):
        most, deadline = 0, time.monotonic() + 400
        while True:
            workers = sum(node["Alive"] and "CPU" in node["Resources"] for node in ray.nodes())  # type: ignore[no-untyped-call]
            most = max(most, workers)
            if job.poll() is not None and not workers:
                break
            assert time.monotonic() < deadline, "the search and the end of its workers"
            time.sleep(0.2)
    printed, errors = job.communicate()
    assert job.returncode == 0, printed + errors
    assert "2 at a time" in printed, "planned for workers that did not run yet"
    assert most == 2, "one per trial"
    board = api.runs("sdca-streets", place=Place(str(storage)))
    assert [row.best is not None for row in board.rows] == [True, True]
    listed = json.loads(segadapt("jobs", *at, "--json").stdout)
    assert [(found["name"], found["state"]) for found in listed] == [("first", "succeeded")]
    assert "sdca-streets took" in segadapt("logs", "first", *at).stdout
    again = segadapt("search", "--resume", "nothing", "--storage", str(storage), *at)
    assert again.returncode == 1, "an address of Ray Jobs submits and follows"
    assert "There must be an experiment 'nothing'" in again.stdout
    refused = segadapt("submit", *at, "--name", "first", "--", *words)
    assert refused.returncode == 2
    assert "the cluster has a job 'first'" in refused.stderr


@pytest.mark.slow
def test_a_running_job_is_stopped(autoscaled: Autoscaled, tmp_path: Path) -> None:
    endless = [word.replace("warmup.steps=4", "warmup.steps=100000") for word in TINY_WORDS]
    words = ["train", "source_only", "--storage", str(tmp_path / "runs"), *endless]
    job = api.submit(words, address=autoscaled.jobs, name="stopped")
    deadline = time.monotonic() + 120
    while "source_only step" not in "".join(api.logs(job, address=autoscaled.jobs)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert api.stop(job, address=autoscaled.jobs)
    assert list(api.logs(job, address=autoscaled.jobs, follow=True)), "ends with the job"
    assert {known.name: known.state for known in api.jobs(address=autoscaled.jobs)}[job] == "stopped"
    assert not api.stop(job, address=autoscaled.jobs)


def test_without_the_token_nobody_gets_in(
    autoscaled: Autoscaled, segadapt: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    refused = segadapt("jobs", "--address", autoscaled.jobs)
    assert refused.returncode == 2
    assert "~/.ray/auth_token" in refused.stderr
    assert SECURED["RAY_AUTH_TOKEN"] not in refused.stdout + refused.stderr
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert segadapt("jobs", "--address", autoscaled.jobs).returncode == 2


@pytest.fixture(scope="module")
def loopback_cluster(secured: None) -> Iterator[Any]:
    """Two nodes that are alike."""
    from ray.cluster_utils import Cluster

    with authenticated(local=False):
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})  # type: ignore[no-untyped-call]
        try:
            found.add_node(num_cpus=1)
            found.wait_for_nodes()
            yield found
        finally:
            found.shutdown()


def test_a_cluster_is_shown_the_token_that_there_is(loopback_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE")
    with connect(loopback_cluster.address) as capacity:
        assert capacity.joined
        assert os.environ["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_MODE" not in os.environ


@pytest.mark.slow
def test_a_node_that_differs_is_named_before_any_trial(loopback_cluster: Any, tmp_path: Path) -> None:
    """One node has other versions, one sees another folder under the storage's path."""
    data, storage, other = tmp_path / "data", tmp_path / "runs", tmp_path / "packages"
    data.mkdir()
    (other / "torch-9.9.dist-info").mkdir(parents=True)
    (other / "torch-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    (other / "segadapt" / "platform").mkdir(parents=True)
    for name in ("__init__.py", "platform/__init__.py", "platform/edited.py"):
        (other / "segadapt" / name).touch()
    storage.mkdir()
    with connect(loopback_cluster.address) as capacity:
        assert capacity.joined
        sent = class_cache.ENV_VARS_TO_PROPAGATE
        assert sent, "Tune's own variables reach trials on other machines"
        assert not any(name.startswith("AWS_") for name in sent), "Ray writes what is sent into a log"
        preflight.check_nodes(storage, [str(data)])  # both nodes are alike
        late = preflight.node_problems(other, timeout_s=0.0)
        assert [line.partition(") ")[2] for line in late] == ["did not answer within 0 s"] * 2
        _check_what_is_said_of_storage(storage)
    differs = loopback_cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(other)})
    try:
        with (
            _elsewhere(loopback_cluster.address, tmp_path) as alone,
            connect(loopback_cluster.address),
        ):
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
        loopback_cluster.remove_node(differs)
    assert not list(storage.iterdir()), "nothing is left in the storage"


def _check_what_is_said_of_storage(storage: Path) -> None:
    """Of a node that sees what the driver wrote, and cannot write or writes elsewhere."""
    import ray

    own, written = preflight.NodeReport({}, [], True, None), storage / "probe" / "node"
    seen = {"versions": {}, "missing": [], "sees_mark": True, "refused": "Read-only file system"}
    assert preflight._problems(own, ray.put(seen), written) == [f"cannot write to {storage}: Read-only file system"]
    elsewhere = preflight._problems(own, ray.put(seen | {"refused": None}), written)
    assert elsewhere == [f"writes to another {storage} than this machine's"]


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
        with connect(self._command.partition("--address=")[2].split()[0]):
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
        (["search", "sdca", "--storage", "/mnt/x", "--storage", "runs"], "--storage with an absolute path"),
        (["search", "sdca", "--storage", "/mnt/x", "--study-uri", "postgresql:///db?password=secret"], "no password"),
        (["search", "--storage=/mnt/x", "--study-uri=x://h/a", "--study-uri", "x://me:secret@h/a"], "no password"),
        (["search", "--storage=/mnt/x", "--tracking-uri", "http://me:se/secret@host"], "no password.* in http://host"),
        (["search", "--storage=/mnt/x", "data.source=shards:s3://KEY:secret@b/x"], "no password.*=shards:s3://b/x"),
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
        connect("ray://head:10001"),
    ):
        pass
    with pytest.raises(UsageError, match="Is the tunnel open"):
        api.jobs(address="http://127.0.0.1:1")
    with pytest.raises(UsageError, match="must be that of Ray's dashboard"):
        api.jobs(address="ray://127.0.0.1:10001")
