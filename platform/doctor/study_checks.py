"""Does Optuna's study agree with Ray's state?"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from segadapt.platform.doctor.findings import Finding
from segadapt.platform.doctor.ledgers import DUPLICATES, Ledgers, ledger_fault, proposals_by_trial
from segadapt.platform.doctor.ray_state import RayTrial
from segadapt.platform.experiment.record import Record
from segadapt.platform.search.study import LOST, TRIAL_ID, study_name, study_point, values_by_step
from segadapt.platform.search.study_storage import trial_handle
from segadapt.platform.settings.config import METHOD
from segadapt.platform.settings.states import TrialState


def study_duplicates(ledgers: Ledgers) -> Iterator[Finding]:
    """Find trials that the study has more than once."""
    for kept, *others in proposals_by_trial(ledgers):
        if others:
            numbers = ", ".join(str(trial.number) for trial in (kept, *others))
            yield ledger_fault(
                ledgers,
                f"The study has {len(others) + 1} trials ({numbers}) of {ledgers.name}/{kept.user_attrs[TRIAL_ID]}",
                "The sampler counts it more than once",
                f"--fix keeps number {kept.number} and notes the others: Optuna lets no ended trial change",
                partial(_note_duplicates, ledgers, others),
            )


def _note_duplicates(ledgers: Ledgers, others: Sequence[Any]) -> None:
    study = ledgers.study
    assert study is not None
    noted = set(study.user_attrs.get(DUPLICATES, ()))
    study.set_user_attr(DUPLICATES, sorted(noted | {trial.number for trial in others if trial.state.is_finished()}))
    for trial in others:
        if not trial.state.is_finished():
            _give_up(ledgers, trial, again=False)


def study_ends(ledgers: Ledgers) -> Iterator[Finding]:
    """Compare how the study and Ray say that each trial ended."""
    for proposal, *_ in proposals_by_trial(ledgers):
        trial_id = proposal.user_attrs.get(TRIAL_ID)
        trial = ledgers.trials.get(f"{ledgers.name}/{trial_id}")
        name = f"Number {proposal.number} of the study ({trial_id or 'no trial'})"
        if proposal.state.is_finished():
            if trial is not None and trial.state is not None and not _agree(proposal.state.name, trial):
                yield Finding(
                    ledgers.name,
                    "warning",
                    f"{name} is {proposal.state.name} there, but {trial.state} in Ray's state",
                    "The sampler learns from the study's word, the leaderboard does not",
                    "Optuna lets no ended trial change; `search --fork` begins a study without it",
                )
        elif trial is None:
            yield ledger_fault(
                ledgers,
                f"{name} is RUNNING there, but {'Ray does not know it' if ledgers.folders else 'Ray has no state'}",
                "Its driver was killed before Ray had saved it; nobody runs it",
                "--fix closes it as lost" + (" and proposes the same values again" if ledgers.resumable else ""),
                partial(_give_up, ledgers, proposal, again=ledgers.resumable),
            )
        elif trial.state is not None:
            yield ledger_fault(
                ledgers,
                f"{name} is RUNNING there, but {trial.state} in Ray's state",
                "Its driver was killed before the study knew; it would count as running for ever",
                "--fix tells the study how it ended",
                partial(_tell, ledgers, proposal, trial),
            )


def _agree(state: str, trial: RayTrial) -> bool:
    if trial.status == "ERROR":
        return state == "FAIL"
    if state == "FAIL":
        return not trial.reported
    return state == "PRUNED" or trial.state is TrialState.FINISHED


def _give_up(ledgers: Ledgers, proposal: Any, *, again: bool) -> None:
    """Close a proposal that nobody runs, as a resumed search does; `again` proposes its values once more."""
    from optuna.trial import TrialState

    study = ledgers.study
    assert study is not None
    trial_handle(study, proposal).set_user_attr(LOST, True)
    study.tell(proposal.number, state=TrialState.FAIL)
    if again:
        study.enqueue_trial(proposal.params)


def _tell(ledgers: Ledgers, proposal: Any, trial: RayTrial) -> None:
    from optuna.trial import TrialState as OptunaState

    study, goals = ledgers.study, ledgers.objective(ledgers.name).goals
    assert study is not None
    values = [trial.metrics[goal] for goal in goals if goal in trial.metrics]
    if trial.state is TrialState.FINISHED and len(values) == len(goals):
        study.tell(proposal.number, values)
    elif trial.status != "ERROR" and values_by_step(proposal, goals):
        study.tell(proposal.number, state=OptunaState.PRUNED)
    else:
        study.tell(proposal.number, state=OptunaState.FAIL)


def missing_proposals(ledgers: Ledgers) -> Iterator[Finding]:
    """Find trials in Ray's state that the study does not know."""
    record = ledgers.records.get(ledgers.name)
    if record is None or record.kind != "search":
        return
    if ledgers.study is None:
        if ledgers.trials:
            yield Finding(
                ledgers.name,
                "warning",
                "Optuna's storage has no study of it",
                "Its study is in another database, or was lost: the search cannot go on without it",
                "Give --study-uri, if it was made with one",
            )
        return
    known = {trial.user_attrs.get(TRIAL_ID) for trial in ledgers.study.get_trials(deepcopy=False)}
    for key, trial in ledgers.trials.items():
        folder, _, trial_id = key.partition("/")
        if folder == ledgers.name and trial_id not in known:
            yield ledger_fault(
                ledgers,
                f"The study lacks the trial {key}, which is {trial.state or 'unfinished'} in Ray's state",
                "The sampler does not know it" + ("" if trial.state else "; --resume would stop there"),
                "--fix adds it with the values that Ray saved",
                partial(_add_proposal, ledgers, record, trial),
            )


def _add_proposal(ledgers: Ledgers, record: Record, trial: RayTrial) -> None:
    from optuna.distributions import CategoricalDistribution
    from optuna.trial import TrialState as OptunaState
    from optuna.trial import create_trial

    assert ledgers.study is not None
    spaces = record.settings().spaces
    method = str(trial.config.get(METHOD, next(iter(spaces))))
    values = {key: value for key, value in trial.config.items() if key in spaces[method]}
    distributions = {study_name(spaces, method, key): spaces[method][key] for key in values}
    if len(spaces) > 1:
        distributions[METHOD] = CategoricalDistribution(list(spaces))
    goals = ledgers.objective(ledgers.name).goals
    reached = [trial.metrics[goal] for goal in goals if goal in trial.metrics]
    state = OptunaState[(trial.state or TrialState.RUNNING).optuna]
    if len(reached) < len(goals) and trial.state is not None:
        state = OptunaState.FAIL
    pruned = state == OptunaState.PRUNED
    ledgers.study.add_trial(
        create_trial(
            state=state,
            values=reached if state == OptunaState.COMPLETE or (pruned and len(goals) == 1) else None,
            params=study_point(spaces, method, values),
            distributions=distributions,
            user_attrs={TRIAL_ID: trial.trial_id},
            intermediate_values={trial.step or 0: reached[0]} if len(goals) == len(reached) == 1 else {},
        )
    )
