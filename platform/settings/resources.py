"""What one trial takes from the cluster, and what may go wrong with its machines before it has failed."""

from dataclasses import dataclass
from typing import Literal, get_args

from segadapt.platform.errors import UsageError

Launcher = Literal["auto", "train", "inprocess"]


@dataclass(frozen=True)
class Resources:
    """What one trial is to take from the cluster.

    Raises:
        UsageError: If there is no worker, a number is negative, or GPUs cannot be shared out so.

    Example:
        >>> import segadapt
        >>> segadapt.Resources(gpus=0.5)  # two trials share a GPU
        Resources(workers=1, gpus=0.5, launcher='auto')
        >>> segadapt.Resources(gpus=1.5)
        Traceback (most recent call last):
        ...
        segadapt.platform.errors.UsageError: --gpus-per-trial must be a part of one GPU or a whole number of them, ...
    """

    workers: int = 1
    """Data-parallel workers of each trial."""
    gpus: float | None = None
    """GPUs of each worker; None takes one if there is any."""
    launcher: Launcher = "auto"
    """Who runs a trial: `train` (Ray Train), `inprocess` (the trial's own process), or `auto`."""

    def __post_init__(self) -> None:
        if self.launcher not in get_args(Launcher):
            raise UsageError(f"--launcher must be auto, train or inprocess, but got {self.launcher!r}.")
        if self.workers < 1 or (self.gpus is not None and self.gpus < 0):
            raise UsageError(
                "A trial must have at least 1 worker and no negative number of GPUs, but got "
                f"--workers-per-trial {self.workers} and --gpus-per-trial {self.gpus}."
            )
        if self.launcher == "inprocess" and self.workers > 1:
            raise UsageError(
                f"--launcher inprocess must have 1 worker per trial, but got {self.workers}. Use --launcher train."
            )
        if self.gpus is not None and self.gpus > 1 and self.gpus != int(self.gpus):
            raise UsageError(
                "--gpus-per-trial must be a part of one GPU or a whole number of them, as Ray shares them out, but got "
                f"{self.gpus:g}. Take {int(self.gpus)} or {int(self.gpus) + 1}."
            )


@dataclass(frozen=True)
class Allocation:
    """What one trial takes from the cluster, once its machines are known."""

    workers: int = 1
    gpus: float = 0.0
    """GPUs of each worker."""
    cpus: float = 1.0
    """CPUs of each worker."""
    launcher: Launcher = "auto"

    @property
    def uses_train(self) -> bool:
        """Whether Ray Train runs the trial: asked for, or by default with several workers or GPUs."""
        return self.launcher == "train" or (self.launcher == "auto" and (self.workers > 1 or self.gpus > 0))


@dataclass(frozen=True)
class Tolerance:
    """How much may go wrong with the machines that a trial runs on before it has failed.

    Raises:
        UsageError: If `max_failures` is negative or `timeout_s` is not positive.

    Example:
        >>> import segadapt
        >>> segadapt.Tolerance(max_failures=0, timeout_s=600)  # try once; ten silent minutes are a failure
        Tolerance(max_failures=0, timeout_s=600)
    """

    max_failures: int = 2
    """How often a trial is started again after its process or node died, or it hung; preemptions do not count."""
    timeout_s: float = 7200.0
    """Seconds; a trial that reports nothing for so long hangs."""

    def __post_init__(self) -> None:
        if self.max_failures < 0:
            raise UsageError(f"--max-failures must not be negative, but got {self.max_failures}. 0 tries once.")
        if not self.timeout_s > 0:
            raise UsageError(
                f"--trial-timeout must be a positive number of seconds, but got {self.timeout_s:g}. "
                "Take several times what lies between two evaluations."
            )
