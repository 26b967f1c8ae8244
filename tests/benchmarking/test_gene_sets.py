"""Sets of genes in the layout of MSigDB."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tahoex1_hf.benchmarking.gene_sets import read_gene_sets


def test_symbols_and_ids_become_ids(tmp_path: Path) -> None:
    lines = ["A\thttp://a\tTP53\tENSG00000146648.5\tno such gene\n", "B\t\tTP53\tEGFR\tTP53\n"]
    (tmp_path / "sets.gmt").write_text("".join(lines))
    found = read_gene_sets(tmp_path / "sets.gmt")
    assert found.names.tolist() == ["ENSG00000141510", "ENSG00000146648"]
    assert found.members.tolist() == [[True, True], [True, True]]
    assert found.titles == ("A", "B")
    assert found.left_out == {"without an Ensembl id": 1}
    some = found.some(np.array([True, False]), "for a reason")
    assert some.names.tolist() == ["ENSG00000141510"]
    assert some.left_out == {"without an Ensembl id": 1, "for a reason": 1}
    with pytest.raises(ValueError, match="no gene of the sets is left"):
        found.some(np.zeros(2, dtype=bool), "for a reason")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A\tx\tTP53\nB\tx\n", "line 2 has no genes behind a name and a comment, in 'B'"),
        ("A\tx\tTP53\nA\tx\tEGFR\n", "line 2 is a second set of the name 'A'"),
        ("A\tx\tTP53\n", "has 1 sets: at least two"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sets.gmt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_gene_sets(tmp_path / "sets.gmt")


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_gene_sets(tmp_path / "none.gmt")


def test_the_published_sets(shared_data: Callable[[str], Path]) -> None:
    found = read_gene_sets(shared_data("labels/h.all.v7.0.symbols.gmt"))
    assert found.members.shape == (4330, 50)
    assert found.left_out == {"without an Ensembl id": 54}
    assert found.members.sum(axis=0).min() == 32
