# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The output of an embedding run: its format, its columns, and whether it is a copy of the source."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tahoex1_hf.cells.readers.base import BadInput, CellInput
from tahoex1_hf.cells.readers.paths import is_zarr_store
from tahoex1_hf.common.files import put_back
from tahoex1_hf.common.names import short_names
from tahoex1_hf.embedding.anndata_writer import H5adWriter, ZarrWriter
from tahoex1_hf.embedding.cell_genes import CellGenes, check_cell_gene_output
from tahoex1_hf.embedding.obs_columns import choose_columns, common_types, joined_column
from tahoex1_hf.embedding.shards import ShardFolder
from tahoex1_hf.embedding.source_copy import SourceCopy
from tahoex1_hf.embedding.writers import EmbeddingWriter, Layout, NpyWriter, ParquetWriter, check_output
from tahoex1_hf.inference.provenance import number_columns
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputOptions:
    """The user's options for the output.

    Attributes:
        path: Path or URL of the output, whose ending decides the format.
        key_added: Slot of `obsm` to write, or name of the table's column of embeddings.
        kinds: Kinds of gene embeddings.
        draws: Number of samples of a long cell; if it is more than one, the output has a column of deviations.
        obs: Columns of obs; None for the default of the format.
        wide: Whether a table has a column for each dimension.
        cell_genes: Path or URL of the table of every cell's gene embeddings; None for no such table.
        full_paths: Whether sources are named by their full paths; otherwise they have short names.
        score_masks: Number of masks by which each cell is scored; 0 for no scores.
    """

    path: str
    key_added: str
    kinds: tuple[str, ...] = ()
    draws: int = 1
    obs: tuple[str, ...] | None = None
    wide: bool = False
    cell_genes: str | None = None
    full_paths: bool = False
    score_masks: int = 0

    @property
    def numbers(self) -> dict[str, str]:
        """Names of what is computed of each cell beside its embedding, with their columns."""
        return number_columns(self.key_added, self.draws, self.score_masks)

    def check(self) -> None:
        """Raise ValueError before any work is done if the output cannot be written.

        A store that a killed run was about to replace is put back first, since it may be the source, too.
        """
        if "://" not in self.path:
            put_back(Path(self.path))
        check_output(self.path, bool(self.kinds), self.key_added, [*self.numbers.values()], self.wide, self.obs)
        if self.cell_genes is not None:
            check_cell_gene_output(self.cell_genes, self.path)


class Output:
    """The output of a run over inputs.

    Args:
        options: Options for the output.
        inputs: Sources.
        shards: Folder of the shards, from which the output is written.
        tokenizer: Tokenizer, whose tokens are the names of the genes.
        width: Number of dimensions.

    Attributes:
        source_names: Names of the sources in the output.
        copied: Copy of the source, to which the embeddings are added; None for cells without counts.
        names: Whether the names of the cells are needed.
        shard_columns: Columns of obs that the shards must hold.
        cell_genes: Writer of every cell's gene embeddings; None if they are not requested.

    Raises:
        ValueError: If the options do not fit these sources.
    """

    def __init__(
        self,
        options: OutputOptions,
        inputs: Sequence[CellInput],
        shards: ShardFolder,
        tokenizer: TahoeX1Tokenizer,
        width: int,
    ):
        self.options, self.inputs, self.shards, self.width = options, inputs, shards, width
        path, obs = options.path, options.obs
        paths = [cells.path for cells in inputs]
        self.source_names = paths if options.full_paths else short_names(paths)
        self.copied = self._find_copied()
        if obs is not None and self.copied is not None:
            raise ValueError(
                f"obs={','.join(obs)}: {path} is a copy of the only source, with all columns of obs: leave obs out."
            )
        if options.kinds:
            self._check_genes()
        is_table = path.endswith(".parquet")
        no_columns = path.endswith(".npy") or self.copied is not None or (is_table and obs is None)
        self.columns = [] if no_columns else choose_columns(inputs, obs)
        self.shard_columns = self.columns if is_table else []
        self.names = options.cell_genes is not None or not (path.endswith(".npy") or self.copied is not None)
        self.cell_genes = None
        if options.cell_genes is not None:
            several = len(inputs) > 1
            self.cell_genes = CellGenes(options.cell_genes, shards, tokenizer, width, options.key_added, several)

    @property
    def identity(self) -> dict[str, Any]:
        """Options that decide the content of the shards and of the output, as JSON."""
        options = self.options
        return {
            "key_added": options.key_added,
            "gene_embeddings": "EA" in options.kinds,  # the record from the time when there was only one kind
            "gene_kinds": list(options.kinds),
            "cell_gene_embeddings": self.cell_genes is not None,
            "obs": None if options.obs is None else list(options.obs),
            "wide": options.wide,
            "score_masks": options.score_masks,
            "names": self.names,
            # Only the files with every cell's gene embeddings hold the names of the sources.
            "full_paths": options.full_paths and self.cell_genes is not None,
        }

    def _find_copied(self) -> SourceCopy | None:
        """Return a copy of the only source, not begun, if it has the format of the output; otherwise None."""
        output = Path(self.options.path)
        local = [Path(cells.path) for cells in self.inputs]
        if output.suffix == ".zarr" and any(path.resolve() == output.resolve() for path in local):
            raise ValueError(f"{output} is a source: a .zarr store cannot be changed in place, name another output.")
        if len(local) > 1:
            return None
        is_same = {".h5ad": local[0].suffix == ".h5ad" and local[0].is_file(), ".zarr": is_zarr_store(local[0])}
        if not is_same.get(output.suffix, False):
            return None
        return SourceCopy(self.inputs[0].path, self.options.path, Path(self.shards.location, "copy.partial"))

    def _check_genes(self) -> None:
        """Raise ValueError if the output has no place for gene embeddings."""
        if self.copied is None or self.inputs[0].genes is None:
            raise ValueError(
                "gene_embeddings needs a single .h5ad file as source and an .h5ad output, or the same with .zarr: "
                "their varm holds the result."
            )
        self.inputs[0].check_gene_slots()

    def begin(self) -> None:
        """Begin, in a thread, what needs no embeddings: to copy the source."""
        if self.copied is not None:
            self.copied.begin()

    def check(self) -> None:
        """Raise the error with which that has ended, if it has, since no output can come of the run."""
        if self.copied is not None:
            self.copied.check()

    def wait(self) -> None:
        """Wait until that is done."""
        if self.copied is not None:
            self.copied.wait()

    def abandon(self) -> None:
        """Remove what was begun; a finished output stays."""
        if self.copied is not None:
            self.copied.abandon()

    def open(self) -> EmbeddingWriter:
        """Open the writer; the shards must hold all cells."""
        options = self.options
        shape = sum(cells.num_cells for cells in self.inputs), self.width
        layout = Layout(shape, options.key_added, self.source_names, options.numbers)
        if options.path.endswith(".npy"):
            return NpyWriter(options.path, layout)
        if options.path.endswith(".parquet"):
            types = common_types(self.shards.obs_schemas(), self.columns) if self.columns else {}
            return ParquetWriter(options.path, layout, types, options.wide)
        obs = {name: partial(self._column, name) for name in self.columns}
        writer = H5adWriter if options.path.endswith(".h5ad") else ZarrWriter
        return writer(options.path, layout, self.copied, obs)

    def _column(self, name: str) -> Any:
        """Return a column of obs of all sources; None if it cannot be read and was not requested by the user."""
        try:
            return joined_column(self.inputs, name)
        except BadInput as error:
            if self.options.obs is not None:
                raise
            logger.warning("The column %s of obs is left out: %s", name, error)
            return None
