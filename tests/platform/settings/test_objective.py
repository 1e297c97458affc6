"""What trials are compared by."""

import pytest

from segadapt.platform.errors import UsageError
from segadapt.platform.settings.objective import Objective

MIOU, ENTROPY, TIME = "target_val/miou", "score/entropy", "time/step"


@pytest.mark.parametrize("text", [MIOU, f"{MIOU},{TIME}", f"{ENTROPY}+source_val/miou"])
def test_an_objective_prints_as_it_is_read(text: str) -> None:
    assert str(Objective.parse(text)) == text


@pytest.mark.parametrize("text", ["", "loss/total", f"{MIOU},{MIOU}", TIME, f"{MIOU},nonsense", f"{MIOU}+"])
def test_a_wrong_objective_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--objective must"):
        Objective.parse(text)


def test_a_front_holds_what_nothing_surpasses() -> None:
    objective = Objective.parse(f"{TIME},{MIOU}")
    trials = [{MIOU: 0.6, TIME: 2.0}, {MIOU: 0.5, TIME: 1.0}, {MIOU: 0.5, TIME: 2.0}, {MIOU: 0.6, TIME: 2.0}]
    assert objective.front(trials) == [True, True, False, True]
    assert objective.modes == ["min", "max"]
    assert objective.leading == objective.keeps == MIOU


def test_ranks_weigh_all_goals_alike() -> None:
    objective = Objective.parse(f"{ENTROPY}+{MIOU}")
    trials = [{ENTROPY: -9.0, MIOU: 0.61}, {ENTROPY: -1.0, MIOU: 0.60}, {ENTROPY: -5.0, MIOU: 0.1}]
    assert objective.scores(trials) == [-2.0, -1.5, -2.5]
    assert objective.keeps == "step", "ranks compare trials, not checkpoints of one"
    equal = [{ENTROPY: 1.0, MIOU: 0.5}, {ENTROPY: 1.0, MIOU: 0.5}]
    assert objective.scores(equal) == [-1.5, -1.5]
