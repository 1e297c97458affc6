"""All that touches private parts of MLflow."""

from dataclasses import dataclass

from segadapt.platform.errors import warn_of_change

PRIVATE = (
    ("mlflow.store.db.utils", "_get_latest_schema_revision", "tell whether a database is of the installed version"),
    ("mlflow.store.db.base_sql_model", "Base.metadata", "tell whether a database is whole"),
)
"""Parts of MLflow that are not public: module, name and what they are for."""


@dataclass(frozen=True)
class Schema:
    """What a database of MLflow must have."""

    revision: str
    """Name that MLflow gives this state of its tables."""
    tables: frozenset[str]


def newest_schema() -> Schema | None:
    """Return the schema of the installed MLflow; None where MLflow has changed in the parts that know it."""
    try:
        from mlflow.store.db.base_sql_model import Base
        from mlflow.store.db.utils import _get_latest_schema_revision

        return Schema(_get_latest_schema_revision(), frozenset(Base.metadata.tables))  # type: ignore[no-untyped-call]
    except (ImportError, AttributeError) as error:
        warn_of_change("mlflow", str(error), "the schema of its database cannot be looked at.")
        return None
