"""Fit the surrogate to `trials.jsonl`, judge it by cross-validation, and write `surrogate.json`.

    python benchmarks/surrogate/fit.py [--file PATH]

One set of length scales for all evaluation steps, by maximum likelihood; a mean, scale and coefficients for each step.
The spread over seeds is the covariance between evaluation steps of repeated settings. Judged on held-out settings: each
tenth of the trials is predicted from the others, whose hyperparameters are fitted without it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from collect import METHOD, SETTINGS, TRIALS
from model import FILE, Array, matern, unit_point
from optuna.distributions import CategoricalDistribution
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.stats import spearmanr

from segadapt import search_spaces

FOLDS = 10


def described(name: str) -> dict[str, dict[str, Any]]:
    """Return a method's search space as plain values."""
    space, _ = search_spaces.load(name)
    return {
        key: {"choices": list(found.choices)}
        if isinstance(found, CategoricalDistribution)
        else {"low": found.low, "high": found.high, "log": found.log}
        for key, found in space.items()
    }


def fit(points: Array, values: Array) -> tuple[Array, float]:
    """Return length scales (D,) and noise variance over signal variance, by maximum likelihood.

    Args:
        points: In the unit cube, (N, D).
        values: Target mIoU by evaluation step, (N, T).
    """
    scaled = (values - values.mean(0)) / values.std(0)
    count, steps = values.shape

    def negative_log_likelihood(parameters: Array) -> float:
        lengths, noise = np.exp(parameters[:-1]), np.exp(parameters[-1])
        covariance = matern(points, points, lengths) + noise * np.eye(count)
        factor = cho_factor(covariance, lower=True)
        solved = cho_solve(factor, scaled)
        variance = (scaled * solved).sum(0) / count  # of each step's signal, at its best
        prior = 0.5 * ((parameters[:-1] - np.log(1.0)) ** 2 / 1.5**2).sum()  # keeps flat directions finite
        return float(0.5 * count * np.log(variance).mean() + np.log(np.diag(factor[0])).sum() + prior / steps)

    starts = [np.append(np.full(points.shape[1], np.log(length)), np.log(0.1)) for length in (0.5, 1.0, 2.0)]
    bounds = [(np.log(0.1), np.log(20.0))] * points.shape[1] + [(np.log(1e-3), np.log(2.0))]
    found = min(
        (minimize(negative_log_likelihood, start, method="L-BFGS-B", bounds=bounds) for start in starts),
        key=lambda result: result.fun,
    )
    return np.exp(found.x[:-1]), float(np.exp(found.x[-1]))


def coefficients(points: Array, values: Array, lengths: Array, noise: float) -> tuple[Array, Array]:
    """Return the mean (T,) and the coefficients (N, T) of the predictions."""
    mean = values.mean(0)
    covariance = matern(points, points, lengths) + noise * np.eye(len(points))
    return mean, cho_solve(cho_factor(covariance, lower=True), values - mean)


def cross_validate(points: Array, values: Array, groups: list[int]) -> dict[str, Any]:
    """Return errors and rank correlations of predictions for settings that were held out."""
    predicted = np.empty_like(values)
    folds = np.array(groups) % FOLDS
    for fold in range(FOLDS):
        held = folds == fold
        lengths, noise = fit(points[~held], values[~held])
        mean, weights = coefficients(points[~held], values[~held], lengths, noise)
        predicted[held] = mean + matern(points[held], points[~held], lengths) @ weights
    error = predicted - values
    return {
        "rmse": np.sqrt((error**2).mean(0)).round(4).tolist(),
        "mean_absolute_error": np.abs(error).mean(0).round(4).tolist(),
        "r2": (1 - (error**2).sum(0) / ((values - values.mean(0)) ** 2).sum(0)).round(3).tolist(),
        "spearman": [
            round(float(spearmanr(predicted[:, t], values[:, t]).statistic), 3) for t in range(values.shape[1])
        ],
    }


def seed_covariance(values: Array, groups: list[int]) -> Array:
    """Return the covariance (T, T) over seeds of settings that were trained more than once."""
    repeated = [np.array(groups) == group for group in sorted(set(groups)) if groups.count(group) > 1]
    deviations = np.concatenate([values[rows] - values[rows].mean(0) for rows in repeated])
    freedom = len(deviations) - len(repeated)
    return deviations.T @ deviations / freedom + 1e-8 * np.eye(values.shape[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=FILE, help="to write")
    options = parser.parse_args()
    trials = [json.loads(line) for line in TRIALS.read_text().splitlines()]
    space = described(METHOD)
    steps = [step for step, _ in trials[0]["curve"]]
    points = np.array([unit_point(trial["values"], space) for trial in trials])
    values = np.array([[miou for _, miou in trial["curve"]] for trial in trials])
    known = sorted({tuple(point) for point in points})
    groups = [known.index(tuple(point)) for point in points]
    validation = cross_validate(points, values, groups)
    lengths, noise = fit(points, values)
    mean, weights = coefficients(points, values, lengths, noise)
    seeds = seed_covariance(values, groups)
    facts = {
        "trials": len(trials),
        "settings": len(known),
        "cross_validation": validation,
        "early_spearman": [
            round(float(spearmanr(values[:, t], values[:, -1]).statistic), 3) for t in range(len(steps))
        ],
        "spread_over_seeds": np.sqrt(np.diag(seeds)).round(4).tolist(),
        "observed": [float(values[:, -1].min()), float(values[:, -1].max())],
    }
    content = {
        "method": METHOD,
        "settings": SETTINGS,
        "space": space,
        "steps": steps,
        "facts": facts,
        "lengths": lengths.round(5).tolist(),
        "mean": mean.round(5).tolist(),
        "noise": seeds.round(9).tolist(),
        "points": points.round(5).tolist(),
        "coefficients": weights.round(5).tolist(),
    }
    options.file.write_text(json.dumps(content) + "\n")
    print(json.dumps(facts, indent=1))
    print({key: round(length, 2) for key, length in zip(space, lengths, strict=True)}, f"noise {noise:.3f}")


if __name__ == "__main__":
    main()
