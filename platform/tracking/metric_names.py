"""Names that users choose, such as those of classes, in names that MLflow takes for metrics and params.

MLflow refuses a whole record for one name with a character such as `(` or `,`, one that a file path would not keep, or
one that is too long. Such a name is changed; the true one stands beside it, in a tag of the run.
"""

import hashlib
import posixpath
import re
from collections.abc import Iterable, Mapping

from segadapt.platform.tracking.tags import TRUE_NAME_TAGS

_REFUSED = re.compile(r"[^\w.\- /]")  # MLflow also takes a colon, but not on Windows

_LONGEST = 200
"""Characters of a name at most: MLflow takes 250, and that of the tag is longer."""

_DIGITS = 8


def stored_name(name: str) -> str:
    """Return the name under which MLflow takes a metric or param; names that differ stay different.

    A changed one ends in a part of the true name's hash.
    """
    if not _REFUSED.search(name) and len(name) <= _LONGEST and _is_path(name):
        return name
    parts = [part if part.strip(". ") else "_" for part in _REFUSED.sub("_", name).split("/")]
    digest = hashlib.sha256(name.encode()).hexdigest()[:_DIGITS]
    return f"{'/'.join(parts)[: _LONGEST - _DIGITS - 1]}-{digest}"


def true_name_tags(names: Iterable[str]) -> dict[str, str]:
    """Return the tags that keep the true names of those that MLflow does not take as they are."""
    stored = {stored_name(name): name for name in names}
    return {f"{TRUE_NAME_TAGS}{changed}": name for changed, name in stored.items() if changed != name}


def true_names(names: Iterable[str], tags: Mapping[str, str]) -> dict[str, str]:
    """Return what names of a run's metrics stand for, by the name that MLflow has.

    Args:
        names: Names of metrics as MLflow has them.
        tags: The run's tags.
    """
    return {name: tags.get(f"{TRUE_NAME_TAGS}{name}", name) for name in names}


def _is_path(name: str) -> bool:
    """Return whether a file path of this name would keep it."""
    return posixpath.normpath(name) == name and not name.startswith(("/", "..")) and name != "."
