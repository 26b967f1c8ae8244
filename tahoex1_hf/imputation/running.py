# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Write expected expression into a layer of a copy of a file; a run that was stopped is resumed."""

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tahoex1_hf.cells.encoding import CHUNK_CELLS, EncodeOptions
from tahoex1_hf.cells.gene_symbols import Table
from tahoex1_hf.cells.genes import GeneOptions, known_symbols
from tahoex1_hf.cells.opening import Source, open_cells
from tahoex1_hf.cells.readers.base import CellInput
from tahoex1_hf.common.digests import tokenizer_digest, weights_digest
from tahoex1_hf.common.locks import RunLock
from tahoex1_hf.common.progress import progress_bar
from tahoex1_hf.common.reading import reading
from tahoex1_hf.embedding.shards import ShardFolder
from tahoex1_hf.hub.models import expression_decoder, model_and_tokenizer, model_name, without_peft
from tahoex1_hf.imputation.held_out import METRICS, HeldOutTest, run_test
from tahoex1_hf.imputation.layer import LayerWriter
from tahoex1_hf.imputation.targets import TargetPredictor
from tahoex1_hf.imputation.units import as_counts, check_unit, unit_name
from tahoex1_hf.inference.chunks import with_settings
from tahoex1_hf.inference.encoder import CellEncoder, Dtype
from tahoex1_hf.inference.expression import ExpressionPredictor
from tahoex1_hf.inference.provenance import provenance
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1PreTrainedModel
from tahoex1_hf.perturbation.cells import PerturbationBatch, PerturbationEncoder
from tahoex1_hf.perturbation.plan import GeneNames
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)

LAYER = "tahoe_x1_expected"
_PART_CHUNKS = 8  # chunks of cells in a file of an unfinished run


def check_files(cells: Path, output: Path, layer_added: str) -> None:
    """Raise an error before any work is done if the files cannot be read or written.

    Raises:
        FileNotFoundError: If the cells do not exist.
        ValueError: For other files than `.h5ad`, for a folder that does not exist, and for the name of a layer that
            files cannot have.
    """
    if not cells.exists():
        raise FileNotFoundError(f"{cells} does not exist.")
    for name, path in (("input", cells), ("output", output)):
        if path.suffix != ".h5ad":
            raise ValueError(f"The {name} must be an .h5ad file, got {path.name!r}.")
    if not output.parent.is_dir():
        raise ValueError(f"The output's folder {output.parent} does not exist.")
    if not layer_added or "/" in layer_added:
        raise ValueError(f"layer_added={layer_added!r} (--layer-added): .h5ad files take a slash for a folder.")


def impute_file(
    cells: str | Path,
    output: str | Path,
    model: TahoeX1PreTrainedModel | str | Path,
    tokenizer: TahoeX1Tokenizer | None = None,
    *,
    genes: Sequence[str] | None = None,
    unit: str = "model",
    layer_added: str = LAYER,
    report: str | Path | None = None,
    size: str | None = None,
    revision: str | None = None,
    layer: str | None = None,
    gene_id_column: str | None = None,
    gene_symbols: Table | str | Path | None = None,
    species: str = "human",
    orthologs: Mapping[str, Sequence[str]] | str | Path | None = None,
    drugs: str | None = None,
    unknown_drugs: str | None = None,
    max_length: int | None = None,
    seed: int = 0,
    batch_tokens: int | None = None,
    device: str | torch.device | None = None,
    dtype: Dtype = "auto",
    restart: bool = False,
    progress: bool = True,
) -> HeldOutTest | None:
    """Write the expected expression of genes into a layer of a copy of an `.h5ad` file.

    A gene is hidden from the model while it is predicted. Without `genes`, each gene that a cell expresses is
    predicted from the half of the cell that it is not in, and the layer has values where the counts have. With
    `genes`, these are predicted in every cell, expressed or not. Before that, the model is tested on held-out genes of
    some of the cells; a report says whether it beats each gene's mean and kNN smoothing.

    Args:
        cells: `.h5ad` file with raw counts, which may be larger than memory.
        output: `.h5ad` file to write, the input with the layer added; may be the input.
        model: As in `embed_anndata`; it must have its pretraining head.
        tokenizer: As in `embed_anndata`.
        genes: Genes to predict in every cell, by Ensembl id or a name in var; by default each cell's own.
        unit: `"model"` for what the model predicts, in most models bins of the cell's own counts, 1 to 50; `"counts"`
            for the count that stands at that place among the cell's own, which is not the model's own unit.
        layer_added: Name of the layer, and of the record in `uns`.
        report: Folder for the test's report; by default the output's name followed by `.imputation`.
        size: As in `embed_anndata`.
        revision: As in `embed_anndata`.
        layer: As in `embed_anndata`.
        gene_id_column: As in `embed_anndata`.
        gene_symbols: As in `embed_anndata`.
        species: As in `embed_anndata`.
        orthologs: As in `embed_anndata`.
        drugs: As in `embed_files`.
        unknown_drugs: As in `embed_anndata`.
        max_length: As in `embed_anndata`.
        seed: Seed of halves, samples and test cells.
        batch_tokens: As in `embed_anndata`.
        device: As in `embed_anndata`.
        dtype: As in `embed_anndata`.
        restart: Whether to discard the files of an unfinished run with other settings.
        progress: Whether to show a progress bar.

    Returns:
        The result of the test; None if there are too few cells for one.

    Raises:
        FileNotFoundError: If a file or a model does not exist.
        ValueError: If files, genes or arguments cannot be used; the message says what to do.
    """
    cells, output = Path(cells), Path(output)
    check_files(cells, output, layer_added)
    check_unit(unit)
    loaded, tokenizer = model_and_tokenizer(model, tokenizer, size=size, revision=revision, expression=True)
    used = without_peft(loaded)
    decoder = expression_decoder(used)
    options = EncodeOptions(with_settings(tokenizer, max_length, None), drugs, seed, unknown_drugs)
    place = GeneOptions(gene_id_column, gene_symbols, layer, species=species, orthologs=orthologs)
    parts = ShardFolder(f"{output}.parts")
    opened = open_cells(
        Source(str(cells), "anndata"), options.tokenizer, place, spool=Path(parts.location) / "by_cell"
    )
    _check_input(opened, layer_added)
    encoder = CellEncoder(used, options.tokenizer, batch_tokens=batch_tokens, device=device, dtype=dtype)
    if not restart:
        encoder.go_on_as(parts.recorded())
    source = PerturbationEncoder(opened, options)
    tokens = None
    if genes is not None:
        tokens = np.array(GeneNames(source, known_symbols(options.tokenizer, place)).tokens(genes), dtype=np.int64)
    run = _Run(source, TargetPredictor(ExpressionPredictor(encoder, decoder), seed), tokens, unit, parts)
    identity = run.identity(weights_digest(loaded), {"layer": layer, "drugs": drugs, "batch_tokens": batch_tokens})
    folder = output.with_name(f"{output.name}.imputation") if report is None else Path(report)
    with ExitStack() as stack:
        stack.enter_context(RunLock(f"{parts.location}.lock", output, "output"))
        parts.claim(identity, restart, {"compiled_attention": False})
        stack.callback(run.forget_nothing_done)
        with reading(opened.path):
            opened.sort_by_cell()
        test = run_test(source, run.targets, cells.stem, seed)
        words = unit_name(unit, options.tokenizer)
        verdicts = _report(test, folder, words, unit_name("model", options.tokenizer))
        run.predict(progress)
        opened.check_unchanged()
        record = provenance(model_name(model, loaded), encoder, options, [opened], 0)
        del record["cells_without_known_genes"], record["normalized"]
        record |= {"unit": words, "genes": "own" if genes is None else ",".join(genes), "verdicts": verdicts}
        run.write(cells, output, layer_added, record)
        parts.remove()
    return test


def _check_input(cells: CellInput, layer_added: str) -> None:
    if not cells.own_genes:
        raise ValueError(
            f"{cells.path}: the counts are those of raw, whose genes are not those of var, so a layer cannot hold "
            "them: write adata.raw.to_adata() to a file."
        )
    if cells.counts_from == f"layers/{layer_added}":
        raise ValueError(
            f"layer_added={layer_added!r} (--layer-added) holds the counts of {cells.path}: name another."
        )


class _Run:
    """A run over the cells of a file, which keeps what it has predicted in files until all is done."""

    def __init__(
        self,
        source: PerturbationEncoder,
        targets: TargetPredictor,
        tokens: np.ndarray | None,
        unit: str,
        parts: ShardFolder,
    ):
        self.source, self.targets, self.tokens, self.unit, self.parts = source, targets, tokens, unit, parts
        found = source.genes.token_ids
        self.column_of = np.full(source.num_tokens, -1)
        known = np.flatnonzero(found >= 0)[::-1]
        self.column_of[found[known]] = known  # the first column of a token is written last

    def identity(self, weights: Any, more: Mapping[str, Any]) -> dict[str, Any]:
        """Return all that decides the result."""
        cells, options = self.source.cells, self.source.options
        return {
            "cells": [[cells.path, cells.fingerprint, cells.num_cells]],
            "weights": weights,
            "tokenizer": tokenizer_digest(options.tokenizer),
            "max_length": options.tokenizer.context_length,
            "genes": None if self.tokens is None else self.tokens.tolist(),
            "columns": self.source.genes.token_ids.tolist(),
            "unit": self.unit,
            "seed": options.seed,
            "unknown_drugs": options.unknown_drugs,
            "dtype": self.targets.predictor.encoder.dtype_name,
            "compiled_attention": self.targets.predictor.encoder.attention == "compiled",
            **more,
        }

    def _pieces(self) -> Iterator[tuple[int, int, str]]:
        step = _PART_CHUNKS * CHUNK_CELLS
        for start in range(0, self.source.cells.num_cells, step):
            stop = min(start + step, self.source.cells.num_cells)
            yield start, stop, f"cells-{start:012d}-{stop:012d}.npz"

    def predict(self, progress: bool) -> None:
        """Predict what no file of the folder has yet."""
        done = set(self.parts.names())
        total = sum(stop - start for start, stop, name in self._pieces() if name not in done)
        with progress_bar(progress, total=total, unit="cell", desc="Predicting") as bar:
            for start, stop, name in self._pieces():
                if name in done:
                    continue
                found = []
                for batch in self.source.stream(start, stop):
                    self.source.check(batch)
                    found.append(self._predict(batch))
                    bar.update(batch.num_cells)
                lengths, columns, values = (np.concatenate(each) for each in zip(*found, strict=True))
                buffer = io.BytesIO()
                np.savez(buffer, lengths=lengths, columns=columns, values=values)
                self.parts.write_file(name, buffer.getvalue())

    def _predict(self, batch: PerturbationBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the number of values of each cell, their columns, rising, and the values."""
        rows = batch.rows
        if self.tokens is None:
            owners, tokens, lengths = rows.cells(), rows.tokens, np.diff(rows.offsets)
            values = self.targets.own_genes(batch)
        else:
            owners = np.repeat(np.arange(batch.num_cells), len(self.tokens))
            tokens = np.tile(self.tokens, batch.num_cells)
            lengths = np.full(batch.num_cells, len(self.tokens))
            values = self.targets.asked_genes(batch, self.tokens).ravel()
        if self.unit == "counts":
            values = as_counts(values, owners, rows, self.source.tokenizer)
        columns = self.column_of[tokens]
        order = np.lexsort((columns, owners))
        return lengths, columns[order].astype(np.int32), values[order]

    def forget_nothing_done(self) -> None:
        """Remove the folder if nothing in it is worth keeping."""
        if not any(name.startswith("cells-") for name in self.parts.names()):
            self.parts.remove()

    def write(self, cells: Path, output: Path, layer: str, record: dict[str, Any]) -> None:
        """Write the output from the files of the folder."""
        shape = self.source.cells.num_cells, len(self.source.genes.token_ids)
        with reading(str(cells)), LayerWriter(cells, output, layer, shape) as writer:
            for _, _, name in self._pieces():
                with self.parts.open(name) as file, np.load(io.BytesIO(file.read()), allow_pickle=False) as part:
                    writer.write(part["lengths"], part["columns"], part["values"])
            self.source.cells.check_unchanged()
            writer.finish(record)


def _report(test: HeldOutTest | None, folder: Path, unit: str, model_unit: str) -> str:
    """Write the report of the test, and return the verdicts."""
    if test is None:
        logger.warning("There are too few cells for a test on held-out genes: nothing says what the layer is worth.")
        return "not tested: too few cells"
    folder.mkdir(parents=True, exist_ok=True)
    table = test.report.markdown(METRICS, corner="predictor")
    text = "\n\n".join(
        [
            "# Expected expression of held-out genes",
            f"Half of the genes of {test.report.scores[0].n} cells were hidden. Means over the cells, with 95 % "
            f"intervals over them. The squared error is in {model_unit}, at genes that the cell expresses; the last "
            f"column tells hidden genes from as many that the cell does not express. The layer is in {unit}.",
            table,
            "\n".join(f"- {verdict}" for verdict in test.verdicts),
        ]
    )
    facts = {"task": "imputation", "unit": unit, "verdicts": test.verdicts}
    test.report.write(folder, facts, text + "\n", "mse", f"squared error at held-out genes, {model_unit}")
    logger.info("%s", text)
    return " ".join(test.verdicts)
