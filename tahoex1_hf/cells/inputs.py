"""Cells to embed, wherever they lie: read in blocks of bounded size, encoded in chunks of always the same cells.

Which cells make a chunk depends on their file alone: so does everything that is computed, however many files,
processes and interruptions there are.
"""

import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tahoex1_hf.encoding_tahoe_x1 import EncodedCells, GeneMatch, GeneRows, concatenate_cells, to_csr
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    from anndata import AnnData

# Cells encoded, and embedded, at a time: enough for batches of similar length on any device, few enough that little is
# lost where a run is interrupted.
CHUNK_CELLS = 256
# Entries of a matrix on disk, or places of a dense one, that are read at once: a few hundred cells, 8 MB.
BLOCK_ELEMENTS = 1_000_000
# From so many cells on, compiling the encoding (about 10 s, once per installation) costs less than it saves.
COMPILE_FROM_CELLS = 20_000


class Block(NamedTuple):
    """Some consecutive cells of an input, read into memory."""

    start: int
    stop: int
    encode: Callable[[int, int], EncodedCells]  # of cells from and to, numbers in the input
    names: Sequence[str] | None  # of the block's cells; None where they are not wanted


class Chunk(NamedTuple):
    """Encoded cells, ready for the model: cells `start` to `start + cells.num_cells` of an input."""

    start: int
    cells: EncodedCells
    names: list[str]


@dataclass
class EncodeOptions:
    """What cells are encoded with.

    Attributes:
        tokenizer: of the model.
        drugs: for models with a drug encoder: a column of the cells, the drug of all cells, or one per cell.
        seed: of the sampling of cells longer than the context.
        gene_id_column: column of `var` with Ensembl ids.
        gene_symbols: gene symbol -> Ensembl id.
        layer: layer with the counts.
    """

    tokenizer: TahoeX1Tokenizer
    drugs: str | Sequence[str | None] | None = None
    seed: int = 0
    gene_id_column: str | None = None
    gene_symbols: Mapping[str, str] | None = None
    layer: str | None = None


class CellInput(ABC):
    """One file (store, dataset, AnnData) with cells."""

    path: str
    num_cells: int
    genes: GeneMatch | None
    """Its gene columns, where it has such."""
    fingerprint = ""
    """Changes when the content does."""

    @abstractmethod
    def blocks(self, start: int, stop: int, names: bool) -> Iterator[Block]:
        """Cells `start` to `stop` in order, in blocks of bounded memory; with the cells' names where asked for."""

    def sort_by_cell(self) -> None:  # noqa: B027 - most inputs have nothing to do
        """Once, before `blocks`: sort counts that are stored by gene, on disk."""

    def chunk_tokens(self) -> np.ndarray:
        """`(chunks,)` about how many tokens each chunk has, to share work by; by default its number of cells."""
        starts = np.arange(0, self.num_cells, CHUNK_CELLS)
        return np.minimum(self.num_cells - starts, CHUNK_CELLS)

    def chunks(self, start: int, stop: int, names: bool = False) -> Iterator[Chunk]:
        """Cells `start` to `stop`, cut into chunks at the multiples of `CHUNK_CELLS`.

        Args:
            start: a multiple of `CHUNK_CELLS`.
            stop: another, or `num_cells`.
            names: whether the cells' names are wanted.
        """
        first = at = start
        parts: list[EncodedCells] = []
        labels: list[str] = []
        for block in self.blocks(start, stop, names):
            while at < block.stop:
                end = min(first + CHUNK_CELLS, stop)
                upto = min(end, block.stop)
                parts.append(block.encode(at, upto))
                if block.names is not None:
                    labels.extend(block.names[at - block.start : upto - block.start])
                at = upto
                if at == end:
                    yield Chunk(first, parts[0] if len(parts) == 1 else concatenate_cells(parts), labels)
                    first, parts, labels = at, [], []
        if at != stop:
            raise ValueError(f"{self.path} ended after {at} of {self.num_cells} cells: it changed while it was read.")


class _Compilation:
    """Compiles the encoding in the background, once per process; until then, cells are encoded without."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self._lock, self._started = threading.Lock(), False

    def start(self, options: EncodeOptions, genes: GeneMatch) -> None:
        with self._lock:
            if not self._started:
                self._started = True
                threading.Thread(target=self._run, args=(options, genes), name="compile-encoding", daemon=True).start()

    def _run(self, options: EncodeOptions, genes: GeneMatch) -> None:
        from scipy.sparse import csr_matrix

        from tahoex1_hf.cells.compiled_encoding import encode_chunk

        gene = int(np.flatnonzero(genes.token_ids >= 0)[0])
        encode_chunk(
            options.tokenizer, csr_matrix(([np.float32(1)], [gene], [0, 1]), shape=(1, genes.num_genes)), genes
        )
        self.done.set()


_compilation = _Compilation()


class MatrixEncoder:
    """Encodes rows of count matrices; the results are the same compiled and not."""

    def __init__(self, options: EncodeOptions, genes: GeneMatch, num_cells: int, source: Any):
        self.options, self.genes, self.source = options, genes, source
        if num_cells >= COMPILE_FROM_CELLS:
            _compilation.start(options, genes)

    def __call__(self, matrix: Any, drugs: str | Sequence[str | None] | None, first_cell: int) -> EncodedCells:
        """Encode rows, of which the first has the number `first_cell`."""
        encode: Any = self.options.tokenizer.encode_counts
        if _compilation.done.is_set():
            from tahoex1_hf.cells.compiled_encoding import encode_chunk

            encode = functools.partial(encode_chunk, self.options.tokenizer)
        return encode(
            matrix, self.genes, drugs=drugs, first_cell=first_cell, seed=self.options.seed, source=self.source
        )


def drugs_of(drugs: Any, start: int, stop: int) -> Any:
    """The drugs of some of the cells, where each has its own."""
    return drugs if drugs is None or isinstance(drugs, str) else drugs[start:stop]


class AnnDataInput(CellInput):
    """An AnnData, in memory or backed."""

    genes: GeneMatch

    def __init__(self, adata: "AnnData", options: EncodeOptions):
        tokenizer = options.tokenizer
        self.path, self.num_cells = "adata", adata.n_obs
        self._names = adata.obs_names
        self.matrix, self.genes = tokenizer.read_anndata(
            adata, options.gene_id_column, options.layer, options.gene_symbols
        )
        if getattr(self.matrix, "format", None) == "csc":
            self.matrix = to_csr(self.matrix.to_memory() if hasattr(self.matrix, "to_memory") else self.matrix)
        self.drugs = tokenizer.resolve_drugs(adata, options.drugs)
        if self.drugs is not None and not isinstance(self.drugs, str) and len(self.drugs) != adata.n_obs:
            raise ValueError(f"drugs has {len(self.drugs)} entries for {adata.n_obs} cells: pass one per cell.")
        self.encoder = MatrixEncoder(options, self.genes, adata.n_obs, adata)

    def blocks(self, start: int, stop: int, names: bool) -> Iterator[Block]:
        """A backed CSR matrix is read as a file is; all else is sliced, a chunk at a time."""
        if hasattr(self.matrix, "group"):
            from tahoex1_hf.cells.readers.stores import matrix_blocks

            rows = matrix_blocks(self.matrix.group, start, stop, elements=BLOCK_ELEMENTS)
        else:
            lows = range(start, stop, CHUNK_CELLS)
            rows = (self.matrix[low : min(low + CHUNK_CELLS, stop)] for low in lows)
        labels = (lambda low, high: self._names[low:high].tolist()) if names else None
        return encoded_blocks(self.encoder, rows, self.drugs, start, labels)


def encoded_blocks(
    encoder: MatrixEncoder,
    matrices: Iterable[Any],
    drugs: Any,
    start: int,
    names: Callable[[int, int], Sequence[str]] | None,
) -> Iterator[Block]:
    """Blocks of consecutive rows of counts.

    Args:
        encoder: of the matrix.
        matrices: the rows, from cell `start` on.
        drugs: of all cells, or something to slice.
        start: number of the first cell.
        names: of cells from and to, where they are wanted.
    """
    low = start
    for matrix in matrices:
        high = low + matrix.shape[0]
        own = drugs_of(drugs, low, high)

        def encode(a: int, b: int, matrix: Any = matrix, drugs: Any = own, low: int = low) -> EncodedCells:
            whole = b - a == matrix.shape[0]  # a slice would be a copy
            return encoder(matrix if whole else matrix[a - low : b - low], drugs_of(drugs, a - low, b - low), a)

        yield Block(low, high, encode, None if names is None else names(low, high))
        low = high


def encode_token_block(
    options: EncodeOptions, rows: GeneRows, drug_ids: np.ndarray | None, first: int
) -> Callable[[int, int], EncodedCells]:
    """`Block.encode` of cells whose genes are tokens, from the cell with the number `first` on."""
    from tahoex1_hf.cells.compiled_encoding import encode_token_rows

    def encode(start: int, stop: int) -> EncodedCells:
        low, high = rows.offsets[start - first], rows.offsets[stop - first]
        part = GeneRows(
            rows.tokens[low:high], rows.counts[low:high], rows.offsets[start - first : stop - first + 1] - low
        )
        drugs = None if drug_ids is None else drug_ids[start - first : stop - first]
        return encode_token_rows(options.tokenizer, part, drugs, start, options.seed)

    return encode
