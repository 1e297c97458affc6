"""How a search stands, read from where its driver writes: MLflow and the study. Needs no Ray, so it runs anywhere."""

import itertools
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

from segadapt.platform.search.study import decisions
from segadapt.platform.settings.objective import TARGET, Objective
from segadapt.platform.settings.states import TrialState
from segadapt.platform.tracking.tags import FAILURE_TAG, KIND_TAG, STATE_TAG, TRIALS_TAG

_STALLED = 5
"""A trial is stalled if it is silent so many times longer than any running one was between two reports."""

_STALLED_S = 60.0
"""Seconds of silence below which no trial is stalled."""


@dataclass(frozen=True)
class RunningTrial:
    """A trial that has not ended."""

    name: str
    state: TrialState
    step: int
    value: float | None
    """Best value of the leading goal so far."""
    heard_s: float
    """Seconds since it last reported, or since it began."""
    longest_s: float
    """The longest that it was silent between two reports."""
    stalled: bool = False
    """Whether it is silent for much longer than any trial was between two reports."""


@dataclass(frozen=True)
class RungStatus:
    """How trials fared at a rung."""

    step: int
    reached: int
    continued: int


@dataclass(frozen=True)
class SearchStatus:
    """How a search stands."""

    search: str
    state: str
    objective: str
    asked: int
    """Trials it is to run in all."""
    states: Mapping[str, int]
    """Trials by state."""
    best: float | None
    """Leading goal of the best trial so far, whether it has ended or not."""
    best_name: str | None
    running: Sequence[RunningTrial]
    rungs: Sequence[RungStatus]
    failures: Mapping[str, str]
    """Reasons by trial."""
    left_s: tuple[float, float] | None
    """From and to, judged from the trials that have ended; None before there are two, and for a search that is over."""
    stages: Sequence[RunningTrial] = ()
    """The shared stages that are being computed."""


def search_status(search: str, entries: Sequence[Any], client: Any, study: Any | None) -> SearchStatus:
    """Return how a search stands.

    Args:
        search: Name of the search.
        entries: MLflow runs of the search.
        client: MLflow client.
        study: Optuna study of the search, for the rungs; None leaves them out.
    """
    parent = next(entry for entry in entries if entry.data.tags.get(KIND_TAG) == "search")
    trials = [entry for entry in entries if entry.data.tags.get(KIND_TAG) == "trial"]
    goal = Objective.parse(parent.data.params.get("objective", TARGET)).leading
    stages = [entry for entry in entries if entry.data.tags.get(KIND_TAG) == "stage"]
    open_stages = [entry for entry in stages if _is_open(entry.data.tags.get(STATE_TAG, TrialState.RUNNING.value))]
    states = {entry.info.run_name: entry.data.tags.get(STATE_TAG, TrialState.RUNNING.value) for entry in trials}
    running = [_running(client, entry, goal) for entry in trials if _is_open(states[entry.info.run_name])]
    values = {entry.info.run_name: entry.data.metrics.get(f"best/{goal}") for entry in trials}
    values |= {trial.name: trial.value for trial in running}
    reached = {name: value for name, value in values.items() if value is not None}
    best = max(reached, key=lambda name: reached[name], default=None)
    asked = int(parent.data.tags.get(TRIALS_TAG, len(trials)))
    counts = Counter(states.values())
    is_over = parent.info.status != "RUNNING"
    return SearchStatus(
        search=search,
        state=parent.data.tags.get(STATE_TAG, parent.info.status.lower()),
        objective=str(parent.data.params.get("objective", TARGET)),
        asked=asked,
        states={state: counts[state] for state in sorted(counts)},
        best=reached[best] if best is not None else None,
        best_name=best,
        running=[] if is_over else _judged(running),
        rungs=_rungs(study) if study is not None else (),
        failures={
            entry.info.run_name: entry.data.tags[FAILURE_TAG] for entry in trials if FAILURE_TAG in entry.data.tags
        },
        left_s=None if is_over else _left(trials, asked, sum(trial.state is TrialState.RUNNING for trial in running)),
        stages=[] if is_over else [_running(client, entry, goal) for entry in open_stages],
    )


def _is_open(tag: str) -> bool:
    state = TrialState.of(tag)
    return state is not None and state.is_open


def _judged(running: Sequence[RunningTrial]) -> list[RunningTrial]:
    """Say which trials are stalled; of a search in which none has reported twice, nobody knows."""
    longest_s = max((trial.longest_s for trial in running), default=0.0)
    limit_s = max(_STALLED_S, _STALLED * longest_s) if longest_s else math.inf
    return [replace(trial, stalled=trial.state is TrialState.RUNNING and trial.heard_s > limit_s) for trial in running]


def _running(client: Any, run: Any, goal: str) -> RunningTrial:
    history = client.get_metric_history(run.info.run_id, goal)
    times = sorted(entry.timestamp for entry in history)
    last = max(history, key=lambda entry: entry.step, default=None)
    heard_ms = last.timestamp if last is not None else run.info.start_time
    return RunningTrial(
        name=run.info.run_name,
        state=TrialState(run.data.tags.get(STATE_TAG, TrialState.RUNNING)),
        step=last.step if last is not None else 0,
        value=max((entry.value for entry in history), default=None),
        heard_s=max(0.0, time.time() - heard_ms / 1000),
        longest_s=max((later - earlier for earlier, later in itertools.pairwise(times)), default=0) / 1000,
    )


def _rungs(study: Any) -> list[RungStatus]:
    """Return what the scheduler decided at each rung, from the study's record."""
    continued: dict[int, list[bool]] = {}
    for trial in study.get_trials(deepcopy=False):
        for rung, decision in decisions(trial).items():
            continued.setdefault(rung, []).append(decision["continues"])
    return [RungStatus(rung, len(went), sum(went)) for rung, went in sorted(continued.items())]


def _left(trials: Sequence[Any], asked: int, at_a_time: int) -> tuple[float, float] | None:
    """Return from and to how many seconds the missing trials may take.

    That is as long as those that ended took on average, give or take two standard errors.
    """
    took = [
        (entry.info.end_time - entry.info.start_time) / 1000
        for entry in trials
        if entry.info.end_time is not None and entry.info.status in ("FINISHED", "FAILED")
    ]
    if len(took) < 2:
        return None
    average, doubt = mean(took), 2 * stdev(took) / math.sqrt(len(took))
    rounds = max(0, asked - len(took)) / max(1, at_a_time)
    return max(0.0, average - doubt) * rounds, (average + doubt) * rounds
