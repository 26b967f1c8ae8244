"""The public names of `tahoex1_hf.data`."""

import pytest

from tahoex1_hf import data


@pytest.mark.parametrize("name", ["CellBatches", "CellCollator", "prepare"])
def test_names_are_those_of_the_things_themselves(name: str) -> None:
    assert name in data.__all__
    assert getattr(data, name).__name__ == name


def test_other_names_are_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = data.nothing
