"""The logs of a search's trials, found by the names of their runs."""

from collections.abc import Iterator
from typing import Any

from segadapt.platform.errors import UsageError
from segadapt.platform.results.leaderboard import find_run, open_client, runs_of
from segadapt.platform.settings.states import TrialState
from segadapt.platform.storage.folders import Place, check_name
from segadapt.platform.tracking.tags import EXPERIMENT_TAG, STATE_TAG, TRIAL_ID_TAG
from segadapt.platform.trial.log import entries, follow_entries, log_folder
from segadapt.platform.trial.spec import trial_artifacts


def trial_log(run: str, search: str, place: Place, *, follow: bool = False) -> Iterator[dict[str, Any]]:
    """Return the entries of a trial's log by time, and with `follow` those to come until the trial ends.

    Args:
        run: `best`, or a run of the search by name or id: a trial, a shared stage, a finish.
        search: The search or single run.
        place: Where it is kept and tracked.
        follow: Wait for more.

    Raises:
        UsageError: If there is no such run, or it left no log here.
    """
    in_search = runs_of(open_client(place), search)
    if run == "best":
        run = find_run(run, search, place).run_id
    logged = [entry for entry in in_search if TRIAL_ID_TAG in entry.data.tags]
    chosen = [entry for entry in logged if run in (entry.info.run_name, entry.info.run_id)]
    if not chosen:
        known = ", ".join(sorted({entry.info.run_name for entry in logged})) or "none"
        raise UsageError(f"TRIAL must be `best` or a run of {search!r}, but got {run!r}. Those are: {known}.")
    newest = max(chosen, key=_is_of_now)  # shared stages may have been begun twice
    tags = newest.data.tags
    check_name(tags[TRIAL_ID_TAG])  # whoever may write to MLflow chose it
    experiment = place.folders.experiment(tags[EXPERIMENT_TAG])
    folder = log_folder(trial_artifacts(experiment, tags[TRIAL_ID_TAG]))
    if not folder.is_dir():
        raise UsageError(
            f"The log of {newest.info.run_name} must lie in {folder}, but does not. Name the search's own --storage. "
            f"Once the trial has ended, its run in MLflow ({newest.info.run_id}) has it too, among the artifacts: logs."
        )
    return follow_entries(folder) if follow else iter(entries(folder))


def _is_of_now(entry: Any) -> tuple[bool, int]:
    """Order runs of one name: one that nobody goes on with comes first; the clock decides where nothing else does."""
    return entry.data.tags.get(STATE_TAG) != str(TrialState.LOST), entry.info.start_time
