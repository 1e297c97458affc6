"""Ray Train's workers, watched from the trial's own process and placed on what Tune set aside for the trial.

By itself, Ray Train starts for each trial a process for its controller, a queue to it, a manager of data sets and a
cleaner of placement groups. Here the controller is an object in the trial's process, reports go straight to Tune, and
the workers take the trial's placement group: Tune asks for it, removes it however the trial ends, and hands it on with
the process to the next trial. What a trial starts are its workers, and the actor at which they wait for each other.

Importing this fails where Ray Train has changed in one of these parts.
"""

import asyncio
from typing import Any

import ray.train.torch
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.util import get_current_placement_group

PRIVATE = (
    ("ray.train.v2._internal.callbacks", "DatasetsCallback", "start no manager of data sets"),
    (
        "ray.train.v2._internal.callbacks.placement_group_callback",
        "PlacementGroupCleanerCallback",
        "start no cleaner of placement groups",
    ),
    ("ray.train.v2._internal.execution.controller", "TrainController", "control the workers from the trial's process"),
    (
        "ray.train.v2._internal.execution.controller",
        "TrainController.worker_group_cls",
        "have the controller start our workers",
    ),
    (
        "ray.train.v2._internal.execution.controller",
        "TrainController.get_worker_group",
        "end the workers with the trial",
    ),
    ("ray.train.v2._internal.execution.scaling_policy", "FixedScalingPolicy", "keep the number of workers"),
    (
        "ray.train.v2._internal.execution.scaling_policy",
        "FixedScalingPolicy._maybe_send_resource_request",
        "ask for nothing",
    ),
    ("ray.train.v2._internal.execution.scaling_policy", "FixedScalingPolicy._send_resource_request", "ask for nothing"),
    (
        "ray.train.v2._internal.execution.scaling_policy",
        "FixedScalingPolicy._cancel_resource_request",
        "take nothing back",
    ),
    ("ray.train.v2._internal.execution.worker_group", "WorkerGroup", "place the workers"),
    (
        "ray.train.v2._internal.execution.worker_group",
        "WorkerGroup._get_worker_runtime_env",
        "have workers inherit variables",
    ),
    (
        "ray.train.v2._internal.execution.worker_group",
        "WorkerGroup._create_placement_group",
        "take the trial's placement group",
    ),
    (
        "ray.train.v2._internal.execution.worker_group",
        "WorkerGroup._create_workers",
        "place workers in the trial's bundles",
    ),
    ("ray.train.v2._internal.execution.worker_group", "WorkerGroup.abort", "end the workers with the trial"),
    (
        "ray.train.v2._internal.execution.worker_group.placement_group_handle",
        "DefaultPlacementGroupHandle",
        "leave the trial's placement group to Tune",
    ),
    (
        "ray.train.v2._internal.execution.worker_group.placement_group_handle",
        "DefaultPlacementGroupHandle.shutdown",
        "leave the trial's placement group to Tune",
    ),
    ("ray.train.torch", "TorchTrainer._create_default_callbacks", "leave out what is not needed"),
    ("ray.train.torch", "TorchTrainer._initialize_and_run_controller", "control the workers from the trial's process"),
)
"""Parts of Ray Train that are not public: module, name and what they are for."""

_TorchTrainer: Any = ray.train.torch.TorchTrainer  # for type checkers it is the one of Ray Train's first version


class TrialTrainer(_TorchTrainer):  # type: ignore[misc]
    """`TorchTrainer` for a trial whose placement group has a bundle for its process, then one for each worker.

    `fit` ends the workers however it is left: when Tune stops the trial, by `SystemExit`.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

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
