"""Example configurations are valid and explain every key; every kind of source gives the same real cells."""

import json
import re
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cells import read_dataset, write_cells
from pydantic import BaseModel
from scipy.sparse import csr_matrix
from typer.testing import CliRunner

from tahoex1_hf.cli.app import app
from tahoex1_hf.data import config as config_module
from tahoex1_hf.data.config import parse_config, read_config
from tahoex1_hf.data.preparation import prepare

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "configs" / "data"
SYMBOLS = EXAMPLES.parents[1] / "pbmc68k_symbol_to_ensembl.csv"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_valid(path: Path) -> None:
    config = read_config(path)
    assert config.output.startswith("prepared/")
    text = path.read_text()
    for line in text.splitlines():
        assert len(line) <= 119


def test_every_key_is_in_an_example_with_a_comment() -> None:
    text = "\n".join(path.read_text() for path in EXAMPLES.glob("*.yaml"))
    models = [m for m in vars(config_module).values() if isinstance(m, type) and issubclass(m, BaseModel)]
    keys = {key for model in models for key in model.model_fields}
    assert len(keys) > 30
    missing = [key for key in keys if not re.search(rf"^[ \-#]*{key}:", text, re.MULTILINE)]
    assert not missing
    for model in models:
        for key, field in model.model_fields.items():
            assert field.description or key == "kind", f"{model.__name__}.{key} has no description"


# One thousand real cells through every kind of source ------------------------------------------------


def as_mds(adata: anndata.AnnData, folder: Path, vocab: dict[str, int]) -> None:
    """Write an uncompressed MDS dataset; data/sources/test_mds.py reads what the real library wrote."""
    import pickle

    import torch

    folder.mkdir()
    tokens = np.array([vocab[name] for name in adata.var_names])
    matrix = csr_matrix(adata.X)
    samples = []
    for row in range(adata.n_obs):
        a, b = matrix.indptr[row], matrix.indptr[row + 1]
        genes = torch.tensor(np.concatenate([[1], tokens[matrix.indices[a:b]]]))
        values = torch.tensor(np.concatenate([[-2], matrix.data[a:b]]).astype(np.float32))
        parts = [pickle.dumps(values), pickle.dumps(genes), adata.obs_names[row].encode()]
        samples.append(np.array([len(part) for part in parts], dtype=np.uint32).tobytes() + b"".join(parts))
    sizes = np.array([len(sample) for sample in samples], dtype=np.int64)
    head = 4 + 4 * (len(samples) + 1)
    offsets = (head + np.concatenate([[0], np.cumsum(sizes)])).astype(np.uint32)
    data = np.uint32(len(samples)).tobytes() + offsets.tobytes() + b"".join(samples)
    (folder / "shard.00000.mds").write_bytes(data)
    shard = {
        "column_encodings": ["pkl", "pkl", "str"], "column_names": ["expressions", "genes", "id"],
        "column_sizes": [None, None, None], "compression": None, "format": "mds", "hashes": [],
        "samples": len(samples),
        "raw_data": {"basename": "shard.00000.mds", "bytes": len(data), "hashes": {}}, "size_limit": 2**26,
        "version": 2, "zip_data": None,
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"shards": [shard], "version": 2}))


def as_tahoe_100m(adata: anndata.AnnData, path: Path, table: pd.DataFrame) -> None:
    tokens = table.set_index("ensembl_id")["token_id"].loc[adata.var_names].to_numpy()
    matrix = csr_matrix(adata.X)
    rows = [slice(*matrix.indptr[i : i + 2]) for i in range(adata.n_obs)]
    columns = {
        "genes": [np.concatenate([[1], tokens[matrix.indices[row]]]) for row in rows],
        "expressions": [np.concatenate([[-2], matrix.data[row]]) for row in rows],
        "BARCODE_SUB_LIB_ID": adata.obs_names.to_list(),
    }
    schema = pa.schema(
        [("genes", pa.list_(pa.int64())), ("expressions", pa.list_(pa.float32())), ("BARCODE_SUB_LIB_ID", pa.string())]
    )
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=300)


def sources_of(adata: anndata.AnnData, folder: Path, vocab: Path, genes: Path) -> dict[str, dict[str, Any]]:
    """Write the same cells as every kind of source; return the settings of each."""
    plain = anndata.AnnData(csr_matrix(adata.X), obs=adata.obs[[]], var=adata.var[[]])
    for kind in ("csr", "csc", "dense"):
        (folder / kind).mkdir()
        write_cells(plain, folder / kind / "cells", kind)
    write_cells(plain, folder / "cells", "zarr")
    write_cells(plain, folder / "cells", "10x_h5")
    write_cells(plain, folder / "10x", "10x_mtx")
    as_mds(adata, folder / "mds", json.loads(vocab.read_text()))
    as_tahoe_100m(adata, folder / "tahoe.parquet", pd.read_parquet(genes))
    files = {name: {"kind": "anndata", "paths": [str(folder / name)]} for name in ("csr", "csc", "dense")}
    sources: dict[str, dict[str, Any]] = {
        **files,
        "zarr": {"kind": "anndata", "paths": [str(folder / "cells.zarr")]},
        "10x_h5": {"kind": "10x", "paths": [str(folder / "cells.h5")]},
        "10x_mtx": {"kind": "10x", "paths": [str(folder / "10x")]},
        "mds": {"kind": "mds", "paths": [str(folder / "mds")], "source_vocab": str(vocab)},
        "tahoe-100m": {"kind": "tahoe-100m", "paths": [str(folder / "tahoe.parquet")], "gene_metadata": str(genes)},
    }
    try:
        import tiledbsoma.io
    except ImportError:
        return sources
    soma = plain.copy()
    soma.obs["observation_joinid"] = soma.obs_names.to_numpy()
    soma.var["feature_id"] = soma.var_names.to_numpy()
    tiledbsoma.io.from_anndata(str(folder / "soma"), soma, measurement_name="RNA", X_layer_name="raw")
    sources["census"] = {"kind": "census", "uri": str(folder / "soma")}
    return sources


@pytest.mark.slow
def test_every_kind_of_source_gives_the_same_real_cells(tmp_path: Path, shared_data: Any) -> None:
    heart = anndata.read_h5ad(shared_data("h5ad/heart_san_1000_native_ensembl.h5ad"))[:200].copy()
    vocab, genes = shared_data("tahoe/vocab.json"), shared_data("tahoe/gene_metadata.parquet")
    heart.X = csr_matrix(heart.X)
    heart.X.sort_indices()
    ids = json.loads(vocab.read_text())
    tokens = np.array([ids[name] for name in heart.var_names])
    sources = sources_of(heart, tmp_path, vocab, genes)
    for name, settings in sources.items():
        output = tmp_path / f"out-{name}"
        settings = {**settings, "metadata": {"name": "_index"}}
        prepare(parse_config({"sources": [settings], "output": str(output), "vocab": str(vocab)}, name))
        rows = read_dataset(output).set_index("name")
        assert sorted(rows.index) == sorted(heart.obs_names), name
        rows = rows.loc[heart.obs_names]
        np.testing.assert_array_equal(np.concatenate(rows["genes"].to_list()), tokens[heart.X.indices], err_msg=name)
        np.testing.assert_array_equal(np.concatenate(rows["counts"].to_list()), heart.X.data, err_msg=name)
        manifest = json.loads((output / "manifest.json").read_text())
        assert manifest["totals"]["cells_in"] == manifest["totals"]["cells_out"] == 200, name
    assert {"csr", "csc", "dense", "zarr", "10x_h5", "10x_mtx", "mds", "tahoe-100m"} <= set(sources)


@pytest.fixture(scope="module")
def pbmc() -> anndata.AnnData:
    """Return counts of the cells that come with every scanpy; genes are symbols."""
    import scanpy

    adata = scanpy.datasets.pbmc68k_reduced()
    counts = np.rint(np.expm1(adata.raw.X.toarray()) * adata.obs["n_counts"].to_numpy()[:, None] / 1e4)
    return anndata.AnnData(
        csr_matrix(counts.astype(np.float32)), obs=adata.obs[["bulk_labels"]], var=adata.raw.var[[]]
    )


def test_pbmc_through_every_kind_of_file_by_symbol(tmp_path: Path, shared_data: Any, pbmc: anndata.AnnData) -> None:
    vocab = shared_data("tahoe/vocab.json")
    table = pd.read_csv(SYMBOLS).set_index("symbol")["ensembl_id"]
    names = {i: token for token, i in json.loads(vocab.read_text()).items()}
    dense = pbmc.X.toarray()
    tokens = set(names.values())
    known = [(g, table[s]) for g, s in enumerate(pbmc.var_names) if s in table.index and table[s] in tokens]
    for kind in ("csr", "csc", "dense", "zarr", "10x_h5", "10x_mtx"):
        (tmp_path / kind).mkdir()
        path = write_cells(pbmc, tmp_path / kind / "cells", kind)
        settings = {
            "kind": "10x" if "10x" in kind else "anndata",
            "paths": [str(path)],
            "metadata": {"name": "_index"},
        }
        settings |= {"gene_symbols": str(SYMBOLS), "metadata": {"name": "_index"}}
        output = tmp_path / f"out-{kind}"
        prepare(parse_config({"sources": [settings], "output": str(output), "vocab": str(vocab)}, kind))
        rows = read_dataset(output).set_index("name").loc[pbmc.obs_names]
        for cell in range(0, 700, 23):
            genes, counts = rows["genes"].iloc[cell], rows["counts"].iloc[cell]
            found = {names[g]: c for g, c in zip(genes, counts, strict=True)}
            assert found == {e: dense[cell, g] for g, e in known if dense[cell, g]}, (kind, cell)
        assert sum(row.sum(dtype=np.int64) for row in rows["counts"]) == dense[:, [g for g, _ in known]].sum()


def test_pbmc_with_the_command(tmp_path: Path, shared_data: Any, pbmc: anndata.AnnData) -> None:
    vocab = shared_data("tahoe/vocab.json")
    pbmc.write_h5ad(tmp_path / "pbmc.h5ad")
    arguments = ["prepare", str(tmp_path / "pbmc.h5ad"), "--output", str(tmp_path / "out"), "--vocab", str(vocab)]
    options = ["--gene-symbols", str(SYMBOLS), "--metadata", "bulk_labels", "--metadata", "name=_index"]
    by_own_table = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "by_own_table")])
    assert by_own_table.exit_code == 0, by_own_table.output
    found = json.loads((tmp_path / "by_own_table" / "manifest.json").read_text())["sources"][0]["files"][0]
    assert 700 < found["genes_known"] <= 765
    result = CliRunner().invoke(app, [*arguments, *options, "--overwrite"])
    assert result.exit_code == 0, result.output
    assert "700 cells read from 1 files, 700 kept" in result.output
    entry = json.loads((tmp_path / "out" / "manifest.json").read_text())["sources"][0]["files"][0]
    assert entry["genes"] == 765
    assert 700 < entry["genes_known"] <= len(pd.read_csv(SYMBOLS))
    assert entry["counts_kept"] + entry["counts_of_unknown_genes"] == pbmc.X.sum()
    assert set(read_dataset(tmp_path / "out")["bulk_labels"]) == set(pbmc.obs["bulk_labels"].cat.categories)
