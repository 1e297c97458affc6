"""Promises of online self-training beside every method: what the platform promises of each holds with it too."""

import contextlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_step import LastStage, measuring, on_simulated_device
from test_trainer import _Poisoned, equal_state
from toy import keeping_losses, toy_config, toy_trainer

from segadapt.platform.errors import UsageError
from segadapt.platform.settings.config import resolve
from segadapt.platform.storage.stage_keys import stage_keys
from segadapt.trainables import method_class
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.data.loading import BatchSource
from segadapt.trainables.core.data.transforms import AugmentationConfig
from segadapt.trainables.core.networks import build_segmenter
from segadapt.trainables.core.online.augmentation import Change, blurred, jittered
from segadapt.trainables.core.online.config import OnlineConfig
from segadapt.trainables.core.online.terms import OnlineTerms
from segadapt.trainables.core.training.checkpoint import load_state
from segadapt.trainables.core.training.trainer import Trainer

METHODS = ["online_self_training", "sdca", "bicl", "drsl", "clst", "plca"]
SMALL: dict[str, Any] = {
    "warmup__steps": 1,
    "trainer__steps": 4,
    "data__streets__train_images": 4,
    "data__streets__val_images": 2,
    "online__enabled": True,
}
VIT: dict[str, Any] = {
    "network__name": "timm:test_vit",
    "online__mask": "token",
    "optimizer__lr": 1e-3,
    "optimizer__warmup_steps": 0,
}


def online_of(trainer: Trainer) -> OnlineTerms:
    assert trainer.method.online is not None
    return trainer.method.online


@pytest.mark.parametrize("network", ["compact", "transformer"])
@pytest.mark.parametrize("name", METHODS)
def test_resuming_in_the_middle_is_bit_exact_beside_every_method(name: str, network: str, tmp_path: Path) -> None:
    settings = SMALL | {"online__deploys": "teacher" if name in ("sdca", "drsl", "plca") else "student"}
    settings |= VIT if network == "transformer" else {}
    settings |= {"method__feature": "backbone"} if name == "bicl" and network == "transformer" else {}
    config = toy_config(name, **settings)
    trainer, whole = toy_trainer(config, tmp_path / "whole")
    trainer.run()
    assert {"loss/online_mix", "loss/online_mask"} <= set(whole.metrics[-1])
    assert online_of(trainer).steps == sum(
        trainer.steps[stage.name] for stage in trainer.plan if "target" in stage.domains
    )
    last = load_state(whole.checkpoint(len(whole.metrics) - 1))
    assert last["deployed"].startswith("online.teacher") == (config.online.deploys == "teacher")
    middle = len(whole.metrics) - 2
    again, resumed = toy_trainer(config, tmp_path / "again")
    again.folder = trainer.folder
    again.run(whole.checkpoint(middle))
    assert equal_state(load_state(resumed.checkpoint(len(resumed.metrics) - 1)), last)
    assert resumed.metrics[-1]["target_val/miou"] == whole.metrics[-1]["target_val/miou"]


@pytest.mark.parametrize("name", ["online_self_training", "drsl"])
def test_terms_of_weight_0_cost_no_pass_and_change_nothing(name: str, tmp_path: Path) -> None:
    config = toy_config(name, **SMALL, online__mix_weight=0.0, online__mask="none")
    idle, _ = toy_trainer(config, tmp_path / "idle")
    calls = Counter[str]()
    online_of(idle).teacher.register_forward_hook(lambda *_: calls.update(["teacher"]))
    idle.run()
    assert not calls
    plain, _ = toy_trainer(replace(config, online=OnlineConfig()), tmp_path / "plain")
    plain.run()
    state = idle.method.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in plain.method.state_dict().items())


def test_one_pass_of_the_teacher_serves_mixed_and_masked_images(tmp_path: Path) -> None:
    trainer, _ = toy_trainer(toy_config("sdca", **SMALL | {"trainer__steps": 1}), tmp_path)
    calls = Counter[str]()
    online_of(trainer).teacher.register_forward_hook(lambda *_: calls.update(["teacher"]))
    trainer.run()
    assert calls["teacher"] == 1


def test_a_step_reads_nothing_of_the_device_and_holds_the_memory_of_one_pass(tmp_path: Path) -> None:
    config = toy_config("online_self_training", warmup__steps=1, trainer__steps=2, trainer__eval_every=2)
    trainer, _ = toy_trainer(config, tmp_path)
    trainer.run()
    trainer.method.train()
    stage = LastStage.of(trainer)
    stage.step()
    device = on_simulated_device(stage)
    with device:
        stage.step()
    assert not device.waits

    def all_terms_at_once() -> None:
        method, online = trainer.method, online_of(trainer)
        terms = [term for _, term in online.terms(method.segmenter, stage.batch, 0, contextlib.nullcontext)]
        torch.stack([*terms, *method(stage.batch, 0).values()]).sum().backward()
        stage.optimizer.zero_grad(set_to_none=True)

    one_by_one, at_once = (measuring().peak_tensor_bytes(call) for call in (stage.step, all_terms_at_once))
    assert one_by_one < 0.7 * at_once, one_by_one / at_once


def test_a_step_out_of_memory_is_done_again_in_parts_that_see_the_same_mixes(tmp_path: Path) -> None:
    from test_memory import limit

    short, _ = toy_trainer(toy_config("online_self_training", **SMALL), tmp_path / "short")
    limit(short, 1)
    parted, _ = toy_trainer(
        toy_config("online_self_training", **SMALL, trainer__batch_size=1, trainer__accumulate=4), tmp_path / "parted"
    )
    for trainer in (short, parted):
        trainer.run()
    assert equal_state(short.method.state_dict(), parted.method.state_dict())


def test_changed_target_labels_change_no_weight_of_teacher_or_student(tmp_path: Path) -> None:
    config = toy_config("sdca", **SMALL)
    trainer, _ = toy_trainer(config, tmp_path / "true")
    poisoned, _ = toy_trainer(config, tmp_path / "false")
    poisoned.evaluation = replace(poisoned.evaluation, target=_Poisoned(poisoned.evaluation.target))
    for each in (trainer, poisoned):
        each.run()
    assert equal_state(trainer.method.state_dict(), poisoned.method.state_dict())


def test_shared_stages_are_the_same_with_and_without_online_terms_and_their_results_are_taken_over(
    tmp_path: Path,
) -> None:
    plain, online = toy_config("sdca"), toy_config("sdca", **SMALL)
    with_terms = replace(online, warmup=plain.warmup, trainer=plain.trainer)
    assert [key.hash for key in stage_keys(plain, "data")] == [key.hash for key in stage_keys(with_terms, "data")]
    shared, reports = toy_trainer(plain, tmp_path / "shared", method_class("sdca").stages[:2])
    shared.run()
    trial, _ = toy_trainer(online, tmp_path / "trial", method_class("sdca").stages[2:])
    trial.start_from(reports.checkpoint(len(reports.metrics) - 1))
    state = trial.method.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in shared.method.state_dict().items())
    trial.run()


def test_a_warm_up_of_0_steps_begins_with_the_first_weights(tmp_path: Path) -> None:
    trainer, reports = toy_trainer(toy_config("online_self_training", **SMALL | {"warmup__steps": 0}), tmp_path)
    trainer.run()
    assert [metrics["step"] for metrics in reports.metrics] == [0, 2, 4]
    assert reports.metrics[0]["stage_finished"]


@pytest.mark.parametrize("keep", [False, True])
def test_a_finish_starts_from_the_teacher_where_it_is_deployed(keep: bool, tmp_path: Path) -> None:
    trial = toy_config("sdca", **SMALL, online__deploys="teacher")
    trainer, reports = toy_trainer(trial, tmp_path / "trial")
    trainer.run()
    teacher = online_of(trainer).teacher.network.state_dict()
    assert not equal_state(teacher, trainer.method.segmenter.state_dict())
    config = keeping_losses(trial, online__enabled=True) if keep else toy_config("self_training")
    finish, _ = toy_trainer(config, tmp_path / "finish", method_class("self_training").plan(config.method)[1:])
    finish.start_from(reports.checkpoint(len(reports.metrics) - 1))
    assert equal_state(finish.method.deployed.state_dict(), teacher)
    if keep:
        assert online_of(finish).steps == online_of(trainer).steps
        assert equal_state(online_of(finish).teacher.network.state_dict(), teacher)


def test_the_deployed_teacher_is_what_is_loaded_for_use(tmp_path: Path) -> None:
    from segadapt.platform.deployment.deployed import load_deployed
    from segadapt.platform.storage.checkpoints import write_configuration

    config = toy_config("plca", **SMALL, online__deploys="teacher")
    trainer, reports = toy_trainer(config, tmp_path)
    trainer.run()
    checkpoint = reports.checkpoint(len(reports.metrics) - 1)
    write_configuration(checkpoint, config.as_dict())
    network = load_deployed(checkpoint, {}, torch.device("cpu")).network
    assert equal_state(network.state_dict(), online_of(trainer).teacher.network.state_dict())
    assert not network.align_corners


def test_the_teacher_shares_what_is_never_trained_and_follows_the_rest() -> None:
    student = build_segmenter("compact", 3)
    student.backbone.requires_grad_(False)
    online = OnlineTerms(student, OnlineConfig(enabled=True))
    frozen = {id(weight) for weight in student.backbone.parameters()}
    copied = [weight for weight in online.teacher.parameters() if id(weight) not in frozen]
    assert len(copied) == len(list(student.head.parameters()))
    with torch.no_grad():
        for weight in student.head.parameters():
            weight += 1
    online.follow(student)
    for weight, trained in zip(copied, student.head.parameters(), strict=True):
        torch.testing.assert_close(weight, trained - 0.5)


@pytest.mark.parametrize("norm", ["batch", "running", "average"])
def test_batch_norm_of_the_teacher_takes_the_statistics_that_are_asked_for(norm: Any) -> None:
    student = build_segmenter("timm:test_resnet", 3, head="linear")
    online = OnlineTerms(student, OnlineConfig(enabled=True, teacher_norm=norm))
    with torch.no_grad():
        for name, buffer in student.named_buffers():
            if name.endswith("running_mean"):
                buffer += 1
    images = torch.randn(2, 3, 64, 64)
    before = {name: buffer.clone() for name, buffer in online.teacher.network.named_buffers()}
    labels = online.labelled(images, None, torch.no_grad).labels
    running = [name for name in before if name.endswith("running_mean")]
    now = dict(online.teacher.network.named_buffers())
    assert all(torch.equal(now[name], before[name]) for name in running) == (norm != "batch")
    assert not any(module.training for module in online.teacher.modules()), "it is evaluated as any network is"
    online.follow(student)
    students = dict(student.named_buffers())
    share = {"running": 1.0, "average": 0.5}.get(norm)
    for name in running if share is not None else []:
        assert share is not None
        torch.testing.assert_close(now[name], before[name] + share * (students[name] - before[name]))
    assert labels.shape == (2, 64, 64)


def batches_of(augmentation: AugmentationConfig, online: OnlineConfig | None, *, flipped: bool = False) -> BatchSource:
    data, _ = load_data(toy_config("sdca").data)
    return BatchSource(data, augmentation, (0, "adapt"), 4, ("source", "target"), (), flipped=flipped, online=online)


def test_margins_and_padding_are_not_trusted_and_follow_crop_and_flip() -> None:
    online = OnlineConfig(margins=(0.25, 0.0, 0.0, 0.5))
    whole = batches_of(AugmentationConfig(flip=0.0), online).batch(0).target_trusted
    expected = torch.zeros(32, 64, dtype=torch.bool)
    expected[8:, :32] = True
    assert whole is not None
    assert all(torch.equal(mask, expected) for mask in whole)
    flipped = batches_of(AugmentationConfig(flip=1.0), online, flipped=True).batch(0).target_trusted
    assert flipped is not None
    assert all(torch.equal(mask, expected.flip(-1)) for mask in flipped)
    padded = batches_of(AugmentationConfig(crop=(48, 64)), OnlineConfig()).batch(0).target_trusted
    assert padded is not None
    assert padded[:, :32].all()
    assert not padded[:, 32:].any()
    assert batches_of(AugmentationConfig(), None).batch(0).target_trusted is None


def test_draws_of_rare_classes_show_them_and_no_class_fills_a_crop() -> None:
    crop = AugmentationConfig(crop=(24, 24))
    person = 6

    def share(online: OnlineConfig | None) -> float:
        source = batches_of(crop, online)
        labels = torch.cat([source.batch(index).source_labels for index in range(12)])
        return (labels == person).flatten(1).any(1).float().mean().item()

    rare = share(OnlineConfig(rare_class_temperature=0.01))
    assert rare > share(None) + 0.1
    once = batches_of(crop, OnlineConfig(crop_tries=1)).batch(0).source_labels
    assert torch.equal(once, batches_of(crop, None).batch(0).source_labels), "a first draw is any method's"


def test_a_batch_is_numbered_the_same_however_it_is_parted() -> None:
    whole = batches_of(AugmentationConfig(), OnlineConfig())
    parted = replace(whole, batch_size=2)
    numbers = [number for index in (2, 3) for number in parted.batch(index).numbers]
    assert tuple(numbers) == whole.batch(1).numbers == (4, 5, 6, 7)


def test_colour_and_blur_are_torchvisions_and_leave_other_images_alone() -> None:
    import torchvision.transforms.v2.functional as tvf

    images = torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    change = Change(brightness=1.1, contrast=0.9, saturation=1.2, hue=-0.1, sigma=1.1)
    smooth = blurred(images, [None, change])
    assert torch.equal(smooth[0], images[0])
    long = tvf.gaussian_blur(images[1], kernel_size=[31, 31], sigma=[1.1, 1.1])
    torch.testing.assert_close(smooth[1], long, rtol=0, atol=1e-4)
    colored = jittered(images, [change, None])
    assert torch.equal(colored[1], images[1])
    expected = tvf.adjust_contrast(tvf.adjust_brightness(images[0], 1.1), 0.9)
    torch.testing.assert_close(colored[0], tvf.adjust_hue(tvf.adjust_saturation(expected, 1.2), -0.1))
    grey = torch.full((1, 3, 4, 4), 0.5)
    turned = Change(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.2, sigma=1.0)
    torch.testing.assert_close(jittered(grey, [turned]), grey)
    torch.testing.assert_close(jittered(0 * grey, [turned]), 0 * grey)
    assert torch.equal(blurred(images[..., :1, :1], [change, change]), images[..., :1, :1])


def test_an_image_is_restored_to_what_it_was_before_it_was_normalised() -> None:
    image = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    for name in ("compact", "deeplabv2_resnet101_caffe"):
        network = build_segmenter(name, 2)
        torch.testing.assert_close(network.restore(network.normalise(image)), image / 255)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("source_only", {"online.enabled": True}, r"online\.enabled must be false for source_only"),
        (
            "online_self_training",
            {"online.enabled": False},
            r"must be true .*online_self_training\.online\.enabled=true",
        ),
        ("sdca", {"online.threshold": 1.5}, r"online\.threshold must lie in \[0, 1\], but got 1\.5"),
        ("sdca", {"online.margins": [0, 0, 0, 1]}, r"online\.margins must lie in \[0, 1\)"),
        ("sdca", {"online.alpha": 0.9}, r"no setting 'online\.alpha'"),
    ],
)
def test_settings_that_cannot_be_are_refused(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(method, settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"online.mask": "token"}, r"online\.mask=token needs a plain transformer.*Set online\.mask=block"),
        ({"online.feature_distance": 0.005}, r"must be 0 without network\.weights, but got 0\.005"),
        ({"augmentation.source_size": [32, 48]}, r"source images have 32 x 48 pixels and target images 64 x 128"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_planned(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    from segadapt.platform.storage.folders import Storage
    from segadapt.platform.trial.checking import checked_config

    with pytest.raises(UsageError, match=message):
        checked_config("online_self_training", settings, Storage(tmp_path))


def test_features_of_things_stay_near_the_pretrained_ones(tmp_path: Path) -> None:
    torch.manual_seed(3)
    weights = tmp_path / "pretrained.pth"
    pretrained = build_segmenter("timm:test_resnet", 8, head="linear")
    torch.save({f"segmenter.{name}": value for name, value in pretrained.state_dict().items()}, weights)
    config = toy_config(
        "online_self_training",
        **SMALL | {"trainer__steps": 2},
        network__name="timm:test_resnet",
        network__head="linear",
        network__weights=str(weights),
        online__feature_distance=0.005,
        online__feature_purity=0.2,
    )
    trainer, reports = toy_trainer(config, tmp_path, method_class("online_self_training").stages[1:])
    online = online_of(trainer)
    assert list(online.things) == [6, 7], "person and car"
    online.things = range(8)  # cells of this network are as large as what is left of the image
    passes = Counter[bool]()
    trainer.method.segmenter.backbone.register_forward_hook(lambda module, *_: passes.update([module.training]))
    trainer.run()
    assert reports.metrics[-1]["loss/online_feature_distance"] > 0
    assert passes[True] == 2 * 3, "source, mixed and masked images alone pass the network"
    state, network = trainer.method.state_dict(), trainer.method.segmenter.state_dict()
    assert len(state) == 2 * len(network) + 1, "the pretrained network is no part of the state"


def test_whether_the_terms_are_added_can_be_searched_and_both_ways_are_checked_first(tmp_path: Path) -> None:
    from segadapt.platform.experiment.planning import SearchRequest, plan_search
    from segadapt.platform.storage.folders import Place

    place, either = Place(tmp_path), {"online.enabled": "choice(false, true)"}
    record = plan_search(SearchRequest(methods=["sdca"], settings=either), place)
    assert record.candidates["sdca"].first["online.enabled"] is False
    with pytest.raises(UsageError, match=r"online\.mask=token needs a plain transformer"):
        plan_search(SearchRequest(methods=["sdca"], settings={**either, "online.mask": "token"}), place)
    with pytest.raises(UsageError, match=r"add online_self_training\.online\.enabled=true"):
        plan_search(SearchRequest(methods=["all"], settings=either), place)
    alone = {**either, "online_self_training.online.enabled": True}
    candidates = plan_search(SearchRequest(methods=["all"], settings=alone), place).candidates
    assert [method for method, each in candidates.items() if "online.enabled" in each.space] == [
        method for method in candidates if method != "online_self_training"
    ]
