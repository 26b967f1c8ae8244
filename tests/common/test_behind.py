"""Things that are done behind the work: in order, at most one unfinished, and no error is lost."""

import threading

import pytest

from tahoex1_hf.common.behind import Behind


def test_the_caller_goes_on_while_one_thing_is_done() -> None:
    go_on, done = threading.Event(), []
    with Behind() as behind:
        behind.do(lambda: (go_on.wait(10), done.append(1)))
        assert done == []
        go_on.set()
        for number in (2, 3):
            behind.do(lambda number=number: done.append(number))
            assert done[: number - 1] == list(range(1, number))  # those before are done
    assert done == [1, 2, 3]


def test_an_error_is_raised_by_the_next_call_or_on_leaving() -> None:
    done: list[int] = []
    with Behind() as behind:
        behind.do(lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            behind.do(lambda: done.append(1))
    assert done == []
    with pytest.raises(ZeroDivisionError), Behind() as behind:
        behind.do(lambda: 1 / 0)


def test_what_has_begun_is_finished_after_an_error_of_the_caller() -> None:
    go_on, done = threading.Event(), []

    def leave() -> None:
        with Behind() as behind:
            behind.do(lambda: (go_on.wait(10), done.append(1)))
            go_on.set()
            raise KeyError("the caller's")

    with pytest.raises(KeyError, match="the caller's"):
        leave()
    assert done == [1]
