"""PriorBand: where proposals come from, and that the study alone decides it."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from scipy.stats import truncnorm

from segadapt.platform.experiment.tuning import _close_lost
from segadapt.platform.search.horizon import Horizon
from segadapt.platform.search.priorband import PROPOSAL, Belief, Prior, PriorBandSampler
from segadapt.platform.search.samplers import make_sampler
from segadapt.platform.search.schedulers import SCHEDULERS
from segadapt.platform.search.searcher import StudySearch
from segadapt.platform.search.study import LOST
from segadapt.platform.search.study_storage import open_study_storage
from segadapt.platform.settings.config import METHOD
from segadapt.platform.settings.objective import Objective

MIOU = "target_val/miou"
HORIZON = Horizon(1, 4, 2)
"""Rungs at 1 and 2 of 4 steps; one successive halving takes 4 · 1 + 2 · 1 + 1 · 2 = 8 steps."""
GAIN = FloatDistribution(0.0, 1.0)
RATE = FloatDistribution(1e-3, 1.0, log=True)
KIND = CategoricalDistribution(("a", "b", "c"))
SPACE: dict[str, BaseDistribution] = {"gain": GAIN, "rate": RATE, "kind": KIND}
PRIOR = Prior({"gain": Belief(0.2, 0.75), "rate": Belief(0.1, 0.5), "kind": Belief("a", 0.5)})


def study_of(*trials: optuna.trial.FrozenTrial) -> optuna.Study:
    study = optuna.create_study(direction="maximize")
    study.add_trials(trials)
    return study


def trial_of(values: list[float], *, steps: int = 4, **params: Any) -> optuna.trial.FrozenTrial:
    """A trial with these values at step 1, 2, 4; it was stopped if they are fewer."""
    reached = dict(zip((1, 2, steps), values, strict=False))
    is_whole = len(values) == 3
    return create_trial(
        state=TrialState.COMPLETE if is_whole else TrialState.PRUNED,
        value=values[-1] if is_whole else None,
        params={"gain": 0.5, "rate": 0.1, "kind": "a", **params},
        distributions=SPACE,
        intermediate_values=reached,
    )


def sampler_of(seed: int, prior: Prior = PRIOR) -> PriorBandSampler:
    return PriorBandSampler(seed=seed, prior=prior, objective=Objective(), horizon=HORIZON)


def drawn(study: optuna.Study, count: int = 400, prior: Prior = PRIOR) -> list[dict[str, Any]]:
    """Many proposals for the next trial of a study, which none of them changes."""
    proposals = []
    for seed in range(count):
        sampler = sampler_of(seed, prior)
        sampler.before_trial(study, create_trial(value=0.0))
        proposals.append({name: sampler.sample_independent(study, None, name, SPACE[name]) for name in SPACE})  # type: ignore[arg-type]
    return proposals


def test_before_any_trial_half_is_uniform_and_half_lies_around_the_start() -> None:
    proposals = drawn(study_of(), 2000)
    low = truncnorm((0 - 0.2) / 0.25, (1 - 0.2) / 0.25, loc=0.2, scale=0.25)
    for bound in (0.1, 0.3, 0.6, 0.9):
        share = sum(proposal["gain"] < bound for proposal in proposals) / 2000
        assert abs(share - (bound + low.cdf(bound)) / 2) < 0.03
    kinds = Counter(proposal["kind"] for proposal in proposals)
    assert abs(kinds["a"] / 2000 - (1 / 3 + 0.5) / 2) < 0.03
    assert all(1e-3 <= proposal["rate"] <= 1.0 for proposal in proposals)
    assert abs(sum(proposal["rate"] < 0.03 for proposal in proposals) / 2000 - 0.44) < 0.04, "on a logarithmic scale"


def test_shares_follow_the_weighted_likelihoods_of_the_better_trials() -> None:
    best, good = {"gain": 0.9, "rate": 0.5, "kind": "b"}, {"gain": 0.7, "rate": 0.2, "kind": "b"}
    trials = [
        trial_of([0.1, 0.5, 0.8], **good),
        trial_of([0.1, 0.5, 0.9], **best),
        trial_of([0.1, 0.1, 0.1]),
        trial_of([0.1, 0.1, 0.2]),
        trial_of([0.9]),  # it never came to the highest rung
    ]
    sampler = sampler_of(0)
    sampler.before_trial(study_of(*trials), trials[0])

    def density(values: Mapping[str, Any], gain: float, rate: float, kind: str) -> float:
        def at(value: float, mean: float, deviation: float) -> float:
            return float(truncnorm.pdf(value, -mean / deviation, (1 - mean) / deviation, mean, deviation))

        def unit(value: float) -> float:
            return 1 + math.log10(value) / 3

        mass = 0.5 if values["kind"] == kind else 0.25
        return at(values["gain"], gain, 0.25) * at(unit(values["rate"]), unit(rate), 0.5) * mass

    around_start = 2 * density(best, 0.2, 0.1, "a") + density(good, 0.2, 0.1, "a")
    around_best = 2 * density(best, **best) + density(good, **best)
    assert sampler.proposal.uniform == 0.5
    assert sampler.proposal.incumbent == pytest.approx(0.5 * around_best / (around_best + around_start))
    assert sampler.proposal.prior == pytest.approx(0.5 * around_start / (around_best + around_start))
    ratio = density(good, **best) / density(good, 0.2, 0.1, "a")
    assert sampler.proposal.likelihood_ratio == pytest.approx(ratio), "without the best trial, which fits itself"


@pytest.mark.parametrize(
    ("trials", "begins"),
    [
        ([trial_of([0.1, 0.2, 0.3]), trial_of([0.1, 0.2])], False),  # 6 steps of 8
        ([trial_of([0.1, 0.2, 0.3]), trial_of([0.1, 0.2]), trial_of([0.1, 0.2])], True),
        ([trial_of([0.1, 0.2])] * 8, False),  # none has run to its end
        ([trial_of([0.1, 0.2, 0.3], steps=8)], False),  # no rung has two
    ],
)
def test_the_best_trial_attracts_proposals_once_there_is_enough_to_compare(trials: list[Any], begins: bool) -> None:
    sampler = sampler_of(0)
    sampler.before_trial(study_of(*trials), trials[0])
    assert (sampler.proposal.incumbent > 0) is begins


def test_around_the_best_trial_half_of_the_settings_are_its_own_and_a_choice_drawn_anew_is_another() -> None:
    best = {"gain": 0.9, "rate": 0.5, "kind": "b"}
    study = study_of(*[trial_of([0.1, 0.5, 0.9], **best)] * 4)
    nothing_believed = Prior({})  # so that the start is as likely as any other place
    proposals = [proposal for proposal in drawn(study, prior=nothing_believed) if proposal["gain"] == 0.9]
    kept = sum(proposal["rate"] == 0.5 for proposal in proposals) / len(proposals)
    assert len(proposals) > 60, "a quarter"
    assert abs(kept - 0.5) < 0.12
    assert abs(sum(proposal["kind"] == "b" for proposal in proposals) / len(proposals) - 0.5) < 0.12


@pytest.mark.parametrize(
    ("distribution", "belief"),
    [
        (IntDistribution(1, 3), 3),
        (IntDistribution(1, 64, log=True), 8),
        (IntDistribution(0, 100, step=25), 50),
        (FloatDistribution(0.0, 0.3, step=0.1), 0.3),
        (FloatDistribution(0.2, 8.0, log=True), 8.0),
        (FloatDistribution(2.0, 2.0), 2.0),
        (CategoricalDistribution((None, 1.0, 3.0)), None),
        (CategoricalDistribution((True, False)), True),
        (CategoricalDistribution(("only",)), "only"),
    ],
)
def test_every_proposal_lies_in_its_range(distribution: BaseDistribution, belief: Any) -> None:
    reached: set[Any] = set()
    for trials in ([], [create_trial(value=1.0, params={"x": belief}, distributions={"x": distribution},
                                     intermediate_values={1: 1.0, 2: 1.0, 4: 1.0})] * 4):  # fmt: skip
        study = study_of(*trials)
        for seed in range(100):
            sampler = sampler_of(seed, Prior({"x": Belief(belief, 0.25)}))
            sampler.before_trial(study, create_trial(value=0.0))
            value = sampler.sample_independent(study, None, "x", distribution)  # type: ignore[arg-type]
            assert distribution._contains(distribution.to_internal_repr(value)), value
            reached.add(value)
    assert belief in reached
    if isinstance(distribution, CategoricalDistribution):
        assert reached == set(distribution.choices)
    if distribution == IntDistribution(1, 3):
        assert reached == {1, 2, 3}


def test_a_setting_of_one_method_is_drawn_around_the_best_trial_of_that_method() -> None:
    names = {METHOD: CategoricalDistribution(("sdca", "plca"))}

    def of(method: str, gain: float, value: float) -> optuna.trial.FrozenTrial:
        return create_trial(
            value=value,
            params={METHOD: method, f"{method}.gain": gain},
            distributions={**names, f"{method}.gain": GAIN},
            intermediate_values={1: value, 2: value, 4: value},
        )

    study = study_of(of("sdca", 0.11, 0.9), of("sdca", 0.5, 0.1), of("plca", 0.77, 0.5), of("plca", 0.5, 0.1))
    prior = Prior({"sdca.gain": Belief(0.5, 0.75), "plca.gain": Belief(0.5, 0.75)})
    copied = Counter()
    for seed in range(400):
        sampler = sampler_of(seed, prior)
        sampler.before_trial(study, create_trial(value=0.0))
        for name in ("sdca.gain", "plca.gain"):
            copied[name, sampler.sample_independent(study, None, name, GAIN)] += 1  # type: ignore[arg-type]
    assert copied["sdca.gain", 0.11] > 40
    assert copied["plca.gain", 0.77] > 40
    assert not copied["plca.gain", 0.11]


class World:
    """Two workers that train by formula; it survives the driver, as Tune's saved state does."""

    spaces: Mapping[str, Mapping[str, BaseDistribution]] = {
        "sdca": {"method.temperature": FloatDistribution(0.3, 100.0, log=True), "method.lovasz_weight": GAIN},
        "self_training": {"method.rounds": IntDistribution(1, 3), "method.quantile": FloatDistribution(0.2, 0.8)},
    }
    first: Mapping[str, Mapping[str, Any]] = {
        "sdca": {"method.temperature": 100.0, "method.lovasz_weight": 0.75},
        "self_training": {"method.rounds": 1, "method.quantile": 0.5},
    }

    def __init__(self, url: str) -> None:
        self.url = url
        self.proposed: list[dict[str, Any]] = []
        self.steps: dict[str, int] = {}
        self.start_driver()

    def start_driver(self) -> None:
        """Begin, or go on after a kill: everything but the study and Tune's trials is made anew."""
        objective = Objective()
        self.searcher = StudySearch(
            spaces=self.spaces,
            first=self.first,
            objective=objective,
            sampler=make_sampler(
                "priorband",
                seed=3,
                joint=True,
                horizon=HORIZON,
                prior=Prior.of(self.spaces, self.first),
                objective=objective,
            ),
            seed=3,
            concurrent=2,
            study_name="search",
            storage=open_study_storage(self.url),
        )
        self.scheduler = SCHEDULERS["asha"].of(self.searcher.study, objective, HORIZON)

    def tick(self) -> None:
        """Propose what there is room for, then let the trial that waits longest make a step."""
        while (values := self.searcher.suggest(str(len(self.proposed)))) is not None:
            self.steps[str(len(self.proposed))] = 0
            self.proposed.append(values)
        name = next(iter(self.steps))
        step = self.steps.pop(name) + 1
        quality = self._quality(self.proposed[int(name)]) + step / 10
        result = {MIOU: quality, "step": step, "finished": step == 4, "training_iteration": step}
        decision = self.scheduler.on_trial_result(None, SimpleNamespace(trial_id=name), result)
        if step == 4 or decision == "STOP":
            self.searcher.on_trial_complete(name, result)
        else:
            self.steps[name] = step

    @staticmethod
    def _quality(values: Mapping[str, Any]) -> float:
        if values[METHOD] == "sdca":
            return float(1 - abs(math.log10(values["method.temperature"])) - values["method.lovasz_weight"])
        return float(0.5 - abs(values["method.quantile"] - 0.3) - values["method.rounds"] / 10)


def test_a_killed_and_resumed_search_equals_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = World("sqlite:///:memory:")
    for _ in range(50):
        undisturbed.tick()
    killed, lost = World(f"sqlite:///{tmp_path}/killed.db"), 0
    for tick in range(50):
        if tick in (5, 23, 24, 41):
            killed.start_driver()
        if lost == 0 and tick >= 30 and len(killed.steps) < 2:
            while killed.searcher.suggest(f"lost-{lost}") is not None:  # proposed, and then the driver is killed
                lost += 1
            killed.start_driver()
            _close_lost(killed.searcher, set(map(str, range(len(killed.proposed)))))
        killed.tick()
    assert killed.proposed == undisturbed.proposed
    assert any(LOST in trial.user_attrs for trial in killed.searcher.study.trials)
    assert len(undisturbed.proposed) >= 20
    study = undisturbed.searcher.study
    assert study.trials[-1].user_attrs[PROPOSAL]["incumbent"] > 0.1, "it went through every part of the sampler"
    assert study.trials[0].user_attrs[PROPOSAL]["is_published"] is True
