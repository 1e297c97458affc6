"""Ray Train in a trial: which trainer runs its workers, how they are placed and how they meet.

Importing this takes seconds.
"""

import functools
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.train import UserCallback
from ray.train.torch import TorchConfig
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from segadapt.platform.errors import warn_of_change
from segadapt.trainables.core.training import interruption as preemption

PRIVATE = (
    ("ray.train.torch.config", "get_address_and_port", "have the workers of a trial meet on one address alone"),
    (
        "ray.train.v2._internal.constants",
        "CHECKPOINT_MANAGER_SNAPSHOT_FILENAME",
        "start a trial again whose list of checkpoints was cut short",
    ),
)
"""Parts of Ray Train that are not public: module, name and what they are for."""


@functools.cache
def _trial_trainer() -> Any:
    """Return our trainer; None where Ray Train has changed in its parts."""
    try:
        from segadapt.platform.ray_internals.trial_trainer import TrialTrainer
    except (ImportError, AttributeError) as error:
        warn_of_change(
            "ray",
            str(error),
            "Ray's own TorchTrainer runs the workers of trials. Each trial takes longer to begin and starts more "
            "processes.",
        )
        return None
    return TrialTrainer


def trainer_in_trial(with_checkpoint: Callable[[dict[str, Any], str], dict[str, Any]]) -> tuple[Any, Any]:
    """Return the class of the trainer of a trial's workers, and the callback that reports to Tune.

    Args:
        with_checkpoint: Returns a result to which the folder of its checkpoint is added.

    The trainer is Ray's own `TorchTrainer` where Ray Train has changed in the parts that ours is made of.
    """
    trainer = _trial_trainer()
    if trainer is not None:
        return trainer, ReportToTune(with_checkpoint)
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    return TorchTrainer, TuneReportCallback()  # type: ignore[no-untyped-call]


def forget_damaged_list(folder: Path) -> None:
    """Set aside Ray Train's list of a trial's checkpoints, if a kill or a full disk cut it short.

    Ray Train writes it in place, and a trial whose list cannot be read would fail each time it is started. Workers
    look for the checkpoint that they go on from themselves.

    Args:
        folder: Where Ray Train keeps the trial.
    """
    try:
        from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    except ImportError as error:
        warn_of_change("ray", str(error), "a trial whose list of checkpoints was cut short fails.")
        return
    listed = folder / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    try:
        json.loads(listed.read_bytes())
    except FileNotFoundError:
        return
    except ValueError:
        listed.replace(listed.with_name(f"broken_{listed.name}"))


def workers_are_in_the_trial() -> bool:
    """Return whether a trial's workers end with its process and live in its placement group.

    Otherwise a process of Ray's ends them, which asks the dashboard, and no process may be used for another trial.
    """
    return _trial_trainer() is not None


def bundles(worker: dict[str, float], workers: int) -> list[dict[str, float]]:
    """Return the resources of a trial, of which each of so many workers takes `worker`; its process takes no CPU.

    Ray's own trainer asks for those of the workers by itself.
    """
    process = {"node:__internal_head__": 0.001}
    return [process, *[worker] * workers] if workers_are_in_the_trial() else [process]


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


_stores: list[Any] = []
"""Stores that this process opened. A process group that is made on the port of one takes it over while it lives."""


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
        super().on_start(_meeting_on_one_address(worker_group), backend_config)
        worker_group.execute(preemption.leave_when_terminated)


def _meeting_on_one_address(group: Any) -> Any:
    """Return a group of workers that meet in a store on one address.

    torch would have the store listen on all interfaces, and whoever reaches it may read and write it.
    """
    try:
        from ray.train.torch.config import get_address_and_port  # type: ignore[attr-defined]
    except ImportError as error:
        warn_of_change(
            "ray",
            str(error),
            "the workers of a trial meet in a store of torch that listens on all interfaces without a password. Have "
            "a firewall close this machine's ports.",
        )
        return group
    return _MeetingInOurStore(group, get_address_and_port)


class _MeetingInOurStore:
    """A group of workers whose first one opens the store in which they meet, when it is asked for its address.

    Args:
        group: The workers.
        get_address_and_port: By what Ray Train asks for the address.
    """

    def __init__(self, group: Any, get_address_and_port: Callable[[], tuple[str, int]]) -> None:
        self._group = group
        self._get_address_and_port = get_address_and_port

    def __len__(self) -> int:
        return len(self._group)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def execute_single(self, rank: int, function: Any, *args: Any, **options: Any) -> Any:
        """Run a function in one worker."""
        run = open_store if function is self._get_address_and_port else function
        return self._group.execute_single(rank, run, *args, **options)


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
