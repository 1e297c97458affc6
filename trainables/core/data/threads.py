"""Work on many files at a time, in order."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def decoding_threads() -> int:
    """Return how many threads decoding gains from on this machine."""
    return min(32, (os.cpu_count() or 1) + 2)


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
    pool = ThreadPoolExecutor(threads, thread_name_prefix="segadapt-data")
    try:
        waiting = [pool.submit(function, item) for item in islice(iterator, ahead or 2 * threads)]
        while waiting:
            result = waiting.pop(0).result()
            waiting += [pool.submit(function, item) for item in islice(iterator, 1)]
            yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
