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

from segadapt.platform.results.plots import importances
from segadapt.platform.results.proposals import origins
from segadapt.platform.results.report_figures import (
    Curve,
    class_bars,
    front,
    importance_bars,
    learning_curves,
    progress,
)
from segadapt.platform.settings.objective import TARGET, Objective
from segadapt.platform.settings.states import TrialState
from segadapt.platform.settings.text import number_text, short_text
from segadapt.platform.storage.command_lines import command_line
from segadapt.platform.storage.weights import WeightsOrigin
from segadapt.platform.tracking.descriptions import origin_of_tags
from segadapt.platform.tracking.tags import KIND_TAG, STATE_TAG
from segadapt.trainables.core.training.checkpoint import GALLERY

if TYPE_CHECKING:
    from segadapt.platform.results.leaderboard import Leaderboard, Row
    from segadapt.platform.storage.folders import Place


@dataclass(frozen=True)
class Cost:
    """What a kind of runs took."""

    kind: str
    runs: int
    steps: int
    hours: float
    """Wall time, summed over runs."""


def render(board: "Leaderboard", entries: Sequence[Any], client: Any, study: Any | None, place: "Place") -> str:
    """Return the page of a search as HTML that loads nothing from anywhere.

    Args:
        board: Leaderboard of the search, with the judgement of label-free scores.
        entries: MLflow runs of the search.
        client: MLflow client, for histories and artifacts.
        study: Optuna study of the search, for importance and the origin of proposals; None leaves them out.
        place: Where the search is kept and tracked, for the commands that come next.
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
        "curves": learning_curves(curves, leading, best.name if best else None),
        "progress": progress(curves, leading),
        "front": front(curves, objective.goals),
        "classes": _classes(client, parent, by_id[best.run_id]) if best else None,
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
        figures=figures,
        importance={
            importance.method or "": importance_bars(importance)
            for importance in (importances(study, objective) if study is not None else ())
        },
        goals=objective.goals,
        origins=origins(study) if study is not None else None,
        weights=_weights(entries),
        costs=_costs(client, entries),
        advice=advice(board, best, curves, parent.data.tags.get(STATE_TAG, ""), place),
    )


def _weights(entries: Sequence[Any]) -> list[WeightsOrigin]:
    """Return what the networks of runs started from, without those that started at random."""
    return list(dict.fromkeys(origin for entry in entries if (origin := origin_of_tags(entry.data.tags)) is not None))


def advice(
    board: "Leaderboard", best: "Row | None", curves: Sequence[Curve], state: str, place: "Place"
) -> list[tuple[str, str]]:
    """Return what may be done next, as a reason and a command.

    Args:
        board: Leaderboard of the search.
        best: The best trial; None if none has left a result.
        curves: How the trials went, in the order of proposal.
        state: Of the search.
        place: Where it is kept and tracked.
    """
    name = board.search
    if state == TrialState.RUNNING:
        return [("The search has not ended yet.", command_line("status", name, "--watch", place=place))]
    if state == TrialState.INTERRUPTED:
        resume = command_line("search", "--resume", name, place=place)
        return [("The search was interrupted: it goes on where it stopped.", resume)]
    if best is None:
        failures = command_line("runs", name, place=place)
        return [("No trial has left a result: the failures say why.", failures)]
    suggestions = []
    names = [curve.name for curve in curves]
    late = best.name in names and names.index(best.name) >= 0.75 * len(names) and len(names) >= 4
    if late:
        suggestions.append(
            (
                f"The best trial is among the last quarter ({names.index(best.name) + 1} of {len(names)}): more trials "
                "may find a better one.",
                command_line("search", "--extend", name, "--trials", len(names), place=place),
            )
        )
    if not board.reranked:
        count = len(names) if board.ground is not None else 3  # so that every method is among them
        suggestions.append(
            (
                "Every trial ran on one seed: the best of many is in part the luckiest.",
                command_line("search", "--resume", name, "--rerank", count, "--seeds", 3, place=place),
            )
        )
    if best.checkpoint is not None:
        finish = command_line("finish", "best", "--search", name, place=place)
        suggestions.append(("Turn the best trial into the final model.", finish))
    return suggestions


def _curve(client: Any, entry: Any, row: "Row", goal: str) -> Curve:
    history = sorted(client.get_metric_history(entry.info.run_id, goal), key=lambda point: point.step)
    steps, values = [point.step for point in history], [point.value for point in history]
    return Curve(row.name, row.method, steps, values, row.goals, row.on_front)


def _classes(client: Any, parent: Any, best: Any) -> str | None:
    """Draw the IoU of each class, source-only beside best; None where no label tells it."""
    start = _json(client, parent.info.run_id, "start/per_class_iou.json")
    end = _json(client, best.info.run_id, "per_class_iou.json")
    if start is None or end is None:
        return None
    tables = {"source-only": start, best.info.run_name: end}
    return class_bars(
        {name: {label: iou for label, iou in table["data"] if iou is not None} for name, table in tables.items()}
    )


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
