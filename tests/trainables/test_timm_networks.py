"""Promises of networks on timm's backbones: one contract for every kind, maps as timm's own, any size, any head."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from simulated_device import SimulatedDevice
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from toy import toy_config, toy_trainer

from segadapt.trainables import METHODS
from segadapt.trainables.core.evaluation.inference import Inference, mean_probabilities, views
from segadapt.trainables.core.networks import (
    HEADS,
    NetworkConfig,
    Segmenter,
    SummedDilatedHead,
    TimmBackbone,
    build_segmenter,
    recompute_blocks,
)
from segadapt.trainables.core.networks.heads import DecoderHead
from segadapt.trainables.core.networks.resampling import Interpolation, resampled

CLASSES = 5
KINDS = {
    "convolutional": "test_resnet",
    "hierarchical convolutional": "test_convnext",
    "plain transformer": "test_vit",
    "hierarchical transformer": "pvt_v2_b0",
}
FITTING = {
    "test_resnet": ("linear", "light", "pyramid", "daformer", "deeplabv2"),
    "test_convnext": ("linear", "light", "pyramid", "daformer", "deeplabv2"),
    "test_vit": ("linear", "light", "pyramid", "deeplabv2"),
    "pvt_v2_b0": ("linear", "light", "pyramid", "daformer"),
}
"""Heads of each model."""
WITHOUT_WEIGHTS = next(name for name in timm.list_models() if not timm.is_model_pretrained(name))


def build(model: str, **settings: Any) -> Segmenter:
    torch.manual_seed(0)
    return build_segmenter(f"timm:{model}", CLASSES, **settings)


def backbone_of(segmenter: Segmenter) -> TimmBackbone:
    assert isinstance(segmenter.backbone, TimmBackbone)
    return segmenter.backbone


def images(height: int = 64, width: int = 96, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def maps_of(segmenter: Segmenter, shown: Tensor) -> tuple[Tensor, ...]:
    maps = segmenter.backbone(shown)
    return maps if isinstance(maps, tuple) else (maps,)


@pytest.mark.parametrize(("model", "head"), [(model, head) for model, heads in FITTING.items() for head in heads])
def test_logits_and_features_lie_on_one_grid_and_every_parameter_learns(model: str, head: str) -> None:
    segmenter = build(model, head=head)
    shown = images(97, 131)  # no multiple of anything
    output = segmenter(shown)
    assert output.features.shape[1] == segmenter.feature_channels
    assert output.logits.shape == (2, CLASSES, *output.features.shape[-2:])
    assert torch.equal(segmenter.eval().classify(segmenter.features(shown)), segmenter(shown).logits)
    segmenter.upsample(output.logits, (97, 131)).square().sum().backward()
    assert [name for name, parameter in segmenter.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(9, 14), (3, 20), (7, 7)])
def test_resizing_by_products_is_that_of_interpolation(mode: Interpolation, size: tuple[int, int]) -> None:
    maps = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    expected = F.interpolate(maps, size=size, mode=mode, antialias=True)
    torch.testing.assert_close(resampled(maps, size, mode), expected, rtol=0, atol=1e-5)


def test_interpolated_positions_have_a_gradient_that_repeats_on_a_gpu() -> None:
    segmenter = build("test_vit").train()
    expected = segmenter(images()).logits
    torch.use_deterministic_algorithms(True)
    device = SimulatedDevice()
    shown = images()
    device.put(segmenter, shown)
    try:
        with device:
            found = segmenter(shown).logits
            torch.autograd.backward(found.square().sum())
    finally:
        torch.use_deterministic_algorithms(False)
    assert not device.unrepeatable, device.unrepeatable
    assert not device.waits, device.waits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["test_resnet", "test_convnext", "pvt_v2_b0", "test_efficientnet"])
def test_maps_of_hierarchies_are_those_of_timm_to_the_bit(model: str, tmp_path: Path) -> None:
    state = timm.create_model(model).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    reference = timm.create_model(
        model, features_only=True, pretrained=True, pretrained_cfg_overlay={"state_dict": state}
    ).eval()
    strides = reference.feature_info.reduction()
    segmenter = build(model, head="pyramid", weights=str(tmp_path / "weights.pth"), freeze_norm=False).eval()
    segmenter.to(memory_format=torch.contiguous_format)  # as timm's: another layout rounds otherwise
    with torch.no_grad():
        expected = [part for part, stride in zip(reference(images()), strides, strict=True) if stride > 2]
        maps = maps_of(segmenter, images())
    assert len(maps) == len(expected) == 4
    for ours, theirs in zip(maps, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("model", "patch", "extra"),
    [("test_vit", 16, 1), ("test_vit2", 16, 1), ("vit_small_patch14_reg4_dinov2", 14, 5)],
)
def test_the_map_of_a_plain_transformer_is_its_last_normalised_tokens_to_the_bit(
    model: str, patch: int, extra: int
) -> None:
    segmenter = build(model, head="linear").eval()
    encoder: Any = copy.deepcopy(backbone_of(segmenter).encoder)
    assert encoder.num_prefix_tokens == extra, "class and register tokens"
    shown = images(4 * patch, 6 * patch)
    with torch.no_grad():
        tokens = encoder.forward_features(shown)[:, extra:]
        (ours,) = maps_of(segmenter, shown)
    assert torch.equal(ours, tokens.transpose(1, 2).reshape(2, -1, 4, 6))


def test_maps_of_models_that_keep_channels_last_come_with_channels_first() -> None:
    maps = maps_of(build("swin_s3_tiny_224", head="pyramid").eval(), images())
    assert [tuple(part.shape[1:]) for part in maps] == [(96, 16, 24), (192, 8, 12), (384, 4, 6), (768, 2, 3)]


def test_shifting_an_image_by_a_patch_shifts_the_up_sampled_logits_by_a_patch() -> None:
    segmenter = build("test_vit", head="linear", align_corners=False).eval()
    nn.init.zeros_(getattr(backbone_of(segmenter).encoder, "pos_embed"))  # noqa: B009  a module may hold anything
    shown = images(96, 96)
    with torch.no_grad():
        plain, shifted = (segmenter.upsample(segmenter(part).logits, (96, 96)) for part in (shown, shown.roll(16, -1)))
    torch.testing.assert_close(shifted[..., 32:-16], plain[..., 16:-32], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", KINDS.values(), ids=KINDS)
def test_windows_scales_and_mirror_images_serve_every_kind_of_network(model: str) -> None:
    segmenter = build(model, head="linear").eval()
    shown = torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = mean_probabilities(segmenter, views(segmenter, shown), (40, 56))
        for window in ((40, 56), (64, 64)):
            covered = views(segmenter, shown, Inference(window=window))
            assert torch.equal(mean_probabilities(segmenter, covered, (40, 56)), whole)
        asked = Inference(scales=(1.0, 1.25), flip=True, window=(32, 40), stride=(16, 20))
        answers = views(segmenter, shown, asked)
        assert len(answers) == 4
        probabilities = mean_probabilities(segmenter, answers, (40, 56))
        mirrored = mean_probabilities(segmenter, views(segmenter, shown.flip(-1), asked), (40, 56))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(1, 40, 56))
    assert not torch.allclose(probabilities, whole)
    torch.testing.assert_close(mirrored.flip(-1), probabilities, atol=1e-3, rtol=0)


def test_a_size_that_patches_do_not_fill_is_shown_at_the_next_smaller_one_that_they_do() -> None:
    segmenter = build("test_vit").eval()
    shown = images(70, 95)
    smaller = F.interpolate(shown, size=(64, 80), mode="bilinear", align_corners=False)
    with torch.no_grad():
        assert torch.equal(segmenter(shown).logits, segmenter(smaller).logits)


def test_an_input_scale_shows_a_vfm_udas_crop_as_its_code_does() -> None:
    seen: list[tuple[int, ...]] = []
    segmenter = build("vit_tiny_patch16_224", head="linear", input_scale=1.1)
    backbone_of(segmenter).encoder.get_submodule("patch_embed").register_forward_pre_hook(
        lambda _, shown: seen.append(tuple(shown[0].shape[-2:]))
    )
    with torch.no_grad():
        segmenter(images(128, 256, batch=1))
    assert seen == [(int(1.1 * 128 / 16) * 16, int(1.1 * 256 / 16) * 16)] == [(128, 272)]


def test_an_image_smaller_than_a_patch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 16x16 pixels, a patch of this network, but got 15x40\. Show"):
        build("test_vit")(images(15, 40))
    with pytest.raises(ValueError, match=r"at least 32x32 pixels, a patch of this network, but got 31x40\. Show"):
        build("test_vit", input_scale=0.5)(images(31, 40))
    with torch.no_grad():
        assert build("test_vit", input_scale=0.5)(images(32, 40)).logits.shape[-2:] == (4, 4)
        assert build("test_vit", input_scale=1.1)(images(15, 40)).logits.shape[-2:] == (4, 8)


@pytest.mark.parametrize(("model", "blocks"), [("test_vit", 6), ("pvt_v2_b0", 8), ("eva02_tiny_patch14_224", 12)])
def test_attention_is_torchs_fused_one(model: str, blocks: int) -> None:
    calls: list[str] = []

    class Recorded(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    segmenter = build(model, head="linear")
    with Recorded():
        segmenter(images())
    assert calls.count("scaled_dot_product_attention") == blocks
    assert "softmax" not in calls


def test_the_table_of_heads_is_whole() -> None:
    for model, fitting in FITTING.items():
        for head in {*HEADS, "deeplabv2"} - set(fitting):
            with pytest.raises(ValueError, match=r"network\.head="):
                build(model, head=head)


@pytest.mark.parametrize("model", KINDS.values())
def test_a_copy_of_the_stem_takes_its_place(model: str) -> None:
    backbone = backbone_of(build(model).eval())
    stem = copy.deepcopy(backbone.stem)
    with torch.no_grad():
        same = maps_of_stem(backbone, stem)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(same, maps_of_stem(backbone, None), strict=True))
        for parameter in stem.parameters():
            parameter += 0.1
        other = maps_of_stem(backbone, stem)
    assert not torch.equal(other[-1], same[-1])
    assert not set(stem.parameters()) & set(backbone.parameters())
    assert set(backbone.stem.parameters()) < set(backbone.parameters())


def maps_of_stem(backbone: TimmBackbone, stem: nn.Module | None) -> tuple[Tensor, ...]:
    maps = (backbone if stem is None else backbone.with_stem(stem))(images())
    return maps if isinstance(maps, tuple) else (maps,)


def test_auto_chooses_a_head_by_what_the_backbone_gives() -> None:
    heads = {model: type(build(model).head).__name__ for model in KINDS.values()}
    assert heads == {
        "test_resnet": "DAFormerHead",
        "test_convnext": "DAFormerHead",
        "test_vit": "LightHead",
        "pvt_v2_b0": "DAFormerHead",
    }


def test_deeplabs_head_gets_a_backbone_of_output_stride_8_where_that_can_be() -> None:
    segmenter = build("test_resnet", head="deeplabv2").eval()
    assert isinstance(segmenter.head, SummedDilatedHead)
    assert segmenter(images()).logits.shape[-2:] == (8, 12)


def test_vfm_udas_decoder_quadruples_the_grid_and_starts_as_published() -> None:
    segmenter = build("test_vit", head="light")
    assert segmenter(images()).features.shape == (2, 16, 16, 24)
    head = segmenter.head
    assert isinstance(head, DecoderHead)
    assert isinstance(head.classifier, nn.Conv2d)
    assert all(part.bias is None for part in head.modules() if isinstance(part, nn.Conv2d | nn.ConvTranspose2d))
    wide = build_segmenter("timm:test_vit", 400, head="light").head
    assert isinstance(wide, DecoderHead)
    assert wide.classifier.weight.std().item() == pytest.approx(0.1, rel=0.05)  # type: ignore[union-attr]


def test_equal_seeds_build_equal_networks() -> None:
    first, second = (build("pvt_v2_b0").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_images_are_normalised_as_the_model_was_trained() -> None:
    segmenter = build("test_vit")
    assert segmenter.normalisation.mean == segmenter.normalisation.std == (0.5, 0.5, 0.5)
    white = segmenter.normalise(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    torch.testing.assert_close(white, torch.ones(1, 3, 2, 2))


@pytest.mark.parametrize("freeze", [None, False])
def test_weights_are_taken_from_a_file_of_timm_or_of_ours(tmp_path: Path, freeze: bool | None) -> None:
    torch.manual_seed(1)
    published = timm.create_model("test_resnet", num_classes=7)
    torch.save(published.state_dict(), tmp_path / "timm.pth")
    segmenter = build("test_resnet", weights=str(tmp_path / "timm.pth"), freeze_norm=freeze)
    encoder = backbone_of(segmenter).encoder.state_dict()
    assert all(torch.equal(value, published.state_dict()[name]) for name, value in encoder.items())
    trained = [name for name, _ in segmenter.backbone.named_parameters() if ".bn" in name]
    assert bool(trained) is (freeze is False)

    torch.save({"state": {f"segmenter.{name}": t for name, t in segmenter.state_dict().items()}}, tmp_path / "ours.pth")
    again = build("test_resnet", weights=str(tmp_path / "ours.pth"), freeze_norm=freeze)
    assert all(torch.equal(backbone_of(again).encoder.state_dict()[name], value) for name, value in encoder.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "timm:test_vot"},
            r"needs the name of a model of timm .* 'test_vot'\. Near: test_vit.* entry point is of segadapt\.backbones",
        ),
        ({"name": "timm:test_vit.no_tag"}, r"needs the name of a model of timm .*Near: test_vit"),
        (
            {"name": "timm:mixer_s32_224"},
            r"images of any size, but timm's 'mixer_s32_224' takes one size alone\. Choose",
        ),
        (
            {"name": "timm:test_vit", "head": "daformer"},
            r"needs a backbone with four resolutions, but this one gives 1",
        ),
        ({"name": "timm:pvt_v2_b0", "head": "deeplabv2"}, r"output stride 16 or less, .* has 32.* Set network\.head"),
        ({"name": "timm:test_vit", "weights": "pretrianed"}, r"none, pretrained, or a .* but got 'pretrianed'"),
        ({"name": "timm:test_vit", "freeze_norm": True}, r"freeze_norm needs batch norm.*'timm:test_vit' has none"),
        ({"name": "timm:test_vit", "norm_epsilon": 1e-3}, r"norm_epsilon must be left out"),
        (
            {"name": f"timm:{WITHOUT_WEIGHTS}", "weights": "pretrained"},
            r"weights that timm knows of.* there are none",
        ),
        ({"name": "timm:pvt_v2_b0", "drop_path": 0.1, "head": "nonsense"}, r"head must be one of auto"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_segmenter(num_classes=CLASSES, **settings)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_convnext", num_classes=0).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"must be those of timm's 'test_resnet', but the file lacks .*conv1"):
        build("test_resnet", weights=str(tmp_path / "other.pth"))


def test_settings_of_timms_models_are_refused_elsewhere() -> None:
    with pytest.raises(ValueError, match=r"network\.head must be left at auto unless network\.name is timm:MODEL"):
        NetworkConfig(head="light")
    assert set(HEADS) == {"linear", "light", "pyramid", "daformer"}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("model", KINDS.values(), ids=KINDS)
def test_every_method_trains_on_every_kind_of_network(method: Any, model: str, tmp_path: Path) -> None:
    """Losses and states are finite, and everything that is trained moves."""
    settings: dict[str, Any] = {"method__feature": "backbone"} if method.name == "bicl" else {}
    if model != "test_vit":
        settings["network__head"] = "linear"  # the others are tried above, and cost more
    config = toy_config(
        method.name,
        network__name=f"timm:{model}",
        data__streets__train_images=4,
        data__streets__val_images=2,
        warmup__steps=3,
        trainer__steps=4,
        trainer__eval_every=4,
        trainer__batch_size=2,
        optimizer__lr=1e-3,
        optimizer__warmup_steps=0,
        **settings,
    )
    trainer, reports = toy_trainer(config, tmp_path)
    before = {name: parameter.clone() for name, parameter in trainer.method.segmenter.named_parameters()}
    trainer.run()
    assert 0 <= reports.metrics[-1]["target_val/miou"] <= 1
    after = dict(trainer.method.segmenter.named_parameters())
    assert all(torch.isfinite(parameter).all() for parameter in after.values())
    assert [name for name, value in before.items() if torch.equal(value, after[name])] == []


@pytest.mark.parametrize("model", KINDS.values(), ids=KINDS)
def test_recomputing_blocks_changes_no_gradient(model: str) -> None:
    gradients = []
    for recompute in (False, True):
        segmenter = build(model, freeze_norm=True if model == "test_resnet" else None)
        if recompute:
            recompute_blocks(segmenter)
        segmenter(images()).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in segmenter.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-4, atol=1e-6)


def test_weights_that_cannot_be_downloaded_are_said_to_be_so() -> None:
    code = """
import sys
from segadapt.trainables.core.networks import build_segmenter
try:
    build_segmenter("timm:test_vit.r160_in1k", 3, weights="pretrained")
except ValueError as error:
    sys.exit(str(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "network.weights=pretrained must be downloaded once, but the weights of 'test_vit.r160_in1k'" in done.stderr
    assert "Run `segadapt weights fetch timm:test_vit.r160_in1k` on a machine with network access" in done.stderr
    assert "Traceback" not in done.stderr
