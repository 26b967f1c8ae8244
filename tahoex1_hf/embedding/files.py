# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Embedding of files of any size, with any number of processes, in a run that can be stopped and resumed.

The cells are cut into chunks (`cells/encoding.py`). Each process embeds some of the chunks and writes a shard every
half minute (`shards.py`). When all chunks are in shards, the first process writes the output from the shards. The
embeddings of a chunk depend only on its cells. The result is therefore the same, bit for bit on the same kind of
device, however often the run was stopped and however many processes took part.
"""

import logging
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tahoex1_hf.cells import encoding
from tahoex1_hf.cells.encoding import ChunkEncoder, DrugIds, EncodeOptions, report_unknown_drugs
from tahoex1_hf.cells.gene_symbols import Table
from tahoex1_hf.cells.genes import TAHOE_100M_GENES, GeneOptions
from tahoex1_hf.cells.opening import open_all
from tahoex1_hf.cells.readers.base import CellInput
from tahoex1_hf.common.cluster import ClusterOptions, connected
from tahoex1_hf.common.digests import json_digest, some_weights_digest, tokenizer_digest, weights_digest
from tahoex1_hf.common.files import naming
from tahoex1_hf.common.free_memory import give_back_memory
from tahoex1_hf.common.locks import RunLock
from tahoex1_hf.common.prefetch import prefetch_calls
from tahoex1_hf.common.processes import Processes
from tahoex1_hf.common.progress import progress_bar
from tahoex1_hf.common.reading import reading
from tahoex1_hf.embedding.making import ShardContent, make_shards
from tahoex1_hf.embedding.obs_columns import split_columns
from tahoex1_hf.embedding.on_cluster import ClusterEmbedding, Computing, Reading
from tahoex1_hf.embedding.outputs import Output, OutputOptions
from tahoex1_hf.embedding.plan import Plan, Stretch
from tahoex1_hf.embedding.scores import scorer_of
from tahoex1_hf.embedding.shards import Shard, ShardFolder
from tahoex1_hf.embedding.writers import EmbeddingWriter
from tahoex1_hf.hub.models import model_and_tokenizer, model_name, without_peft
from tahoex1_hf.inference.chunks import with_settings
from tahoex1_hf.inference.encoder import CellEncoder, Dtype, GeneMeans
from tahoex1_hf.inference.gene_embeddings import embed_genes, gene_kinds, gene_slot
from tahoex1_hf.inference.provenance import provenance, provenance_key
from tahoex1_hf.inference.scoring import CellScorer, num_masks
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1PreTrainedModel
from tahoex1_hf.runs.new_drugs import NewDrugs, SmilesTable, with_new_drugs
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)

# Values of settings that runs of earlier versions did not record.
_FORMERLY = {
    "sampled_by": "number",
    "compiled_attention": False,
    "draws": 1,
    "hidden_layer": None,
    "cell_gene_embeddings": False,
    "obs": None,
    "drug_table": None,
    "full_paths": False,
    "score_masks": 0,
}


def embed_files(
    sources: str | Path | Sequence[str | Path],
    output: str | Path,
    model: TahoeX1PreTrainedModel | str | Path,
    tokenizer: TahoeX1Tokenizer | None = None,
    *,
    size: str | None = None,
    revision: str | None = None,
    key_added: str = "X_tahoe_x1",
    layer: str | None = None,
    gene_id_column: str | None = None,
    gene_symbols: Table | str | Path | None = None,
    species: str = "human",
    orthologs: Mapping[str, Sequence[str]] | str | Path | None = None,
    gene_metadata: str | None = None,
    drugs: str | None = None,
    unknown_drugs: str | None = None,
    drug_table: SmilesTable | None = None,
    gene_embeddings: bool | str | Sequence[str] = False,
    cell_gene_embeddings: str | Path | None = None,
    obs: str | Sequence[str] | None = None,
    wide: bool = False,
    max_length: int | None = None,
    overflow: str | None = None,
    draws: int = 1,
    seed: int = 0,
    batch_tokens: int | None = None,
    device: str | torch.device | None = None,
    dtype: Dtype = "auto",
    hidden_layer: int | None = None,
    score: bool | int = False,
    restart: bool = False,
    full_paths: bool = False,
    cluster: ClusterOptions | None = None,
    progress: bool = True,
) -> None:
    """Embed the cells of files, which may be larger than memory.

    Embeddings are kept in the folder `OUTPUT.shards` until all are finished. A run that was stopped in any way is
    resumed by a call with the same arguments. Under `accelerate launch`, all processes share the work, even on several
    machines if they share a file system or the output is in an object store.

    Args:
        sources: `.h5ad` files, `.zarr` stores, 10x files, folders and globs of these, prepared datasets, and Hub
            datasets in the format of Tahoe-100M.
        output: Path that ends in `.h5ad`, `.zarr`, `.parquet` or `.npy`; the latter two may be URLs (`s3://…`). If the
            only source is an `.h5ad` file or a `.zarr` store, an output of the same kind is a copy of the source with
            the new slots. Any other `.h5ad` or `.zarr` output has cells without counts, with the columns of obs of all
            sources. A `.parquet` table has the names of the cells, the columns of `obs`, and the embedding as one
            column of lists.
        model: As in `embed_anndata`.
        tokenizer: As in `embed_anndata`.
        size: As in `embed_anndata`.
        revision: As in `embed_anndata`.
        key_added: Slot of `obsm` to write, or the name of the table's column of embeddings.
        layer: As in `embed_anndata`.
        gene_id_column: As in `embed_anndata`.
        gene_symbols: As in `embed_anndata`.
        species: As in `embed_anndata`.
        orthologs: As in `embed_anndata`.
        gene_metadata: Gene table of a dataset in the format of Tahoe-100M; by default that of Tahoe-100M on the Hub.
        drugs: Column of obs, or one drug for all cells, for models with a drug encoder.
        unknown_drugs: As in `embed_anndata`.
        drug_table: As in `embed_anndata`.
        gene_embeddings: As in `embed_anndata`; needs a single `.h5ad` or `.zarr` source and an output of its kind.
        cell_gene_embeddings: Path or URL of a `.parquet` table for each cell's contextual gene embeddings, with a row
            for every expressed gene of every cell. Its columns are `cell`, `source` (if there are several), `gene`
            (the Ensembl id), and a list column named `key_added` with the embedding, which is not normalised. A cell
            longer than the context has the genes of its first sample. During the run the table needs twice its disk
            space.
        obs: Columns of obs, as a sequence or a text with commas between the names, for an output that is not a copy
            of the source; by default none in a `.parquet`, and all in an `.h5ad` or `.zarr`. Cells of a source without
            the column have missing values.
        wide: Whether a `.parquet` has a column for each dimension, named `key_added` followed by `_0`, `_1`, ….
        max_length: As in `embed_anndata`.
        overflow: As in `embed_anndata`.
        draws: As in `embed_anndata`; the deviations are a column of obs or of the table.
        seed: As in `embed_anndata`.
        batch_tokens: As in `embed_anndata`.
        device: As in `embed_anndata`; by default, each of several processes on a machine uses a GPU of its own.
        dtype: As in `embed_anndata`.
        hidden_layer: As in `embed_anndata`.
        score: As in `embed_anndata`; the scores are columns of obs or of the table.
        restart: Whether to discard the files of an unfinished run, which may have had other arguments.
        full_paths: Whether the output names its sources by their full paths; otherwise it uses short names.
        cluster: Ray cluster whose workers read, embed and write; None for this process, or those of a launcher. The
            result is the same. Sources and output must be where all machines of the cluster see them.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If files or arguments cannot be used; the message says what to do.
        FileNotFoundError: If a source or a model does not exist.
        ImportError: If `cluster` is given and Ray is not installed.
        ClusterError: If the cluster cannot be reached, or is lost; the same call resumes the run.
    """
    paths = [str(path) for path in ([sources] if isinstance(sources, (str, Path)) else sources)]
    wanted = OutputOptions(
        str(output),
        key_added,
        gene_kinds(gene_embeddings),
        draws,
        split_columns(obs),
        wide,
        None if cell_gene_embeddings is None else str(cell_gene_embeddings),
        full_paths,
        num_masks(score),
    )
    wanted.check()
    processes = Processes.current()
    if cluster is not None and processes.count > 1:
        raise ValueError("cluster (--ray) has workers of its own: start the command without `accelerate launch`.")
    loaded, tokenizer = model_and_tokenizer(
        model, tokenizer, size=size, revision=revision, expression=wanted.score_masks > 0
    )
    used, tokenizer, new_drugs = with_new_drugs(without_peft(loaded), tokenizer, drug_table, drugs)
    options = EncodeOptions(with_settings(tokenizer, max_length, overflow), drugs, seed, unknown_drugs, draws)
    table = gene_metadata or TAHOE_100M_GENES
    genes = GeneOptions(gene_id_column, gene_symbols, layer, table, species=species, orthologs=orthologs)
    with ExitStack() as stack:
        engine = None if cluster is None else ClusterEmbedding(stack.enter_context(connected(cluster)), device, dtype)
        shards = ShardFolder(f"{wanted.path}.shards")
        spool = Path(shards.location) / "by_cell"
        if not shards.is_local:  # each machine sorts the counts by cell for itself
            spool = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        inputs = open_all(paths, options.tokenizer, genes, spool=spool)
        # Before layers are rounded. Runs of earlier versions did not record "weights", and are resumed without it.
        digests = {"model": some_weights_digest(loaded), "weights": weights_digest(loaded)}
        encoder = CellEncoder(
            used,
            options.tokenizer,
            batch_tokens=batch_tokens,
            device=(device or processes.device()) if engine is None else "cpu",
            dtype=dtype if engine is None else engine.dtype,
            hidden_layer=hidden_layer,
            sole_user=isinstance(model, (str, Path)),
            compile_attention=engine is None,  # not all machines of a cluster may have what it takes
        )
        encoder.go_on_as(None if restart else processes.from_first(shards.recorded))
        made = Output(wanted, inputs, shards, options.tokenizer, encoder.width)
        scorer = scorer_of(encoder, used, wanted.score_masks, seed)
        run = _Run(inputs, shards, encoder, options, made, new_drugs, scorer)
        identity = _identity(run, {**digests, "layer": layer})
        identity["batch_tokens"] = batch_tokens  # changes the last digits; its default depends on device and precision
        lock = RunLock(f"{shards.location}.lock" if shards.is_local else None, shards.location, "output")
        stack.callback(lock.release)
        todo = run.begin(lock, identity, restart, processes)
        if engine is not None:
            summed = inputs[0].genes if "EA" in run.kinds else None
            job = Reading.of(paths, inputs, genes, options, spool, run.content, shards)
            run.use(engine, job, engine.computing(used, batch_tokens, hidden_layer, summed, wanted.score_masks))
        run.carry_out(todo, processes, model_name(model, loaded), progress)


class _Run:
    """A run over all inputs, which claims the shards, embeds this process's chunks, and writes the output."""

    def __init__(
        self,
        inputs: Sequence[CellInput],
        shards: ShardFolder,
        encoder: CellEncoder,
        options: EncodeOptions,
        output: Output,
        new_drugs: NewDrugs | None,
        scorer: CellScorer | None,
    ):
        self.plan = Plan([ChunkEncoder(each, options) for each in inputs])
        self.shards, self.encoder, self.options = shards, encoder, options
        self.new_drugs, self.scorer = new_drugs, scorer
        self.engine: ClusterEmbedding | None = None
        self.output, self.kinds, self.cell_genes = output, output.options.kinds, output.cell_genes
        self.content = ShardContent(
            output.names, output.shard_columns, tuple(output.options.numbers), output.source_names, output.cell_genes
        )

    def use(self, engine: ClusterEmbedding, job: Reading, computing: Computing) -> None:
        """Let a cluster do the work."""
        self.engine, self.job, self.computing = engine, job, computing

    def _gene_means(self) -> GeneMeans | None:
        genes = self.plan.inputs[0].genes
        return self.encoder.gene_means(genes) if "EA" in self.kinds and genes is not None else None

    def begin(self, lock: RunLock, identity: dict[str, Any], restart: bool, processes: Processes) -> np.ndarray:
        """Claim the folder of the shards, and return the chunks that this process must embed."""

        def first() -> list[np.ndarray]:
            lock.acquire()
            self.shards.claim(identity, restart, _FORMERLY)
            report_unknown_drugs([each for each in self._drug_ids() if each.is_counted])
            self._sort_by_cell()
            if self.cell_genes is not None:
                self.shards.drop(self.cell_genes.without(self.shards.finished()))
            # A shard that is in no sum of gene embeddings was written just before the run was killed: make it again.
            finished = self.shards.summed() if "EA" in self.kinds else self.shards.finished()
            todo, total = self.plan.unfinished(finished), self.plan.num_chunks
            if len(todo) < total:
                done = total - len(todo)
                logger.info("Resuming %s: %d of %d chunks are done.", self.shards.location, done, total)
            return self.plan.shares(todo, processes.count)

        share = processes.from_first(first)[processes.index]
        if not self.shards.is_local:  # each machine has its own sorted counts
            self._sort_by_cell()
        return share

    def _drug_ids(self) -> list[DrugIds]:
        return [each.drug_ids for each in self.plan.encoders]

    def _check_unchanged(self) -> None:
        for cells in self.plan.inputs:
            cells.check_unchanged()

    def _sort_by_cell(self) -> None:
        for cells in self.plan.inputs:
            with reading(cells.path):
                cells.sort_by_cell()

    def carry_out(
        self,
        todo: np.ndarray,
        processes: Processes,
        model_name: str,
        progress: bool,
    ) -> None:
        """Embed this process's chunks; the first process then writes the output when all processes are done."""
        first = processes.index == 0
        try:
            if first:
                self.output.begin()
            self.embed(todo, progress, processes)
            processes.wait()
            if first:
                self._check_unchanged()
                self.output.wait()
                with reading(*(each.path for each in self.plan.inputs)):  # one of them may be copied
                    writer = self.output.open()
                with naming(self.output.options.path):
                    self.write(writer, model_name, progress)
                self.shards.remove()
            processes.wait()
        except BaseException:
            self.output.abandon()
            if processes.count == 1 and not self.shards.finished():
                self.shards.remove()  # it is empty
            raise

    def embed(self, todo: np.ndarray, progress: bool, processes: Processes) -> None:
        """Embed chunks and write them as shards."""
        if self.engine is not None:
            unknown = self.engine.embed(self.plan, self.job, self.computing, progress)
            counted_late = [each for each in self._drug_ids() if not each.is_counted]
            if unknown:
                counted_late[0].unknown.update(unknown)
            report_unknown_drugs(counted_late)
            return
        ranges = self.plan.ranges(todo)
        cells = sum(high - low for _, low, high in (self.plan.cells(*stretch) for stretch in ranges))
        title = "Embedding" if processes.count == 1 else f"Embedding ({processes.index + 1}/{processes.count})"
        with progress_bar(
            progress, total=cells, unit="cell", desc=title, position=processes.index, smoothing=0.05
        ) as bar:
            for _ in prefetch_calls(self._writes(ranges, bar.update), ahead=1, num_threads=1, name="write"):
                self.output.check()  # a shard is written by a thread while the next is computed
        report_unknown_drugs([each for each in self._drug_ids() if not each.is_counted])

    def _writes(
        self, ranges: Iterable[tuple[int, int]], on_batch: Callable[[int], object]
    ) -> Iterator[Callable[[], None]]:
        """Compute the shards of ranges of chunks, and yield for each the call that writes it."""
        gene_means, writer, written = self._gene_means(), uuid.uuid4().hex, []
        for start, stop in ranges:
            for first, last, shard in self._shards(self.plan.stretch(start, stop), gene_means, on_batch):
                sums = None
                if gene_means is not None:
                    written.append((first, last))
                    sums = [*written], gene_means.state()
                yield partial(self._keep, writer, first, last, shard, sums)

    def _keep(
        self,
        writer: str,
        first: int,
        last: int,
        shard: Shard,
        sums: tuple[list[tuple[int, int]], dict[str, np.ndarray]] | None,
    ) -> None:
        """Write a shard, and then the sums of gene embeddings that include it."""
        self.shards.write(first, last, shard)
        if sums is not None:
            self.shards.write_sums(writer, *sums)
        give_back_memory()

    def _shards(
        self, stretch: Stretch, gene_means: GeneMeans | None, on_batch: Callable[[int], object]
    ) -> Iterator[tuple[int, int, Shard]]:
        source = self.plan.encoders[stretch.number]
        chunks = source.chunks(stretch.low, stretch.high, self.content.needed(source.cells))
        return make_shards(
            self.encoder, self.content, stretch, chunks, source.cells, gene_means, on_batch, self.scorer
        )

    def write(self, writer: EmbeddingWriter, model_name: str, progress: bool) -> None:
        """Write the output from the shards, in the order of the cells."""
        try:
            num_empty = self._write_cells(writer)
            made_by = provenance(model_name, self.encoder, self.options, self.plan.inputs, num_empty)
            made_by["device"] = self.encoder.device.type if self.engine is None else self.engine.device
            made_by |= {} if self.new_drugs is None else self.new_drugs.provenance()
            made_by |= {} if self.scorer is None else {"score_masks": self.scorer.masks}
            if self.cell_genes is not None:
                self.cell_genes.write(self.plan.num_chunks, {provenance_key(writer.layout.key_added): made_by})
            made_by |= self._write_genes(writer, progress)
            with reading(*(each.path for each in self.plan.inputs)):  # the uns of a copied source is changed
                writer.write_provenance(made_by)
            self._check_unchanged()  # a source may have changed while it was copied
            writer.finish()
        except BaseException:
            writer.abandon()
            raise

    def _write_genes(self, writer: EmbeddingWriter, progress: bool) -> dict[str, Any]:
        """Write the gene embeddings, and return the record of how they were made."""
        cells, gene_means = self.plan.inputs[0], self._gene_means()
        if not self.kinds or cells.genes is None:
            return {}
        if gene_means is not None:
            for _, _, sums in self.shards.read_sums():
                gene_means.add_state(sums)
        found = embed_genes(self.encoder, cells.genes.token_ids, self.kinds, gene_means, progress)
        for kind, embeddings in found.kinds.items():
            writer.write_genes(gene_slot(writer.layout.key_added, kind), embeddings)
        return found.provenance(cells.var.index)

    def _write_cells(self, writer: EmbeddingWriter) -> int:
        at = num_empty = 0
        for start, stop in self.shards.finished():
            if start != at:
                raise ValueError(
                    f"{self.shards.location} lacks the chunks {at} to {start}: run the same command again."
                )
            number, low, high = self.plan.cells(start, stop)
            shard = self.shards.read(start, stop)
            if len(shard.embeddings) != high - low:
                raise ValueError(
                    f"{self.shards.location}: the shard {start}-{stop} is damaged: remove it, and run again."
                )
            writer.write(shard, self.output.source_names[number])
            give_back_memory()
            num_empty += shard.num_empty
            at = stop
        if at != self.plan.num_chunks:
            raise ValueError(f"{self.shards.location} lacks the chunks from {at} on: run the same command again.")
        return num_empty


def _identity(run: _Run, more: dict[str, Any]) -> dict[str, Any]:
    """Return all settings and inputs that decide the result, apart from the kind of device."""
    options, tokenizer = run.options, run.options.tokenizer
    samples = tokenizer.overflow == "sample" and tokenizer.context_length is not None
    return {
        "cells": [[each.path, each.fingerprint, each.num_cells] for each in run.plan.inputs],
        "chunk_cells": encoding.CHUNK_CELLS,
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": tokenizer.context_length,
        "genes": [json_digest(each.genes.token_ids.tolist()) for each in run.plan.inputs if each.genes is not None],
        "drugs": options.drugs,
        "unknown_drugs": options.unknown_drugs or tokenizer.unknown_drugs,
        "drug_table": None if run.new_drugs is None else run.new_drugs.digest(),
        "seed": options.seed,
        "sampled_by": "content" if samples else _FORMERLY["sampled_by"],
        "draws": options.draws,
        "dtype": run.encoder.dtype_name,
        "compiled_attention": run.encoder.attention == "compiled",
        "hidden_layer": run.encoder.hidden_layer if run.encoder.is_cut else None,
        **run.output.identity,
        **more,
    }
