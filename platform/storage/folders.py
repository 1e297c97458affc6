"""The storage folder: where everything a user keeps lives."""

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from segadapt.platform.errors import UsageError, check_address
from segadapt.platform.ray_internals.start import variable
from segadapt.platform.settings.text import path_of

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

    @property
    def weights(self) -> Path:
        """Pretrained weights by their hash, with a record for each network."""
        return self.root / "weights"

    def experiment(self, name: str) -> Path:
        """Return the folder of a search or run.

        Raises:
            UsageError: If the name could leave the storage folder or is not readable in a terminal.
        """
        check_name(name)
        return self.experiments / name


def database_url(path: Path) -> str:
    """Return the address of an SQLite database, whatever characters its path holds.

    It names the driver: of an address that begins with `sqlite:///`, MLflow takes the rest for a path as it stands, and
    makes that folder.
    """
    from sqlalchemy.engine import URL  # takes as long as all the rest of this module

    return URL.create("sqlite+pysqlite", database=str(path)).render_as_string(hide_password=False)


def user_path(name: str, path: str | Path) -> Path:
    """Return a path that a user has given.

    Args:
        name: Of the option or argument.
        path: What it was given; `~` is the user's folder.

    Raises:
        UsageError: If it is empty, as of a variable that is not set: it would stand for the current folder.
    """
    if str(path) == "" or "\0" in str(path):
        raise UsageError(f"{name} must be a path, but got {str(path)!r}. Write . for the current folder.")
    return path_of(str(path))


@dataclass(frozen=True)
class Place:
    """Where experiments are kept and tracked. Making one touches nothing.

    Raises:
        UsageError: If the folder or an address is an empty text, or an address holds white space.

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
        user_path("--storage", self.storage)
        for option, address in (("--tracking-uri", self.tracking_uri), ("--study-uri", self.study_uri)):
            check_address(option, address)

    @property
    def folders(self) -> Storage:
        """The paths below the storage folder; nothing is looked at or made."""
        return Storage(Path(self.storage).expanduser().absolute())

    @property
    def tracking_url(self) -> str:
        """Address of the MLflow server, or of the database in the storage folder."""
        return self.tracking_uri or database_url(self.folders.mlflow_database)

    @property
    def study_url(self) -> str:
        """Address of Optuna's storage, as SQLAlchemy takes it."""
        return self.study_uri or database_url(self.folders.study_database)

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


def is_name(name: str) -> bool:
    """Return whether a name may become that of a folder."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> None:
    """Make sure that a name may become that of a folder.

    Raises:
        UsageError: If it could leave the folder it is in, or is not readable in a terminal.
    """
    if not is_name(name):
        raise UsageError(
            "A name must be 1 to 100 letters, digits, '.', '_' or '-', starting with a letter or digit, "
            f"but got {name!r}. Choose another."
        )


def open_storage(root: str) -> Storage:
    """Make the storage folder ready.

    Raises:
        UsageError: If it is not a folder that can be written, or the disk is nearly full.
    """
    user_path("--storage", root)
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
    least = _least_free_bytes()
    if free < least:
        raise UsageError(
            f"The disk of --storage must have {least / 2**20:.0f} MiB free, but {storage.root} has "
            f"{free / 2**20:.0f} MiB. Free some space or choose another folder."
        )
    return storage


def _least_free_bytes() -> int:
    """Return how many bytes must be free on the disk of a storage folder."""
    text = variable("SEGADAPT_MIN_FREE_BYTES")
    if text is not None and not text.isdecimal():
        raise UsageError(f"SEGADAPT_MIN_FREE_BYTES must be a number of bytes, but is {text!r}. Correct or unset it.")
    return int(text or _LEAST_FREE_BYTES)
