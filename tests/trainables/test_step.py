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
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from toy import toy_config, toy_trainer

from segadapt.trainables.core.data.batch import DomainBatch
from segadapt.trainables.core.labelling.features import count_values
from segadapt.trainables.core.method import Method
from segadapt.trainables.core.networks import build_segmenter, recompute_blocks
from segadapt.trainables.core.training.config import TrainerSettings
from segadapt.trainables.core.training.gradients import autocast
from segadapt.trainables.core.training.optimizer import build_optimizer
from segadapt.trainables.core.training.timing import StepTimes
from segadapt.trainables.core.training.trainer import Trainer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BATCH = 4
PAIRS_AND_LEVELS = 2 * BATCH

WAITS = {
    "source_only": 0,
    "sdca": 0,
    "bicl": 0,
    "clst": 0,
    # Whether a mode is to be put anew. Beside that, random draws and the images' numbers are read, on the CPU always.
    "drsl": 1 + BATCH + 1,
    # Per image pair and level: the labelled, the reached and the valid cycles, and those they pass.
    "plca": 4 * PAIRS_AND_LEVELS,
}
"""Reads of values that a step may make, each of which a GPU would be waited for."""

PEAKS = {"source_only": 1.02, "sdca": 1.05, "bicl": 1.08, "drsl": 1.46, "clst": 1.05, "plca": 2.6}
"""Tensor memory of a step at its peak, by that of passing the same images through the network and back.

Measured, and 0.02 to 0.08 more. One copy of the features of both domains is 0.05.
"""

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense,  # item, bool, int, float
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,  # its length depends on the values
    aten.lift_fresh,  # torch.tensor(...): a copy from memory that is not pinned
}
INDEXING = {aten.index, aten.index_put, aten.index_put_}


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        by_mask = packet in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if packet in READS or by_mask:
            self.counts[str(packet)] += 1
        return func(*args, **(kwargs or {}))


class _Conversions(TorchFunctionMode):
    """`tolist` and the like read memory without an operation."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


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


def waits(step: Callable[[], object]) -> Counter[str]:
    """Return the reads of values in a step, by operation."""
    counts: Counter[str] = Counter()
    with _Conversions(counts), _Operations(counts):
        step()
    return counts


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
    def of(cls, trainer: Trainer) -> "LastStage":
        stage = trainer.plan[-1]
        optimizer = build_optimizer(trainer.method, stage, trainer.settings.optimizer, trainer.device)
        return cls(trainer, next(trainer.batches(stage)), optimizer)

    def step(self) -> None:
        """Take a step as the trainer does, of which the data are there already."""
        method = self.trainer.method
        assert self.trainer.step(iter([self.batch]), 0) is not None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        method.after_step(0)

    def network(self) -> None:
        """Pass the same images through the network and back, each domain once."""
        images = [self.batch.source_images, self.batch.target_images]
        outputs = [self.trainer.method.segmenter(domain).logits.sum() for domain in images if domain is not None]
        torch.stack(outputs).sum().backward()
        self.optimizer.zero_grad(set_to_none=True)


def with_precision(trainer: Trainer, precision: Literal["bf16", "fp32"]) -> TrainerSettings:
    return replace(trainer.settings, trainer=replace(trainer.settings.trainer, precision=precision))


@pytest.fixture(scope="module", params=WAITS)
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


def test_a_step_reads_no_more_values_than_its_bound(last_stage: LastStage) -> None:
    found = waits(last_stage.step)
    assert found.total() <= WAITS[last_stage.trainer.method.name], found


def test_losses_compute_in_float32_what_the_network_gives_in_bfloat16(last_stage: LastStage) -> None:
    trainer = last_stage.trainer
    found, terms = {}, {}
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    for precision in precisions:
        method = copy.deepcopy(trainer.method)
        torch.manual_seed(0)
        with _NarrowResults(method) as found[precision], autocast(trainer.device, precision):
            terms[precision] = method(last_stage.batch, 0)
    assert not found["fp32"].outside
    assert not found["fp32"].inside
    assert found["bf16"].inside  # otherwise nothing is shown
    # BiCL's sum of branches is its head.
    allowed = {aten.stack, aten.sum, aten.cat} if trainer.method.name == "bicl" else set()
    assert set(found["bf16"].outside) <= allowed, found["bf16"].outside
    for name, term in terms["bf16"].items():
        assert term.dtype == torch.float32, name
        assert term.item() == pytest.approx(terms["fp32"][name].item(), rel=2e-2, abs=2e-3), name


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
