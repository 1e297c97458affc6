"""Packing trials on the nodes of a real Ray cluster, with GPUs that Ray only counts."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
from conftest import cluster_without_token

from segadapt.platform.cluster.capacity import Capacity, Node, resources_of
from segadapt.platform.cluster.connection import connect, worker_environment
from segadapt.platform.errors import UsageError
from segadapt.platform.settings.resources import Resources


@pytest.fixture(scope="module")
def capacity() -> Iterator[Capacity]:
    """Two nodes of one GPU each, and one of CPUs alone; this process is connected to them."""
    with cluster_without_token(num_cpus=2, num_gpus=0, include_dashboard=False) as cluster:
        for _ in range(2):
            cluster.add_node(num_cpus=4, num_gpus=1)
        cluster.wait_for_nodes()
        with connect(cluster.address) as joined:
            yield joined


def test_the_nodes_of_a_cluster_are_known(capacity: Capacity) -> None:
    assert sorted((node.cpus, node.gpus) for node in capacity.nodes) == [(2, 0), (4, 1), (4, 1)]
    assert (capacity.cpus, capacity.gpus) == (10, 2)
    assert str(capacity) == "2 of 4 CPUs and 1 GPUs and 1 of 2 CPUs and 0 GPUs"


@pytest.mark.parametrize(
    ("workers", "gpus", "concurrent", "at_a_time", "cpus"),
    [
        (1, None, None, 2, 4),  # a whole GPU each
        (1, 0.25, None, 8, 1),
        (1, 0.4, None, 4, 2),  # two on each GPU, though 2 / 0.4 is 5
        (2, 1.0, None, 1, 4),  # over both nodes
        (2, 0.5, 1, 1, 4),
        (3, 0.0, None, 3, 1),
    ],
)
def test_as_many_trials_as_planned_fit_at_once(
    capacity: Capacity, workers: int, gpus: float | None, concurrent: int | None, at_a_time: int, cpus: int
) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    resources, found = resources_of(Resources(workers, gpus), capacity, 20, concurrent)
    assert (found, resources.cpus) == (at_a_time, cpus)
    bundle = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
    groups = [placement_group([bundle] * workers) for _ in range(found)]
    try:
        assert all(group.wait(30) for group in groups)
        if concurrent is None:
            groups.append(placement_group([bundle] * workers))
            assert not groups[-1].wait(0.5)
    finally:
        for group in groups:
            remove_placement_group(group)


@pytest.mark.parametrize(("workers", "gpus", "room"), [(1, 2.0, 0), (3, 1.0, 2), (5, 0.5, 4), (11, 0.0, 10)])
def test_what_can_never_run_is_refused_with_what_is_missing(
    capacity: Capacity, workers: int, gpus: float, room: int
) -> None:
    with pytest.raises(
        UsageError, match=rf"its nodes have room for {room}\. Nodes: 2 of 4 CPUs and 1 GPUs and 1 of 2 CPUs"
    ):
        resources_of(Resources(workers, gpus), capacity, 20, None)


def test_more_than_a_gpu_is_a_whole_number() -> None:
    with pytest.raises(UsageError, match=r"a whole number of them, as Ray shares them out, but got 1\.5\. Take 1 or 2"):
        Resources(gpus=1.5)


def test_a_node_without_cpus_runs_nothing() -> None:
    assert Node(0, 4).workers(1, 1.0) == 0
    assert Node(8, 4).workers(1, 0.1) == 8


def test_threads_wait_as_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert int(worker_environment()["GOMP_SPINCOUNT"]) > 0
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert "GOMP_SPINCOUNT" not in worker_environment()


COLLECTS_WHILE_RAY_SHUTS_DOWN = """
import gc, sys, threading, time
import ray
from segadapt.platform.cluster.connection import connect

class Slow:
    def __init__(self, core):
        self.core = core
    def __getattr__(self, name):
        return getattr(self.core, name)
    def shutdown_driver(self):
        self.core.shutdown_driver()
        collector = threading.Thread(target=gc.collect)
        collector.start()
        collector.join()

with connect(None):
    cycle = [ray.put(1)]
    cycle.append(cycle)
    gc.collect()  # what is old now is looked at seldom
    del cycle
    worker = ray._private.worker.global_worker
    worker.core_worker = Slow(worker.core_worker)
sys.exit(7 if gc.isenabled() else 8)
"""


def test_a_thread_that_collects_garbage_while_ray_shuts_down_does_not_end_the_command() -> None:
    ended = subprocess.run([sys.executable, "-c", COLLECTS_WHILE_RAY_SHUTS_DOWN], capture_output=True, text=True)
    assert ended.returncode == 7, ended.stdout + ended.stderr
