"""What may vary for SDCA, and the published setting.

Weights are searched as gain g = λ / τ: at τ ≥ 10 only the gain acts, so λ and τ alone would be nearly redundant.
"""

from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution

from segadapt.search_spaces import Confidence

SPACE: dict[str, BaseDistribution] = {
    "method.temperature": FloatDistribution(0.3, 100.0, log=True),
    "method.feature_gain": FloatDistribution(3e-3, 3.0, log=True),
    "method.output_gain": FloatDistribution(3e-3, 3.0, log=True),
    "method.confidence_threshold": FloatDistribution(0.5, 0.98),
    "method.lovasz_weight": FloatDistribution(0.0, 1.5),
    "optimizer.lr_factor": FloatDistribution(0.2, 8.0, log=True),
}
PAPER: dict[str, Any] = {
    "method.temperature": 100.0,
    "method.feature_gain": 0.01,
    "method.output_gain": 0.01,
    "method.confidence_threshold": 0.9,
    "method.lovasz_weight": 0.75,
    "optimizer.lr_factor": 1.0,
}
CONFIDENCE: dict[str, Confidence] = {
    "method.temperature": "high",
    "method.feature_gain": "high",
    "method.output_gain": "high",
    "method.confidence_threshold": "high",
    "method.lovasz_weight": "high",
    "optimizer.lr_factor": "medium",
}
