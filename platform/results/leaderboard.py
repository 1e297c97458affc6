"""The trials of a search as MLflow knows them, best first."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from segadapt.platform.errors import UsageError
from segadapt.platform.results.label_free import Choice, compare
from segadapt.platform.results.methods import Addition, additions
from segadapt.platform.results.seeds import Reranked, rerank, verdict
from segadapt.platform.search.study_storage import database_file, file_fault, open_study_storage
from segadapt.platform.settings.objective import GOALS, LABEL_FREE, TARGET, Objective
from segadapt.platform.storage.checkpoints import checkpoint_folder
from segadapt.platform.storage.folders import Place, Storage
from segadapt.platform.tracking.client import reading_client
from segadapt.platform.tracking.runs import runs_by_key
from segadapt.platform.tracking.sender import send_waiting
from segadapt.platform.tracking.tags import (
    BEST_STEP_TAG,
    CHECKPOINT_TAG,
    FAILURE_TAG,
    GROUND_TAG,
    KEY_TAG,
    KIND_TAG,
    METHOD_TAG,
    NOT_KEPT,
    STATE_TAG,
)


@dataclass(frozen=True)
class Row:
    """A trial in a leaderboard."""

    name: str
    method: str
    kind: str
    state: str
    best: float | None
    """Leading goal at the checkpoint that was kept."""
    best_step: int | None
    last: float | None
    params: Mapping[str, str]
    run_id: str
    checkpoint: str | None
    """Its folder; None if it left none, or that was not kept."""
    failure: str | None
    goals: Mapping[str, float] = field(default_factory=dict)
    """All goals of the search at that checkpoint."""
    score: float | None = None
    """What trials are ordered by; minus the mean rank where ranks decide, otherwise the leading goal."""
    checkpoint_removed: bool = False
    """Whether it left a checkpoint that was not kept."""
    checkpoint_refused: str | None = None
    """Why its checkpoint is not opened: MLflow names one outside the storage folder."""
    on_front: bool = False
    """Whether no other trial surpasses it in all goals, where they make a front."""
    target_miou: float | None = None
    """Target mIoU at the checkpoint that was kept; None where no label tells it."""


@dataclass(frozen=True)
class Leaderboard:
    """The trials of a search, best first."""

    search: str
    objective: str
    rows: Sequence[Row]
    baseline: float | None
    """Objective of the source-only network that the trials started from."""
    selection: Sequence[Choice] = ()
    """What each label-free score would have chosen; empty unless asked for."""
    methods: Mapping[str, float] = field(default_factory=dict)
    """Best that each method of a joint search had reached when all had spent the same steps."""
    equal_steps: int | None = None
    """Steps that all methods had spent then."""
    reranked: Sequence[Reranked] = ()
    """The best configurations over several seeds, if they were trained again."""
    verdict: str | None = None
    """Whether the first of them is better beyond the noise of seeds."""
    ground: str | None = None
    """Method to whose training all others of a joint search add their losses."""
    additions: Sequence[Addition] = ()
    """What the losses of each of them add."""
    unknown: str | None = None
    """What could not be measured, in a sentence; None if the target has validation labels."""
    kind: str = "search"
    """`search`, whose trials' params are what it searched, or `train`, a single run, whose params were given."""

    @property
    def judged_by(self) -> str | None:
        """Name of target mIoU where it is no goal but known of a trial; None elsewhere."""
        is_goal = TARGET in Objective.parse(self.objective).goals
        return None if is_goal or all(row.target_miou is None for row in self.rows) else TARGET


def in_order(rows: Sequence[Row], objective: Objective) -> list[Row]:
    """Return rows best first, with what they are ordered by; those without a value come last."""
    trials = [row for row in rows if row.kind == "trial" and len(row.goals) == len(objective.goals)]
    goals = [row.goals for row in trials]
    score = dict(zip([row.run_id for row in trials], objective.scores(goals), strict=True))
    front = dict(zip([row.run_id for row in trials], objective.front(goals), strict=True)) if objective.is_front else {}
    judged = [
        dataclasses.replace(
            row,
            score=score.get(row.run_id, None if objective.ranked else row.best),
            on_front=front.get(row.run_id, False),
        )
        for row in rows
    ]
    return sorted(judged, key=lambda row: (row.score is None, -(row.score or 0.0), row.name))


def values_by_seed(entries: Sequence[Any], objective: Objective) -> dict[str, dict[int, float]]:
    """Return the leading goal of configurations that were trained again, by the name of their trial and the seed."""
    by_trial: dict[str, dict[int, float]] = {}
    for entry in entries:
        value = entry.data.metrics.get(f"best/{objective.leading}")
        if kind_of(entry) == "rerank" and value is not None:
            name, _, seed = entry.info.run_name.rpartition(".seed-")
            by_trial.setdefault(name, {})[int(seed)] = value
    return by_trial


def kind_of(entry: Any) -> str | None:
    """Return what kind of run an MLflow run is."""
    kind: str | None = entry.data.tags.get(KIND_TAG)
    return kind


def runs_of(client: Any, name: str) -> list[Any]:
    """Return the MLflow runs of an experiment, newest first; one of each key, even if MLflow has two of it.

    Raises:
        UsageError: If MLflow knows no experiment of that name, or it was deleted there.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        names = ", ".join(sorted(listed.name for listed in client.search_experiments() if listed.name != "Default"))
        raise UsageError(f"There must be a search {name!r}, but there is not. Known: {names or 'none'}.")
    if experiment.lifecycle_stage != "active":
        raise UsageError(
            f"{name!r} must be an experiment in MLflow, but was deleted there. Until `mlflow gc` removes it for good, "
            "`segadapt doctor --fix` restores it with its runs, if its folder is in the storage folder."
        )
    return one_of_each_key(client.search_runs([experiment.experiment_id], max_results=50_000))


def one_of_each_key(runs: Iterable[Any]) -> list[Any]:
    """Return MLflow runs without those that are there a second time; the one that knows most counts."""
    runs = list(runs)
    counting = {of_key[0].info.run_id for of_key in runs_by_key(runs).values()}
    return [run for run in runs if KEY_TAG not in run.data.tags or run.info.run_id in counting]


def runs_of_search(client: Any, name: str) -> list[Any]:
    """Return the MLflow runs of a search."""
    runs = runs_of(client, name)
    if not any(kind_of(entry) == "search" for entry in runs):
        raise UsageError(f"SEARCH must name a search, but {name!r} is a single run. `segadapt runs` shows it.")
    return runs


def study_of(name: str, place: Place) -> Any:
    """Return the study of a search; None where only MLflow is at hand, or the database of studies is damaged."""
    import optuna

    file = database_file(place)
    if file is not None and file_fault(file) is not None:
        return None
    try:
        return optuna.load_study(study_name=name, storage=open_study_storage(place.study_url))
    except KeyError:
        return None


def open_client(place: Place) -> Any:
    """Return an MLflow client for a storage folder or a server.

    Raises:
        UsageError: If there is no run in the storage folder, or the server does not answer.
    """
    if place.tracking_uri is None and not place.folders.mlflow_database.is_file():
        raise UsageError(
            f"--storage must hold runs, but {place.folders.root} has none yet. `segadapt search sdca` makes some."
        )
    return reading_client(place)


def pick_run(board: Leaderboard, name: str, kinds: Sequence[str] = ("trial",)) -> Row:
    """Return the best trial, or the run of one of `kinds` with this name or id."""
    rows = [
        row
        for row in board.rows
        if row.kind in kinds and (row.checkpoint or row.checkpoint_removed or row.checkpoint_refused)
    ]
    known = ", ".join(row.name for row in rows if row.checkpoint is not None) or "none"
    if board.reranked and name == "best":
        name = board.reranked[0].name
    for row in rows:
        if name in (row.name, row.run_id) or (name == "best" and row.kind == "trial"):
            if row.checkpoint_refused is not None:
                raise UsageError(row.checkpoint_refused)
            if row.checkpoint is None:
                raise UsageError(
                    f"The checkpoint of {row.name} must be there, but was not kept: {board.search!r} keeps those of "
                    f"its best trials alone (--keep-top). Name one of {known}; or train {row.name} again, by `segadapt "
                    f"train {row.method}` with its settings."
                )
            return row
    raise UsageError(
        f"RUN must be `best` or a {' or '.join(kinds)} of {board.search!r} with a checkpoint, but got {name!r}. "
        f"Those are: {known}."
    )


def row_of(entry: Any, objective: Objective, storage: Storage) -> Row:
    """Return an MLflow run as a row of a leaderboard; its checkpoint is looked for in the storage folder."""
    tags, metrics = entry.data.tags, entry.data.metrics
    goals = {goal: metrics[f"best/{goal}"] for goal in objective.goals if f"best/{goal}" in metrics}
    noted = tags.get(CHECKPOINT_TAG, NOT_KEPT)
    checkpoint, refused = None, None
    try:
        checkpoint = str(checkpoint_folder(storage, noted)) if noted != NOT_KEPT else None
    except UsageError as error:
        refused = str(error)
    return Row(
        name=entry.info.run_name,
        method=tags[METHOD_TAG],
        kind=tags[KIND_TAG],
        state=tags.get(STATE_TAG, entry.info.status.lower()),
        best=goals.get(objective.leading),
        goals=goals,
        best_step=int(tags[BEST_STEP_TAG]) if BEST_STEP_TAG in tags else None,
        last=metrics.get(objective.leading),
        params=entry.data.params,
        run_id=entry.info.run_id,
        checkpoint=checkpoint,
        checkpoint_removed=tags.get(CHECKPOINT_TAG) == NOT_KEPT,
        checkpoint_refused=refused,
        failure=tags.get(FAILURE_TAG),
        target_miou=metrics.get(f"best/{TARGET}"),
    )


def kept_metrics(entries: Sequence[Any]) -> dict[str, dict[str, float]]:
    """Return what was reported with the kept checkpoint of each trial, by its name."""
    return {
        entry.info.run_name: {
            name: entry.data.metrics[f"best/{name}"] for name in GOALS if f"best/{name}" in entry.data.metrics
        }
        for entry in entries
        if entry.data.tags.get(KIND_TAG) == "trial"
    }


def _unknown(entries: Sequence[Any]) -> str | None:
    """Say that target mIoU is unknown, if runs were evaluated and none has it."""
    evaluated = [entry.data.metrics for entry in entries if any(goal in entry.data.metrics for goal in LABEL_FREE)]
    if not evaluated or any(TARGET in metrics for metrics in evaluated):
        return None
    return f"{TARGET} is unknown: no target validation image has a labelled pixel."


def leaderboard(search_name: str, place: Place, *, selection: bool = False) -> Leaderboard:
    """Return the leaderboard of a search or single run, read from MLflow; records that wait for it are sent first.

    Args:
        search_name: The search or single run.
        place: Says where it is kept and tracked.
        selection: Also judge what label-free scores would have chosen, by target mIoU.

    Raises:
        UsageError: If MLflow knows no search of that name; lists those it knows.
    """
    if place.tracking_uri is not None:
        open_client(place)  # else what waits would be waiting for an answer as well
    send_waiting(place)
    client = open_client(place)
    runs = runs_of(client, search_name)
    parents = [entry for entry in runs if entry.data.tags.get(KIND_TAG) in ("search", "train")]
    parent = parents[0].data if parents else None
    objective = Objective.parse(parent.params.get("objective", TARGET) if parent else TARGET)
    trials = [run for run in runs if kind_of(run) in ("trial", "finish")]
    rows = in_order([row_of(run, objective, place.folders) for run in trials], objective)
    reached = {
        name.removeprefix("equal_budget/"): value
        for name, value in (parent.metrics if parent else {}).items()
        if name.startswith("equal_budget/")
    }
    steps = reached.pop("steps", None)
    ranking = rerank(values_by_seed(runs, objective))
    ground = parent.tags.get(GROUND_TAG) if parent else None
    method_of = {row.name: row.method for row in rows if row.kind == "trial"}
    return Leaderboard(
        search=search_name,
        objective=str(objective),
        rows=rows,
        baseline=parent.metrics.get(f"start/{objective.leading}") if parent else None,
        selection=compare(kept_metrics(runs)) if selection else (),
        methods=dict(sorted(reached.items(), key=lambda entry: -entry[1])),
        equal_steps=int(steps) if steps is not None else None,
        reranked=ranking,
        verdict=verdict(ranking) if ranking else None,
        ground=ground,
        additions=additions(ground, reached, ranking, method_of) if ground is not None else (),
        unknown=_unknown(runs),
        kind=str(parent.tags[KIND_TAG]) if parent else "search",
    )


def find_run(run: str, search: str, place: Place, kinds: Sequence[str] = ("trial",)) -> Row:
    """Return the best trial of a search, or the run of one of `kinds` with this name or id.

    Raises:
        UsageError: If there is no such search or run, or it left no checkpoint.
    """
    return pick_run(leaderboard(search, place), run, kinds)


def run_tags(row: Row, place: Place) -> dict[str, str]:
    """Return the tags of a run in a leaderboard."""
    return dict(open_client(place).get_run(row.run_id).data.tags)
