"""A search on one page that needs nothing else: what was tried, what came out, how sure it is, what to do next."""

import base64
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segadapt.platform.results.plots import MEASURES, importances
from segadapt.platform.results.proposals import origins
from segadapt.platform.settings.objective import TARGET, Objective
from segadapt.platform.settings.text import number_text, short_text
from segadapt.platform.tracking.tags import KIND_TAG
from segadapt.trainables.core.training.checkpoint import GALLERY

if TYPE_CHECKING:
    from segadapt.platform.results.leaderboard import Leaderboard, Row

_COLORS = ("#3b7dd8", "#d9822b", "#2f9e63", "#b84fb0", "#c0392b", "#7f8c3a", "#5f6caf")
"""Colours of the methods, readable on light and dark ground."""


@dataclass(frozen=True)
class Curve:
    """How a trial went."""

    name: str
    method: str
    steps: Sequence[int]
    values: Sequence[float]
    """The leading goal at each step."""


@dataclass(frozen=True)
class Cost:
    """What a kind of runs took."""

    kind: str
    runs: int
    steps: int
    hours: float
    """Wall time, summed over runs."""


def render(board: "Leaderboard", entries: Sequence[Any], client: Any, study: Any | None) -> str:
    """Return the page of a search as HTML that loads nothing from anywhere.

    Args:
        board: Leaderboard of the search, with the judgement of label-free scores.
        entries: MLflow runs of the search.
        client: MLflow client, for histories and artifacts.
        study: Optuna study of the search, for importance and the origin of proposals; None leaves them out.
    """
    import jinja2

    objective = Objective.parse(board.objective)
    leading = objective.leading
    parent = next(entry for entry in entries if entry.data.tags.get(KIND_TAG) == "search")
    by_id = {entry.info.run_id: entry for entry in entries}
    trials = [row for row in board.rows if row.kind == "trial"]
    best = next((row for row in trials if board.reranked and row.name == board.reranked[0].name), None)
    best = best or next((row for row in trials if row.best is not None), None)
    curves = [_curve(client, by_id[row.run_id], row, leading) for row in trials]
    curves.sort(key=lambda curve: curve.name.rsplit("-", 1)[-1])  # in the order of proposal
    figures = {
        "curves": _curves_figure(curves, leading),
        "progress": _progress_figure(curves, leading),
        "classes": _classes_figure(client, parent, by_id[best.run_id]) if best else None,
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["number"] = number_text
    template = environment.from_string((files("segadapt.platform.results") / "report.html.j2").read_text())
    return template.render(
        board=board,
        leading=leading,
        uses_labels=TARGET in objective.goals,
        parent=parent,
        started=_time(parent.info.start_time),
        ended=_time(parent.info.end_time),
        trials=trials,
        states=_counts([row.state for row in trials]),
        methods=_counts([row.method for row in trials]),
        best=best,
        best_params=_varied(best) if best else {},
        galleries={
            "source-only": _picture(client, parent.info.run_id, f"start/{GALLERY}"),
            best.name: _picture(client, best.run_id, GALLERY),
        }
        if best
        else {},
        figures={name: _html(figure) for name, figure in figures.items() if figure is not None},
        importance={method: _html(figure) for method, figure in _importance_figures(study, objective).items()},
        origins=origins(study) if study is not None else None,
        plotly=_plotly(),
        costs=_costs(client, entries),
        advice=advice(board, best, curves),
    )


def advice(board: "Leaderboard", best: "Row | None", curves: Sequence[Curve]) -> list[tuple[str, str]]:
    """Return what may be done next, as a reason and a command."""
    if best is None:
        return [("No trial has left a result: the failures say why.", f"segadapt runs {board.search}")]
    suggestions = []
    names = [curve.name for curve in curves]
    late = best.name in names and names.index(best.name) >= 0.75 * len(names) and len(names) >= 4
    if late:
        suggestions.append(
            (
                f"The best trial is among the last quarter ({names.index(best.name) + 1} of {len(names)}): more trials "
                "may find a better one.",
                f"segadapt search --extend {board.search} --trials {len(names)}",
            )
        )
    if not board.reranked:
        suggestions.append(
            (
                "Every trial ran on one seed: the best of many is in part the luckiest.",
                f"segadapt search --resume {board.search} --rerank 3 --seeds 3",
            )
        )
    suggestions.append(("Turn the best trial into the final model.", f"segadapt finish best --search {board.search}"))
    return suggestions


def _curve(client: Any, entry: Any, row: "Row", goal: str) -> Curve:
    history = sorted(client.get_metric_history(entry.info.run_id, goal), key=lambda point: point.step)
    return Curve(row.name, row.method, [point.step for point in history], [point.value for point in history])


def _color(curves: Sequence[Curve], method: str) -> str:
    methods = sorted({curve.method for curve in curves})
    return _COLORS[methods.index(method) % len(_COLORS)]


def _curves_figure(curves: Sequence[Curve], goal: str) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    in_legend: set[str] = set()
    for curve in curves:
        figure.add_scatter(
            x=curve.steps,
            y=curve.values,
            name=curve.method,
            legendgroup=curve.method,
            showlegend=curve.method not in in_legend,
            mode="lines+markers",
            line={"color": _color(curves, curve.method), "width": 1.5},
            marker={"size": 4},
            hovertemplate=f"{curve.name}: %{{y:.3f}} at step %{{x}}<extra></extra>",
        )
        in_legend.add(curve.method)
    return _styled(figure, "training steps", goal)


def _progress_figure(curves: Sequence[Curve], goal: str) -> Any:
    """Draw the best so far of each method over the training steps that it has spent."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for method in sorted({curve.method for curve in curves}):
        spent, best, x, y = 0, float("-inf"), [], []
        for curve in curves:
            if curve.method == method and curve.steps:
                for step, value in zip(curve.steps, curve.values, strict=True):
                    best = max(best, value)
                    x.append(spent + step)
                    y.append(best)
                spent += curve.steps[-1]
        figure.add_scatter(x=x, y=y, name=method, line={"shape": "hv", "color": _color(curves, method)})
    return _styled(figure, "training steps spent by the method's trials", f"best {goal} so far")


def _importance_figures(study: Any | None, objective: Objective) -> dict[str, Any]:
    """Draw which settings explain the differences between trials, by the name of the method if there are several."""
    import plotly.graph_objects as go

    figures = {}
    for importance in importances(study, objective) if study is not None else ():
        figure = go.Figure()
        for name, shares in importance.shares.items():
            figure.add_bar(x=list(shares.values()), y=list(shares), name=MEASURES[name], orientation="h")
        figure.update_yaxes(autorange="reversed")
        figures[importance.method or ""] = _styled(figure, "share of the variance explained", "")
    return figures


def _classes_figure(client: Any, parent: Any, best: Any) -> Any | None:
    """Draw the IoU of each class, source-only beside best."""
    import plotly.graph_objects as go

    start = _json(client, parent.info.run_id, "start/per_class_iou.json")
    end = _json(client, best.info.run_id, "per_class_iou.json")
    if start is None or end is None:
        return None
    figure = go.Figure()
    for name, table, color in (("source-only", start, "#8a8f98"), (best.info.run_name, end, _COLORS[0])):
        iou = {label: value for label, value in table["data"] if value is not None}
        if not iou:
            return None  # the target has no label
        figure.add_bar(x=list(iou), y=list(iou.values()), name=name, marker={"color": color})
    return _styled(figure, "", "target IoU")


def _styled(figure: Any, x: str, y: str) -> Any:
    """Give a figure colours that can be read on light and dark ground alike."""
    grid = {"gridcolor": "rgba(128,128,128,0.25)", "zerolinecolor": "rgba(128,128,128,0.4)"}
    figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#808591", "family": "system-ui, sans-serif"},
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        height=380,
        legend={"orientation": "h", "y": 1.12},
        xaxis={"title": x, **grid},
        yaxis={"title": y, **grid},
    )
    return figure


def _html(figure: Any) -> str:
    html: str = figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False})
    return html


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return script


def _picture(client: Any, run_id: str, path: str) -> str | None:
    """Return a picture among a run's artifacts as text for an `img`."""
    content = _artifact(client, run_id, path)
    return None if content is None else "data:image/png;base64," + base64.b64encode(content).decode()


def _json(client: Any, run_id: str, path: str) -> Any:
    content = _artifact(client, run_id, path)
    return None if content is None else json.loads(content)


def _artifact(client: Any, run_id: str, path: str) -> bytes | None:
    """Return a run's artifact; None if it has none of this path."""
    folder = path.rpartition("/")[0] or None
    if path not in {entry.path for entry in client.list_artifacts(run_id, folder)}:
        return None
    with tempfile.TemporaryDirectory(prefix="segadapt-") as scratch:
        return Path(client.download_artifacts(run_id, path, scratch)).read_bytes()


def _costs(client: Any, entries: Sequence[Any]) -> list[Cost]:
    names = {"stage": "shared stages", "trial": "trials", "rerank": "best trials on other seeds", "finish": "finishes"}
    costs = []
    for kind, name in names.items():
        runs = [entry for entry in entries if entry.data.tags.get(KIND_TAG) == kind]
        seconds = sum((entry.info.end_time or entry.info.start_time) - entry.info.start_time for entry in runs) / 1000
        steps = sum(_last_step(client, entry) for entry in runs)
        if runs:
            costs.append(Cost(name, len(runs), steps, seconds / 3600))
    return costs


def _last_step(client: Any, entry: Any) -> int:
    return max((point.step for point in client.get_metric_history(entry.info.run_id, "time/evaluation")), default=0)


def _varied(row: "Row") -> dict[str, str]:
    return {key: short_text(value, 4) for key, value in sorted(row.params.items()) if key != "method"}


def _counts(names: Sequence[str]) -> Mapping[str, int]:
    return {name: list(names).count(name) for name in dict.fromkeys(sorted(names))}


def _time(milliseconds: int | None) -> str:
    if milliseconds is None:
        return "still running"
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
