"""Whether Ray's saved state, Optuna's study and MLflow's runs tell the same of each trial, and what mends it.

Ray decides: what it has ended has ended, and what it has not can go on. MLflow and the study follow it. Nothing is
deleted, and Ray's own files are never written.
"""

import json
import re
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from segadapt.platform import outbox
from segadapt.platform.checkpoints import TRAIN_FOLDER, TrialCheckpoint, best_checkpoint, newest_checkpoint
from segadapt.platform.config import Values
from segadapt.platform.errors import UsageError
from segadapt.platform.experiments import RECORD, Record
from segadapt.platform.findings import Finding
from segadapt.platform.notes import NOTE_TAG, trial_note
from segadapt.platform.objective import GOALS, Objective
from segadapt.platform.selection import TARGET
from segadapt.platform.storage import Storage
from segadapt.platform.study import LOST, PRIOR, TRIAL_ID, study_name, study_point, values_by_step
from segadapt.platform.tracking import (
    CHECKPOINT_TAG,
    FAILURE_TAG,
    KEY_TAG,
    KIND_TAG,
    METHOD_TAG,
    NOT_KEPT,
    STATE_TAG,
    RunInfo,
    Tracker,
)
from segadapt.platform.trial import INFEASIBLE, METHOD
from segadapt.trainables.core.training.checkpoint import MANIFEST, STATE

DUPLICATE_TAG = "segadapt.duplicate_of"
"""Of a run that was recorded a second time: the run that counts."""
RECOVERED_TAG = "segadapt.recovered"
"""Of a run that was recorded again, from Ray's state."""
GONE_TAG = "segadapt.checkpoint_gone"
"""Where the checkpoint of a run lay, which is not there any more."""
DUPLICATES = "duplicates"
"""Attribute of a study: the numbers of ended trials that were recorded a second time."""

_STATUS = {
    "finished": "FINISHED",
    "stopped early": "FINISHED",
    "failed": "FAILED",
    "infeasible": "FAILED",
    "interrupted": "KILLED",
    "lost": "KILLED",
    "out of time": "KILLED",
    "out of GPU hours": "KILLED",
}
"""How MLflow ends a run in a state of ours."""

_BUDGET = ("out of time", "out of GPU hours")
_FITTING = {
    "failed": ("failed", "infeasible"),
    "finished": ("finished", *_BUDGET),
    "stopped early": ("stopped early", *_BUDGET),
}
"""What MLflow may say of a trial, by how Ray ended it: Ray does not tell the end of a budget from early stopping."""

_UNFINISHED = (None, "running", "paused", "interrupted", "lost")


@dataclass(frozen=True)
class RayTrial:
    """A trial in Ray's saved state."""

    trial_id: str
    status: str
    config: Values
    last: Mapping[str, Any]
    """Its last report; empty before the first one."""
    heard: float | None
    """Unix time of it."""
    error_file: str | None

    @property
    def state(self) -> str | None:
        """How it ended, in our words; None if it can go on."""
        if self.status == "ERROR":
            return "infeasible" if self.reason.startswith(INFEASIBLE) else "failed"
        if self.status == "TERMINATED":
            return "finished" if self.last.get("finished") else "stopped early"
        return None

    @property
    def reported(self) -> bool:
        """Whether it was ever evaluated, or failed; otherwise it may never have had a run."""
        return "step" in self.last or self.status == "ERROR"

    @property
    def reason(self) -> str:
        """Why it failed."""
        if "failure" in self.last:
            return str(self.last["failure"])
        try:
            return Path(self.error_file or "").read_text().strip().splitlines()[-1]
        except (OSError, IndexError):
            return "unknown; see the trial's folder"


def ray_trials(folder: Path) -> dict[str, RayTrial] | None:
    """Return the trials in the last state that Ray saved of an experiment, by id and in order; None if it saved none.

    Nothing is unpickled.

    Raises:
        ValueError: If the state cannot be read.
    """
    saved = max(folder.glob("experiment_state-*.json"), default=None)
    if saved is None:
        return None
    try:
        pairs = [[json.loads(part) for part in pair] for pair in json.loads(saved.read_text())["trial_data"]]
        pairs.sort(key=lambda pair: int(pair[0]["experiment_tag"].partition("_")[0]))  # `2_lr=0.1` is the second
        return {
            trial["trial_id"]: RayTrial(
                trial["trial_id"],
                trial["status"],
                trial["config"],
                more["last_result"],
                more["last_result_time"] if more["last_result"] else None,
                more["error_filename"] and str(folder / trial["trial_id"] / more["error_filename"]),
            )
            for trial, more in pairs
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{saved} cannot be read: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Drivers:
    """The commands that run now and write to tracking: each holds the lock of its queue on disk until it ends."""

    names: frozenset[str]
    """The experiments, and folders of experiments, that they write about."""
    starting: bool
    """Whether one has not said yet what it works on."""

    @classmethod
    def of(cls, storage: Storage) -> "Drivers":
        """Look for the drivers that use a storage folder, on whatever node: the lock is the file system's."""
        names: set[str] = set()
        starting = False
        for server in storage.tracking.glob("*"):
            for box in outbox.look(server):
                if box.alive:
                    told = [content["arguments"] for content in box.contents]
                    starting = starting or not told
                    for key in (part.get(name) for part in told for name in ("key", "experiment", "prefix")):
                        names.add((key or "").split("/")[0])
        return cls(frozenset(names | {experiment_of(storage, name) for name in names}), starting)

    def drive(self, name: str) -> bool:
        """Return whether one works, or may be about to work, on an experiment or a part of it."""
        return self.starting or name in self.names


def experiment_of(storage: Storage, folder: str) -> str:
    """Return the experiment that a folder belongs to: shared stages, repetitions and finishes have their own."""
    try:
        record = json.loads((storage.experiments / folder / RECORD).read_text())
        return str(record["search"] or folder)
    except (OSError, ValueError, KeyError, TypeError):
        return re.split(r"\.(?:stages|rerank|finish)-", folder, maxsplit=1)[0]


@dataclass(frozen=True)
class Books:
    """What the three ledgers hold of an experiment."""

    name: str
    storage: Storage
    tracking_uri: str | None
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
    def by_key(self) -> dict[str, list[Any]]:
        """The runs that nobody deleted; of several with one key, the one that knows most comes first."""
        found: dict[str, list[Any]] = {}
        for run in self.runs:
            if run.info.lifecycle_stage == "active":
                found.setdefault(_key(run), []).append(run)
        return {key: sorted(runs, key=_evidence, reverse=True) for key, runs in found.items()}

    @property
    def active(self) -> list[Any]:
        """The runs that nobody deleted, one of each key."""
        return [runs[0] for runs in self.by_key.values()]

    @property
    def parent(self) -> Any | None:
        """Its run in MLflow."""
        return next((run for run in self.active if _key(run) == self.name), None)

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
        found = best_checkpoint(self.storage.experiment(folder), trial_id, self.objective(folder).keeps)
        return found if found is not None and (not found.kept or is_sound(found.path)) else None


def is_sound(checkpoint: Path) -> bool:
    """Return whether a checkpoint is there and was not cut short. Its end is looked at; loading compares the hash."""
    try:
        json.loads((checkpoint / MANIFEST).read_text())["sha256"][STATE]
        zipfile.ZipFile(checkpoint / STATE).close()  # reads the table at its end
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return False
    return True


def _finding(books: Books, text: str, meaning: str, advice: str, repair: Any = None) -> Finding:
    return Finding(books.name, "fault", text, meaning, advice, repair)


def _key(run: Any) -> str:
    return str(run.data.tags[KEY_TAG])


def _duplicate_runs(books: Books) -> Iterator[Finding]:
    for key, (kept, *others) in books.by_key.items():
        if others:
            yield _finding(
                books,
                f"MLflow has {len(others) + 1} runs of {kept.info.run_name} ({key})",
                "It counts more than once on the leaderboard, and commands go on with either",
                f"--fix keeps {kept.info.run_id}, which knows most, and marks the others by the tag {DUPLICATE_TAG}",
                partial(_mark_duplicates, books, kept, others),
            )


def _evidence(run: Any) -> tuple[Any, ...]:
    ended = _STATUS.get(run.data.tags.get(STATE_TAG, "")) == run.info.status
    return CHECKPOINT_TAG in run.data.tags, ended, len(run.data.metrics), run.info.start_time


def _mark_duplicates(books: Books, kept: Any, others: Sequence[Any]) -> None:
    for run in others:
        run_id = run.info.run_id
        books.client.set_tag(run_id, DUPLICATE_TAG, kept.info.run_id)
        books.client.set_tag(run_id, KIND_TAG, "duplicate")
        if run.info.status == "RUNNING":
            books.client.set_tag(run_id, STATE_TAG, "lost")
            books.client.set_terminated(run_id, "KILLED", _last_heard_ms(books, run))
        if "segadapt.experiment" in run.data.tags:
            books.client.delete_tag(run_id, "segadapt.experiment")
        books.client.delete_tag(run_id, KEY_TAG)  # last: it is what finds the run again after a kill


def _run_ends(books: Books) -> Iterator[Finding]:
    """Compare how MLflow and Ray say that each trial ended."""
    for run in books.active:
        key, state, status = _key(run), run.data.tags.get(STATE_TAG), run.info.status
        trial = books.trials.get(key)
        ended = trial.state if trial is not None else None
        name = run.info.run_name
        if ended is not None and "/" in key:
            assert trial is not None
            if state in _FITTING[_broad(ended)] and status == _STATUS[state]:
                continue
            repair = partial(_record_end, books, run, trial)
            advice = "--fix records in MLflow what Ray saved of it"
            if status == "RUNNING" or state in _UNFINISHED:
                text = f"MLflow lacks the end of {name}: {state or 'running'} there, {ended} in Ray's state"
                yield _finding(books, text, "Its driver was killed before the end was tracked", advice, repair)
            else:
                text = f"{name} is {state} ({status}) in MLflow, but {ended} in Ray's state"
                yield _finding(books, text, "One of them was changed by hand or lost something", advice, repair)
        elif status == "RUNNING":
            yield _zombie(books, run, _left_state(books, run, trial))
        elif state == "interrupted" and trial is None and key.split("/")[0] in books.folders and "/" in key:
            yield _zombie(books, run, "lost")
        elif state in _STATUS and status != _STATUS[state]:
            text = f"{name} is {state} in its tag, but {status} in MLflow"
            repair = partial(books.client.set_terminated, run.info.run_id, _STATUS[state], run.info.end_time)
            advice = f"--fix makes it {_STATUS[state]}"
            yield _finding(books, text, "MLflow's page and our commands tell different things", advice, repair)


def _broad(state: str) -> str:
    return "failed" if state == "infeasible" else state


def _left_state(books: Books, run: Any, trial: RayTrial | None) -> str:
    """Return how a run is to be closed whose driver is dead."""
    known: str | None = run.data.tags.get(STATE_TAG)
    if _key(run) == books.name:
        return known if known in ("finished", "failed") else "interrupted" if books.resumable else "lost"
    return "interrupted" if trial is not None else "lost"


def _zombie(books: Books, run: Any, state: str) -> Finding:
    status = _STATUS[state]
    text = f"{run.info.run_name} is {run.data.tags.get(STATE_TAG, 'running')} ({run.info.status}) in MLflow"
    goes_on = {"interrupted": "it can go on", "lost": "nothing can go on with it"}.get(state, f"it was {state}")
    return _finding(
        books,
        f"{text}, but no driver lives",
        f"Its driver was killed; {goes_on}",
        f"--fix closes it as {status}, {state}" + ("; --resume goes on with it" if state == "interrupted" else ""),
        partial(_close, books, run, state),
    )


def _close(books: Books, run: Any, state: str) -> None:
    books.client.set_tag(run.info.run_id, STATE_TAG, state)
    if run.info.status == "RUNNING":
        books.client.set_terminated(run.info.run_id, _STATUS[state], _last_heard_ms(books, run))


def _last_heard_ms(books: Books, run: Any) -> int:
    """Return when a run last reported, in Unix milliseconds."""
    history = books.client.get_metric_history(run.info.run_id, "time/evaluation")
    return max((entry.timestamp for entry in history), default=int(run.info.start_time))


def _record_end(books: Books, run: Any, trial: RayTrial) -> None:
    """Write the end of a trial to its run, as its driver would have."""
    state = trial.state
    assert state is not None
    run_id, tags = run.info.run_id, _end_tags(books, _key(run), trial)
    heard_ms = int((trial.heard or time.time()) * 1000)
    for metric, value in _kept_metrics(books, _key(run)).items():
        books.client.log_metric(run_id, metric, value, heard_ms, int(tags["segadapt.best_step"]))
    for tag, text in tags.items():
        books.client.set_tag(run_id, tag, text)
    if FAILURE_TAG in run.data.tags and FAILURE_TAG not in tags:
        books.client.delete_tag(run_id, FAILURE_TAG)
    books.client.set_terminated(run_id, _STATUS[state], heard_ms)


def _end_tags(books: Books, key: str, trial: RayTrial) -> dict[str, str]:
    """Return what the run of an ended trial is tagged with."""
    state, best = trial.state, books.best(key)
    assert state is not None
    tags = {STATE_TAG: state}
    if best is not None:
        where = str(best.path) if best.kept else NOT_KEPT
        tags |= {CHECKPOINT_TAG: where, "segadapt.best_step": str(best.metrics["step"])}
    if trial.status == "ERROR":
        tags[FAILURE_TAG] = trial.reason
    goals = {name.removeprefix("best/"): value for name, value in _kept_metrics(books, key).items()}
    step = best.metrics["step"] if best is not None else None
    shown = {goal: goals[goal] for goal in books.objective(key.split("/")[0]).goals if goal in goals}
    tags[NOTE_TAG] = trial_note(state, shown, step, tags.get(FAILURE_TAG))
    return tags


def _kept_metrics(books: Books, key: str) -> dict[str, float]:
    """Return what the kept checkpoint of a trial had reached."""
    best = books.best(key)
    known = best.metrics if best is not None else {}
    return {f"best/{name}": known[name] for name in GOALS if known.get(name) is not None and known[name] == known[name]}


def _missing_runs(books: Books) -> Iterator[Finding]:
    if books.trials and not books.runs:
        yield Finding(
            books.name,
            "warning",
            f"MLflow has no run of its {len(books.trials)} trials",
            "It was tracked to another server, or that database was lost",
            "Give --tracking-uri, if it was",
        )
        return
    if books.trials and books.parent is None and books.name not in {_key(run) for run in books.runs}:
        text = "MLflow lacks the run that its trials belong to"
        yield _finding(books, text, "Reports and the leaderboard need it", "--resume opens it again")
        return
    known = {_key(run) for run in books.runs}
    for key, trial in books.trials.items():
        if trial.reported and key not in known:
            yield _finding(
                books,
                f"MLflow lacks the trial {key}, which is {trial.state or 'unfinished'} in Ray's state",
                "It is missing from the leaderboard",
                "--fix records its settings, last evaluation and checkpoint; its curves are lost",
                partial(_record_run, books, key, trial),
            )


def _record_run(books: Books, key: str, trial: RayTrial) -> None:
    """Track a trial that MLflow does not know, from Ray's state and its checkpoint."""
    from segadapt.platform.events import METRIC_PREFIXES
    from segadapt.platform.trial import TrialSpec

    folder, _, trial_id = key.partition("/")
    record = books.records.get(folder) or books.records[books.name]
    fixed = {name: found.fixed for name, found in record.candidates.items()}
    config = TrialSpec(books.storage, folder, fixed).config(trial.config)
    kinds = {".stages-": "stage", ".rerank-": "rerank", ".finish-": "finish"}
    kind = next((found for part, found in kinds.items() if part in folder), "trial")
    number = [other for other in books.trials if other.startswith(f"{folder}/")].index(key) + 1
    tags = {
        KIND_TAG: kind,
        METHOD_TAG: config.method_name,
        "segadapt.trial_id": trial_id,
        "segadapt.experiment": folder,
        "segadapt.seed": str(config.seed),
        "segadapt.objective": str(books.objective(folder)),
        RECOVERED_TAG: "from Ray's state",
    }
    name = f"{config.method_name}-{number:03d}" if kind == "trial" else f"{kind}-{trial_id}"
    tracker = Tracker(books.storage, books.tracking_uri)
    tracker.start(RunInfo(key, books.name, name, tags, trial.config, record.from_key or books.name))
    tracker.log_json(key, config.as_dict(), "config.yaml")
    if "step" in trial.last:
        metrics = {name: value for name, value in trial.last.items() if name.startswith(METRIC_PREFIXES)}
        tracker.log_metrics(key, metrics, int(trial.last["step"]))
    if trial.state is not None:
        best = books.best(key)
        if best is not None:
            tracker.log_summary(key, _kept_metrics(books, key), best.metrics["step"])
            if best.kept:
                tracker.log_evaluation(key, best.path)
        tracker.set_tags(key, _end_tags(books, key, trial))
        tracker.end(key, _STATUS[trial.state])  # type: ignore[arg-type]  # one of them
    tracker.close()  # closes as interrupted what can go on


def _unknown_runs(books: Books) -> Iterator[Finding]:
    """Tell of trials that MLflow has as ended, but Ray does not know. Of shared stages that is as it must be."""
    for run in books.active:
        key, state = _key(run), run.data.tags.get(STATE_TAG)
        is_trial = run.data.tags.get(KIND_TAG) == "trial" and key.split("/")[0] in books.folders
        if is_trial and key not in books.trials and state not in _UNFINISHED:
            yield Finding(
                books.name,
                "warning",
                f"{run.info.run_name} is {state} in MLflow, but Ray's state does not know it",
                "Ray's state is older than the run: the driver was killed within a second of it, or it is a copy",
                "It stays on the leaderboard; nothing is to do",
            )


def _checkpoints(books: Books) -> Iterator[Finding]:
    for run in books.active:
        if run.data.tags.get(CHECKPOINT_TAG, NOT_KEPT) == NOT_KEPT:
            continue
        path = Path(run.data.tags[CHECKPOINT_TAG])
        if is_sound(path):
            continue
        moved = _moved(books, run)
        name = run.info.run_name
        if moved is not None:
            text = f"The checkpoint of {name} is not in {path}, but in {moved}"
            repair = partial(books.client.set_tag, run.info.run_id, CHECKPOINT_TAG, str(moved))
            yield _finding(books, text, "The storage folder was moved", "--fix makes MLflow point there", repair)
            continue
        is_there = path.exists()
        yield _finding(
            books,
            f"The checkpoint of {name} is {'cut short' if is_there else 'gone'}: {path}",
            "It cannot be finished, evaluated or exported; what it reached stays known",
            f"--fix clears the tag {CHECKPOINT_TAG}" + (" and sets the folder aside" if is_there else ""),
            partial(_give_up_checkpoint, books, run, path),
        )


def _moved(books: Books, run: Any) -> Path | None:
    """Return where the checkpoint of a run lies in this storage folder, if it does."""
    folder, _, trial_id = _key(run).partition("/")
    name = Path(run.data.tags[CHECKPOINT_TAG]).name
    parents = (books.storage.experiment(folder), books.storage.experiment(folder) / TRAIN_FOLDER)
    return next((path for parent in parents if is_sound(path := parent / trial_id / name)), None)


def _give_up_checkpoint(books: Books, run: Any, path: Path) -> None:
    books.client.set_tag(run.info.run_id, GONE_TAG, str(path))
    if path.is_dir():
        path.rename(path.with_name(f"broken_{path.name}"))  # so that nothing takes it for the best
    books.client.delete_tag(run.info.run_id, CHECKPOINT_TAG)


def _unfinished_trials(books: Books) -> Iterator[Finding]:
    """Tell of trials that can go on, and whether they start where they were."""
    waiting = [key for key, trial in books.trials.items() if trial.state is None]
    if not waiting:
        return
    for key in waiting:
        folder, _, trial_id = key.partition("/")
        step = books.trials[key].last.get("step", 0)
        if step and newest_checkpoint(books.storage.experiment(folder), trial_id) is None:
            yield Finding(
                books.name,
                "warning",
                f"The trial {key} was at step {step}, but none of its checkpoints is whole",
                "It can go on, but from its beginning",
                "",
            )
    yield Finding(
        books.name, "ok", f"{len(waiting)} trials are unfinished and can go on", "", f"`--resume {books.name}` does it"
    )


def _by_trial(books: Books) -> list[list[Any]]:
    """Return the study's trials that this search ran; those of one trial id together, the one that counts first.

    Those that were given up, or noted as duplicates, are left out.
    """
    if books.study is None:
        return []
    noted = set(books.study.user_attrs.get(DUPLICATES, ()))
    found: dict[Any, list[Any]] = {}
    for trial in books.study.get_trials(deepcopy=False):
        if trial.state.name != "WAITING" and not {LOST, PRIOR} & set(trial.user_attrs) and trial.number not in noted:
            found.setdefault(trial.user_attrs.get(TRIAL_ID, trial.number), []).append(trial)
    return [
        sorted(trials, key=lambda trial: (not trial.state.is_finished(), trial.number)) for trials in found.values()
    ]


def _study_duplicates(books: Books) -> Iterator[Finding]:
    for kept, *others in _by_trial(books):
        if others:
            numbers = ", ".join(str(trial.number) for trial in (kept, *others))
            yield _finding(
                books,
                f"The study has {len(others) + 1} trials ({numbers}) of {books.name}/{kept.user_attrs[TRIAL_ID]}",
                "The sampler counts it more than once",
                f"--fix keeps number {kept.number} and notes the others: Optuna lets no ended trial change",
                partial(_note_duplicates, books, others),
            )


def _note_duplicates(books: Books, others: Sequence[Any]) -> None:
    study = books.study
    assert study is not None
    noted = set(study.user_attrs.get(DUPLICATES, ()))
    study.set_user_attr(DUPLICATES, sorted(noted | {trial.number for trial in others if trial.state.is_finished()}))
    for trial in others:
        if not trial.state.is_finished():
            _give_up(books, trial, again=False)


def _study_ends(books: Books) -> Iterator[Finding]:
    """Compare how the study and Ray say that each trial ended."""
    for found, *_ in _by_trial(books):
        trial_id = found.user_attrs.get(TRIAL_ID)
        trial = books.trials.get(f"{books.name}/{trial_id}")
        name = f"Number {found.number} of the study ({trial_id or 'no trial'})"
        if found.state.is_finished():
            if trial is not None and trial.state is not None and not _agree(found.state.name, trial):
                yield Finding(
                    books.name,
                    "warning",
                    f"{name} is {found.state.name} there, but {trial.state} in Ray's state",
                    "The sampler learns from the study's word, the leaderboard does not",
                    "Optuna lets no ended trial change; `search --fork` begins a study without it",
                )
        elif trial is None:
            yield _finding(
                books,
                f"{name} is RUNNING there, but {'Ray does not know it' if books.folders else 'Ray has no state'}",
                "Its driver was killed before Ray had saved it; nobody runs it",
                "--fix closes it as lost" + (" and proposes the same values again" if books.resumable else ""),
                partial(_give_up, books, found, again=books.resumable),
            )
        elif trial.state is not None:
            yield _finding(
                books,
                f"{name} is RUNNING there, but {trial.state} in Ray's state",
                "Its driver was killed before the study knew; it would count as running for ever",
                "--fix tells the study how it ended",
                partial(_tell, books, found, trial),
            )


def _agree(state: str, trial: RayTrial) -> bool:
    if trial.status == "ERROR":
        return state == "FAIL"
    if state == "FAIL":
        return not trial.reported
    return state == "PRUNED" or trial.state == "finished"


def _give_up(books: Books, found: Any, *, again: bool) -> None:
    """Close a proposal that nobody runs, as a resumed search does; `again` proposes its values once more."""
    import optuna

    study = books.study
    assert study is not None
    optuna.trial.Trial(study, found._trial_id).set_user_attr(LOST, True)
    study.tell(found.number, state=optuna.trial.TrialState.FAIL)
    if again:
        study.enqueue_trial(found.params)


def _tell(books: Books, found: Any, trial: RayTrial) -> None:
    from optuna.trial import TrialState

    study, goals = books.study, books.objective(books.name).goals
    assert study is not None
    values = [trial.last[goal] for goal in goals if goal in trial.last]
    if trial.state == "finished" and len(values) == len(goals):
        study.tell(found.number, values)
    elif trial.status != "ERROR" and values_by_step(found, goals):
        study.tell(found.number, state=TrialState.PRUNED)
    else:
        study.tell(found.number, state=TrialState.FAIL)


def _missing_proposals(books: Books) -> Iterator[Finding]:
    record = books.records.get(books.name)
    if record is None or record.kind != "search":
        return
    if books.study is None:
        if books.trials:
            yield Finding(
                books.name,
                "warning",
                "Optuna's storage has no study of it",
                "Its study is in another database, or was lost: the search cannot go on without it",
                "Give --study-uri, if it was made with one",
            )
        return
    known = {trial.user_attrs.get(TRIAL_ID) for trial in books.study.get_trials(deepcopy=False)}
    for key, trial in books.trials.items():
        folder, _, trial_id = key.partition("/")
        if folder == books.name and trial_id not in known:
            yield _finding(
                books,
                f"The study lacks the trial {key}, which is {trial.state or 'unfinished'} in Ray's state",
                "The sampler does not know it" + ("" if trial.state else "; --resume would stop there"),
                "--fix adds it with the values that Ray saved",
                partial(_add_proposal, books, record, trial),
            )


def _add_proposal(books: Books, record: Record, trial: RayTrial) -> None:
    from optuna.distributions import CategoricalDistribution
    from optuna.trial import TrialState, create_trial

    assert books.study is not None
    spaces = record.settings().spaces
    method = str(trial.config.get(METHOD, next(iter(spaces))))
    values = {key: value for key, value in trial.config.items() if key in spaces[method]}
    distributions = {study_name(spaces, method, key): spaces[method][key] for key in values}
    if len(spaces) > 1:
        distributions[METHOD] = CategoricalDistribution(list(spaces))
    goals = books.objective(books.name).goals
    reached = [trial.last[goal] for goal in goals if goal in trial.last]
    state = {None: TrialState.RUNNING, "finished": TrialState.COMPLETE, "stopped early": TrialState.PRUNED}.get(
        trial.state, TrialState.FAIL
    )
    if len(reached) < len(goals) and trial.state is not None:
        state = TrialState.FAIL
    pruned = state == TrialState.PRUNED
    books.study.add_trial(
        create_trial(
            state=state,
            values=reached if state == TrialState.COMPLETE or (pruned and len(goals) == 1) else None,
            params=study_point(spaces, method, values),
            distributions=distributions,
            user_attrs={TRIAL_ID: trial.trial_id},
            intermediate_values={int(trial.last["step"]): reached[0]} if len(goals) == len(reached) == 1 else {},
        )
    )


CHECKS = (
    _duplicate_runs,
    _run_ends,
    _missing_runs,
    _unknown_runs,
    _checkpoints,
    _study_duplicates,
    _study_ends,
    _missing_proposals,
    _unfinished_trials,
)
"""In this order; each looks at what the repairs of those before have left."""


def read(name: str, storage: Storage, tracking_uri: str | None, client: Any, study_storage: Any | None) -> Books:
    """Read the ledgers of an experiment.

    Args:
        name: Of the experiment.
        storage: The storage folder.
        tracking_uri: MLflow server; None for the storage folder's own.
        client: Of MLflow.
        study_storage: Optuna's; None if there is none.

    Raises:
        ValueError: If Ray's state cannot be read.
    """
    trials: dict[str, RayTrial] = {}
    folders: set[str] = set()
    records: dict[str, Record] = {}
    for folder in folders_of(storage, name):
        if (folder / RECORD).is_file():
            records[folder.name] = Record.load(storage, folder.name)
        found = ray_trials(folder)
        if found is not None:
            folders.add(folder.name)
            trials |= {f"{folder.name}/{trial_id}": trial for trial_id, trial in found.items()}
    study = _study(name, study_storage) if study_storage is not None else None
    runs = _runs(client, name)
    return Books(name, storage, tracking_uri, client, runs, trials, frozenset(folders), records, study)


def folders_of(storage: Storage, name: str) -> list[Path]:
    """Return the folders of an experiment: its own, its shared stages', its repetitions' and its finishes'."""
    return [path for path in sorted(storage.experiments.glob(f"{name}*")) if experiment_of(storage, path.name) == name]


def _runs(client: Any, name: str) -> list[Any]:
    from mlflow.entities import ViewType

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return []
    search = partial(client.search_runs, [experiment.experiment_id], run_view_type=ViewType.ALL)
    return [run for run in _pages(search) if KEY_TAG in run.data.tags]


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    token = None
    while token != "":
        page = search(page_token=token)
        yield from page
        token = page.token or ""


def _study(name: str, storage: Any) -> Any | None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return None


def experiments(storage: Storage, client: Any, *, is_local: bool) -> list[str]:
    """Return the experiments to compare, by name.

    Args:
        storage: Has folders of them.
        client: Of MLflow; on a server, experiments without a folder here are another storage folder's.
        is_local: Whether MLflow is this storage folder's own.
    """
    names = {experiment_of(storage, path.name) for path in storage.experiments.glob("*") if path.is_dir()}
    if is_local:
        names |= {found.name for found in _pages(client.search_experiments)}
    return sorted(name for name in names if _is_name(storage, name))


def _is_name(storage: Storage, name: str) -> bool:
    try:
        storage.experiment(name)
    except UsageError:
        return False
    return True
