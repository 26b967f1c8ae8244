# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Columns of tables as texts."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# Texts that stand for a missing value: those of `as_text`, and what R and spreadsheets write.
MISSING = ("", "nan", "NaN", "None", "<NA>")


def as_text(column: "pd.Series") -> "pd.Series":
    """Return a column's values as texts, missing ones as "nan", "None" or "<NA>", as Python names them.

    `astype(str)` leaves what is missing as it is from pandas 3 on, and earlier makes texts of it.
    """
    return column.astype(object).map(str)
