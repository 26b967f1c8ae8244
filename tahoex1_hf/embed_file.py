"""Embedding an .h5ad file of any size into a file: rows are read, embedded and written in chunks."""

import json
import logging
import os
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from tahoex1_hf.embedding import EmbeddingRun, provenance_key
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1PreTrainedModel
from tahoex1_hf.reading import open_h5ad
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)


class EmbeddingWriter(ABC):
    """Writes embeddings chunk by chunk to a temporary file beside the output, which `finish` moves into place."""

    def __init__(self, output: Path, shape: tuple[int, int], key_added: str):
        self.output, self.shape, self.key_added = output, shape, key_added
        self.partial = output.with_name(f".{output.name}.{os.getpid()}.partial")

    @abstractmethod
    def write(self, start: int, embeddings: np.ndarray) -> None:
        """Write the `(cells, width)` embeddings of the cells from `start` on; chunks come in order."""

    @abstractmethod
    def close(self) -> None:
        """Close the temporary file, whether the run succeeded or not."""

    def write_genes(self, embeddings: np.ndarray) -> None:
        """Write `(genes, width)` gene embeddings, where the format has a place for them."""
        raise ValueError(f"Gene embeddings need an output that ends in .h5ad, got {self.output.name}.")

    @abstractmethod
    def write_provenance(self, provenance: dict[str, Any]) -> None:
        """Write what made the embeddings, where the format has a place for it."""

    def finish(self) -> None:
        """Move the finished file into place."""
        self.close()
        os.replace(self.partial, self.output)

    def abandon(self) -> None:
        """Remove the unfinished file."""
        self.close()
        self.partial.unlink(missing_ok=True)


class H5adWriter(EmbeddingWriter):
    """A copy of the input with `obsm`, `uns` and perhaps `varm` added; whatever else it holds is copied as it is."""

    def __init__(self, output: Path, shape: tuple[int, int], key_added: str, source: Path):
        import h5py

        super().__init__(output, shape, key_added)
        shutil.copyfile(source, self.partial)
        self.file = h5py.File(self.partial, "r+")
        self._remove("obsm", key_added)
        group = self._group("obsm")
        self.dataset = group.create_dataset(key_added, shape=shape, dtype=np.float32)
        self.dataset.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})

    def _group(self, name: str) -> Any:
        group = self.file.require_group(name)
        if "encoding-type" not in group.attrs:
            group.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        return group

    def _remove(self, group: str, name: str) -> None:
        if name in self._group(group):
            logger.warning("%s had %s[%r] already: it is replaced in the output.", self.output.name, group, name)
            del self.file[group][name]

    def write(self, start: int, embeddings: np.ndarray) -> None:
        """Write a chunk of rows."""
        self.dataset[start : start + len(embeddings)] = embeddings

    def write_genes(self, embeddings: np.ndarray) -> None:
        """Write `varm[key_added]`."""
        self._write_element("varm", self.key_added, embeddings)

    def write_provenance(self, provenance: dict[str, Any]) -> None:
        """Write `uns`."""
        self._write_element("uns", provenance_key(self.key_added), provenance)

    def _write_element(self, group: str, name: str, value: Any) -> None:
        from anndata.io import write_elem

        self._remove(group, name)
        write_elem(self.file[group], name, value)

    def close(self) -> None:
        """Close the HDF5 file."""
        self.file.close()


class ParquetWriter(EmbeddingWriter):
    """A table with the cells' names (`cell`) and one float32 column per dimension (`X_tahoe_x1_0`, …)."""

    def __init__(self, output: Path, shape: tuple[int, int], key_added: str, names: np.ndarray):
        import pyarrow as pa
        import pyarrow.parquet as pq

        super().__init__(output, shape, key_added)
        self.names = names
        columns = [pa.field(f"{key_added}_{i}", pa.float32()) for i in range(shape[1])]
        self.schema = pa.schema([pa.field("cell", pa.string()), *columns])
        self.file = pq.ParquetWriter(self.partial, self.schema)

    def write(self, start: int, embeddings: np.ndarray) -> None:
        """Write a chunk of rows as one row group."""
        import pyarrow as pa

        names = pa.array(self.names[start : start + len(embeddings)], pa.string())
        self.file.write_table(pa.Table.from_arrays([names, *map(pa.array, embeddings.T)], schema=self.schema))

    def write_provenance(self, provenance: dict[str, Any]) -> None:
        """Write it as JSON into the file's metadata, key `tahoe_x1`."""
        self.file.add_key_value_metadata({provenance_key(self.key_added): json.dumps(provenance)})

    def close(self) -> None:
        """Write the footer."""
        self.file.close()


class NpyWriter(EmbeddingWriter):
    """A plain `(cells, width)` array."""

    def __init__(self, output: Path, shape: tuple[int, int], key_added: str):
        super().__init__(output, shape, key_added)
        self.array = np.lib.format.open_memmap(self.partial, mode="w+", dtype=np.float32, shape=shape)

    def write(self, start: int, embeddings: np.ndarray) -> None:
        """Write a chunk of rows."""
        self.array[start : start + len(embeddings)] = embeddings

    def write_provenance(self, provenance: dict[str, Any]) -> None:
        """Log it: the format has no place for it."""
        logger.info("An .npy file holds numbers alone. They were made by: %s", json.dumps(provenance))

    def close(self) -> None:
        """Flush to disk."""
        self.array.flush()


def check_output(output: Path, gene_embeddings: bool) -> None:
    """Raise ValueError for an output that could not be written, before any work is done."""
    if output.suffix not in (".h5ad", ".parquet", ".npy"):
        raise ValueError(f"The output must end in .h5ad, .parquet or .npy, got {output.name!r}.")
    if gene_embeddings and output.suffix != ".h5ad":
        raise ValueError(f"Gene embeddings need an output that ends in .h5ad, got {output.name!r}.")
    if not output.parent.is_dir():
        raise ValueError(f"The output's folder {output.parent} does not exist.")


def embed_h5ad(
    source: str | Path,
    output: str | Path,
    model: TahoeX1PreTrainedModel,
    tokenizer: TahoeX1Tokenizer,
    *,
    key_added: str = "X_tahoe_x1",
    **options: Any,
) -> None:
    """Embed the cells of an .h5ad file, which may be larger than memory.

    Args:
        source: the .h5ad file with raw counts.
        output: ends in `.h5ad` (the input plus the new slots), `.parquet` or `.npy`. It appears when all is written.
        model: any Tahoe-x1 model.
        tokenizer: the tokenizer of the same checkpoint.
        key_added: slot of `obsm` to write, or the beginning of the table's column names.
        **options: as in `embed_anndata`.

    Raises:
        ValueError: as `embed_anndata`, and for an output that cannot be written.
        FileNotFoundError: where there is no such input.
    """
    source, output = Path(source), Path(output)
    check_output(output, options.get("gene_embeddings", False))
    with open_h5ad(source) as adata:
        run = EmbeddingRun(adata, model, tokenizer, **options)
        if output.suffix == ".h5ad":
            writer: EmbeddingWriter = H5adWriter(output, run.shape, key_added, source)
        elif output.suffix == ".parquet":
            writer = ParquetWriter(output, run.shape, key_added, adata.obs_names.to_numpy())
        else:
            writer = NpyWriter(output, run.shape, key_added)
        try:
            for start, embeddings in run.chunks():
                writer.write(start, embeddings)
            if options.get("gene_embeddings"):
                writer.write_genes(run.gene_embeddings())
            writer.write_provenance(run.provenance())
            writer.finish()
        except BaseException:
            writer.abandon()
            raise
