"""What a check-up found, and what mends it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from segadapt.platform.errors import redacted
from segadapt.platform.storage.folders import Place, Storage

Level = Literal["ok", "warning", "fault"]
"""`fault`: something is wrong and should be mended. `warning`: worth a look; nothing is mended without you."""


@dataclass(frozen=True)
class Finding:
    """A line of a check-up."""

    subject: str
    """What was looked at; an experiment by its name."""
    level: Level
    text: str
    meaning: str = ""
    advice: str = ""
    repair: Callable[[], None] | None = field(default=None, repr=False, compare=False)
    """Mends it; None where nothing can without the user."""
    repaired: bool = False

    def __post_init__(self) -> None:
        for name in ("text", "meaning", "advice"):  # they quote errors of whatever was asked
            object.__setattr__(self, name, redacted(getattr(self, name)))

    def mended(self) -> "Finding":
        """Repair it; returns what there is to say then."""
        if self.repair is None:
            return self
        try:
            self.repair()
        except Exception as error:  # the other findings are mended all the same
            text = f"The repair failed: {type(error).__name__}: {error}"
            return dataclasses.replace(self, advice=text, repair=None)
        return dataclasses.replace(self, repair=None, repaired=True)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        content = {name: value for name, value in vars(self).items() if name != "repair"}
        return content | {"repairable": self.repair is not None}


@dataclass(frozen=True)
class Examination:
    """What to look at."""

    place: Place
    address: str | None = None
    fix: bool = False

    @property
    def storage(self) -> Storage:
        """The paths below the storage folder."""
        return self.place.folders


def fault(subject: str, text: str, meaning: str, advice: str) -> Finding:
    """Return a finding that something is wrong and nothing mends by itself."""
    return Finding(subject, "fault", text, meaning, advice)
