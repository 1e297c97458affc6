"""Where PriorBand's proposals came from, and whether the setting that it started from suits the data."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from segadapt.platform.search.priorband import PROPOSAL

NOT_SUITED = 100.0
"""How many times likelier the better trials must be around the best one than around the start before a report says that
the start does not suit the data."""


@dataclass(frozen=True)
class Origins:
    """Where the proposals of a search came from."""

    counts: dict[str, int]
    """Trials by origin."""
    start: str
    """What the search started from, for people."""
    uniform: float
    """Share of the next proposals that would come from the whole space."""
    prior: float
    """Share of them that would lie around the start."""
    incumbent: float
    """Share of them that would lie around the best trial."""
    likelihood_ratio: float | None
    """How many times likelier the other good trials are around the best trial than around the start."""

    @property
    def verdict(self) -> str | None:
        """What the ratio says of the start; None as long as it says nothing."""
        if self.likelihood_ratio is None:
            return None
        ratio = f"{self.likelihood_ratio:.2g}" if self.likelihood_ratio < 10 else f"{self.likelihood_ratio:,.0f}"
        times = f"{ratio} times as likely around the best one as around {self.start}"
        if self.likelihood_ratio >= NOT_SUITED:
            return f"{self.start.capitalize()} does not transfer to your data: the other good trials are {times}."
        return f"The other good trials are {times}."


def origins(study: Any) -> Origins | None:
    """Return where the proposals of a study came from; None if PriorBand did not make them."""
    notes = [trial.user_attrs[PROPOSAL] for trial in study.get_trials(deepcopy=False) if PROPOSAL in trial.user_attrs]
    if not notes:
        return None
    last = notes[-1]
    return Origins(
        counts=dict(Counter(note["origin"] or "start" for note in notes)),
        start="the published setting" if last["is_published"] else "the setting that the search started from",
        uniform=last["uniform"],
        prior=last["prior"],
        incumbent=last["incumbent"],
        likelihood_ratio=last["likelihood_ratio"],
    )
