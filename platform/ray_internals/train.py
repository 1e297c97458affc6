"""Ray Train's workers, watched from the trial's own process and placed on what Tune set aside for the trial.

By itself, Ray Train starts for each trial a process for its controller, a queue to it, a manager of data sets and a
cleaner of placement groups. Here the controller is an object in the trial's process, reports go straight to Tune, and
the workers take the trial's placement group: Tune asks for it, removes it however the trial ends, and hands it on with
the process to the next trial. What a trial starts are its workers, and the actor at which they wait for each other.

Importing this takes seconds.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import ray
import ray.train.torch
from ray import tune
from ray.train import UserCallback
from ray.train.torch import TorchConfig
from ray.train.torch.config import get_address_and_port  # type: ignore[attr-defined]
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.util import get_current_placement_group
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from segadapt.trainables.core import preemption

_TorchTrainer: Any = ray.train.torch.TorchTrainer  # for type checkers it is the one of Ray Train's first version


class ReportToTune(UserCallback):
    """Passes what the first worker reports on to Tune.

    Args:
        with_checkpoint: Returns a result to which the folder of its checkpoint is added.
    """

    def __init__(self, with_checkpoint: Callable[[dict[str, Any], str], dict[str, Any]]) -> None:
        self._with_checkpoint = with_checkpoint

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Report, and wait until Tune has decided whether the trial goes on."""
        tune.report(metrics[0] if checkpoint is None else self._with_checkpoint(metrics[0], checkpoint.path))


class TrialTrainer(_TorchTrainer):  # type: ignore[misc]
    """`TorchTrainer` for a trial whose placement group has a bundle for its process, then one for each worker.

    `fit` ends the workers however it is left: when Tune stops the trial, by `SystemExit`.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [found for found in super()._create_default_callbacks() if not isinstance(found, unused)]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        controller = _Controller(**parts | {"scaling_policy": _FixedSize(self.scaling_config)})
        try:
            asyncio.run(controller.run())  # type: ignore[no-untyped-call]
        finally:
            controller.end_workers()
        return controller.get_result()


class _FixedSize(FixedScalingPolicy):
    """Asks nobody for resources: the trial has them."""

    def _maybe_send_resource_request(self) -> None:
        pass

    def _send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass


class _TrialsPlacementGroup(DefaultPlacementGroupHandle):
    def shutdown(self) -> None:
        """Leave the placement group, which is the trial's, as it is."""


class _Workers(WorkerGroup):
    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        return custom_runtime_env  # workers inherit the variables that the trial's process has

    def _create_placement_group(self, *described: Any) -> _TrialsPlacementGroup:
        group = get_current_placement_group()
        assert group is not None
        return _TrialsPlacementGroup(group)

    def _create_workers(
        self, num_workers: int, placement_group: Any, resources_per_worker: Any, *rest: Any, **options: Any
    ) -> Any:
        bundles = list(range(1, num_workers + 1))  # the first is for the trial's process
        return super()._create_workers(num_workers, placement_group, resources_per_worker, bundles, *rest, **options)


class _Controller(TrainController):
    worker_group_cls = _Workers

    def end_workers(self) -> None:
        """End the workers if they run, without waiting for their training."""
        group = self.get_worker_group()
        if group is not None and group.has_started():
            group.abort()  # type: ignore[no-untyped-call]


_stores: list[Any] = []
"""Of this process; the process group's own is the same one as long as this one lives."""


class PreemptibleTorchConfig(TorchConfig):
    """Sets the process group up as `TorchConfig` does, on one address, and has the workers heed SIGTERM."""

    @property
    def backend_cls(self) -> Any:
        """What sets the workers up."""
        return PreemptibleTorchBackend


class PreemptibleTorchBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Runs in Ray Train's controller."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Set the workers up; what they execute here runs in their main thread."""
        super().on_start(_MeetingInOurStore(worker_group), backend_config)
        worker_group.execute(preemption.leave_when_terminated)


class _MeetingInOurStore:
    """A group of workers whose first one opens the store in which they meet, when it is asked for its address.

    torch would have the store listen on all interfaces, and whoever reaches it may read and write it.
    """

    def __init__(self, group: Any) -> None:
        self._group = group

    def __len__(self) -> int:
        return len(self._group)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def execute_single(self, rank: int, function: Any, *args: Any, **options: Any) -> Any:
        """Run a function in one worker."""
        asked = open_store if function is get_address_and_port else function
        return self._group.execute_single(rank, asked, *args, **options)


def open_store() -> tuple[str, int]:
    """Start a store that listens on this node's address alone; returns the address and the port.

    A process group that is made in this process on that port takes it over rather than start its own.
    """
    address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.bind((address, 0))
    port = int(listener.getsockname()[1])
    listening = listener.detach()
    _stores.append(
        TCPStore(address, port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=listening)
    )
    return address, port
