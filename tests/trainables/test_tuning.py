"""Promises of training few parameters: the head alone, or low-rank updates beside a frozen backbone."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy import keeping_losses, toy_config, toy_trainer

from segadapt.platform.deployment.deployed import load_deployed
from segadapt.platform.errors import UsageError
from segadapt.platform.experiment.finishing import check_tuning, finish_settings
from segadapt.platform.settings.config import flatten, resolve
from segadapt.platform.storage.checkpoints import write_configuration
from segadapt.platform.storage.stage_keys import stage_keys
from segadapt.trainables import METHODS, method_class
from segadapt.trainables.core.evaluation.deployed import DeployedNetwork
from segadapt.trainables.core.method import SOURCE_ONLY
from segadapt.trainables.core.networks import (
    FrozenParameter,
    NetworkConfig,
    Segmenter,
    build_segmenter,
    frozen_parameters,
    merged,
    recompute_blocks,
)
from segadapt.trainables.core.networks.tuning import LowRankLinear
from segadapt.trainables.core.state.mean_teacher import MeanTeacher
from segadapt.trainables.core.training.checkpoint import OtherBackboneError, load_state
from segadapt.trainables.core.training.config import OptimizerConfig
from segadapt.trainables.core.training.gradients import Snapshot
from segadapt.trainables.core.training.optimizer import build_optimizer

CLASSES = 5
SHORT: dict[str, Any] = {
    "network__name": "timm:test_vit",
    "network__tune": "lora",
    "network__lora_rank": 4,
    "data__streets__train_images": 4,
    "data__streets__val_images": 2,
    "warmup__steps": 3,
    "trainer__steps": 4,
    "trainer__batch_size": 2,
    "optimizer__lr": 1e-3,
    "optimizer__warmup_steps": 0,
}


def build(model: str = "test_vit", seed: int = 0, **settings: Any) -> Segmenter:
    torch.manual_seed(seed)
    return build_segmenter(f"timm:{model}", CLASSES, **settings)


def updated(segmenter: Segmenter) -> Segmenter:
    """Give every low-rank update a value, as training does."""
    for part in updates(segmenter).values():
        nn.init.normal_(part.up, std=0.2)
    return segmenter


def updates(segmenter: Segmenter) -> dict[str, LowRankLinear]:
    return {name: part for name, part in segmenter.named_modules() if isinstance(part, LowRankLinear)}


def images(height: int = 64, width: int = 96) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def logits(segmenter: nn.Module) -> Tensor:
    with torch.no_grad():
        answer: Tensor = segmenter.eval()(images()).logits
    return answer


@pytest.mark.parametrize("model", ["test_vit", "pvt_v2_b0", "test_convnext", "eva02_tiny_patch14_224"])
def test_before_the_first_step_a_tuned_network_computes_what_the_whole_one_does(model: str) -> None:
    whole, head, lora = (build(model, tune=tune) for tune in ("full", "head", "lora"))
    assert torch.equal(logits(head), logits(whole))
    assert torch.equal(logits(lora), logits(whole))
    assert all(parameter.requires_grad for parameter in whole.parameters())
    trained = {name for name, parameter in head.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in head.named_parameters() if name.startswith("head.")}
    trained = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    low_rank = {f"{name}.{part}" for name in updates(lora) for part in ("down", "up")}
    assert low_rank
    assert trained == {name for name, _ in head.named_parameters() if name.startswith("head.")} | low_rank


def test_targets_say_which_linear_layers_get_updates() -> None:
    def kinds(model: str, *targets: str) -> set[str]:
        return {name.rpartition(".")[2] for name in updates(build(model, tune="lora", lora_targets=targets or None))}

    assert kinds("test_vit") == {"qkv", "proj", "fc1", "fc2"}
    assert kinds("test_vit", "qkv") == {"qkv"}
    assert kinds("test_vit", "proj", "mlp") == {"proj", "fc1", "fc2"}
    assert kinds("pvt_v2_b0", "qkv") == {"q", "kv"}
    assert kinds("test_convnext") == {"fc1", "fc2"}


def test_an_update_is_that_of_lora() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    part = LowRankLinear(layer, 2)
    nn.init.normal_(part.up)
    x = torch.randn(4, 5, 6)
    expected = x @ (layer.weight + 16 / 2 * part.up @ part.down).T + layer.bias
    torch.testing.assert_close(part(x), expected)
    torch.testing.assert_close(F.linear(x, part.weight, part.bias), expected)
    torch.testing.assert_close(part.merged()(x), expected)


@pytest.mark.parametrize("model", ["test_vit", "pvt_v2_b0", "swinv2_tiny_window8_256"])
def test_updates_are_merged_into_plain_weights(model: str) -> None:
    """Swin v2 computes with the weight of its queries itself."""
    segmenter = build(model, tune="lora")
    for name, parameter in segmenter.backbone.named_parameters():
        if model.startswith("swinv2") and name.endswith(("norm1.weight", "norm2.weight")):
            nn.init.ones_(parameter)  # zero at first, which would hide what lies before
    before = logits(segmenter)
    whole = merged(updated(segmenter))
    assert (logits(segmenter) - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(whole), logits(segmenter), rtol=1e-5, atol=1e-5)
    plain = build(model)
    assert {name: type(part) for name, part in whole.named_modules()} == {
        name: type(part) for name, part in plain.named_modules()
    }
    assert whole.state_dict().keys() >= dict(plain.named_parameters()).keys()
    assert not any(isinstance(parameter, FrozenParameter) for parameter in whole.parameters())
    assert not {part.data_ptr() for part in whole.parameters()} & {part.data_ptr() for part in segmenter.parameters()}


def test_a_deployed_network_is_merged() -> None:
    segmenter = updated(build(tune="lora")).eval()
    deployed = DeployedNetwork(segmenter, None)
    assert not updates(deployed.network)
    shown = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        answer = segmenter(segmenter.normalise(shown)).logits
        expected = segmenter.upsample(answer, (64, 96)).softmax(1)
        torch.testing.assert_close(deployed(shown), expected, rtol=1e-5, atol=1e-5)


def test_copies_share_what_is_frozen_and_states_leave_it_out() -> None:
    segmenter = updated(build(tune="lora"))
    frozen = dict(frozen_parameters(segmenter))
    state = segmenter.state_dict()
    assert frozen
    assert not frozen.keys() & state.keys()
    again = build(tune="lora")
    again.load_state_dict(state)  # strict
    assert torch.equal(logits(again), logits(segmenter))
    twin = copy.deepcopy(segmenter)
    assert all(parameter is frozen[name] for name, parameter in frozen_parameters(twin))
    assert twin.state_dict().keys() == state.keys()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*backbone\.encoder"):
        segmenter.load_state_dict({**state, **frozen})  # frozen weights are never loaded over


def test_a_mean_teacher_shares_what_is_frozen_and_follows_what_is_trained() -> None:
    student = build(tune="lora")
    teacher = MeanTeacher(student)
    assert torch.equal(logits(teacher.network), logits(student))
    frozen = {name: parameter.clone() for name, parameter in frozen_parameters(student)}
    before = {name: part.up.clone() for name, part in updates(student).items()}
    updated(student)
    teacher.follow(student, momentum=0.75)
    followers = updates(teacher.network)  # type: ignore[arg-type]
    for name, part in updates(student).items():
        torch.testing.assert_close(followers[name].up, 0.75 * before[name] + 0.25 * part.up)
    copies = dict(frozen_parameters(teacher.network))
    for name, parameter in frozen_parameters(student):
        assert copies[name] is parameter
        assert torch.equal(parameter, frozen[name])


def test_a_snapshot_of_a_step_holds_no_frozen_weights() -> None:
    segmenter = build(tune="lora")
    frozen = {id(parameter) for _, parameter in frozen_parameters(segmenter)}
    assert not frozen & {id(tensor) for tensor in Snapshot(segmenter)._tensors}


@pytest.mark.parametrize("name", ["compact", "timm:test_resnet"])
def test_the_head_alone_is_trained_on_any_network_and_batch_norm_of_the_backbone_stays(
    name: str, tmp_path: Path
) -> None:
    head = {"network__head": "linear"} if name != "compact" else {}
    config = toy_config(
        "sdca", **{**SHORT, "network__name": name, "network__tune": "head", "network__lora_rank": 16, **head}
    )
    trainer, reports = toy_trainer(config, tmp_path)
    backbone = trainer.method.segmenter.backbone
    before = {key: tensor.clone() for key, tensor in tensors_of(backbone).items()}
    first = {key: tensor.clone() for key, tensor in trainer.method.segmenter.head.named_parameters()}
    assert name == "compact" or any("running_mean" in key for key in before)
    trainer.run()
    assert all(torch.equal(tensor, before[key]) for key, tensor in tensors_of(backbone).items())
    after = dict(trainer.method.segmenter.head.named_parameters())
    assert [key for key, tensor in first.items() if torch.equal(after[key], tensor)] == []
    state = load_state(reports.checkpoint(0))
    assert [key for key in state["state"] if "backbone" in key] == []


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@pytest.mark.parametrize("name", [method.name for method in METHODS])
def test_every_method_trains_updates_beside_a_frozen_backbone_and_resumes_exactly(name: str, tmp_path: Path) -> None:
    config = toy_config(name, **SHORT, **({"method__feature": "backbone"} if name == "bicl" else {}))
    trainer, reports = toy_trainer(config, tmp_path / "whole")
    frozen = {key: tensor.clone() for key, tensor in frozen_parameters(trainer.method)}
    before = {key: trainer.method.get_parameter(key).clone() for key in trainer.trainable}
    trainer.run()
    assert all(torch.equal(trainer.method.get_parameter(key), tensor) for key, tensor in frozen.items())
    assert [key for key, tensor in before.items() if torch.equal(trainer.method.get_parameter(key), tensor)] == []

    index = max(index for index, metrics in enumerate(reports.metrics) if not metrics["stage_finished"])
    middle = load_state(reports.checkpoint(index))
    assert not frozen.keys() & middle["state"].keys()
    trained = {tuple(trainer.method.get_parameter(key).shape) for key in trainer.trainable}
    moments = [part for entry in middle["optimizer"]["state"].values() for part in entry.values() if part.dim()]
    assert moments
    assert {tuple(part.shape) for part in moments} <= trained

    again, _ = toy_trainer(config, tmp_path / "again")
    again.folder = trainer.folder  # what stages wrote survives a restart
    again.run(reports.checkpoint(index))
    last, resumed = trainer.method.state_dict(), again.method.state_dict()
    assert last.keys() == resumed.keys()
    assert all(torch.equal(last[key], resumed[key]) for key in last)


@pytest.mark.parametrize("keeps", [False, True])
def test_a_tuned_trial_is_finished_by_self_training(keeps: bool, tmp_path: Path) -> None:
    trial = toy_config("sdca", **SHORT)
    trainer, reports = toy_trainer(trial, tmp_path / "trial")
    trainer.run()
    last = reports.checkpoint(len(reports.metrics) - 1)
    settings = {**SHORT, "method__teacher": True, "trainer__eval_every": 2}
    config = keeping_losses(trial, **settings) if keeps else toy_config("self_training", **settings)
    rounds = method_class("self_training").plan(config.method)[1:]
    finish, finished = toy_trainer(config, tmp_path / "finish", rounds)
    finish.start_from(last)
    network = {key: tensor.clone() for key, tensor in finish.method.deployed.state_dict().items()}
    assert all(torch.equal(network[key], tensor) for key, tensor in trainer.method.deployed.state_dict().items())
    finish.run()
    assert finished.metrics[-1]["finished"]
    moved = finish.method.deployed.state_dict()
    assert any(not torch.equal(moved[key], tensor) for key, tensor in network.items() if key.endswith(".up"))
    assert not dict(frozen_parameters(finish.method)).keys() & moved.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1}, r"needs the frozen backbone .* of hash \w{16}, but .* one of hash \w{16}\. Restore the file"),
        ({"network__tune": "full", "network__lora_rank": 16}, r"frozen in the checkpoint alone\. Set network\.tune"),
    ],
)
def test_a_checkpoint_is_refused_beside_another_backbone(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer, reports = toy_trainer(toy_config("source_only", **SHORT), tmp_path / "one")
    trainer.run()
    other, _ = toy_trainer(toy_config("source_only", **{**SHORT, **settings}), tmp_path / "other")
    for load in (other.start_from, other.run):
        with pytest.raises(OtherBackboneError, match=message):
            load(reports.checkpoint(0))


def test_updates_learn_at_the_rate_of_the_block_they_are_in(tmp_path: Path) -> None:
    trainer, _ = toy_trainer(toy_config("source_only", **SHORT), tmp_path)
    config = OptimizerConfig(name="adamw", lr=1.0, layer_decay=0.5, backbone_lr_factor=0.1, head_lr_factor=3.0)
    optimizer = build_optimizer(trainer.method, SOURCE_ONLY, config, torch.device("cpu"))
    factors = {parameter: group["factor"] for group in optimizer.param_groups for parameter in group["params"]}
    blocks = 6
    for name, parameter in trainer.method.segmenter.named_parameters():
        if not parameter.requires_grad:
            assert parameter not in factors
            continue
        expected = 3.0 if name.startswith("head") else 0.1 * 0.5 ** (blocks - 1 - int(name.split(".")[3]))
        assert factors[parameter] == pytest.approx(expected)


def test_recomputing_blocks_changes_no_gradient_of_an_update() -> None:
    gradients = []
    for recompute in (False, True):
        segmenter = updated(build(tune="lora"))
        if recompute:
            recompute_blocks(segmenter)
        segmenter.train()(images()).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in segmenter.named_parameters() if p.requires_grad})
    for name, kept in gradients[0].items():
        assert kept is not None
        torch.testing.assert_close(gradients[1][name], kept, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_of_an_updated_large_transformer_has_less_than_40_mb() -> None:
    """At the end of a stage; until then the optimiser's two moments come on top."""
    with torch.device("meta"):
        segmenter = build_segmenter("timm:vit_large_patch14_dinov2", 19, tune="lora")
    tensors = segmenter.state_dict().values()
    assert sum(parameter.numel() for parameter in segmenter.parameters()) > 300e6
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) < 40e6


def test_the_checkpoint_at_the_end_of_a_stage_holds_no_optimiser(tmp_path: Path) -> None:
    trainer, reports = toy_trainer(toy_config("source_only", warmup__steps=4), tmp_path)
    trainer.run()
    middle, last = (load_state(reports.checkpoint(index)) for index in (0, 1))
    assert middle["optimizer"]["state"]
    assert last["optimizer"] is None
    trainer.run(reports.checkpoint(1))  # nothing is left to do


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tune": "lora"}, r"network\.tune=lora needs network\.name=timm:MODEL.* got 'compact'\. Set network\.tune"),
        ({"tune": "head", "lora_rank": 8}, r"lora_rank must be left out unless network\.tune=lora, but got 8"),
        ({"tune": "head", "freeze_norm": False}, r"freeze_norm must be left out with network\.tune=head"),
        ({"name": "timm:test_vit", "tune": "lora", "lora_rank": 0}, r"lora_rank must be at least 1, but got 0"),
        (
            {"name": "timm:test_vit", "tune": "lora", "lora_targets": ("qvk",)},
            r"lora_targets must be null or some of qkv, proj, mlp, but got \('qvk',\)",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**settings)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (
            "test_resnet",
            {},
            r"linear layers .* none called qkv, proj, mlp\. Choose a transformer, or set network\.tune",
        ),
        ("test_convnext", {"lora_targets": ("qkv", "mlp")}, r"has none called qkv\."),
        ("test_vit", {"lora_rank": 65}, r"lora_rank must be at most 64, the width .* encoder\.blocks.*, but got 65"),
    ],
)
def test_backbones_that_do_not_fit_are_refused(model: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(model, tune="lora", **settings)


def published(path: Path, seed: int = 5) -> str:
    """Write weights of the model, as timm names them."""
    torch.manual_seed(seed)
    torch.save(timm.create_model("test_vit").state_dict(), path)
    return str(path)


def trained_checkpoint(folder: Path, **settings: Any) -> tuple[Path, Segmenter]:
    """Train a little; return the last checkpoint as a trial writes it, and the network."""
    config = toy_config("source_only", **{**SHORT, **settings})
    trainer, reports = toy_trainer(config, folder)
    trainer.run()
    checkpoint = reports.checkpoint(len(reports.metrics) - 1)
    write_configuration(checkpoint, config.as_dict())
    return checkpoint, trainer.method.deployed.eval()


def test_a_checkpoint_is_opened_beside_the_backbone_of_its_seed_or_file(tmp_path: Path) -> None:
    weights = published(tmp_path / "weights.pth")
    for name, settings in {"random": {"seed": 3}, "file": {"network__weights": weights}}.items():
        checkpoint, network = trained_checkpoint(tmp_path / name, **settings)
        assert (checkpoint / "state.pt").stat().st_size < 1e6
        opened = load_deployed(checkpoint, {}, torch.device("cpu")).network
        assert torch.equal(logits(opened), logits(network))
        assert all(torch.equal(opened.get_parameter(key), tensor) for key, tensor in frozen_parameters(network))


def test_a_checkpoint_whose_backbone_is_gone_or_another_is_refused(tmp_path: Path) -> None:
    weights = published(tmp_path / "weights.pth")
    checkpoint, _ = trained_checkpoint(tmp_path, network__weights=weights)
    published(Path(weights), seed=6)
    with pytest.raises(UsageError, match=r"needs the frozen backbone .*\. Restore the file of network\.weights as it"):
        load_deployed(checkpoint, {}, torch.device("cpu"))
    Path(weights).unlink()
    with pytest.raises(UsageError, match=r"of network\.tune=lora needs the backbone .* but there is none at .*weights"):
        load_deployed(checkpoint, {}, torch.device("cpu"))


@pytest.mark.parametrize(
    ("values", "seeds", "message"),
    [
        ({"network.lora_rank": 8}, 1, r"network\.lora_rank of a finish must be that of its trial, 4, but is 8"),
        ({"network.lora_targets": ["qkv"]}, 1, r"lora_targets of a finish must be .* None, but is \('qkv',\)"),
        ({"network.tune": "full", "network.lora_rank": 16}, 1, r"network\.tune of a finish must be .* 'lora', but"),
        ({}, 2, r"must have its trial's seed, 0, alone where network\.tune=lora .* got seed 0 and --seeds 2"),
        ({"seed": 1}, 1, r"got seed 1 and --seeds 1"),
    ],
)
def test_a_finish_that_does_not_fit_its_tuned_trial_is_refused(
    values: dict[str, Any], seeds: int, message: str
) -> None:
    trained = dict(flatten(json.loads(json.dumps(toy_config("sdca", **SHORT).as_dict()))))
    check_tuning(resolve("self_training", finish_settings("sdca", trained, {})), trained, 1)
    config = resolve("self_training", finish_settings("sdca", trained, values))
    with pytest.raises(UsageError, match=message):
        check_tuning(config, trained, seeds)
    from_a_file = {**trained, "network.weights": "/weights.pth"}
    check_tuning(resolve("self_training", finish_settings("sdca", from_a_file, {})), from_a_file, 2)


def test_trials_that_are_tuned_otherwise_share_no_warm_up() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"network__tune": "head", "network__lora_rank": 16},
        {"network__lora_rank": 8},
        {"network__lora_targets": ["qkv"]},
        {"network__tune": "full", "network__lora_rank": 16},
    ]
    configs = [toy_config("sdca", **{**SHORT, **change}) for change in changes]
    assert len({stage_keys(config, "")[0].hash for config in configs}) == len(changes)
