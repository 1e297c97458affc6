"""Which images a trial uses."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from segadapt.trainables.core.data.batch import DomainData, EvaluationData
from segadapt.trainables.core.data.folder import load_folder
from segadapt.trainables.core.data.streets import StreetsConfig, load_streets
from segadapt.trainables.core.validation import check


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Source, target and how they are read."""

    name: Literal["streets", "folder"] = "streets"
    """`streets` is generated; `folder` reads `data.root`."""
    root: str | None = None
    """Folder with classes.json, source/ and target/, laid out as `segadapt data make` writes it."""
    oracle: bool = False
    """Train on the labelled target training set in place of the source: the upper bound, never a method's result."""
    streets: StreetsConfig = field(default_factory=StreetsConfig)

    def __post_init__(self) -> None:
        check(
            (self.name == "folder") == (self.root is not None),
            "data.root must be given with data.name=folder, and only then",
            {"data.name": self.name, "data.root": self.root},
        )


@lru_cache(maxsize=4)
def load_data(config: DataConfig) -> tuple[DomainData, EvaluationData]:
    """Return what training may use and what evaluation alone may use.

    Raises:
        ValueError: If the data is missing or malformed; names what must be there.
    """
    if config.root is not None:
        return load_folder(config.root, oracle=config.oracle)
    return load_streets(config.streets, oracle=config.oracle)
