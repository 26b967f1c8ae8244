# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Predictions of a fine-tuned model for the cells of an AnnData or of a file, in bounded memory."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from tahoex1_hf.cells.encoding import EncodeOptions
from tahoex1_hf.cells.gene_symbols import Table
from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.cells.opening import Source, check_writable, open_cells
from tahoex1_hf.cells.readers.base import CellInput
from tahoex1_hf.common.progress import progress_bar
from tahoex1_hf.common.reading import reading
from tahoex1_hf.finetuning.cells.labelled import SAMPLE_SEED
from tahoex1_hf.finetuning.cells.prediction_output import PredictionWriter, deviation_column
from tahoex1_hf.finetuning.cells.predictor import CellPredictor, Predictor, load_predictor, with_overflow
from tahoex1_hf.inference.encoder import Dtype
from tahoex1_hf.inference.provenance import provenance
from tahoex1_hf.runs.new_drugs import SmilesTable, with_new_drugs
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    from anndata import AnnData
    from peft import PeftModel


def predict_anndata(
    adata: "AnnData",
    model: "str | Path | PreTrainedModel | PeftModel | Predictor",
    *,
    tokenizer: TahoeX1Tokenizer | None = None,
    base: str | Path | None = None,
    size: str | None = None,
    layer: str | None = None,
    gene_id_column: str | None = None,
    gene_symbols: Table | str | Path | None = None,
    species: str = "human",
    orthologs: Mapping[str, Sequence[str]] | str | Path | None = None,
    drugs: str | None = None,
    unknown_drugs: str | None = None,
    drug_table: SmilesTable | None = None,
    overflow: str | None = None,
    draws: int = 1,
    batch_tokens: int | None = None,
    device: str | torch.device | None = None,
    dtype: Dtype = "auto",
    progress: bool = True,
) -> str:
    """Write a fine-tuned model's predictions for cells into `adata`.

    The predicted classes or numbers go into `adata.obs["tahoex1_<label>"]`; for classes the probabilities go into
    `adata.obsm["tahoex1_<label>_probabilities"]`, one column per class in the order of
    `adata.uns["tahoex1_<label>"]["classes"]`. Cells without a gene that the model knows are predicted from the `<cls>`
    token alone; `uns` counts them. For files larger than memory use `predict_files`.

    Args:
        adata: Cells with raw counts, in memory or backed.
        model: Folder or Hub id of an adapter, or of a model that was fine-tuned as a whole; or a loaded model.
        tokenizer: Tokenizer of a loaded model; by default the one in the model's folder or repository.
        base: Folder or Hub id of an adapter's base; by default the one that the adapter names.
        size: Name of the size to load, such as `"70m"`, where the base, or the model, is one of several in a folder or
            repository; by default the size that the adapter names.
        layer: Layer with the counts. Here and in `gene_id_column` and `drugs`, None means the setting of the training,
            and "" the default (`adata.X`).
        gene_id_column: Column of `adata.var` with Ensembl ids; the default is `adata.var_names`.
        gene_symbols: Gene symbol -> Ensembl id, or the path of a table with both, for genes named by symbol, by
            default the package's table.
        species: "human" or "mouse"; genes of a mouse need `orthologs`.
        orthologs: Mouse gene -> Ensembl ids of human orthologues, or the path of a table.
        drugs: For models with a drug encoder: a column of `adata.obs`, or one drug for all cells.
        unknown_drugs: As in `embed_anndata`; by default as the model was trained, or `"error"`.
        drug_table: As in `embed_anndata`: drugs that the model's table lacks, and their SMILES.
        overflow: Choice of the genes of a cell longer than the context, `"sample"`, `"highest"` or `"first"`, as in
            `embed_anndata`; by default as the model was trained.
        draws: Number of samples of each cell longer than the context. With more than one, a prediction is the mean of
            the numbers, or of the probabilities, over the samples, and `adata.obs["tahoex1_<label>_sd"]` says how far
            that of one sample lies from it: the root of the variances over the samples, summed over the classes. It
            is 0 for cells that fit.
        batch_tokens: Most tokens of a batch; changes speed and memory, not the result.
        device: Device to compute on; by default the fastest there is.
        dtype: Precision of the matrix products, as in `embed_anndata`.
        progress: Whether to show a progress bar.

    Returns:
        Name of the column of `adata.obs`.

    Raises:
        FileNotFoundError: For a model that cannot be found.
        ValueError: For counts, genes or arguments that cannot be used; the message says what to do.
    """
    check_writable(adata)
    predictor = with_overflow(load_predictor(model, base, tokenizer, size), overflow)
    options, drugs = _settings(predictor, layer, gene_id_column, drugs)
    predictor, new_drugs = _with_new_drugs(predictor, drug_table, drugs)
    ready = CellPredictor(predictor, batch_tokens=batch_tokens, device=device, dtype=dtype)
    options = replace(options, gene_symbols=gene_symbols, species=species, orthologs=orthologs)
    encoding = _encoding(predictor, ready, drugs, unknown_drugs, draws)
    cells = open_cells(adata, ready.tokenizer, options)
    width = () if ready.classes is None else (ready.head_width,)
    outputs = np.empty((cells.num_cells, *width), dtype=np.float32)
    deviations, num_empty = np.zeros(cells.num_cells, dtype=np.float32), 0
    with progress_bar(progress, total=cells.num_cells, unit="cell", desc="Predicting") as bar:
        for chunk, predictions, spread in ready.predict_chunks(cells, encoding, bar.update):
            outputs[chunk.cell_numbers], deviations[chunk.cell_numbers] = predictions, spread
            num_empty += len(chunk.empty_cells)
    if draws > 1:
        adata.obs[deviation_column(predictor.column)] = deviations
    _add_predictions(adata, predictor, outputs, _provenance(predictor, ready, encoding, cells, num_empty) | new_drugs)
    return predictor.column


def _add_predictions(adata: "AnnData", predictor: Predictor, outputs: np.ndarray, facts: dict[str, Any]) -> None:
    """Put probabilities or numbers, and their provenance, into the slots of `adata`."""
    import pandas as pd

    column, classes = predictor.column, predictor.classes
    if classes is None:
        adata.obs[column] = outputs
    else:
        adata.obs[column] = pd.Categorical.from_codes(outputs.argmax(1), categories=classes)
        adata.obsm[f"{column}_probabilities"] = outputs
        facts = {"classes": np.array(classes, dtype=object), **facts}
    adata.uns[column] = facts


def predict_files(
    source: str | Path,
    output: str | Path,
    model: "str | Path | PreTrainedModel | PeftModel | Predictor",
    *,
    tokenizer: TahoeX1Tokenizer | None = None,
    base: str | Path | None = None,
    size: str | None = None,
    layer: str | None = None,
    gene_id_column: str | None = None,
    gene_symbols: Table | str | Path | None = None,
    species: str = "human",
    orthologs: Mapping[str, Sequence[str]] | str | Path | None = None,
    drugs: str | None = None,
    unknown_drugs: str | None = None,
    drug_table: SmilesTable | None = None,
    overflow: str | None = None,
    draws: int = 1,
    batch_tokens: int | None = None,
    device: str | torch.device | None = None,
    dtype: Dtype = "auto",
    progress: bool = True,
) -> str:
    """Write a file's cells together with a fine-tuned model's predictions for them.

    The output is the input plus the slots that `predict_anndata` writes.

    Args:
        source: `.h5ad` file with raw counts; read piece by piece, and left as it is.
        output: `.h5ad` file to write, which may be the source. It appears when it is complete.
        model: As in `predict_anndata`, like all arguments below.
        tokenizer: Tokenizer of a loaded model.
        base: Folder or Hub id of an adapter's base.
        size: Name of the size of the base, or the model, where there are several.
        layer: Layer with the counts.
        gene_id_column: Column of `var` with Ensembl ids.
        gene_symbols: Gene symbol -> Ensembl id, or the path of a table with both.
        species: "human" or "mouse".
        orthologs: Mouse gene -> Ensembl ids of human orthologues, or the path of a table.
        drugs: Column of `obs` with drugs, or one drug for all cells.
        unknown_drugs: `"pad"` or `"error"`.
        drug_table: Drugs that the model's table lacks, and their SMILES.
        overflow: Choice of the genes of a cell longer than the context.
        draws: Number of samples of each cell longer than the context.
        batch_tokens: Most tokens of a batch.
        device: Device to compute on.
        dtype: Precision of the matrix products.
        progress: Whether to show a progress bar.

    Returns:
        Name of the column of `obs`.

    Raises:
        FileNotFoundError: For a source or a model that cannot be found.
        ValueError: For files and arguments that cannot be used; the message says what to do.
    """
    source, output = Path(source), Path(output)
    check_files(source, output)
    predictor = with_overflow(load_predictor(model, base, tokenizer, size), overflow)
    options, drugs = _settings(predictor, layer, gene_id_column, drugs)
    predictor, new_drugs = _with_new_drugs(predictor, drug_table, drugs)
    ready = CellPredictor(predictor, batch_tokens=batch_tokens, device=device, dtype=dtype)
    options = replace(options, gene_symbols=gene_symbols, species=species, orthologs=orthologs)
    encoding = _encoding(predictor, ready, drugs, unknown_drugs, draws)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as spool:
        cells = open_cells(Source(str(source), "anndata"), ready.tokenizer, options, spool=spool)
        with reading(source):
            cells.sort_by_cell()
        writer = PredictionWriter(
            source, output, predictor.column, cells.num_cells, predictor.classes, with_deviations=draws > 1
        )
        try:
            num_empty = _write_predictions(writer, ready, cells, encoding, progress)
            cells.check_unchanged()
            writer.finish(_provenance(predictor, ready, encoding, cells, num_empty) | new_drugs)
        except BaseException:
            writer.abandon()
            raise
    return predictor.column


def _write_predictions(
    writer: PredictionWriter, ready: CellPredictor, cells: CellInput, encoding: EncodeOptions, progress: bool
) -> int:
    """Write the predictions of all cells; return the number of cells without a known gene."""
    num_empty = 0
    with progress_bar(progress, total=cells.num_cells, unit="cell", desc="Predicting") as bar:
        for chunk, predictions, spread in ready.predict_chunks(cells, encoding, bar.update):
            writer.write(predictions, spread)
            num_empty += len(chunk.empty_cells)
    return num_empty


def check_files(source: Path, output: Path) -> None:
    """Check that the files can be read and written, before any work is done.

    Raises:
        FileNotFoundError: For a source that does not exist.
        ValueError: For files other than `.h5ad`, and an output whose folder does not exist.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist.")
    for name, path in (("input", source), ("output", output)):
        if path.suffix != ".h5ad":
            raise ValueError(f"The {name} must be an .h5ad file, got {path.name!r}.")
    if not output.parent.is_dir():
        raise ValueError(f"The output's folder {output.parent} does not exist.")


def _settings(predictor: Predictor, *settings: str | None) -> tuple[GeneOptions, str | None]:
    """Return the places of genes and counts, and the drugs; None means as in the training, "" means no setting."""
    layer, gene_id_column, drugs = (
        (predictor.record.get(name) if given is None else given) or None
        for name, given in zip(("layer", "gene_id_column", "drugs"), settings, strict=True)
    )
    return GeneOptions(gene_id_column, layer=layer), drugs


def _with_new_drugs(
    predictor: Predictor, table: SmilesTable | None, drugs: str | None
) -> tuple[Predictor, dict[str, Any]]:
    """Return a predictor that knows the drugs of a table, and what to note of it in `uns`."""
    model, tokenizer, new = with_new_drugs(predictor.model, predictor.tokenizer, table, drugs)
    if new is None:
        return predictor, {}
    return replace(predictor, model=model, tokenizer=tokenizer), new.provenance()


def _encoding(
    predictor: Predictor, ready: CellPredictor, drugs: str | None, unknown_drugs: str | None, draws: int
) -> EncodeOptions:
    rule = unknown_drugs or predictor.record.get("unknown_drugs") or "error"
    return EncodeOptions(ready.tokenizer, drugs, SAMPLE_SEED, rule, draws)


def _provenance(
    predictor: Predictor, ready: CellPredictor, encoding: EncodeOptions, cells: CellInput, num_empty: int
) -> dict[str, Any]:
    name = str(predictor.record.get("model") or predictor.name)
    facts = provenance(name, ready.encoder, encoding, [cells], num_empty)
    del facts["normalized"]  # the head reads embeddings as they are
    return {"adapter": predictor.name, "label": str(predictor.record.get("label") or ""), **facts}
