# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Embedding on a Ray cluster: pieces are read and encoded, embedded, and written, each by workers of its own kind.

A piece is a stretch of chunks, and becomes one shard. What a worker makes of a piece depends on its cells alone. The
shard's file appears whole or not at all, under a name that says which chunks it holds. A piece that Ray works on twice
therefore writes the same bytes to the same place, and is one shard.
"""

import json
import pickle
import tempfile
import uuid
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from tahoex1_hf.cells import encoding
from tahoex1_hf.cells.encoding import ChunkEncoder, EncodeOptions
from tahoex1_hf.cells.fingerprint import agrees
from tahoex1_hf.cells.genes import GeneOptions
from tahoex1_hf.cells.opening import Source, find_sources, open_cells
from tahoex1_hf.cells.readers.base import CellInput
from tahoex1_hf.common.cluster import Cluster, Shared, Stage
from tahoex1_hf.common.cluster_progress import ClusterProgress
from tahoex1_hf.common.patience import patiently
from tahoex1_hf.common.reading import reading
from tahoex1_hf.embedding.making import ShardContent, make_shards, most_chunks
from tahoex1_hf.embedding.plan import Plan, Stretch
from tahoex1_hf.embedding.scores import scorer_of
from tahoex1_hf.embedding.shards import ShardFolder, packed
from tahoex1_hf.inference.encoder import CellEncoder, Dtype, GeneMeans, choose_dtype
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1PreTrainedModel
from tahoex1_hf.padding_tahoe_x1 import EncodedCells

if TYPE_CHECKING:
    from tahoex1_hf.encoding_tahoe_x1 import GeneMatch

# Most chunks of a piece: 2,048 cells, of which 25 MB travel to the model.
_PIECE_CHUNKS = 8
# Number of inputs that a reading worker keeps open.
_OPEN_INPUTS = 8
# Times that all pieces are gone through; a piece is missing after one if its shard was removed from outside.
_ROUNDS = 3


class Opened(NamedTuple):
    """Facts of a source that was opened.

    Attributes:
        path: Path or name, for messages.
        fingerprint: Fingerprint of the content.
        num_cells: Number of cells.
        obs_columns: Columns of obs that shards hold.
    """

    path: str
    fingerprint: str
    num_cells: int
    obs_columns: list[str]


@dataclass(frozen=True)
class Reading:
    """What a worker needs to read and write pieces.

    Attributes:
        sources: Sources of the run.
        opened: Facts of each source, as the process that began the run found them.
        genes: Options that say where genes and counts are.
        options: Options of the encoding.
        spool: Folder of the counts that were sorted by cell; None if each worker sorts for itself.
        content: What the shards hold beside embeddings.
        shards: Folder of the shards.
    """

    sources: Sequence[Source]
    opened: "Sequence[Opened]"
    genes: GeneOptions
    options: EncodeOptions
    spool: str | None
    content: ShardContent
    shards: ShardFolder

    @classmethod
    def of(
        cls,
        paths: Sequence[str],
        inputs: Sequence[CellInput],
        genes: GeneOptions,
        options: EncodeOptions,
        spool: Path,
        content: ShardContent,
        shards: ShardFolder,
    ) -> "Reading":
        """Describe the inputs that were opened at paths.

        Raises:
            ValueError: If the paths now stand for other sources.
        """
        sources = find_sources(paths)
        pairs = zip(inputs, sources, strict=False)
        if len(sources) != len(inputs) or not all(one.path.startswith(two.path) for one, two in pairs):
            raise ValueError(f"{', '.join(paths)} stands for other files than a moment ago: run the command again.")
        opened = [Opened(each.path, each.fingerprint, each.num_cells, content.columns_of(each)) for each in inputs]
        return cls(sources, opened, genes, options, str(spool) if shards.is_local else None, content, shards)


@dataclass(frozen=True)
class Computing:
    """What a worker needs to embed pieces.

    Attributes:
        model: The model.
        settings: Arguments of `CellEncoder`.
        arithmetic: What torch is set to, on which last digits depend.
        genes: Genes whose embeddings are added up over cells; None if they are not requested.
        masks: Number of masks of the cells' scores; 0 for no scores.
    """

    model: TahoeX1PreTrainedModel
    settings: dict[str, Any]
    arithmetic: "Arithmetic"
    genes: "GeneMatch | None"
    masks: int


@dataclass(frozen=True)
class Arithmetic:
    """Settings of torch that decide which kernels compute, and in which order they add.

    Attributes:
        threads: Number of threads of an operation on a CPU.
        float32_products: Precision of float32 products: `highest`, `high` or `medium`.
        onednn: Whether oneDNN computes products on CPUs.
    """

    threads: int
    float32_products: str
    onednn: bool

    @classmethod
    def of_this_process(cls) -> "Arithmetic":
        """Return the settings that hold here."""
        return cls(torch.get_num_threads(), torch.get_float32_matmul_precision(), bool(torch.backends.mkldnn.enabled))

    def use(self) -> None:
        """Make these the settings of this process; the number of threads is also the calling thread's own."""
        torch.set_num_threads(self.threads)
        if torch.backends.mkldnn.enabled != self.onednn:
            torch.backends.mkldnn.set_flags(self.onednn)  # which also forgets the precision of products
        torch.set_float32_matmul_precision(self.float32_products)


class Inputs:
    """The inputs that a worker has open, at most a few at a time.

    Args:
        job: The run's sources.
    """

    def __init__(self, job: Reading):
        self.job = job
        self._encoders: OrderedDict[int, ChunkEncoder] = OrderedDict()
        self._own: tempfile.TemporaryDirectory[str] | None = None

    def encoder(self, number: int) -> ChunkEncoder:
        """Return the encoder of an input, which is opened if it is not open."""
        if number not in self._encoders:
            while len(self._encoders) >= _OPEN_INPUTS:
                self._encoders.popitem(last=False)
            self._encoders[number] = ChunkEncoder(self._open(number), self.job.options)
        self._encoders.move_to_end(number)
        return self._encoders[number]

    def _open(self, number: int) -> CellInput:
        source, known = self.job.sources[number], self.job.opened[number]
        cells = open_cells(source, self.job.options.tokenizer, self.job.genes, spool=self._spool(), check=False)
        if not agrees(known.fingerprint, cells.fingerprint) or cells.num_cells != known.num_cells:
            raise ValueError(
                f"{source.path} on this worker is not the file that the run began with: all machines must see the "
                "same files, and these must not change."
            )
        with reading(source.path):
            cells.sort_by_cell()
        return cells

    def _spool(self) -> str:
        if self.job.spool is not None:
            return self.job.spool
        self._own = self._own or tempfile.TemporaryDirectory(prefix="tahoex1-by-cell-")
        return self._own.name


class ClosedInput:
    """What a worker with the model knows of an input; it is opened only for the message of an error.

    Args:
        job: The run's `Reading`.
        number: Number of the input.
    """

    def __init__(self, job: Shared, number: int):
        self._job, self._number = job, number
        self.path, self.obs_columns = job.get().opened[number].path, job.get().opened[number].obs_columns

    def column(self, name: str) -> Any:
        """Read a column of obs."""
        return _inputs_of(self._job).encoder(self._number).cells.column(name)


_inputs: dict[str, Inputs] = {}  # of the run that this worker is at


def _inputs_of(job: Shared) -> Inputs:
    if job.run not in _inputs:
        _inputs.clear()
        _inputs[job.run] = Inputs(job.get())
    return _inputs[job.run]


def read_piece(row: dict[str, Any], job: Shared) -> dict[str, Any]:
    """Read and encode the cells of a piece."""
    stretch = Stretch(*(row[name] for name in Stretch._fields))

    def read() -> tuple[list[EncodedCells], dict[str, int]]:
        source = _inputs_of(job).encoder(stretch.number)
        if not source.drug_ids.is_counted:
            source.drug_ids.unknown.clear()  # those of the piece before
        chunks = list(source.chunks(stretch.low, stretch.high, job.get().content.needed(source.cells)))
        return chunks, {} if source.drug_ids.is_counted else dict(source.drug_ids.unknown)

    chunks, unknown = patiently(read, job.get().sources[stretch.number].path)
    return {**row, "unknown": json.dumps(unknown), "chunks": pickle.dumps(chunks, protocol=5)}


class PieceEmbedder:
    """A worker with the model.

    Args:
        job: The run's `Reading`.
        model: The run's `Computing`.
    """

    def __init__(self, job: Shared, model: Shared):
        computing: Computing = model.get()
        self.job, self.genes, self.arithmetic = job, computing.genes, computing.arithmetic
        self.arithmetic.use()
        self.encoder = CellEncoder(computing.model, job.get().options.tokenizer, **computing.settings)
        self.scorer = scorer_of(self.encoder, computing.model, computing.masks, job.get().options.seed)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Embed the cells of a piece, and return its shard in bytes."""
        self.arithmetic.use()  # each thread has its own number of threads, and Ray may call from another
        stretch = Stretch(*(row[name] for name in Stretch._fields))
        chunks, job = pickle.loads(row["chunks"]), self.job.get()
        means: GeneMeans | None = None if self.genes is None else self.encoder.gene_means(self.genes)
        cells = cast(CellInput, ClosedInput(self.job, stretch.number))
        made = make_shards(
            self.encoder, job.content, stretch, iter(chunks), cells, means, scorer=self.scorer, seconds=float("inf")
        )
        ((start, stop, shard),) = made
        content = packed(shard)
        if means is not None:  # named after the piece, so that the sums of one that is made twice count once
            job.shards.write_sums(f"{start:012d}-{stop:012d}", [(start, stop)], means.state())
        kept = {name: row[name] for name in (*Stretch._fields, "unknown")}
        return {**kept, "shard": content}


def write_piece(row: dict[str, Any], job: Shared) -> dict[str, Any]:
    """Write the shard of a piece."""
    job.get().shards.write_packed(row["start"], row["stop"], row["shard"])
    return {"cells": row["high"] - row["low"], "unknown": row["unknown"]}


class _Rows(Sequence[dict[str, Any]]):
    """The rows of pieces, made when they are asked for."""

    def __init__(self, pieces: Sequence[Stretch]):
        self.pieces = pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, place: Any) -> Any:
        return self.pieces[place]._asdict()


class ClusterEmbedding:
    """The part of an embedding run that is done on a cluster.

    Args:
        cluster: Connection to the cluster.
        device: Device of the workers; by default `cuda` if the cluster has GPUs, else `cpu`.
        dtype: Precision, as in `CellEncoder`.
    """

    def __init__(self, cluster: Cluster, device: str | torch.device | None, dtype: Dtype):
        self.cluster = cluster
        self.device = torch.device(device or ("cuda" if cluster.num_gpus else "cpu")).type
        self.dtype = dtype
        if dtype == "auto":  # one for all workers; which is fast on a GPU is known to a machine that has it
            on_gpu = self.device == "cuda"
            self.dtype = cluster.ask(_fast_dtype, self.device, gpus=1) if on_gpu else _fast_dtype(self.device)

    def computing(
        self,
        model: TahoeX1PreTrainedModel,
        batch_tokens: int | None,
        hidden_layer: int | None,
        genes: "GeneMatch | None",
        masks: int,
    ) -> Computing:
        """Return what workers need to embed, torch's settings in this process among it."""
        settings: dict[str, Any] = {"batch_tokens": batch_tokens, "hidden_layer": hidden_layer}
        settings |= {"device": self.device, "dtype": self.dtype, "compile_attention": False}
        return Computing(model, settings, Arithmetic.of_this_process(), genes, masks)

    def embed(
        self,
        plan: Plan,
        job: Reading,
        computing: Computing,
        progress: bool,
    ) -> Counter[str]:
        """Embed all chunks that are not in shards, and return the unknown drugs that were found while reading.

        Args:
            plan: The chunks.
            job: What workers need to read and write.
            computing: What workers need to embed.
            progress: Whether to show a progress bar.

        Raises:
            ValueError: For cells or results that cannot be used.
            ClusterError: If the cluster lost what it could not replace.
        """
        run = uuid.uuid4().hex
        reader, model = self.cluster.share(run, "reading", job), self.cluster.share(run, "computing", computing)
        # On CPUs, a half of what they use is asked for, so that there is always room for readers and writers.
        stages = [
            Stage(read_piece, {"job": reader}, cpus=self._cpus),
            Stage(
                PieceEmbedder,
                {"job": reader, "model": model},
                cpus=0 if self.device == "cuda" else computing.arithmetic.threads / 2,
                gpus=1 if self.device == "cuda" else 0,
                most=None
                if self.device == "cuda"
                else max(1, int(self.cluster.num_cpus / computing.arithmetic.threads)),
            ),
            Stage(write_piece, {"job": reader}, cpus=self._cpus),
        ]
        unknown: Counter[str] = Counter()
        width = most_chunks(computing.model.config.hidden_size, _PIECE_CHUNKS)
        finished = job.shards.finished if computing.genes is None else job.shards.summed
        for _ in range(_ROUNDS):
            pieces = plan.pieces(plan.unfinished(finished()), width)
            if not pieces:
                return unknown
            total = sum(each.high - each.low for each in pieces)
            watch = ClusterProgress(
                job.shards.location, "cell", total, len(pieces), self.cluster.num_machines, progress
            )
            with watch:
                together = max(1, _PIECE_CHUNKS * encoding.CHUNK_CELLS * len(pieces) // total)
                for row in self.cluster.run(_Rows(pieces), stages, together):
                    unknown.update(json.loads(row["unknown"]))
                    watch.update(row["cells"])
        left = len(plan.unfinished(finished()))
        if left:
            raise ValueError(
                f"{job.shards.location} lacks {left} of {plan.num_chunks} chunks that were written: is another "
                "program removing files there?"
            )
        return unknown

    @property
    def _cpus(self) -> float:
        return 1.0 if self.device == "cuda" else 0.5


def _fast_dtype(device: str) -> Any:
    return str(choose_dtype("auto", torch.device(device))).removeprefix("torch.")
