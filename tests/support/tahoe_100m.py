"""Write files in the layout of Tahoe-100M."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUM_GENES, NUM_CELLS = 40, 50


def cell_table(counts: np.ndarray, token_ids: np.ndarray | None = None) -> pa.Table:
    """Return cells as Tahoe-100M stores them: `<cls>`, then the genes with their numbers from 3."""
    token_ids = np.arange(3, 3 + counts.shape[1]) if token_ids is None else token_ids
    cells = [np.flatnonzero(row) for row in counts]
    columns = {
        "genes": pa.array([[1, *token_ids[cell]] for cell in cells], pa.list_(pa.int64())),
        "expressions": pa.array(
            [[-2.0, *row[cell]] for row, cell in zip(counts, cells, strict=True)], pa.list_(pa.float32())
        ),
        "drug": [f"drug {i % 3}" for i in range(len(counts))],
        "plate": [f"plate{1 + i // 30}" for i in range(len(counts))],
        "BARCODE_SUB_LIB_ID": [f"01_0{i}-lib" for i in range(len(counts))],
    }
    return pa.table(columns)


def write_parquet(table: pa.Table, path: str | Path, rows: int = 12) -> str:
    pq.write_table(table, path, row_group_size=rows)
    return str(path)


COMMIT, SHA256 = "a" * 40, "b" * 64


def fill_cache(cache: Path, name: str, content: Path, blob: str, revision: str = "main") -> None:
    """Put a file where a download would: content under its hash, names as links, the branch in `refs`."""
    repository = cache / "datasets--tahoebio--Tahoe-100M"
    for folder in ("blobs", "refs", f"snapshots/{COMMIT}/{Path(name).parent}"):
        (repository / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(content, repository / "blobs" / blob)
    (repository / "refs" / revision).write_text(COMMIT)
    (repository / "snapshots" / COMMIT / name).symlink_to(repository / "blobs" / blob)
