"""Mechanisms of action are read, told apart by similarity, and found enriched."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tahoex1_hf.signatures.mechanisms import enriched, mechanisms_of, read_mechanisms, same_mechanism


def test_a_table_is_read_without_drugs_of_no_mechanism(tmp_path: Path) -> None:
    table = pd.DataFrame({"drug": ["x", "y", "z"], "moa-fine": ["MEK inhibitor", "unclear", None]})
    table.to_parquet(tmp_path / "moa.parquet")
    table.to_csv(tmp_path / "moa.tsv", sep="\t", index=False)
    for name in ("moa.parquet", "moa.tsv"):
        assert read_mechanisms(tmp_path / name) == {"x": "MEK inhibitor"}
    assert mechanisms_of(["z", "x"], {"x": "MEK inhibitor"}) == ["", "MEK inhibitor"]
    with pytest.raises(ValueError, match=r"moa.tsv has no column moa-broad; there are drug, moa-fine"):
        read_mechanisms(tmp_path / "moa.tsv", "moa-broad")
    with pytest.raises(FileNotFoundError, match=r"none.csv does not exist"):
        read_mechanisms(tmp_path / "none.csv")


def test_mechanisms_that_lie_together_are_told() -> None:
    kinds = ["A"] * 5 + ["B"] * 5 + [""] * 3
    random = np.random.default_rng(0)
    noise = random.normal(size=(13, 13))
    together = np.equal.outer(kinds, kinds) * 3.0 + noise
    found = same_mechanism(together, kinds, 0)
    assert found is not None
    assert found[0] > 0.95
    assert found[1] < 0.03  # of 126 ways to share ten drugs, one is as good
    assert found[2] == 20
    chance = same_mechanism(noise, kinds, 0)
    assert chance is not None
    assert chance[1] > 0.05
    assert same_mechanism(noise, [""] * 13, 0) is None
    near = enriched(together[0], kinds)
    assert [(kind, number) for kind, number, _, _ in near] == [("A", 5), ("B", 5)]
    assert near[0][2] > 0.9 > 0.1 > near[1][2]
    assert near[0][3] < 0.02
