"""The cluster files: by the schemas of those who read them, and a search on a cluster that grows and shrinks by one."""

import os
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from segadapt.platform.cluster.capacity import Node, planned_nodes

ROOT = Path(__file__).parents[3]
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
    config["available_node_types"]["gpu_on_demand"]["resources"] = {"CPU": 4, "GPU": 1}
    assert planned_nodes(config | {"max_workers": 3}) == {Node(8, 1): 3}, "spot comes first"


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
