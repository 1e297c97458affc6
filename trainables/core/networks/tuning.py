"""Training few parameters of a network: the head alone, or beside it low-rank updates of the backbone's linear layers.

The backbone itself is frozen: its tensors never change, copies of the network share them, and no state holds them.

B samples, r rank, N inputs and M outputs of a linear layer.
"""

import copy
import re
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from segadapt.trainables.core.networks.segmenter import Segmenter

Tuning = Literal["full", "head", "lora"]

LORA_ALPHA = 16
"""Updates are multiplied by this over the rank, so that a learning rate suits several ranks. Hu et al., LoRA, §4.1."""

_QUERIES = ("qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj")
"""How timm names the layers that make queries, keys and values."""

LORA_TARGETS = ("qkv", "proj", "mlp")
"""Linear layers that may get updates: of queries, keys and values, after the attention, and of the MLP."""


class FrozenParameter(nn.Parameter):
    """A tensor that never changes: a copy of a network shares it, and no state of a network holds it.

    Args:
        data: The tensor, which may hold integers.
    """

    def __new__(cls, data: Tensor) -> "FrozenParameter":
        """Return the tensor as a parameter that requires no gradient."""
        return super().__new__(cls, data, requires_grad=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenParameter":
        """Return the parameter itself."""
        return self


class LowRankLinear(nn.Module):
    """A frozen linear layer with a trained update of low rank: `W + LORA_ALPHA / r * up @ down`.

    The update is zero at first. Source: Hu et al., LoRA, ICLR 2022, Eq. 3; initialised as microsoft/LoRA, whose
    `down` is uniform in plus or minus the root of 1 / N.

    Args:
        layer: The linear layer, frozen.
        rank: r.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.empty(rank, layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))
        self.scale = LORA_ALPHA / rank
        bound = layer.in_features**-0.5
        nn.init.uniform_(self.down, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, ..., M) of (B, ..., N)."""
        updated: Tensor = self.layer(x) + self.scale * F.linear(F.linear(x, self.down), self.up)
        return updated

    @property
    def weight(self) -> Tensor:
        """The updated weight, (M, N): some models of timm compute with a layer's weight themselves."""
        return self.layer.weight + self.scale * (self.up @ self.down)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias, (M,)."""
        return self.layer.bias

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a linear layer with the updated weight, which shares nothing with this one."""
        outputs, inputs = self.layer.weight.shape
        linear = nn.Linear(inputs, outputs, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.clone())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear


def tuned(
    segmenter: Segmenter, tune: Tuning = "full", lora_rank: int = 16, lora_targets: Sequence[str] | None = None
) -> Segmenter:
    """Return a network of which `tune` says what may be trained; see `NetworkConfig`. Its output stays the same.

    Args:
        segmenter: The network as it starts; changed in place.
        tune: All, the head, or the head and low-rank updates of the backbone.
        lora_rank: r.
        lora_targets: Some of `LORA_TARGETS`; None takes those that the backbone has.

    Raises:
        ValueError: If the backbone has no such layers, they are too small for the rank, or it has batch norm whose
            statistics cannot be frozen.
    """
    if tune == "full":
        return segmenter
    from timm.layers import freeze_batch_norm_2d  # type: ignore[attr-defined]

    segmenter.backbone = freeze_batch_norm_2d(segmenter.backbone)  # type: ignore[no-untyped-call]
    if any(isinstance(part, _BatchNorm) for part in segmenter.backbone.modules()):
        raise ValueError(
            f"network.tune={tune} needs a backbone whose batch norm can be frozen, but this one normalises in one "
            "dimension. Set network.tune=full or choose another network.name."
        )
    _freeze(segmenter.backbone)
    if tune == "lora":
        _add_updates(segmenter.backbone, lora_rank, lora_targets)
    return segmenter


def _freeze(part: nn.Module) -> None:
    """Replace each tensor that the state of a module holds, parameter or buffer, by a frozen one."""
    frozen = {name: FrozenParameter(tensor.detach()) for name, tensor in part.state_dict(keep_vars=True).items()}
    for prefix, module in part.named_modules():
        for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            key = f"{prefix}.{name}" if prefix else name
            if key in frozen:
                delattr(module, name)
                module.register_parameter(name, frozen[key])
        leave_frozen_out(module)


def leave_frozen_out(module: nn.Module) -> None:
    """Let the state of a module be without the frozen parameters that it has itself; loading needs none of them."""
    module.register_state_dict_post_hook(_drop_frozen)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(_supply_frozen)  # type: ignore[no-untyped-call]


def _drop_frozen(module: nn.Module, state: MutableMapping[str, Any], prefix: str, _metadata: Any) -> None:
    for name, _ in frozen_parameters(module, recurse=False):
        del state[prefix + name]


def _supply_frozen(
    module: nn.Module,
    state: MutableMapping[str, Any],
    prefix: str,
    _metadata: Any,
    _strict: bool,
    _missing: list[str],
    unexpected: list[str],
    _errors: list[str],
) -> None:
    for name, parameter in frozen_parameters(module, recurse=False):
        if prefix + name in state:
            unexpected.append(prefix + name)
        state[prefix + name] = parameter


def frozen_parameters(module: nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, FrozenParameter]]:
    """Yield the names and values of what is frozen in a module and, unless `recurse` is False, its sub-modules."""
    for name, parameter in module.named_parameters(recurse=recurse):
        if isinstance(parameter, FrozenParameter):
            yield name, parameter


def _add_updates(backbone: nn.Module, rank: int, targets: Sequence[str] | None) -> None:
    """Replace the linear layers of the targets by ones with an update."""
    layers = {name: layer for name, layer in backbone.named_modules() if isinstance(layer, nn.Linear)}
    kinds = {name: _kind(backbone, name) for name in layers}
    missing = [target for target in targets or () if target not in kinds.values()]
    chosen = [name for name, kind in kinds.items() if kind is not None and (targets is None or kind in targets)]
    if missing or not chosen:
        wanted = ", ".join(missing or LORA_TARGETS)
        raise ValueError(
            f"network.tune=lora needs a backbone with the linear layers that network.lora_targets names, but this one "
            f"has none called {wanted}. Choose a transformer, or set network.tune=head or full."
        )
    widths = {name: min(layers[name].in_features, layers[name].out_features) for name in chosen}
    narrowest = min(widths, key=lambda name: widths[name])
    if rank > widths[narrowest]:
        raise ValueError(
            f"network.lora_rank must be at most {widths[narrowest]}, the width of the backbone's layer {narrowest}, "
            f"but got {rank}. Lower it."
        )
    for name in chosen:
        parent, _, last = name.rpartition(".")
        setattr(backbone.get_submodule(parent), last, LowRankLinear(layers[name], rank))


def _kind(backbone: nn.Module, name: str) -> str | None:
    """Return which of `LORA_TARGETS` a linear layer is; None if it is another one."""
    parent, _, last = name.rpartition(".")
    if last in _QUERIES:
        return "qkv"
    if any(re.fullmatch(r"mlp\d*", part) for part in parent.split(".")):
        return "mlp"
    attends = any(hasattr(backbone.get_submodule(parent), query) for query in _QUERIES)
    return "proj" if last == "proj" and attends else None


def merged(network: Segmenter) -> Segmenter:
    """Return a copy of a network that shares nothing with it, with updates merged into plain weights, none frozen."""
    whole = copy.deepcopy(network)
    for module in list(whole.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LowRankLinear):
                setattr(module, name, child.merged())
    for module in whole.modules():
        for name, parameter in list(frozen_parameters(module, recurse=False)):
            plain = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.is_floating_point())
            module.register_parameter(name, plain)
    return whole
