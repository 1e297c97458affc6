"""Do MLflow's runs agree with Ray's state?"""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from segadapt.platform.doctor.findings import Finding
from segadapt.platform.doctor.ledgers import Ledgers, key_of, ledger_fault
from segadapt.platform.doctor.ray_state import RayTrial
from segadapt.platform.errors import UsageError
from segadapt.platform.experiment.evaluations import end_tags, kept_metrics
from segadapt.platform.settings.states import TrialState
from segadapt.platform.storage.checkpoints import checkpoint_folder, is_sound
from segadapt.platform.tracking.tags import (
    BEST_STEP_TAG,
    CHECKPOINT_TAG,
    DUPLICATE_TAG,
    EXPERIMENT_TAG,
    FAILURE_TAG,
    GONE_TAG,
    KEY_TAG,
    KIND_TAG,
    METHOD_TAG,
    NOT_KEPT,
    OBJECTIVE_TAG,
    RECOVERED_TAG,
    SEED_TAG,
    STATE_TAG,
    TRIAL_ID_TAG,
)
from segadapt.platform.tracking.tracker import RunInfo, Tracker
from segadapt.platform.trial.spec import TrialSpec


def deleted_experiment(ledgers: Ledgers) -> Iterator[Finding]:
    """Find an experiment that was deleted in MLflow, though its folder is here."""
    experiment = ledgers.client.get_experiment_by_name(ledgers.name)
    if experiment is not None and experiment.lifecycle_stage != "active":
        yield ledger_fault(
            ledgers,
            "It was deleted in MLflow, but its folder is in the storage folder",
            "Its runs cannot be seen, finished or evaluated; `mlflow gc` would remove them for good",
            "--fix restores it in MLflow with its runs",
            partial(ledgers.client.restore_experiment, experiment.experiment_id),
        )


def duplicate_runs(ledgers: Ledgers) -> Iterator[Finding]:
    """Find trials that MLflow has more than once."""
    for key, (kept, *others) in ledgers.by_key.items():
        if others:
            yield ledger_fault(
                ledgers,
                f"MLflow has {len(others) + 1} runs of {kept.info.run_name} ({key})",
                "Commands show the one that knows most, but MLflow's page both",
                f"--fix keeps {kept.info.run_id}, which knows most, and marks the others by the tag {DUPLICATE_TAG}",
                partial(_mark_duplicates, ledgers, kept, others),
            )


def _mark_duplicates(ledgers: Ledgers, kept: Any, others: Sequence[Any]) -> None:
    for run in others:
        run_id = run.info.run_id
        ledgers.client.set_tag(run_id, DUPLICATE_TAG, kept.info.run_id)
        ledgers.client.set_tag(run_id, KIND_TAG, "duplicate")
        if run.info.status == "RUNNING":
            ledgers.client.set_tag(run_id, STATE_TAG, str(TrialState.LOST))
            ledgers.client.set_terminated(run_id, TrialState.LOST.mlflow, _last_heard_ms(ledgers, run))
        if EXPERIMENT_TAG in run.data.tags:
            ledgers.client.delete_tag(run_id, EXPERIMENT_TAG)
        ledgers.client.delete_tag(run_id, KEY_TAG)  # last: it is what finds the run again after a kill


def run_ends(ledgers: Ledgers) -> Iterator[Finding]:
    """Compare how MLflow and Ray say that each trial ended."""
    for run in ledgers.active:
        key, tag, status = key_of(run), run.data.tags.get(STATE_TAG), run.info.status
        state, trial = TrialState.of(tag), ledgers.trials.get(key)
        name = run.info.run_name
        if trial is not None and trial.state is not None and "/" in key:
            if state is None or not state.tells(trial.state) or status != state.mlflow:
                yield _wrong_end(ledgers, run, trial, trial.state)
        elif status == "RUNNING":
            yield _zombie(ledgers, run, _left_state(ledgers, run, trial))
        elif state is TrialState.INTERRUPTED and trial is None and key.split("/")[0] in ledgers.folders and "/" in key:
            yield _zombie(ledgers, run, TrialState.LOST)
        elif state is not None and not state.is_open and status != state.mlflow:
            text = f"{name} is {state} in its tag, but {status} in MLflow"
            repair = partial(ledgers.client.set_terminated, run.info.run_id, state.mlflow, run.info.end_time)
            advice = f"--fix makes it {state.mlflow}"
            yield ledger_fault(ledgers, text, "MLflow's page and our commands tell different things", advice, repair)


def _wrong_end(ledgers: Ledgers, run: Any, trial: RayTrial, end: TrialState) -> Finding:
    """Return the finding that MLflow does not say that a trial ended as Ray's state has it."""
    name, tag, status = run.info.run_name, run.data.tags.get(STATE_TAG), run.info.status
    repair = partial(_record_end, ledgers, run, trial)
    advice = "--fix records in MLflow what Ray saved of it"
    if status == "RUNNING" or _is_unfinished(tag):
        text = f"MLflow lacks the end of {name}: {tag or TrialState.RUNNING} there, {end} in Ray's state"
        return ledger_fault(ledgers, text, "Its driver was killed before the end was tracked", advice, repair)
    text = f"{name} is {tag} ({status}) in MLflow, but {end} in Ray's state"
    return ledger_fault(ledgers, text, "One of them was changed by hand or lost something", advice, repair)


def _is_unfinished(tag: str | None) -> bool:
    """Return whether a run's tag says no end of it."""
    state = TrialState.of(tag)
    return tag is None or (state is not None and not state.has_ended)


def _left_state(ledgers: Ledgers, run: Any, trial: RayTrial | None) -> TrialState:
    """Return how a run is to be closed whose driver is dead."""
    goes_on = trial is not None
    if key_of(run) == ledgers.name:
        state = TrialState.of(run.data.tags.get(STATE_TAG))
        if state in (TrialState.FINISHED, TrialState.FAILED):
            return state
        goes_on = ledgers.resumable
    return TrialState.INTERRUPTED if goes_on else TrialState.LOST


def _zombie(ledgers: Ledgers, run: Any, state: TrialState) -> Finding:
    text = f"{run.info.run_name} is {run.data.tags.get(STATE_TAG, TrialState.RUNNING)} ({run.info.status}) in MLflow"
    outlooks = {TrialState.INTERRUPTED: "it can go on", TrialState.LOST: "nothing can go on with it"}
    advice = f"--fix closes it as {state.mlflow}, {state}"
    return ledger_fault(
        ledgers,
        f"{text}, but no driver lives",
        f"Its driver was killed; {outlooks.get(state, f'it was {state}')}",
        advice + ("; --resume goes on with it" if state is TrialState.INTERRUPTED else ""),
        partial(_close, ledgers, run, state),
    )


def _close(ledgers: Ledgers, run: Any, state: TrialState) -> None:
    ledgers.client.set_tag(run.info.run_id, STATE_TAG, str(state))
    if run.info.status == "RUNNING":
        ledgers.client.set_terminated(run.info.run_id, state.mlflow, _last_heard_ms(ledgers, run))


def _last_heard_ms(ledgers: Ledgers, run: Any) -> int:
    """Return when a run last reported, in Unix milliseconds."""
    history = ledgers.client.get_metric_history(run.info.run_id, "time/evaluation")
    return max((entry.timestamp for entry in history), default=int(run.info.start_time))


def _record_end(ledgers: Ledgers, run: Any, trial: RayTrial) -> None:
    """Write the end of a trial to its run, as its driver would have."""
    state = trial.state
    assert state is not None
    run_id, tags = run.info.run_id, _tags_of_end(ledgers, key_of(run), trial, state)
    heard_ms = int((trial.heard or time.time()) * 1000)
    for goal, value in kept_metrics(ledgers.best(key_of(run))).items():
        if run.data.metrics.get(f"best/{goal}") != value:  # else it had arrived before the end
            ledgers.client.log_metric(run_id, f"best/{goal}", value, heard_ms, int(tags[BEST_STEP_TAG]))
    for tag, text in tags.items():
        ledgers.client.set_tag(run_id, tag, text)
    if FAILURE_TAG in run.data.tags and FAILURE_TAG not in tags:
        ledgers.client.delete_tag(run_id, FAILURE_TAG)
    ledgers.client.set_terminated(run_id, state.mlflow, heard_ms)


def _tags_of_end(ledgers: Ledgers, key: str, trial: RayTrial, state: TrialState) -> dict[str, str]:
    """Return what the run of a trial is tagged with that ended in this state."""
    failure = trial.reason if state.is_failure else None
    return end_tags(ledgers.storage, state, ledgers.best(key), ledgers.objective(key.split("/")[0]), failure)


def missing_runs(ledgers: Ledgers) -> Iterator[Finding]:
    """Find trials in Ray's state that MLflow does not know."""
    if ledgers.trials and not ledgers.runs:
        yield Finding(
            ledgers.name,
            "warning",
            f"MLflow has no run of its {len(ledgers.trials)} trials",
            "It was tracked to another server, or that database was lost",
            "Give --tracking-uri, if it was",
        )
        return
    if ledgers.trials and ledgers.parent is None and ledgers.name not in {key_of(run) for run in ledgers.runs}:
        text = "MLflow lacks the run that its trials belong to"
        yield ledger_fault(ledgers, text, "Reports and the leaderboard need it", "--resume opens it again")
        return
    tracked = {key_of(run) for run in ledgers.runs}
    for key, trial in ledgers.trials.items():
        if trial.reported and key not in tracked:
            yield ledger_fault(
                ledgers,
                f"MLflow lacks the trial {key}, which is {trial.state or 'unfinished'} in Ray's state",
                "It is missing from the leaderboard",
                "--fix records its settings, last evaluation and checkpoint; its curves are lost",
                partial(_record_run, ledgers, key, trial),
            )


def _record_run(ledgers: Ledgers, key: str, trial: RayTrial) -> None:
    """Track a trial that MLflow does not know, from Ray's state and its checkpoint."""
    folder, _, trial_id = key.partition("/")
    record = ledgers.records.get(folder) or ledgers.records[ledgers.name]
    config = TrialSpec(ledgers.storage, folder, record.shared_configs).config(trial.config)
    kinds = {".stages-": "stage", ".rerank-": "rerank", ".finish-": "finish"}
    kind = next((kind for part, kind in kinds.items() if part in folder), "trial")
    number = [other for other in ledgers.trials if other.startswith(f"{folder}/")].index(key) + 1
    tags = {
        KIND_TAG: kind,
        METHOD_TAG: config.method_name,
        TRIAL_ID_TAG: trial_id,
        EXPERIMENT_TAG: folder,
        SEED_TAG: str(config.seed),
        OBJECTIVE_TAG: str(ledgers.objective(folder)),
        RECOVERED_TAG: "from Ray's state",
    }
    name = f"{config.method_name}-{number:03d}" if kind == "trial" else f"{kind}-{trial_id}"
    tracker = Tracker(ledgers.place)
    tracker.start(RunInfo(key, ledgers.name, name, tags, trial.config, record.from_key or ledgers.name))
    tracker.log_json(key, config.as_dict(), "config.yaml")
    if trial.step is not None:
        tracker.log_metrics(key, trial.metrics, trial.step)
    if trial.state is not None:
        best = ledgers.best(key)
        if best is not None:
            reached = {f"best/{goal}": value for goal, value in kept_metrics(best).items()}
            tracker.log_summary(key, reached, best.metrics["step"])
            if best.kept:
                tracker.log_evaluation(key, best.path)
        tracker.end(key, trial.state.mlflow, _tags_of_end(ledgers, key, trial, trial.state))
    tracker.close()  # closes as interrupted what can go on


def unknown_runs(ledgers: Ledgers) -> Iterator[Finding]:
    """Tell of trials that MLflow has as ended, but Ray does not know. Of shared stages that is as it must be."""
    for run in ledgers.active:
        key, tag = key_of(run), run.data.tags.get(STATE_TAG)
        is_trial = run.data.tags.get(KIND_TAG) == "trial" and key.split("/")[0] in ledgers.folders
        if is_trial and key not in ledgers.trials and not _is_unfinished(tag):
            yield Finding(
                ledgers.name,
                "warning",
                f"{run.info.run_name} is {tag} in MLflow, but Ray's state does not know it",
                "Ray's state is older than the run: the driver was killed within a second of it, or it is a copy",
                "It stays on the leaderboard; nothing is to do",
            )


def checkpoint_findings(ledgers: Ledgers) -> Iterator[Finding]:
    """Find runs whose checkpoint is not where their tag says, or is cut short."""
    for run in ledgers.active:
        noted, name = run.data.tags.get(CHECKPOINT_TAG, NOT_KEPT), run.info.run_name
        if noted == NOT_KEPT:
            continue
        try:
            path = checkpoint_folder(ledgers.storage, noted)
        except UsageError as error:
            meaning, advice = f"It is never opened: {error}", f"--fix clears the tag {CHECKPOINT_TAG}"
            text = f"The tag {CHECKPOINT_TAG} of {name} leads out of the storage folder: {noted}"
            yield ledger_fault(ledgers, text, meaning, advice, partial(_give_up_checkpoint, ledgers, run))
            continue
        if is_sound(path):
            continue
        is_there = path.exists()
        yield ledger_fault(
            ledgers,
            f"The checkpoint of {name} is {'cut short' if is_there else 'gone'}: {path}",
            "It cannot be finished, evaluated or exported; what it reached stays known",
            f"--fix clears the tag {CHECKPOINT_TAG}" + (" and sets the folder aside" if is_there else ""),
            partial(_give_up_checkpoint, ledgers, run, path),
        )


def _give_up_checkpoint(ledgers: Ledgers, run: Any, path: Path | None = None) -> None:
    ledgers.client.set_tag(run.info.run_id, GONE_TAG, run.data.tags[CHECKPOINT_TAG])
    if path is not None and path.is_dir():
        path.rename(path.with_name(f"broken_{path.name}"))  # so that nothing takes it for the best
    ledgers.client.delete_tag(run.info.run_id, CHECKPOINT_TAG)
