"""Training steps until a search finds what 64 full random trials find, on the surrogate of streets trials.

    python benchmarks/search_efficiency.py [--seeds 10] [--preset streets] [--arms random plain ...] [--json PATH]
    python benchmarks/search_efficiency.py --check          # the simulator against real Ray Tune

The searchers and schedulers are the real objects; what is simulated is Tune's side of the protocol (proposal, results,
decisions, completion) with workers that all take the same time per step, and training, which the surrogate answers with
the noise of one seed. `--check` runs Ray Tune with the surrogate as its trainable, one trial at a time, and compares
every proposal and every stop with the simulator's.

A search has *matched* when a trial whose expected (noise-free) mIoU at full length is at least the target has run to
full length. The target is the median, over many seeds, of the best expected mIoU among 64 random settings; random
search thus needs 64 full trials at the median. Counted are the steps that all trials have taken by then. At equal
budgets the incumbent is judged by its expected mIoU: the trial with the best reported one among those that came
furthest. Arms are compared seed by seed, since trainings of one seed share their noise, with bootstrapped intervals.
"""

import argparse
import heapq
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from segadapt.platform.trial.environment import machine
from surrogate.model import Surrogate

METRIC = "target_val/miou"
RANDOM_TRIALS = 64
PATIENCE = 2
"""A search that has not matched after PATIENCE times the steps of 64 full trials is given up."""
BUDGETS = (4, 8, 16, 32)
"""Full trials' worth of steps at which incumbents are compared; a search that has not matched by the last missed."""
REFERENCE = "segadapt"
"""Arm that the others are compared with."""
TARGET_SEEDS = 201
Parts = tuple[Any, Any]
"""A searcher and a scheduler."""


# The arms: the one place that knows how searches are made.


def distributions(surrogate: Surrogate) -> dict[str, Any]:
    from segadapt import search_spaces

    return search_spaces.load(surrogate.method)[0]


def plain(
    surrogate: Surrogate, seed: int, workers: int, *, preset: str, sampler: Any = None, scheduler: Any = None
) -> Parts:
    """Ray Tune as its documentation writes it: `OptunaSearch` with its own TPE, `ASHAScheduler` as in its example."""
    import optuna
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    found = OptunaSearch(
        space=distributions(surrogate),
        metric=METRIC,
        mode="max",
        points_to_evaluate=[start(surrogate, preset)],
        **({"sampler": sampler} if sampler else {"seed": seed}),
    )
    found._study_name = f"{optuna.__name__}-{seed}"
    if scheduler is None:
        scheduler = ASHAScheduler(
            time_attr="step", max_t=surrogate.steps[-1], grace_period=surrogate.steps[0], reduction_factor=3
        )
    scheduler.set_search_properties(METRIC, "max")
    return ConcurrencyLimiter(found, max_concurrent=workers), scheduler


def random_search(surrogate: Surrogate, seed: int, workers: int, *, preset: str) -> Parts:
    """Random settings to the end, from Optuna."""
    from optuna.samplers import RandomSampler
    from ray.tune.schedulers import FIFOScheduler

    return plain(surrogate, seed, workers, preset=preset, sampler=RandomSampler(seed=seed), scheduler=FIFOScheduler())


def segadapt(surrogate: Surrogate, seed: int, workers: int, *, preset: str, sampler: Any, scheduler: str) -> Parts:
    """A search of the platform, as its command makes it, with the study in memory; or with a sampler made elsewhere."""
    import optuna

    from segadapt.platform.search.horizon import Horizon
    from segadapt.platform.search.priorband import Prior
    from segadapt.platform.search.samplers import make_sampler
    from segadapt.platform.search.schedulers import SCHEDULERS
    from segadapt.platform.search.searcher import StudySearch
    from segadapt.platform.settings.objective import Objective

    objective = Objective((METRIC,))
    spaces, first = {surrogate.method: distributions(surrogate)}, {surrogate.method: start(surrogate, preset)}
    horizon = Horizon(surrogate.steps[0], surrogate.steps[-1], workers)
    if not callable(sampler):
        prior = Prior.of(spaces, first)
        sampler = make_sampler(sampler, seed=seed, joint=False, horizon=horizon, prior=prior, objective=objective)
    searcher = StudySearch(
        spaces=spaces,
        first=first,
        objective=objective,
        sampler=sampler,
        seed=seed,
        concurrent=workers,
        study_name="search",
        storage=optuna.storages.InMemoryStorage(),
    )
    return searcher, SCHEDULERS[scheduler].of(searcher.study, objective, horizon)


def with_floor(seed: int) -> Any:
    """Return TPE, but a fifth of its proposals are uniform; made anew for each proposal, from its seed."""
    from optuna.samplers import RandomSampler, TPESampler

    if np.random.default_rng(seed).random() < 0.2:
        return RandomSampler(seed=seed)
    return TPESampler(multivariate=True, constant_liar=True, seed=seed)


def start(surrogate: Surrogate, preset: str) -> dict[str, Any]:
    """Return what every search tries first."""
    from segadapt import search_spaces

    return search_spaces.load(surrogate.method)[1][preset]


def arms(preset: str = "paper") -> dict[str, Callable[[Surrogate, int, int], Parts]]:
    """Return what is compared, by name; all try a preset first."""
    from functools import partial

    ours = partial(segadapt, preset=preset)
    made: dict[str, Callable[[Surrogate, int, int], Parts]] = {
        "random": partial(random_search, preset=preset),
        "plain": partial(plain, preset=preset),
        "segadapt": partial(ours, sampler="auto", scheduler="asha"),
        "segadapt tpe with a floor asha": partial(ours, sampler=with_floor, scheduler="asha"),
        "segadapt priorband asha-promote": partial(ours, sampler="priorband", scheduler="asha-promote"),
    }
    for sampler in ("tpe", "gp", "random", "qmc", "priorband"):
        made[f"segadapt {sampler} asha"] = partial(ours, sampler=sampler, scheduler="asha")
    for scheduler in ("asha-promote", "median", "hyperband", "none"):
        made[f"segadapt auto {scheduler}"] = partial(ours, sampler="auto", scheduler=scheduler)
    return made


# Tune's side of the protocol.


class Simulation:
    """Run a search on the surrogate; stands in for Tune's controller.

    Args:
        surrogate: Answers trials.
        searcher: Proposes.
        scheduler: Decides.
        seed: Of the trials' noise.
        workers: Trials at a time.
        trials: To propose at most.
    """

    def __init__(
        self, surrogate: Surrogate, searcher: Any, scheduler: Any, *, seed: int, workers: int, trials: int
    ) -> None:
        self.surrogate = surrogate
        self.searcher = searcher
        self.scheduler = scheduler
        self.seed = seed
        self.workers = workers
        self.wanted = trials
        self.trials: list[Any] = []
        self.done: dict[str, int] = {}
        """Evaluations of each trial."""
        self.steps = 0
        """Taken by all trials."""
        self.search_alg = self  # what schedulers ask Tune's controller for
        self._tune_controller = self  # whose state, of which there is none here, they have saved less often
        self._storage = SimpleNamespace(experiment_driver_staging_path=".", experiment_fs_path=".", syncer=None)
        self._checkpoint_manager = None  # nothing is saved

    def is_finished(self) -> bool:
        """Return whether no more trials are to be proposed."""
        return len(self.trials) >= self.wanted

    def get_trials(self) -> list[Any]:
        """Return all trials in the order of proposal."""
        return self.trials

    def get_live_trials(self) -> list[Any]:
        """Return the trials that have not ended."""
        return [trial for trial in self.trials if not trial.is_finished()]

    def run(self) -> Iterator[Any]:
        """Yield a trial after each of its evaluations."""
        from ray.tune.experiment import Trial
        from ray.tune.schedulers import TrialScheduler

        clock, order, running = 0, itertools.count(), []
        while True:
            self._propose()
            while len(running) < self.workers and (trial := self._next()) is not None:
                trial.set_status(Trial.RUNNING)
                heapq.heappush(running, (clock + self._stretch(trial), next(order), trial))
            if not running:
                return
            clock, _, trial = heapq.heappop(running)
            self.steps += self._stretch(trial)
            result = self._evaluate(trial)
            decision = self.scheduler.on_trial_result(self, trial, result)
            if decision != TrialScheduler.STOP:
                self.searcher.on_trial_result(trial.trial_id, result)
            trial.update_last_result(result)
            if result["finished"] or decision == TrialScheduler.STOP:
                self._end(trial, result)
            elif decision == TrialScheduler.PAUSE:
                trial.set_status(Trial.PAUSED)
            else:
                heapq.heappush(running, (clock + self._stretch(trial), next(order), trial))
            yield trial

    def stop_trial(self, trial: Any) -> None:
        """End a paused trial, as schedulers may ask for."""
        self._end(trial, trial.last_result)

    def _end(self, trial: Any, result: dict[str, Any]) -> None:
        from ray.tune.experiment import Trial

        self.scheduler.on_trial_complete(self, trial, result)
        self.searcher.on_trial_complete(trial.trial_id, result=result)
        trial.set_status(Trial.TERMINATED)

    def _propose(self) -> None:
        from ray.tune.experiment import Trial

        while not self.is_finished():
            trial_id = f"{len(self.trials):05d}"
            values = self.searcher.suggest(trial_id)
            if values is None:
                return
            trial = Trial("surrogate", config=values, trial_id=trial_id, stub=True)
            self.trials.append(trial)
            self.done[trial_id] = 0
            self.scheduler.on_trial_add(self, trial)

    def _next(self) -> Any:
        """Return the trial to run: the scheduler's choice, otherwise the oldest that waits."""
        from ray.tune.experiment import Trial

        chosen = self.scheduler.choose_trial_to_run(self)
        return chosen or next((trial for trial in self.trials if trial.status == Trial.PENDING), None)

    def _stretch(self, trial: Any) -> int:
        """Return the steps to a trial's next evaluation."""
        done, steps = self.done[trial.trial_id], self.surrogate.steps
        return steps[done] - (steps[done - 1] if done else 0)

    def _evaluate(self, trial: Any) -> dict[str, Any]:
        number = self.done[trial.trial_id]
        self.done[trial.trial_id] += 1
        return report_of(self.surrogate, trial.config, self.seed, number)


def report_of(surrogate: Surrogate, values: Mapping[str, Any], seed: int, number: int) -> dict[str, Any]:
    """Return what a trial reports at its evaluation of this number."""
    step = surrogate.steps[number]
    value = float(surrogate.noisy_curve(values, seed)[number])
    finished = step == surrogate.steps[-1]
    return {"step": step, METRIC: value, "finished": finished, "training_iteration": number + 1, "done": finished}


# What is measured.


def random_settings(surrogate: Surrogate, seed: int, count: int) -> list[dict[str, Any]]:
    from optuna import create_study
    from optuna.samplers import RandomSampler

    study, space = create_study(sampler=RandomSampler(seed=seed)), distributions(surrogate)
    return [study.ask(space).params for _ in range(count)]


def target_of(surrogate: Surrogate) -> tuple[float, list[float]]:
    """Return the target, and the lower and upper quartile of the best of 64 random settings."""
    best = [
        max(surrogate.final(values) for values in random_settings(surrogate, 10_000 + seed, RANDOM_TRIALS))
        for seed in range(TARGET_SEEDS)
    ]
    quartiles = np.quantile(best, [0.25, 0.75])
    return statistics.median(best), [float(quartile) for quartile in quartiles]


def follow(surrogate: Surrogate, parts: Parts, target: float, *, seed: int, workers: int, trials: int) -> Any:
    """Run a search until it has matched and spent all budgets, was given up, or ran out of trials.

    Returns:
        Steps, and trials begun, until it matched, None if it did not; and the expected mIoU of its incumbent at each of
        `BUDGETS`.
    """
    simulation = Simulation(surrogate, *parts, seed=seed, workers=workers, trials=trials)
    full = surrogate.steps[-1]
    budgets = [count * full for count in BUDGETS]
    matched: dict[str, int | None] = {"steps": None, "trials": None}
    incumbents: list[float] = []
    best, incumbent = (0, 0.0), 0.0
    for trial in simulation.run():
        while len(incumbents) < len(budgets) and simulation.steps > budgets[len(incumbents)]:
            incumbents.append(incumbent)
        reached = (trial.last_result["step"], trial.last_result[METRIC])
        if reached > best:
            best, incumbent = reached, surrogate.final(trial.config)
        if simulation.steps > PATIENCE * RANDOM_TRIALS * full:
            break
        if trial.last_result["finished"] and matched["steps"] is None and surrogate.final(trial.config) >= target:
            matched = {"steps": simulation.steps, "trials": len(simulation.trials)}
        if matched["steps"] is not None and len(incumbents) == len(budgets):
            break
    incumbents += [incumbent] * (len(budgets) - len(incumbents))
    return {**matched, "incumbents": [round(value, 4) for value in incumbents]}


def measure(surrogate: Surrogate, makers: Mapping[str, Any], seeds: int, workers: int, trials: int) -> dict[str, Any]:
    target, quartiles = target_of(surrogate)
    full = surrogate.steps[-1]
    print(f"target {target:.4f} (quartiles {quartiles[0]:.4f}, {quartiles[1]:.4f}), 64 full trials {64 * full} steps")
    rows: dict[str, Any] = {}
    for name, make in makers.items():
        started = time.process_time()
        searches = [
            follow(surrogate, make(surrogate, seed, workers), target, seed=seed, workers=workers, trials=trials)
            for seed in range(seeds)
        ]
        rows[name] = row(searches, full) | {"cpu_s": round(time.process_time() - started, 1), "seeds": searches}
        print(
            f"{name:24}" + ", ".join(f"{key} {value}" for key, value in rows[name].items() if key != "seeds"),
            flush=True,
        )
    return {"target": target, "target_quartiles": quartiles, "full_steps": full, "arms": rows}


def compared(measured: dict[str, Any], reference: str = REFERENCE) -> dict[str, Any]:
    """Return how each arm differs from the reference on the same seeds: mean and 95 % interval, by bootstrap.

    Steps of a search that never matched count as those after which it was given up.
    """
    arms_measured, full = measured["arms"], measured["full_steps"]
    if reference not in arms_measured:
        return {}
    limit = PATIENCE * RANDOM_TRIALS * full

    def figures(name: str) -> dict[str, Any]:
        searches = arms_measured[name]["seeds"]
        steps = np.array([limit if entry["steps"] is None else min(entry["steps"], limit) for entry in searches])
        values = np.array([entry["incumbents"] for entry in searches])
        named = {f"incumbent at {count * full}": values[:, i] for i, count in enumerate(BUDGETS)}
        return {"steps": steps, "missed": (steps > BUDGETS[-1] * full).astype(float), **named}

    base = figures(reference)
    return {
        name: {key: interval(values - base[key]) for key, values in figures(name).items()}
        for name in arms_measured
        if name != reference
    }


def interval(differences: Any) -> list[float]:
    """Return the mean of paired differences and its 95 % interval, from 10,000 bootstrap samples."""
    count = len(differences)
    drawn = np.random.default_rng(0).integers(count, size=(10_000, count))
    lower, upper = np.quantile(differences[drawn].mean(axis=1), [0.025, 0.975])
    return [round(float(value), 4) for value in (differences.mean(), lower, upper)]


def row(searches: list[Any], full: int) -> dict[str, Any]:
    """Return median and quartiles of the steps over seeds; a search that never matched counts as infinite."""
    steps = sorted(float("inf") if entry["steps"] is None else entry["steps"] for entry in searches)
    quartiles = np.quantile(steps, [0.25, 0.5, 0.75], method="inverted_cdf")
    lower, median, upper = (None if np.isinf(value) else int(value) for value in quartiles)
    incumbents = np.array([entry["incumbents"] for entry in searches])
    return {
        "median_steps": median,
        "quartiles": [lower, upper],
        "part_of_64_trials": None if median is None else round(median / (RANDOM_TRIALS * full), 3),
        "missed": sum(value > BUDGETS[-1] * full for value in steps),
        "not_matched": steps.count(float("inf")),
        "incumbents": [round(float(value), 4) for value in incumbents.mean(axis=0)],
    }


# The check against Ray.


def check(surrogate: Surrogate, name: str, seed: int, trials: int) -> None:
    """Run a search by Ray Tune and by the simulator, and compare settings and steps of all trials."""
    from ray import tune

    simulation = Simulation(surrogate, *arms()[name](surrogate, seed, 1), seed=seed, workers=1, trials=trials)
    for _ in simulation.run():
        pass
    expected = [(trial.config, trial.last_result["step"]) for trial in simulation.trials]

    def train(values: dict[str, Any]) -> None:
        checkpoint = tune.get_checkpoint()
        done = json.loads((Path(checkpoint.path) / "done").read_text()) if checkpoint else 0
        for number in range(done, len(surrogate.steps)):
            result = report_of(surrogate, values, seed, number)
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "done").write_text(str(number + 1))
                kept = {key: result[key] for key in ("step", METRIC, "finished")}
                tune.report(kept, checkpoint=tune.Checkpoint.from_directory(folder))

    searcher, scheduler = arms()[name](surrogate, seed, 1)
    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            tune.with_resources(train, {"cpu": 1}),
            tune_config=tune.TuneConfig(
                search_alg=searcher, scheduler=scheduler, num_samples=trials, reuse_actors=True
            ),
            run_config=tune.RunConfig(name="check", storage_path=folder, verbose=0),
        )
        ran = tuner.fit()._experiment_analysis.trials
    actual = [(trial.config, trial.last_result["step"]) for trial in ran]
    if actual != expected:
        first = next(i for i, pair in enumerate(zip(actual, expected, strict=False)) if pair[0] != pair[1])
        raise SystemExit(f"{name}: trial {first} differs.\nRay {actual[first]}\nsimulator {expected[first]}")
    print(f"{name}: {len(actual)} trials, {sum(step for _, step in actual)} steps: Ray and the simulator agree")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--trials", type=int, default=400, help="of a search that does not match")
    parser.add_argument("--arms", nargs="+", default=list(arms()))
    parser.add_argument("--preset", default="paper", help="what every search tries first")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    surrogate = Surrogate()
    if options.check:
        from segadapt.platform.cluster.connection import connect

        os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
        with connect(None):
            for name in options.arms:
                check(surrogate, name, 0, 30)
        return
    makers = {name: make for name, make in arms(options.preset).items() if name in options.arms}
    measured = measure(surrogate, makers, options.seeds, options.workers, options.trials)
    for name, differences in compared(measured).items():
        print(f"{name} less {REFERENCE}: {differences}")
    if options.json:
        setting = {
            "seeds": options.seeds,
            "workers": options.workers,
            "trials": options.trials,
            "preset": options.preset,
        }
        record = {"setting": setting, "environment": machine(), "compared": compared(measured), **measured}
        options.json.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
