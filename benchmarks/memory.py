"""Measure the peak memory of `tahoex1 embed` on files of growing size, each in a fresh process."""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from benchmarks.child import ROOT, python
from benchmarks.measuring import Row, Series, Suite, progress

MODEL = ROOT / "examples" / "demo_checkpoint"
EXPRESSED, BLOCK = 20, 10_000
LOADING = (
    "import anndata, tahoex1_hf.cli.app; from tahoex1_hf import TahoeX1Model, TahoeX1Tokenizer; "
    f"TahoeX1Model.from_pretrained({str(MODEL)!r}), TahoeX1Tokenizer.from_pretrained({str(MODEL)!r})"
)


def demo_genes() -> list[str]:
    """Return the Ensembl ids that the demo checkpoint knows."""
    return [token for token in json.loads((MODEL / "vocab.json").read_text()) if token.startswith("ENSG")]


def write_h5ad(path: Path, num_cells: int, expressed: int = EXPRESSED) -> Path:
    """Write an .h5ad file of synthetic cells block by block, so that a large one needs no more memory."""
    genes = demo_genes()
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        _write_names(file.create_group("obs"), num_cells, (f"cell{i}" for i in range(num_cells)))
        _write_names(file.create_group("var"), len(genes), iter(genes))
        matrix = file.create_group("X")
        matrix.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        matrix.attrs["shape"] = np.array([num_cells, len(genes)])
        matrix["indptr"] = np.arange(num_cells + 1, dtype=np.int64) * expressed
        chunks = (min(num_cells, BLOCK) * expressed,)
        data = matrix.create_dataset("data", (num_cells * expressed,), np.float32, chunks=chunks)
        indices = matrix.create_dataset("indices", (num_cells * expressed,), np.int32, chunks=chunks)
        rng = np.random.default_rng(0)
        for start in range(0, num_cells, BLOCK):
            cells = min(BLOCK, num_cells - start)
            place = slice(start * expressed, (start + cells) * expressed)
            steps = rng.integers(1, len(genes) // expressed + 1, (cells, expressed))
            indices[place] = (np.cumsum(steps, axis=1) - 1).ravel()  # distinct and sorted
            data[place] = rng.geometric(0.4, cells * expressed)
    return path


def _write_names(group: h5py.Group, number: int, names: Iterator[str]) -> None:
    group.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
    group.attrs["column-order"] = np.array([], dtype=h5py.string_dtype())
    index = group.create_dataset("_index", (number,), h5py.string_dtype())
    index.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    for start in range(0, number, BLOCK):
        index[start : start + BLOCK] = [next(names) for _ in range(min(BLOCK, number - start))]


@dataclass(frozen=True)
class Embedded:
    """A finished run of the command."""

    cells: int
    seconds: float
    peak_mb: float


def embed_command(source: Path, output: Path, model: Path = MODEL) -> list[str]:
    """Return the arguments of Python for `tahoex1 embed`."""
    return ["-m", "tahoex1_hf", "embed", str(source), str(output), "--model", str(model), "--device", "cpu",
            "--max-length", "64", "--dtype", "float32"]  # fmt: skip


def loading(suite: Suite) -> tuple[float, float]:
    """Return the seconds and peak memory (MB) of a process that imports what the command needs and loads the model."""
    runs = [python("-c", LOADING).checked() for _ in range(suite.pick(3, 1))]
    return min(run.seconds for run in runs), max(run.peak_mb for run in runs)


@functools.cache
def embedded_files(suite: Suite) -> list[Embedded]:
    """Run the command on files of growing size; the part `scaling` uses these runs too."""
    runs = []
    for cells in suite.pick((1_000, 10_000, 100_000, 1_000_000), (1_000, 10_000)):
        progress(f"  tahoex1 embed, {cells:,} cells")
        source = write_h5ad(suite.folder / f"{cells}.h5ad", cells)
        output = suite.folder / f"{cells}.parquet"
        run = python(*embed_command(source, output)).checked()
        assert output.is_file(), f"{output} was not written:\n{run.output}"
        runs.append(Embedded(cells, run.seconds, run.peak_mb))
        source.unlink()
        output.unlink()
    return runs


def measure(suite: Suite) -> list[Row]:
    """Return the rows of this part. Each file is embedded once: other users of the machine do not change memory."""
    _, alone = loading(suite)
    rows = [Row("memory", "importing and loading alone", "MB", Series([alone]), smaller_is_better=True,
                remark="demo checkpoint (166,401 parameters)")]  # fmt: skip
    for run in embedded_files(suite):
        rows.append(
            Row("memory", f"tahoex1 embed, {run.cells:,} cells", "MB", Series([run.peak_mb]), smaller_is_better=True,
                remark=f"{run.peak_mb - alone:+.0f} MB beside loading; {run.seconds:.0f} s in all",
                details={"cells": run.cells, "seconds": run.seconds})
        )  # fmt: skip
    return rows
