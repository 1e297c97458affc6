"""The optimiser of a stage: which parameters it trains, at what rates, and how these fall over the steps."""

from collections.abc import Set as AbstractSet

import torch
from torch import nn

from segadapt.trainables.core.method import SOURCE_ONLY, Method, Stage, WarmupConfig, trained_parameters
from segadapt.trainables.core.training.config import OptimizerConfig


def select_trained(method: Method, stage: Stage, trainable: AbstractSet[str]) -> None:
    """Let a parameter require gradients if its name is in `trainable` and the stage trains it; freeze all others."""
    trained = {name for name, _ in trained_parameters(method, stage)}
    for name, parameter in method.named_parameters():
        parameter.requires_grad_(name in trainable and name in trained)


def build_optimizer(
    method: Method, stage: Stage, config: OptimizerConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Return the optimiser of the parameters that require gradients; each group has a `factor` of its learning rate."""
    groups = []
    for group in method.parameter_groups():
        parameters = [parameter for parameter in group.parameters if parameter.requires_grad]
        factor = (config.head_lr_factor or 1.0) if group.fresh else 1.0
        if parameters:
            groups.append({"params": parameters, "name": group.name, "factor": factor})
    return torch.optim.SGD(
        groups,
        lr=base_rate(config, stage, method.warmup),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=device.type == "cuda",
    )


def base_rate(config: OptimizerConfig, stage: Stage, warmup: WarmupConfig) -> float:
    """Return the learning rate with which a stage begins.

    Raises:
        ValueError: If `optimizer.lr` is not set.
    """
    if config.lr is None:
        raise ValueError("optimizer.lr must be set, but got None. Take `base_lr(network)`.")
    return config.lr * stage.lr_factor * (warmup.lr_factor if stage is SOURCE_ONLY else config.lr_factor)


def learning_rate(config: OptimizerConfig, stage: Stage, warmup: WarmupConfig, step: int, steps: int) -> float:
    """Return the learning rate of step number `step` out of the `steps` of a stage."""
    rate: float = base_rate(config, stage, warmup) * (1 - step / (config.horizon * steps)) ** config.poly_power
    return rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each parameter group the learning rate, times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def move_weights(method: Method, stage: Stage, optimizer: torch.optim.Optimizer, clip_norm: float | None) -> None:
    """Take an optimiser step, with gradients clipped to `clip_norm` where that is given, and drop the gradients."""
    if clip_norm is not None:
        parameters = [parameter for _, parameter in trained_parameters(method, stage) if parameter.requires_grad]
        nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
