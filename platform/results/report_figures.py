"""The figures of a report, as SVG that can be read on light and dark ground and loads nothing."""

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from segadapt.platform.results.plots import MEASURES, drawing

if TYPE_CHECKING:
    from segadapt.platform.results.plots import Importance

_COLORS = ("#3b7dd8", "#d9822b", "#2f9e63", "#b84fb0", "#c0392b", "#7f8c3a", "#5f6caf")
"""Colours of the methods, readable on light and dark ground."""

_FAINT = "#808591"
"""Colour of text, axes and all that is compared with."""

_STYLE: Mapping[Any, Any] = {
    "svg.fonttype": "none",  # letters stay text
    "text.color": _FAINT,
    "axes.labelcolor": _FAINT,
    "axes.edgecolor": _FAINT,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "grid.color": _FAINT,
    "grid.alpha": 0.25,
    "grid.linestyle": "-",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "font.size": 11,
}

_TIP = "tip:"
"""How the ids of elements begin that tell their name where one points at them."""


@dataclass(frozen=True)
class Curve:
    """How a trial went."""

    name: str
    method: str
    steps: Sequence[int]
    values: Sequence[float]
    """The leading goal at each step."""
    goals: Mapping[str, float] = field(default_factory=dict)
    """All goals of the search at the checkpoint that was kept."""
    on_front: bool = False


def learning_curves(curves: Sequence[Curve], goal: str, best: str | None) -> str:
    """Draw how each trial went, the best one strongest."""
    with _axes("training steps", goal) as (figure, axes):
        for curve in curves:
            strong = curve.name == best
            axes.plot(
                curve.steps,
                curve.values,
                color=_color(curves, curve, best),
                linewidth=2.5 if strong else 1.2,
                alpha=1.0 if strong or best is None else 0.65,
                marker="o",
                markersize=3,
                zorder=3 if strong else 2,
                gid=f"{_TIP}{curve.name}",
                label=_label(curves, curve, best),
            )
        _legend(axes)
        return _svg(figure)


def progress(curves: Sequence[Curve], goal: str) -> str:
    """Draw the best so far of each method over the training steps that it has spent."""
    with _axes("training steps spent by the method's trials", f"best {goal} so far") as (figure, axes):
        for method in sorted({curve.method for curve in curves}):
            spent, best, steps, values = 0, float("-inf"), [], []
            of_method = [curve for curve in curves if curve.method == method and curve.steps]
            for curve in of_method:
                for step, value in zip(curve.steps, curve.values, strict=True):
                    best = max(best, value)
                    steps.append(spent + step)
                    values.append(best)
                spent += curve.steps[-1]
            axes.step(steps, values, where="post", color=_method_color(curves, method), label=method)
        _legend(axes)
        return _svg(figure)


def front(curves: Sequence[Curve], goals: Sequence[str]) -> str | None:
    """Draw the trials of a search by its first two goals, those that no other surpasses joined; None for one goal."""
    shown = [curve for curve in curves if all(goal in curve.goals for goal in goals[:2])]
    if len(goals) < 2 or not shown:
        return None
    across, up = goals[:2]
    with _axes(across, up) as (figure, axes):
        best = sorted((curve.goals[across], curve.goals[up]) for curve in shown if curve.on_front)
        axes.plot([x for x, _ in best], [y for _, y in best], color=_FAINT, linewidth=1, zorder=1)
        for curve in shown:
            axes.plot(
                [curve.goals[across]],
                [curve.goals[up]],
                marker="o" if curve.on_front else "x",
                markersize=8,
                linestyle="none",
                color=_method_color(curves, curve.method),
                gid=f"{_TIP}{curve.name}",
                label=f"{curve.method}, {'on the Pareto front' if curve.on_front else 'surpassed'}",
            )
        _legend(axes)
        return _svg(figure)


def importance_bars(importance: "Importance") -> str:
    """Draw which settings explain the differences between trials, by each measure."""
    names = list(next(iter(importance.shares.values())))
    with _axes("share of the variance explained", "", height=1.2 + 0.5 * len(names)) as (figure, axes):
        _bars(axes, {MEASURES[name]: shares for name, shares in importance.shares.items()}, names)
        return _svg(figure)


def class_bars(iou: Mapping[str, Mapping[str, float]]) -> str | None:
    """Draw the target IoU of each class, by the name of the network; None if the target has no label."""
    names = list(dict.fromkeys(label for values in iou.values() for label in values))
    if not names or not all(iou.values()):
        return None
    with _axes("target IoU", "", height=1.2 + 0.45 * len(names)) as (figure, axes):
        _bars(axes, iou, names, colors=(_FAINT, _COLORS[0]))
        return _svg(figure)


def _bars(
    axes: Any, groups: Mapping[str, Mapping[str, float]], names: Sequence[str], colors: Sequence[str] = _COLORS
) -> None:
    """Draw a bar of each group for each name, one name below the other."""
    thickness = 0.8 / len(groups)
    for number, (group, values) in enumerate(groups.items()):
        places = [place + (number - (len(groups) - 1) / 2) * thickness for place in range(len(names))]
        axes.barh(places, [values.get(name, 0.0) for name in names], thickness, color=colors[number], label=group)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    _legend(axes)


def _method_color(curves: Sequence[Curve], method: str) -> str:
    methods = sorted({curve.method for curve in curves})
    return _COLORS[methods.index(method) % len(_COLORS)]


def _color(curves: Sequence[Curve], curve: Curve, best: str | None) -> str:
    """Return the colour of a method; where there is one alone, the best trial has it and the others are faint."""
    if len({each.method for each in curves}) > 1 or best is None or curve.name == best:
        return _method_color(curves, curve.method)
    return _FAINT


def _label(curves: Sequence[Curve], curve: Curve, best: str | None) -> str:
    if len({each.method for each in curves}) > 1 or best is None:
        return curve.method
    return f"{curve.name}, the best" if curve.name == best else "the other trials"


def _legend(axes: Any) -> None:
    """Explain each colour once, above the axes."""
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    if by_label:
        axes.legend(by_label.values(), by_label, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2)


@contextlib.contextmanager
def _axes(across: str, up: str, height: float = 4.0) -> Iterator[tuple[Any, Any]]:
    """Yield an empty figure in the report's style, and its axes."""
    with drawing():
        import matplotlib as mpl
        from matplotlib.figure import Figure

        mpl.rcParams.update(_STYLE)
        figure = Figure(figsize=(11, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        yield figure, axes


def _svg(figure: Any) -> str:
    """Return a figure as an element that fills its width; what has a name tells it where one points at it."""
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace("<svg ", '<svg class="figure" role="img" ', 1)
    return re.sub(rf'<g id="{_TIP}([^"]*)">', r"<g><title>\1</title>", svg)
