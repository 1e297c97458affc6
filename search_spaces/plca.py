"""What may vary for PLCA, and the published setting.

The Lovász weight is the effective one, independent of workers and micro-batches; the association weight is searched per
level. Aggregation when the network is deployed (`method.inference_aggregation`) trains nothing and is left out.
"""

from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from segadapt.search_spaces import Confidence

SPACE: dict[str, BaseDistribution] = {
    "method.feature_association_weight": FloatDistribution(0.01, 2.0, log=True),
    "method.output_association_weight": FloatDistribution(0.01, 2.0, log=True),
    "method.output_level": CategoricalDistribution([True, False]),
    "method.lovasz_weight": FloatDistribution(0.1, 6.0, log=True),
    "method.regulariser_weight": FloatDistribution(1e-3, 0.2, log=True),
    "method.regulariser_level": FloatDistribution(4.0, 16.0),
    "method.aggregation_weight": FloatDistribution(0.0, 0.95),
    "method.temperature_factor": FloatDistribution(0.2, 5.0, log=True),
    "optimizer.lr_factor": FloatDistribution(0.2, 8.0, log=True),
}
PAPER: dict[str, Any] = {
    "method.feature_association_weight": 0.1,
    "method.output_association_weight": 0.1,
    "method.output_level": True,
    "method.lovasz_weight": 3.0,
    "method.regulariser_weight": 0.01,
    "method.regulariser_level": 10.0,
    "method.aggregation_weight": 0.5,
    "method.temperature_factor": 1.0,
    "optimizer.lr_factor": 1.0,
}
CONFIDENCE: dict[str, Confidence] = {
    "method.feature_association_weight": "high",
    "method.output_association_weight": "high",
    "method.output_level": "high",
    "method.lovasz_weight": "high",
    "method.regulariser_weight": "high",
    "method.regulariser_level": "high",
    "method.aggregation_weight": "high",
    "method.temperature_factor": "low",
    "optimizer.lr_factor": "medium",
}
STREETS: dict[str, Any] = {
    "method.feature_association_weight": 0.18,
    "method.output_association_weight": 0.44,
    "method.output_level": True,
    "method.lovasz_weight": 0.57,
    "method.regulariser_weight": 0.03,
    "method.regulariser_level": 9.3,
    "method.aggregation_weight": 0.85,
    "method.temperature_factor": 4.4,
    "optimizer.lr_factor": 0.82,
}
"""Best of `segadapt search plca --trials 20 seed=10`, rounded to two digits."""
