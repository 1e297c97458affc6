"""A GPU that is simulated on the CPU: it counts what a program waits for, and refuses what a GPU would refuse.

Tensors are put on it, and what is computed of them is on it. Values are the CPU's own. What it knows a program by:

* `tensor.is_cuda` is true of its tensors, so that code takes the path it takes on a GPU;
* a value that is read (`item`, `tolist`, `nonzero`, indexing by a mask, ...) is a wait: the host stands still until all
  that was asked of the device before is done;
* a copy from the host that is not `non_blocking` is a wait as well;
* an operation on tensors of both, other than a number of the host, raises an error, as it does on a GPU;
* an operation that PyTorch documents to have no deterministic implementation on a GPU is noted.

    device = SimulatedDevice()
    device.put(method)
    with device:
        step()
    assert not device.waits
"""

import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

READS = {
    aten._local_scalar_dense,  # item, bool, int, float
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,  # its length depends on the values
    aten.repeat_interleave,  # by a tensor
    aten.linalg_eigh,  # whether it has converged is read
    aten.linalg_svd,
    aten._linalg_eigh,
    aten._linalg_svd,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIES = {aten.copy_, aten._to_copy}

UNREPEATABLE = {
    aten.nll_loss_forward,
    aten.nll_loss_backward,
    aten.nll_loss2d_forward,
    aten.nll_loss2d_backward,
    aten._adaptive_avg_pool2d_backward,
    aten.adaptive_max_pool2d_backward,
    aten.avg_pool3d_backward,
    aten.max_pool3d_with_indices_backward,
    aten.upsample_linear1d_backward,
    aten.upsample_bicubic2d_backward,
    aten._upsample_bicubic2d_aa_backward,
    aten._upsample_bilinear2d_aa_backward,
    aten.upsample_trilinear3d_backward,
    aten.reflection_pad2d_backward,
    aten.replication_pad2d_backward,
    aten.grid_sampler_2d_backward,
    aten.histc,
    aten.kthvalue,
    aten.median,
    aten.put_,
    aten._embedding_bag_dense_backward,
    aten._ctc_loss_backward,
}
"""What raises an error on a GPU under `torch.use_deterministic_algorithms`, as its documentation lists it."""
UNREPEATABLE_FLOATS = {aten.cumsum, aten.cumsum_, aten.cumprod}
"""Of integers they repeat to the bit."""

_REPOSITORY = Path(__file__).parents[2]


class SimulatedDevice:
    """A simulated GPU; the operations within its context are watched.

    Attributes:
        waits: How often the host waited, by operation and the line of the project that asked for it.
        unrepeatable: Operations without a deterministic implementation, likewise.
    """

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.unrepeatable: Counter[str] = Counter()
        self._storages: set[StorageWeakRef] = set()
        self.concerned: list[bool] = []
        """Of each call under way, whether it names a device or has a tensor of it."""
        self._modes = (_Conversions(self), _Operations(self))

    def put(self, *values: Any) -> None:
        """Put tensors, modules with their gradients, optimisers' states and whatever holds them on the device."""
        for value in values:
            if isinstance(value, nn.Module):
                held: Iterable[Any] = [*value.parameters(), *value.buffers()]
                held = [*held, *(p.grad for p in value.parameters() if p.grad is not None)]
            elif isinstance(value, torch.optim.Optimizer):
                held = tree_leaves([{k: v for k, v in state.items() if k != "step"} for state in value.state.values()])
            else:
                held = tree_leaves(value)
            for leaf in held:
                if isinstance(leaf, Tensor):
                    self._storages.add(StorageWeakRef(leaf.untyped_storage()))

    def remove(self, value: Tensor | None) -> None:
        """Leave a tensor on the host."""
        if value is not None:
            self._storages.discard(StorageWeakRef(value.untyped_storage()))

    def has(self, value: Any) -> bool:
        """Return whether a value is a tensor on the device."""
        return isinstance(value, Tensor) and StorageWeakRef(value.untyped_storage()) in self._storages

    def __enter__(self) -> "SimulatedDevice":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exception)


def _asked_at(operation: object) -> str:
    """Return the operation and the line of the project that asked for it."""
    project = [
        frame
        for frame in traceback.extract_stack()
        if Path(frame.filename).is_relative_to(_REPOSITORY)
        and ".venv" not in frame.filename
        and frame.filename != __file__
    ]
    where = f"{Path(project[-1].filename).name}:{project[-1].lineno}" if project else "elsewhere"
    return f"{operation} at {where}"


class _Conversions(TorchFunctionMode):
    """What reads or moves tensors without an operation of their values."""

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device, kwargs = self._device, kwargs or {}
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return device.has(args[0])
        if func in (Tensor.tolist, Tensor.numpy, Tensor.cpu) and device.has(args[0]):
            device.waits[_asked_at(func.__name__)] += 1
            with torch._C.DisableTorchFunction(), _without_operations():
                result = func(*args, **kwargs)
                return result.clone() if func is Tensor.cpu else result  # on the host from now on
        leaves = tree_leaves((args, kwargs))
        device.concerned.append(kwargs.get("device") is not None or any(map(device.has, leaves)))
        try:
            result = func(*args, **kwargs)
        finally:
            device.concerned.pop()
        if func is Tensor.to and _names_a_device(args[1:], kwargs) and not device.has(args[0]):
            with _without_operations():
                result = result.clone()
            device.put(result)
            if not kwargs.get("non_blocking"):
                device.waits[_asked_at("blocking copy")] += 1
        if func is Tensor.new_tensor and device.has(args[0]):
            device.put(result)
            device.waits[_asked_at("new_tensor")] += 1
        return result


def _names_a_device(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    named = [*arguments[:1], keywords.get("device")]
    return any(isinstance(argument, torch.device | str) for argument in named)


def _without_operations() -> Any:
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


class _Operations(TorchDispatchMode):
    """What computes with values."""

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device, kwargs, packet = self._device, kwargs or {}, func.overloadpacket
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [leaf for leaf in inputs if device.has(leaf)]
        host = [leaf for leaf in inputs if not device.has(leaf) and leaf.ndim > 0]
        if on_device:
            self._watch(packet, args, kwargs, host)
        result = func(*args, **kwargs)
        made_on_device = not inputs and kwargs.get("device") is not None and (device.concerned or [True])[-1]
        if on_device or made_on_device:
            device.put(result)
        return result

    def _watch(self, packet: Any, args: Any, kwargs: Any, host: list[Tensor]) -> None:
        device = self._device
        by_mask = packet in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if packet in READS or by_mask or (packet in INDEXING and host):
            device.waits[_asked_at(packet)] += 1
        elif packet is aten.copy_ and (host or not device.has(args[1])) and args[1].ndim > 0:
            if not (args[2:] and args[2]) and not kwargs.get("non_blocking"):
                device.waits[_asked_at("blocking copy")] += 1
        elif host and packet not in COPIES:
            shapes = [tuple(leaf.shape) for leaf in host]
            raise RuntimeError(f"{packet} got tensors of the device, and of the host with shapes {shapes}.")
        if packet in UNREPEATABLE or (packet in UNREPEATABLE_FLOATS and args[0].is_floating_point()):
            device.unrepeatable[_asked_at(packet)] += 1
