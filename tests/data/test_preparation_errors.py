"""Faults of a file, a table or a setting are named, and either stop the run or are listed: nothing is lost."""

import json
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
from cells import GENES, make_cells, read_dataset, write_10x_mtx, write_vocab
from preparing import manifest_of, run, source
from scipy.sparse import csr_matrix
from typer.testing import CliRunner

from tahoex1_hf.cli.app import app
from tahoex1_hf.data.config import filter_columns, parse_config, read_config
from tahoex1_hf.data.preparation import prepare


def truncated(path: Path) -> None:
    make_cells(400).write_h5ad(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def corrupt_index(path: Path) -> None:
    make_cells(20).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file["X/indptr"][-1] += 5


def corrupt_columns(path: Path) -> None:  # which is noticed only when the counts are read
    make_cells(20).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file["X/indices"][7] = 4000


def symbols(path: Path) -> None:
    adata = make_cells(20)
    adata.var_names = [f"TP{i}" for i in range(adata.n_vars)]
    adata.write_h5ad(path)


def mixed(path: Path) -> None:
    adata = make_cells(20)
    adata.var_names = [*adata.var_names[:40], *(f"TP{i}" for i in range(20))]
    adata.write_h5ad(path)


def mouse(path: Path) -> None:
    adata = make_cells(20)
    adata.var_names = [f"ENSMUSG{i:011d}" for i in range(adata.n_vars)]
    adata.write_h5ad(path)


def few_known(path: Path) -> None:
    adata = make_cells(20)
    adata.var_names = [*adata.var_names[:20], *(f"ENSG{i:011d}" for i in range(900, 940))]
    adata.write_h5ad(path)


def log_normalised(path: Path) -> None:
    adata = make_cells(20)
    sums = np.asarray(adata.X.sum(1))
    adata.X = csr_matrix(np.log1p(adata.X.toarray() / sums * 1e4))
    adata.write_h5ad(path)


def negative(path: Path) -> None:
    adata = make_cells(20)
    adata.X.data[5] = -1
    adata.write_h5ad(path)


def missing_values(path: Path) -> None:
    adata = make_cells(20)
    adata.X.data[5] = np.nan
    adata.write_h5ad(path)


def no_cells(path: Path) -> None:
    make_cells(20)[:0].copy().write_h5ad(path)


def duplicates(path: Path) -> None:
    adata = make_cells(20)
    adata.obs_names = ["same", *adata.obs_names[1:19], "same"]
    adata.write_h5ad(path)


def text(path: Path) -> None:
    path.write_text("not hdf5")


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def no_column(path: Path) -> None:
    adata = make_cells(20)
    del adata.obs["cell_type"]
    adata.write_h5ad(path)


BAD_FILES = {
    truncated: "cannot be read",
    corrupt_index: "indptr.*cut off or corrupt",
    corrupt_columns: "column numbers .* corrupt",
    symbols: "look like gene symbols",
    mixed: r"gene ids are mixed: 40 are in the vocabulary, and 20 of 60 are not Ensembl ids.*TP0",
    mouse: "another species",
    few_known: r"20 of 60 genes.*min_known_genes=0\.5",
    log_normalised: "log-normalised.*non_integer_counts",
    negative: "negative",
    missing_values: "NaN",
    no_cells: "no cells",
    duplicates: "'same'.*duplicate_barcodes",
    text: "cannot be read",
    empty_file: "cannot be read",
    no_column: r"no column 'cell_type'; there are \['n_genes', 'passed'",
}


@pytest.mark.parametrize("make", BAD_FILES, ids=lambda make: make.__name__)
def test_a_bad_file_stops_the_run_or_is_left_out_whole_and_listed(tmp_path: Path, make: Any) -> None:
    good = make_cells(30, seed=9)
    good.write_h5ad(tmp_path / "good.h5ad")
    make(tmp_path / "bad.h5ad")
    with pytest.raises(ValueError, match=rf"(?s)on_bad_file.*bad\.h5ad: .*{BAD_FILES[make]}"):
        run(tmp_path, [source(tmp_path / "*.h5ad")], "stopped", piece_cells=8)
    folder = run(tmp_path, [source(tmp_path / "*.h5ad")], "skipped", piece_cells=8, on_bad_file="skip")
    assert sorted(read_dataset(folder)["name"]) == sorted(good.obs_names)
    entries = {Path(entry["path"]).name: entry for entry in manifest_of(folder)["sources"][0]["files"]}
    assert "skipped" not in entries["good.h5ad"]
    assert entries["bad.h5ad"].keys() == {"path", "skipped"}
    assert manifest_of(folder)["totals"]["files_skipped"] == 1
    assert manifest_of(folder)["totals"]["cells_in"] == 30
    assert "Files skipped: 1" in (folder / "README.md").read_text()


def test_all_bad_files_are_reported_at_once(tmp_path: Path) -> None:
    for number, make in enumerate((symbols, text, duplicates)):
        make(tmp_path / f"bad{number}.h5ad")
    with pytest.raises(ValueError, match=r"(?s)3 files cannot be used.*bad0.*bad1.*bad2"):
        run(tmp_path, [source(tmp_path / "*.h5ad")])


def test_an_error_says_why_no_cell_is_left(tmp_path: Path) -> None:
    make_cells(20).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match="is left: 0 files were skipped; min_genes dropped 20"):
        run(tmp_path, [source(tmp_path / "a.h5ad", min_genes=61)])


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*does not exist"):
        run(tmp_path, [source(tmp_path / "nowhere")])
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder holds no \.h5ad"):
        run(tmp_path, [source(tmp_path / "folder")], "out2")


def test_matrices_that_are_cut_off(tmp_path: Path) -> None:
    import gzip

    folder = write_10x_mtx(make_cells(20), tmp_path / "cells")
    lines = gzip.open(folder / "matrix.mtx.gz", "rt").read().splitlines()
    with gzip.open(folder / "matrix.mtx.gz", "wt") as file:
        file.write("\n".join(lines[:-10]) + "\n")
    with pytest.raises(ValueError, match=r"entries instead of \d+: it is cut off"):
        run(tmp_path, [source(folder, "10x")])
    (folder / "features.tsv.gz").unlink()
    with pytest.raises(ValueError, match=r"no features\.tsv or genes\.tsv"):
        run(tmp_path, [source(folder, "10x")], "out2")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sede": 3}, "sede: unknown key"),
        ({"seed": -1}, "seed"),
        ({"seed": "three"}, "seed"),
        ({"format": "csv"}, "format"),
        ({"validation": {"fraction": 1.5}}, "validation.fraction"),
        ({"validation": {"values": ["a"]}}, "values needs by"),
        ({"validation": {"by": "drug"}}, r"validation\.by='drug' is neither in metadata"),
        ({"validation": {"by": "sample", "values": ["a"], "fraction": 0.1}}, "exclude each other"),
        ({"sources": []}, "sources"),
        ({"sources": [{"kind": "loom", "paths": ["x"]}]}, "loom"),
        ({"sources": [{"kind": "anndata", "paths": ["x"], "filter": "print(1)"}]}, "filter.*Call"),
        ({"sources": [{"kind": "anndata", "paths": ["x"], "layers": "x"}]}, "layers: unknown key"),
        ({"sources": [{"kind": "anndata", "paths": ["x"], "metadata": {"genes": "n"}}]}, "cannot name metadata"),
        ({"sources": [{"kind": "anndata", "paths": ["x"], "metadata": {"a": "n"}, "constants": {"a": "b"}}]}, "both"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    config = {"sources": [source(tmp_path / "a.h5ad")], "output": "out", "vocab": "vocab.json", **changes}
    with pytest.raises(ValueError, match=rf"(?s)config\.yaml:.*{said}"):
        parse_config(config, "config.yaml")


@pytest.mark.parametrize(
    "expression", ["@x == 1", "a.b == 1", "a + 1 == 2", "f(a)", "a ==", "[a for a in b]", "a[0] == 1"]
)
def test_filters_are_comparisons_only(expression: str) -> None:
    with pytest.raises(ValueError, match="filter="):
        filter_columns(expression)


def test_names_with_blanks_stand_between_backticks() -> None:
    assert filter_columns("`cell type` == 'B `x` cell' and n > 5 and not `cell type` == \"it's\"") == [
        "cell type",
        "n",
    ]
    with pytest.raises(ValueError, match="between backticks"):
        filter_columns("cell type == 'B'")


def test_tables_to_join_are_checked_first(tmp_path: Path) -> None:
    make_cells(20).write_h5ad(tmp_path / "a.h5ad")
    table = tmp_path / "samples.csv"
    join = {"file": str(table), "key": "sample", "columns": ["drug"]}
    table.write_text("sample,drug\ns1,a\ns1,b\n")
    with pytest.raises(ValueError, match=r"several rows with sample='s1'"):
        run(tmp_path, [source(tmp_path / "a.h5ad", join=[join])])
    other = tmp_path / "other.csv"
    other.write_text("sample,dose\ns1,3\n")
    with pytest.raises(ValueError, match=r"no column 'drug'; there are \['dose', 'sample'\]"):
        run(tmp_path, [source(tmp_path / "a.h5ad", join=[{**join, "file": str(other)}])], "out2")


def test_two_runs_cannot_write_to_one_folder(tmp_path: Path) -> None:
    from filelock import FileLock

    make_cells(20).write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".prepare.lock"), pytest.raises(ValueError, match="another run is writing"):
        run(tmp_path, [source(tmp_path / "a.h5ad")])


def test_the_input_is_left_as_it_is(tmp_path: Path) -> None:
    make_cells(20).write_h5ad(tmp_path / "a.h5ad")
    before = (tmp_path / "a.h5ad").read_bytes()
    run(tmp_path, [source(tmp_path / "a.h5ad")])
    assert (tmp_path / "a.h5ad").read_bytes() == before


# The command --------------------------------------------------------------------------------------


def test_the_command_in_its_simple_form(tmp_path: Path) -> None:
    first, second = make_cells(20, 1), make_cells(15, 2)
    first.write_h5ad(tmp_path / "a.h5ad")
    write_10x_mtx(second, tmp_path / "run2")
    vocab = write_vocab(tmp_path / "model")
    arguments = ["prepare", str(tmp_path / "a.h5ad"), str(tmp_path / "run2"), "--output", str(tmp_path / "out")]
    arguments += ["--vocab", str(vocab), "--seed", "3", "--validation-fraction", "0.2", "--metadata", "name=_index"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "35 cells read from 2 files, 35 kept" in result.output
    rows = read_dataset(tmp_path / "out")
    assert sorted(rows["name"]) == sorted([*first.obs_names, *second.obs_names])
    configuration = manifest_of(tmp_path / "out")["configuration"]
    assert (configuration["seed"], configuration["validation"]["fraction"]) == (3, 0.2)
    assert [entry["kind"] for entry in configuration["sources"]] == ["anndata", "10x"]


def test_the_command_with_a_configuration(tmp_path: Path) -> None:
    make_cells(20).write_h5ad(tmp_path / "a.h5ad")
    config = {"sources": [source(tmp_path / "a.h5ad")], "output": "nowhere", "vocab": str(write_vocab(tmp_path))}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    arguments = ["prepare", "--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "out")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert len(read_dataset(tmp_path / "out")) == 20
    assert read_config(tmp_path / "config.yaml", seed=4).seed == 4
    # What is wrong with a file, as the configuration has it read, names both.
    config["sources"][0]["layer"] = "spliced"
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    refused = CliRunner().invoke(app, [*arguments[:4], str(tmp_path / "other")])
    assert refused.exit_code == 1
    assert "a.h5ad: it has no layers/spliced" in refused.output
    assert f"The settings are those of {tmp_path / 'config.yaml'}" in refused.output
    config["sources"] = [{"kind": "mds", "paths": [str(tmp_path / "a.h5ad")], "source_vocab": config["vocab"]}]
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    refused = CliRunner().invoke(app, [*arguments[:4], str(tmp_path / "third")])
    assert "a.h5ad is not a folder" in refused.output
    assert "The settings are those of" in refused.output


def test_names_of_cells_may_be_numbers_of_any_kind(tmp_path: Path) -> None:
    import h5py

    make_cells(20).write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        del file["obs/_index"]
        file["obs/_index"] = np.arange(20, dtype=np.float16)  # of which pandas makes no index
        file["obs/_index"].attrs["encoding-type"] = "array"
    assert len(read_dataset(run(tmp_path, [source(tmp_path / "a.h5ad")]))) == 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name files to prepare"),
        (["x.h5ad", "--config", "c.yaml"], "INPUT and --config exclude each other"),
        (["--config", "c.yaml", "--layer", "x"], "--layer and --config exclude each other"),
        (["nowhere.h5ad", "--output", "o", "--vocab", "v"], "does not exist"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_errors_of_the_command(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["prepare", *arguments])
    assert result.exit_code == 1
    assert said in result.output


def test_missing_options_are_named(tmp_path: Path) -> None:
    make_cells(5).write_h5ad(tmp_path / "a.h5ad")
    result = CliRunner().invoke(app, ["prepare", str(tmp_path / "a.h5ad")])
    assert result.exit_code == 1
    assert "output: Field required" in result.output
    assert "vocab: Field required" in result.output


# Real cells ---------------------------------------------------------------------------------------


def test_real_heart_cells_arrive_whole(tmp_path: Path, shared_data: Any) -> None:
    heart, vocab = shared_data("h5ad/heart_san_1000_native_ensembl.h5ad"), shared_data("tahoe/vocab.json")
    config = {"sources": [{"kind": "anndata", "paths": [str(heart)], "metadata": {"name": "_index"}}]}
    config |= {"output": str(tmp_path / "out"), "vocab": str(vocab), "piece_cells": 300}
    prepare(parse_config(config, "the test"))
    adata = anndata.read_h5ad(heart)
    rows = read_dataset(tmp_path / "out").set_index("name").loc[adata.obs_names]
    ids = json.loads(vocab.read_text())
    tokens = np.array([ids[name] for name in adata.var_names])
    counts = csr_matrix(adata.X)
    counts.sort_indices()
    np.testing.assert_array_equal(np.concatenate(rows["genes"].to_list()), tokens[counts.indices])
    np.testing.assert_array_equal(np.concatenate(rows["counts"].to_list()), counts.data)
    assert manifest_of(tmp_path / "out")["columns"]["counts"] == "list<uint16>"


def test_vocabularies_above_65536_tokens_need_wider_ids(tmp_path: Path) -> None:
    make_cells(20).write_h5ad(tmp_path / "a.h5ad")
    vocab = write_vocab(tmp_path / "big", [*GENES, *(f"<junk{i}>" for i in range(2**16))])
    config = {"sources": [source(tmp_path / "a.h5ad")], "output": str(tmp_path / "out"), "vocab": str(vocab)}
    prepare(parse_config(config, "the test"))
    assert manifest_of(tmp_path / "out")["columns"]["genes"] == "list<int32>"
    assert min(row.min() for row in read_dataset(tmp_path / "out")["genes"]) >= 2**16
