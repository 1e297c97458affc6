"""The optimiser of a stage: which parameters it trains, at what rates, and how these fall over the steps."""

import math
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import nn

from segadapt.trainables.core.method import (
    SOURCE_ONLY,
    Method,
    ParameterGroup,
    Stage,
    WarmupConfig,
    trained_parameters,
)
from segadapt.trainables.core.networks import TimmBackbone
from segadapt.trainables.core.training.config import OptimizerConfig


def select_trained(method: Method, stage: Stage, trainable: AbstractSet[str]) -> None:
    """Let a parameter require gradients if its name is in `trainable` and the stage trains it; freeze all others."""
    trained = {name for name, _ in trained_parameters(method, stage)}
    for name, parameter in method.named_parameters():
        parameter.requires_grad_(name in trainable and name in trained)


def build_optimizer(
    method: Method, stage: Stage, config: OptimizerConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Return the optimiser of the parameters that require gradients; each group has a `factor` of its learning rate.

    Raises:
        ValueError: If `optimizer.lr` is not set, or the backbone has no blocks for `optimizer.layer_decay`.
    """
    config = _filled(config)
    lr = base_rate(config, stage, method.warmup)
    named = method.parameter_groups()
    if method.online is not None and method.online.mask_token is not None:
        named.append(ParameterGroup("mask_token", (method.online.mask_token,)))  # VFM-UDA: with the backbone's stem
    groups = [part for group in named for part in _parts(group, method, config)]
    fused = device.type == "cuda"
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused)
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, fused=fused)


def _parts(group: ParameterGroup, method: Method, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the parameters of a group that require gradients, by the factor of their learning rate and their decay."""
    factor = (config.head_lr_factor or 1.0) if group.fresh else config.backbone_lr_factor
    scales = {} if group.fresh or config.layer_decay == 1 else _depth_scales(method, config.layer_decay)
    shallowest = min(scales.values(), default=1.0)  # of a stem that a method keeps for one domain
    spared = set() if config.decay_norms else _without_decay(method)
    parts: dict[tuple[float, bool], dict[str, Any]] = {}
    for parameter in group.parameters:
        if not parameter.requires_grad:
            continue
        scale, decays = scales.get(parameter, shallowest), parameter not in spared
        part = parts.setdefault(
            (scale, decays),
            {
                "params": [],
                "name": group.name,
                "factor": factor * scale,
                "weight_decay": config.weight_decay if decays else 0.0,
            },
        )
        part["params"].append(parameter)
    return list(parts.values())


def _depth_scales(method: Method, layer_decay: float) -> dict[nn.Parameter, float]:
    """Return the factor of each parameter of the backbone: 1 in the deepest block, `layer_decay` in the one before."""
    backbone = method.segmenter.backbone
    if not isinstance(backbone, TimmBackbone):
        raise ValueError(
            f"optimizer.layer_decay must be 1 unless the network is a model of timm, but got {layer_decay}. "
            "Leave it out, or set network.name=timm:MODEL."
        )
    depths = backbone.depths()
    deepest = max(depths.values())
    return {parameter: layer_decay ** (deepest - depths[name]) for name, parameter in backbone.named_parameters()}


def _without_decay(method: Method) -> set[nn.Parameter]:
    """Return the parameters of norm layers, and embeddings such as positions."""
    spared = {
        parameter
        for module in method.modules()
        if "Norm" in type(module).__name__
        for parameter in module.parameters(recurse=False)
    }
    backbone = method.segmenter.backbone
    if isinstance(backbone, TimmBackbone):
        names = backbone.embeddings()
        spared |= {parameter for name, parameter in backbone.named_parameters() if name in names}
    return spared


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
    return base_rate(config, stage, warmup) * schedule_factor(config, step, steps)


def schedule_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the share of its rate with which step number `step` out of the `steps` of a stage learns.

    Sources: DAFormer (lhoyer/MIC@2f932a9), whose rise multiplies the fall; VFM-UDA (tue-mps/vfm-uda@e154d8f), whose
    fall sets in after the rise, at what it would be by then.
    """
    config = _filled(config)
    done = step / ((config.horizon or 1.0) * steps)
    rise = config.warmup_steps
    if rise is None:
        rise = 0 if config.name == "sgd" else min(1500, steps // 10)
    if step < rise and not config.warmup_decays:
        return config.warmup_start + (1 - config.warmup_start) * (step / (rise - 1) if rise > 1 else 1.0)
    fall = _fall(config, done)
    return fall * (1 - (1 - step / rise) * (1 - config.warmup_start)) if step < rise else fall


def _fall(config: OptimizerConfig, done: float) -> float:
    """Return the factor of the learning rate after the share `done` of the schedule."""
    if config.schedule == "poly":
        factor: float = (1 - done) ** config.poly_power
        return factor
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return 1 - done if config.schedule == "linear" else 1.0


def _filled(config: OptimizerConfig) -> OptimizerConfig:
    """Return the settings with what follows from the optimiser's name, SGD unless there is one."""
    return config.filled("sgd")


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each parameter group the learning rate, times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def move_weights(
    method: Method,
    stage: Stage,
    optimizer: torch.optim.Optimizer,
    clip_norm: float | None,
    scale: torch.amp.GradScaler,
) -> None:
    """Take an optimiser step and drop the gradients.

    Args:
        method: The method.
        stage: Stage of the step.
        optimizer: Its optimiser.
        clip_norm: What gradients are clipped to; None leaves them.
        scale: What the losses were scaled by.
    """
    if clip_norm is not None:
        scale.unscale_(optimizer)
        parameters = [parameter for _, parameter in trained_parameters(method, stage) if parameter.requires_grad]
        nn.utils.clip_grad_norm_(parameters, clip_norm)
    scale.step(optimizer)
    scale.update()
    optimizer.zero_grad(set_to_none=True)
