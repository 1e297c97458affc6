"""What choosing without target labels would have cost: every label-free score held against target mIoU."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from segadapt.platform.settings.objective import LABEL_FREE, TARGET

_LEAST_RANKED = 3
"""Fewest trials whose rank correlation says anything."""


@dataclass(frozen=True)
class Choice:
    """What a label-free score makes of a search's trials."""

    score: str
    """Metric of the score."""
    trials: int
    """Trials that have it and target mIoU."""
    correlation: float | None
    """Spearman's rank correlation with target mIoU; None for fewer than three trials, or where all are equal."""
    chosen: str
    """Trial with the highest score; of equals, the first by name."""
    target_miou: float
    """Target mIoU of the chosen trial."""
    regret: float
    """Best target mIoU of these trials, minus that."""


def compare(trials: Mapping[str, Mapping[str, float]]) -> list[Choice]:
    """Judge each label-free score as a way to choose among trials.

    Args:
        trials: By name, what was reported with the checkpoint that each kept. That checkpoint was chosen by the
            search's objective, so the comparison is one between trials alone.

    Returns:
        One for each score that some trial has beside a target mIoU; none where all target labels are ignored.
    """
    choices = []
    for score in LABEL_FREE:
        pairs = {name: (kept.get(score, math.nan), kept.get(TARGET, math.nan)) for name, kept in trials.items()}
        judged = {name: pair for name, pair in pairs.items() if all(map(math.isfinite, pair))}
        if not judged:
            continue
        chosen = max(sorted(judged), key=lambda name: judged[name][0])
        miou = judged[chosen][1]
        scores, mious = zip(*judged.values(), strict=True)
        choices.append(Choice(score, len(judged), _rank_correlation(scores, mious), chosen, miou, max(mious) - miou))
    return choices


def _rank_correlation(left: tuple[float, ...], right: tuple[float, ...]) -> float | None:
    from scipy.stats import spearmanr

    if len(left) < _LEAST_RANKED or len(set(left)) == 1 or len(set(right)) == 1:
        return None
    return float(spearmanr(left, right).statistic)
