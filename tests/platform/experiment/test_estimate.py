"""What searches cost: predicted, limited, accounted for; and what becomes of trials that do not fit."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import TINY, TINY_WORDS, cluster_without_token
from mlflow import MlflowClient
from optuna.trial import TrialState

import segadapt as api
from segadapt.platform.errors import UsageError
from segadapt.platform.experiment.estimate import Estimate, _problems, _removed, available_memory
from segadapt.platform.experiment.ledger import GpuHours, Ledger, spent_hours
from segadapt.platform.experiment.record import Record
from segadapt.platform.settings.resources import Allocation, Resources
from segadapt.platform.storage.folders import Place, Storage

OUT_OF_MEMORY = '''
"""Makes SDCA run out of memory at any temperature but the published one."""
import importlib.abc
import importlib.util
import sys


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "segadapt.trainables.sdca":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_patch(module):
            import torch

            load(module)
            forward = module.SDCA.forward

            def short(self, batch, step):
                if self.config.temperature != 100:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                return forward(self, batch, step)

            module.SDCA.forward = short

        spec.loader.exec_module = load_and_patch
        return spec


sys.meta_path.insert(0, Finder())
'''


@pytest.fixture(scope="module")
def estimated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, Estimate, Path]:
    """The estimate of a search of CLST, whose rounds need pseudo labels, centroids and averaged predictions."""
    folder = tmp_path_factory.mktemp("estimated")
    said: list[str] = []
    plan = api.plan("clst", TINY | {"method.rounds": 2}, trials=4, place=Place(folder / "runs"), say=said.append)
    found = plan.estimate()
    assert said == ["measuring 4 steps of each stage of clst ..."]
    return plan.record, found, folder


def test_an_estimate_measures_every_stage_and_keeps_nothing(estimated: tuple[Record, Estimate, Path]) -> None:
    _, found, folder = estimated
    assert not list(folder.iterdir())
    probe = found.methods["clst"].probe
    assert list(probe.stages) == ["source_only", "centroids", "round_1", "round_2"]
    assert probe.stages["centroids"].step_s == 0
    assert probe.stages["round_1"] == probe.stages["round_2"], "rounds of a method cost the same"
    assert min(probe.stages[name].step_s for name in ("source_only", "round_1")) > 0
    assert min(probe.stages[name].artifact_bytes for name in ("round_1", "round_2")) > 0, "pseudo labels"
    assert 100 * 2**20 < probe.memory_bytes < 4 * 2**30
    assert probe.micro_batch == TINY["trainer.batch_size"]
    found.check()


def test_an_estimate_adds_up(estimated: tuple[Record, Estimate, Path]) -> None:
    record, found, _ = estimated
    cost = found.methods["clst"]
    probe, label = cost.probe, cost.probe.stages["round_1"]
    steps, evaluations = 8, 4 + 1  # the stage of the centroids ends with an evaluation too
    expected = probe.start_s + probe.stages["centroids"].preparation_s + 2 * label.preparation_s
    assert cost.trial_s == pytest.approx(expected + steps * label.step_s + evaluations * probe.evaluation_s)
    assert 0 < cost.first_rung_s < cost.early_stopped_s < cost.trial_s
    assert cost.shared_s == pytest.approx(
        probe.start_s
        + probe.stages["source_only"].preparation_s
        + 4 * probe.stages["source_only"].step_s
        + 2 * probe.evaluation_s
    )
    waves = record.trials / found.concurrent
    assert found.search_s == pytest.approx(cost.shared_s + waves * cost.trial_s)
    assert found.early_stopped_s < found.search_s
    assert found.storage_bytes == pytest.approx(
        record.trials * cost.trial_bytes + cost.shared_bytes + probe.checkpoint_bytes, abs=2
    )


def test_checkpoints_that_are_not_kept_take_no_disk(estimated: tuple[Record, Estimate, Path]) -> None:
    record, _, _ = estimated
    few = dataclasses.replace(record, trials=10, keep_top=1)
    assert _removed(few, concurrent=2) == 7
    assert _removed(dataclasses.replace(few, rerank=3, seeds=4), concurrent=2) == 5 + 7
    assert _removed(dataclasses.replace(few, scheduler="asha-promote"), concurrent=2) == 0
    assert _removed(dataclasses.replace(few, objective="target_val/miou,time/step"), concurrent=2) == 0
    assert _removed(dataclasses.replace(few, keep_top=None), concurrent=2) == 0


def test_what_cannot_fit_is_refused_all_at_once(estimated: tuple[Record, Estimate, Path]) -> None:
    record, found, folder = estimated
    short = dataclasses.replace(record, time_budget_s=1e-3)
    small = dataclasses.replace(found, memory_limit=2**20, free_bytes=2**10)
    refused = dataclasses.replace(small, problems=tuple(_problems(small, short, Storage(folder / "runs"))))
    with pytest.raises(UsageError) as raised:
        refused.check()
    memory, budget, disk = str(raised.value).splitlines()
    assert memory.startswith("A worker of clst must fit 0.00 GiB (process memory, ")
    assert budget.startswith("--time-budget must let a trial of clst reach the first rung, after about ")
    assert disk.startswith("The disk of --storage must have about ")


def test_a_method_whose_steps_fail_is_refused_with_the_reason(segadapt: Any, tmp_path: Path) -> None:
    done = segadapt("search", "source_only", "--dry-run", "optimizer.lr=1e12", *TINY_WORDS)
    assert done.returncode == 2, done.stdout
    assert "A few steps of source_only must run on this machine, but: " in done.stderr
    assert "became nan" in done.stderr
    assert not list(tmp_path.iterdir())


def test_available_memory_is_what_this_machine_has() -> None:
    assert 0 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_hours_are_counted_while_trials_run_and_over_sessions(tmp_path: Path) -> None:
    now = [0.0]
    storage = Storage(tmp_path)

    def ledger(name: str, resources: Allocation) -> Ledger:
        return Ledger(storage.experiment(name), resources, clock=lambda: now[0])

    stages = ledger("s.stages-sdca", Allocation(workers=2, gpus=1.0, cpus=4))
    stages.start("warm-up")
    now[0] += 1800
    stages.stop("warm-up")
    stages.save()

    first = ledger("s", Allocation(workers=2, gpus=0.5, cpus=4))
    limit = GpuHours(3.0, first, spent_hours(storage, "s", "gpu", stages_only=True))
    first.start("a")
    now[0] += 3600
    first.start("b")
    first.stop("a")
    now[0] += 1800
    assert (first.trial_hours("a"), first.trial_hours("b"), first.gpu_hours()) == (1.0, 0.5, 1.5)
    assert not limit.spent()
    first.keep()  # killed here
    now[0] += 99999

    second = ledger("s", Allocation(workers=1, gpus=1.0, cpus=4))
    limit = GpuHours(3.0, second, spent_hours(storage, "s", "gpu", stages_only=True))
    second.start("b")
    now[0] += 1800
    assert (second.trial_hours("b"), second.gpu_hours()) == (1.0, 2.0)
    assert limit.spent(), "with the hour of the shared stages"
    second.stop("b")
    second.save()
    assert spent_hours(storage, "s", "gpu") == 3.0
    assert spent_hours(storage, "s", "cpu") == 4.0 + 8.0 + 4.0 + 2.0


def test_gpu_hours_without_gpus_are_refused(segadapt: Any) -> None:
    done = segadapt("search", "sdca", "--max-gpu-hours", "1", "--gpus-per-trial", "0", "--dry-run", *TINY_WORDS)
    assert done.returncode == 2
    assert "Use --time-budget SECONDS instead." in done.stderr


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a cluster with a GPU that Ray only counts, and where memory is short for most trials of SDCA."""
    folder = tmp_path_factory.mktemp("patched")
    (folder / "sitecustomize.py").write_text(OUT_OF_MEMORY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        with cluster_without_token(num_cpus=2, num_gpus=1, include_dashboard=False) as started:
            yield started.address


def search(folder: Path, address: str, gpus: float, values: dict[str, Any], **plan: Any) -> tuple[Any, dict[str, Any]]:
    """Run a search; returns its outcome and its MLflow runs by name."""
    resources = Resources(launcher="inprocess", gpus=gpus)
    place = Place(folder / "runs")
    outcome = api.search("sdca", TINY | values, place=place, address=address, resources=resources, **plan)
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name(outcome.name)
    assert experiment is not None
    return outcome, {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


@pytest.fixture(scope="module")
def short(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict[str, Any]]:
    """A folder with a search whose second trial does not fit, its outcome and its runs."""
    folder = tmp_path_factory.mktemp("short")
    return folder, *search(folder, cluster, 0.25, {}, trials=2, name="short")


@pytest.mark.slow
def test_a_trial_that_never_fits_fails_as_infeasible_everywhere(short: tuple[Path, Any, dict[str, Any]]) -> None:
    folder, outcome, runs = short
    assert outcome.failed == 1
    run = runs["sdca-002"]
    assert (run.info.status, run.data.tags["segadapt.state"]) == ("FAILED", "infeasible")
    assert run.data.tags["segadapt.failure"].startswith("infeasible: One image of each domain must fit the device")
    study = optuna.load_study(study_name="short", storage=f"sqlite:///{folder}/runs/optuna.db")
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.PRUNED]
    assert [trial.constraints for trial in study.trials] == [{}, {"memory": 1.0}], "samplers learn from it"
    rows = {row.name: row for row in api.runs("short", place=Place(str(folder / "runs"))).rows}
    assert (rows["sdca-001"].state, rows["sdca-002"].state) == ("finished", "infeasible")
    assert runs["sdca-001"].data.metrics["memory/micro_batch"] == 4
    parent = runs["short"].data.metrics
    hours = [runs[name].data.metrics["cost/hours"] for name in ("sdca-001", "sdca-002", "source_only")]
    assert min(hours) > 0
    assert parent["cost/gpu_hours"] == pytest.approx(0.25 * sum(hours), rel=1e-6)


@pytest.mark.slow
def test_a_search_ends_when_its_gpu_hours_are_spent(cluster: str, short: tuple[Path, Any, dict[str, Any]]) -> None:
    settings = {"method.temperature": 100.0, "trainer.steps": 100_000, "trainer.eval_every": 100}
    outcome, runs = search(short[0], cluster, 1.0, settings, trials=5, name="spent", max_gpu_hours=5 / 3600)
    assert (outcome.failed, outcome.interrupted) == (0, False)
    assert runs["sdca-001"].data.tags["segadapt.state"] == "out of GPU hours"
    assert 5 <= 3600 * runs["spent"].data.metrics["cost/gpu_hours"] < 100
    assert "sdca-002" not in runs
