"""What a training step may cost, in counts that no machine changes: waits for the device, operations, tensor memory."""

import copy
import importlib.util
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from simulated_device import SimulatedDevice
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from toy import Reports, toy_config, toy_trainer

from segadapt.trainables.core.data.batch import DomainBatch
from segadapt.trainables.core.labelling.features import count_values
from segadapt.trainables.core.method import SOURCE_ONLY, Method, Stage, StageData
from segadapt.trainables.core.networks import build_segmenter, recompute_blocks
from segadapt.trainables.core.training.checkpoint import load_state
from segadapt.trainables.core.training.config import Precision, TrainerSettings
from segadapt.trainables.core.training.gradients import autocast, network_precision
from segadapt.trainables.core.training.optimizer import build_optimizer, move_weights, select_trained
from segadapt.trainables.core.training.progress import Progress
from segadapt.trainables.core.training.timing import StepTimes
from segadapt.trainables.core.training.trainer import Trainer
from segadapt.trainables.drsl import DRSL

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BATCH = 4

METHODS = ("source_only", "sdca", "bicl", "clst", "drsl", "plca")
VARIANTS = {
    **{name: (name, {}) for name in METHODS},
    "drsl of drawn pairs": ("drsl", {"method__alignment": "sampled", "method__confidence_weight": 0.1}),
    "drsl that puts modes": ("drsl", {"method__reseed_after": 1}),
    "bicl as released": ("bicl", {"method__variant": "released"}),
}
"""What is counted: every method as it is by default, and settings that take other paths."""

PEAKS = {"source_only": 1.02, "sdca": 1.05, "bicl": 1.08, "drsl": 1.46, "clst": 1.05, "plca": 2.6}
"""Tensor memory of a step at its peak, by that of passing the same images through the network and back.

Measured, and 0.02 to 0.08 more. One copy of the features of both domains is 0.05.
"""

aten = torch.ops.aten


class _NarrowResults(TorchDispatchMode):
    """Operations that give bfloat16, in modules of a method and outside of them."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.inside: Counter[Any] = Counter()
        self.outside: Counter[Any] = Counter()
        self._depth = 0
        for module in method.modules():
            if module is not method:
                module.register_forward_pre_hook(lambda *_: self._move(1))
                module.register_forward_hook(lambda *_: self._move(-1))

    def _move(self, depth: int) -> None:
        self._depth += depth

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves(result)
        if not func.is_view and any(isinstance(leaf, Tensor) and leaf.dtype == torch.bfloat16 for leaf in leaves):
            (self.inside if self._depth else self.outside)[func.overloadpacket] += 1
        return result


def measuring() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measuring", BENCHMARKS / "measuring.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class LastStage:
    """A trained method and a batch of its last stage, on the device as the trainer puts it there."""

    trainer: Trainer
    batch: DomainBatch
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, trainer: Trainer, stage: Stage | None = None) -> "LastStage":
        stage = stage or trainer.plan[-1]
        optimizer = build_optimizer(trainer.method, stage, trainer.settings.optimizer, trainer.device)
        return cls(trainer, next(trainer.batches(stage)), optimizer)

    def step(self) -> None:
        """Take a step as the trainer does, of which the data are there already."""
        method = self.trainer.method
        assert self.trainer.step(iter([self.batch]), 0) is not None
        move_weights(method, self.trainer.plan[-1], self.optimizer, None, self.trainer._loss_scale)
        method.after_step(0)

    def network(self) -> None:
        """Pass the same images through the network and back, each domain once."""
        images = [self.batch.source_images, self.batch.target_images]
        outputs = [self.trainer.method.segmenter(domain).logits.sum() for domain in images if domain is not None]
        torch.stack(outputs).sum().backward()
        self.optimizer.zero_grad(set_to_none=True)


def with_precision(trainer: Trainer, precision: Precision) -> TrainerSettings:
    return replace(trainer.settings, trainer=replace(trainer.settings.trainer, precision=precision))


@pytest.fixture(scope="module", params=METHODS)
def last_stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LastStage:
    # Trained in bfloat16 from start to end, and counted in float32.
    narrow = {"trainer__precision": "bf16", "trainer__steps": 4, "trainer__eval_every": 4, "warmup__steps": 1}
    trainer, _ = toy_trainer(toy_config(request.param, **narrow), tmp_path_factory.mktemp(request.param))
    trainer.run()
    trainer.settings = with_precision(trainer, "fp32")
    trainer.method.train()
    found = LastStage.of(trainer)
    found.step()  # momentum is there from now on
    return found


@pytest.fixture(scope="module", params=VARIANTS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    name, values = VARIANTS[request.param]
    trainer, _ = toy_trainer(toy_config(name, **values), tmp_path_factory.mktemp("trained"))
    trainer.run()
    return trainer


def test_no_step_of_any_stage_waits_for_the_device(trained: Trainer) -> None:
    for stage in trained.plan:
        if trained.steps[stage.name] == 0:
            continue
        select_trained(trained.method, stage, trained.trainable)
        if isinstance(trained.method, DRSL):
            trained.method.attach(stage is not SOURCE_ONLY)
        taken = LastStage.of(trained, stage)
        taken.step()  # momentum is there from now on
        with on_simulated_device(taken) as device:
            taken.step()
        assert not device.waits, (stage.name, device.waits)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Ask for kernels that repeat, and leave the process's choice as it was."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_a_deterministic_step_has_no_operation_that_does_not_repeat_on_a_gpu(trained: Trainer) -> None:
    taken = LastStage.of(trained)
    with on_simulated_device(taken) as device:
        taken.step()
        trained.method.eval()
        with torch.no_grad():
            trained.method.prepare_stage(trained.plan[-1], data_on(device, trained))
    assert not device.unrepeatable, device.unrepeatable


@pytest.mark.usefixtures("deterministic")
def test_a_deterministic_trial_has_the_results_of_any_other_on_a_cpu(tmp_path: Path) -> None:
    states = []
    for choice in (False, True):
        config = toy_config("clst", trainer__deterministic=choice)
        trainer, _ = toy_trainer(config, tmp_path / str(choice))
        trainer.run()
        assert torch.are_deterministic_algorithms_enabled() == choice
        assert torch.backends.cudnn.benchmark != choice
        states.append(trainer.method.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


def on_simulated_device(taken: "LastStage") -> SimulatedDevice:
    """Return the device that holds the method and a batch as the trainer puts it there."""
    device = SimulatedDevice()
    device.put(taken.trainer.method, taken.optimizer, list(vars(taken.batch).values()))
    device.remove(taken.batch.target_indices)  # they stay on the host
    return device


def data_on(device: SimulatedDevice, trainer: Trainer) -> StageData:
    """Return what the last stage looks at, images and labels on the device."""
    data = trainer.stage_data(trainer.plan[-1])

    def moved(batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for images, others in batches:
            device.put(images, others if others.ndim > 1 else None)
            yield images, others

    return replace(
        data,
        source_batches=lambda: moved(data.source_batches()),
        target_batches=lambda: moved(data.target_batches()),
    )


def test_losses_compute_in_float32_what_the_network_gives_in_bfloat16(last_stage: LastStage) -> None:
    trainer = last_stage.trainer
    found, terms = {}, {}
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        method = copy.deepcopy(trainer.method)
        torch.manual_seed(0)
        with _NarrowResults(method) as found[precision], autocast(trainer.device, precision):
            terms[precision] = method(last_stage.batch, 0)
    assert not found["fp32"].outside
    assert not found["fp32"].inside
    assert found["bf16"].inside  # otherwise nothing is shown
    # BiCL's sum of branches is its head; DRSL picks cells before it widens them.
    allowed = {"bicl": {aten.stack, aten.sum, aten.cat}, "drsl": {aten.index}}.get(trainer.method.name, set())
    assert set(found["bf16"].outside) <= allowed, found["bf16"].outside
    for name, term in terms["bf16"].items():
        assert term.dtype == torch.float32, name
        assert term.item() == pytest.approx(terms["fp32"][name].item(), rel=2e-2, abs=2e-3), name


def test_evaluations_and_labels_are_of_the_precision_of_training_and_networks_alone_are_narrow(
    last_stage: LastStage, tmp_path: Path
) -> None:
    trainer = copy.copy(last_stage.trainer)
    trainer.method, stage = copy.deepcopy(trainer.method), trainer.plan[-1]
    trainer.settings = with_precision(trainer, "bf16")
    optimizer = build_optimizer(trainer.method, stage, trainer.settings.optimizer, trainer.device)
    reports = Reports(tmp_path)
    trainer.report = reports
    with _NarrowResults(trainer.method) as preparing:
        for planned in trainer.plan:
            trainer._begin_stage(planned, 0, optimizer)
    with _NarrowResults(trainer.method) as evaluating:
        trainer.evaluate_and_report(stage, 0, trainer.steps[stage.name], optimizer, Progress())
    assert not preparing.outside, preparing.outside
    assert preparing.inside or trainer.method.name in ("source_only", "plca")  # they prepare nothing
    assert not evaluating.outside, evaluating.outside
    assert evaluating.inside
    narrow = reports.metrics[-1]
    trainer.settings = with_precision(trainer, "fp32")
    trainer.evaluate_and_report(stage, 0, trainer.steps[stage.name], optimizer, Progress())
    assert narrow["target_val/miou"] == pytest.approx(reports.metrics[-1]["target_val/miou"], abs=0.02)


def test_float16_is_trained_with_scaled_losses_and_resumes_exactly(tmp_path: Path) -> None:
    config = toy_config("sdca", trainer__precision="fp16")
    whole, reports = toy_trainer(config, tmp_path / "whole")
    whole.run()
    assert all(parameter.isfinite().all() for parameter in whole.method.parameters())
    again, resumed = toy_trainer(config, tmp_path / "again")
    again.run(reports.checkpoint(len(reports.metrics) - 2))
    ends = [each.metrics[-1] for each in (reports, resumed)]
    assert ends[0]["loss/total"] == ends[1]["loss/total"]
    states = (trainer.method.state_dict() for trainer in (whole, again))
    torch.testing.assert_close(*states, rtol=0, atol=0)
    scale = load_state(reports.checkpoint(len(reports.metrics) - 2))["loss_scale"]
    assert scale["scale"] > 1


def test_a_step_whose_scaled_gradients_overflow_changes_no_weight_and_halves_the_scale(tmp_path: Path) -> None:
    trainer, _ = toy_trainer(toy_config("source_only", trainer__precision="fp16"), tmp_path)
    scale = trainer._loss_scale
    scale.load_state_dict({**scale.state_dict(), "scale": 2.0**100})
    step = LastStage.of(trainer)
    before = {name: value.clone() for name, value in trainer.method.state_dict().items()}
    assert trainer.step(iter([step.batch]), 0) is not None
    move_weights(trainer.method, trainer.plan[-1], step.optimizer, 1.0, scale)
    assert all(torch.equal(value, before[name]) for name, value in trainer.method.state_dict().items())
    assert scale.get_scale() == 2.0**99


def test_scaling_losses_waits_for_nothing(tmp_path: Path) -> None:
    trainer, _ = toy_trainer(toy_config("sdca", trainer__precision="fp16"), tmp_path)
    trainer.run()
    taken = LastStage.of(trainer)
    groups = [{**group, "fused": True} for group in taken.optimizer.param_groups]  # as on a GPU
    taken.optimizer = torch.optim.SGD(groups, momentum=0.9, fused=True)
    taken.step()
    device = on_simulated_device(taken)
    device.put(trainer._loss_scale._scale, trainer._loss_scale._growth_tracker)
    with device:
        taken.step()
    assert not device.waits, device.waits


@pytest.mark.parametrize(
    ("native_bf16", "capability", "expected"),
    [
        (True, (9, 0), torch.bfloat16),
        (False, (7, 5), torch.float16),  # a T4 emulates bfloat16
        (False, (6, 1), torch.float32),
    ],
)
def test_automatic_precision_is_what_the_card_computes_in_natively(
    native_bf16: bool, capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or native_bf16

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert network_precision(torch.device("cuda"), "auto") == expected
    assert network_precision(torch.device("cpu"), "auto") == torch.float32


def test_a_step_passes_each_image_through_the_network_once(last_stage: LastStage) -> None:
    step, network = (_convolutions(function) for function in (last_stage.step, last_stage.network))
    if last_stage.trainer.method.name == "drsl":  # the embedding, forward and by both factors
        cells = 2 * last_stage.batch.source_images[:, 0].numel() // 16
        network += 3 * 2 * cells * (64 * 256 + 256 * 256)
    assert step == network


def _convolutions(function: Callable[[], None]) -> int:
    """Return the floating point operations of all convolutions, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        function()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if "convolution" in str(operation))


def test_a_step_holds_no_more_than_its_share_over_the_network(last_stage: LastStage) -> None:
    peak_tensor_bytes = measuring().peak_tensor_bytes
    step, network = (peak_tensor_bytes(function) for function in (last_stage.step, last_stage.network))
    assert step <= PEAKS[last_stage.trainer.method.name] * network, f"{step / network:.3f} times the network's own"


def test_the_times_of_steps_and_of_waiting_for_data_are_the_hosts() -> None:
    times = StepTimes(torch.device("cpu"))
    assert times.summary() == {}

    def slow() -> Iterator[int]:
        for number in range(10):
            time.sleep(0.03 if number < 9 else 0.3)
            yield number

    for _ in times.waiting(slow()):
        time.sleep(0.01)
        times.step_ended()
    found = times.summary()
    assert 39 <= found["time/step_median_ms"] < found["time/step_p95_ms"]
    assert found["time/step_p95_ms"] >= 309
    assert 0.5 < found["time/data_wait_share"] < 1
    times.restart()
    assert times.summary() == {}


def test_blocks_computed_anew_change_no_weight_and_hold_less(tmp_path: Path) -> None:
    states, peaks = [], []
    for recompute in (False, True):
        config = toy_config("bicl", warmup__steps=1, trainer__steps=4, trainer__recompute=recompute)
        trainer, _ = toy_trainer(config, tmp_path / str(recompute))
        trainer.run()
        states.append(trainer.method.state_dict())
        step = LastStage.of(trainer).step
        peaks.append(measuring().peak_tensor_bytes(step))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert peaks[1] < 0.9 * peaks[0], peaks


def test_blocks_with_trained_batch_norm_are_not_computed_anew() -> None:
    with pytest.raises(ValueError, match="without trained batch norm"):
        recompute_blocks(build_segmenter("lraspp_mobilenet_v3_large", 8))


def test_counting_with_known_bins_equals_bincount() -> None:
    for dtype in (torch.int32, torch.int64):
        values = torch.randint(0, 7, (3, 50), generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(count_values(values, 9), torch.bincount(values.flatten(), minlength=9))
    assert torch.equal(count_values(torch.zeros(0, dtype=torch.int64), 2), torch.zeros(2, dtype=torch.int64))


def test_the_benchmark_of_the_step_runs_at_a_reduced_size_of_the_papers(tmp_path: Path) -> None:
    words = (
        "--setting paper --device cpu --scale 0.05 --steps 1 --rounds 1 --methods drsl --networks compact --json out"
    )
    subprocess.run([sys.executable, str(BENCHMARKS / "step.py"), *words.split()], cwd=tmp_path, check=True, timeout=300)
    record = json.loads((tmp_path / "out").read_text())
    forms = record["results"][0]["forms"]
    assert min(forms[form]["images_per_s"] for form in ("trainer", "bare", "literal")) > 0
    assert set(forms["trainer"]["parts_s"]) == {"data", "forward", "losses", "backward", "optimiser"}
    assert forms["trainer"]["peak_mb"] < forms["literal"]["peak_mb"]


def test_the_benchmark_measures_a_step_on_pseudo_labels(tmp_path: Path) -> None:
    script, found = BENCHMARKS / "step.py", tmp_path / "found.json"
    words = ["--methods", "bicl", "--forms", "trainer", "--steps", "1", "--rounds", "1", "--json", str(found)]
    subprocess.run([sys.executable, str(script), *words], check=True, capture_output=True, timeout=300)
    (row,) = json.loads(found.read_text())["results"]
    assert row["forms"]["trainer"]["evaluation_s"] > 0
