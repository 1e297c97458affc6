"""What `--keep-top` removes, over any history of a search, and what a user sees of it."""

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from conftest import TINY_WORDS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

import segadapt as api
from segadapt.platform.errors import UsageError
from segadapt.platform.experiment.record import RECORD, finished_trials
from segadapt.platform.settings.objective import Objective
from segadapt.platform.storage.checkpoints import EVALUATION, best_checkpoint, checkpoints
from segadapt.platform.storage.folders import Place, Storage
from segadapt.platform.storage.retention import CheckpointRetention
from segadapt.trainables.core.data.datasets import DataConfig, load_data
from segadapt.trainables.core.training.checkpoint import MANIFEST, STATE, file_hash

MIOU, OTHER = "target_val/miou", "score/entropy"

OBJECTIVES = (MIOU, f"{MIOU},time/step", f"{MIOU}+{OTHER}")

FILES = {MANIFEST, EVALUATION, STATE}

OPEN = ("running", "paused")

FROM = {
    "report": ("running",),
    "pause": ("running",),
    "go on": ("paused",),
    "end": OPEN,
    "fail": OPEN,
    "finish": ("ended",),
    "kill": OPEN,
}
"""States of a trial from which this can happen to it."""


class Killed(BaseException):
    """The driver dies here."""


class History:
    """A search as its files and events have it: trials that report, pause and end, and a driver that may be killed."""

    def __init__(self, folder: Path, objective: str, keep_top: int) -> None:
        self.storage, self.objective, self.keep_top = Storage(folder), Objective.parse(objective), keep_top
        self.folder = self.storage.experiment("s")
        self.folder.mkdir(parents=True)
        self.states: dict[str, str] = {}
        self.reports: dict[str, list[dict[str, Any]]] = {}
        self.finished: set[str] = set()
        self.announced: set[str] = set()
        self.begin()

    def begin(self) -> None:
        """A driver starts, for the first time or after a kill."""
        self.keeper = CheckpointRetention(
            self.storage, "s", self.objective, self.keep_top, lambda: finished_trials(self.storage, "s")
        )
        self.keeper.sweep()
        self.collect()

    def collect(self) -> None:
        self.keeper.collect(
            {trial: trial for trial, state in self.states.items() if state in ("ended", "failed")},
            {trial: trial for trial, state in self.states.items() if state in OPEN},
            self.announced.add,
            lambda trial: best_checkpoint(self.folder, trial, self.objective.keeps),
        )

    def take(self, step: str, choice: int, values: tuple[float, float], kill_at: int) -> None:
        """Let this happen to one of the trials that it can happen to; nothing if there is none."""
        if step == "restart":
            self.begin()
        if step == "start":
            self.states[f"t{len(self.states)}"] = "running"
        can = [trial for trial, state in self.states.items() if state in FROM.get(step, ())]
        if step == "finish":
            can = [trial for trial in can if trial in self.reports and trial not in self.announced]
        if not can:
            return
        trial = can[choice % len(can)]
        if step == "report":
            self.report(trial, values)
        elif step == "finish":
            self.finish(trial)
        elif step == "kill":
            self.states[trial] = "ended"
            self.killed_at(kill_at)
            self.begin()
        else:
            self.states[trial] = {"pause": "paused", "go on": "running", "end": "ended", "fail": "failed"}[step]
            self.collect()

    def finish(self, trial: str) -> None:
        """Begin a finish of a trial."""
        start = next(found.path for found in checkpoints(self.folder, trial))
        record = self.storage.experiment(f"s.finish-{trial}-0") / RECORD
        record.parent.mkdir(exist_ok=True)
        record.write_text(json.dumps({"start": str(start)}))
        self.finished.add(trial)

    def report(self, trial: str, values: tuple[float, float]) -> None:
        """Write a checkpoint as Tune does, which keeps the best and the last one."""
        found = self.reports.setdefault(trial, [])
        found.append({"step": len(found), MIOU: values[0], OTHER: values[1], "time/step": values[1]})
        folder = self.folder / trial / f"checkpoint_{len(found):06d}"
        folder.mkdir(parents=True)
        (folder / STATE).write_bytes(b"weights")
        (folder / MANIFEST).write_text(json.dumps({"sha256": {STATE: file_hash(folder / STATE)}}))
        (folder / EVALUATION).write_text(json.dumps({"metrics": found[-1]}))
        best = best_checkpoint(self.folder, trial, self.objective.keeps)
        assert best is not None
        for old in checkpoints(self.folder, trial):
            if old.path not in (folder, best.path):
                shutil.rmtree(old.path)

    def killed_at(self, operation: int) -> None:
        """Remove what may go, by a driver that dies at this operation on the disk."""
        left = [operation]

        def dying(function: Any) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return function(*arguments, **named)

            return call

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "rename", dying(Path.rename))
            patch.setattr(Path, "replace", dying(Path.replace))
            patch.setattr(os, "unlink", dying(os.unlink))
            try:
                self.collect()
            except Killed:
                self.check(half_way=True)

    def best(self, trial: str) -> dict[str, Any]:
        """What a trial reached, as its user sees it."""
        return max(self.reports[trial], key=lambda found: (found[self.objective.keeps], found["step"]))

    def leading(self) -> list[str]:
        """Ended trials in the order of the leaderboard."""
        ended = [trial for trial in self.reports if self.states[trial] in ("ended", "failed")]
        scores = self.objective.scores([self.best(trial) for trial in ended])
        return [trial for _, trial in sorted(zip(scores, ended, strict=True), key=lambda found: (-found[0], found[1]))]

    def check(self, *, half_way: bool = False) -> None:
        order = self.leading()
        removed = {trial for trial in self.reports if not any(checkpoints(self.folder, trial))}
        assert removed <= self.announced, "MLflow is told before"
        assert removed <= set(order), "what may go on keeps its checkpoint"
        assert not removed & set(order[: self.keep_top])
        assert not removed & self.finished
        for trial in self.reports:
            found = best_checkpoint(self.folder, trial, self.objective.keeps)
            assert found is not None
            assert found.metrics == self.best(trial), "what it reached stays known"
            for folder in (self.folder / trial).glob("checkpoint_*"):
                assert {path.name for path in folder.iterdir()} == FILES, "whole, or not to be seen"
        if half_way:
            return
        if len(self.objective.goals) == 1:
            assert set(order) - removed == set(order[: self.keep_top]) | self.finished
        if self.objective.is_front:
            points = [self.best(trial) for trial in order]
            front = [point for point, on_front in zip(points, self.objective.front(points), strict=True) if on_front]
            kept = [tuple(self.best(trial)[goal] for goal in self.objective.goals) for trial in set(order) - removed]
            assert {tuple(point[goal] for goal in self.objective.goals) for point in front} <= set(kept)
        for trial in removed:
            assert not list((self.folder / trial).iterdir()), "nothing is left of it"


levels = st.sampled_from([0.1, 0.2, 0.3, 0.4])
steps = st.tuples(
    st.sampled_from(["start", "restart", *["report"] * 6, *FROM]),
    st.integers(0, 5),
    st.tuples(levels, levels),
    st.integers(0, 12),
)


LATER = [("start", 0, (0, 0), 0), ("report", 0, (0.2, 0.4), 0), ("end", 0, (0, 0), 0)]
"""A trial that is better in one goal and, in a front, worse in the other."""


def lives(*lives: str) -> list[Any]:
    """Histories of trials that report once, each better than the one before, and then go on in these ways."""
    return [
        (step, 0, (0.1 * (number + 1), 0.1), 3)
        for number, life in enumerate(lives)
        for step in ("start", "report", *life.split())
    ]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(OBJECTIVES), st.integers(1, 3), st.lists(steps, min_size=30, max_size=60))
@example(OBJECTIVES[1], 1, [("start", 0, (0, 0), 0), ("report", 0, (0.1, 0.1), 0), ("end", 0, (0, 0), 0), *LATER])
@example(MIOU, 1, lives("end", "kill", "end", "fail"))
@example(MIOU, 1, lives("end finish", "end finish", "end", "end"))
def test_no_history_loses_a_checkpoint_that_is_needed(objective: str, keep_top: int, history: Sequence[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        search = History(Path(folder), objective, keep_top)
        for step in history:
            search.take(*step)
            search.check()


def test_a_search_keeps_at_least_one_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--keep-top must be at least 1"):
        api.plan(["sdca"], {}, keep_top=0, place=Place(str(tmp_path)))


def forget_the_end(folder: Path, trial: str) -> None:
    """Turn Tune's state back to before a trial ended, as if the driver had been killed before it saved that."""
    (state,) = folder.glob("experiment_state-*.json")
    content = json.loads(state.read_text())
    for entry in content["trial_data"]:
        own = json.loads(entry[0])
        if own["trial_id"] == trial:
            assert own["status"] == "TERMINATED"
            entry[0] = json.dumps({**own, "status": "RUNNING"})
    state.write_text(json.dumps(content))
    (callbacks,) = folder.glob("callback-states-*.pkl")
    known = pickle.loads(callbacks.read_bytes())
    for events in known.values():
        if events is not None and "ended" in events:
            events["ended"].remove(trial)
    callbacks.write_bytes(pickle.dumps(known))
    (folder / "state_hashes.json").unlink()  # of what was saved later


@pytest.mark.slow
def test_a_search_keeps_its_best_trial_alone(
    segadapt: Callable[..., CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, storage = tmp_path / "runs" / "ray" / "s", str(tmp_path / "runs")
    words = ["--trials", "2", "--concurrent", "1", "--scheduler", "none", "--keep-top", "1", "method.rounds=1"]
    done = segadapt("search", "bicl", "--name", "s", *words, *TINY_WORDS, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished, checkpoint not kept") == 1
    first, second = api.runs("s", place=Place(storage)).rows
    assert (first.checkpoint_removed, second.checkpoint_removed) == (False, True)
    assert first.checkpoint is not None
    left = [path.parent for path in folder.glob("*/checkpoint_*")]
    assert set(left) == {Path(first.checkpoint).parent}
    assert not list(folder.glob("*/.removed_*"))
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    gone = client.get_run(second.run_id).data.tags
    assert gone["segadapt.checkpoint"] == "not kept"

    kept = client.get_run(first.run_id)
    assert {"pseudo_labels/kept", "pseudo_labels/accuracy"} <= set(kept.data.metrics)
    tables = [table["path"] for table in json.loads(kept.data.tags["mlflow.loggedArtifacts"])]
    assert tables == ["per_class_iou.json", "pseudo_labels.json"]
    table = json.loads(Path(client.download_artifacts(first.run_id, tables[1], str(tmp_path))).read_text())
    assert table["columns"] == ["class", "kept", "accuracy"]
    assert {row[0] for row in table["data"]} == set(load_data(DataConfig())[0].classes.names)

    forget_the_end(folder, gone["segadapt.trial_id"])
    resumed = segadapt("search", "--resume", "s", timeout=900)
    assert resumed.returncode == 0, resumed.stderr
    assert f"{second.name} step 8/8" in resumed.stdout
    assert "step 2/8" not in resumed.stdout, "what had ended is not run again"
    assert list(api.runs("s", place=Place(storage)).rows) == [first, second]
    assert len(list(folder.glob("*/checkpoint_*"))) == len(left)

    monkeypatch.chdir(tmp_path)
    for use in (api.export, api.finish):
        with pytest.raises(UsageError) as refused:
            use(second.name, search="s")
        assert str(refused.value) == (
            f"The checkpoint of {second.name} must be there, but was not kept: 's' keeps those of its best trials "
            f"alone (--keep-top). Name one of {first.name}; or train {second.name} again, by `segadapt train bicl` "
            "with its settings."
        )
    finished = segadapt("finish", first.name, "--search", "s", "trainer.steps=2", timeout=900)
    assert finished.returncode == 0, finished.stderr
    assert finished_trials(Storage(tmp_path / "runs"), "s") == {Path(first.checkpoint).parent.name}
