"""Small AnnDatas for the tests of the data path, and prepared datasets read back."""

import json
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import csc_matrix, csr_matrix

NUM_GENES = 60
GENES = [f"ENSG{i:011d}" for i in range(NUM_GENES)]


def write_vocab(folder: Path, genes: list[str] = GENES, drug_token: bool = False) -> Path:
    """Write a vocabulary whose ids are not the gene numbers; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["<pad>", "<cls>", "<eoc>", *(["<drug>"] if drug_token else []), *reversed(genes)]
    path = folder / "vocab.json"
    path.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    return path


def make_cells(num_cells: int, seed: int = 0, genes: list[str] = GENES, largest: int = 40) -> anndata.AnnData:
    """Make cells with whole counts, different numbers of genes, and metadata of several types."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(1, largest, (num_cells, len(genes))) * (rng.random((num_cells, len(genes))) < 0.3)
    dense[np.arange(num_cells), rng.integers(0, len(genes), num_cells)] += 1  # no cell is empty
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(rng.choice(["B", "NK", "T"], num_cells)),
            "sample": rng.choice(["s1", "s2", "s3", "s4"], num_cells),
            "n_genes": (dense > 0).sum(1),
            "score": rng.random(num_cells),
            "passed": rng.random(num_cells) < 0.7,
        },
        index=[f"cell{seed}-{i}" for i in range(num_cells)],
    )
    return anndata.AnnData(csr_matrix(dense.astype(np.float32)), obs=obs, var=pd.DataFrame(index=genes))


def write_cells(adata: anndata.AnnData, path: Path, kind: str) -> Path:
    """Write cells as a source of this kind; return its path."""
    if kind in ("csr", "csc", "dense"):
        adata = adata.copy()
        adata.X = {"csr": csr_matrix, "csc": csc_matrix, "dense": lambda x: x.toarray()}[kind](adata.X)
        adata.write_h5ad(path.with_suffix(".h5ad"))
        return path.with_suffix(".h5ad")
    if kind in ("zarr", "zarr_csc"):
        adata = adata.copy()
        adata.X = csc_matrix(adata.X) if kind == "zarr_csc" else adata.X
        adata.write_zarr(path.with_suffix(".zarr"))
        return path.with_suffix(".zarr")
    if kind == "10x_h5":
        return write_10x_h5(adata, path.with_suffix(".h5"))
    assert kind == "10x_mtx"
    return write_10x_mtx(adata, path)


def write_10x_h5(adata: anndata.AnnData, path: Path) -> Path:
    matrix = csr_matrix(adata.X)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["data"], group["indices"], group["indptr"] = matrix.data.astype(np.int32), matrix.indices, matrix.indptr
        group["shape"] = np.array(matrix.shape[::-1], dtype=np.int32)
        group["barcodes"] = adata.obs_names.to_numpy().astype("S")
        features = group.create_group("features")
        features["id"] = features["name"] = adata.var_names.to_numpy().astype("S")
        features["feature_type"] = np.array([b"Gene Expression"] * adata.n_vars)
    return path


def write_10x_mtx(adata: anndata.AnnData, folder: Path, shuffled: bool = True) -> Path:
    import gzip

    folder.mkdir(parents=True)
    entries = csr_matrix(adata.X).tocoo()
    order = np.random.default_rng(0).permutation(entries.nnz) if shuffled else np.arange(entries.nnz)
    lines = ["%%MatrixMarket matrix coordinate integer general", "% a comment"]
    lines.append(f"{adata.n_vars} {adata.n_obs} {entries.nnz}")
    columns = (entries.col[order] + 1, entries.row[order] + 1, entries.data[order].astype(np.int64))
    lines += [f"{gene} {cell} {count}" for gene, cell, count in zip(*(each.tolist() for each in columns), strict=True)]
    for name, text in {
        "matrix.mtx": lines,
        "barcodes.tsv": list(adata.obs_names),
        "features.tsv": [f"{gene}\tname-{gene}\tGene Expression" for gene in adata.var_names],
    }.items():
        with gzip.open(folder / f"{name}.gz", "wt", compresslevel=1) as file:
            file.write("\n".join(text) + "\n")
    return folder


def read_dataset(folder: Path, split: str | None = None) -> pd.DataFrame:
    """Return the rows of a prepared dataset in their order, with genes and counts as arrays."""
    manifest = json.loads((folder / "manifest.json").read_text())
    tables = []
    for name, part in manifest["splits"].items():
        if split not in (None, name):
            continue
        for shard in part["shards"]:
            path = folder / shard["file"]
            table = pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_file(path).read_all()
            tables.append(table.to_pandas().assign(split=name))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def expressed(genes: Any, counts: Any, vocab: Path) -> dict[str, float]:
    """Return gene -> count for one row of a dataset."""
    names = {i: token for token, i in json.loads(vocab.read_text()).items()}
    return {names[gene]: float(count) for gene, count in zip(genes, counts, strict=True)}


def expressed_in(adata: anndata.AnnData, cell: int) -> dict[str, float]:
    """Return gene -> count for one cell of an AnnData."""
    row = csr_matrix(adata.X)[cell].toarray()[0]
    return {adata.var_names[g]: float(row[g]) for g in np.flatnonzero(row)}


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def as_mouse(adata: anndata.AnnData, folder: Path) -> tuple[anndata.AnnData, dict[str, str]]:
    """Return the cells with genes of a mouse, and the arguments that translate them by a table in a folder."""
    mouse = adata.copy()
    mouse.var_names = [f"ENSMUSG{name.removeprefix('ENSG')}" for name in adata.var_names]
    table = folder / "orthologs.csv"
    table.write_text(
        "".join(f"{ours},{theirs}\n" for ours, theirs in zip(mouse.var_names, adata.var_names, strict=True))
    )
    return mouse, {"species": "mouse", "orthologs": str(table)}
