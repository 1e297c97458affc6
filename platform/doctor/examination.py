"""Is everything sound: environment, storage, tracking, studies, cluster; and do the ledgers of each experiment agree.

Looking writes nothing but a probe that is removed. What is repaired, each check of `agreement` and this module says.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from segadapt.platform.doctor.drivers import Drivers, experiment_of, folders_of
from segadapt.platform.doctor.environment import environment_findings
from segadapt.platform.doctor.findings import Examination, Finding, fault
from segadapt.platform.doctor.ledgers import Ledgers, experiments_to_compare, read_ledgers
from segadapt.platform.doctor.mlflow_checks import (
    checkpoint_findings,
    deleted_experiment,
    duplicate_runs,
    missing_runs,
    run_ends,
    unknown_runs,
)
from segadapt.platform.doctor.services import cluster_findings, study_findings, tracking_findings, waiting_findings
from segadapt.platform.doctor.storage import storage_findings
from segadapt.platform.doctor.study_checks import missing_proposals, study_duplicates, study_ends
from segadapt.platform.errors import UsageError
from segadapt.platform.experiment import tune_state
from segadapt.platform.experiment.record import RECORD
from segadapt.platform.search.study_storage import database_file, file_fault, open_study_storage
from segadapt.platform.storage.checkpoints import newest_checkpoint
from segadapt.platform.storage.driving import driving_if_free, is_driven
from segadapt.platform.storage.files import MOUNTS, file_system, keeps_locks_apart, locked
from segadapt.platform.storage.folders import Storage
from segadapt.platform.tracking.client import reading_client


def examine(what: Examination) -> Iterator[Finding]:
    """Look at everything, in the order in which one thing needs another; with `fix` repair it on the way.

    Raises:
        UsageError: If another process repairs the same storage folder.
    """
    if not what.fix or not what.storage.root.is_dir():
        yield from _examined(what)
        return
    with contextlib.ExitStack() as held:
        try:
            what.storage.locks.mkdir(exist_ok=True)
            alone = held.enter_context(locked(what.storage.locks / ".doctor", wait=False))
        except OSError:  # the look at the storage folder tells
            alone = True
        if not alone:
            raise UsageError(
                f"One `doctor --fix` at a time must repair a storage folder, but another one repairs "
                f"{what.storage.root}. Wait until it has ended."
            )
        yield from _examined(what)


def _examined(what: Examination) -> Iterator[Finding]:
    checks = (
        environment_findings,
        storage_findings,
        waiting_findings,
        tracking_findings,
        study_findings,
        cluster_findings,
    )
    sound = True
    for check in checks:
        for finding in check(what):
            done = finding.mended() if what.fix else finding
            sound = sound and not (finding.level == "fault" and check is tracking_findings)
            yield done
    if sound:
        yield from _experiments(what)


# Experiments.


def _experiments(what: Examination) -> Iterator[Finding]:
    """Compare the three ledgers of every experiment that nobody drives; what is repaired is read again."""
    storage = what.storage
    if what.place.tracking_uri is None and not storage.mlflow_database.is_file():
        return
    if keeps_locks_apart(*file_system(storage.root, MOUNTS)):
        return
    client = reading_client(what.place)
    studies: Any | None = None
    file = database_file(what.place)
    if file is None or file_fault(file) is None:
        try:
            studies = open_study_storage(what.place.study_url)
        except Exception:  # said before
            return
    for name in experiments_to_compare(storage, client, is_local=what.place.tracking_uri is None):
        try:
            yield from _experiment(what, name, client, studies)
        except (ValueError, TypeError, KeyError, UsageError) as error:  # of a state or record that is not as it must be
            advice = "Put back a copy, or use the version that wrote it"
            yield fault(name, str(error), "It was changed, or is another version's: it cannot go on", advice)


def _experiment(what: Examination, name: str, client: Any, studies: Any | None) -> Iterator[Finding]:
    def books() -> Ledgers:
        return read_ledgers(name, what.place, client, studies)

    with contextlib.ExitStack() as held:
        parts = {name, *(folder.name for folder in folders_of(what.storage, name) if (folder / RECORD).is_file())}
        if what.fix:
            free = [held.enter_context(driving_if_free(what.storage, part)) for part in sorted(parts)]
        else:
            free = [not is_driven(what.storage, part) for part in parts]
        if not all(free) or Drivers.of(what.storage).drive(name):
            yield _driven(name)
            return
        yield from _compared(what, name, books)


def _compared(what: Examination, name: str, books: Callable[[], Ledgers]) -> Iterator[Finding]:
    """Compare the ledgers of an experiment that nobody drives."""
    for finding in _tune_states(what.storage, name):
        yield (finding := finding.mended() if what.fix else finding)
        if not finding.repaired:
            return  # what trials there are, nobody knows
    known, faults = books(), 0
    for check in LEDGER_CHECKS:
        findings = list(check(known))
        for finding in findings:
            faults += finding.level == "fault"
            if what.fix and finding.repair is not None and Drivers.of(what.storage).drive(name):
                yield _driven(name)  # a part of it was begun meanwhile, as a finish of one of its trials
                return
            yield finding.mended() if what.fix else finding
        if what.fix and any(finding.repair is not None for finding in findings):
            known = books()
    if not faults and (known.runs or known.trials):
        yield Finding(name, "ok", f"Ray, Optuna and MLflow agree on {len(known.trials)} trials")


def _tune_states(storage: Storage, name: str) -> Iterator[Finding]:
    """Find what a kill left of the state files that Tune copies into the folders of an experiment."""
    for folder in sorted(path for path in storage.experiments.glob(f"{name}*") if path.is_dir()):
        files = tune_state.damaged(folder) if experiment_of(storage, folder.name) == name else []
        if files:
            text = f"What Tune saved in {folder} is damaged: {', '.join(files)}"
            meaning = "A command was killed as it saved, or the disk was full or is failing"
            repair = partial(_mend, folder)
            yield Finding(name, "fault", text, meaning, "--fix puts the state before it back, as --resume does", repair)


def _mend(folder: Path) -> None:
    tune_state.mend(folder)


def _driven(name: str) -> Finding:
    return Finding(name, "ok", "A command works on it now: it is left alone")


def _unfinished_trials(ledgers: Ledgers) -> Iterator[Finding]:
    """Tell of trials that can go on, and whether they start where they were."""
    waiting = [key for key, trial in ledgers.trials.items() if trial.state is None]
    if not waiting:
        return
    if refusal := tune_state.of_another_version(ledgers.storage, ledgers.name):
        yield Finding(ledgers.name, "warning", f"{len(waiting)} trials are unfinished, but {refusal}")
        return
    for key in waiting:
        folder, _, trial_id = key.partition("/")
        step = ledgers.trials[key].step
        if step and newest_checkpoint(ledgers.storage.experiment(folder), trial_id) is None:
            yield Finding(
                ledgers.name,
                "warning",
                f"The trial {key} was at step {step}, but none of its checkpoints is whole",
                "It can go on, but from its beginning",
                "",
            )
    yield Finding(
        ledgers.name,
        "ok",
        f"{len(waiting)} trials are unfinished and can go on",
        "",
        f"`--resume {ledgers.name}` does it",
    )


LEDGER_CHECKS = (
    deleted_experiment,
    duplicate_runs,
    run_ends,
    missing_runs,
    unknown_runs,
    checkpoint_findings,
    study_duplicates,
    study_ends,
    missing_proposals,
    _unfinished_trials,
)
"""In this order; each looks at what the repairs of those before have left."""
