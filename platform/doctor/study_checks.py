"""Does Optuna's study agree with Ray's state?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from segadapt.platform.doctor.findings import Finding
from segadapt.platform.doctor.ledgers import DUPLICATES, Ledgers, ledger_fault, proposals_by_trial
from segadapt.platform.doctor.ray_state import RayTrial
from segadapt.platform.experiment.record import Record
from segadapt.platform.experiment.session import inheritances
from segadapt.platform.experiment.tune_state import is_begun
from segadapt.platform.search.study import (
    LOST,
    RUNG,
    TOO_LARGE,
    TRIAL_ID,
    study_name,
    study_point,
    values_as_kept,
    values_by_step,
)
from segadapt.platform.search.study_storage import open_study_storage, study_database_name, trial_handle, why_no_study
from segadapt.platform.settings.config import METHOD
from segadapt.platform.settings.objective import Objective
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
    if trial.state is TrialState.INFEASIBLE:
        return state in ("PRUNED", "FAIL")  # an earlier version told the study that it failed
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
    elif trial.state is TrialState.INFEASIBLE:
        for constraint, violation in TOO_LARGE.items():
            trial_handle(study, proposal).set_constraint(constraint, violation)
        study.tell(proposal.number, state=OptunaState.PRUNED)
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
        if is_begun(ledgers.storage.experiment(ledgers.name)):
            yield _lost_study(ledgers, record)
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


def _lost_study(ledgers: Ledgers, record: Record) -> Finding:
    """Return what there is to say of a search whose study is not in the database that was looked at."""
    noted, here = record.study, study_database_name(ledgers.place)
    text = f"Its study is gone: {why_no_study(ledgers.place, ledgers.name)}"
    if noted == here or (noted is None and here):  # an address that is given says where it was
        return ledger_fault(
            ledgers,
            text,
            "It was lost: the search cannot go on without it",
            "Put back a copy; or --fix makes it anew from what Ray and MLflow hold of its trials",
            partial(_restore_study, ledgers, record),
        )
    if noted is not None:
        advice = f"Give --study-uri {noted}" if noted else "Leave --study-uri out"
        return Finding(ledgers.name, "warning", text, "Its study is in another database", advice)
    storages_study = replace(ledgers.place, study_uri=None).study_url
    return Finding(
        ledgers.name,
        "warning",
        text,
        "It is in another database or was lost; an earlier version of segadapt did not note which it was",
        f"Give --study-uri, if it was made with one; otherwise `--fix --study-uri {storages_study}` makes it anew",
    )


def _restore_study(ledgers: Ledgers, record: Record) -> None:
    """Make a lost study anew: what it took over from others, what it is to try first, and its own trials."""
    import optuna

    from segadapt.platform.search.searcher import make_study

    for earlier in record.warm_start:
        if lack := why_no_study(ledgers.place, earlier):
            raise RuntimeError(f"what it took over from {earlier} is needed first, but {lack}: repeat --fix after that")
    storage = open_study_storage(ledgers.place.study_url)
    settings = record.settings()
    make_study(storage, record.name, Objective.parse(record.objective))
    study = optuna.load_study(study_name=record.name, storage=storage)
    for inherited in inheritances(record, ledgers.place):
        study.add_trials(inherited.trials)
        for point in inherited.points:
            study.enqueue_trial(point)
    trials = [trial for key, trial in ledgers.trials.items() if key.rpartition("/")[0] == record.name]
    for method in list(settings.spaces)[len(trials) :]:
        study.enqueue_trial(study_point(settings.spaces, method, record.candidates[method].first))
    restored = replace(ledgers, study=study)
    for trial in trials:
        _add_proposal(restored, record, trial)


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
    infeasible = trial.state is TrialState.INFEASIBLE
    if len(reached) < len(goals) and trial.state is not None and not infeasible:
        state = OptunaState.FAIL
    pruned = state == OptunaState.PRUNED and len(reached) == len(goals)
    by_step = _history(ledgers, trial)
    intermediate, attributes = values_as_kept(by_step, goals)
    ledgers.study.add_trial(
        create_trial(
            state=state,
            values=reached if state == OptunaState.COMPLETE or (pruned and len(goals) == 1) else None,
            params=study_point(spaces, method, values),
            distributions=distributions,
            user_attrs={TRIAL_ID: trial.trial_id, **attributes, **_decisions(ledgers, record, trial, by_step)},
            intermediate_values=intermediate,
            constraints=dict(TOO_LARGE) if infeasible else None,
        )
    )


def _history(ledgers: Ledgers, trial: RayTrial) -> dict[int, dict[str, float]]:
    """Return what a trial reached at each step: as MLflow has it, and at its last report as Ray has it."""
    goals = ledgers.objective(ledgers.name).goals
    by_step: dict[int, dict[str, float]] = {}
    for run in ledgers.by_key.get(f"{ledgers.name}/{trial.trial_id}", ())[:1]:
        for goal in goals:
            for entry in ledgers.client.get_metric_history(run.info.run_id, goal):
                by_step.setdefault(entry.step, {})[goal] = entry.value
    if trial.step is not None:
        by_step[trial.step] = {goal: trial.metrics[goal] for goal in goals if goal in trial.metrics}
    return {step: by_step[step] for step in sorted(by_step) if len(by_step[step]) == len(goals)}


def _decisions(
    ledgers: Ledgers, record: Record, trial: RayTrial, by_step: Mapping[int, Mapping[str, float]]
) -> dict[str, Any]:
    """Return what was decided about a trial at each rung, as it followed from that: it went on, or its steps end."""
    from segadapt.platform.search.horizon import Horizon
    from segadapt.platform.search.schedulers import SCHEDULERS

    horizon = Horizon(record.grace_steps, record.steps, record.concurrent or 1)
    scheduler = SCHEDULERS[record.scheduler].of(ledgers.study, ledgers.objective(ledgers.name), horizon)
    halted = trial.state is TrialState.STOPPED_EARLY or trial.status == "PAUSED"
    last = max(by_step, default=0)
    attributes: dict[str, Any] = {}
    for step, values in by_step.items():
        rung = None if trial.state is TrialState.FINISHED and step == last else scheduler.rung_of(step)
        if rung is not None:
            decision = {"values": dict(values), "continues": not (halted and step == last)}
            attributes.setdefault(f"{RUNG}{rung}", decision)
    return attributes
