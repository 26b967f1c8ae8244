"""Columns become the same texts with every version of pandas."""

import numpy as np
import pandas as pd
import pytest

from tahoex1_hf.common.texts import as_text

MISSING = ("nan", "None", "<NA>")


@pytest.mark.parametrize("kind", ["object", "category", "string"])
def test_missing_values_become_texts(kind: str) -> None:
    texts = as_text(pd.Series(["a", None, "b", np.nan], dtype=kind)).tolist()
    assert texts[::2] == ["a", "b"]
    assert all(type(text) is str and text in MISSING for text in texts[1::2])


def test_numbers_and_nothing() -> None:
    assert as_text(pd.Series([1, 20])).tolist() == ["1", "20"]
    assert as_text(pd.Series([0.5, np.nan])).tolist() == ["0.5", "nan"]
    assert as_text(pd.Series([True, False], dtype="category")).tolist() == ["True", "False"]
    assert as_text(pd.Series([], dtype=object)).tolist() == []
