"""Tables of gene symbols are read whatever the order and the names of their columns."""

from pathlib import Path

import pytest

from tahoex1_hf.cells.gene_symbols import read_gene_symbols

A, B = "ENSG00000000003", "ENSG00000000005"
PAIRS = {"TSPAN6": A, "TNMD": B}


@pytest.mark.parametrize(
    "lines",
    [
        ["symbol,ensembl_id", f"TSPAN6,{A}", f"TNMD,{B}"],
        ["ensembl_id,symbol", f"{A},TSPAN6", f"{B},TNMD"],
        [f"TSPAN6,{A}", f"TNMD,{B}"],
        [f"{A},TSPAN6", f"{B},TNMD"],
        ["chromosome,gene_name,biotype,gene_id", f"X,TSPAN6,coding,{A}", f"X,TNMD,coding,{B}"],
        ["\ufeffSymbol,Ensembl", f"TSPAN6,{A}", f"TNMD,{B}", "NO_ID,", "SHORT"],
    ],
    ids=["symbol first", "id first", "no header", "no header, id first", "by name", "mark of byte order"],
)
def test_columns_are_found(tmp_path: Path, lines: list[str]) -> None:
    path = tmp_path / "genes.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_gene_symbols(path) == PAIRS


def test_a_table_without_pairs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "genes.csv"
    path.write_text("symbol,count\nTSPAN6,3\n")
    with pytest.raises(ValueError, match=r"genes\.csv has no line with a gene symbol and an Ensembl id"):
        read_gene_symbols(path)


def test_no_table_is_none() -> None:
    assert read_gene_symbols(None) is None
