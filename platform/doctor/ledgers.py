"""What Ray, Optuna and MLflow hold of an experiment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from segadapt.platform.doctor.drivers import experiment_of, folders_of
from segadapt.platform.doctor.findings import Finding
from segadapt.platform.doctor.ray_state import RayTrial, ray_trials
from segadapt.platform.errors import UsageError
from segadapt.platform.experiment.record import RECORD, Record
from segadapt.platform.search.study import LOST, PRIOR, TRIAL_ID
from segadapt.platform.settings.objective import TARGET, Objective
from segadapt.platform.storage.checkpoints import TrialCheckpoint, best_checkpoint, is_sound
from segadapt.platform.storage.folders import Place, Storage
from segadapt.platform.tracking.runs import pages, runs_by_key
from segadapt.platform.tracking.tags import KEY_TAG

DUPLICATES = "duplicates"
"""Attribute of a study: the numbers of ended trials that were recorded a second time."""


@dataclass(frozen=True)
class Ledgers:
    """What the three ledgers hold of an experiment."""

    name: str
    place: Place
    client: Any
    runs: Sequence[Any]
    """MLflow runs with a key of ours; deleted ones too."""
    trials: Mapping[str, RayTrial]
    """By key, of all its folders, in the order of proposal."""
    folders: frozenset[str]
    """Those in which Ray saved a state."""
    records: Mapping[str, Record]
    """By folder, where there is one."""
    study: Any | None

    @property
    def storage(self) -> Storage:
        """The paths below the storage folder."""
        return self.place.folders

    @property
    def by_key(self) -> dict[str, list[Any]]:
        """The runs that nobody deleted; of several with one key, the one that knows most comes first."""
        return runs_by_key(self.runs)

    @property
    def active(self) -> list[Any]:
        """The runs that nobody deleted, one of each key."""
        return [runs[0] for runs in self.by_key.values()]

    @property
    def parent(self) -> Any | None:
        """Its run in MLflow."""
        return next((run for run in self.active if key_of(run) == self.name), None)

    @property
    def resumable(self) -> bool:
        """Whether a command can go on with it."""
        return self.name in self.records

    def objective(self, folder: str) -> Objective:
        """Return by what the trials in a folder are compared."""
        record = self.records.get(folder) or self.records.get(self.name)
        if record is not None:
            return Objective.parse(record.objective)
        return Objective.parse(self.parent.data.params.get("objective", TARGET) if self.parent else TARGET)

    def best(self, key: str) -> TrialCheckpoint | None:
        """Return the best checkpoint of a trial; None if there is none that can be used or was removed on purpose."""
        folder, _, trial_id = key.partition("/")
        best = best_checkpoint(self.storage.experiment(folder), trial_id, self.objective(folder).keeps)
        return best if best is not None and (not best.kept or is_sound(best.path)) else None


def ledger_fault(ledgers: Ledgers, text: str, meaning: str, advice: str, repair: Any = None) -> Finding:
    """Return a finding that the ledgers of an experiment are wrong."""
    return Finding(ledgers.name, "fault", text, meaning, advice, repair)


def key_of(run: Any) -> str:
    """Return the key of a run."""
    return str(run.data.tags[KEY_TAG])


def proposals_by_trial(ledgers: Ledgers) -> list[list[Any]]:
    """Return the study's trials that this search ran; those of one trial id together, the one that counts first.

    Those that were given up, or noted as duplicates, are left out.
    """
    if ledgers.study is None:
        return []
    noted = set(ledgers.study.user_attrs.get(DUPLICATES, ()))
    by_trial: dict[Any, list[Any]] = {}
    for trial in ledgers.study.get_trials(deepcopy=False):
        if trial.state.name != "WAITING" and not {LOST, PRIOR} & set(trial.user_attrs) and trial.number not in noted:
            by_trial.setdefault(trial.user_attrs.get(TRIAL_ID, trial.number), []).append(trial)
    return [
        sorted(trials, key=lambda trial: (not trial.state.is_finished(), trial.number)) for trials in by_trial.values()
    ]


def read_ledgers(name: str, place: Place, client: Any, study_storage: Any | None) -> Ledgers:
    """Read the ledgers of an experiment.

    Args:
        name: Of the experiment.
        place: Where it is kept and tracked.
        client: Of MLflow.
        study_storage: Optuna's; None if there is none.

    Raises:
        ValueError: If Ray's state cannot be read.
    """
    trials: dict[str, RayTrial] = {}
    folders: set[str] = set()
    records: dict[str, Record] = {}
    for folder in folders_of(place.folders, name):
        if (folder / RECORD).is_file():
            records[folder.name] = Record.load(place.folders, folder.name)
        saved = ray_trials(folder)
        if saved is not None:
            folders.add(folder.name)
            trials |= {f"{folder.name}/{trial_id}": trial for trial_id, trial in saved.items()}
    study = _study_of(name, study_storage) if study_storage is not None else None
    runs = _runs(client, name)
    return Ledgers(name, place, client, runs, trials, frozenset(folders), records, study)


def _runs(client: Any, name: str) -> list[Any]:
    from mlflow.entities import ViewType

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return []
    search = partial(client.search_runs, [experiment.experiment_id], run_view_type=ViewType.ALL)
    return [run for run in pages(search) if KEY_TAG in run.data.tags]


def _study_of(name: str, storage: Any) -> Any | None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return None


def experiments_to_compare(storage: Storage, client: Any, *, is_local: bool) -> list[str]:
    """Return the experiments_to_compare to compare, by name.

    Args:
        storage: Has folders of them.
        client: Of MLflow; on a server, experiments_to_compare without a folder here are another storage folder's.
        is_local: Whether MLflow is this storage folder's own.
    """
    names = {experiment_of(storage, path.name) for path in storage.experiments.glob("*") if path.is_dir()}
    if is_local:
        names |= {experiment.name for experiment in pages(client.search_experiments)}
    return sorted(name for name in names if _is_name(storage, name))


def _is_name(storage: Storage, name: str) -> bool:
    try:
        storage.experiment(name)
    except UsageError:
        return False
    return True
