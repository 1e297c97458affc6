"""Plots of studies, whatever their trials allow."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from segadapt.platform.results.plots import importances, study_figures
from segadapt.platform.settings.objective import Objective

optuna.logging.set_verbosity(optuna.logging.WARNING)

PLAIN = ("optimization_history", "timeline")
COMPARED = (*PLAIN, "slice", "parallel_coordinate")
IMPORTANCE = ("importance_fanova", "importance_ped_anova", "contour")
SPACE = {name: FloatDistribution(0.01, 1, log=True) for name in ("optimizer.lr", "method.gain")}
JOINT = CategoricalDistribution(["sdca", "plca"])


def study_of(count: int, value: Callable[[int], float] = lambda number: 0.1 + 0.02 * number, goals: int = 1) -> Any:
    study = optuna.create_study(directions=["maximize"] * goals)
    for number in range(count):
        params = {"optimizer.lr": 0.01 * (number + 1), "method.gain": 0.5 / (number + 1)}
        values = [value(number)] * goals
        study.add_trial(create_trial(values=values, params=params, distributions=SPACE))
    return study


def joint_study(count: int) -> Any:
    """Every second trial is of the other method, which has settings of its own."""
    study = optuna.create_study(direction="maximize")
    for number in range(count):
        method = JOINT.choices[number % 2]
        params = {f"{method}.{name}": 0.01 * (number + 1) for name in SPACE}
        distributions = {f"{method}.{name}": distribution for name, distribution in SPACE.items()}
        study.add_trial(
            create_trial(
                value=0.3 + 0.01 * number,
                params={"method": method, **params},
                distributions={"method": JOINT, **distributions},
            )
        )
    return study


def draw(study: Any, objective: str, folder: Path) -> set[str]:
    """Draw all plots to files, as tracking does; returns their names."""
    names = set()
    for name, make in study_figures(study, Objective.parse(objective)):
        path = folder / name.rpartition("/")[2]
        figure = make()
        if path.suffix == ".html":
            figure.write_html(path, include_plotlyjs=False, auto_open=False)
        else:
            figure.savefig(path)
        assert path.stat().st_size > 1000
        assert path not in names
        names.add(path.name)
    return names


def both(*names: str) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in ("html", "png")}


@pytest.mark.parametrize(
    ("study", "expected"),
    [
        pytest.param(study_of(0), (), id="none"),
        pytest.param(study_of(1), PLAIN, id="one"),
        pytest.param(study_of(2), (*COMPARED, *IMPORTANCE), id="two"),
        pytest.param(study_of(4, lambda number: 0.5), COMPARED, id="equal"),
    ],
)
def test_plots_are_those_that_the_trials_allow(study: Any, expected: tuple[str, ...], tmp_path: Path) -> None:
    assert draw(study, "target_val/miou", tmp_path) == both(*expected)


def test_several_goals_draw_the_leading_one_and_the_front(tmp_path: Path) -> None:
    names = draw(study_of(3, goals=2), "target_val/miou,time/step", tmp_path)
    assert names == both(*COMPARED, *IMPORTANCE, "pareto_front")


def test_methods_of_a_joint_study_have_importances_of_their_own(tmp_path: Path) -> None:
    expected = [f"{name}_{method}" for name in IMPORTANCE for method in JOINT.choices]
    started = time.perf_counter()
    assert draw(joint_study(20), "target_val/miou", tmp_path) == both(*COMPARED, *expected)
    print(f"{time.perf_counter() - started:.1f} s")


def test_importances_of_methods_log_nothing() -> None:
    study, records = joint_study(8), list[logging.LogRecord]()
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("optuna").addHandler(handler)
    optuna.logging.set_verbosity(optuna.logging.INFO)
    try:
        assert [importance.method for importance in importances(study, Objective())] == ["sdca", "plca"]
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        logging.getLogger("optuna").removeHandler(handler)
    assert not [record.getMessage() for record in records]


def test_rungs_show_who_went_on(tmp_path: Path) -> None:
    study = study_of(0)
    for value, continues in ((0.2, True), (0.1, False)):
        attributes = {"rung_40": {"values": {"target_val/miou": value}, "continues": continues}}
        state = TrialState.COMPLETE if continues else TrialState.PRUNED
        params = {"optimizer.lr": value, "method.gain": value}
        study.add_trial(
            create_trial(state=state, value=value, params=params, distributions=SPACE, user_attrs=attributes)
        )
    assert draw(study, "target_val/miou", tmp_path) == both(*PLAIN, "rungs")
    page = (tmp_path / "rungs.html").read_text()
    assert "went on" in page
    assert "stopped or waits" in page


def test_drawing_leaves_a_notebooks_backend_style_and_figures(tmp_path: Path) -> None:
    before, figures = matplotlib.get_backend(), plt.get_fignums()
    plt.switch_backend("svg")
    try:
        style = dict(matplotlib.rcParams)
        draw(study_of(2), "target_val/miou", tmp_path)
        assert matplotlib.get_backend() == "svg"
        assert dict(matplotlib.rcParams) == style
        assert plt.get_fignums() == figures
    finally:
        plt.switch_backend(before)
