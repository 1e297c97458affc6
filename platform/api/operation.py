"""Keep a storage folder and a cluster in order: cache, doctor, jobs, MLflow's pages."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from segadapt.platform.errors import UsageError
from segadapt.platform.storage import cache
from segadapt.platform.storage.folders import HERE, Place

if TYPE_CHECKING:
    from segadapt.platform.cluster.jobs import Job
    from segadapt.platform.doctor.findings import Finding


def cache_list(*, place: Place = HERE) -> cache.CacheContent:
    """Return what is in the stage cache: finished stages, the leases of those being computed, what was left over.

    Args:
        place: Where the storage folder is.

    Returns:
        The content; sizes are in bytes, times in seconds.

    Raises:
        UsageError: If there is no storage folder.

    Example:
        >>> import segadapt
        >>> content = segadapt.cache_list()
        >>> sorted(stage.description.stage for stage in content.stages), content.bytes > 0
        (['source_only', 'statistics'], True)
    """
    return cache.content(place.existing())


def cache_prune(
    *, older_than_days: float | None = None, everything: bool = False, dry_run: bool = False, place: Place = HERE
) -> cache.Pruned:
    """Remove stages that were not used of late, and what dead processes left; never what an experiment still needs.

    Args:
        older_than_days: Removes stages that were not used for so many days.
        everything: Removes all stages that may be removed; in place of `older_than_days`.
        dry_run: Only return what would be removed.
        place: Where the storage folder is.

    Returns:
        What was removed, or would be; and what was kept, since an experiment needs it.

    Raises:
        UsageError: If not exactly one of both is given, or there is no storage folder.

    Example:
        >>> import segadapt
        >>> pruned = segadapt.cache_prune(older_than_days=30, dry_run=True)
        >>> pruned.stages, pruned.bytes
        ([], 0)
    """
    if everything == (older_than_days is not None) or (older_than_days is not None and older_than_days < 0):
        age = f"{older_than_days:g} days" if older_than_days is not None else "no days"
        raise UsageError(
            "Either --older-than DAYS, not negative, or --all must be given, but got "
            f"{age} and {'--all' if everything else 'no --all'}."
        )
    return cache.prune(place.existing(), 86400 * (older_than_days or 0.0), dry_run=dry_run)


def doctor(*, place: Place = HERE, address: str | None = None, fix: bool = False) -> "Iterator[Finding]":
    """Look whether environment, storage, tracking, studies and cluster are sound and the ledgers agree.

    What is found is yielded as it is found, and with `fix` repaired before.

    Args:
        place: Where experiments are kept and tracked.
        address: Ray cluster; None takes RAY_ADDRESS, and without it none is joined or started.
        fix: Repair what can be repaired truthfully; never an experiment that a command works on.

    Yields:
        One finding after the other: its `level` is `ok`, `warning` or `fault`.

    Example:
        >>> import segadapt
        >>> [finding.text for finding in segadapt.doctor() if finding.level == "fault"]
        []
    """
    from segadapt.platform.doctor.examination import examine
    from segadapt.platform.doctor.findings import Examination

    return examine(Examination(place, address, fix))


def submit(words: Sequence[str], *, address: str, name: str | None = None) -> str:
    """Run a command on a cluster as a Ray Job, which goes on when this machine is switched off.

    Nothing but the command is sent; an experiment file's settings become part of it.

    Args:
        words: The command, such as `["search", "sdca", "--storage", "/mnt/segadapt/runs"]`.
        address: Address of the cluster's Ray Jobs, http://HOST:PORT.
        name: Name of the job; None makes one of command and time.

    Returns:
        The name of the job.

    Raises:
        UsageError: If the command cannot run there, or the cluster does not answer.

    Example:
        >>> import segadapt
        >>> segadapt.submit(["search", "sdca"], address="http://127.0.0.1:8265")
        Traceback (most recent call last):
        ...
        segadapt.platform.errors.UsageError: A command to submit must have --storage with an absolute path, ...
    """
    from segadapt.platform.cluster import jobs as ray_jobs

    return ray_jobs.submit(words, address=address, name=name)


def jobs(*, address: str) -> "list[Job]":
    """Return the jobs that a cluster knows, oldest first.

    Args:
        address: Address of the cluster's Ray Jobs, http://HOST:PORT.

    Returns:
        The jobs; the state of one is pending, running, succeeded, failed or stopped.

    Raises:
        UsageError: If the cluster does not answer.

    Example:
        >>> import segadapt
        >>> segadapt.jobs(address="http://127.0.0.1:9")
        Traceback (most recent call last):
        ...
        segadapt.platform.errors.UsageError: --address must be Ray's dashboard on the cluster's head, ...
    """
    from segadapt.platform.cluster import jobs as ray_jobs

    return ray_jobs.jobs(address)


def logs(job: str, *, address: str, follow: bool = False) -> Iterator[str]:
    """Yield what a job has printed, and with `follow` what it prints until it ends.

    Args:
        job: Name of the job.
        address: Address of the cluster's Ray Jobs, http://HOST:PORT.
        follow: Wait for more.

    Yields:
        Text, in parts of any length.

    Raises:
        UsageError: If there is no such job, or the cluster does not answer.

    Example:
        >>> import segadapt
        >>> print(*segadapt.logs("night", address="10.0.0.1:6379"))
        Traceback (most recent call last):
        ...
        segadapt.platform.errors.UsageError: --address must be that of Ray's dashboard, such as http://127.0.0.1:8265...
    """
    from segadapt.platform.cluster import jobs as ray_jobs

    return ray_jobs.logs(job, address, follow=follow)


def stop(job: str, *, address: str) -> bool:
    """End a job as SIGTERM does; what it was doing goes on with `resume`.

    Args:
        job: Name of the job.
        address: Address of the cluster's Ray Jobs, http://HOST:PORT.

    Returns:
        Whether it was told to end; False if it had ended.

    Raises:
        UsageError: If there is no such job, or the cluster does not answer.

    Example:
        >>> import segadapt
        >>> segadapt.stop("night", address="http://127.0.0.1:9")
        Traceback (most recent call last):
        ...
        segadapt.platform.errors.UsageError: --address must be Ray's dashboard on the cluster's head, ...
    """
    from segadapt.platform.cluster import jobs as ray_jobs

    return ray_jobs.stop(job, address)


def ui(search: str | None = None, *, place: Place = HERE, port: int = 5000) -> int:
    """Serve MLflow's pages for a storage folder on 127.0.0.1 until interrupted, and print where its searches are.

    Args:
        search: The search or single run whose page is printed; None for those that changed last.
        place: Where the storage folder is.
        port: Port of the pages.

    Returns:
        The server's exit status.

    Raises:
        UsageError: If there is nothing to show, no such search, or the port is taken.

    Example:
        >>> import segadapt
        >>> segadapt.ui(port=5000)  # doctest: +SKIP
        MLflow shows /home/me/runs at http://127.0.0.1:5000 (Ctrl-C ends it)
        ...
    """
    from segadapt.platform.results.pages import run_pages
    from segadapt.platform.tracking.ui import serve

    return serve(place, port, run_pages(place, search))
