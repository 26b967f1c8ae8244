"""Files of made embeddings, written as `tahoex1 embed` writes them."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch

from tahoex1_hf.embedding.anndata_writer import H5adWriter, ZarrWriter
from tahoex1_hf.embedding.obs_columns import as_arrow
from tahoex1_hf.embedding.shards import Shard
from tahoex1_hf.embedding.writers import EmbeddingWriter, Layout, ParquetWriter

KEY = "X_tahoe_x1"
RECORD: dict[str, Any] = {
    "model": "owner/model",
    "revision": "abc",
    "value_encoding": "binned",
    "max_length": 2048,
    "overflow": "sample",
    "seed": 0,
    "draws": 1,
    "dtype": "float32",
    "hidden_layer": 4,
    "normalized": "L2",
}


def clouds(number: int, width: int = 16, seed: int = 0, kinds: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings of length 1, in clouds that are the same for every seed, and the numbers of the clouds."""
    centres = np.random.default_rng(99).normal(size=(kinds, width))
    random = np.random.default_rng(seed)
    cloud = random.integers(0, kinds, number)
    values = centres[cloud] + 0.4 * random.normal(size=(number, width))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32), cloud


def columns_of(cloud: np.ndarray) -> pd.DataFrame:
    """Return columns of obs: a category, a text with missing values, whole numbers and a flag."""
    return pd.DataFrame(
        {
            "tissue": pd.Categorical([("lung", "gut", "skin")[kind % 3] for kind in cloud]),
            "n.genes": cloud * 100 + 5,
            "cell type": pd.Categorical([None if kind == 5 else f"type {kind}" for kind in cloud]),
            "healthy": cloud % 2 == 0,
        }
    )


def write_embeddings(
    path: Path,
    values: np.ndarray,
    obs: pd.DataFrame | None = None,
    prefix: str = "c",
    pieces: int = 3,
    wide: bool = False,
    **record: Any,
) -> Path:
    """Write embeddings and columns of obs; the ending decides the format."""
    layout = Layout((len(values), values.shape[1]), KEY, ["cells"])
    names = [f"{prefix}{row}" for row in range(len(values))]
    table = None if obs is None else as_arrow(obs)
    writer: EmbeddingWriter
    if path.suffix == ".parquet":
        types = {} if table is None else dict(zip(table.column_names, table.schema.types, strict=True))
        writer = ParquetWriter(str(path), layout, types, wide)
    else:
        kind = H5adWriter if path.suffix == ".h5ad" else ZarrWriter
        columns: dict[str, Any] = {}
        if obs is not None:
            columns = {name: (lambda name=name: obs[name].values) for name in obs.columns}
        writer = kind(str(path), layout, None, columns)
    for rows in np.array_split(np.arange(len(values)), pieces):
        part = None if table is None else table.slice(int(rows[0]), len(rows))
        writer.write(Shard([names[row] for row in rows], values[rows], 0, None, part), "cells")
    writer.write_provenance({**RECORD, **record})
    writer.finish()
    return path


def assert_same_file(ours: Path, theirs: Path) -> None:
    """Fail unless two Parquet files have the same bytes, and say where they differ and how this process computes."""
    if ours.read_bytes() == theirs.read_bytes():
        return
    one, two = pq.read_table(ours), pq.read_table(theirs)
    said = [f"{ours.name} and {theirs.name} differ"]
    for name in sorted({*one.column_names, *two.column_names}):
        if name not in one.column_names or name not in two.column_names:
            said.append(f"{name}: in one of them only")
        elif not one[name].equals(two[name]):
            values = [np.array(table[name].to_pylist(), dtype=object) for table in (one, two)]
            rows = [i for i, (a, b) in enumerate(zip(*values, strict=False)) if not np.array_equal(a, b)]
            said.append(
                f"{name}: rows {rows[:20]} of {[len(v) for v in values]}, first {[v[rows[:1]] for v in values]}"
            )
    groups = [pq.ParquetFile(path).num_row_groups for path in (ours, theirs)]
    said.append(f"row groups {groups}; {torch.get_num_threads()} threads, oneDNN {torch.backends.mkldnn.enabled}")
    raise AssertionError("\n".join(said))
