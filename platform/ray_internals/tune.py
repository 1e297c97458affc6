"""Ray Tune's private parts: how often it saves its state, what it sends to trials, which errors it forgives."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ray.tune.execution.experiment_state import _ExperimentCheckpointManager

from segadapt.platform.ray_internals.start import attributes_changed

_LEAST_S = 1.0
"""Between two of them, in seconds."""


_PAUSE = 19
"""So many times as long as saving took passes until it is done again: a twentieth of the driver's time at most."""


class Snapshots(_ExperimentCheckpointManager):
    """Saves at most each second, less often when it takes longer.

    Tune has a fixed pace or one of 10 s and more, and also saves after every checkpoint of a trial, so that its state
    names none that was replaced since. Here a resumed trial looks for the newest one itself.
    """

    def __init__(self, storage: Any) -> None:
        super().__init__(storage=storage, checkpoint_period=_LEAST_S)

    def sync_up_experiment_state(self, save_fn: Callable[[], None], force: bool = False, wait: bool = False) -> None:
        """Save by `save_fn` if it is time, or at once if forced."""

        def save() -> None:
            begun = time.thread_time()  # whatever else the machine does
            save_fn()
            self._checkpoint_period = max(_LEAST_S, _PAUSE * (time.thread_time() - begun))

        super().sync_up_experiment_state(save, force=force, wait=wait)


def pace(shown: Any) -> None:
    """Have Tune save its state as `Snapshots` does.

    Args:
        shown: What Tune shows its schedulers of its controller.
    """
    controller = shown._tune_controller
    if not isinstance(controller._checkpoint_manager, Snapshots):
        controller._checkpoint_manager = Snapshots(controller._storage)


SHORT_OF_MEMORY = "its node was short of memory, so that Ray ended its process"
"""How the error begins of a trial that this happened to."""


@contextlib.contextmanager
def no_secrets_for_trials(*, joined: bool) -> Iterator[None]:
    """Have Tune send trials no secrets, and none of this machine's variables where they inherit them.

    Ray writes what is sent into a log in /tmp that all users of a machine may read. On this machine trials have the
    variables of this process, and one that is sent any could not take a process that is ready. On a cluster, AWS_* must
    be in the environment in which Ray was started there.
    """
    from ray.tune.execution import class_cache

    sent = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if joined and not name.startswith("AWS_")}
    fixed = class_cache.DEFAULT_ENV_VARS if joined else {}
    with attributes_changed((class_cache, "ENV_VARS_TO_PROPAGATE", sent), (class_cache, "DEFAULT_ENV_VARS", fixed)):
        yield


@contextlib.contextmanager
def memory_kills_are_deaths() -> Iterator[None]:
    """Have Tune start a trial again whose process Ray has ended since its node was short of memory.

    Ray has an error of its own for that, at which Tune would give up all trials.
    """
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError

    failed = RayActorManager._actor_task_failed

    def task_failed(manager: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=f"{SHORT_OF_MEMORY}: {exception}")
        failed(manager, tracked_actor_task, exception)

    with attributes_changed((RayActorManager, "_actor_task_failed", task_failed)):
        yield


def begin_trials_in(experiment: Any, folder: Path) -> None:
    """Have a saved experiment of Tune's begin its trials in the storage folder where it is now.

    Tune itself tells the trials it had begun that the folder was moved, but not the experiment that makes new ones.

    Args:
        experiment: As Tune saved it with the state of its searcher.
        folder: Of all experiments.
    """
    experiment.spec["storage"].storage_fs_path = str(folder)
