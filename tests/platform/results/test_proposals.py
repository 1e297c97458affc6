"""What a report says of where PriorBand's proposals came from."""

from typing import Any

import optuna
import pytest
from optuna.trial import create_trial

from segadapt.platform.results.proposals import origins
from segadapt.platform.search.priorband import PROPOSAL, Proposal


def study_of(*proposals: Proposal) -> Any:
    study = optuna.create_study()
    for proposal in proposals:
        study.add_trial(create_trial(value=0.0, user_attrs={PROPOSAL: proposal.as_dict()}))
    return study


def test_the_published_setting_is_said_not_to_transfer_where_good_trials_lie_elsewhere() -> None:
    first = Proposal(0.5, 0.5, 0.0, None, is_published=True)
    drawn = [Proposal(0.5, 0.5, 0.0, None, True, "uniform"), Proposal(0.5, 0.01, 0.49, 250.0, True, "incumbent")]
    elsewhere = origins(study_of(first, *drawn))
    assert elsewhere is not None
    assert elsewhere.counts == {"start": 1, "uniform": 1, "incumbent": 1}
    assert elsewhere.verdict == (
        "The published setting does not transfer to your data: the other good trials are 250 times as likely around "
        "the best one as around the published setting."
    )


@pytest.mark.parametrize(("ratio", "is_published"), [(3.0, True), (3.0, False), (None, True)])
def test_a_start_that_may_suit_is_not_judged(ratio: float | None, is_published: bool) -> None:
    where = origins(study_of(Proposal(0.5, 0.25, 0.25, ratio, is_published, "prior")))
    assert where is not None
    assert "transfer" not in (where.verdict or "")
    assert (where.verdict is None) is (ratio is None)
    assert ("published" in where.start) is is_published


def test_the_searches_of_other_samplers_say_nothing_of_it() -> None:
    study = optuna.create_study()
    study.add_trial(create_trial(value=0.0))
    assert origins(study) is None
