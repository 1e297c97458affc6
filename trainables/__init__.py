"""Adaptation methods under one contract. Needs torch and torchvision alone."""

from segadapt.trainables.bicl import BiCL
from segadapt.trainables.clst import CLST
from segadapt.trainables.core.method import Method
from segadapt.trainables.drsl import DRSL
from segadapt.trainables.online_self_training import OnlineSelfTraining
from segadapt.trainables.plca import PLCA
from segadapt.trainables.sdca import SDCA
from segadapt.trainables.self_training import SelfTraining
from segadapt.trainables.source_only import SourceOnly

METHODS: tuple[type[Method], ...] = (
    SourceOnly,
    SelfTraining,
    OnlineSelfTraining,
    SDCA,
    BiCL,
    DRSL,
    CLST,
    PLCA,
)
"""All methods, the baselines first."""


def method_class(name: str) -> type[Method]:
    """Return the method called `name`.

    Raises:
        ValueError: If there is none; lists the known ones.
    """
    for method in METHODS:
        if method.name == name:
            return method
    known = ", ".join(method.name for method in METHODS)
    raise ValueError(f"A method must be one of {known}, but got {name!r}. `segadapt list` describes them.")
