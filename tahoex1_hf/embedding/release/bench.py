# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Some of the cells, to embed again under other assumptions."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tahoex1_hf.cells.encoding import ChunkEncoder, EncodeOptions
from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.cells.opening import open_cells
from tahoex1_hf.cells.readers.tables import open_table
from tahoex1_hf.cells.readers.tahoe_100m import COUNTS, GENES
from tahoex1_hf.embedding.release.comparing import cosines
from tahoex1_hf.inference.chunks import embed_input
from tahoex1_hf.inference.encoder import CellEncoder, cut_after
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

_SEED = 0  # of the permutations that destroy what is known of a factor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Bench:
    """Cells with their public embeddings and ours.

    Attributes:
        folder: Folder for files that a trial needs.
        cells: The cells, as in Tahoe-100M.
        public: `(cells, width)` public embeddings.
        samples: `(cells, width)` embeddings of ours in float32, for each seed of the sampling.
        other_run: The same in bfloat16, with the first seed.
        model: The model.
        tokenizer: Its tokenizer.
        gene_metadata: Gene table of the cells.
        drugs: Column of the drugs; None for a model without drugs.
        seed: Seed of the second of the samples, which trials have, too.
        run: Arguments of `CellEncoder` (device, batch_tokens).
    """

    folder: Path
    cells: pa.Table
    public: np.ndarray
    samples: list[np.ndarray]
    other_run: np.ndarray
    model: Any
    tokenizer: TahoeX1Tokenizer
    gene_metadata: str
    drugs: str | None
    seed: int
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str | None]:
        """The drug of each cell, without blanks around its name."""
        assert self.drugs is not None
        return [None if name is None else name.strip() for name in self.cells[self.drugs].to_pylist()]

    @cached_property
    def base(self) -> float:
        """Mean cosine of the public embeddings with ours."""
        return self.near(self.public)

    @cached_property
    def floor(self) -> float:
        """Mean cosine of our other run with the same samples."""
        return self.near(self.other_run)

    def near(self, embeddings: np.ndarray) -> float:
        """Return the mean cosine of embeddings with all samples but the first."""
        return float(np.mean([cosines(embeddings, each) for each in self.samples[1:]]))

    def closed(self, mean: float) -> float:
        """Return the share of the gap between public embeddings and floor that a mean cosine closes."""
        return (mean - self.base) / max(self.floor - self.base, 1e-12)

    def embed(
        self,
        *,
        cells: pa.Table | None = None,
        model: Any = None,
        tokenizer: TahoeX1Tokenizer | None = None,
        drugs: str | Sequence[str | None] | None = "",
        gene_metadata: str | None = None,
        hidden_layer: int | None = None,
    ) -> np.ndarray:
        """Embed the cells in float32, with what is not given as in our own runs.

        Args:
            cells: Other cells.
            model: Another model.
            tokenizer: Another tokenizer.
            drugs: Another column, one drug per cell, or None for no drug token.
            gene_metadata: Another gene table.
            hidden_layer: Layer whose output is taken.

        Returns:
            `(cells, width)` float32.
        """
        tokenizer = tokenizer or self.tokenizer
        path = self.folder / "trial.parquet"
        pq.write_table(self.cells if cells is None else cells, path)
        opened = open_cells(path, tokenizer, GeneOptions(gene_metadata=gene_metadata or self.gene_metadata))
        options = EncodeOptions(tokenizer, self.drugs if drugs == "" else drugs, self.seed, "pad")
        encoder = CellEncoder(
            self.model if model is None else model, tokenizer, dtype="float32", hidden_layer=hidden_layer, **self.run
        )
        return embed_input(encoder, ChunkEncoder(opened, options))[0]

    # Other assumptions ------------------------------------------------------------------------------

    def with_settings(self, **settings: Any) -> TahoeX1Tokenizer:
        """Return a copy of the tokenizer with other settings."""
        tokenizer = copy.copy(self.tokenizer)
        for name, value in settings.items():
            setattr(tokenizer, name, value)
        return tokenizer

    def without_final_norm(self) -> Any:
        """Return the model without its final norm."""
        inner = self.model.base_model
        return cut_after(inner, inner.config.num_hidden_layers)

    def pooled_by_mean(self) -> Any:
        """Return the model with the mean over all tokens as embedding of the cell."""
        twin: Any = copy.copy(self.model.base_model)
        twin.config = copy.deepcopy(self.model.config)
        twin.config.cell_pooling = "mean"
        return twin

    def with_drugs_moved(self, step: int) -> list[str | None]:
        """Return for each cell the drug whose row in the drug table is so many rows further, in a circle."""
        assert self.tokenizer.drug_table is not None
        ids = self.tokenizer.drug_table.ids
        names = {number: name for name, number in ids.items() if number}
        order = sorted(names)
        place = {number: at for at, number in enumerate(order)}
        found = [self.tokenizer.drug_table.find(name) for name in self.names]
        return [names[order[(place[number] + step) % len(order)]] if number else None for number in found]

    def gene_table(self, how: str) -> str:
        """Write another gene table, and return its path.

        Args:
            how: `"ids"`, the numbers of the cells are ids of the vocabulary; `"+1"` or `"-1"`, the genes stand a row
                further or before; `"shuffled"`, at random.
        """
        with open_table(self.gene_metadata, self.folder) as reader:
            table = pa.Table.from_batches(list(reader.batches(0, reader.num_cells, ["token_id", "ensembl_id"])))
        numbers, genes = table["token_id"].to_numpy(), np.array(table["ensembl_id"].to_pylist(), dtype=object)
        if how == "ids":
            by_id = {number: token for token, number in self.tokenizer.get_vocab().items()}
            genes = np.array([by_id.get(number, "none") for number in numbers.tolist()], dtype=object)
        elif how == "shuffled":
            genes = np.random.default_rng(_SEED).permutation(genes)
        else:
            genes = np.roll(genes, int(how))
        path = self.folder / f"genes_{how}.parquet"
        pq.write_table(pa.table({"token_id": numbers, "ensembl_id": genes.tolist()}), path)
        return str(path)

    def with_counts_shuffled(self) -> pa.Table:
        """Return the cells with the counts of each shuffled among its genes."""
        random = np.random.default_rng(_SEED)
        counts = [[row[0], *random.permutation(row[1:]).tolist()] for row in self.cells[COUNTS].to_pylist()]
        place = self.cells.schema.get_field_index(COUNTS)
        return self.cells.set_column(place, COUNTS, pa.array(counts, self.cells.schema.field(COUNTS).type))

    def num_genes(self) -> np.ndarray:
        """Return the number of genes of each cell, `<cls>` left out."""
        return np.array([len(row) - 1 for row in self.cells[GENES]])

    def fits(self) -> np.ndarray:
        """Return whether each cell fits into the context with `<cls>` and `<drug>`."""
        context = self.tokenizer.context_length
        return np.ones(self.cells.num_rows, dtype=bool) if context is None else self.num_genes() <= context - 2
