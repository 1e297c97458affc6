"""Promises of online self-training as a whole: the released codes' steps, and what holds beside any method."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from test_online_parts import Golden
from torch import Tensor, nn

from segadapt.trainables.core.data.batch import DomainBatch
from segadapt.trainables.core.method import WarmupConfig
from segadapt.trainables.core.networks import Segmenter, TimmBackbone
from segadapt.trainables.core.online.config import OnlineConfig
from segadapt.trainables.core.online.terms import OnlineTerms
from segadapt.trainables.core.training.passes import pass_step
from segadapt.trainables.online_self_training import OnlineSelfTraining

UNCHANGED: dict[str, Any] = {"enabled": True, "jitter_chance": 0.0, "blur_chance": 0.0}


class Recorded(OnlineTerms):
    """Takes the draws that were recorded of the released code."""

    draws: dict[str, Tensor]

    def drawn(self, name: str, batch: DomainBatch, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return self.draws[name]


def ranks_of(choices: Tensor) -> Tensor:
    """Return draws with which the classes are chosen that were."""
    draws = torch.ones(len(choices), 256)
    for row, choice in zip(draws, choices, strict=True):
        row[choice[choice >= 0]] = 0.0
    return draws


def released_step(method: OnlineSelfTraining, batch: DomainBatch) -> dict[str, Tensor]:
    method.train()
    return pass_step(method, method, iter([batch]), 0, 1, precision=contextlib.nullcontext, scale=lambda loss: loss)


class Convolutions(nn.Sequential):
    """The backbone of the golden steps."""

    def __init__(self) -> None:
        convolution = {"kernel_size": 3, "stride": 2, "padding": 1}
        super().__init__(nn.Conv2d(3, 6, **convolution), nn.Tanh(), nn.Conv2d(6, 8, **convolution), nn.Tanh())


CONVOLUTIONS = {"backbone.0": "conv1", "backbone.2": "conv2", "head": "cls"}


def name_in_convolutions(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    return f"{CONVOLUTIONS[module]}_{kind[0]}"


def convolutional(golden: Golden, who: str) -> Segmenter:
    network = Segmenter(
        Convolutions(),
        nn.Conv2d(8, golden["cfg_C"], 1),
        feature_channels=8,
        num_classes=golden["cfg_C"],
        align_corners=False,
    ).double()
    for name, parameter in network.named_parameters():
        parameter.data = golden[f"in_{who}_{name_in_convolutions(name)}"]
    return network


def check_steps_of_mic(golden: Golden) -> None:
    student = convolutional(golden, "student")
    method = OnlineSelfTraining(student, OnlineSelfTraining.Config(), WarmupConfig())
    config = OnlineConfig(
        teacher_rate=1 - golden["cfg_alpha"],
        threshold=golden["cfg_tau"],
        quality="batch",
        classes_of="batch",
        paste_ignored=True,
        mask_ratio=golden["cfg_ratio"],
        mask_block=golden["cfg_block"] / min(golden["cfg_H"], golden["cfg_W"]),
        mask_weight=golden["cfg_lambda_mask"],
        feature_distance=golden["cfg_lambda_fd"],
        feature_purity=golden["cfg_purity"],
        **UNCHANGED,
    )
    distant = config.feature_distance > 0
    online = method.online = Recorded(convolutional(golden, "frozen") if distant else student, config)
    online.things = golden.indices("cfg_things").tolist()
    online.teacher.start_from(convolutional(golden, "teacher"))
    online.steps = golden["cfg_t0"] - 1
    optimizer = torch.optim.AdamW(student.parameters(), lr=golden["cfg_lr"], weight_decay=golden["cfg_weight_decay"])
    online.follow(student)
    for step in range(golden["cfg_steps"]):
        there, expected = f"in_s{step}", f"exp_s{step}"
        for name, parameter in online.teacher.network.named_parameters():
            golden.near(
                f"{expected}_teacher_{CONVOLUTIONS[name.rsplit('.', 1)[0]]}_{name.rsplit('.', 1)[1][0]}", parameter
            )
        online.draws = {"class_mix": ranks_of(golden.indices(f"{there}_choice")), "block_mask": golden[f"{there}_u"]}
        trusted = torch.ones(golden["cfg_B"], golden["cfg_H"], golden["cfg_W"], dtype=torch.bool)
        trusted[:, : golden["cfg_top"]] = False
        trusted[:, golden["cfg_H"] - golden["cfg_bottom"] :] = False
        batch = DomainBatch(
            golden[f"{there}_src"],
            golden.indices(f"{there}_label"),
            golden[f"{there}_tgt"],
            target_trusted=trusted,
            numbers=tuple(range(golden["cfg_B"])),
        )
        terms = released_step(method, batch)
        golden.near(f"{expected}_loss_source", terms["cross_entropy"])
        golden.near(f"{expected}_loss_mix", terms["online_mix"])
        golden.near(f"{expected}_loss_masked_weighted", terms["online_mask"])
        if distant:
            golden.near(f"{expected}_loss_fd_weighted", terms["online_feature_distance"])
        for name, parameter in student.named_parameters():
            assert parameter.grad is not None
            golden.near(f"{expected}_grad_{name_in_convolutions(name)}", parameter.grad, gradient=True)
        optimizer.step()
        optimizer.zero_grad()
        online.follow(student)
        for name, parameter in student.named_parameters():
            golden.near(
                f"{expected}_student_{CONVOLUTIONS[name.rsplit('.', 1)[0]]}_{name.rsplit('.', 1)[1][0]}", parameter
            )


def test_whole_steps_are_those_of_mic() -> None:
    check_steps_of_mic(Golden("10_step"))


def test_whole_steps_with_the_distance_of_features_are_those_of_mic() -> None:
    check_steps_of_mic(Golden("10b_step_fd"))


class Patches(nn.Conv2d):
    """Tokens on their grid, (B, h, w, D), as timm's models with interpolated positions have them."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).permute(0, 2, 3, 1)


class TinyTransformer(nn.Module):
    """The transformer of the golden steps of VFM-UDA."""

    def __init__(self, golden: Golden) -> None:
        super().__init__()
        width, self.embed_dim = golden["cfg_D"], golden["cfg_D"]
        self.patch_embed = Patches(3, width, golden["cfg_patch"], golden["cfg_patch"])
        self.pos = nn.Parameter(golden["in_student_pos"])
        self.block, self.mix = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-5)

    def forward_intermediates(self, images: Tensor, **_: Any) -> list[Tensor]:
        grid = self.patch_embed(images)
        tokens = grid.flatten(1, 2) + self.pos
        tokens = tokens + self.block(tokens).tanh()
        tokens = tokens + self.mix(tokens.mean(1, keepdim=True)).tanh()
        return [self.norm(tokens).transpose(1, 2).unflatten(2, grid.shape[1:3])]


TRANSFORMER = {"patch_embed": "patch", "block": "block", "mix": "mix", "norm": "norm", "head": "out"}


def name_in_transformer(name: str) -> str:
    parts = name.removeprefix("backbone.encoder.").split(".")
    return parts[0] if len(parts) == 1 else f"{TRANSFORMER[parts[0]]}_{parts[1][0]}"


def transformer(golden: Golden, who: str) -> Segmenter:
    encoder = TinyTransformer(golden)
    backbone = TimmBackbone(encoder, (0,), normed=True, cell=golden["cfg_patch"], plain=True, input_scale=1.0)
    network = Segmenter(
        backbone,
        nn.Conv2d(golden["cfg_D"], golden["cfg_C"], 1, bias=False),
        feature_channels=golden["cfg_D"],
        num_classes=golden["cfg_C"],
        align_corners=False,
    ).double()
    for name, parameter in network.named_parameters():
        parameter.data = golden[f"in_{who}_{name_in_transformer(name)}"]
    return network


def test_whole_steps_are_those_of_vfm_uda() -> None:
    golden = Golden("11_vfm_step")
    student = transformer(golden, "student")
    method = OnlineSelfTraining(student, OnlineSelfTraining.Config(mean_over="valid"), WarmupConfig())
    config = OnlineConfig(
        teacher_rate=1 - golden["cfg_alpha"],
        teacher_norm="average",
        threshold=golden["cfg_tau"],
        quality="batch",
        mirrored=True,
        classes_of="batch",
        paste_ignored=True,
        mask="token",
        mask_ratio=golden["cfg_ratio"],
        **UNCHANGED,
    )
    online = method.online = Recorded(student, config)
    assert online.mask_token is not None
    online.mask_token.data = golden["in_student_mask_token"][0]
    online.teacher.start_from(transformer(golden, "teacher"))
    online.steps = golden["cfg_n0"]
    named = {name_in_transformer(name): parameter for name, parameter in student.named_parameters()}
    named["mask_token"] = online.mask_token
    decoder, block = ["out_w"], ["block_w", "block_b"]
    groups = [decoder, block, [name for name in named if name not in (*decoder, *block)]]
    optimizer = torch.optim.AdamW(
        [{"params": [named[name] for name in group]} for group in groups], weight_decay=golden["cfg_weight_decay"]
    )
    for step in range(golden["cfg_steps"]):
        there, expected = f"in_s{step}", f"exp_s{step}"
        for group, rate in zip(optimizer.param_groups, golden[f"{expected}_lr"].tolist(), strict=True):
            group["lr"] = rate
        source, target, label = golden[f"{there}_src"], golden[f"{there}_tgt"], golden.indices(f"{there}_label")
        flips = golden[f"{there}_flip"].bool()
        source, label = mirrored(source, flips[0]), mirrored(label, flips[0])
        online.draws = {"class_mix": ranks_of(golden.indices(f"{there}_choice")), "token_mask": golden[f"{there}_u"]}
        batch = DomainBatch(
            normalised(source),
            label,
            normalised(mirrored(target, flips[1])),
            target_trusted=golden[f"{there}_weight0"] == 0,
            numbers=tuple(range(golden["cfg_B"])),
        )
        terms = released_step(method, batch)
        golden.near(f"{expected}_loss_source", terms["cross_entropy"])
        golden.near(f"{expected}_loss_mix", terms["online_mix"])
        golden.near(f"{expected}_loss_masked", terms["online_mask"])
        for name, parameter in named.items():
            assert parameter.grad is not None
            golden.near(
                f"{expected}_grad_{name}", parameter.grad.view_as(golden[f"{expected}_grad_{name}"]), gradient=True
            )
        optimizer.step()
        optimizer.zero_grad()
        online.follow(student)
        for name, parameter in named.items():
            golden.near(f"{expected}_student_{name}", parameter.view_as(golden[f"{expected}_student_{name}"]))
        for name, parameter in online.teacher.network.named_parameters():
            golden.near(f"{expected}_teacher_{name_in_transformer(name)}", parameter)


def mirrored(pictures: Tensor, flips: Tensor) -> Tensor:
    return torch.stack([picture.flip(-1) if flip else picture for picture, flip in zip(pictures, flips, strict=True)])


def normalised(images: Tensor) -> Tensor:
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64).view(2, 3, 1, 1)
    return (images.double() / 255 - mean) / deviation
