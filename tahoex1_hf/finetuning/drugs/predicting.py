# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Predicted responses to drugs, from control cells in memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tahoex1_hf.cells.gene_symbols import Table
from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.cells.opening import open_cells
from tahoex1_hf.encoding_tahoe_x1 import GeneRows
from tahoex1_hf.finetuning.drugs.objective import decode_change, inner_model
from tahoex1_hf.hub.adapters import find_adapter, load_adapter, read_record
from tahoex1_hf.inference.encoder import CellEncoder
from tahoex1_hf.padding_tahoe_x1 import EncodedCells
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

_ENCODED_CELLS = 1024  # cells encoded at a time


@torch.inference_mode()
def mean_embedding(encoder: CellEncoder, cells: EncodedCells) -> torch.Tensor:
    """Return the mean of the cell embeddings, not normalised: `(width,)` float64."""
    total = torch.zeros(encoder.width, dtype=torch.float64)
    for _, pooled in encoder.pooled_batches(cells):
        total += pooled.double().sum(dim=0).cpu()
    return total / cells.num_cells


@torch.no_grad()
def predict_drug_response(
    adapter: str | Path,
    controls: "AnnData",
    drugs: list[str],
    base: str | Path | None = None,
    *,
    size: str | None = None,
    gene_symbols: Table | str | Path | None = None,
    species: str = "human",
    orthologs: Mapping[str, Sequence[str]] | str | Path | None = None,
) -> "pd.DataFrame":
    """Predict the changes that drugs make in a population of cells.

    Args:
        adapter: Folder or Hub id of a model trained with `task=drug_response`.
        controls: Untreated cells of one context, with raw counts; all of them are used.
        drugs: Names in the tokenizer's drug table; also the control, which changes nothing.
        base: Folder or Hub id of the base; by default the one that the adapter names.
        size: Name of the base's size, where a folder or repository holds several.
        gene_symbols: Gene symbol -> Ensembl id, or the path of a table with both; by default the package's table.
        species: "human" or "mouse"; genes of a mouse need `orthologs`.
        orthologs: Mouse gene -> Ensembl ids of human orthologues, or the path of a table.

    Returns:
        Drugs x genes (Ensembl ids): change of the mean of log(1 + counts per 10,000).

    Raises:
        ValueError: For an adapter of another task, and for unknown drugs.
    """
    import pandas as pd

    folder = find_adapter(adapter)
    record = read_record(folder)
    if record.get("task") != "drug_response":
        raise ValueError(f"adapter={adapter} was trained for {record.get('task')}, not for drug_response.")
    loaded, tokenizer = load_adapter(folder, base, size=size)
    model = inner_model(loaded)
    encoder = CellEncoder(model, tokenizer, dtype="float32")
    options = GeneOptions(
        record.get("gene_id_column"), gene_symbols, record.get("layer"), species=species, orthologs=orthologs
    )
    source = open_cells(controls, tokenizer, options)
    vocabulary = tokenizer.get_vocab()
    genes = torch.tensor([vocabulary[gene] for gene in record["response_genes"]], device=encoder.device)

    def mean(drug_id: int) -> torch.Tensor:
        total = torch.zeros(encoder.width, dtype=torch.float64)
        for chunk in source.chunks(0, source.num_cells, _ENCODED_CELLS):
            cells = _with_drug(tokenizer, chunk, drug_id)
            total += mean_embedding(encoder, cells) * cells.num_cells
        return total / source.num_cells

    control, control_id = str(record["control"]).strip(), int(record["control_id"])
    known = [drug for drug in drugs if drug.strip() != control]  # the drug table need not hold the control
    numbers = iter(tokenizer.drug_ids(known, len(known), unknown_drugs="error").tolist())
    ids = [control_id if drug.strip() == control else next(numbers) for drug in drugs]
    untreated = mean(control_id)
    differences = torch.stack([mean(drug) - untreated for drug in ids]).float().to(encoder.device)
    changes = decode_change(model, differences, genes).float().cpu().numpy()
    return pd.DataFrame(changes, index=list(drugs), columns=record["response_genes"])


def _with_drug(tokenizer: TahoeX1Tokenizer, rows: GeneRows, drug_id: int) -> EncodedCells:
    ids = np.full(len(rows.offsets) - 1, drug_id, dtype=np.int64)
    return tokenizer.encode_rows(rows, drug_ids=ids)
