"""The storage folder: where everything a user keeps lives."""

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from segadapt.platform.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

_LEAST_FREE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Storage:
    """Paths below one root folder, which all nodes of a cluster must see."""

    root: Path

    @property
    def mlflow_database(self) -> Path:
        """SQLite file of the local MLflow."""
        return self.root / "mlflow.db"

    @property
    def mlflow_lock(self) -> Path:
        """Locked by whoever makes or changes that database by itself."""
        return self.root / ".mlflow.lock"

    @property
    def mlflow_artifacts(self) -> Path:
        """Pictures, plots and configurations of MLflow runs."""
        return self.root / "mlartifacts"

    @property
    def tracking(self) -> Path:
        """What MLflow does not have yet, a folder per server."""
        return self.root / "tracking"

    @property
    def study_database(self) -> Path:
        """SQLite file of the Optuna studies."""
        return self.root / "optuna.db"

    @property
    def experiments(self) -> Path:
        """One folder per search or single run, written by Ray."""
        return self.root / "ray"

    @property
    def locks(self) -> Path:
        """A file per experiment, locked by the command that works on it."""
        return self.root / "locks"

    @property
    def stages(self) -> Path:
        """Finished shared stages by their hash."""
        return self.root / "stages"

    def experiment(self, name: str) -> Path:
        """Return the folder of a search or run.

        Raises:
            UsageError: If the name could leave the storage folder or is not readable in a terminal.
        """
        check_name(name)
        return self.experiments / name


@dataclass(frozen=True)
class Place:
    """Where experiments are kept and tracked. Making one touches nothing.

    Raises:
        UsageError: If an address is an empty text.

    Example:
        >>> import segadapt
        >>> place = segadapt.Place("runs")
        >>> place.folders.experiment("sdca-streets").relative_to(place.folders.root).as_posix()
        'ray/sdca-streets'
        >>> segadapt.Place(tracking_uri="http://127.0.0.1:5000").tracking_url
        'http://127.0.0.1:5000'
    """

    storage: str | Path = "runs"
    """Folder that keeps everything; all nodes must see it."""
    tracking_uri: str | None = None
    """MLflow server; None keeps runs in a database in the storage folder."""
    study_uri: str | None = None
    """Optuna's storage, such as postgresql+psycopg://...; None keeps studies in a database in the storage folder."""

    def __post_init__(self) -> None:
        for option, address in (("--tracking-uri", self.tracking_uri), ("--study-uri", self.study_uri)):
            if address == "":
                raise UsageError(f"{option} must be an address, but got ''. Leave it out to use the storage folder.")

    @property
    def folders(self) -> Storage:
        """The paths below the storage folder; nothing is looked at or made."""
        return Storage(Path(self.storage).expanduser().absolute())

    @property
    def tracking_url(self) -> str:
        """Address of the MLflow server, or of the database in the storage folder."""
        return self.tracking_uri or f"sqlite:///{self.folders.mlflow_database}"

    @property
    def study_url(self) -> str:
        """Address of Optuna's storage, as SQLAlchemy takes it."""
        return self.study_uri or f"sqlite:///{self.folders.study_database}"

    def existing(self) -> Storage:
        """Return the paths below a storage folder that must be there.

        Raises:
            UsageError: If there is no such folder.
        """
        if not self.folders.root.is_dir():
            raise UsageError(
                f"--storage must be an existing folder, but {self.folders.root} is not. Name the one of your runs."
            )
        return self.folders

    def prepared(self) -> Storage:
        """Make the storage folder if there is none, and return its paths.

        Raises:
            UsageError: If it is not a folder that can be written, or the disk is nearly full.
        """
        return open_storage(str(self.storage))


HERE = Place()
"""The storage folder `runs` in the current folder, with MLflow and the studies in it."""


def check_name(name: str) -> None:
    """Make sure that a name may become that of a folder.

    Raises:
        UsageError: If it could leave the folder it is in, or is not readable in a terminal.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            "A name must be 1 to 100 letters, digits, '.', '_' or '-', starting with a letter or digit, "
            f"but got {name!r}. Choose another."
        )


def open_storage(root: str) -> Storage:
    """Make the storage folder ready.

    Raises:
        UsageError: If it is not a folder that can be written, or the disk is nearly full.
    """
    if "://" in root:
        raise UsageError(
            f"--storage must be a folder that all nodes see, but got {root!r}. Mount it, or choose another."
        )
    storage = Storage(Path(root).expanduser().absolute())
    try:
        storage.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=storage.root) as probe:
            probe.write(b"segadapt")
    except OSError as error:
        raise UsageError(
            f"--storage must be a folder that can be written, but {storage.root} is not: {error.strerror}. "
            "Choose another or change its permissions."
        ) from error
    free = shutil.disk_usage(storage.root).free
    least = int(os.environ.get("SEGADAPT_MIN_FREE_BYTES", _LEAST_FREE_BYTES))
    if free < least:
        raise UsageError(
            f"The disk of --storage must have {least / 2**20:.0f} MiB free, but {storage.root} has "
            f"{free / 2**20:.0f} MiB. Free some space or choose another folder."
        )
    return storage
