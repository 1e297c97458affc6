"""Trials without Ray: the function that every launcher calls, on the storage it shares with other trials."""

import json
import threading
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import TINY
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from segadapt import search_spaces
from segadapt.platform.search.searcher import FLOOR, StudySearch
from segadapt.platform.settings.config import resolve
from segadapt.platform.settings.objective import Objective
from segadapt.platform.settings.reported import End, Reported
from segadapt.platform.storage.checkpoints import newest_checkpoint
from segadapt.platform.storage.folders import Storage
from segadapt.platform.storage.stage_keys import stage_keys
from segadapt.platform.storage.stages import longest_prefix, put_damaged_aside
from segadapt.platform.trial.launchers import uploading_to
from segadapt.platform.trial.spec import TrialSpec
from segadapt.platform.trial.training import train
from segadapt.trainables import METHODS
from segadapt.trainables.core.training.checkpoint import save_state

SHORT = TINY | {"trainer.steps": 2, "trainer.eval_every": 1, "trainer.batch_size": 2, "warmup.steps": 2}


class Checkpoints:
    """Keeps every reported evaluation and its checkpoint; may stop the trial after the first of a stage."""

    def __init__(self, folder: Path, stop_before: str | None = None) -> None:
        self.folder = folder
        self.stop_before = stop_before
        self.reported: list[Reported] = []

    def __call__(self, reported: Reported, write: Any) -> None:
        if reported.stage == self.stop_before:
            raise KeyboardInterrupt
        path = self.folder / str(len(self.reported))
        path.mkdir(parents=True)
        write(path)
        self.reported.append(reported)

    @property
    def last(self) -> Path:
        return self.folder / str(len(self.reported) - 1)


def spec_of(method: str, folder: Path, **settings: Any) -> TrialSpec:
    return TrialSpec(storage=Storage(folder), experiment="test", configs={method: resolve(method, SHORT)}, **settings)


def far_end(distribution: BaseDistribution) -> Any:
    return distribution.choices[-1] if isinstance(distribution, CategoricalDistribution) else distribution.low


@pytest.mark.parametrize("method", [method.name for method in METHODS if method.name != "source_only"])
def test_trials_of_any_searched_values_start_from_the_same_shared_stages(method: str, tmp_path: Path) -> None:
    train(spec_of(method, tmp_path, shared_stages=True).trial("stages", {}), Checkpoints(tmp_path / "a"), None)
    published = sorted(tmp_path.glob("stages/*"))
    values = {key: far_end(distribution) for key, distribution in search_spaces.load(method)[0].items()}
    reports = Checkpoints(tmp_path / "b")
    train(spec_of(method, tmp_path).trial("trial", values), reports, None)
    assert reports.reported[-1].end is End.FINISHED
    assert {reported.end for reported in reports.reported[:-1]} <= {None}
    assert sorted(tmp_path.glob("stages/*")) == published


def test_shared_stages_interrupted_between_two_of_them_go_on_with_the_second(tmp_path: Path) -> None:
    spec = spec_of("sdca", tmp_path, shared_stages=True)
    interrupted = Checkpoints(tmp_path / "a", stop_before="statistics")
    with pytest.raises(KeyboardInterrupt):
        train(spec.trial("stages", {}), interrupted, None)
    resumed = Checkpoints(tmp_path / "b")
    train(spec.trial("stages", {}), resumed, interrupted.last)
    assert [reported.stage for reported in resumed.reported] == ["statistics"]
    keys = stage_keys(spec.shared_config("sdca"), str(interrupted.reported[0].fingerprint))
    assert len(longest_prefix(spec.storage, keys)) == len(keys) == 2


@pytest.mark.parametrize("name", ["state.pt", "manifest.json", "evaluation.json"])
def test_a_damaged_shared_stage_is_computed_anew(name: str, tmp_path: Path) -> None:
    spec = spec_of("sdca", tmp_path, shared_stages=True)
    reports = Checkpoints(tmp_path / "a")
    train(spec.trial("stages", {}), reports, None)
    keys = stage_keys(spec.shared_config("sdca"), str(reports.reported[0].fingerprint))
    warmup = longest_prefix(spec.storage, keys)[0]
    assert put_damaged_aside(spec.storage, keys) == []
    (warmup / name).write_bytes((warmup / name).read_bytes()[:-10])
    assert put_damaged_aside(spec.storage, keys) == ["source_only"]
    assert longest_prefix(spec.storage, keys) == []


def test_a_trial_without_its_shared_stages_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="must have been computed"):
        train(spec_of("sdca", tmp_path).trial("trial", {}), Checkpoints(tmp_path / "a"), None)


def test_no_method_of_a_joint_search_is_starved_by_early_luck(tmp_path: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {"method.temperature": FloatDistribution(0.1, 10.0, log=True)}
    searcher = StudySearch(
        spaces={"good": space, "bad": space, "worse": {}},
        first={"good": {"method.temperature": 1.0}, "bad": {"method.temperature": 2.0}, "worse": {}},
        objective=Objective(),
        sampler=partial(optuna.samplers.TPESampler, multivariate=True, group=True),
        seed=0,
        concurrent=1,
        study_name="joint",
        storage=optuna.storages.InMemoryStorage(),
    )
    proposed = []
    for number in range(60):
        values = searcher.suggest(str(number))
        proposed.append(values)
        score = {"good": 1.0, "bad": 0.5, "worse": 0.0}[values["method"]]
        searcher.on_trial_complete(str(number), {"target_val/miou": score, "step": 1, "finished": True})
    assert proposed[:3] == [
        {"method": "good", "method.temperature": 1.0},
        {"method": "bad", "method.temperature": 2.0},
        {"method": "worse"},
    ]
    for number in range(3, 61):
        counts = [[values["method"] for values in proposed[:number]].count(name) for name in ("good", "bad", "worse")]
        assert min(counts) >= int(FLOOR * number / 3)
    assert max(counts) == counts[0] >= 30, "the better method gets the most"


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(tmp_path: Path) -> None:
    for number, step in enumerate((4, 12, 8)):
        folder = tmp_path / "trial" / f"checkpoint_{number:06d}"
        folder.mkdir(parents=True)
        save_state(folder, {"step": step})
        (folder / "evaluation.json").write_text(json.dumps({"metrics": {"step": step, "target_val/miou": 0.5}}))
    newest = newest_checkpoint(tmp_path, "trial")
    assert newest == tmp_path / "trial" / "checkpoint_000001"
    state = newest / "state.pt"
    state.write_bytes(state.read_bytes()[:-10])
    assert newest_checkpoint(tmp_path, "trial") == tmp_path / "trial" / "checkpoint_000002"
    assert newest_checkpoint(tmp_path, "absent") is None


def test_ray_trains_list_of_checkpoints_is_set_aside_once_it_is_cut_short(tmp_path: Path) -> None:
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    from segadapt.platform.ray_internals.train import forget_damaged_list

    forget_damaged_list(tmp_path)
    assert not list(tmp_path.iterdir())
    listed, whole = tmp_path / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME, '{"checkpoint_results": []}'
    listed.write_text(whole)
    forget_damaged_list(tmp_path)
    assert listed.read_text() == whole
    for size in (len(whole) // 2, 0):
        listed.write_text(whole[:size])
        forget_damaged_list(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [f"broken_{listed.name}"]


def test_a_worker_uploads_its_checkpoint_again_while_storage_refuses(tmp_path: Path) -> None:
    import ray.train

    written, storage = tmp_path / "written", tmp_path / "storage"
    written.mkdir()
    (written / "state").write_text("all")
    storage.write_text("not a folder yet")
    upload = uploading_to(storage / "trial")
    back = threading.Timer(0.2, storage.unlink)
    back.start()
    uploaded = upload(ray.train.Checkpoint.from_directory(str(written)), "checkpoint_1")
    assert uploaded.path == str(storage / "trial" / "checkpoint_1")
    assert Path(uploaded.path, "state").read_text() == "all"
