"""vocab.json is made from a reference file, also by `tahoex1 build-vocab`."""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import typer
from conftest import GOLDEN
from typer.testing import CliRunner

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.cli.vocabulary import build_vocab
from tahoex1_hf.data.vocabulary import build_vocabulary

GENES = [f"ENSG{number:011d}" for number in (30, 10, 20)]


def table(path: Path, **columns: list) -> Path:
    pd.DataFrame({"ensembl_id": GENES, **columns}).to_csv(path, index=False)
    return path


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    app.command("build-vocab")(build_vocab)
    return app


def test_the_gene_table_of_tahoe_100m_gives_its_vocabulary_byte_for_byte(tmp_path: Path, shared_data) -> None:
    build_vocabulary(shared_data("tahoe/gene_metadata.parquet"), tmp_path / "vocab.json")
    assert (tmp_path / "vocab.json").read_bytes() == shared_data("tahoe/vocab.json").read_bytes()


def test_the_order_of_rows_of_the_gene_table_does_not_matter_because_it_has_token_ids(
    tmp_path: Path, shared_data
) -> None:
    shuffled = pd.read_parquet(shared_data("tahoe/gene_metadata.parquet")).sample(frac=1, random_state=0)
    shuffled.to_parquet(tmp_path / "genes.parquet")
    build_vocabulary(tmp_path / "genes.parquet", tmp_path / "vocab.json")
    assert (tmp_path / "vocab.json").read_bytes() == shared_data("tahoe/vocab.json").read_bytes()


def test_special_tokens_genes_in_file_order_and_fillers_up_to_a_multiple(tmp_path: Path) -> None:
    vocabulary = build_vocabulary(table(tmp_path / "g.csv"), tmp_path / "vocab.json", pad_to_multiple_of=8)
    assert list(vocabulary) == ["<pad>", "<cls>", "<eoc>", *GENES, "<junk0>", "<junk1>"]
    assert list(vocabulary.values()) == list(range(8))
    assert json.loads((tmp_path / "vocab.json").read_text()) == vocabulary
    assert len(build_vocabulary(table(tmp_path / "g.csv"), tmp_path / "64.json")) == 64
    assert len(build_vocabulary(table(tmp_path / "g.csv"), tmp_path / "6.json", pad_to_multiple_of=6)) == 6


def test_the_tokenizer_reads_it_and_takes_drugs_with_the_drug_token(tmp_path: Path) -> None:
    build_vocabulary(table(tmp_path / "g.csv"), tmp_path / "vocab.json", drug_token=True)
    tokenizer = TahoeX1Tokenizer(tmp_path / "vocab.json", drug_to_id={"<pad>": 0, "aspirin": 1})
    assert tokenizer.convert_tokens_to_ids("<drug>") == 3
    assert tokenizer.match_genes(GENES).token_ids.tolist() == [4, 5, 6]


@pytest.mark.parametrize("name", ["g.tsv", "g.csv.gz", "g.tsv.gz", "g.parquet"])
def test_other_kinds_of_table(tmp_path: Path, name: str) -> None:
    frame = pd.DataFrame({"symbol": ["A", "B", "C"], "gene": GENES})
    if name.endswith("parquet"):
        frame.to_parquet(tmp_path / name)
    else:
        frame.to_csv(tmp_path / name, sep="\t" if "tsv" in name else ",", index=False)
    vocabulary = build_vocabulary(tmp_path / name, tmp_path / "vocab.json", gene_id_column="gene")
    assert list(vocabulary)[3:6] == GENES


def test_token_ids_order_the_genes_and_must_be_whole_numbers_each_once(tmp_path: Path) -> None:
    vocabulary = build_vocabulary(table(tmp_path / "g.csv", token_id=[9, 7, 8]), tmp_path / "vocab.json")
    assert list(vocabulary)[3:6] == [GENES[1], GENES[2], GENES[0]]
    for wrong in ([1, 1, 2], [1.5, 2, 3], [1, 2, None]):
        with pytest.raises(ValueError, match="token_id, which orders the genes"):
            build_vocabulary(table(tmp_path / "g.csv", token_id=wrong), tmp_path / "new.json")


def test_h5ad_gives_var_names_or_a_column_and_its_counts_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    var = pd.DataFrame({"ensembl_id": GENES}, index=["A", "B", "C"])
    anndata.AnnData(np.ones((2, 3), dtype=np.float32), var=var).write_h5ad(path)
    expected = build_vocabulary(path, tmp_path / "column.json", gene_id_column="ensembl_id")
    assert list(expected)[3:6] == GENES
    with pytest.raises(
        ValueError, match=r"3 of 3 genes in var_names are not Ensembl ids: 'A', 'B', 'C'\..*ensembl_id:"
    ):
        build_vocabulary(path, tmp_path / "new.json")
    import h5py

    with h5py.File(path, "a") as file:  # the file serves as well without its counts
        del file["X"]
        file["X"] = "no matrix"
    assert build_vocabulary(path, tmp_path / "again.json", gene_id_column="ensembl_id") == expected


def test_recorded_cells_give_a_vocabulary_that_knows_their_genes(tmp_path: Path) -> None:
    path = GOLDEN / "a_70m_like" / "adata.h5ad"
    vocabulary = build_vocabulary(path, tmp_path / "vocab.json", gene_id_column="ensembl_id")
    genes = anndata.read_h5ad(path).var["ensembl_id"]
    assert list(vocabulary)[3 : 3 + len(genes)] == list(genes)


def test_versions_are_left_out_and_then_genes_may_not_repeat(tmp_path: Path) -> None:
    path = tmp_path / "g.csv"
    pd.DataFrame({"ensembl_id": [f"{gene}.12" for gene in GENES]}).to_csv(path, index=False)
    assert list(build_vocabulary(path, tmp_path / "vocab.json"))[3:6] == GENES
    pd.DataFrame({"ensembl_id": [*GENES, f"{GENES[1]}.3"]}).to_csv(path, index=False)
    with pytest.raises(ValueError, match=f"1 genes occur twice .*'{GENES[1]}'"):
        build_vocabulary(path, tmp_path / "new.json")


def test_wrong_ids_are_named_with_the_columns_that_hold_ensembl_ids(tmp_path: Path) -> None:
    path = tmp_path / "g.csv"
    pd.DataFrame({"ensembl_id": [*GENES, "ENSG00000000040_PAR_Y", "TP53"]}).to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"2 of 5 .*'ENSG00000000040_PAR_Y', 'TP53'"):
        build_vocabulary(path, tmp_path / "new.json")
    pd.DataFrame({"symbol": ["A", "B", "C"], "id": GENES}).to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"no column 'ensembl_id'\. Ensembl ids are in id:"):
        build_vocabulary(path, tmp_path / "new.json")
    pd.DataFrame({"ensembl_id": ["A", "NA", "C"]}).to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"'A', 'NA', 'C'\. None of its columns \['ensembl_id'\] holds"):
        build_vocabulary(path, tmp_path / "new.json")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"special_tokens": ["<pad>", "cls"]}, r"\['cls'\]: they must look like <this>"),
        ({"special_tokens": ["<pad>", "<cls>", "<junk0>"]}, "fillers"),
        ({"special_tokens": ["<pad>", "<cls>", "<pad>"]}, "each may occur once"),
        ({"special_tokens": ["<pad>"]}, r"lack \['<cls>'\]"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_vocabulary(table(tmp_path / "g.csv"), tmp_path / "vocab.json", **options)
    assert not (tmp_path / "vocab.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cells.h5ad", b"text", "not HDF5"),
        ("g.parquet", b"text", "could not be read as a table"),
        ("g.csv", b"", "could not be read as a table"),
        ("g.csv", b"ensembl_id\n", "has no genes"),
        ("g.txt", b"text", "a table is .csv"),
    ],
)
def test_unusable_reference_files_are_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        build_vocabulary(tmp_path / name, tmp_path / "vocab.json")


def test_a_file_that_differs_is_replaced_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "vocab.json"
    first = build_vocabulary(table(tmp_path / "g.csv"), output)
    monkeypatch.setattr("os.replace", lambda *_: pytest.fail("the same content is written again"))
    assert build_vocabulary(table(tmp_path / "g.csv"), output) == first
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match="holds something else"):
        build_vocabulary(table(tmp_path / "g.csv"), output, drug_token=True)
    assert json.loads(output.read_text()) == first
    assert "<drug>" in build_vocabulary(table(tmp_path / "g.csv"), output, drug_token=True, overwrite=True)
    assert "<drug>" in json.loads(output.read_text())


def test_an_interruption_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        build_vocabulary(table(tmp_path / "g.csv"), tmp_path / "out" / "vocab.json")
    assert list((tmp_path / "out").iterdir()) == []


def test_command(tmp_path: Path, app: typer.Typer) -> None:
    path, output = table(tmp_path / "g.csv"), tmp_path / "out" / "vocab.json"
    options = ["--drug-token", "--pad-to-multiple-of", "10"]
    result = CliRunner().invoke(app, ["build-vocab", str(path), str(output), *options])
    assert result.exit_code == 0, result.output
    assert "10 tokens" in result.stdout
    assert list(json.loads(output.read_text()))[:5] == ["<pad>", "<cls>", "<eoc>", "<drug>", GENES[0]]
    special = [word for token in ("<cls>", "<pad>") for word in ("--special-token", token)]
    result = CliRunner().invoke(app, ["build-vocab", str(path), str(output), *special, "--overwrite"])
    assert result.exit_code == 0, result.output
    assert list(json.loads(output.read_text()))[:3] == ["<cls>", "<pad>", GENES[0]]


def test_errors_of_the_command_have_no_traceback(tmp_path: Path, app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["build-vocab", str(tmp_path / "none.csv"), str(tmp_path / "v.json")])
    assert (result.exit_code, result.stderr) == (
        1,
        f"Error: {tmp_path / 'none.csv'} does not exist, or is not a file.\n",
    )
