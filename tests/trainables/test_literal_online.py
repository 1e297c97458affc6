"""The literal step of online self-training, which the benchmark measures against, computes what ours does."""

import contextlib
import importlib.util
from pathlib import Path

import pytest
import torch

from segadapt.trainables import method_class
from segadapt.trainables.core.data.batch import DomainBatch
from segadapt.trainables.core.method import WarmupConfig
from segadapt.trainables.core.networks import build_segmenter
from segadapt.trainables.core.online.config import OnlineConfig
from segadapt.trainables.core.online.terms import OnlineTerms
from segadapt.trainables.core.training.passes import pass_step

PATH = Path(__file__).parents[2] / "benchmarks" / "literal" / "online.py"


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_it_has_our_losses_and_gradients_where_nothing_is_drawn(threshold: float) -> None:
    spec = importlib.util.spec_from_file_location("literal_online", PATH)
    assert spec is not None
    assert spec.loader is not None
    literal = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(literal)
    draw, classes = torch.Generator().manual_seed(0), 5
    images, target = torch.randn(2, 2, 3, 32, 64, generator=draw)
    labels = torch.randint(0, classes, (2, 32, 64), generator=draw)
    labels[:, :4] = 255

    cls = method_class("online_self_training")
    torch.manual_seed(0)
    method = cls(build_segmenter("compact", classes), cls.Config(), WarmupConfig())
    recipe = literal.Recipe(threshold=threshold, mixes=False, mask_ratio=0.0, jitter_chance=0.0, blur_chance=0.0)
    step = literal.LiteralOnlineStep(method.segmenter, 1e-3, recipe)
    expected = step.losses(images, labels, target)
    gradients = [parameter.grad for parameter in method.segmenter.parameters()]
    method.zero_grad(set_to_none=True)

    chances = {"jitter_chance": 0.0, "blur_chance": 0.0}
    config = OnlineConfig(enabled=True, quality="batch", threshold=threshold, mix_weight=0.0, mask_ratio=0.0, **chances)
    method.online = OnlineTerms(method.deployed, config)
    batch = DomainBatch(images, labels, target, key=(0, "adapt"), numbers=(0, 1))
    method.train()
    terms = pass_step(method, method, iter([batch]), 0, 1, precision=contextlib.nullcontext, scale=lambda loss: loss)
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(expected, rel=1e-5)
    for parameter, gradient in zip(method.segmenter.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
