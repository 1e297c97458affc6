"""Samplers by name: each proposes what its seed and the study say, and refuses what it cannot model."""

from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from segadapt.platform.errors import UsageError
from segadapt.platform.search.horizon import Horizon
from segadapt.platform.search.priorband import Prior
from segadapt.platform.search.samplers import SAMPLERS, SamplerName, check_sampler, make_sampler
from segadapt.platform.search.searcher import StudySearch
from segadapt.platform.settings.objective import Objective
from segadapt.platform.settings.reported import End, Reported

MIOU = "target_val/miou"
NUMBERS: dict[str, BaseDistribution] = {
    "method.temperature": FloatDistribution(0.1, 10.0, log=True),
    "method.gain": FloatDistribution(0.0, 1.0),
}

START = {"method.temperature": 1.0, "method.gain": 0.5}


def proposals(name: SamplerName, seed: int, trials: int = 16, restart_at: int | None = None) -> list[dict[str, Any]]:
    """Run a search one trial at a time on a bowl, optionally with a driver that is replaced on the way."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.InMemoryStorage()

    def make() -> StudySearch:
        return StudySearch(
            spaces={"sdca": NUMBERS},
            first={"sdca": START},
            objective=Objective(),
            sampler=make_sampler(
                name,
                seed=seed,
                joint=False,
                horizon=Horizon(1, 1, 1),
                prior=Prior.of({"sdca": NUMBERS}, {"sdca": START}),
                objective=Objective(),
            ),
            seed=seed,
            concurrent=1,
            study_name="study",
            storage=storage,
        )

    searcher, found = make(), []
    for number in range(trials):
        if number == restart_at:
            searcher = make()
        values = searcher.suggest(str(number))
        assert values is not None
        assert searcher.suggest("another") is None, "one at a time"
        found.append(values)
        value = -abs(values["method.gain"] - 0.3)
        searcher.on_trial_complete(str(number), {MIOU: value, "step": 1, "finished": True})
    return found


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "auto"])
def test_proposals_follow_from_the_seed_and_the_study_alone(name: SamplerName) -> None:
    undisturbed = proposals(name, 0)
    assert undisturbed[0] == START
    assert len({values["method.gain"] for values in undisturbed}) == 16
    assert proposals(name, 0, restart_at=13) == undisturbed
    assert proposals(name, 1, trials=3)[1:] != undisturbed[1:3]


@pytest.mark.parametrize("name", ["tpe", "gp", "cmaes"])
def test_a_model_proposes_near_the_best(name: SamplerName) -> None:
    late = [values["method.gain"] for values in proposals(name, 0, trials=30)[-6:]]
    assert sum(abs(gain - 0.3) for gain in late) / 6 < 0.2, "by chance it would be 0.29"


def test_auto_is_tpe() -> None:
    assert proposals("auto", 0, trials=12) == proposals("tpe", 0, trials=12)


def test_tpe_learns_what_does_not_fit() -> None:
    """The larger, the better; but what is larger than 0.5 ends out of memory."""
    spaces = {"sdca": {"method.gain": FloatDistribution(0.0, 1.0)}}
    start = {"sdca": {"method.gain": 0.2}}
    horizon = Horizon(1, 1, 1)
    searcher = StudySearch(
        spaces=spaces,
        first=start,
        objective=Objective(),
        sampler=make_sampler(
            "tpe", seed=0, joint=False, horizon=horizon, prior=Prior.of(spaces, start), objective=Objective()
        ),
        seed=0,
        concurrent=1,
        study_name="study",
        storage=optuna.storages.InMemoryStorage(),
    )
    gains = []
    for number in map(str, range(60)):
        values = searcher.suggest(number)
        assert values is not None
        gains.append(values["method.gain"])
        if gains[-1] > 0.5:
            searcher.on_trial_result(number, Reported(end=End.INFEASIBLE, reason="too large").as_result())
            searcher.on_trial_complete(number, error=True)
        else:
            searcher.on_trial_complete(number, {MIOU: gains[-1], "step": 1, "finished": True})
    late = sum(gain > 0.5 for gain in gains[30:]) / 30
    assert late < 0.6, "not learnt from, every one of them would be too large"
    assert max(gain for gain in gains if gain <= 0.5) > 0.45


@pytest.mark.parametrize(
    ("name", "spaces", "objective", "message"),
    [
        ("annealing", {"sdca": NUMBERS}, MIOU, "--sampler must be one of auto, tpe"),
        ("gp", {"sdca": NUMBERS, "plca": NUMBERS}, MIOU, "must have one method"),
        ("cmaes", {"sdca": {**NUMBERS, "method.kind": CategoricalDistribution(("a", "b"))}}, MIOU, "method.kind"),
        ("cmaes", {"sdca": NUMBERS}, f"{MIOU},time/step", "must have one goal"),
        ("priorband", {"sdca": NUMBERS}, f"{MIOU},time/step", "must have one best trial"),
    ],
)
def test_what_a_sampler_cannot_model_is_refused(name: str, spaces: Any, objective: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_sampler(name, spaces, Objective.parse(objective))
