"""What may vary for DRSL, and the settings it starts from: the paper's are unknown, see `docs/methods/drsl.md`.

A weight's zero is left to `method.metric_weight=0` and the like: it changes the plan. Rounds and steps are a matter of
budget.
"""

from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from segadapt.search_spaces import Confidence

SPACE: dict[str, BaseDistribution] = {
    "method.metric_weight": FloatDistribution(1e-3, 1.0, log=True),
    "method.alignment_weight": FloatDistribution(1e-3, 1.0, log=True),
    "method.target_weight": FloatDistribution(0.1, 2.0, log=True),
    "method.modes_per_class": CategoricalDistribution((1, 2, 3, 5, 8)),
    "method.margin": FloatDistribution(0.1, 1.0),
    "method.embedding_channels": CategoricalDistribution((64, 128, 256)),
    "method.stop_source": CategoricalDistribution((True, False)),
    "method.portion": FloatDistribution(0.1, 0.4),
    "method.portion_step": FloatDistribution(0.0, 0.1),
    "method.portion_cap": FloatDistribution(0.4, 0.8),
    "method.rare_crop_chance": CategoricalDistribution((0.0, 0.8)),
    "optimizer.lr_factor": FloatDistribution(0.2, 8.0, log=True),
}
PAPER: dict[str, Any] = {
    "method.metric_weight": 0.1,
    "method.alignment_weight": 0.1,
    "method.target_weight": 1.0,
    "method.modes_per_class": 5,
    "method.margin": 0.5,
    "method.embedding_channels": 256,
    "method.stop_source": True,
    "method.portion": 0.2,
    "method.portion_step": 0.05,
    "method.portion_cap": 0.5,
    "method.rare_crop_chance": 0.8,
    "optimizer.lr_factor": 1.0,
}
CONFIDENCE: dict[str, Confidence] = {
    "method.metric_weight": "low",
    "method.alignment_weight": "low",
    "method.target_weight": "medium",
    "method.modes_per_class": "medium",
    "method.margin": "medium",
    "method.embedding_channels": "medium",
    "method.stop_source": "low",
    "method.portion": "medium",
    "method.portion_step": "medium",
    "method.portion_cap": "medium",
    "method.rare_crop_chance": "medium",
    "optimizer.lr_factor": "medium",
}
