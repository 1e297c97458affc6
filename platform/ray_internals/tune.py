"""Ray Tune's private parts: how often it saves its state, what it sends to trials, which errors it forgives."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from segadapt.platform.errors import warn_of_change
from segadapt.platform.ray_internals.start import attributes_changed

PRIVATE = (
    ("ray.tune", "Tuner._local_tuner", "give a search that goes on its searcher and scheduler"),
    ("ray.tune.impl.tuner_internal", "TunerInternal._tune_config", "give a search that goes on its searcher"),
    ("ray.tune", "ResultGrid._experiment_analysis", "list the trials of a search"),
    (
        "ray.tune.execution.tune_controller",
        "TrialRunnerWrapper._tune_controller",
        "pace how often Tune saves its state",
    ),
    ("ray.tune.execution.tune_controller", "TuneController._checkpoint_manager", "pace how often Tune saves its state"),
    ("ray.tune.execution.tune_controller", "TuneController._storage", "pace how often Tune saves its state"),
    (
        "ray.train._internal.storage",
        "StorageContext.storage_fs_path",
        "begin trials where the folder of a search is now",
    ),
    ("ray.tune.execution.class_cache", "ENV_VARS_TO_PROPAGATE", "send trials no secrets"),
    ("ray.tune.execution.class_cache", "DEFAULT_ENV_VARS", "have processes that are ready take trials"),
    ("ray.air.execution._internal.actor_manager", "RayActorManager", "start trials again that had too little memory"),
    (
        "ray.air.execution._internal.actor_manager",
        "RayActorManager._actor_task_failed",
        "start trials again that had too little memory",
    ),
)
"""Parts of Ray that are not public: module, name and what they are for."""


def set_tune_config(tuner: Any, config: Any) -> None:
    """Have a restored search go on with this searcher and scheduler rather than those that were pickled."""
    tuner._local_tuner._tune_config = config


def trials_of(results: Any) -> Sequence[Any]:
    """Return Tune's trials behind the results of a search."""
    trials: Sequence[Any] = results._experiment_analysis.trials
    return trials


def pace(shown: Any) -> None:
    """Have Tune save its state as `Snapshots` does.

    Args:
        shown: What Tune shows its schedulers of its controller.
    """
    try:
        from segadapt.platform.ray_internals.snapshots import Snapshots

        controller = shown._tune_controller
        if not isinstance(controller._checkpoint_manager, Snapshots):
            controller._checkpoint_manager = Snapshots(controller._storage)
    except (ImportError, AttributeError) as error:
        consequence = "Tune saves its state at its own pace, which takes more of the driver's time with many trials."
        warn_of_change("ray", str(error), consequence)


SHORT_OF_MEMORY = "its node was short of memory, so that Ray ended its process"
"""How the error begins of a trial that this happened to."""

_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
"""Variables that Tune sends to trials by itself."""


@contextlib.contextmanager
def no_secrets_for_trials(*, joined: bool) -> Iterator[None]:
    """Have Tune send trials no secrets, and none of this machine's variables where they inherit them.

    Ray writes what is sent into a log in /tmp that all users of a machine may read. On this machine trials have the
    variables of this process, and one that is sent any could not take a process that is ready. On a cluster, AWS_* must
    be in the environment in which Ray was started there.
    """
    try:
        from ray.tune.execution import class_cache
        from ray.tune.execution.class_cache import DEFAULT_ENV_VARS, ENV_VARS_TO_PROPAGATE
    except ImportError as error:
        secrets = ", ".join(name for name in _SECRETS if name in os.environ)
        consequence = "Tune sends trials the variables of its choice"
        if secrets:
            consequence += f", and Ray writes {secrets} into a log in /tmp that all users of this machine may read"
        warn_of_change("ray", str(error), f"{consequence}.")
        yield
        return
    sent = {name for name in ENV_VARS_TO_PROPAGATE if joined and not name.startswith("AWS_")}
    fixed = DEFAULT_ENV_VARS if joined else {}
    with attributes_changed((class_cache, "ENV_VARS_TO_PROPAGATE", sent), (class_cache, "DEFAULT_ENV_VARS", fixed)):
        yield


@contextlib.contextmanager
def memory_kills_are_deaths() -> Iterator[None]:
    """Have Tune start a trial again whose process Ray has ended since its node was short of memory.

    Ray has an error of its own for that, at which Tune would give up all trials.
    """
    from ray.exceptions import OutOfMemoryError, RayActorError

    try:
        from ray.air.execution._internal.actor_manager import RayActorManager

        failed = RayActorManager._actor_task_failed
    except (ImportError, AttributeError) as error:
        warn_of_change("ray", str(error), "a trial whose node is short of memory ends the search; --resume goes on.")
        yield
        return

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
