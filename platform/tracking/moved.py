"""MLflow's database in a storage folder that was moved or copied: it notes the address of every run's artifacts."""

import contextlib
import logging
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

from segadapt.platform.storage.folders import Place
from segadapt.platform.tracking.client import waiting_folder
from segadapt.platform.tracking.outbox import box_contents

logger = logging.getLogger(__name__)

_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)
"""Tables and columns of MLflow's database that hold addresses of artifacts."""


def point_artifacts_here(place: Place) -> None:
    """Have MLflow's database in the storage folder name the folder where it is now.

    While a command tracks to the database, it is left alone: that command may see the same folder at another path.
    """
    database = place.folders.mlflow_database
    if place.tracking_uri is not None or not database.is_file():
        return
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection, connection:
            former = _former_addresses(connection, place.folders.mlflow_artifacts)
            if former and not any(box.alive for box in box_contents(waiting_folder(place))):
                _replace(connection, former, place.folders.mlflow_artifacts.as_uri())
    except sqlite3.Error as error:  # of a damaged database, or another MLflow's: what opens it next tells
        logger.warning("Where artifacts lie could not be looked up in %s: %s", database, error)


def _former_addresses(connection: sqlite3.Connection, artifacts: Path) -> set[str]:
    """Return the addresses at which the folder of artifacts was, as far as experiments still name them."""
    locations = connection.execute("select artifact_location from experiments where artifact_location like 'file:%'")
    folders = {location.rpartition("/")[0] for (location,) in locations}
    return {folder for folder in folders if folder.endswith(f"/{artifacts.name}") and not _is(artifacts, folder)}


def _is(folder: Path, address: str) -> bool:
    """Return whether an address is that of a folder, maybe by another name."""
    with contextlib.suppress(FileNotFoundError):
        return address == folder.as_uri() or folder.samefile(unquote(urlsplit(address).path))
    return False


def _replace(connection: sqlite3.Connection, former: set[str], address: str) -> None:
    """Replace the beginning of all addresses that begin with a former one."""
    for table, column in _ADDRESSES:
        for old in former:
            connection.execute(
                f"update {table} set {column} = ? || substr({column}, ?) where substr({column}, 1, ?) = ?",
                (address, len(old) + 1, len(old) + 1, f"{old}/"),
            )
