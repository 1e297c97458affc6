"""Agreement with the authors' losses on short training sequences.

The arrays come from BIT-DA/SDCA@d00e7ba run in float64 on float32 inputs. Arrays named `exp_*` are its outputs;
gradients are stored in float32. Deviations are relative to the largest entry of the expected array.

`sdca_apart`, with classes 30 to 10,000 deviations apart at an offset of 1,000, one of them of a single cell, is not the
authors' output but that of the literal form in `benchmarks/literal/sdca.py` in float64, which differs from theirs by
less than 1e-14 in the other cases (gradients: not at all, as they are stored).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segadapt.trainables.core.data.batch import IGNORE_INDEX
from segadapt.trainables.core.labelling.features import confident_labels, labels_at_features
from segadapt.trainables.core.losses.distribution_contrast import distribution_contrast
from segadapt.trainables.core.losses.segmentation import lovasz_softmax, segmentation_cross_entropy
from segadapt.trainables.core.state.class_statistics import ClassStatistics

GOLDEN = Path(__file__).parent / "golden"
CASES = ("sdca_basic", "sdca_resume", "sdca_tau", "sdca_apart")
TOLERANCES = {
    torch.float64: {"loss": 1e-9, "variance": 1e-9, "gradient": 1e-6},
    torch.float32: {"loss": 2e-6, "variance": 1e-5, "gradient": 3e-5},
}


def deviation(actual: Tensor, expected: np.ndarray) -> float:
    largest = float(np.abs(expected).max())
    return float(np.abs(actual.detach().double().numpy() - expected).max()) / (largest or 1.0)


def initial_statistics(arrays: Any, level: str, shape: tuple[int, int]) -> ClassStatistics:
    statistics = ClassStatistics(*shape)
    if "init_amount" in arrays:
        statistics.count.copy_(torch.from_numpy(arrays["init_amount"]))
        statistics.mean.copy_(torch.from_numpy(arrays[f"init_{level}_mean"]))
        statistics.variance.copy_(torch.from_numpy(arrays[f"init_{level}_var"]))
    return statistics


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_training_sequence_agrees_with_the_authors_code(case: str, dtype: torch.dtype) -> None:
    arrays = np.load(GOLDEN / f"{case}.npz")
    settings = json.loads(str(arrays["settings"]))
    classes, channels, last = settings["K"], settings["A"], settings["steps"] - 1
    level_statistics = {
        "feat": initial_statistics(arrays, "feat", (classes, channels)),
        "out": initial_statistics(arrays, "out", (classes, classes)),
    }
    weights = {"feat": settings["lambda_feat"], "out": settings["lambda_out"]}
    deviations: dict[str, float] = {}
    unread = {name for name in arrays.files if name.startswith("exp_")}

    def compare(name: str, actual: Tensor) -> None:
        unread.remove(name)
        deviations[name] = deviation(actual, arrays[name])

    for step in range(settings["steps"]):
        inputs = {
            name: torch.from_numpy(arrays[f"s{step}_{name}"]).to(dtype).requires_grad_()
            for name in ("src_feat", "src_out", "tgt_feat", "tgt_out")
        }
        full_labels = torch.from_numpy(arrays[f"s{step}_src_label"]).long()
        feature_size = inputs["src_feat"].shape[-2:]
        labels = {
            "src": labels_at_features(full_labels, (feature_size[0], feature_size[1])),
            "tgt": confident_labels(inputs["tgt_out"], settings["delta"]),
        }
        for domain in ("src", "tgt"):
            expected_labels = arrays[f"exp_s{step}_{domain}_mask"]
            unread.remove(f"exp_s{step}_{domain}_mask")
            np.testing.assert_array_equal(labels[domain].flatten().numpy(), expected_labels)

        contrast = torch.zeros((), dtype=dtype)
        for level, statistics in level_statistics.items():
            statistics.update(inputs[f"src_{level}"], labels["src"])
            compare(f"exp_s{step}_state_{level}_mean", statistics.mean)
            compare(f"exp_s{step}_state_{level}_var", statistics.variance)
            for domain in ("src", "tgt"):
                term = distribution_contrast(
                    inputs[f"{domain}_{level}"],
                    labels[domain],
                    statistics.mean,
                    statistics.variance,
                    temperature=settings["tau"],
                )
                compare(f"exp_s{step}_loss_{level}_{domain}", term)
                contrast = contrast + weights[level] * term
        compare(f"exp_s{step}_loss_contrast", contrast)
        np.testing.assert_array_equal(level_statistics["feat"].count.numpy(), arrays[f"exp_s{step}_state_amount"])
        np.testing.assert_array_equal(level_statistics["out"].count.numpy(), arrays[f"exp_s{step}_state_amount"])
        unread.remove(f"exp_s{step}_state_amount")

        upsampled = F.interpolate(inputs["src_out"], size=full_labels.shape[-2:], mode="bilinear", align_corners=True)
        cross_entropy = segmentation_cross_entropy(upsampled, full_labels)
        lovasz = lovasz_softmax(upsampled, full_labels)
        supervised = cross_entropy + settings["lambda_lov"] * lovasz
        compare(f"exp_s{step}_loss_ce", cross_entropy)
        compare(f"exp_s{step}_loss_lov", lovasz)
        compare(f"exp_s{step}_loss_total", supervised + contrast)
        if step == last:
            gradients = torch.autograd.grad(contrast, list(inputs.values()))
            for name, gradient in zip(inputs, gradients, strict=True):
                compare(f"exp_s{step}_grad_{name}", gradient)
            compare(f"exp_s{step}_grad_sup_src_out", torch.autograd.grad(supervised, inputs["src_out"])[0])

    assert not unread, f"expected arrays that were not compared: {sorted(unread)}"
    kinds = {
        name: "gradient" if "_grad_" in name else "variance" if name.endswith("_var") else "loss" for name in deviations
    }
    too_far = {name: value for name, value in deviations.items() if value > TOLERANCES[dtype][kinds[name]]}
    assert not too_far


@pytest.mark.parametrize("level", ["feat", "out"])
def test_empty_selection_costs_nothing_and_leaves_the_statistics_alone(level: str) -> None:
    arrays = np.load(GOLDEN / "sdca_resume.npz")
    features = torch.from_numpy(arrays[f"s0_src_{level}"]).requires_grad_()
    ignored = torch.full((features.shape[0], *features.shape[2:]), IGNORE_INDEX)
    statistics = initial_statistics(arrays, level, arrays[f"init_{level}_mean"].shape)
    before = {name: value.clone() for name, value in statistics.state_dict().items()}

    statistics.update(features, ignored)
    loss = distribution_contrast(features, ignored, statistics.mean, statistics.variance)
    loss.backward()

    for name, value in statistics.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert loss.item() == 0
    assert features.grad is not None
    assert torch.equal(features.grad, torch.zeros_like(features))
