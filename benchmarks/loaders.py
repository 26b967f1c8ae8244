"""Feed cells by scDataset and annbatch, where they are installed (annbatch needs Python 3.12).

Both hand out counts as they are stored, in a random order, with the settings of their documentation. Ours bins them,
samples them to the context, masks and pads them besides, so a ratio of 1 is in ours' favour.
"""

import importlib.util
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import anndata

SCDATASET, ANNBATCH = "scDataset", "annbatch"
_BLOCK = 16  # cells that scDataset reads side by side
_FETCHED = 64  # batches that it reads at once: half of the cells of the full size, of whose paper it is a quarter
_CHUNK, _CHUNKS = 32, 256  # cells of a chunk of annbatch, and chunks that it reads at once


def missing(name: str) -> str:
    """Return why a loader cannot be measured; "" where it can."""
    if importlib.util.find_spec(name.lower()) is not None:
        return ""
    if name == ANNBATCH and sys.version_info < (3, 12):
        return "annbatch needs Python 3.12"
    return f"{name} is not installed"


def pass_rate(batches: Iterable[Any], cells: int) -> float:
    """Return the cells per second of a pass over all batches, the first reading included."""
    start = time.perf_counter()
    for _ in batches:
        pass
    return cells / (time.perf_counter() - start)


def of_scdataset(file: Path, batch: int) -> Callable[[], float]:
    """Return what measures a pass of scDataset over an .h5ad file."""
    from scdataset import BlockShuffling, scDataset

    cells = anndata.read_h5ad(file, backed="r")
    batches = scDataset(
        cells, BlockShuffling(block_size=_BLOCK), batch_size=batch, fetch_factor=_FETCHED, seed=0,
        fetch_transform=lambda found: found.to_memory().X,
    )  # fmt: skip
    return lambda: pass_rate(batches, cells.n_obs)


def of_annbatch(file: Path, folder: Path, batch: int) -> Callable[[], float]:
    """Write the cells of an .h5ad file into a collection of annbatch, and return what measures a pass over it."""
    import zarr
    from annbatch import DatasetCollection, Loader

    if importlib.util.find_spec("zarrs") is not None:  # as its documentation advises
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    collection = DatasetCollection(str(folder))
    collection.add_adatas([str(file)])
    cells = anndata.read_h5ad(file, backed="r").n_obs

    def load(group: Any) -> anndata.AnnData:
        return anndata.AnnData(X=anndata.io.sparse_dataset(group["X"]))

    def measure() -> float:
        loader = Loader(
            batch_size=batch, chunk_size=_CHUNK, preload_nchunks=_CHUNKS, shuffle=True, preload_to_gpu=False
        )
        return pass_rate(loader.use_collection(collection, load_adata=load), cells)

    return measure
