"""Do MLflow's runs agree with Ray's state?"""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from segadapt.platform.doctor.findings import Finding
from segadapt.platform.doctor.ledgers import MLFLOW_STATUS, Ledgers, key_of, ledger_fault
from segadapt.platform.doctor.ray_state import RayTrial
from segadapt.platform.errors import UsageError
from segadapt.platform.settings.objective import GOALS
from segadapt.platform.storage.checkpoints import checkpoint_folder, checkpoint_name, is_sound
from segadapt.platform.tracking.descriptions import trial_note
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
    NOTE_TAG,
    OBJECTIVE_TAG,
    RECOVERED_TAG,
    SEED_TAG,
    STATE_TAG,
    TRIAL_ID_TAG,
)
from segadapt.platform.tracking.tracker import RunInfo, Tracker

_BUDGET = ("out of time", "out of GPU hours")

_FITTING = {
    "failed": ("failed", "infeasible"),
    "finished": ("finished", *_BUDGET),
    "stopped early": ("stopped early", *_BUDGET),
}
"""What MLflow may say of a trial, by how Ray ended it: Ray does not tell the end of a budget from early stopping."""

_UNFINISHED = (None, "running", "paused", "interrupted", "lost")


def duplicate_runs(ledgers: Ledgers) -> Iterator[Finding]:
    """Find trials that MLflow has more than once."""
    for key, (kept, *others) in ledgers.by_key.items():
        if others:
            yield ledger_fault(
                ledgers,
                f"MLflow has {len(others) + 1} runs of {kept.info.run_name} ({key})",
                "It counts more than once on the leaderboard, and commands go on with either",
                f"--fix keeps {kept.info.run_id}, which knows most, and marks the others by the tag {DUPLICATE_TAG}",
                partial(_mark_duplicates, ledgers, kept, others),
            )


def _mark_duplicates(ledgers: Ledgers, kept: Any, others: Sequence[Any]) -> None:
    for run in others:
        run_id = run.info.run_id
        ledgers.client.set_tag(run_id, DUPLICATE_TAG, kept.info.run_id)
        ledgers.client.set_tag(run_id, KIND_TAG, "duplicate")
        if run.info.status == "RUNNING":
            ledgers.client.set_tag(run_id, STATE_TAG, "lost")
            ledgers.client.set_terminated(run_id, "KILLED", _last_heard_ms(ledgers, run))
        if EXPERIMENT_TAG in run.data.tags:
            ledgers.client.delete_tag(run_id, EXPERIMENT_TAG)
        ledgers.client.delete_tag(run_id, KEY_TAG)  # last: it is what finds the run again after a kill


def run_ends(ledgers: Ledgers) -> Iterator[Finding]:
    """Compare how MLflow and Ray say that each trial ended."""
    for run in ledgers.active:
        key, state, status = key_of(run), run.data.tags.get(STATE_TAG), run.info.status
        trial = ledgers.trials.get(key)
        ended = trial.state if trial is not None else None
        name = run.info.run_name
        if ended is not None and "/" in key:
            assert trial is not None
            if state in _FITTING[_broad(ended)] and status == MLFLOW_STATUS[state]:
                continue
            repair = partial(_record_end, ledgers, run, trial)
            advice = "--fix records in MLflow what Ray saved of it"
            if status == "RUNNING" or state in _UNFINISHED:
                text = f"MLflow lacks the end of {name}: {state or 'running'} there, {ended} in Ray's state"
                yield ledger_fault(ledgers, text, "Its driver was killed before the end was tracked", advice, repair)
            else:
                text = f"{name} is {state} ({status}) in MLflow, but {ended} in Ray's state"
                yield ledger_fault(ledgers, text, "One of them was changed by hand or lost something", advice, repair)
        elif status == "RUNNING":
            yield _zombie(ledgers, run, _left_state(ledgers, run, trial))
        elif state == "interrupted" and trial is None and key.split("/")[0] in ledgers.folders and "/" in key:
            yield _zombie(ledgers, run, "lost")
        elif state in MLFLOW_STATUS and status != MLFLOW_STATUS[state]:
            text = f"{name} is {state} in its tag, but {status} in MLflow"
            repair = partial(ledgers.client.set_terminated, run.info.run_id, MLFLOW_STATUS[state], run.info.end_time)
            advice = f"--fix makes it {MLFLOW_STATUS[state]}"
            yield ledger_fault(ledgers, text, "MLflow's page and our commands tell different things", advice, repair)


def _broad(state: str) -> str:
    return "failed" if state == "infeasible" else state


def _left_state(ledgers: Ledgers, run: Any, trial: RayTrial | None) -> str:
    """Return how a run is to be closed whose driver is dead."""
    state: str | None = run.data.tags.get(STATE_TAG)
    if key_of(run) == ledgers.name:
        return state if state in ("finished", "failed") else "interrupted" if ledgers.resumable else "lost"
    return "interrupted" if trial is not None else "lost"


def _zombie(ledgers: Ledgers, run: Any, state: str) -> Finding:
    status = MLFLOW_STATUS[state]
    text = f"{run.info.run_name} is {run.data.tags.get(STATE_TAG, 'running')} ({run.info.status}) in MLflow"
    goes_on = {"interrupted": "it can go on", "lost": "nothing can go on with it"}.get(state, f"it was {state}")
    return ledger_fault(
        ledgers,
        f"{text}, but no driver lives",
        f"Its driver was killed; {goes_on}",
        f"--fix closes it as {status}, {state}" + ("; --resume goes on with it" if state == "interrupted" else ""),
        partial(_close, ledgers, run, state),
    )


def _close(ledgers: Ledgers, run: Any, state: str) -> None:
    ledgers.client.set_tag(run.info.run_id, STATE_TAG, state)
    if run.info.status == "RUNNING":
        ledgers.client.set_terminated(run.info.run_id, MLFLOW_STATUS[state], _last_heard_ms(ledgers, run))


def _last_heard_ms(ledgers: Ledgers, run: Any) -> int:
    """Return when a run last reported, in Unix milliseconds."""
    history = ledgers.client.get_metric_history(run.info.run_id, "time/evaluation")
    return max((entry.timestamp for entry in history), default=int(run.info.start_time))


def _record_end(ledgers: Ledgers, run: Any, trial: RayTrial) -> None:
    """Write the end of a trial to its run, as its driver would have."""
    state = trial.state
    assert state is not None
    run_id, tags = run.info.run_id, _end_tags(ledgers, key_of(run), trial)
    heard_ms = int((trial.heard or time.time()) * 1000)
    for metric, value in _kept_metrics(ledgers, key_of(run)).items():
        ledgers.client.log_metric(run_id, metric, value, heard_ms, int(tags[BEST_STEP_TAG]))
    for tag, text in tags.items():
        ledgers.client.set_tag(run_id, tag, text)
    if FAILURE_TAG in run.data.tags and FAILURE_TAG not in tags:
        ledgers.client.delete_tag(run_id, FAILURE_TAG)
    ledgers.client.set_terminated(run_id, MLFLOW_STATUS[state], heard_ms)


def _end_tags(ledgers: Ledgers, key: str, trial: RayTrial) -> dict[str, str]:
    """Return what the run of an ended trial is tagged with."""
    state, best = trial.state, ledgers.best(key)
    assert state is not None
    tags = {STATE_TAG: state}
    if best is not None:
        where = checkpoint_name(ledgers.storage, best.path) if best.kept else NOT_KEPT
        tags |= {CHECKPOINT_TAG: where, BEST_STEP_TAG: str(best.metrics["step"])}
    if trial.status == "ERROR":
        tags[FAILURE_TAG] = trial.reason
    goals = {name.removeprefix("best/"): value for name, value in _kept_metrics(ledgers, key).items()}
    step = best.metrics["step"] if best is not None else None
    shown = {goal: goals[goal] for goal in ledgers.objective(key.split("/")[0]).goals if goal in goals}
    tags[NOTE_TAG] = trial_note(state, shown, step, tags.get(FAILURE_TAG))
    return tags


def _kept_metrics(ledgers: Ledgers, key: str) -> dict[str, float]:
    """Return what the kept checkpoint of a trial had reached."""
    best = ledgers.best(key)
    metrics = best.metrics if best is not None else {}
    return {
        f"best/{name}": metrics[name]
        for name in GOALS
        if metrics.get(name) is not None and metrics[name] == metrics[name]
    }


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
    from segadapt.platform.experiment.events import METRIC_PREFIXES
    from segadapt.platform.trial.spec import TrialSpec

    folder, _, trial_id = key.partition("/")
    record = ledgers.records.get(folder) or ledgers.records[ledgers.name]
    fixed = {name: found.fixed for name, found in record.candidates.items()}
    config = TrialSpec(ledgers.storage, folder, fixed).config(trial.config)
    kinds = {".stages-": "stage", ".rerank-": "rerank", ".finish-": "finish"}
    kind = next((found for part, found in kinds.items() if part in folder), "trial")
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
    if "step" in trial.last:
        metrics = {name: value for name, value in trial.last.items() if name.startswith(METRIC_PREFIXES)}
        tracker.log_metrics(key, metrics, int(trial.last["step"]))
    if trial.state is not None:
        best = ledgers.best(key)
        if best is not None:
            tracker.log_summary(key, _kept_metrics(ledgers, key), best.metrics["step"])
            if best.kept:
                tracker.log_evaluation(key, best.path)
        tracker.set_tags(key, _end_tags(ledgers, key, trial))
        tracker.end(key, MLFLOW_STATUS[trial.state])  # type: ignore[arg-type]  # one of them
    tracker.close()  # closes as interrupted what can go on


def unknown_runs(ledgers: Ledgers) -> Iterator[Finding]:
    """Tell of trials that MLflow has as ended, but Ray does not know. Of shared stages that is as it must be."""
    for run in ledgers.active:
        key, state = key_of(run), run.data.tags.get(STATE_TAG)
        is_trial = run.data.tags.get(KIND_TAG) == "trial" and key.split("/")[0] in ledgers.folders
        if is_trial and key not in ledgers.trials and state not in _UNFINISHED:
            yield Finding(
                ledgers.name,
                "warning",
                f"{run.info.run_name} is {state} in MLflow, but Ray's state does not know it",
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
