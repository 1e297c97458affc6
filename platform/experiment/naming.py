"""How experiments and the runs of their trials are named, and how a name is taken."""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from segadapt.platform.errors import UsageError, redacted
from segadapt.platform.experiment.record import Record
from segadapt.platform.results.leaderboard import open_client
from segadapt.platform.search.study_storage import open_study_storage
from segadapt.platform.settings.objective import Objective
from segadapt.platform.storage.driving import driving_if_free, is_driven
from segadapt.platform.storage.folders import Place
from segadapt.platform.tracking.runs import make_experiment


def usual_name(kind: str, methods: Collection[str], data: str) -> str:
    """Return the name of a search or single run that was given none, before numbers tell it from others."""
    if kind == "train":
        return f"train-{'-'.join(methods)}-{data}"
    return f"{'-'.join(methods) if len(methods) <= 3 else f'{len(methods)}-methods'}-{data}"


def free_name(place: Place, name: str | None, usual: str, studies: Collection[str] = ()) -> str:
    """Return `name`, or else `usual` with a number if it is taken in the storage folder or on the MLflow server.

    Args:
        place: Where it is to be free.
        name: What the user asked for; None for nothing.
        usual: What it is called otherwise.
        studies: Names that are taken as well.

    Raises:
        UsageError: If `name` is taken, or the server does not answer.
    """
    folders = place.folders
    server = open_client(place) if place.tracking_uri is not None else None

    def taken(candidate: str) -> bool:
        if folders.experiment(candidate).exists() or is_driven(folders, candidate) or candidate in studies:
            return True
        try:
            return server is not None and server.get_experiment_by_name(candidate) is not None
        except UsageError:
            raise
        except Exception as error:  # whatever the client raises for an address that is none of a server's
            raise UsageError(
                f"--tracking-uri must name an MLflow server that answers, but {redacted(place.tracking_uri)} does not: "
                f"{redacted(error)}"
            ) from error

    if name is not None:
        if taken(name):
            if not folders.experiment(name).exists() and not is_driven(folders, name) and name not in studies:
                raise UsageError(
                    f"--name must be new, but {redacted(place.tracking_uri)} has a {name!r}: another storage "
                    "folder's, or one that was deleted there, whose name is free after `mlflow gc`. Choose another."
                )
            raise UsageError(
                f"--name must be new, but {name!r} exists in {folders.root}, on the MLflow server or among the "
                f"studies. Go on with it by `--resume {name}`, or choose another."
            )
        return name
    candidate, number = usual, 1
    while taken(candidate):
        number += 1
        candidate = f"{usual}-{number}"
    return candidate


@contextlib.contextmanager
def begun(record: Record, place: Place, *, named: bool) -> Iterator[Record]:
    """Take the name of a planned experiment and be the only command that works on it meanwhile.

    Yields the record, with another name if its own was taken since it was planned and nobody asked for that one.

    Args:
        record: What was planned.
        place: Where it will be kept and tracked.
        named: Whether the user named it.

    Raises:
        UsageError: If the name that the user gave was taken meanwhile.
    """
    storage = place.prepared()
    usual = usual_name(record.kind, record.candidates, next(iter(record.configs.values())).data.name)
    studies = _studies_of_others(record, place)
    while True:
        with driving_if_free(storage, record.name) as alone:
            if alone and not storage.experiment(record.name).exists() and record.name not in studies:
                yield record
                return
        record = replace(record, name=free_name(place, record.name if named else None, usual, studies))


def _studies_of_others(record: Record, place: Place) -> Collection[str]:
    """Return the names of all studies in a database that other storage folders may use too."""
    if record.kind != "search" or place.study_uri is None:
        return ()
    import optuna

    return optuna.get_all_study_names(open_study_storage(place.study_url))


def claim_on_servers(record: Record, place: Place) -> None:
    """Take the name of a search or single run that begins where other storage folders may take it as well.

    An MLflow server that does not answer now is asked for nothing: records wait for it.

    Raises:
        UsageError: If another one has taken it since it was planned.
    """
    taken = None
    if record.kind == "search" and place.study_uri is not None:
        from segadapt.platform.search.searcher import make_study

        if not make_study(open_study_storage(place.study_url), record.name, Objective.parse(record.objective)):
            taken = "among the studies of --study-uri"
    if taken is None and place.tracking_uri is not None and record.kind != "finish":
        taken = None if make_experiment(place, record.name) else f"on {redacted(place.tracking_uri)}"
    if taken is not None:
        raise UsageError(
            f"The name of what begins must be new, but {record.name!r} was taken {taken} just now. Begin again, or "
            "give another --name."
        )


@dataclass(frozen=True)
class Labels:
    """How the runs of an experiment are named and tagged."""

    experiment: str
    """MLflow experiment."""
    kind: str
    """What the trials are: trial, stage, rerank or finish."""
    names: Sequence[str]
    """Names of the runs, where they are known beforehand; others are named after their method, `sdca-001`, ..."""
    tags: Mapping[str, str]
    parent_key: str | None


class RunNames:
    """The names of an experiment's runs, which stay the same over restarts.

    Args:
        labels: How runs are named.
        experiment: Name of the experiment's folder.
    """

    def __init__(self, labels: Labels, experiment: str) -> None:
        self._labels = labels
        self._experiment = experiment
        self.names: dict[str, str] = {}
        """Names of the runs of trials that were started, by trial."""
        self.numbers: dict[str, int] = {}
        """Which proposal each trial is, from 1."""

    def key(self, trial_id: str) -> str:
        """Return the key of a trial's run."""
        return f"{self._experiment}/{trial_id}"

    def name(self, trial_id: str) -> str:
        """Return the name of a trial's run; the id of a trial that was never started."""
        return self.names.get(trial_id, trial_id)

    def number(self, trials: Sequence[Any], trial_id: str) -> int:
        """Return which proposal a trial is, from 1; Tune puts a trial that it starts again at the end of its list."""
        if trial_id not in self.numbers:
            for trial in trials:
                self.numbers.setdefault(trial.trial_id, len(self.numbers) + 1)
        return self.numbers[trial_id]

    def take(self, trials: Sequence[Any], trial_id: str, method: str) -> str:
        """Return the name of the run of a trial that starts; it is given one if it has none."""
        number, listed = self.number(trials, trial_id), self._labels.names
        return self.names.setdefault(trial_id, listed[number - 1] if listed else f"{method}-{number:03d}")
