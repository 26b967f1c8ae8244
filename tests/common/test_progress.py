"""Progress bars are shown, can be switched off, and can be watched."""

import pytest

from tahoex1_hf.common.progress import progress_bar, watch_progress


@pytest.mark.parametrize(
    ("shown", "variable", "expected"),
    [(True, None, True), (False, None, False), (True, "1", False), (True, "0", True), (None, "1", False)],
)
def test_a_bar_is_shown_where_it_is_wanted_and_not_switched_off(
    shown: bool | None,
    variable: str | None,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    if variable is not None:
        monkeypatch.setenv("TQDM_DISABLE", variable)
    with progress_bar(shown, total=2, desc="Embedding") as bar:
        bar.update()
    assert ("Embedding" in capsys.readouterr().err) == expected


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_told_to_who_watches(shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    seen: list[tuple[str, int, int]] = []
    with (
        watch_progress(lambda title, done, total: seen.append((title, done, total))),
        progress_bar(shown, total=5, initial=1, desc="Embedding") as bar,
    ):
        bar.update()
        bar.update(3)
    assert seen == [("Embedding", 1, 5), ("Embedding", 2, 5), ("Embedding", 5, 5)]
    with progress_bar(shown, total=2, desc="Perturbing") as bar:
        bar.update()
    assert len(seen) == 3
