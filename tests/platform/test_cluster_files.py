"""The cluster files: by the schemas of those who read them, and a search on a cluster that grows and shrinks by one."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import STDOUT, Popen
from typing import Any

import kubernetes_validate
import psutil
import pytest
import yaml
from conftest import TINY_WORDS
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from segadapt.platform import cluster
from segadapt.platform.cluster import Node, planned_nodes

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "cluster"
LAUNCHED = [ROOT / "ray_cluster.yaml", EXAMPLES / "gcp.yaml", EXAMPLES / "local.yaml"]

RAY_CLUSTER_KEYS = {
    "authOptions",
    "autoscalerOptions",
    "enableInTreeAutoscaling",
    "headGroupSpec",
    "rayVersion",
    "workerGroupSpecs",
}
"""Of KubeRay's RayClusterSpec, as far as we use it; its CRD is in no Python package."""
RAY_JOB_KEYS = {
    "backoffLimit",
    "entrypoint",
    "rayClusterSpec",
    "shutdownAfterJobFinishes",
    "submissionMode",
    "ttlSecondsAfterFinished",
}
GROUP_KEYS = {"groupName", "maxReplicas", "minReplicas", "rayStartParams", "replicas", "serviceType", "template"}


def prepared(path: Path) -> dict[str, Any]:
    """A cluster file as `ray up` reads it."""
    config: dict[str, Any] = prepare_config(yaml.safe_load(path.read_text()))
    return config


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.name)
def test_ray_takes_the_file(path: Path) -> None:
    validate_config(prepared(path))
    misspelt = prepared(path) | {"idle_timeout": 5}
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(misspelt)


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.name)
def test_a_launched_cluster_is_closed_and_its_head_runs_no_trial(path: Path) -> None:
    config = prepared(path)
    head, worker = (" ".join(config[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    assert "RAY_AUTH_MODE=token" in head
    assert "RAY_AUTH_MODE=token" in worker
    assert "--dashboard-host=127.0.0.1" in head
    assert "--host 127.0.0.1" in head, "MLflow"
    assert "0.0.0.0" not in head + worker
    assert "--num-cpus=0 --num-gpus=0" in head
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    assert config["idle_timeout_minutes"] == 10
    assert set(config["file_mounts"].values()) == {"dist", "~/.ray/auth_token"}, "never the checkout with its data"
    rules = config["provider"].get("security_group", {}).get("IpPermissions", [])
    assert all((rule["FromPort"], rule["ToPort"]) == (22, 22) for rule in rules)
    assert all(source["CidrIp"] != "0.0.0.0/0" for rule in rules for source in rule["IpRanges"])


def test_spot_is_preferred_to_on_demand() -> None:
    for path in LAUNCHED[:2]:
        types = prepared(path)["available_node_types"]
        assert types["gpu_spot"]["priority"] > types["gpu_on_demand"]["priority"]
        assert types["gpu_spot"]["resources"] == types["gpu_on_demand"]["resources"]
        assert "spot" in str(types["gpu_spot"]["node_config"]).lower()
        assert "spot" not in str(types["gpu_on_demand"]["node_config"]).lower()
        assert types["head"]["resources"] == {"CPU": 0, "GPU": 0}


def test_a_search_plans_for_the_workers_that_may_come() -> None:
    config = prepared(ROOT / "ray_cluster.yaml")
    assert planned_nodes(config) == {Node(8, 1): 8}
    assert planned_nodes(config | {"max_workers": 3}) == {Node(8, 1): 3}


@pytest.mark.parametrize(
    ("name", "keys"), [("kuberay-cluster.yaml", RAY_CLUSTER_KEYS), ("kuberay-job.yaml", RAY_JOB_KEYS)]
)
def test_kubernetes_and_rays_autoscaler_take_the_file(name: str, keys: set[str]) -> None:
    content = yaml.safe_load((EXAMPLES / name).read_text())
    assert set(content["spec"]) == keys
    spec = content["spec"].get("rayClusterSpec", content["spec"])
    assert set(spec) == RAY_CLUSTER_KEYS
    assert spec["authOptions"] == {"mode": "token"}
    head = spec["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert head["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    for group in (head, *spec["workerGroupSpecs"]):
        assert set(group) <= GROUP_KEYS
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, "1.31", strict=True)
    types = _derive_autoscaling_config_from_ray_cr({"metadata": content["metadata"], "spec": spec})[
        "available_node_types"
    ]
    assert {kind["resources"]["GPU"] for kind in types.values()} == {0, 1}


def test_the_slurm_script_parses_and_keeps_its_token_to_itself() -> None:
    script = EXAMPLES / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert text.index("umask 077") < text.index("secrets.token_hex") < text.index("ray start")
    assert "RAY_AUTH_MODE=token" in text
    assert os.access(script, os.X_OK)


class Autoscaled:
    """A head with the autoscaler under `ray_cluster.yaml`; the cloud is Ray's own for tests: nodes on this machine."""

    def __init__(self, folder: Path) -> None:
        import socket

        import ray
        from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("", 0))
            self.address = f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"  # type: ignore[no-untyped-call]
        provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
        config = prepared(ROOT / "ray_cluster.yaml")
        types = config["available_node_types"]
        types["ray.head.default"] = types.pop("head")  # the one name that this provider has for it
        for kind in types.values():
            kind["node_config"] = {}
        for name in ("gpu_spot", "gpu_on_demand"):
            types[name]["resources"] = {"CPU": 1}
        config |= {
            "head_node_type": "ray.head.default",
            "idle_timeout_minutes": 0.05,
            "provider": {
                "type": "external",
                "module": provider,
                "gcs_address": self.address,
                "head_node_id": FAKE_HEAD_NODE_ID,
                "launch_multiple": True,
            },
            "docker": {},
            "file_mounts": {},
            **{name: [] for name in config if name.endswith("_commands")},
        }
        (folder / "ray_bootstrap_config.yaml").write_text(json.dumps(config))
        self.environment = {
            **os.environ,
            "HOME": str(folder),  # where a head of `ray up` has its cluster file
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        head = self.environment | {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",  # as `ray up` sets it
            "RAY_FAKE_CLUSTER": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        }
        self.programs = Path(sys.executable).parent
        command = [
            str(self.programs / "ray"),
            "start",
            "--head",
            "--block",
            f"--port={self.address.rpartition(':')[2]}",
        ]
        command += ["--num-cpus=0", "--num-gpus=0", "--dashboard-port=0", f"--temp-dir={folder}"]
        command += [f"--autoscaling-config={folder}/ray_bootstrap_config.yaml"]
        with (folder / "head.log").open("w") as log:
            self.head = Popen(command, env=head, stdout=log, stderr=STDOUT)

    def search(self, *words: str) -> "Popen[str]":
        """Start a search from the head."""
        command = [str(self.programs / "segadapt"), "search", *words, "--address", self.address]
        with (self.folder / "search.log").open("w") as log:
            return Popen(command, cwd=self.folder, env=self.environment, stdout=log, stderr=STDOUT, text=True)

    def end(self) -> None:
        """End it with all its nodes, by the folder that is theirs alone."""
        self.head.terminate()
        self.head.wait(timeout=60)
        for process in psutil.process_iter(["cmdline"]):
            if str(self.folder) in " ".join(process.info["cmdline"] or []):
                process.kill()


@pytest.fixture
def autoscaled(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Autoscaled]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="as") as folder:  # short: a socket's path has 107 bytes at most
        found = Autoscaled(Path(folder))
        try:
            for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
                monkeypatch.setenv(name, found.environment[name])
            yield found
        finally:
            found.end()


@pytest.mark.slow
def test_a_cluster_grows_for_a_search_and_shrinks_after_it(autoscaled: Autoscaled) -> None:
    import ray

    def joined() -> bool:
        done = subprocess.run(
            [str(autoscaled.programs / "ray"), "health-check", "--address", autoscaled.address],
            env=autoscaled.environment,
            capture_output=True,
            check=False,
        )
        return done.returncode == 0

    deadline = time.monotonic() + 120
    while not joined():
        assert autoscaled.head.poll() is None, (autoscaled.folder / "head.log").read_text()[-2000:]
        assert time.monotonic() < deadline
    search = autoscaled.search("sdca", "--trials", "2", "--launcher", "inprocess", "--gpus-per-trial", "0", *TINY_WORDS)
    with cluster.connect(autoscaled.address, dashboard=False):
        most, kinds, deadline = 0, set(), time.monotonic() + 300
        while True:
            workers = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]  # type: ignore[no-untyped-call]
            most = max(most, len(workers))
            kinds |= {node["Labels"].get("ray.io/node-group") for node in workers}
            if search.poll() is not None and not workers:
                break
            assert time.monotonic() < deadline, (autoscaled.folder / "search.log").read_text()[-2000:]
            time.sleep(0.2)
    told = (autoscaled.folder / "search.log").read_text()
    assert search.returncode == 0, told
    assert "2 at a time" in told, "planned for workers that did not run yet"
    assert most == 2, "one per trial"
