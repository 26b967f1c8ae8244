"""Reading ahead keeps the order and the bound, hands on the producer's errors, and leaves no thread behind."""

import gc
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tahoex1_hf.common.prefetch import prefetch, prefetch_calls


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "still waiting after 10 s"
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    gc.collect()
    assert not threads()


@pytest.mark.parametrize("ahead", [1, 2, 7])
@pytest.mark.parametrize("number", [0, 1, 5])
def test_items_come_in_order(number: int, ahead: int) -> None:
    assert list(prefetch(iter(range(number)), ahead)) == list(range(number))


def test_none_is_an_item_like_any_other() -> None:
    assert list(prefetch([None, 0, None])) == [None, 0, None]


@pytest.mark.parametrize("ahead", [1, 3])
def test_only_the_next_items_are_made_while_one_is_used(ahead: int) -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    for number in prefetch(items(), ahead):
        expected = min(number + ahead + 1, 20)
        wait_for(lambda expected=expected: len(made) >= expected)
        time.sleep(0.002)  # time in which a thread without a bound would go on
        assert len(made) == expected


def test_items_are_made_in_one_thread_that_is_not_the_consumers() -> None:
    idents = set(prefetch(threading.get_ident() for _ in range(5)))
    assert len(idents) == 1
    assert threading.get_ident() not in idents


def test_an_error_comes_in_its_place_with_its_traceback() -> None:
    def a_function_that_fails() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("gone")

    seen = []
    with pytest.raises(KeyError, match="gone") as caught:
        seen.extend(prefetch(a_function_that_fails(), ahead=4))
    assert "a_function_that_fails" in "".join(traceback.format_exception(caught.value))
    assert seen == [1, 2]


@pytest.mark.parametrize("how", ["break", "close", "collect"])
def test_the_thread_ends_and_the_source_is_closed_when_the_consumer_stops(how: str) -> None:
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            number = 0
            while True:
                yield number
                number += 1
        finally:
            closed.set()

    if how == "break":
        for number in prefetch(endless(), ahead=2):
            if number == 3:
                break
    else:
        items = prefetch(endless(), ahead=2)
        assert next(items) == 0
        assert threads()
        if how == "close":
            items.close()
        else:
            cycle: list[object] = [items]
            cycle.append(cycle)
            del items, cycle
            gc.collect()
    assert closed.is_set()
    assert not threads()


def test_an_iterator_that_is_never_used_starts_nothing() -> None:
    started = threading.Event()

    def items() -> Iterator[int]:
        started.set()
        yield 1

    prefetch(items())
    assert not started.is_set()


# Calls ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_results_keep_the_order_of_the_calls(num_threads: int) -> None:
    def call(number: int) -> int:
        time.sleep(0.003 * (number % 3 == 0))  # the first of three ends last
        return number

    calls = (partial(call, number) for number in range(12))
    assert list(prefetch_calls(calls, 4, num_threads)) == list(range(12))


def test_several_threads_work_at_once() -> None:
    both = threading.Barrier(2, timeout=10)  # is passed only when two threads wait at it

    assert len(list(prefetch_calls([both.wait, both.wait], 2, 2))) == 2


def test_without_threads_nothing_is_made_ahead() -> None:
    made: list[int] = []

    def call(number: int) -> int:
        made.append(number)
        return number

    results = prefetch_calls((partial(call, number) for number in range(3)), 2, 0)
    assert next(results) == 0
    assert made == [0]


def test_calls_that_have_not_started_are_dropped() -> None:
    go, made = threading.Event(), []

    def call(number: int) -> None:
        made.append(number)
        if number == 1:
            go.wait(10)

    results = prefetch_calls((partial(call, number) for number in range(10)), 5, 1)
    next(results)
    wait_for(lambda: len(made) == 2)  # the second call runs, three others wait for the thread
    threading.Timer(0.05, go.set).start()
    results.close()
    assert made == [0, 1]


def test_what_was_begun_is_finished_if_the_next_call_cannot_be_made() -> None:
    """Even if its thread has not begun yet: it may be work that took long, and is only to be written."""
    go_on, done = threading.Event(), []

    def calls() -> Iterator[Callable[[], object]]:
        yield lambda: (go_on.wait(10), done.append(1))
        yield lambda: done.append(2)  # which waits for the one thread
        go_on.set()
        raise KeyError("no third")

    with pytest.raises(KeyError, match="no third"):
        list(prefetch_calls(calls(), ahead=2))
    assert done == [1, 2]
