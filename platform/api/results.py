"""What came out of a search, and how one stands."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segadapt.platform.errors import UsageError
from segadapt.platform.results.leaderboard import (
    Leaderboard,
    leaderboard,
    open_client,
    runs_of_search,
    study_of,
)
from segadapt.platform.storage.files import write_whole
from segadapt.platform.storage.folders import HERE, Place, user_path

if TYPE_CHECKING:
    from segadapt.platform.results.status import SearchStatus


def runs(search: str, *, selection: bool = False, place: Place = HERE) -> Leaderboard:
    """Return the leaderboard of a search or single run, read from MLflow; records that wait for it are sent first.

    Args:
        search: The search or single run.
        selection: Also judge what label-free scores would have chosen, by target mIoU.
        place: Where it is kept and tracked.

    Returns:
        The leaderboard: a row per trial and finish, best first. Metrics lie between 0 and 1.

    Raises:
        UsageError: If MLflow knows no search of that name; lists those it knows.

    Example:
        >>> import segadapt
        >>> board = segadapt.runs("demo")
        >>> board.objective, [(row.kind, row.state, row.best_step) for row in board.rows if row.kind == "trial"]
        ('target_val/miou', [('trial', 'finished', 8)])
    """
    return leaderboard(search, place, selection=selection)


def report(search: str, out: str | None = None, *, place: Place = HERE) -> Path:
    """Write a search as one HTML file that needs no network, and return its path.

    Args:
        search: The search.
        out: The file; None for `SEARCH.html` in the current folder.
        place: Where it is kept and tracked.

    Returns:
        The file that was written.

    Raises:
        UsageError: If there is no such search, or the file cannot be written.

    Example:
        >>> import segadapt
        >>> segadapt.report("demo").name
        'demo.html'
    """
    from segadapt.platform.results.report import render

    path = user_path("--out", f"{search}.html" if out is None else out)
    board, client = leaderboard(search, place, selection=True), open_client(place)
    page = render(board, runs_of_search(client, search), client, study_of(search, place), place)
    try:
        write_whole(path, page)
    except OSError as error:
        raise UsageError(f"The report must be writable, but {path} is not: {error.strerror}.") from error
    return path


def status(search: str, *, place: Place = HERE) -> "SearchStatus":
    """Return how a search stands; runs beside it, on this machine or another that sees its storage or its servers.

    Args:
        search: The search.
        place: Where it is kept and tracked.

    Returns:
        The status: trials by state, the best so far, rungs, failures, and the seconds left, None for a search that is
        over.

    Raises:
        UsageError: If there is no such search.

    Example:
        >>> import segadapt
        >>> status = segadapt.status("demo")
        >>> status.state, status.states, status.left_s
        ('finished', {'finished': 1}, None)
    """
    from segadapt.platform.results.status import search_status

    client = open_client(place)
    return search_status(search, runs_of_search(client, search), client, study_of(search, place))


def trial_log(run: str, search: str, *, follow: bool = False, place: Place = HERE) -> Iterator[dict[str, Any]]:
    """Return the entries of a trial's log by time, and with `follow` those to come until the trial ends.

    Args:
        run: `best`, or a run of the search by name or id: a trial, a shared stage, a finish.
        search: The search or single run.
        follow: Wait for more.
        place: Where it is kept and tracked.

    Returns:
        The entries: `time` (UTC), `event`, `step`, `message`, `fields` and more.

    Raises:
        UsageError: If there is no such run, or it left no log here.

    Example:
        >>> import segadapt
        >>> [entry["event"] for entry in segadapt.trial_log("best", "demo")][:3]
        ['started', 'start', 'stage_begun']
    """
    from segadapt.platform.results import trial_logs

    return trial_logs.trial_log(run, search, place, follow=follow)
