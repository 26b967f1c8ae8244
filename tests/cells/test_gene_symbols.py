"""Tables of gene symbols are read whatever the order and the names of their columns."""

import gzip
import runpy
from pathlib import Path

import pandas as pd
import pytest

from tahoex1_hf.cells.gene_symbols import read_gene_symbols, read_orthologs, released_symbols

ROOT = Path(__file__).parents[2]

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


@pytest.mark.parametrize("how", ["tabs", "semicolons", "utf-16", "gzip", "lower case, versions"])
def test_other_forms_of_tables(tmp_path: Path, how: str) -> None:
    between = {"tabs": "\t", "semicolons": ";"}.get(how, ",")
    rows = [["gene", "symbol"], [A, "TSPAN6"], [B, "TNMD"]]
    if "lower" in how:
        rows = [rows[0], [f"{A.lower()}.15", " TSPAN6 "], [f"{B}.3", "TNMD"]]
    text = "\n".join(between.join(row) for row in rows)
    path = tmp_path / "genes.csv"
    data = text.encode("utf-16" if how == "utf-16" else "utf-8")
    path.write_bytes(gzip.compress(data) if how == "gzip" else data)
    assert read_gene_symbols(path) == PAIRS


def test_several_ids_of_a_symbol_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "genes.csv"
    path.write_text(f"symbol,id\nTSPAN6,{A}\nTSPAN6,{B}\nTNMD,{B}|{A}\nDPM1,{A}\nDPM1,{A}\n")
    assert read_gene_symbols(path) == {"TSPAN6": (A, B), "TNMD": (B, A), "DPM1": A}


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "genes.csv"
    path.write_bytes(b"symbol,\xe9\xff")
    with pytest.raises(ValueError, match=r"genes\.csv cannot be read"):
        read_gene_symbols(path)


def test_the_packages_table_names_the_genes_of_the_released_vocabulary() -> None:
    table = released_symbols()
    known = {"TP53": 141510, "GAPDH": 111640, "MALAT1": 251562, "CD4": 10610, "C1orf112": 460}
    assert {symbol: int(table[symbol].removeprefix("ENSG")) for symbol in known} == known
    assert 41_000 < len(table) < 43_000
    assert table["SEPT7"] == table["SEPTIN7"]  # an old symbol
    assert table["CFAP144"] == table["FAM183A"] == "ENSG00000186973"  # a newer one
    assert all(len(gene) == 15 for gene in table.values())


def test_the_packages_table_is_made_from_tahoe_100ms(tmp_path: Path) -> None:
    metadata = pd.DataFrame({"gene_symbol": ["TSPAN6", B, "X"], "ensembl_id": [A, B, f"{A[:-1]}9"]})
    metadata.to_parquet(tmp_path / "genes.parquet")
    more = ["TNMD", B, "X", B, "TSPAN6", B, "OLD", A, "OLD", B, "NEW", "ENSG00000000999"]  # only TNMD is unambiguous
    (tmp_path / "more.csv").write_text("".join(f"{s},{i}\n" for s, i in zip(more[::2], more[1::2], strict=True)))
    make = runpy.run_path(str(ROOT / "conversion/make_gene_symbols.py"))["make"]
    make(tmp_path / "genes.parquet", [tmp_path / "more.csv"], tmp_path / "made.gz")
    lines = gzip.decompress((tmp_path / "made.gz").read_bytes()).decode().splitlines()
    assert lines[0].startswith("# ")
    assert lines[1:] == ["TNMD\t5", "TSPAN6\t3", "X\t9"]


MOUSE, OTHER = "ENSMUSG00000067377", "ENSMUSG00000031250"
BIOMART = ["Gene stable ID,Gene name,Human gene name,Human gene stable ID", f"{MOUSE},Tspan6,TSPAN6,{A}"]
BIOMART += [f"{OTHER},Tnmd,TNMD,{B}", "ENSMUSG00000064336,mt-Tf,,"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (BIOMART, {MOUSE: (A,), "Tspan6": (A,), OTHER: (B,), "Tnmd": (B,)}),
        ([f"{MOUSE}.3\t{A}.1", f"{OTHER}\t{B}", f"{OTHER}\t{A}"], {MOUSE: (A,), OTHER: (B, A)}),
        (["Mouse Symbol,Human Symbol", "Tspan6,TSPAN6", "Tnmd,TNMD"], {"Tspan6": (A,), "Tnmd": (B,)}),
    ],
    ids=["BioMart", "ids alone, tabs", "symbols alone"],
)
def test_orthologues_are_recognised_by_their_form(tmp_path: Path, lines: list[str], expected: dict) -> None:
    path = tmp_path / "orthologs.csv"
    path.write_text("\n".join(lines))
    assert read_orthologs(path) == expected


def test_a_table_without_human_genes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "orthologs.csv"
    path.write_text("id,score\nENSMUSG00000067377,0.5\nENSMUSG00000031250,1\n")
    with pytest.raises(ValueError, match=r"orthologs\.csv: its columns look like \['mouse id', 'other'\]"):
        read_orthologs(path)
