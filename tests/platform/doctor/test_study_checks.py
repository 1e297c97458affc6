"""Doctor's comparison of a study with Ray's state, on studies in memory."""

from typing import Any

import optuna
import pytest

from segadapt.platform.doctor.ledgers import Ledgers
from segadapt.platform.doctor.ray_state import RayTrial
from segadapt.platform.doctor.study_checks import missing_proposals, study_ends
from segadapt.platform.experiment.record import Candidate, Record
from segadapt.platform.search.study import TRIAL_ID
from segadapt.platform.settings.reported import End, Reported
from segadapt.platform.storage.folders import Place

TOO_LARGE = RayTrial("a", "ERROR", {"method.gain": 0.7}, Reported(end=End.INFEASIBLE, reason="too large"), None, None)


@pytest.fixture
def ledgers() -> Ledgers:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {"method.gain": optuna.distributions.FloatDistribution(0.0, 1.0)}
    return Ledgers(
        name="search",
        place=Place("runs"),
        client=None,
        runs=[],
        trials={"search/a": TOO_LARGE},
        folders=frozenset({"search"}),
        records={"search": Record("search", "search", {"sdca": Candidate({}, space)}, "target_val/miou")},
        study=optuna.create_study(direction="maximize"),
    )


def is_learnt(study: Any) -> bool:
    trial = study.trials[-1]
    return (trial.state.name, trial.constraints, trial.params) == ("PRUNED", {"memory": 1.0}, {"method.gain": 0.7})


def begin(study: Any) -> Any:
    study.enqueue_trial({"method.gain": 0.7})
    trial = study.ask()
    trial.suggest_float("method.gain", 0.0, 1.0)
    trial.set_user_attr(TRIAL_ID, "a")
    return trial


def test_a_trial_that_did_not_fit_is_told_to_a_study_that_did_not_hear_of_it(ledgers: Ledgers) -> None:
    assert ledgers.study is not None
    begin(ledgers.study)
    (finding,) = study_ends(ledgers)
    assert finding.mended().repaired, finding
    assert is_learnt(ledgers.study)
    assert not list(study_ends(ledgers))


def test_a_trial_that_did_not_fit_is_added_to_a_study_that_lacks_it(ledgers: Ledgers) -> None:
    (finding,) = missing_proposals(ledgers)
    assert finding.mended().repaired, finding
    assert is_learnt(ledgers.study)
    assert not list(study_ends(ledgers))


def test_the_failure_that_an_earlier_version_told_is_no_contradiction(ledgers: Ledgers) -> None:
    assert ledgers.study is not None
    ledgers.study.tell(begin(ledgers.study), state=optuna.trial.TrialState.FAIL)
    assert not list(study_ends(ledgers))
