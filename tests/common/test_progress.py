"""Progress bars are shown, and can be switched off."""

import pytest

from tahoex1_hf.common.progress import progress_bar


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
