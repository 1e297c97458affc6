"""segadapt: search, train and finish unsupervised domain-adaptive semantic segmentation on Ray.

Example:
    >>> import segadapt
    >>> planned = segadapt.plan(["sdca", "plca"], {"trainer.steps": 400}, trials=20, place=segadapt.Place("runs"))
    >>> planned.record.name
    'sdca-plca-streets'

`planned.run()` runs it, as `segadapt.search` with the same arguments does. What the command line refuses raises a
`UsageError` here, with the same words.

Names are looked up when they are first used, so that importing this takes milliseconds and starts nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segadapt.platform.api.data import data_adopt, data_check, data_make, data_pack, data_recognise, data_show
    from segadapt.platform.api.methods import describe, list_methods, network_size
    from segadapt.platform.api.models import evaluate, export, predict
    from segadapt.platform.api.operation import (
        cache_list,
        cache_prune,
        doctor,
        jobs,
        logs,
        stop,
        submit,
        ui,
    )
    from segadapt.platform.api.results import report, runs, status, trial_log
    from segadapt.platform.api.training import Finish, Plan, Result, finish, plan, search, train
    from segadapt.platform.api.weights import weights_fetch, weights_list
    from segadapt.platform.errors import UsageError
    from segadapt.platform.settings.resources import Resources, Tolerance
    from segadapt.platform.storage.folders import Place

__version__: str

_MODULES = {
    "api.data": ("data_adopt", "data_check", "data_make", "data_pack", "data_recognise", "data_show"),
    "api.methods": ("describe", "list_methods", "network_size"),
    "api.models": ("evaluate", "export", "predict"),
    "api.operation": ("cache_list", "cache_prune", "doctor", "jobs", "logs", "stop", "submit", "ui"),
    "api.results": ("report", "runs", "status", "trial_log"),
    "api.training": ("Finish", "Plan", "Result", "finish", "plan", "search", "train"),
    "api.weights": ("weights_fetch", "weights_list"),
    "errors": ("UsageError",),
    "settings.resources": ("Resources", "Tolerance"),
    "storage.folders": ("Place",),
}
"""Where each public name is defined, below `segadapt.platform`."""

_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Finish",
    "Place",
    "Plan",
    "Resources",
    "Result",
    "Tolerance",
    "UsageError",
    "cache_list",
    "cache_prune",
    "data_adopt",
    "data_check",
    "data_make",
    "data_pack",
    "data_recognise",
    "data_show",
    "describe",
    "doctor",
    "evaluate",
    "export",
    "finish",
    "jobs",
    "list_methods",
    "logs",
    "network_size",
    "plan",
    "predict",
    "report",
    "runs",
    "search",
    "status",
    "stop",
    "submit",
    "train",
    "trial_log",
    "ui",
    "weights_fetch",
    "weights_list",
]

if not TYPE_CHECKING:  # a type checker would take any name for one that this returns

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version  # takes as long as all the rest

            return version("segadapt")
        if name not in _MODULE_OF:
            raise AttributeError(
                f"module 'segadapt' has no attribute {name!r}; it offers {', '.join(sorted(_MODULE_OF))}"
            )
        from segadapt.platform.ray_internals.start import LEFT_BY_RAY, variables_set

        with variables_set({}, LEFT_BY_RAY):
            value = getattr(importlib.import_module(f"segadapt.platform.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF, "__version__"})
