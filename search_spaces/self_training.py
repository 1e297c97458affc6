"""What may vary for self-training, and the setting of SDCA's last stage."""

from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from segadapt.search_spaces import Confidence

SPACE: dict[str, BaseDistribution] = {
    "method.rounds": IntDistribution(1, 3),
    "method.quantile": FloatDistribution(0.2, 0.8),
    "method.confidence_cap": FloatDistribution(0.8, 0.99),
    "method.target_weight": FloatDistribution(0.1, 2.0, log=True),
    "optimizer.lr_factor": FloatDistribution(0.2, 8.0, log=True),
}
PAPER: dict[str, Any] = {
    "method.rounds": 1,
    "method.quantile": 0.5,
    "method.confidence_cap": 0.9,
    "method.target_weight": 1.0,
    "optimizer.lr_factor": 1.0,
}
CONFIDENCE: dict[str, Confidence] = {
    "method.rounds": "high",
    "method.quantile": "high",
    "method.confidence_cap": "high",
    "method.target_weight": "high",
    "optimizer.lr_factor": "medium",
}
