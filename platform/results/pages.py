"""Where MLflow's pages show an experiment's runs, the best first."""

from typing import Any
from urllib.parse import quote

from segadapt.platform.results.leaderboard import kind_of, open_client, runs_of
from segadapt.platform.settings.objective import TARGET, Objective
from segadapt.platform.storage.folders import Place

_MOST = 5
"""Most experiments that are listed, if none is named."""


def run_pages(place: Place, search: str | None) -> dict[str, str]:
    """Return the pages of an experiment's runs, or of those that changed last, by name; each begins with `#`.

    Args:
        place: Where they are kept.
        search: The search or single run; None for the newest.

    Raises:
        UsageError: If there is no run, or no such search.
    """
    client = open_client(place)
    names = [search] if search is not None else _newest(client)
    return {name: _page(client.get_experiment_by_name(name).experiment_id, runs_of(client, name)) for name in names}


def _newest(client: Any) -> list[str]:
    experiments = client.search_experiments(order_by=["last_update_time DESC"])
    return [experiment.name for experiment in experiments if experiment.name != "Default"][:_MOST]


def _page(experiment_id: str, runs: list[Any]) -> str:
    """Return a page that lists all runs by what they were to maximise: ordered so, MLflow folds none below another."""
    parent = next((run for run in runs if kind_of(run) in ("search", "train")), None)
    goal = Objective.parse(parent.data.params.get("objective", TARGET) if parent else TARGET).leading
    key = quote(f"metrics.`best/{goal}`", safe="")
    return f"#/experiments/{experiment_id}/runs?workflowType=machine_learning&orderByKey={key}&orderByAsc=false"
