"""Promises of the networks: one interface, two parts, reproducible, honest about weights."""

import copy
import sys
import types
import urllib.error
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from segadapt.trainables.core.networks import (
    CAFFE_BGR,
    IMAGENET_RGB,
    NETWORKS,
    FrozenBatchNorm,
    NetworkConfig,
    Segmenter,
    SummedDilatedHead,
    base_lr,
    build_segmenter,
    load_weights,
)

CLASSES = 5
SHAPES = {  # output stride and feature channels
    "compact": (4, 64),
    "deeplabv2_resnet101": (8, 2048),
    "deeplabv2_resnet101_caffe": (8, 2048),
    "deeplabv3_resnet50": (8, 2048),
    "lraspp_mobilenet_v3_large": (8, 168),
}
PUBLISHED = [name for name, recipe in NETWORKS.items() if recipe.published]
CAFFE = "deeplabv2_resnet101_caffe"


@pytest.fixture(scope="module", params=NETWORKS)
def segmenter(request: pytest.FixtureRequest) -> Segmenter:
    torch.manual_seed(0)
    return build_segmenter(request.param, CLASSES)


@pytest.fixture
def name(segmenter: Segmenter, request: pytest.FixtureRequest) -> str:
    callspec: Any = request.node
    return str(callspec.callspec.params["segmenter"])


def small_images() -> Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def test_every_network_is_listed_with_its_shapes() -> None:
    assert set(SHAPES) == set(NETWORKS)


def test_logits_and_features_lie_on_one_grid(segmenter: Segmenter, name: str) -> None:
    stride, channels = SHAPES[name]
    more = int(name == CAFFE)  # its pooling rounds up: PLCA's 512x1024 gives 65x129 cells
    output = segmenter.train()(small_images())
    assert output.logits.shape == (2, CLASSES, 32 // stride + more, 48 // stride + more)
    assert output.features.shape == (2, channels, 32 // stride + more, 48 // stride + more)
    assert segmenter.feature_channels == channels
    assert segmenter.num_classes == CLASSES


def test_odd_sizes_are_rounded_up(segmenter: Segmenter, name: str) -> None:
    stride, _ = SHAPES[name]
    with torch.no_grad():
        output = segmenter.eval()(torch.randn(1, 3, 33, 41))
    assert output.logits.shape[-2:] == output.features.shape[-2:] == (-(-33 // stride), -(-41 // stride))


def test_backbone_and_head_share_no_parameter_and_cover_all(segmenter: Segmenter) -> None:
    backbone = {id(parameter) for parameter in segmenter.backbone.parameters()}
    head = {id(parameter) for parameter in segmenter.head.parameters()}
    assert not backbone & head
    assert backbone | head == {id(parameter) for parameter in segmenter.parameters()}


def test_every_parameter_gets_a_gradient(segmenter: Segmenter) -> None:
    segmenter.train().zero_grad()
    output = segmenter(small_images())
    (output.logits.square().mean() + output.features.square().mean()).backward()
    assert [key for key, parameter in segmenter.named_parameters() if parameter.grad is None] == []
    segmenter.zero_grad()


def test_backbone_of_every_network_has_a_stem_of_its_own(segmenter: Segmenter) -> None:
    stem = copy.deepcopy(segmenter.backbone.stem)
    assert isinstance(stem, nn.Module)
    with torch.no_grad():
        shallow = stem.eval()(small_images())
        expected = segmenter.backbone.eval()(small_images())
        found = segmenter.backbone.stages(shallow)  # type: ignore[operator]
    torch.testing.assert_close(found, expected)


def test_names_are_unique_once_places_are_dropped(segmenter: Segmenter) -> None:
    assert load_weights(segmenter, segmenter.state_dict()).missing == ()


def test_normalised_images_are_a_float_in_imagenet_units(segmenter: Segmenter, name: str) -> None:
    if name == CAFFE:
        return
    assert segmenter.normalisation is IMAGENET_RGB
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    normalised = segmenter.normalise(images)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(normalised[:, :, 0, 0], torch.stack([-mean / std, (1 - mean) / std]))
    assert "mean" not in segmenter.state_dict()


def test_caffe_networks_see_blue_first_and_unscaled() -> None:
    segmenter = build_segmenter(CAFFE, CLASSES)
    assert segmenter.normalisation is CAFFE_BGR
    images = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    normalised = segmenter.normalise(images)
    expected = torch.tensor([30 - 104.00698793, 20 - 116.66876762, 10 - 122.67891434])
    torch.testing.assert_close(normalised, expected.view(1, 3, 1, 1).expand(2, 3, 4, 4))
    assert normalised.dtype == torch.float32
    torch.testing.assert_close(segmenter.normalise(images[0]), normalised[0])
    assert "mean" not in segmenter.state_dict()


def test_plca_deploys_the_networks_normalisation() -> None:
    from segadapt.trainables.core.method import WarmupConfig
    from segadapt.trainables.plca import PLCA

    segmenter = build_segmenter("compact", CLASSES)
    segmenter.normalisation = CAFFE_BGR
    assert PLCA(segmenter, PLCA.Config(), WarmupConfig()).deployed.normalisation is CAFFE_BGR


@pytest.mark.parametrize("name", ["compact", "lraspp_mobilenet_v3_large"])
def test_equal_seeds_build_equal_networks(name: str) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_segmenter(name, CLASSES).state_dict())
    assert all(torch.equal(first, second) for first, second in zip(states[0].values(), states[1].values(), strict=True))


@pytest.mark.parametrize("align_corners", [True, False])
def test_upsampling_follows_the_corner_rule(align_corners: bool) -> None:
    config = NetworkConfig(align_corners=align_corners)
    segmenter = build_segmenter(num_classes=CLASSES, **asdict(config))
    logits = torch.randn(1, CLASSES, 4, 6)
    expected = F.interpolate(logits, size=(32, 48), mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(segmenter.upsample(logits, (32, 48)), expected)


def test_compact_is_the_same_in_training_and_evaluation_and_alone_or_in_a_batch() -> None:
    segmenter = build_segmenter("compact", CLASSES)
    images = small_images()
    together = segmenter.train()(images).logits
    alone = torch.cat([segmenter.eval()(image[None]).logits for image in images])
    torch.testing.assert_close(together, alone)


def test_compact_learns_a_colour_rule() -> None:
    torch.manual_seed(0)
    segmenter = build_segmenter("compact", 2)
    optimiser = torch.optim.SGD(segmenter.parameters(), lr=base_lr("compact"), momentum=0.9)
    labels = torch.randint(0, 2, (4, 4, 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    images = segmenter.normalise((60 + 120 * labels)[:, None].expand(-1, 3, -1, -1))
    for _ in range(30):
        loss = F.cross_entropy(segmenter.upsample(segmenter(images).logits, (32, 64)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.3


def test_summed_head_is_the_sum_of_its_branches() -> None:
    head = SummedDilatedHead(8, 3, dilations=(6, 12, 18, 24))
    features = torch.randn(2, 8, 9, 9)
    branches = head.branches(features)
    assert [branch.shape for branch in branches] == [(2, 3, 9, 9)] * 4
    torch.testing.assert_close(head(features), sum(branches))


def test_summed_head_starts_with_small_weights() -> None:
    weights = torch.cat([c.weight.flatten() for c in SummedDilatedHead(256, 19, (1, 2)).convolutions])  # type: ignore[union-attr, operator]
    assert weights.std().item() == pytest.approx(0.01, rel=0.05)


class _Launches(TorchDispatchMode):
    """Operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.operations.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_frozen_norm_matches_batch_norm_in_evaluation(epsilon: float) -> None:
    norm = nn.BatchNorm2d(6, eps=epsilon).eval()
    for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
        assert tensor is not None
        tensor.data.uniform_(0.5, 2)
    frozen = FrozenBatchNorm(6, epsilon)
    load = frozen.load_state_dict(norm.state_dict(), strict=False)
    assert load.unexpected_keys == ["num_batches_tracked"]
    assert load.missing_keys == []
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(frozen(x), norm(x))
    assert frozen(x.bfloat16()).dtype == torch.bfloat16
    wide = x.double()
    torch.testing.assert_close(frozen.double()(wide), norm.double()(wide))
    with _Launches() as launches:
        frozen(wide)
    assert launches.operations == [torch.ops.aten.addcmul.default]


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_frozen_norm_rounds_its_result_alone(narrow: torch.dtype) -> None:
    frozen = FrozenBatchNorm(6, 1e-5)
    frozen.load_state_dict({"running_mean": torch.full((6,), 10.0), "weight": torch.linspace(0.5, 2, 6)}, strict=False)
    x = (10 + torch.randn(2, 6, 5, 5)).to(narrow).requires_grad_()  # ten deviations from zero
    wide = x.detach().float().requires_grad_()
    gradient = torch.randn(2, 6, 5, 5).to(narrow)
    with _Launches() as launches:
        result = frozen(x)
        result.backward(gradient)
    frozen(wide).backward(gradient.float())
    assert wide.grad is not None
    assert x.grad is not None
    assert result.dtype == x.grad.dtype == narrow
    assert torch.equal(result, frozen(wide).to(narrow))
    assert torch.equal(x.grad, wide.grad.to(narrow))
    assert [str(launch).split(".")[1] for launch in launches.operations if "empty" not in str(launch)] == [
        "addcmul",
        "mul",
    ]


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "lraspp_mobilenet_v3_large"])
@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_norm_stays_constant_in_training(name: str, freeze: bool) -> None:
    segmenter = build_segmenter(name, CLASSES, freeze_norm=freeze).train()
    kinds = {type(module) for module in segmenter.backbone.modules() if "BatchNorm" in type(module).__name__}
    assert kinds == {FrozenBatchNorm if freeze else nn.BatchNorm2d}
    statistics = {key: value.clone() for key, value in segmenter.backbone.state_dict().items() if "running_" in key}
    with torch.no_grad():
        segmenter(small_images())
    moved = [key for key, value in segmenter.backbone.state_dict().items() if "running_" in key]
    moved = [key for key in moved if not torch.equal(segmenter.backbone.state_dict()[key], statistics[key])]
    assert bool(moved) is not freeze
    names = [key for key, _ in segmenter.backbone.named_parameters()]
    assert any("bn" in key or key.endswith("block.0.1.weight") for key in names) is not freeze


def test_epsilon_of_the_frozen_norm_can_be_set() -> None:
    name = "lraspp_mobilenet_v3_large"
    for given, expected in ((None, 1e-3), (0.0, 0.0), (0.5, 0.5)):
        segmenter = build_segmenter(name, CLASSES, freeze_norm=True, norm_epsilon=given)
        norms = [module for module in segmenter.backbone.modules() if isinstance(module, FrozenBatchNorm)]
        assert {norm.epsilon for norm in norms} == {expected}


def test_freezing_needs_batch_norm() -> None:
    with pytest.raises(ValueError, match="freeze_norm needs batch norm, but 'compact' has group norm"):
        build_segmenter("compact", CLASSES, freeze_norm=True)


@pytest.mark.parametrize("call", [base_lr, lambda name: build_segmenter(name, CLASSES)])
def test_unknown_network_lists_the_known_ones(call: Any) -> None:
    with pytest.raises(ValueError, match=r"one of compact, deeplabv2_resnet101, .*, but got 'segformer'"):
        call("segformer")


def test_scratch_learns_faster_than_pretrained() -> None:
    assert base_lr("compact") > base_lr("deeplabv2_resnet101") == 2.5e-4


def saved(folder: Path, state: dict[str, Any]) -> str:
    torch.save(state, folder / "weights.pth")
    return str(folder / "weights.pth")


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state}])
def test_segmenter_file_round_trips(tmp_path: Path, wrap: Any) -> None:
    original = build_segmenter("compact", CLASSES)
    state = {f"module.segmenter.{key}": value for key, value in original.state_dict().items()}
    loaded = build_segmenter("compact", CLASSES, weights=saved(tmp_path, wrap(state)))
    for key, value in original.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0)


def test_backbone_file_leaves_the_head_fresh_and_says_so(tmp_path: Path) -> None:
    original, fresh = build_segmenter("compact", CLASSES), build_segmenter("compact", CLASSES)
    report = load_weights(fresh, original.backbone.state_dict())
    assert report.unexpected == ()
    assert set(report.missing) == {key for key in original.state_dict() if key.startswith("head.")}
    torch.testing.assert_close(fresh.backbone.state_dict(), original.backbone.state_dict(), rtol=0, atol=0)


def test_weights_of_another_network_are_refused_though_a_few_tensors_fit() -> None:
    compact, other = build_segmenter("compact", CLASSES), build_segmenter("deeplabv3_resnet50", CLASSES)
    names = [name for name in compact.backbone.state_dict() if not name.endswith("num_batches_tracked")]
    few = {name: compact.backbone.state_dict()[name] for name in names[: len(names) // 2]}
    with pytest.raises(ValueError, match=rf"fill {len(few)} of its {len(names)} tensors"):
        load_weights(compact, {**other.head.state_dict(prefix="other."), **few})


def test_head_of_another_class_count_is_reported() -> None:
    original, fresh = build_segmenter("compact", 19), build_segmenter("compact", CLASSES)
    report = load_weights(fresh, original.state_dict())
    heads = {key for key in original.state_dict() if key.startswith("head.")}
    assert set(report.unexpected) == set(report.missing) == heads


@pytest.mark.parametrize(
    ("name", "published"),
    [("deeplabv3_resnet50", "resnet50"), ("lraspp_mobilenet_v3_large", "mobilenet_v3_large")],
)
def test_torchvision_weights_fill_the_whole_backbone_and_freeze_it(
    tmp_path: Path, name: str, published: str, caplog: pytest.LogCaptureFixture
) -> None:
    import torchvision

    original = getattr(torchvision.models, published)(weights=None)
    with caplog.at_level("INFO"):
        segmenter = build_segmenter(name, CLASSES, weights=saved(tmp_path, original.state_dict()))
    report = load_weights(segmenter, original.state_dict())
    assert all(key.startswith("head.") for key in report.missing)
    assert all(key.startswith(("fc.", "classifier.")) for key in report.unexpected)
    assert str(report) in caplog.text
    assert any(isinstance(module, FrozenBatchNorm) for module in segmenter.backbone.modules())


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "lraspp_mobilenet_v3_large"])
def test_torchvision_segmentation_weights_give_the_same_logits(name: str) -> None:
    import torchvision

    original = getattr(torchvision.models.segmentation, name)(
        weights=None, weights_backbone=None, num_classes=CLASSES
    ).eval()
    segmenter = build_segmenter(name, CLASSES).eval()
    report = load_weights(segmenter, original.state_dict())
    assert report.missing == report.unexpected == ()
    images = small_images()
    with torch.no_grad():
        expected = original(images)["out"]
        found = F.interpolate(segmenter(images).logits, size=(32, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_deeplabv2_backbone_equals_torchvision() -> None:
    import torchvision

    original = torchvision.models.resnet101(weights=None, replace_stride_with_dilation=[False, True, True])
    segmenter = build_segmenter("deeplabv2_resnet101", CLASSES)
    assert load_weights(segmenter, original.state_dict()).unexpected == ("fc.weight", "fc.bias")
    original.avgpool, original.fc = nn.Identity(), nn.Identity()
    images = torch.randn(1, 3, 33, 33, dtype=torch.float64)
    with torch.no_grad():
        features = segmenter.double().eval()(images).features
        torch.testing.assert_close(features.flatten(1), original.double().eval()(images))


class CaffeBottleneck(nn.Module):
    """A block of the public DeepLab-v2 networks in PyTorch, written out."""

    def __init__(self, inputs: int, planes: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample = None
        if inputs != 4 * planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 4 * planes, 1, stride=stride, bias=False), nn.BatchNorm2d(4 * planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        inner = F.relu(self.bn2(self.conv2(inner)))
        inner = self.bn3(self.conv3(inner))
        return F.relu(inner + (x if self.downsample is None else self.downsample(x)))


class CaffeDeepLab(nn.Module):
    """The public DeepLab-v2 networks in PyTorch, written out; the source of Caffe-converted weights' names."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        plan = [(64, 64, 3, 1, 1), (256, 128, 4, 2, 1), (512, 256, 23, 1, 2), (1024, 512, 3, 1, 4)]
        for number, (inputs, planes, blocks, stride, dilation) in enumerate(plan, 1):
            stage = [CaffeBottleneck(inputs, planes, stride, dilation)]
            stage += [CaffeBottleneck(4 * planes, planes, 1, dilation) for _ in range(blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*stage))
        self.layer5 = nn.Module()
        self.layer5.conv2d_list = nn.ModuleList(
            nn.Conv2d(2048, num_classes, 3, padding=rate, dilation=rate) for rate in (6, 12, 18, 24)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        return sum(convolution(x) for convolution in self.layer5.conv2d_list), x  # type: ignore[union-attr, return-value]


@pytest.mark.parametrize("prefix", ["", "Scale."])
def test_caffe_layout_fills_the_whole_network_and_gives_the_same_logits(
    tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    original = CaffeDeepLab(CLASSES).eval()
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
    path = saved(tmp_path, {f"{prefix}{key}": value for key, value in original.state_dict().items()})
    with caplog.at_level("INFO"):
        segmenter = build_segmenter(CAFFE, CLASSES, weights=path).eval()
    assert "missing: none; unexpected: none" in caplog.text
    assert any(isinstance(module, FrozenBatchNorm) for module in segmenter.backbone.modules())
    images = torch.randn(1, 3, 34, 51, dtype=torch.float64)
    with torch.no_grad():
        logits, features = original.double()(images)
        found = segmenter.double()(images)
    torch.testing.assert_close(found.features, features)
    torch.testing.assert_close(found.logits, logits)


def test_caffe_backbone_without_head_leaves_the_head_fresh(tmp_path: Path) -> None:
    state = CaffeDeepLab(CLASSES).state_dict()
    state = {key: value for key, value in state.items() if not key.startswith("layer5")}
    state |= {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    report = load_weights(build_segmenter(CAFFE, CLASSES), state)
    assert report.unexpected == ("fc.weight", "fc.bias")
    assert report.missing
    assert all(key.startswith("head.") for key in report.missing)


def test_caffe_weights_are_not_downloaded() -> None:
    with pytest.raises(ValueError, match=r"must be none or a \.pth, .*no weights are published"):
        build_segmenter(CAFFE, CLASSES, weights="IMAGENET1K_V1")


def test_a_backbone_of_other_shapes_is_refused(tmp_path: Path) -> None:
    state = build_segmenter("compact", CLASSES).state_dict()
    name = next(key for key in state if key.startswith("backbone.") and state[key].ndim == 4)
    state[name] = state[name][:, :1]
    with pytest.raises(ValueError, match=rf"1 tensors differ: {name} is \(.*\), not \(.*\)\. Choose the network.name"):
        build_segmenter("compact", CLASSES, weights=saved(tmp_path, state))


def test_a_backbone_that_is_not_whole_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = build_segmenter("compact", CLASSES).state_dict()
    name = next(key for key in state if key.startswith("backbone."))
    del state[name]
    with caplog.at_level("WARNING"):
        build_segmenter("compact", CLASSES, weights=saved(tmp_path, state))
    assert f"missing: {name}; unexpected: none" in caplog.text


def test_a_file_without_names_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"file of named tensors, but .*list\.pth holds a list"):
        build_segmenter("compact", CLASSES, weights=str(tmp_path / "list.pth"))


def test_safetensors_are_read_by_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = build_segmenter("compact", CLASSES)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"")
    package: Any = types.ModuleType("safetensors.torch")
    package.load_file = lambda given: {str(given == path): torch.zeros(1), **original.state_dict()}
    monkeypatch.setitem(sys.modules, "safetensors", types.ModuleType("safetensors"))
    monkeypatch.setitem(sys.modules, "safetensors.torch", package)
    loaded = build_segmenter("compact", CLASSES, weights=str(path))
    torch.testing.assert_close(loaded.state_dict(), original.state_dict(), rtol=0, atol=0)


def test_safetensors_without_their_package_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match=r"needs the package safetensors, which is not installed. Install it"):
        build_segmenter("compact", CLASSES, weights=str(path))


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {"encoder.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"fill 0 of its \d+ tensors. Missing: .* Unexpected: encoder.weight"):
        build_segmenter("compact", CLASSES, weights=path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is none at .*absent\.pth"):
        build_segmenter("compact", CLASSES, weights=str(tmp_path / "absent.pth"))


def test_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save(build_segmenter("compact", CLASSES), tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"loads without running code, but .*module\.pth does not"):
        build_segmenter("compact", CLASSES, weights=str(tmp_path / "module.pth"))


def test_unknown_weight_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"one of IMAGENET1K_V1, IMAGENET1K_V2, but got 'IMAGENET'"):
        build_segmenter("deeplabv2_resnet101", CLASSES, weights="IMAGENET")
    with pytest.raises(ValueError, match="no weights are published for it"):
        build_segmenter("compact", CLASSES, weights="IMAGENET1K_V1")


@pytest.mark.parametrize("name", PUBLISHED)
def test_impossible_download_says_what_to_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"IMAGENET1K_V1 must be downloaded once.*no route to host.*set network.weights"
    ):
        build_segmenter(name, CLASSES, weights="IMAGENET1K_V1")


def test_no_weights_has_two_spellings() -> None:
    states = []
    for weights in (None, "none"):
        torch.manual_seed(0)
        states.append(build_segmenter("compact", CLASSES, weights=weights).state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
