"""Pictures of studies."""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from segadapt.platform.ray_internals.start import variable
from segadapt.platform.search.study import decisions
from segadapt.platform.settings.config import METHOD
from segadapt.platform.settings.objective import Objective

MEASURES = {"fanova": "fANOVA", "ped_anova": "PED-ANOVA"}
"""Measures of importance, by the name that files have."""


@dataclass(frozen=True)
class Importance:
    """Which settings explain the differences between the completed trials of a search, or of one of its methods."""

    method: str | None
    """Name of the method; None for the search of a single method."""
    shares: Mapping[str, Mapping[str, float]]
    """Shares of variance, by measure (fANOVA over the whole space, PED-ANOVA among the better trials) and setting."""


def importances(study: Any, objective: Objective) -> Iterator[Importance]:
    """Yield what mattered, for each method with two completed trials of unlike settings and values."""
    from optuna.trial import TrialState

    completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    for sample in _samples(study, completed, objective):
        yield Importance(sample.method, _importance_of(sample, objective))


@dataclass(frozen=True)
class _Sample:
    """Completed trials that all have the same settings."""

    method: str | None
    """Name of the method in a joint search, whose methods have plots of their own; None in any other."""
    study: Any
    settings: list[str]
    """Settings that at least two trials differ in."""


def study_figures(study: Any, objective: Objective) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield file names and makers of a study's plots that its trials allow, interactive and as PNG.

    Most need two completed trials with unlike settings and values. Of several goals the leading one is drawn, and the
    front of the first two or three beside. In a joint search each method has its own importances and contour.
    """
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    completed = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    names = ["optimization_history"] if completed else []
    if len(completed) >= 2:
        names += ["slice", "parallel_coordinate"]
    if any(trial.datetime_start is not None for trial in trials):
        names.append("timeline")
    if len(objective.goals) > 1 and completed:
        names.append("pareto_front")
    for name in names:
        yield f"plots/{name}.html", partial(_interactive, name, study, objective)
        yield f"plots/{name}.png", partial(_picture, name, study, objective)
    if points := _rung_points(trials, objective.leading):
        yield "plots/rungs.html", partial(_rungs_page, points, objective.leading)
        yield "plots/rungs.png", partial(_rungs_picture, points, objective.leading)
    for sample in _samples(study, completed, objective):
        yield from _importance_figures(sample, objective)


def _settings(name: str, objective: Objective) -> dict[str, Any]:
    """Return what Optuna's plot of this name is to show."""
    if name == "timeline":
        return {}
    several = len(objective.goals) > 1
    if name == "pareto_front":
        goals = objective.goals[:3]
        return {"targets": lambda trial: trial.values[: len(goals)], "target_names": list(goals)}
    target = {"target": _target(objective)} if several else {}
    return {**target, "target_name": objective.leading}


def _target(objective: Objective) -> Callable[[Any], float]:
    leading = objective.goals.index(objective.leading)
    return lambda trial: float(trial.values[leading])


def _interactive(name: str, study: Any, objective: Objective, **more: Any) -> Any:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few trials make plots uncertain
        return getattr(optuna.visualization, f"plot_{name}")(study, **_settings(name, objective), **more)


def _picture(name: str, study: Any, objective: Objective, **more: Any) -> Any:
    import matplotlib.pyplot as plt
    import numpy as np
    from optuna.visualization import matplotlib as drawn

    with drawing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same, and optuna marks its matplotlib plots as experimental
        axes = getattr(drawn, f"plot_{name}")(study, **_settings(name, objective), **more)
        figure = np.ravel(axes)[0].figure
        figure.set_size_inches(12, 6)
        plt.close(figure)  # else a notebook would show it
    return figure


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw with matplotlib as Optuna does, without a screen; a notebook's own backend and style come back."""
    chosen = "matplotlib.pyplot" in sys.modules or variable("MPLBACKEND") is not None
    import matplotlib
    import matplotlib.pyplot as plt

    backend = matplotlib.get_backend() if chosen else None
    with matplotlib.rc_context():
        plt.switch_backend("agg")
        plt.style.use("ggplot")
        try:
            yield
        finally:
            if backend is not None:
                plt.switch_backend(backend)


def _samples(study: Any, completed: Sequence[Any], objective: Objective) -> Iterator[_Sample]:
    """Yield the completed trials of each method, if their values and settings differ."""
    import optuna

    target = _target(objective)
    methods = dict.fromkeys(trial.params.get(METHOD) for trial in completed)
    for method in methods:
        of_method = [trial for trial in completed if trial.params.get(METHOD) == method]
        shared = [
            name for name in of_method[0].params if name != METHOD and all(name in trial.params for trial in of_method)
        ]
        settings = [name for name in shared if len({trial.params[name] for trial in of_method}) >= 2]
        if not settings or len({target(trial) for trial in of_method}) < 2:
            continue
        part = study
        if method is not None:
            verbosity = optuna.logging.get_verbosity()
            optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it tells of a new study
            part = optuna.create_study(directions=study.directions)
            optuna.logging.set_verbosity(verbosity)
            part.add_trials(of_method)
        yield _Sample(method, part, settings)


def _importance_figures(sample: _Sample, objective: Objective) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield importances by two measures, and the contour of the two settings that matter most."""
    suffix, prefix = ("", "") if sample.method is None else (f"_{sample.method}", f"{sample.method}: ")
    importances = _importance_of(sample, objective)
    for name, importance in importances.items():
        title = f"{prefix}importance for {objective.leading} ({MEASURES[name]})"
        yield f"plots/importance_{name}{suffix}.html", partial(_bars_page, importance, title)
        yield f"plots/importance_{name}{suffix}.png", partial(_bars_picture, importance, title)
    if len(sample.settings) >= 2:
        most = sorted(sample.settings, key=lambda setting: -importances["fanova"].get(setting, 0.0))[:2]
        yield (
            f"plots/contour{suffix}.html",
            partial(_interactive, "contour", sample.study, objective, params=most),
        )
        yield f"plots/contour{suffix}.png", partial(_picture, "contour", sample.study, objective, params=most)


def _importance_of(sample: _Sample, objective: Objective) -> dict[str, dict[str, float]]:
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances

    by_measure, target = {}, _target(objective)
    evaluators = {"fanova": FanovaImportanceEvaluator(seed=0), "ped_anova": PedAnovaImportanceEvaluator()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few trials make importances uncertain
        for name, evaluator in evaluators.items():
            shares = get_param_importances(sample.study, evaluator=evaluator, params=sample.settings, target=target)
            by_measure[name] = dict(shares)
    return by_measure


def _bars_page(importance: Mapping[str, float], title: str) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure(go.Bar(x=list(importance.values()), y=list(importance), orientation="h"))
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(title=title, xaxis_title="share of the variance explained")
    return figure


def _bars_picture(importance: Mapping[str, float], title: str) -> Any:
    from matplotlib.figure import Figure

    with drawing():
        figure = Figure(figsize=(12, 1.5 + 0.4 * len(importance)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(list(importance), list(importance.values()))
        axes.invert_yaxis()
        axes.set_title(title)
    return figure


def _rung_points(trials: Sequence[Any], goal: str) -> dict[int, list[tuple[int, float, bool]]]:
    """Return, by trial, its rungs: training step, value there, and whether it went on."""
    return {
        trial.number: [
            (step, decision["values"][goal], decision["continues"])
            for step, decision in sorted(decisions(trial).items())
        ]
        for trial in trials
        if decisions(trial)
    }


_WENT_ON = {True: "went on", False: "stopped or waits"}

_RUNG_COLORS = {True: "#2f9e63", False: "#c0392b"}


def _rungs_page(points: Mapping[int, Sequence[tuple[int, float, bool]]], goal: str) -> Any:
    """Draw which trials reached which rung with which value, and who went on."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for rungs in points.values():
        steps, values, _ = zip(*rungs, strict=True)
        line = {"color": "rgba(128,128,128,0.4)"}
        figure.add_scatter(x=steps, y=values, mode="lines", line=line, hoverinfo="skip", showlegend=False)
    for went_on, name in _WENT_ON.items():
        chosen = [
            (number, step, value) for number, rungs in points.items() for step, value, on in rungs if on == went_on
        ]
        if chosen:
            numbers, steps, values = zip(*chosen, strict=True)
            figure.add_scatter(
                x=steps,
                y=values,
                mode="markers",
                name=name,
                text=[f"trial {number}" for number in numbers],
                marker={"color": _RUNG_COLORS[went_on], "size": 9},
                hovertemplate="%{text}: %{y:.3f} at step %{x}",
            )
    figure.update_layout(title="Rungs", xaxis_title="training steps", yaxis_title=goal)
    return figure


def _rungs_picture(points: Mapping[int, Sequence[tuple[int, float, bool]]], goal: str) -> Any:
    from matplotlib.figure import Figure

    with drawing():
        figure = Figure(figsize=(12, 6), layout="constrained")
        axes = figure.add_subplot()
        for rungs in points.values():
            axes.plot([rung[0] for rung in rungs], [rung[1] for rung in rungs], color="0.7", linewidth=1, zorder=1)
        for went_on, name in _WENT_ON.items():
            chosen = [(step, value) for rungs in points.values() for step, value, on in rungs if on == went_on]
            if chosen:
                axes.scatter(*zip(*chosen, strict=True), color=_RUNG_COLORS[went_on], label=name, zorder=2)
        axes.legend()
        axes.set_xticks(sorted({rung[0] for rungs in points.values() for rung in rungs}))
        axes.set_xlabel("training steps")
        axes.set_ylabel(goal)
        axes.set_title("Rungs")
    return figure
