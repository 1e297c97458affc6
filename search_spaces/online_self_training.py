"""What may vary for online self-training, and the published settings.

`PAPER` is MIC's without its draws of rare classes and its distance of features, which need many classes and pretrained
weights. `PRESETS` are the four papers' settings; quirks of their released codes are settings of their own. The mask of
`vfm_uda` needs a plain transformer. The distance of features of `daformer` and `mic` needs pretrained weights and a
class that is a thing.
"""

from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from segadapt.search_spaces import Confidence

SPACE: dict[str, BaseDistribution] = {
    "online.teacher_rate": FloatDistribution(1e-4, 3e-2, log=True),
    "online.threshold": FloatDistribution(0.8, 0.99),
    "online.mask_weight": FloatDistribution(0.1, 2.0, log=True),
    "online.mask_ratio": FloatDistribution(0.3, 0.9),  # MIC's ablation: 0.3, 0.5, 0.7, 0.9
    "online.mask_block": CategoricalDistribution((0.0625, 0.03125, 0.125, 0.25)),  # MIC's ablation, of crops of 512
    "online.jitter": FloatDistribution(0.0, 0.5),
    "online.rare_class_temperature": CategoricalDistribution((None, 0.01, 0.05, 0.2, 1.0)),
    "optimizer.lr_factor": FloatDistribution(0.2, 8.0, log=True),
}
PAPER: dict[str, Any] = {
    "online.teacher_rate": 0.001,
    "online.threshold": 0.968,
    "online.mask_weight": 1.0,
    "online.mask_ratio": 0.7,
    "online.mask_block": 0.0625,
    "online.jitter": 0.2,
    "online.rare_class_temperature": None,
    "optimizer.lr_factor": 1.0,
}
CONFIDENCE: dict[str, Confidence] = {
    "online.teacher_rate": "high",
    "online.threshold": "high",
    "online.mask_weight": "high",
    "online.mask_ratio": "high",
    "online.mask_block": "high",
    "online.jitter": "high",
    "online.rare_class_temperature": "low",
    "optimizer.lr_factor": "medium",
}
PRESETS: dict[str, dict[str, Any]] = {
    "dacs": {"online.teacher_rate": 0.01, "online.mask": "none"},
    "daformer": {
        "online.mask": "none",
        "online.rare_class_temperature": 0.01,
        "online.feature_distance": 0.005,
    },
    "mic": {
        "online.rare_class_temperature": 0.01,
        "online.feature_distance": 0.005,
    },
    "vfm_uda": {
        "method.mean_over": "valid",
        "online.teacher_norm": "average",
        "online.mirrored": True,
        "online.mask": "token",
        "online.augment_of": "image",
        "online.rare_class_temperature": 0.05,
        "online.crop_tries": 20,
    },
}
