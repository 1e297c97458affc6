"""Schedulers: what they decide follows from the study, whatever happens to the driver."""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from segadapt.platform.search.horizon import Horizon, levels
from segadapt.platform.search.schedulers import SCHEDULERS, PromotingRungs, StudyRungs, StudyScheduler
from segadapt.platform.search.study import TRIAL_ID
from segadapt.platform.settings.objective import Objective

MIOU = "target_val/miou"


@pytest.fixture
def study() -> Any:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(study_name="rungs", storage=InMemoryStorage(), direction="maximize")


def again(study: Any) -> Any:
    """The same study as another driver reads it."""
    return optuna.load_study(study_name="rungs", storage=study._storage)


def curves(trials: int, steps: int, seed: int = 0) -> dict[str, list[float]]:
    """Learning curves by trial: a level of its own, a rise and some noise."""
    draw = random.Random(seed)
    return {
        f"t{number}": [level + step / 40 + draw.random() / 4 for step in range(1, steps + 1)]
        for number in range(trials)
        for level in [draw.random()]
    }


def result(value: float, step: int, steps: int) -> dict[str, Any]:
    return {MIOU: value, "step": step, "finished": step == steps, "training_iteration": 1}


def begin(study: Any, names: Sequence[str]) -> None:
    for name in names:
        study.ask().set_user_attr(TRIAL_ID, name)


def test_rungs_lie_between_the_first_evaluation_and_the_end() -> None:
    assert levels(60, 240) == [60, 120]
    assert levels(60, 60) == []
    assert levels(20, 250) == [20, 40, 80, 160]


def test_rungs_decide_as_rays_asha(study: Any) -> None:
    from ray.tune.schedulers import ASHAScheduler

    reference = ASHAScheduler(time_attr="step", metric=MIOU, mode="max", max_t=16, grace_period=2, reduction_factor=2)
    draw, waiting = random.Random(0), curves(12, 16)
    steps = dict.fromkeys(waiting, 0)
    begin(study, list(waiting))
    for name in waiting:
        reference.on_trial_add(None, SimpleNamespace(trial_id=name))
    own, stopped = StudyRungs(study, Objective(), (2, 4, 8)), 0
    while waiting:
        name = draw.choice(sorted(waiting))
        steps[name] += 1
        trial, found = SimpleNamespace(trial_id=name), result(waiting[name][steps[name] - 1], steps[name], 16)
        decision = own.on_trial_result(None, trial, found)
        assert decision == reference.on_trial_result(None, trial, found) or steps[name] == 16, (name, steps[name])
        stopped += decision == "STOP"
        if decision == "STOP" or steps[name] == 16:
            del waiting[name]
    assert 0 < stopped < 12


@pytest.mark.parametrize("name", ["asha", "median", "hyperband"])
def test_decisions_repeat_themselves_after_a_restart(name: Any, study: Any) -> None:
    def make() -> StudyScheduler:
        return SCHEDULERS[name].of(again(study), Objective(), Horizon(2, 16, 1))

    waiting = curves(14, 16)
    begin(study, list(waiting))
    own, decisions = make(), []
    for trial_name, values in waiting.items():
        trial = SimpleNamespace(trial_id=trial_name)
        for step, value in enumerate(values, 1):
            found = result(value, step, 16)
            decision = own.on_trial_result(None, trial, found)
            decisions.append((trial, found, decision))
            if decision == "STOP" or step == 16:
                study.tell(
                    int(trial_name[1:]), value if step == 16 else None,
                    state=TrialState.COMPLETE if step == 16 else TrialState.PRUNED,
                )  # fmt: skip
                break
    assert {decision for _, _, decision in decisions} == {"STOP", "CONTINUE"}
    restarted = make()
    for trial, found, decision in decisions:
        if decision == "STOP":  # what went on has ended since
            assert restarted.on_trial_result(None, trial, found) == decision


def test_a_repeated_evaluation_is_recorded_once(study: Any) -> None:
    begin(study, ["t0"])
    own = StudyScheduler(study, Objective())
    for value in (0.5, 0.7):
        assert own.on_trial_result(None, SimpleNamespace(trial_id="t0"), result(value, 2, 4)) == "CONTINUE"
    assert study.trials[0].intermediate_values == {2: 0.5}


class Cluster:
    """What a scheduler sees of Tune: trials that run one report at a time, `concurrent` at once."""

    def __init__(self, study: Any, values: dict[str, list[float]], concurrent: int) -> None:
        self.study, self.values, self.concurrent = study, values, concurrent
        self.waiting = list(values)
        self.trials: dict[str, Any] = {}
        self.steps = dict.fromkeys(values, 0)
        self.paused: set[str] = set()
        self.stopped: list[str] = []
        self._tune_controller = SimpleNamespace(_checkpoint_manager=None, _storage=None)
        self.search_alg = SimpleNamespace(
            searcher=SimpleNamespace(on_pause=self.paused.add, on_unpause=self.paused.discard),
            is_finished=lambda: not self.waiting,
        )

    def get_live_trials(self) -> list[Any]:
        return [trial for trial in self.trials.values() if trial.status != "TERMINATED"]

    def stop_trial(self, trial: Any) -> None:
        self.end(trial, TrialState.PRUNED)
        self.stopped.append(trial.trial_id)

    def end(self, trial: Any, state: TrialState) -> None:
        trial.status = "TERMINATED"
        value = self.values[trial.trial_id][-1] if state == TrialState.COMPLETE else None
        self.study.tell(int(trial.trial_id[1:]), value, state=state)
        self.paused.discard(trial.trial_id)

    def active(self) -> list[Any]:
        return [trial for trial in self.get_live_trials() if trial.status in ("PENDING", "RUNNING")]

    def start(self) -> None:
        """Ask for new trials as the searcher does: paused ones leave room."""
        while self.waiting and len(self.get_live_trials()) - len(self.paused) < self.concurrent:
            name = self.waiting.pop(0)
            begin(self.study, [name])
            trial = SimpleNamespace(trial_id=name, status="RUNNING", last_result={})
            trial.set_status = partial(setattr, trial, "status")
            self.trials[name] = trial

    def run(self, make: Callable[[], PromotingRungs], restart: Callable[[], bool] = lambda: False) -> None:
        own = make()
        for _ in range(10_000):
            self.start()
            chosen = own.choose_trial_to_run(self)
            if chosen is not None:
                assert chosen.status == "PAUSED"
                chosen.status = "RUNNING"
            assert len(self.active()) <= self.concurrent
            if not self.get_live_trials() and not self.waiting:
                return
            for trial in self.active()[:1]:
                self.report(own, trial)
            if restart():
                own = make()
                self.paused.clear()
                for trial in self.get_live_trials():
                    trial.status = "PENDING"
                    own.on_trial_add(self, trial)
        raise AssertionError("the search did not end")

    def report(self, own: PromotingRungs, trial: Any) -> None:
        name, steps = trial.trial_id, len(self.values[trial.trial_id])
        self.steps[name] += 1
        found = result(self.values[name][self.steps[name] - 1], self.steps[name], steps)
        decision = own.on_trial_result(self, trial, found)
        trial.last_result = found
        trial.status = "PAUSED" if decision == "PAUSE" else "RUNNING"
        if found["finished"]:
            self.end(trial, TrialState.COMPLETE)


def promoted(study: Any, concurrent: int) -> Callable[[], PromotingRungs]:
    return lambda: PromotingRungs(again(study), Objective(), (2, 4, 8), concurrent)


@pytest.mark.parametrize("concurrent", [1, 3])
def test_paused_trials_go_on_when_the_cut_moves_in_their_favour(concurrent: int, study: Any) -> None:
    values = curves(16, 16)
    cluster = Cluster(study, values, concurrent)
    cluster.run(promoted(study, concurrent))
    for number, rung in enumerate((2, 4, 8)):
        reached = [name for name, steps in cluster.steps.items() if steps >= rung]
        beyond = {name for name in reached if cluster.steps[name] > rung}
        best = sorted(reached, key=lambda name: -values[name][rung - 1])[: len(reached) // 2]
        assert set(best) <= beyond, "the better half of all that came to a rung went on"
        assert number or len(reached) == 16
    late = {trial.user_attrs[TRIAL_ID] for trial in study.trials if trial.state == TrialState.COMPLETE}
    assert late == {name for name, steps in cluster.steps.items() if steps == 16} != set()


def test_a_restart_leaves_the_promoting_search_as_it_would_have_been(study: Any) -> None:
    values = curves(12, 16, seed=3)
    other = optuna.create_study(study_name="rungs", storage=InMemoryStorage(), direction="maximize")
    undisturbed, killed = Cluster(study, values, 1), Cluster(other, values, 1)
    undisturbed.run(promoted(study, 1))

    def every(count: int) -> Iterator[bool]:
        while True:
            yield from [False] * count + [True]

    turns = every(6)
    killed.run(promoted(other, 1), lambda: next(turns))
    assert killed.steps == undisturbed.steps


def test_a_promoting_search_of_one_trial_runs_it_to_the_end(study: Any) -> None:
    cluster = Cluster(study, curves(1, 16), 1)
    cluster.run(promoted(study, 1))
    assert cluster.steps == {"t0": 16}


def test_half_of_a_rung_is_promoted_and_at_last_the_best_of_the_highest(study: Any) -> None:
    at_2, at_4 = {"t0": 0.5, "t1": 0.6, "t2": 0.9}, {"t0": 0.5, "t1": 0.7, "t2": 0.1}
    cluster = Cluster(study, {name: [at_2[name]] * 2 + [at_4[name]] * 14 for name in at_2}, 1)
    cluster.run(promoted(study, 1))
    assert cluster.steps == {"t0": 2, "t1": 16, "t2": 4}, "t1 of t0 and t1, t2 of all three, then t1 of t1 and t2"


def test_ranks_over_several_goals_decide_at_a_rung() -> None:
    goals = ("score/entropy", "score/flip_agreement")
    study = optuna.create_study(directions=["maximize"] * 2)
    begin(study, ["t0", "t1", "t2"])
    own = StudyRungs(study, Objective(goals, ranked=True), (2,))
    found = [{"score/entropy": 1.0, "score/flip_agreement": 3.0}, {"score/entropy": 3.0, "score/flip_agreement": 2.0}]
    found.append({"score/entropy": 2.0, "score/flip_agreement": 1.0})
    trials = [SimpleNamespace(trial_id=f"t{number}") for number in range(3)]
    decisions = [
        own.on_trial_result(None, trial, {**values, "step": 2}) for trial, values in zip(trials, found, strict=True)
    ]
    assert decisions == ["CONTINUE", "CONTINUE", "STOP"], "mean ranks 2, 1.5 and 2.5"
