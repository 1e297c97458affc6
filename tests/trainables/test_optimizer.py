"""Promises of the optimisers: rates, groups and steps as the authors' code has them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy import toy_config

from segadapt.platform.errors import UsageError
from segadapt.platform.settings.config import resolve
from segadapt.platform.trial.training import build_method
from segadapt.trainables.core.method import SOURCE_ONLY, Method, Stage
from segadapt.trainables.core.networks import TimmBackbone
from segadapt.trainables.core.training.config import OptimizerConfig
from segadapt.trainables.core.training.optimizer import build_optimizer, schedule_factor

GOLDEN = Path(__file__).parent / "golden"
ADAPT = Stage(name="adapt")
CPU = torch.device("cpu")


@pytest.mark.parametrize("case", ["online_9_schedule", "online_9b_schedule_short"])
def test_adamw_moves_weights_as_daformers_code_does(case: str) -> None:
    arrays = np.load(GOLDEN / f"{case}.npz")
    steps = int(arrays["cfg_total"])
    config = OptimizerConfig(name="adamw", warmup_steps=int(arrays["cfg_warmup"]))
    for step, rates in zip(arrays["in_steps"].tolist(), arrays["exp_lr"], strict=True):
        ours = [base * schedule_factor(config, step, steps) for base in arrays["cfg_base_lr"].tolist()]
        np.testing.assert_allclose(ours, rates, rtol=1e-9)

    weights = [nn.Parameter(torch.tensor(arrays[f"in_adam_p{k}"], dtype=torch.float64)) for k in range(3)]
    method = _Parts(encoder=weights[0], head=weights[1], norm=weights[2])
    base, _, _ = arrays["cfg_base_lr"].tolist()
    optimizer = build_optimizer(method, ADAPT, replace(config, lr=base, head_lr_factor=10.0), CPU)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0, 0.01]
    for index, step in enumerate(arrays["in_adam_t"].tolist()):
        for group in optimizer.param_groups:
            group["lr"] = base * schedule_factor(config, step, steps) * group["factor"]
        for k, weight in enumerate(weights):
            weight.grad = torch.tensor(arrays[f"in_adam_g{k}"][index], dtype=torch.float64)
        optimizer.step()
        for k, weight in enumerate(weights):
            np.testing.assert_allclose(weight.detach(), arrays[f"exp_adam_p{k}"][index], rtol=1e-9)


@pytest.mark.parametrize("case", [0, 1])
def test_a_fall_after_the_rise_is_that_of_vfm_uda(case: int) -> None:
    arrays = np.load(GOLDEN / "online_8_vfm_optimizer.npz")
    steps, rise = arrays[f"cfg_sched{case}"].tolist()
    config = OptimizerConfig(name="adamw", warmup_steps=rise, warmup_start=1e-3, warmup_decays=False)
    ours = [schedule_factor(config, step, steps) for step in arrays[f"in_sched{case}_steps"].tolist()]
    np.testing.assert_allclose(ours, arrays[f"exp_sched{case}_factor"], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("case", [0, 1, 2])
def test_rates_fall_by_depth_as_in_vfm_uda(case: int) -> None:
    arrays = np.load(GOLDEN / "online_8_vfm_optimizer.npz")
    blocks, batch, lr, backbone_factor, layer_decay = arrays[f"cfg_lr{case}"].tolist()
    assert blocks == 12
    config = resolve(
        "source_only",
        {
            "network.name": "timm:vit_tiny_patch16_224",
            "optimizer.lr": lr * batch**0.5,
            "optimizer.backbone_lr_factor": backbone_factor,
            "optimizer.layer_decay": layer_decay,
            "optimizer.decay_norms": True,
        },
    )
    method = build_method(config, 3)
    optimizer = build_optimizer(method, ADAPT, config.optimizer, CPU)
    of_parameter = {
        parameter: (config.optimizer.lr or 0) * group["factor"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    rates = {name: of_parameter[parameter] for name, parameter in method.segmenter.named_parameters()}
    assert {group["weight_decay"] for group in optimizer.param_groups} == set(arrays[f"exp_lr{case}_wd"].tolist())
    encoder = {name.removeprefix("backbone.encoder."): rate for name, rate in rates.items() if "encoder" in name}
    for index, rate in enumerate(arrays[f"exp_lr{case}_blocks"].tolist()):
        block = {value for name, value in encoder.items() if name.startswith(f"blocks.{index}.")}
        assert list(block) == pytest.approx([rate] * len(block), rel=1e-9)
    for name, part in (("patch_embed.proj.weight", "patch"), ("pos_embed", "pos"), ("cls_token", "cls")):
        assert encoder[name] == pytest.approx(float(arrays[f"exp_lr{case}_{part}"]), rel=1e-9)
    assert encoder["norm.weight"] == pytest.approx(float(arrays[f"exp_lr{case}_norm"]), rel=1e-9)
    decoder = {rate for name, rate in rates.items() if name.startswith("head.")}
    assert list(decoder) == pytest.approx([float(arrays[f"exp_lr{case}_decoder"])], rel=1e-9)


@pytest.mark.parametrize("network", ["test_vit", "test_convnext", "pvt_v2_b0", "test_resnet"])
@pytest.mark.parametrize("layer_decay", [1.0, 0.9])
def test_every_parameter_is_in_one_group(network: str, layer_decay: float) -> None:
    config = toy_config("bicl", network__name=f"timm:{network}", optimizer__layer_decay=layer_decay, **WITHOUT_BRANCHES)
    method = build_method(config, 4)
    optimizer = build_optimizer(method, ADAPT, config.optimizer, CPU)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(method.parameters())


def test_norms_and_positions_do_not_decay_under_adamw() -> None:
    method = build_method(toy_config("source_only", network__name="timm:test_vit"), 4)
    config = toy_config("source_only", network__name="timm:test_vit").optimizer
    decay = {
        parameter: group["weight_decay"]
        for group in build_optimizer(method, ADAPT, config, CPU).param_groups
        for parameter in group["params"]
    }
    spared = {name for name, parameter in method.segmenter.named_parameters() if decay[parameter] == 0}
    assert {"backbone.encoder.pos_embed", "backbone.encoder.cls_token", "backbone.encoder.norm.weight"} <= spared
    assert all("norm" in name or "pos_embed" in name or "token" in name or "decoder" in name for name in spared)
    assert decay[dict(method.segmenter.named_parameters())["backbone.encoder.patch_embed.proj.weight"]] == 0.01


def test_sgd_keeps_one_group_a_part_as_before() -> None:
    config = toy_config("bicl")
    groups = build_optimizer(build_method(config, 4), SOURCE_ONLY, config.optimizer, CPU).param_groups
    assert [(group["name"], group["factor"], group["weight_decay"]) for group in groups] == [
        ("backbone", 1.0, 5e-4),
        ("head", 1.0, 5e-4),
        ("source_stem", 1.0, 5e-4),
    ]
    assert [schedule_factor(config.optimizer, step, 8) for step in (0, 5)] == [1.0, (1 - 5 / 12.5) ** 0.9]


def test_layer_decay_needs_blocks() -> None:
    config = toy_config("source_only", optimizer__layer_decay=0.9)
    with pytest.raises(ValueError, match=r"layer_decay must be 1 unless .* got 0\.9"):
        build_optimizer(build_method(config, 4), ADAPT, config.optimizer, CPU)


def test_another_optimiser_needs_a_rate_of_its_own() -> None:
    with pytest.raises(UsageError, match=r"optimizer\.lr must be given with optimizer\.name=adamw.*meant for sgd"):
        resolve("source_only", {"optimizer.name": "adamw"})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("layer_decay", 0.0),
        ("layer_decay", 1.1),
        ("backbone_lr_factor", 0.0),
        ("warmup_steps", -1),
        ("warmup_start", 0.0),
    ],
)
def test_values_that_cannot_be_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"optimizer.{setting} must"):
        resolve("source_only", {f"optimizer.{setting}": value})


WITHOUT_BRANCHES = {"method__feature": "backbone"}


class _Parts(Method):
    """Three lone parameters: of an encoder, of a norm layer beside it, and of a head."""

    name = "parts"
    stages = (ADAPT,)

    def __init__(self, *, encoder: nn.Parameter, norm: nn.Parameter, head: nn.Parameter) -> None:
        nn.Module.__init__(self)
        layer = nn.LayerNorm(1, bias=False)
        layer.weight = norm
        self.segmenter = nn.Module()  # type: ignore[assignment]
        self.segmenter.backbone = nn.ModuleList([layer])
        self.segmenter.backbone.register_parameter("encoder", encoder)
        self.segmenter.head = nn.Module()
        self.segmenter.head.register_parameter("head", head)
        self.warmup = toy_config("source_only").warmup
        self.online = None

    def forward(self, batch: Any, step: int) -> dict[str, Tensor]:
        return {"sum": torch.stack([parameter.sum() for parameter in self.parameters()]).sum()}


def test_the_backbone_of_a_timm_network_says_how_deep_its_parameters_lie() -> None:
    backbone = build_method(toy_config("source_only", network__name="timm:test_vit"), 4).segmenter.backbone
    assert isinstance(backbone, TimmBackbone)
    assert set(backbone.depths()) == {name for name, _ in backbone.named_parameters()}
