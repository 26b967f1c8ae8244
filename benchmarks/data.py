"""Measure making training batches from disk, beside the original's way, `datasets` and the machine's memory copy.

    python -m benchmarks.data [--cells 20000] [--rounds 5] [--batch-size 64] [--mds FOLDER] [--json FILE]

Each round measures everything in turn; read the ratios within a round, since the machine may be shared. "One core"
means that the process is bound to one core; on two cores, ours uses two threads, the reference two worker processes
(as the original does), each with its own share of the batches. Batches are finished: binned, sampled to the context,
masked, padded.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import anndata
import datasets
import numpy as np
import pandas as pd
import torch
import typer
from scipy.sparse import csr_matrix, vstack
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.cells import VOCABULARY_SIZE, real_or_synthetic_cells
from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.data.collator import CellCollator
from tahoex1_hf.data.config import parse_config
from tahoex1_hf.data.feeding import CellBatches
from tahoex1_hf.data.preparation import prepare

CONTEXT = 1024
PAD_ID, CLS_ID, PAD_VALUE, MASK_VALUE = 0, 1, -2.0, -1.0


class TorchLoop(IterableDataset):
    """The reference, which does the work of the original's collator, cell by cell in torch, on cells in memory.

    It takes the original's steps (`torch.quantile` of the cell at 50 places, bucketing, a random permutation to sample
    and another to choose the targets, padding), but reads no files, which is in its favour.
    """

    def __init__(self, cells: list[tuple[torch.Tensor, torch.Tensor]], batch_size: int) -> None:
        self.cells, self.batch_size = cells, batch_size

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        starts = range(0, len(self.cells) - self.batch_size + 1, self.batch_size)
        for start in list(starts)[first::stride]:
            yield self.collate(self.cells[start : start + self.batch_size])

    def collate(self, cells: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        width = min(max(len(genes) + 1 for genes, _ in cells), CONTEXT)
        padded_genes, padded_values, padded_raw = [], [], []
        for genes, counts in cells:
            values = self.bins(counts)
            genes = torch.cat([torch.tensor([CLS_ID]), genes])
            values = torch.cat([torch.tensor([PAD_VALUE]), values])
            raw = torch.cat([torch.tensor([PAD_VALUE]), counts])
            if len(genes) > width:
                kept = torch.cat([torch.tensor([0]), 1 + torch.randperm(len(genes) - 1)[: width - 1]])
                genes, values, raw = genes[kept], values[kept], raw[kept]
            missing = width - len(genes)
            padded_genes.append(torch.cat([genes, torch.full((missing,), PAD_ID)]))
            padded_values.append(torch.cat([values, torch.full((missing,), PAD_VALUE)]))
            padded_raw.append(torch.cat([raw, torch.full((missing,), PAD_VALUE)]))
        gene, target = torch.stack(padded_genes), torch.stack(padded_values)
        mask = torch.stack([self.targets(row) for row in target])
        expression = target.masked_fill(mask, MASK_VALUE)
        return {"gene": gene, "expr": expression, "expr_target": target, "expr_raw": torch.stack(padded_raw),
                "gen_mask": mask}  # fmt: skip

    @staticmethod
    def bins(row: torch.Tensor) -> torch.Tensor:
        edges = torch.quantile(row[row > 0], torch.linspace(0, 1, 50))
        return (torch.bucketize(row, edges) + 1).float()

    @staticmethod
    def targets(row: torch.Tensor) -> torch.Tensor:
        places = torch.nonzero(row != PAD_VALUE).flatten()
        mask = torch.zeros(len(row), dtype=torch.bool)
        mask[places[torch.randperm(len(places))[: int(0.5 * len(places))]]] = True
        return mask


def make_files(folder: Path, num_cells: int) -> tuple[Path, str]:
    """Write the cells as .h5ad and as prepared Arrow and Parquet datasets, and again with non-integer counts."""
    counts, gene_ids, origin = real_or_synthetic_cells(min(num_cells, 1000))
    counts = vstack([csr_matrix(counts)] * -(-num_cells // counts.shape[0])).tocsr()[:num_cells]
    obs = pd.DataFrame(
        {"drug": np.array(["aspirin", "DMSO"])[np.arange(num_cells) % 2]}, index=map(str, range(num_cells))
    )
    var = pd.DataFrame(index=gene_ids)
    anndata.AnnData(counts, obs=obs, var=var).write_h5ad(folder / "cells.h5ad")
    anndata.AnnData(counts * np.float32(0.37), obs=obs, var=var).write_h5ad(folder / "fractions.h5ad")
    tokens = ["<pad>", "<cls>", "<eoc>", "<drug>", *gene_ids]
    tokens += [f"<junk{i}>" for i in range(VOCABULARY_SIZE - len(tokens))]
    vocab = folder / "vocab.json"
    vocab.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    for name, source, form in (
        ("arrow", "cells", "arrow"),
        ("parquet", "cells", "parquet"),
        ("floats", "fractions", "arrow"),
    ):
        files = {"kind": "anndata", "paths": [str(folder / f"{source}.h5ad")], "metadata": {"drug": "drug"}}
        files["non_integer_counts"] = "keep"
        config = {"sources": [files], "output": str(folder / name), "vocab": str(vocab), "format": form}
        prepare(parse_config({**config, "validation": {"fraction": 0}}, "benchmark"))
    return vocab, origin


def on_cores(number: int) -> list[int]:
    """Bind this process to a number of cores, and return them."""
    cores = sorted(ALL_CORES)[:number]
    os.sched_setaffinity(0, cores)
    return cores


ALL_CORES = os.sched_getaffinity(0)


def rate(batches: Iterable[Any], size: int, most: int) -> float:
    """Return the cells per second, without the first two batches."""
    done, start = 0, 0.0
    for number, _ in enumerate(batches):
        if number == 2:
            start = time.perf_counter()
        elif number > 2:
            done += size
            if done >= most:
                break
    return done / (time.perf_counter() - start)


def memory_copy() -> float:
    """Return the rate of a copy of 256 MB, in GB/s, read and written once each."""
    source = np.ones(32 * 2**20)
    target = np.empty_like(source)
    np.copyto(target, source)
    start = time.perf_counter()
    for _ in range(4):
        np.copyto(target, source)
    return 4 * source.nbytes / (time.perf_counter() - start) / 1e9


def measurements(
    folder: Path, vocab: Path, batch_size: int, num_cells: int
) -> dict[str, tuple[int, Callable[[], float]]]:
    """Return name -> number of cores and the function that measures."""
    plain = CellCollator(TahoeX1Tokenizer(str(vocab), context_length=CONTEXT))
    packed = CellCollator(plain.tokenizer, packed=True)
    table = {"<pad>": 0, "aspirin": 1, "DMSO": 2}
    drugs = CellCollator(TahoeX1Tokenizer(str(vocab), context_length=CONTEXT, drug_to_id=table))
    rows = datasets.load_dataset(str(folder / "arrow"), split="train", cache_dir=str(folder / "cache")).with_format(
        "arrow"
    )
    first = rows[:2048].combine_chunks()
    in_memory = [
        (torch.tensor(genes), torch.tensor(counts, dtype=torch.float32))
        for genes, counts in zip(first["genes"].to_pylist(), first["counts"].to_pylist(), strict=True)
    ]
    loop = TorchLoop(in_memory, batch_size)

    def ours(name: str, collator: CellCollator, threads: int) -> Callable[[], float]:
        batches = CellBatches(folder / name, collator, batch_size=batch_size, num_threads=threads)
        return lambda: rate(batches, batch_size, num_cells)

    def reference(workers: int) -> Callable[[], float]:
        loader = DataLoader(loop, batch_size=None, num_workers=workers, persistent_workers=False)
        return lambda: rate(loader, batch_size, 1500)

    def of_datasets(step: int) -> Callable[[], float]:
        order = np.random.default_rng(0).permutation(len(rows) // step).tolist()

        def measure() -> float:
            return rate((rows[i * step : (i + 1) * step] for i in order), step, min(num_cells, 200 * step))

        return measure

    return {
        "torch loop, 1 core": (1, reference(0)),
        "tahoex1_hf, 1 core": (1, ours("arrow", plain, 0)),
        "torch loop, 2 cores (2 workers)": (2, reference(2)),
        "tahoex1_hf, 2 cores (2 threads)": (2, ours("arrow", plain, 2)),
        "  packed, 2 cores": (2, ours("arrow", packed, 2)),
        "  with drug token, 2 cores": (2, ours("arrow", drugs, 2)),
        "  non-integer counts, 2 cores": (2, ours("floats", plain, 2)),
        "  from Parquet, 2 cores": (2, ours("parquet", plain, 2)),
        "datasets, rows (views), 1 core": (1, of_datasets(1)),
        "datasets, blocks of 64 (views), 1 core": (1, of_datasets(64)),
        "memory copy, GB/s, 1 core": (1, memory_copy),
    }  # fmt: skip


def bytes_per_cell(folder: Path, num_cells: int, mds: Path | None) -> dict[str, float]:
    """Return the bytes of a cell on disk, by format."""
    sizes = {"h5ad (uncompressed)": (folder / "cells.h5ad").stat().st_size / num_cells}
    for name in ("arrow", "parquet", "floats"):
        sizes[{"floats": "arrow, non-integer"}.get(name, name)] = (
            sum(path.stat().st_size for path in (folder / name / "data").iterdir()) / num_cells
        )
    if mds is not None:
        shards = json.loads((mds / "index.json").read_text())["shards"]
        samples = sum(shard["samples"] for shard in shards)
        for kind in ("raw_data", "zip_data"):
            if all(shard.get(kind) for shard in shards):
                sizes[f"MDS, {kind}"] = sum(shard[kind]["bytes"] for shard in shards) / samples
    return sizes


def main(
    cells: Annotated[int, typer.Option(help="Number of cells in the dataset.")] = 20000,
    rounds: Annotated[int, typer.Option(help="Number of rounds.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Number of cells in a batch.")] = 64,
    mds: Annotated[Path | None, typer.Option(help="Folder with the same cells as MDS, to compare sizes.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to which the figures are also written.")
    ] = None,
) -> None:
    """Print the rates, their ratios and the bytes per cell."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        vocab, origin = make_files(folder, cells)
        sizes = bytes_per_cell(folder, cells, mds)
        tasks = measurements(folder, vocab, batch_size, cells)
        results: dict[str, list[float]] = {name: [] for name in tasks}
        for _ in range(rounds):
            for name, (cores, measure) in tasks.items():
                on_cores(cores)
                results[name].append(measure())
    ratios = {
        f"tahoex1_hf / torch loop, {cores}": statistics.median(
            a / b for a, b in zip(results[ours], results[reference], strict=True)
        )
        for cores, ours, reference in (
            ("1 core", "tahoex1_hf, 1 core", "torch loop, 1 core"),
            ("2 cores", "tahoex1_hf, 2 cores (2 threads)", "torch loop, 2 cores (2 workers)"),
        )
    }
    print(f"{origin}, {cells:,} cells; context {CONTEXT}, batches of {batch_size}; {rounds} rounds\n")
    print(f"{'cells/s':40}{'median':>12}{'best':>12}")
    for name, values in results.items():
        print(f"{name:40}{statistics.median(values):12,.0f}{max(values):12,.0f}")
    for name, value in ratios.items():
        print(f"{name:40}{value:12.1f}")
    print("\nbytes per cell on disk")
    for name, value in sizes.items():
        print(f"{name:40}{value:12,.0f}")
    if json_file is not None:
        json_file.write_text(
            json.dumps({"source": origin, "rates": results, "ratios": ratios, "bytes": sizes}, indent=1)
        )


if __name__ == "__main__":
    typer.run(main)
