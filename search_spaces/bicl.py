"""What may vary for BiCL, and the published setting.

Dynamic labels and calibration act in `method.variant=full`; their values are ours, the paper's are unknown. The entropy
weight's zero is `method.entropy=none`. Rounds and steps are a matter of budget.
"""

from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from segadapt.search_spaces import Confidence

SPACE: dict[str, BaseDistribution] = {
    "method.temperature": FloatDistribution(0.03, 0.5, log=True),
    "method.forward_weight": FloatDistribution(0.01, 1.0, log=True),
    "method.backward_weight": FloatDistribution(0.01, 1.0, log=True),
    "method.target_weight": FloatDistribution(0.1, 1.0),
    "method.entropy_weight": FloatDistribution(0.01, 1.0, log=True),
    "method.entropy": CategoricalDistribution(("released", "shannon", "none")),
    "method.share": FloatDistribution(0.05, 0.5),
    "method.share_step": FloatDistribution(0.0, 0.05),
    "method.dynamic_threshold": FloatDistribution(0.5, 0.95),
    "method.calibration_momentum": CategoricalDistribution((0.9, 0.99, 0.999)),
    "method.feature": CategoricalDistribution(("branches", "backbone")),
    "method.round_lr_factor": CategoricalDistribution((0.5, 0.7, 1.0)),
    "optimizer.lr_factor": FloatDistribution(0.2, 8.0, log=True),
    "optimizer.head_lr_factor": CategoricalDistribution((None, 1.0, 3.0, 10.0)),
}
PAPER: dict[str, Any] = {
    "method.temperature": 0.1,
    "method.forward_weight": 0.2,
    "method.backward_weight": 0.2,
    "method.target_weight": 0.3,
    "method.entropy_weight": 0.4,
    "method.entropy": "released",
    "method.share": 0.1,
    "method.share_step": 0.0,
    "method.dynamic_threshold": 0.8,
    "method.calibration_momentum": 0.99,
    "method.feature": "branches",
    "method.round_lr_factor": 0.5,
    "optimizer.lr_factor": 1.0,
    "optimizer.head_lr_factor": None,  # 10 with pretrained weights
}
CONFIDENCE: dict[str, Confidence] = {
    "method.temperature": "high",
    "method.forward_weight": "high",
    "method.backward_weight": "high",
    "method.target_weight": "high",
    "method.entropy_weight": "high",
    "method.entropy": "high",
    "method.share": "high",
    "method.share_step": "high",
    "method.dynamic_threshold": "low",
    "method.calibration_momentum": "low",
    "method.feature": "high",
    "method.round_lr_factor": "high",
    "optimizer.lr_factor": "medium",
    "optimizer.head_lr_factor": "medium",
}
