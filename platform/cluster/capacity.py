"""What the machines of a cluster have, and what a trial takes of it."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from segadapt.platform.errors import UsageError
from segadapt.platform.settings.resources import Allocation, Resources

_LAUNCHED = "~/ray_bootstrap_config.yaml"
"""Where `ray up` leaves the cluster file on the head."""


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster has."""

    cpus: int
    gpus: int

    def workers(self, cpus: int, gpus: float) -> int:
        """Return how many workers of so many CPUs and GPUs run here at once; a part of a GPU is a part of one GPU."""
        if gpus == 0:
            return self.cpus // cpus
        fitting = int(self.gpus / gpus) if gpus >= 1 else self.gpus * int(1 / gpus + 1e-6)
        return min(fitting, self.cpus // cpus)


@dataclass(frozen=True)
class Capacity:
    """What the cluster has. A worker runs on one node, a trial of several workers on one or several."""

    nodes: tuple[Node, ...]
    joined: bool = False
    """Whether it ran before: it may have several machines, and an autoscaler that adds some."""

    @property
    def cpus(self) -> int:
        """Of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        """Of all nodes."""
        return sum(node.gpus for node in self.nodes)

    def workers(self, cpus: int, gpus: float) -> int:
        """Return how many workers of so many CPUs and GPUs run at once."""
        return sum(node.workers(cpus, gpus) for node in self.nodes)

    def __str__(self) -> str:
        counts = Counter(self.nodes).most_common()
        return " and ".join(f"{count} of {node.cpus} CPUs and {node.gpus} GPUs" for node, count in counts) or "none"


def this_machine() -> Capacity:
    """Return what Ray would find on this machine, without starting it."""
    import torch

    return Capacity((Node(os.cpu_count() or 1, torch.cuda.device_count()),))


def capacity_of_cluster(*, joined: bool) -> Capacity:
    """Return the nodes that run, and those that the cluster's autoscaler would start."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    running = Counter(Node(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in alive)
    here = any("node:__internal_head__" in node and f"node:{ray.util.get_node_ip_address()}" in node for node in alive)  # type: ignore[no-untyped-call]
    launched = Path(_LAUNCHED).expanduser()
    planned = planned_nodes(yaml.safe_load(launched.read_text())) if here and launched.is_file() else Counter()
    return Capacity(tuple((running | planned).elements()), joined)


def planned_nodes(cluster: Mapping[str, Any]) -> Counter[Node]:
    """Return the workers that a cluster may have at most, by the content of its file for `ray up`."""
    types = {name: kind for name, kind in cluster["available_node_types"].items() if name != cluster["head_node_type"]}
    preferred = sorted(types.values(), key=lambda kind: -kind.get("priority", 0))
    nodes = [
        Node(kind["resources"].get("CPU", 0), kind["resources"].get("GPU", 0))
        for kind in preferred
        for _ in range(kind.get("max_workers", 0))
    ]
    return Counter(nodes[: cluster["max_workers"]])


def resources_of(
    requested: Resources, capacity: Capacity, trials: int, concurrent: int | None
) -> tuple[Allocation, int]:
    """Return what a trial takes and how many run at a time.

    Raises:
        UsageError: If the cluster can never run one trial.
    """
    gpus = requested.gpus if requested.gpus is not None else float(capacity.gpus > 0)
    room = capacity.workers(1, gpus)
    if room < requested.workers:
        raise UsageError(
            f"The cluster must have what one trial takes ({requested.workers} workers of 1 CPU and {gpus:g} GPUs, each "
            f"on one node), but its nodes have room for {room}. Nodes: {capacity}. "
            "Lower --workers-per-trial or --gpus-per-trial."
        )
    at_a_time = min(trials, concurrent or trials)
    if concurrent is None or not capacity.joined:  # what was asked of a cluster may wait for nodes that it adds
        at_a_time = min(at_a_time, room // requested.workers)
    most = max(node.cpus for node in capacity.nodes)
    needed = min(at_a_time * requested.workers, room)
    cpus = next(n for n in range(most, 0, -1) if capacity.workers(n, gpus) >= needed)
    return Allocation(requested.workers, gpus, cpus, requested.launcher), at_a_time
