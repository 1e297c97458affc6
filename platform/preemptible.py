"""Ray Train's workers, made to leave in good order when they are asked to end. Importing this takes seconds."""

from typing import Any

from ray.train.torch import TorchConfig

from segadapt.trainables.core import preemption


class PreemptibleTorchConfig(TorchConfig):
    """Sets the process group up as `TorchConfig` does, and has the workers heed SIGTERM."""

    @property
    def backend_cls(self) -> Any:
        """What sets the workers up."""
        return PreemptibleTorchBackend


class PreemptibleTorchBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Runs in Ray Train's controller."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Set the workers up; what they execute here runs in their main thread."""
        super().on_start(worker_group, backend_config)
        worker_group.execute(preemption.leave_when_terminated)
