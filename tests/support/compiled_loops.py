"""Compile the loops that several test processes call, once, while these collect tests: `python compiled_loops.py`.

numba keeps them on disk. In a clean clone each process would compile them for itself, 25 CPU seconds.
"""

import tempfile
from pathlib import Path

import numpy as np
from cells import write_vocab

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.cells import compilation
from tahoex1_hf.cells.ragged import RowViews
from tahoex1_hf.data.collator import CellCollator


def main() -> None:
    """Compile what encodes cells of a file, and cells of a dataset in each of its types."""
    compilation.load_loops(np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        collator = CellCollator(TahoeX1Tokenizer(str(write_vocab(Path(folder))), context_length=8))
    start, length = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)
    for genes, counts in ((np.uint16, np.uint16), (np.uint16, np.float32), (np.int32, np.float32)):
        cells = RowViews(np.full(1, 5, dtype=genes), start, np.ones(1, dtype=counts), start, length)
        collator.collate([(start, cells)], np.zeros(1, dtype=np.uint64))


if __name__ == "__main__":
    main()
