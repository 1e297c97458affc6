"""Quality of pseudo labels on validation images: by the rule that labels the target, and seen by evaluation alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import toy_config, toy_trainer

from segadapt.trainables import method_class
from segadapt.trainables.clst import ADAPT, CLST
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.evaluation.evaluate import evaluate
from segadapt.trainables.core.evaluation.inference import views
from segadapt.trainables.core.labelling.files import PseudoLabelFolder, read_provenance
from segadapt.trainables.core.labelling.quality import LabelQualityCounter

RULES: list[tuple[str, dict[str, Any]]] = [
    *[("self_training", {"method__rule": rule}) for rule in ("quantile", "global_local", "self_paced", "ensemble")],
    ("self_training", {"method__rule": "fixed", "method__confidence_cap": 0.16}),
    ("self_training", {"method__rounds": 2, "method__teacher": True}),
    ("bicl", {"network__name": "compact"}),
    ("drsl", {}),
    ("drsl", {"method__mirrored": True}),
    ("clst", {}),
]


def test_shares_and_accuracies_are_counted_over_pixels_with_a_true_label() -> None:
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 255, 255]])
    labels = torch.tensor([[0, 1, 255, 1], [1, 255, 0, 255]])
    counter = LabelQualityCounter(3)
    counter.update(labels, truth)
    counter.update(torch.full((2, 4), 255), torch.full((2, 4), 255))
    found = counter.reduced()
    assert found.metrics() == {
        "pseudo_labels/kept": pytest.approx(4 / 6),
        "pseudo_labels/accuracy": pytest.approx(3 / 4),
    }
    assert found.by_class(("road", "car", "bus")) == {
        "road": {"kept": pytest.approx(2 / 3), "accuracy": 1.0},
        "car": {"kept": pytest.approx(2 / 3), "accuracy": pytest.approx(2 / 3)},
        "bus": {"kept": None, "accuracy": None},
    }
    nothing = LabelQualityCounter(3)
    nothing.update(torch.full((2, 4), 255), truth)
    assert nothing.reduced().metrics() == {"pseudo_labels/kept": 0.0}


@pytest.mark.parametrize(("name", "values"), RULES)
def test_the_rule_gives_target_images_the_labels_that_were_written(
    name: str, values: dict[str, Any], tmp_path: Path
) -> None:
    config = toy_config(name, trainer__eval_batch_size=1, **values)
    stage = [stage for stage in method_class(name).plan(config.method) if stage.pseudo_labels][
        -1 if "method__teacher" in values else 0
    ]
    trainer, _ = toy_trainer(config, tmp_path)
    method, folder = trainer.method.eval(), trainer.folder / stage.name
    if "method__teacher" in values:
        with torch.no_grad():
            next(method.segmenter.head.parameters()).mul_(-1)  # what labels is not what is deployed
    with torch.no_grad():
        method.prepare_stage(stage, trainer.stage_data(stage))
        rule = method.label_rule(stage, read_provenance(folder))
        assert rule is not None
        target = trainer.data.target
        written = PseudoLabelFolder(folder, target.ids)
        for index, image_id in enumerate(target.ids):
            image, expected = target.image(index)[None], written.read(image_id)
            (logits,) = views(method.deployed, image)
            assert torch.equal(rule(image, logits, (32, 64))[0].to(torch.uint8), expected)
    assert 0 < written.provenance["labelled_share"] < 1


def test_a_teachers_rule_has_the_thresholds_of_the_recent_batches(tmp_path: Path) -> None:
    trainer, _ = toy_trainer(toy_config("clst", method__ensemble="weights"), tmp_path)
    method = trainer.method.eval()
    assert isinstance(method, CLST)
    rule = method.label_rule(ADAPT, None)
    assert rule is not None
    image = trainer.data.target.image(0)[None]
    expected = method._teacher_labels(method.segmenter.normalise(image))
    before = {name: value.clone() for name, value in method.state_dict().items()}
    with torch.no_grad():
        assert torch.equal(rule(image, torch.zeros(1), (32, 64)), expected)
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items()), "it only looks"


def test_rounds_that_label_by_averages_have_no_quality_on_other_images(tmp_path: Path) -> None:
    config = toy_config("clst", method__rounds=2, trainer__steps=2)
    trainer, reports = toy_trainer(config, tmp_path, CLST.plan(config.method)[1:])
    trainer.run()
    shown = [metrics["stage"] for metrics in reports.metrics if "pseudo_labels/kept" in metrics]
    assert set(shown) == {"round_1"}
    assert {metrics["stage"] for metrics in reports.metrics} > {"round_1", "round_2"}


def test_changed_target_labels_change_the_accuracy_and_not_what_is_kept(tmp_path: Path) -> None:
    config = toy_config("bicl", method__rounds=1)
    trainer, reports = toy_trainer(config, tmp_path)
    trainer.run()
    stage = trainer.plan[-1]
    rule = trainer.method.label_rule(stage, read_provenance(trainer.folder / stage.name))
    _, data = load_data(config.data)
    false = replace(data, target=_Turned(data.target))
    true_found, false_found = (
        evaluate(trainer.method.deployed, shown, trainer.device, 4, rule=rule).metrics() for shown in (data, false)
    )
    names = ("pseudo_labels/kept", "pseudo_labels/accuracy")
    assert [reports.metrics[-1][name] for name in names] == [true_found[name] for name in names]
    assert true_found[names[0]] == false_found[names[0]]
    assert true_found[names[1]] != false_found[names[1]]


def test_windows_act_on_the_score_and_not_on_the_quality_of_labels_or_the_training(tmp_path: Path) -> None:
    found = []
    for window in (None, (24, 40)):
        folder = tmp_path / str(window is None)
        config = toy_config("bicl", method__rounds=1, network__name="compact", trainer__eval_window=window)
        trainer, reports = toy_trainer(config, folder)
        trainer.run()
        found.append(reports.metrics[-1])
    whole, windows = found
    for name in ("pseudo_labels/kept", "pseudo_labels/accuracy", "loss/total"):
        assert whole[name] == windows[name]
    assert whole["target_val/miou"] != windows["target_val/miou"]


class _Turned:
    """Evaluation images whose true labels are another class."""

    def __init__(self, images: Any) -> None:
        self._images = images
        self.ids = images.ids

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> torch.Tensor:
        image: torch.Tensor = self._images.image(index)
        return image

    def label(self, index: int) -> torch.Tensor:
        label: torch.Tensor = self._images.label(index)
        return torch.where(label == 255, label, (label + 1) % 8)
