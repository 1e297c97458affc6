"""How often Tune saves its state."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune.execution.experiment_state import _ExperimentCheckpointManager

from segadapt.platform.ray_internals.trials import note_hashes

PRIVATE = (
    ("ray.tune.execution.experiment_state", "_ExperimentCheckpointManager", "pace how often Tune saves its state"),
    (
        "ray.tune.execution.experiment_state",
        "_ExperimentCheckpointManager.sync_up_experiment_state",
        "pace how often Tune saves its state",
    ),
    (
        "ray.tune.execution.experiment_state",
        "_ExperimentCheckpointManager._checkpoint_period",
        "pace how often Tune saves its state",
    ),
    (
        "ray.train._internal.storage",
        "StorageContext.experiment_driver_staging_path",
        "hash Tune's state as it is saved",
    ),
)
"""Parts of Tune that are not public: module, name and what they are for."""

_LEAST_S = 1.0
"""Seconds between the starts of two savings, at least."""

_PAUSE = 19
"""So many times as long as saving took passes until it is done again: a twentieth of the driver's time at most."""


class Snapshots(_ExperimentCheckpointManager):
    """Saves at most each second, less often when it takes longer.

    Tune has a fixed pace or one of 10 s and more, and also saves after every checkpoint of a trial, so that its state
    names none that was replaced since. Here a resumed trial looks for the newest one itself.
    """

    def __init__(self, storage: Any) -> None:
        super().__init__(storage=storage, checkpoint_period=_LEAST_S)
        self._staging = Path(storage.experiment_driver_staging_path)

    def sync_up_experiment_state(self, save_fn: Callable[[], None], force: bool = False, wait: bool = False) -> None:
        """Save by `save_fn` if it is time, or at once if forced."""

        def save() -> None:
            begun = time.thread_time()  # whatever else the machine does
            save_fn()
            note_hashes(self._staging)
            self._checkpoint_period = max(_LEAST_S, _PAUSE * (time.thread_time() - begun))

        super().sync_up_experiment_state(save, force=force, wait=wait)
