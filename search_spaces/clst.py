"""What may vary for CLST, and the default setting: the published one is unknown.

The teacher's momentum acts with `method.ensemble=weights`, the ensemble's with `predictions`; share and cap of the kept
cells act with `method.threshold=quantile`. Rounds and steps are a matter of budget.
"""

from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from segadapt.search_spaces import Confidence

SPACE: dict[str, BaseDistribution] = {
    "method.temperature": FloatDistribution(0.03, 1.0, log=True),
    "method.contrast_weight": FloatDistribution(1e-3, 1.0, log=True),
    "method.target_weight": FloatDistribution(0.05, 2.0, log=True),
    "method.source_share": CategoricalDistribution((0.0, 0.5, 1.0)),
    "method.centroid_momentum": CategoricalDistribution((0.9, 0.99, 0.999)),
    "method.ensemble": CategoricalDistribution(("predictions", "weights")),
    "method.ensemble_momentum": FloatDistribution(0.0, 0.9),
    "method.teacher_momentum": CategoricalDistribution((0.99, 0.999, 0.9999)),
    "method.threshold": CategoricalDistribution(("quantile", "sqrt_mean")),
    "method.kept_share": FloatDistribution(0.2, 0.8),
    "method.confidence_cap": FloatDistribution(0.7, 0.98),
    "optimizer.lr_factor": FloatDistribution(0.2, 8.0, log=True),
}
PAPER: dict[str, Any] = {
    "method.temperature": 0.1,
    "method.contrast_weight": 0.1,
    "method.target_weight": 1.0,
    "method.source_share": 1.0,
    "method.centroid_momentum": 0.99,
    "method.ensemble": "predictions",
    "method.ensemble_momentum": 0.6,
    "method.teacher_momentum": 0.999,
    "method.threshold": "quantile",
    "method.kept_share": 0.5,
    "method.confidence_cap": 0.9,
    "optimizer.lr_factor": 1.0,
}
CONFIDENCE: dict[str, Confidence] = {
    "method.temperature": "medium",
    "method.contrast_weight": "low",
    "method.target_weight": "medium",
    "method.source_share": "low",
    "method.centroid_momentum": "low",
    "method.ensemble": "low",
    "method.ensemble_momentum": "low",
    "method.teacher_momentum": "medium",
    "method.threshold": "low",
    "method.kept_share": "low",
    "method.confidence_cap": "low",
    "optimizer.lr_factor": "medium",
}
