# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Embedding files of any size, with any number of processes, in a run that can be stopped and resumed.

The cells are cut into chunks (`cells/encoding.py`). Each process embeds some of the chunks and writes a shard every
half minute (`shards.py`); when all chunks are in shards, the first process writes the output from them. The embeddings
of a chunk depend on its cells alone. So the result is the same, bit for bit on one kind of device, however often the
run was stopped and whatever the number of processes.
"""

import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from tahoex1_hf.cells import encoding
from tahoex1_hf.cells.encoding import ChunkEncoder, DrugIds, EncodeOptions, report_unknown_drugs
from tahoex1_hf.cells.gene_symbols import Table
from tahoex1_hf.cells.genes import TAHOE_100M_GENES, GeneOptions
from tahoex1_hf.cells.opening import open_all
from tahoex1_hf.cells.readers.base import CellInput
from tahoex1_hf.common.digests import json_digest, tokenizer_digest, weights_digest
from tahoex1_hf.common.processes import Processes
from tahoex1_hf.common.progress import progress_bar
from tahoex1_hf.embedding.shards import Shard, ShardFolder
from tahoex1_hf.embedding.writers import EmbeddingWriter, check_output, open_writer
from tahoex1_hf.hub.models import model_and_tokenizer, model_name, without_peft
from tahoex1_hf.inference.chunks import embed_chunks, with_settings
from tahoex1_hf.inference.encoder import CellEncoder, DtypeName, GeneMeans
from tahoex1_hf.inference.provenance import provenance
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1PreTrainedModel
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

logger = logging.getLogger(__name__)

# A shard is written when this many seconds have passed since the last one, or it holds this many values (32 MB).
_SHARD_SECONDS = 30.0
_SHARD_VALUES = 2**23
# What runs of earlier versions did not record of themselves.
_FORMERLY = {"sampled_by": "number", "draws": 1}


class Plan:
    """The chunks of all inputs under consecutive numbers, and their division among processes."""

    def __init__(self, encoders: Sequence[ChunkEncoder]):
        self.encoders = encoders
        self.inputs = inputs = [each.cells for each in encoders]
        counts = [-(-each.num_cells // encoding.CHUNK_CELLS) for each in inputs]
        self.firsts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.num_chunks = int(self.firsts[-1])
        self.num_cells = sum(each.num_cells for each in inputs)

    def cells(self, start: int, stop: int) -> tuple[int, int, int]:
        """Return the input that holds chunks `start` to `stop`, and the first and last-plus-one of their cells."""
        number = int(np.searchsorted(self.firsts, start, side="right")) - 1
        low = (start - int(self.firsts[number])) * encoding.CHUNK_CELLS
        high = min((stop - int(self.firsts[number])) * encoding.CHUNK_CELLS, self.inputs[number].num_cells)
        return number, low, high

    def ranges(self, todo: np.ndarray) -> list[tuple[int, int]]:
        """Group chunks, given in order, into ranges (start, stop) of consecutive chunks of one input."""
        if not len(todo):
            return []
        owners = np.searchsorted(self.firsts, todo, side="right")
        cuts = np.flatnonzero((np.diff(todo) != 1) | (np.diff(owners) != 0)) + 1
        bounds = [0, *cuts.tolist(), len(todo)]
        return [(int(todo[a]), int(todo[b - 1]) + 1) for a, b in pairwise(bounds)]

    def unfinished(self, finished: Sequence[tuple[int, int]]) -> np.ndarray:
        """Return the numbers of the chunks that are in no shard."""
        missing = np.ones(self.num_chunks, dtype=bool)
        for start, stop in finished:
            missing[start:stop] = False
        return np.flatnonzero(missing)

    def shares(self, todo: np.ndarray, processes: int) -> list[np.ndarray]:
        """Return the chunks of each process: consecutive chunks, with about as many tokens for each process."""
        if processes == 1:
            return [todo]
        tokens = np.concatenate([each.chunk_tokens() for each in self.encoders])[todo].astype(np.float64)
        middles = np.cumsum(tokens) - tokens / 2
        owner = np.minimum((middles * processes / max(tokens.sum(), 1)).astype(np.int64), processes - 1)
        return [todo[owner == process] for process in range(processes)]


def embed_files(
    sources: str | Path | Sequence[str | Path],
    output: str | Path,
    model: TahoeX1PreTrainedModel | str | Path,
    tokenizer: TahoeX1Tokenizer | None = None,
    *,
    key_added: str = "X_tahoe_x1",
    layer: str | None = None,
    gene_id_column: str | None = None,
    gene_symbols: Table | str | Path | None = None,
    species: str = "human",
    orthologs: Mapping[str, Sequence[str]] | str | Path | None = None,
    gene_metadata: str | None = None,
    drugs: str | None = None,
    unknown_drugs: str | None = None,
    gene_embeddings: bool = False,
    max_length: int | None = None,
    overflow: str | None = None,
    draws: int = 1,
    seed: int = 0,
    batch_tokens: int | None = None,
    device: str | torch.device | None = None,
    dtype: DtypeName = "auto",
    restart: bool = False,
    progress: bool = True,
) -> None:
    """Embed the cells of files, which may be larger than memory.

    Embeddings are kept in the folder `OUTPUT.shards` until all are there. A run that was stopped, in whatever way,
    resumes when it is called with the same arguments. Under `accelerate launch`, all processes share the work, also on
    several machines with a shared file system or an output in an object store.

    Args:
        sources: `.h5ad` files, `.zarr` stores, 10x files, folders and globs of these, prepared datasets, and Hub
            datasets in the form of Tahoe-100M.
        output: path that ends in `.h5ad`, `.parquet` or `.npy`; the latter two may be URLs (`s3://…`). For a single
            `.h5ad` source, an `.h5ad` output is the source plus the new slots, otherwise cells without counts.
        model: as in `embed_anndata`.
        tokenizer: as in `embed_anndata`.
        key_added: slot of `obsm` to write, or the beginning of the table's column names.
        layer: as in `embed_anndata`.
        gene_id_column: as in `embed_anndata`.
        gene_symbols: as in `embed_anndata`.
        species: as in `embed_anndata`.
        orthologs: as in `embed_anndata`.
        gene_metadata: gene table of a dataset in the form of Tahoe-100M; by default the dataset's own on the Hub.
        drugs: for models with a drug encoder, a column of the cells, or one drug for all cells.
        unknown_drugs: as in `embed_anndata`.
        gene_embeddings: as in `embed_anndata`; needs a single `.h5ad` source and an `.h5ad` output.
        max_length: as in `embed_anndata`.
        overflow: as in `embed_anndata`.
        draws: as in `embed_anndata`; the deviations are a column of obs, or of the table.
        seed: as in `embed_anndata`.
        batch_tokens: as in `embed_anndata`.
        device: as in `embed_anndata`; several processes on a machine take a GPU each by default.
        dtype: as in `embed_anndata`.
        restart: whether to discard what an unfinished run with other arguments left.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for files and arguments that cannot be used; the message says what to do.
        FileNotFoundError: for a source or a model that does not exist.
    """
    paths = [str(path) for path in ([sources] if isinstance(sources, (str, Path)) else sources)]
    target = str(output)
    check_output(target, gene_embeddings, key_added, draws)
    processes = Processes.current()
    loaded, tokenizer = model_and_tokenizer(model, tokenizer)
    options = EncodeOptions(with_settings(tokenizer, max_length, overflow), drugs, seed, unknown_drugs, draws)
    genes = GeneOptions(
        gene_id_column,
        gene_symbols,
        layer,
        gene_metadata or TAHOE_100M_GENES,
        species=species,
        orthologs=orthologs,
    )
    with ExitStack() as stack:
        shards = ShardFolder(f"{target}.shards")
        spool = Path(shards.location) / "by_cell"
        if not shards.is_local:  # each machine sorts by cell the counts that need it
            spool = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        inputs = open_all(paths, options.tokenizer, genes, spool=spool)
        alone = len(inputs) == 1 and _is_h5ad(inputs[0])
        copied = inputs[0].path if alone and target.endswith(".h5ad") else None
        if gene_embeddings and copied is None:
            raise ValueError("gene_embeddings needs a single .h5ad file as source, whose varm holds the result.")
        if gene_embeddings:
            inputs[0].check_gene_slots()
        encoder = CellEncoder(
            without_peft(loaded),
            options.tokenizer,
            batch_tokens=batch_tokens,
            device=device or processes.device(),
            dtype=dtype,
        )
        with_names = copied is None and not target.endswith(".npy")
        run = _Run(inputs, shards, encoder, options, gene_embeddings, with_names)
        identity = _identity(run, loaded, {"key_added": key_added, "layer": layer})
        identity["batch_tokens"] = batch_tokens  # it moves last digits; the default depends on the device alone
        todo = run.begin(stack.enter_context(_Lock(shards)), identity, restart, processes)

        def open_output() -> EmbeddingWriter:
            shape = (run.plan.num_cells, encoder.width)
            return open_writer(target, shape, key_added, copied, [each.path for each in inputs], draws > 1)

        run.carry_out(todo, processes, open_output, model_name(model, loaded), progress)


def _is_h5ad(cells: CellInput) -> bool:
    return cells.path.endswith(".h5ad") and Path(cells.path).is_file()


class _Run:
    """One run over all inputs: claims the shards, embeds this process's chunks, writes the output."""

    def __init__(
        self,
        inputs: Sequence[CellInput],
        shards: ShardFolder,
        encoder: CellEncoder,
        options: EncodeOptions,
        gene_embeddings: bool,
        names: bool,
    ):
        self.plan = Plan([ChunkEncoder(each, options) for each in inputs])
        self.shards, self.encoder, self.options = shards, encoder, options
        self.names, self.gene_embeddings = names, gene_embeddings

    def _gene_means(self) -> GeneMeans | None:
        genes = self.plan.inputs[0].genes
        return self.encoder.gene_means(genes) if self.gene_embeddings and genes is not None else None

    def begin(self, lock: "_Lock", identity: dict[str, Any], restart: bool, processes: Processes) -> np.ndarray:
        """Claim the folder of the shards, and return the chunks that this process must embed."""

        def first() -> list[np.ndarray]:
            lock.acquire()
            self.shards.claim(identity, restart, _FORMERLY)
            report_unknown_drugs([each for each in self._drug_ids() if each.is_counted])
            self._sort_by_cell()
            # With gene embeddings, a shard that is in no sum was written just before a kill, and is made again.
            finished = self.shards.summed() if self.gene_embeddings else self.shards.finished()
            todo, total = self.plan.unfinished(finished), self.plan.num_chunks
            if len(todo) < total:
                done = total - len(todo)
                logger.info("Resuming %s: %d of %d chunks are done.", self.shards.location, done, total)
            return self.plan.shares(todo, processes.count)

        share = processes.from_first(first)[processes.index]
        if not self.shards.is_local:  # each machine has its own sorted counts then
            self._sort_by_cell()
        return share

    def _drug_ids(self) -> list[DrugIds]:
        return [each.drug_ids for each in self.plan.encoders]

    def _sort_by_cell(self) -> None:
        for cells in self.plan.inputs:
            cells.sort_by_cell()

    def carry_out(
        self,
        todo: np.ndarray,
        processes: Processes,
        open_output: Callable[[], EmbeddingWriter],
        model_name: str,
        progress: bool,
    ) -> None:
        """Embed this process's chunks; in the first process, write the output when all are done."""
        try:
            self.embed(todo, progress, processes)
            processes.wait()
            if processes.index == 0:
                self.write(open_output(), model_name)
                self.shards.remove()
            processes.wait()
        except BaseException:
            if processes.count == 1 and not self.shards.finished():
                self.shards.remove()  # it is empty
            raise

    def embed(self, todo: np.ndarray, progress: bool, processes: Processes) -> None:
        """Embed chunks, and write them as shards."""
        ranges = self.plan.ranges(todo)
        cells = sum(high - low for _, low, high in (self.plan.cells(*stretch) for stretch in ranges))
        title = "Embedding" if processes.count == 1 else f"Embedding ({processes.index + 1}/{processes.count})"
        gene_means, writer, written = self._gene_means(), uuid.uuid4().hex, []
        with progress_bar(
            progress, total=cells, unit="cell", desc=title, position=processes.index, smoothing=0.05
        ) as bar:
            for start, stop in ranges:
                for first, last, shard in self._shards(start, stop, gene_means, bar):
                    self.shards.write(first, last, shard)
                    if gene_means is not None:
                        written.append((first, last))
                        self.shards.write_sums(writer, written, gene_means.state())
        report_unknown_drugs([each for each in self._drug_ids() if not each.is_counted])

    def _shards(
        self, start: int, stop: int, gene_means: GeneMeans | None, bar: Any
    ) -> Iterator[tuple[int, int, Shard]]:
        """Yield the shards of chunks `start` to `stop`, each with its first and last-plus-one chunk."""
        number, low, high = self.plan.cells(start, stop)
        source = self.plan.encoders[number]
        names: list[str] = []
        parts: list[np.ndarray] = []
        spreads: list[np.ndarray] = []
        empty, first, since = 0, start, time.monotonic()
        chunks = source.chunks(low, high, self.names)
        embedded = embed_chunks(self.encoder, chunks, gene_means, bar.update)
        for done, (chunk, part, spread) in enumerate(embedded, start + 1):
            names.extend(chunk.names)
            parts.append(part)
            spreads.append(spread)
            empty += len(chunk.cells.empty_cells)
            full = sum(each.size for each in parts) >= _SHARD_VALUES or time.monotonic() - since >= _SHARD_SECONDS
            if full or done == stop:
                deviations = np.concatenate(spreads) if self.options.draws > 1 else None
                yield first, done, Shard(names, np.concatenate(parts), empty, deviations)
                names, parts, spreads, empty, first, since = [], [], [], 0, done, time.monotonic()

    def write(self, writer: EmbeddingWriter, model_name: str) -> None:
        """Write the output from the shards, in the order of the cells."""
        try:
            num_empty = self._write_cells(writer)
            gene_means, genes = self._gene_means(), self.plan.inputs[0].genes
            if gene_means is not None and genes is not None:
                for _, _, sums in self.shards.read_sums():
                    gene_means.add_state(sums)
                writer.write_genes(gene_means.means(genes.token_ids))
            writer.write_provenance(provenance(model_name, self.encoder, self.options, self.plan.inputs, num_empty))
            writer.finish()
        except BaseException:
            writer.abandon()
            raise

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
            writer.write(shard.names, self.plan.inputs[number].path, shard.embeddings, shard.deviations)
            num_empty += shard.num_empty
            at = stop
        if at != self.plan.num_chunks:
            raise ValueError(f"{self.shards.location} lacks the chunks from {at} on: run the same command again.")
        return num_empty


def _identity(run: _Run, model: TahoeX1PreTrainedModel, more: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the result, apart from the kind of device."""
    options, tokenizer = run.options, run.options.tokenizer
    samples = tokenizer.overflow == "sample" and tokenizer.context_length is not None
    return {
        "cells": [[each.path, each.fingerprint, each.num_cells] for each in run.plan.inputs],
        "chunk_cells": encoding.CHUNK_CELLS,
        "model": weights_digest(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": tokenizer.context_length,
        "genes": [json_digest(each.genes.token_ids.tolist()) for each in run.plan.inputs if each.genes is not None],
        "drugs": options.drugs,
        "unknown_drugs": options.unknown_drugs or tokenizer.unknown_drugs,
        "seed": options.seed,
        "sampled_by": "content" if samples else _FORMERLY["sampled_by"],
        "draws": options.draws,
        "dtype": run.encoder.dtype_name,
        "gene_embeddings": run.gene_embeddings,
        "names": run.names,
        **more,
    }


class _Lock:
    """A lock that keeps a second run away from a folder; on many file systems it works on one machine only."""

    def __init__(self, shards: ShardFolder):
        self.location = shards.location
        self.lock = FileLock(f"{shards.location}.lock") if shards.is_local else None

    def acquire(self) -> None:
        """Take the lock, or raise ValueError where another run holds it."""
        if self.lock is not None:
            try:
                self.lock.acquire(timeout=0)
            except Timeout:
                raise ValueError(
                    f"{self.location}: another run is writing there; wait for it, or choose another output."
                ) from None

    def __enter__(self) -> "_Lock":
        return self

    def __exit__(self, *error: object) -> None:
        if self.lock is not None and self.lock.is_locked:
            Path(self.lock.lock_file).unlink(missing_ok=True)
            self.lock.release()
