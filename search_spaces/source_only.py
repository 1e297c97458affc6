"""What may vary for source-only training, and the published setting (SDCA's first stage)."""

from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution

from segadapt.search_spaces import Confidence

SPACE: dict[str, BaseDistribution] = {
    "warmup.lr_factor": FloatDistribution(0.2, 8.0, log=True),
    "warmup.lovasz_weight": FloatDistribution(0.0, 1.5),
    "optimizer.weight_decay": FloatDistribution(1e-5, 1e-3, log=True),
}
PAPER: dict[str, Any] = {
    "warmup.lr_factor": 2.0,
    "warmup.lovasz_weight": 0.75,
    "optimizer.weight_decay": 5e-4,
}
CONFIDENCE: dict[str, Confidence] = {
    "warmup.lr_factor": "medium",
    "warmup.lovasz_weight": "high",
    "optimizer.weight_decay": "high",
}
