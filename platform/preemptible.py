"""Ray Train's workers: they leave in good order when they are asked to end, and listen on their node's address alone.

Importing this takes seconds.
"""

import socket
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import get_address_and_port  # type: ignore[attr-defined]
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from segadapt.trainables.core.training import interruption as preemption

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
