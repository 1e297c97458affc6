"""A step that does not fit the device: injected faults, real training."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_trainer import equal_state
from toy import toy_config, toy_trainer

from segadapt.trainables.core.training.checkpoint import load_state
from segadapt.trainables.core.training.gradients import (
    InfeasibleError,
    SmallerMicroBatchError,
    noted_micro_batch,
    smaller_micro_batch,
)
from segadapt.trainables.core.training.trainer import Trainer


def limit(trainer: Trainer, images: int, from_step: int = 0) -> None:
    """Run out of memory at the end of a forward over more source images: everything it moves has been moved."""

    def fail(module: Any, arguments: Any, terms: Any) -> None:
        batch, step = arguments
        if len(batch.source_images) > images and step >= from_step:
            torch.rand(3)  # drawn by a network with dropout
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    trainer.method.register_forward_hook(fail)


@pytest.mark.parametrize("name", ["sdca", "drsl"])  # DRSL's forward moves parameters too
def test_a_step_out_of_memory_is_done_again_in_smaller_parts_as_if_nothing_had_been(name: str, tmp_path: Path) -> None:
    short, short_reports = toy_trainer(toy_config(name), tmp_path / "short")
    limit(short, 1)
    parted, parted_reports = toy_trainer(
        toy_config(name, trainer__batch_size=1, trainer__accumulate=4), tmp_path / "parted"
    )
    for trainer in (short, parted):
        trainer.run()
    assert [metrics["memory/micro_batch"] for metrics in short_reports.metrics] == [1] * len(short_reports.metrics)
    assert equal_state(short.method.state_dict(), parted.method.state_dict())
    for mine, theirs in zip(short_reports.metrics, parted_reports.metrics, strict=True):
        assert {key: value for key, value in mine.items() if key.startswith(("loss/", "target_val/"))} == {
            key: value for key, value in theirs.items() if key.startswith(("loss/", "target_val/"))
        }
    note = short_reports.metrics[-1]["memory_note"]
    assert "Micro-batches of 1 instead of 4 images" in note
    assert "memory_note" not in parted_reports.metrics[-1]


def test_a_later_step_that_fails_resumes_with_the_micro_batch_it_went_on_with(tmp_path: Path) -> None:
    trainer, reports = toy_trainer(toy_config("sdca"), tmp_path / "whole")
    limit(trainer, 2, from_step=3)
    trainer.run()
    sizes = [metrics["memory/micro_batch"] for metrics in reports.metrics]
    assert sizes[0] == 4
    assert sizes[-1] == 2
    first = sizes.index(2)
    resumed, resumed_reports = toy_trainer(toy_config("sdca"), tmp_path / "resumed")  # memory would suffice now
    resumed.run(reports.checkpoint(first))
    last = [r.checkpoint(len(r.metrics) - 1) for r in (reports, resumed_reports)]
    assert equal_state(load_state(last[0]), load_state(last[1]))


def test_one_image_that_does_not_fit_is_infeasible(tmp_path: Path) -> None:
    trainer, reports = toy_trainer(toy_config("source_only"), tmp_path)
    limit(trainer, 0)
    with pytest.raises(InfeasibleError, match="One image of each domain must fit the device, but step 0 of stage"):
        trainer.run()
    assert not reports.metrics


def test_memory_short_outside_a_step_is_infeasible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = toy_trainer(toy_config("source_only"), tmp_path)

    def fail(module: Any, arguments: Any) -> None:
        if not module.training:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    trainer.method.segmenter.register_forward_pre_hook(fail)
    with pytest.raises(InfeasibleError, match=r"but: CUDA out of memory\. Lower trainer\.eval_batch_size"):
        trainer.run()


def test_micro_batches_stay_equal_parts_and_a_multiple_of_the_workers() -> None:
    sizes: list[int | None] = [12]
    while sizes[-1] is not None:
        sizes.append(smaller_micro_batch(sizes[-1], 1))
    assert sizes == [12, 6, 3, 1, None]
    assert [smaller_micro_batch(size, 2) for size in (12, 6, 2)] == [6, 2, None]
    assert [smaller_micro_batch(size, 1, 2) for size in (12, 6, 3, 2)] == [6, 3, None, None]
    assert [smaller_micro_batch(size, 2, 2) for size in (12, 8, 4)] == [6, 4, None]


@pytest.mark.slow
def test_several_workers_begin_again_with_the_smaller_micro_batch(tmp_path: Path) -> None:
    import subprocess
    import sys

    script = Path(__file__).with_name("two_workers_memory.py")

    def run(attempt: str) -> list[tuple[int, str]]:
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(rank), str(tmp_path), attempt], stderr=subprocess.PIPE, text=True
            )
            for rank in range(2)
        ]
        return [(process.returncode, errors) for process in processes for _, errors in [process.communicate()]]

    failed = run("first")
    assert all(code != 0 for code, _ in failed), "the other worker does not wait for ever"
    assert SmallerMicroBatchError.__name__ in failed[1][1]
    assert noted_micro_batch(tmp_path / "artifacts") == 2
    again = run("second")
    assert [code for code, _ in again] == [0, 0], again
    one, _ = toy_trainer(toy_config("source_only", trainer__batch_size=2, trainer__accumulate=2), tmp_path / "one")
    one.run()
    two = load_state(tmp_path / "last")
    assert two["micro_batch"] == 2
    for key, value in one.method.state_dict().items():
        torch.testing.assert_close(two["state"][key], value, rtol=2e-3, atol=2e-4)


def test_a_network_that_normalises_over_images_refuses_batches_of_one_before_it_sees_any(tmp_path: Path) -> None:
    config = toy_config("source_only", network__name="deeplabv3_resnet50", trainer__batch_size=1)
    with pytest.raises(ValueError, match=r"trainer\.batch_size must be at least 2 .* but got 1"):
        toy_trainer(config, tmp_path)
    config.trainer.check_workers(1, 1)
    with pytest.raises(ValueError, match=r"at least 4 with 2 worker.* but got 2"):
        dataclasses.replace(config.trainer, batch_size=2).check_workers(2, 2)
    with pytest.raises(ValueError, match="multiple of the 2 workers, but got 3"):
        dataclasses.replace(config.trainer, batch_size=3).check_workers(2, 2)


def own_images(root: Path, size: tuple[int, int], number: int) -> str:
    """Write own data of tiny images; returns KIND:ROOT."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for part, shape, most in (("images", (*size, 3), 256), ("labels", size, 2)):
            (root / split / part).mkdir(parents=True)
            for index in range(number):
                picture = Image.fromarray(generator.integers(0, most, shape, np.uint8))
                picture.save(root / split / part / f"{index}.png")
    names = "".join(f"  - {{name: c{index}, id: {index}, color: [{index}, 0, 0]}}\n" for index in range(2))
    (root / "classes.yaml").write_text(f"classes:\n{names}")
    return f"folder:{root}"


@pytest.mark.parametrize("size", [(1, 1), (1, 40)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_images_of_one_pixel_and_fewer_images_than_a_batch_are_trained(
    size: tuple[int, int], batch_size: int, tmp_path: Path
) -> None:
    root = own_images(tmp_path / "own", size, 3)
    settings = {"trainer__batch_size": batch_size, "trainer__eval_batch_size": 2, "warmup__steps": 1}
    config = toy_config("sdca", data__source=root, data__target=root, **settings)
    trainer, reports = toy_trainer(config, tmp_path)
    trainer.run()
    assert reports.metrics[-1]["step"] == 7


def test_batch_norm_that_meets_a_single_value_says_what_to_do(tmp_path: Path) -> None:
    root = own_images(tmp_path / "own", (1, 1), 3)
    settings = {"network__name": "lraspp_mobilenet_v3_large", "trainer__batch_size": 1}
    trainer, _ = toy_trainer(toy_config("source_only", data__source=root, data__target=root, **settings), tmp_path)
    with pytest.raises(ValueError, match=r"Batch normalisation must see several values .* Raise trainer\.batch_size"):
        trainer.run()
