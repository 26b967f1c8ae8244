"""A store that cannot be reached for a while is waited for; what it refuses is not asked for again."""

import pickle
import time

import pytest

from tahoex1_hf.common import patience
from tahoex1_hf.common.patience import is_transient, patiently
from tahoex1_hf.common.reading import reading


class Store:
    def __init__(self, *errors: Exception):
        self.errors = list(errors)

    def read(self) -> int:
        if self.errors:
            raise self.errors.pop(0)
        return 7


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let time pass by waiting alone."""
    now = [0.0]
    monkeypatch.setattr(patience.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    assert time.monotonic() == 0
    return now


def test_a_store_that_comes_back_is_waited_for(clock: list[float]) -> None:
    assert (
        patiently(Store(ConnectionError(), TimeoutError(), OSError("Please reduce your request rate")).read, "s3://b")
        == 7
    )
    assert clock[0] == 1 + 2 + 4
    assert patiently(Store(*[ConnectionError()] * 9).read, "s3://b") == 7


def test_patience_has_an_end(clock: list[float]) -> None:
    store = Store(*[ConnectionError("refused")] * 99)
    with pytest.raises(ConnectionError, match=r"^s3://b was tried for 5 minutes \(.*refused\)\. .* the same command"):
        patiently(store.read, "s3://b")
    assert clock[0] == 300
    assert len(store.errors) == 99 - 15  # after 1, 2, 4, 8, 16 and nine times 30 s, the last cut short


def test_the_error_at_the_end_is_one_that_a_command_shows(clock: list[float]) -> None:
    """And one that travels from a worker, as those of a store's client do not."""
    botocore = pytest.importorskip("botocore.exceptions")
    store = Store(*[botocore.EndpointConnectionError(endpoint_url="http://127.0.0.1:1")] * 99)
    with pytest.raises(ConnectionError) as caught:
        patiently(store.read, "s3://b")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        *(FileNotFoundError("no"), PermissionError("no"), ValueError("no"), KeyError("no")),
        OSError(22, "The specified bucket is not valid"),
    ],
)
def test_what_does_not_go_away_is_raised_at_once(clock: list[float], error: Exception) -> None:
    with pytest.raises(type(error)):
        patiently(Store(error).read, "s3://b")
    assert clock[0] == 0


def test_local_files_are_asked_for_once() -> None:
    with pytest.raises(ConnectionError):
        patiently(Store(ConnectionError()).read, "/data/cells.h5ad")


def test_an_error_that_names_the_file_is_known_by_its_cause() -> None:
    botocore = pytest.importorskip("botocore.exceptions")
    with pytest.raises(ValueError, match="cannot be read") as caught, reading("s3://b/cells.parquet"):
        raise botocore.EndpointConnectionError(endpoint_url="http://127.0.0.1:1")
    assert is_transient(caught.value)
    assert not is_transient(ValueError("no counts"))
