# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The pipeline "cell-embedding" of transformers: an AnnData in, an array of cell embeddings out.

This file travels to the Hugging Face Hub beside the weights: it imports only numpy, torch, transformers and the files
that travel with it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Pipeline
from transformers.dynamic_module_utils import custom_object_save

from .inputs_tahoe_x1 import are_pairs, cell_pieces, is_one_cell
from .padding_tahoe_x1 import EncodedCells, report_empty

_BATCH_CELLS = 8
# Matrix elements read at once: bounds the memory of a dense or backed matrix to about 128 MB of float32.
_CHUNK_ELEMENTS = 2**25


class TahoeX1CellEmbeddingPipeline(Pipeline):
    """Embed cells: `pipeline(model=name, trust_remote_code=True)(adata)`.

    The embeddings are those of `tahoex1_hf.embed_anndata`, in float32 but for the last digits. That function also
    finds genes and counts by itself, and needs no padding; `embed_files` works on files larger than memory.
    """

    _load_tokenizer = True  # type: ignore[assignment]
    _load_processor = _load_image_processor = _load_feature_extractor = False  # type: ignore[assignment]
    _load_video_processor = False  # type: ignore[assignment]

    def __call__(  # type: ignore[override]
        self, inputs: Any, *, batch_size: int | None = None, num_workers: int | None = None, **settings: Any
    ) -> Any:
        """Embed cells.

        Args:
            inputs: An AnnData with raw counts; a `(cells, genes)` matrix of counts, with `gene_ids=`; a list of
                (genes, counts) pairs, or one pair; or a list of AnnDatas.
            batch_size: Number of cells that go through the model together, 8 by default; changes last digits only.
            num_workers: Not used.
            **settings: `gene_ids`, `gene_id_column`, `layer`, `gene_symbols`, `drugs` and `seed` of the tokenizer.

        Returns:
            `(cells, width)` float32, rows of length 1; for a list of AnnDatas a list of them.

        Raises:
            TypeError, ValueError: As the tokenizer, for cells and settings that cannot be used.
        """
        if isinstance(inputs, (list, tuple)) and inputs and all(hasattr(part, "var_names") for part in inputs):
            return [self(part, batch_size=batch_size, **settings) for part in inputs]
        cells = batch_size or self._batch_size or _BATCH_CELLS
        wanted = {**self._preprocess_params, **self._sanitize_parameters(**settings)[0]}
        parts = [self._embed(encoded, cells) for encoded in self.preprocess(inputs, **wanted)]
        return np.concatenate(parts)

    def _sanitize_parameters(self, **settings: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        settings.pop("local_files_only", None)  # of `transformers.pipeline`, which passes it on
        unknown = set(settings) - {"gene_ids", "gene_id_column", "layer", "gene_symbols", "drugs", "seed"}
        if unknown:
            raise TypeError(f"The pipeline cell-embedding has no setting {', '.join(map(repr, sorted(unknown)))}.")
        return settings, {}, {}

    def preprocess(  # type: ignore[override]
        self,
        inputs: Any,
        gene_ids: Any = None,
        gene_id_column: str | None = None,
        layer: str | None = None,
        gene_symbols: Any = None,
        drugs: Any = None,
        seed: int = 0,
    ) -> Iterator[EncodedCells]:
        """Tokenize cells, piece by piece; the arguments are those of the call."""
        tokenizer: Any = self.tokenizer
        genes = None
        if hasattr(inputs, "var_names"):
            drugs = tokenizer.resolve_drugs(inputs, drugs)
            inputs, genes = tokenizer.read_anndata(inputs, gene_id_column, layer, gene_symbols)
        elif hasattr(inputs, "shape"):
            if gene_ids is None:
                raise ValueError("gene_ids= is missing: pass the Ensembl id of every column of the matrix.")
            genes = tokenizer.match_genes(gene_ids, gene_symbols=gene_symbols)
        elif is_one_cell(inputs):
            inputs = [inputs]
        elif not are_pairs(inputs):
            raise TypeError("The pipeline cell-embedding embeds cells: pass an AnnData, or what its tokenizer takes.")
        num_cells = len(inputs) if genes is None else inputs.shape[0]
        drug_ids = None if drugs is None else tokenizer.drug_ids(drugs, num_cells)
        done = 0
        for rows, repeats in cell_pieces(inputs, genes, tokenizer._vocabulary, gene_symbols, _CHUNK_ELEMENTS):
            stop = done + len(rows.offsets) - 1
            given = None if drug_ids is None else drug_ids[done:stop]
            yield tokenizer.encode_rows(rows, repeats=repeats, drug_ids=given, first_cell=done, seed=seed)
            done = stop

    def _embed(self, encoded: EncodedCells, batch_cells: int) -> np.ndarray:
        """Embed tokenized cells, those of similar length together."""
        report_empty(encoded)
        tokenizer: Any = self.tokenizer
        order = np.argsort(-encoded.lengths, kind="stable")
        embeddings = np.empty((encoded.num_cells, self.model.config.hidden_size), dtype=np.float32)
        for start in range(0, len(order), batch_cells):
            rows = order[start : start + batch_cells]
            batch = encoded.padded(rows, pad_token_id=tokenizer.pad_token_id, pad_value=tokenizer.pad_value)
            embeddings[rows] = self.postprocess(self.forward(batch))
        return embeddings

    def _forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"embeddings": self.model.base_model(**batch).pooler_output}

    def postprocess(self, outputs: dict[str, torch.Tensor]) -> np.ndarray:  # type: ignore[override]
        """Return embeddings of length 1 as an array."""
        return torch.nn.functional.normalize(outputs["embeddings"].float(), dim=1).numpy()

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save model, tokenizer and the code of both, so that `pipeline(model=save_directory)` finds all of it."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        custom_object_save(self, save_directory)
        super().save_pretrained(save_directory, **{"with_code": True, **kwargs})


__all__ = ["TahoeX1CellEmbeddingPipeline"]
