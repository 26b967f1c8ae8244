# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Make items in threads ahead of their use, so that reading and encoding run while the model computes."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from itertools import repeat
from typing import Any, TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterable[Item], ahead: int = 1) -> Generator[Item, None, None]:
    """Yield the items of an iterable in order, making the next ones in a thread while one is used.

    An exception of the iterable is raised where its item would have come, with its own traceback. When the consumer
    stops early, or the iterator is garbage collected, the thread ends and a generator given as `items` is closed.

    Args:
        items: Iterable that makes the items; only the thread runs it.
        ahead: Most items that are made before they are asked for.
    """
    iterator, end = iter(items), object()
    calls: Iterable[Callable[[], Any]] = repeat(partial(next, iterator, end))
    try:
        with closing(prefetch_calls(calls, ahead)) as made:
            for item in made:
                if item is end:
                    return
                yield item
    finally:
        if hasattr(iterator, "close"):
            iterator.close()


def prefetch_calls(
    calls: Iterable[Callable[[], Item]], ahead: int, num_threads: int = 1, name: str = "prefetch"
) -> Generator[Item, None, None]:
    """Yield the results of calls in the order of the calls, which threads make ahead.

    Exceptions and early stops are handled as in `prefetch`: calls that have not started are dropped, calls that run
    are waited for. If the iterable itself raises, the calls that it made before are all finished first.

    Args:
        calls: Functions without arguments; the iterable itself is run by the consumer's thread.
        ahead: Most calls that are started before their results are asked for.
        num_threads: Number of threads; with 0, each call is made when its result is asked for.
        name: Beginning of the threads' names.
    """
    if not num_threads:
        for call in calls:
            yield call()
        return
    waiting: deque[Future[Item]] = deque()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
    try:
        for call in _finishing(calls, waiting):
            waiting.append(pool.submit(call))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finishing(calls: Iterable[Callable[[], Item]], begun: Iterable[Future[Item]]) -> Iterator[Callable[[], Item]]:
    """Yield calls; if making one raises, wait for those that were begun."""
    try:
        yield from calls
    except GeneratorExit:
        raise
    except BaseException:
        wait(begun)
        raise
