"""Genes are found without being asked for, whatever their names look like and wherever they stand."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from cells import GENES, make_cells, write_vocab
from scipy.sparse import csr_matrix, hstack

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.cells.gene_symbols import released_symbols
from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.cells.opening import open_cells

# Genes with a symbol, none of which is another's in lower case.
SYMBOLS = [name for name in sorted(released_symbols()) if name.isalpha() and name.isupper()][:60]
NAMED = [released_symbols()[name] for name in SYMBOLS]


@pytest.fixture
def tokenizer(tmp_path: Path) -> TahoeX1Tokenizer:
    return TahoeX1Tokenizer(str(write_vocab(tmp_path)), context_length=None)


@pytest.fixture
def of_symbols(tmp_path: Path) -> TahoeX1Tokenizer:
    return TahoeX1Tokenizer(str(write_vocab(tmp_path, NAMED)), context_length=None)


def rows(source: Any, tokenizer: TahoeX1Tokenizer, options: GeneOptions | None = None) -> list[dict[int, float]]:
    """Token -> count of every cell."""
    cells = open_cells(source, tokenizer, options)
    found = cells.rows_at(np.arange(cells.num_cells))
    bounds = zip(found.offsets, found.offsets[1:], strict=False)
    return [dict(zip(found.tokens[a:b].tolist(), found.counts[a:b].tolist(), strict=True)) for a, b in bounds]


def renamed(names: list[Any], **columns: Any) -> anndata.AnnData:
    adata = make_cells(9)
    adata.var = pd.DataFrame(columns, index=pd.Index(names, dtype=object))
    return adata


FORMS: dict[str, Callable[[str], Any]] = {
    "versions": lambda gene: f"{gene}.12",
    "par_y": lambda gene: f"{gene}.2_PAR_Y",
    "genome": lambda gene: f"GRCh38_{gene}",
    "made unique": lambda gene: f"{gene}-1",
    "bytes": lambda gene: gene.encode(),
    "lower case": str.lower,
    "blanks": lambda gene: f" {gene} ",
    "symbol behind": lambda gene: f"{gene}_SYMBOL",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["var_names", "column"])
def test_ids_are_found_in_every_form_and_place(tokenizer: TahoeX1Tokenizer, form: str, place: str) -> None:
    names = [FORMS[form](gene) for gene in GENES]
    adata = (
        renamed(names) if place == "var_names" else renamed([f"s{i}" for i in range(60)], n=range(60), any_name=names)
    )
    assert rows(adata, tokenizer) == rows(make_cells(9), tokenizer)


@pytest.mark.parametrize("column", ["gene_ids", "feature_id", "ensembl_id"])
def test_a_column_that_knows_more_is_taken_and_said(
    tmp_path: Path, tokenizer: TahoeX1Tokenizer, column: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = [*GENES[:40], *(f"SYM{i}" for i in range(20))]  # half symbols, half ids
    adata = renamed(names, **{column: pd.Categorical(GENES), "symbol": names})
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with caplog.at_level(logging.INFO, "tahoex1_hf"):
        for each in (adata, tmp_path / "cells.h5ad"):
            assert rows(each, tokenizer) == rows(make_cells(9), tokenizer)
    said = [record.message for record in caplog.records if column in record.message]
    assert len(said) == 2
    assert "60 of 60 are in the vocabulary (of var_names 40)" in said[0]
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_a_good_file_says_nothing(tokenizer: TahoeX1Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "tahoex1_hf"):
        rows(make_cells(9), tokenizer)
    assert not caplog.records


@pytest.mark.parametrize("change", [str, str.lower, lambda name: f"GRCh38_{name}", str.encode])
def test_symbols_are_found_by_the_packages_table(
    of_symbols: TahoeX1Tokenizer, change: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    expected = rows(make_cells(9, genes=NAMED), of_symbols)
    names = [*(change(name) for name in SYMBOLS[:50]), *NAMED[50:]]  # genes without a symbol bear their id
    names = names if change is not str.lower else [str(name).lower() for name in names]
    with caplog.at_level(logging.INFO, "tahoex1_hf"):
        assert rows(renamed(names), of_symbols) == expected
    assert "named by symbol (var_names): 60 of 60 are in the package's table" in caplog.text
    numbers = renamed([str(i) for i in range(60)], feature_name=SYMBOLS)
    assert rows(numbers, of_symbols) == expected


def test_symbols_among_ids_are_found(of_symbols: TahoeX1Tokenizer) -> None:
    expected = rows(make_cells(9, genes=NAMED), of_symbols)
    assert rows(renamed([*NAMED[:40], *SYMBOLS[40:]]), of_symbols) == expected
    antibodies = renamed([*NAMED[:57], "GFP", "CD3_TotalSeqB", "ERCC-00002"])
    assert [len(cell) for cell in rows(antibodies, of_symbols)] == [
        (row[:57] > 0).sum() for row in make_cells(9).X.toarray()
    ]


def test_genes_of_a_fish_are_not_taken_for_human_ones(of_symbols: TahoeX1Tokenizer) -> None:
    names = [*(name.lower() for name in SYMBOLS[:45]), *(f"si:ch211-{i}" for i in range(15))]
    with pytest.raises(ValueError, match="look like gene symbols"):
        open_cells(renamed(names), of_symbols)


def test_mouse_genes_are_not_taken_for_human_ones(of_symbols: TahoeX1Tokenizer) -> None:
    with pytest.raises(ValueError, match=r'symbols of mouse genes.*species="mouse" \(--species mouse\)'):
        open_cells(renamed([name.title() for name in SYMBOLS]), of_symbols)
    ids = [gene.replace("ENSG", "ENSMUSG") for gene in NAMED]
    with pytest.raises(ValueError, match=r"ids of another species.*--orthologs"):
        open_cells(renamed(ids), of_symbols)


@pytest.mark.parametrize("names", ["ids", "symbols"])
def test_mouse_genes_are_translated_by_the_users_table(
    tmp_path: Path, tokenizer: TahoeX1Tokenizer, names: str, caplog: pytest.LogCaptureFixture
) -> None:
    mouse = [gene.replace("ENSG", "ENSMUSG") for gene in GENES]
    titles = [f"Gene{i}x" for i in range(60)]
    pairs = list(zip(mouse, titles, GENES, strict=True))
    pairs[1] = (mouse[1], titles[1], GENES[0])  # shares an orthologue
    pairs = [*pairs[:57], (mouse[56], titles[56], GENES[57])]  # 56 has two, 57 to 59 have none
    path = tmp_path / "orthologs.csv"
    path.write_text("id,name,human\n" + "".join(f"{','.join(line)}\n" for line in pairs))
    adata = renamed([f"{gene}.3" for gene in mouse] if names == "ids" else titles)
    with caplog.at_level(logging.INFO, "tahoex1_hf"):
        found = rows(adata, tokenizer, GeneOptions(species="mouse", orthologs=path))
    vocabulary = tokenizer.get_vocab()
    for own, cell in zip(found, make_cells(9).X.toarray(), strict=True):
        counts = {vocabulary[GENES[i]]: cell[i] for i in range(2, 56)} | {vocabulary[GENES[0]]: cell[0] + cell[1]}
        assert own == {token: count for token, count in counts.items() if count}
    assert "56 of 60 mouse genes have one human orthologue" in caplog.text
    assert "(1 share it with another, and their counts are added up); 1 have several and 3 none" in caplog.text


def test_species_and_table_go_together() -> None:
    for wrong in ({"species": "mouse"}, {"orthologs": "table.csv"}, {"species": "rat", "orthologs": "table.csv"}):
        with pytest.raises(ValueError, match="species="):
            GeneOptions(**wrong)


def test_the_id_that_the_vocabulary_knows_is_taken(tmp_path: Path, tokenizer: TahoeX1Tokenizer) -> None:
    path = tmp_path / "symbols.csv"
    other = "ENSG09999999999"
    lines = [f"S{i},{pair}" for i, gene in enumerate(GENES) for pair in ((gene, other) if i % 2 else (other, gene))]
    path.write_text("symbol,id\n" + "\n".join(lines), encoding="utf-8-sig")
    adata = renamed([f"S{i}" for i in range(60)])
    assert rows(adata, tokenizer, GeneOptions(gene_symbols=path)) == rows(make_cells(9), tokenizer)
    with pytest.raises(ValueError, match=r"gene_symbols \(--gene-symbols\) has other names"):
        open_cells(renamed([f"T{i}" for i in range(60)]), tokenizer, GeneOptions(gene_symbols=path))


def with_others(kinds: list[str], names: list[str], column: str = "feature_types") -> anndata.AnnData:
    """Cells with features that are no genes, which have many counts."""
    adata = make_cells(9)
    more = csr_matrix(np.full((9, len(names)), 300, dtype=np.float32))
    var = pd.DataFrame({column: ["Gene Expression"] * 60 + kinds}, index=[*GENES, *names])
    return anndata.AnnData(csr_matrix(hstack([adata.X, more])), obs=adata.obs, var=var)


@pytest.mark.parametrize("column", ["feature_types", "modality"])
def test_antibodies_and_peaks_are_no_genes(
    tmp_path: Path, tokenizer: TahoeX1Tokenizer, column: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"chr1:{i}-{i + 9}" for i in range(100)] + GENES[:3]  # antibodies with the ids of their genes
    adata = with_others(["Peaks"] * 100 + ["Antibody Capture"] * 3, names, column)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with caplog.at_level(logging.INFO, "tahoex1_hf"):
        for each in (adata, tmp_path / "cells.h5ad"):
            assert rows(each, tokenizer) == rows(make_cells(9), tokenizer)
    said = "features that are not Gene Expression are left out: 100 Peaks, 3 Antibody Capture."
    assert [said in record.message for record in caplog.records] == [True, True]  # and no loss is reported


def test_kinds_of_genes_are_no_other_features(tokenizer: TahoeX1Tokenizer) -> None:
    adata = make_cells(9)
    adata.var["feature_type"] = ["protein_coding"] * 30 + ["lncRNA"] * 30  # as CELLxGENE has them
    assert rows(adata, tokenizer) == rows(make_cells(9), tokenizer)
    adata.var["feature_types"] = "Antibody Capture"
    with pytest.raises(ValueError, match=r"it has no genes, only \{'Antibody Capture': 60\}"):
        open_cells(adata, tokenizer)


@pytest.mark.parametrize("share", [0.02, 0.4])
def test_what_is_lost_is_said_once_and_counted(
    tmp_path: Path, tokenizer: TahoeX1Tokenizer, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    adata = make_cells(700)
    names = [*GENES[:58], "ENSG09999999998", "ENSG09999999999"]
    counts = adata.X.toarray()
    counts[:, 58], counts[:, 59] = 0, np.round(counts[:, :58].sum(1) * share / (1 - share))
    adata = anndata.AnnData(csr_matrix(counts), var=pd.DataFrame(index=names))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    for each in (adata, tmp_path / "cells.h5ad"):
        caplog.clear()
        with caplog.at_level(logging.INFO, "tahoex1_hf"):
            seen = open_cells(each, tokenizer).seen
        (record,) = caplog.records
        assert record.levelno == (logging.WARNING if share > 0.05 else logging.INFO)
        assert "2 of 60 genes (3.3%) are not in the vocabulary and are left out" in record.message
        assert f"Most counts have ENSG09999999999 {share:.1%}" in record.message
        assert seen.cells == 256
        assert seen.lost == pytest.approx(share, abs=0.002)
