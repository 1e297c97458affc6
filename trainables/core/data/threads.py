"""Work on many files at a time, in order."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def decoding_threads() -> int:
    """Return how many threads decoding gains from on this machine."""
    return min(32, (os.cpu_count() or 1) + 2)


def loader_threads(setting: int | None, device: torch.device) -> int:
    """Return how many threads read ahead: `trainer.loader_threads`, by default the CPUs of a worker that has a GPU."""
    if setting is not None:
        return setting
    return torch.get_num_threads() if device.type == "cuda" else 0


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, *, ahead: int | None = None
) -> Iterator[Result]:
    """Yield `function` of each item in order, computed by threads at most `ahead` items in advance.

    Args:
        function: Called from several threads at once.
        items: Read from the caller's thread, no further than needed.
        threads: 0 computes each result when it is asked for.
        ahead: Results that wait or are under way at most; default: twice the threads.
    """
    if threads == 0:
        yield from map(function, items)
        return
    iterator = iter(items)
    pool = _pool(threads)
    try:
        waiting = [pool.submit(function, item) for item in islice(iterator, ahead or 2 * threads)]
        while waiting:
            result = waiting.pop(0).result()
            waiting += [pool.submit(function, item) for item in islice(iterator, 1)]
            yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads that PyTorch's operations do not part their work over.

    Each would otherwise start a team as large as the main thread's, for work that is shared out already. The number
    is each thread's own for loops, but the process's for matrix products: it is set again for the calling thread.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="segadapt-data")
    team, all_set = torch.get_num_threads(), Barrier(threads + 1)

    def work_alone() -> None:
        torch.get_num_threads()  # the first question sets the number that it answers
        torch.set_num_threads(1)
        all_set.wait()

    try:
        for _ in range(threads):
            pool.submit(work_alone)
        all_set.wait()
    finally:
        all_set.abort()  # lets those go on that wait, should the machine refuse a thread
        torch.set_num_threads(team)
    return pool
