"""Measure tokenizing, from rows of a CSR matrix to cells without padding, beside the original's way, cell by cell."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from benchmarks import reference
from benchmarks.cells import cells_in_torch, ensembl_ids, synthetic_counts, tokenizer_for
from benchmarks.machine import ALL_CORES, bound_to
from benchmarks.measuring import Row, Suite, Task, in_turn
from tahoex1_hf.cells import compilation
from tahoex1_hf.cells.compiled_encoding import encode_compiled
from tahoex1_hf.cells.readers.base import gene_rows
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch
from tahoex1_hf.padding_tahoe_x1 import EncodedCells
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

COLUMNS, EXPRESSED, CONTEXT, CHUNK = 20_000, 2_500, 2048, 256


def encode_chunk(
    tokenizer: TahoeX1Tokenizer, counts: csr_matrix, genes: GeneMatch, first_cell: int = 0
) -> EncodedCells:
    """Encode rows as `tahoex1 embed` does after reading them."""
    rows, _ = gene_rows(counts, genes, first_cell, tokenizer)
    encoded = encode_compiled(tokenizer, rows, first_cell=first_cell)
    assert encoded is not None
    return encoded


@dataclass(frozen=True)
class Chunks:
    """Cells in chunks, as a reader of files hands them over."""

    tokenizer: TahoeX1Tokenizer
    genes: GeneMatch
    chunks: list[csr_matrix]

    @property
    def num_cells(self) -> int:
        """Number of cells in all chunks."""
        return sum(chunk.shape[0] for chunk in self.chunks)

    def compiled(self, number: int) -> EncodedCells:
        """Encode a chunk as `tahoex1 embed` does."""
        return encode_chunk(self.tokenizer, self.chunks[number], self.genes, first_cell=number * CHUNK)

    def plain(self, number: int) -> EncodedCells:
        """Encode a chunk in numpy alone."""
        return self.tokenizer.encode_counts(self.chunks[number], self.genes, first_cell=number * CHUNK)

    def rate(self, threads: int) -> float:
        """Return the cells per second of the compiled encoding, over about a second."""
        jobs = [*range(len(self.chunks))] * 10
        with bound_to(threads), ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            for _ in pool.map(self.compiled, jobs):
                pass
            return 10 * self.num_cells / (time.perf_counter() - start)

    def plain_rate(self, number: int) -> float:
        """Return the cells per second of numpy alone, on a number of chunks."""
        with bound_to(1):
            start = time.perf_counter()
            cells = sum(self.plain(chunk).num_cells for chunk in range(number))
            return cells / (time.perf_counter() - start)


def reference_rate(cells: list[reference.Cell]) -> float:
    """Return the cells per second of the reference, in batches of eight."""
    with bound_to(1):
        start = time.perf_counter()
        for first in range(0, len(cells), reference.BATCH):
            reference.collate(cells[first : first + reference.BATCH], CONTEXT)
        return len(cells) / (time.perf_counter() - start)


def check_values() -> None:
    """Check that our tokens and bins equal the reference's where nothing is sampled."""
    counts = synthetic_counts(np.array([EXPRESSED] * 8), COLUMNS, seed=1)
    tokenizer = tokenizer_for(ensembl_ids(COLUMNS), EXPRESSED + 1)
    genes = tokenizer.match_genes(ensembl_ids(COLUMNS))
    ours = encode_chunk(tokenizer, counts, genes)
    tokens, values = reference.collate(cells_in_torch(counts, genes.token_ids), EXPRESSED + 1)
    np.testing.assert_array_equal(ours.input_ids, tokens.flatten().numpy())
    np.testing.assert_array_equal(ours.expression_values, values.flatten().numpy())


def measure(suite: Suite) -> list[Row]:
    """Return the rows of this part."""
    compilation.use_now()
    check_values()
    number = suite.pick(24, 4)
    counts = synthetic_counts(np.full(number * CHUNK, EXPRESSED), COLUMNS)
    tokenizer = tokenizer_for(ensembl_ids(COLUMNS), CONTEXT)
    genes = tokenizer.match_genes(ensembl_ids(COLUMNS))
    ours = Chunks(tokenizer, genes, [counts[i * CHUNK : (i + 1) * CHUNK] for i in range(number)])
    cells = cells_in_torch(counts[: suite.pick(512, 128)], genes.token_ids)
    ours.compiled(0)  # compiles the kernels, unless they are compiled already
    ours.plain(0)

    # Tokenizing reads counts and columns and writes int64 ids and float32 values. A copy reads and writes 8 bytes.
    per_cell = {"copy": (EXPRESSED * (4 + 4) + CONTEXT * (8 + 4)) / 1e9}
    tasks = {
        "reference": Task(lambda: reference_rate(cells)),
        "numpy": Task(lambda: ours.plain_rate(suite.pick(4, 1)), suite.limits["copy 1"], per_cell),
        "1 core": Task(lambda: ours.rate(1), suite.limits["copy 1"], per_cell),
    }
    if len(ALL_CORES) > 1:
        tasks["2 cores"] = Task(lambda: ours.rate(2), suite.limits["copy 2"], per_cell)
    series = in_turn(tasks, suite.rounds)
    remark = f"{EXPRESSED:,} genes a cell, context {CONTEXT:,}; bins equal the reference's"
    names = {"numpy": "numpy (encode_counts), 1 core", "1 core": "compiled, 1 core", "2 cores": "compiled, 2 cores"}
    rows = []
    for task, name in names.items():
        if task not in series:
            rows.append(Row("tokenizing", name, not_measured="this process may use one core only"))
            continue
        rows.append(Row("tokenizing", name, "cells/s", series[task], series["reference"], remark))
        remark = "reference on 1 core"
    return rows
