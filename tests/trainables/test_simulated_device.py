"""The simulated GPU: what it takes for a wait, what it refuses, and what it lets pass."""

from collections.abc import Callable

import pytest
import torch
from simulated_device import SimulatedDevice
from torch import Tensor, nn

WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "condition": lambda x: bool(x.any()),
    "tolist": lambda x: (x + 1).tolist(),
    "numpy": lambda x: (x + 1).numpy(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked write": lambda x: x.clone().index_put_((x > 0,), torch.ones((), device=x.device)),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().bincount(),
    "copy": lambda x: torch.arange(3).to(x.device) + x,
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0, 3.0]),
    "index of the host": lambda x: x[torch.tensor([0, 2])],
}
PASSING: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: (2 * x + torch.tensor(1.0)).sum(),
    "masks": lambda x: torch.where(x > 0, x, 0.0).masked_fill(x < 1, 2.0),
    "indices of the device": lambda x: x[torch.arange(2, device=x.device)],
    "a copy that is not waited for": lambda x: torch.arange(3).to(x.device, non_blocking=True) + x,
    "new tensors": lambda x: x + torch.zeros(3, device=x.device) + x.new_ones(3) + torch.zeros_like(x),
    "numbers of the host": lambda x: x * torch.rand(4, generator=torch.Generator().manual_seed(0)).tolist()[0],
}


def on_device(values: Tensor) -> tuple[SimulatedDevice, Tensor]:
    device = SimulatedDevice()
    device.put(values)
    return device, values


@pytest.mark.parametrize("name", WAITING)
def test_what_reads_a_value_is_a_wait(name: str) -> None:
    device, values = on_device(torch.tensor([1.0, 0.0, 2.0]))
    with device:
        WAITING[name](values)
    assert device.waits.total() == 1, device.waits
    assert "test_simulated_device.py" in next(iter(device.waits))


@pytest.mark.parametrize("name", PASSING)
def test_what_stays_on_the_device_is_none(name: str) -> None:
    device, values = on_device(torch.tensor([1.0, 0.0, 2.0]))
    with device:
        PASSING[name](values)
    assert not device.waits


def test_a_wait_in_the_backward_pass_is_seen() -> None:
    class Reading(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient * float(gradient.max())

    device, values = on_device(torch.ones(3, requires_grad=True))
    with device:
        torch.autograd.backward(Reading.apply(values).sum())
    assert device.waits.total() == 1


def test_tensors_of_the_host_beside_those_of_the_device_are_refused() -> None:
    device, values = on_device(torch.ones(3))
    with device, pytest.raises(RuntimeError, match=r"of the host with shapes \[\(3,\)\]"):
        values + torch.arange(3)


def test_its_tensors_say_so_and_others_do_not() -> None:
    device, values = on_device(torch.ones(3))
    with device:
        assert values.is_cuda
        assert (values + 1).is_cuda
        assert not torch.ones(3).is_cuda
        assert not values.cpu().is_cuda
    assert not values.is_cuda


def test_operations_without_a_deterministic_implementation_are_noted() -> None:
    logits, labels = torch.randn(1, 3, 4, 4, requires_grad=True), torch.zeros(1, 4, 4, dtype=torch.int64)
    device = SimulatedDevice()
    device.put(logits, labels)
    with device:
        nn.functional.cross_entropy(logits, labels).backward()
        labels.cumsum(1)
    assert {entry.split(" ")[0] for entry in device.unrepeatable} == {
        "aten.nll_loss2d_forward",
        "aten.nll_loss2d_backward",
    }
