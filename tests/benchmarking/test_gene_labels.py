"""Labels and families of genes in the layouts in which they are published."""

from pathlib import Path

import pandas as pd
import pytest

from tahoex1_hf.benchmarking.gene_labels import read_gene_labels


@pytest.fixture
def families(tmp_path: Path) -> Path:
    rows = [(f"HGNC:{n}", fold, f"family{n // 2}") for n in range(6) for fold in range(2)]
    pd.DataFrame(rows, columns=["gene_key", "outer_fold", "cluster_id"]).to_parquet(tmp_path / "families.parquet")
    return tmp_path / "families.parquet"


def table(labels: list[int | None], first: int = 0) -> pd.DataFrame:
    numbers = range(first, first + len(labels))
    ids, keys = [f"ENSG{n:011d}" for n in numbers], [f"HGNC:{n}" for n in numbers]
    return pd.DataFrame({"gene_key": keys, "ensembl_gene_id": ids, "label": pd.array(labels, dtype="Int64")})


def test_table_with_a_label(tmp_path: Path, families: Path) -> None:
    table([1, 0, None, 0, 1, 0, 1]).to_parquet(tmp_path / "labels.parquet")
    found = read_gene_labels([tmp_path / "labels.parquet"], families)
    assert found.names.tolist() == [f"ENSG{n:011d}" for n in (0, 1, 3, 4, 5)]
    assert found.labels.tolist() == [1, 0, 0, 1, 0]
    assert found.families.tolist() == ["family0", "family0", "family1", "family2", "family2"]
    assert found.left_out == {"without a label": 1, "without a family": 1}


def test_essential_and_other_genes_in_two_tables(tmp_path: Path, families: Path) -> None:
    names = {"gene_key": "HGNC_ID", "ensembl_gene_id": "ensembl"}
    for name, first in (("essential", 0), ("others", 3)):
        table([None] * 3, first).rename(columns=names).drop(columns="label").to_csv(tmp_path / f"{name}.csv")
    found = read_gene_labels([tmp_path / "essential.csv", tmp_path / "others.csv"], families)
    assert found.labels.tolist() == [1, 1, 1, 0, 0, 0]


def test_gene_with_two_labels_is_refused(tmp_path: Path, families: Path) -> None:
    pd.concat([table([1, 0]), table([0])]).to_parquet(tmp_path / "labels.parquet")
    with pytest.raises(ValueError, match="ENSG00000000000 is essential and not"):
        read_gene_labels([tmp_path / "labels.parquet"], families)


def test_labels_of_one_kind_are_refused(tmp_path: Path, families: Path) -> None:
    table([1, 1]).to_parquet(tmp_path / "labels.parquet")
    with pytest.raises(ValueError, match="all have one label"):
        read_gene_labels([tmp_path / "labels.parquet"], families)
