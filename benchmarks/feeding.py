"""Measure making training batches from disk, in a short form of `python -m benchmarks.data`, beside other loaders."""

from collections.abc import Callable
from pathlib import Path

from benchmarks import data, loaders
from benchmarks.machine import ALL_CORES, bound_to
from benchmarks.measuring import Row, Series, Suite, Task, in_turn
from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.data.collator import CellCollator
from tahoex1_hf.data.feeding import CellBatches

BATCH = 64
# Rows of the table: name, cores, and the names that `benchmarks.data` has for ours and for the reference.
PAIRS = (
    ("1 core", 1, "tahoex1_hf, 1 core", "torch loop, 1 core"),
    ("2 cores (2 threads, reference: 2 workers)", 2, "tahoex1_hf, 2 cores (2 threads)",
     "torch loop, 2 cores (2 workers)"),
)  # fmt: skip


def bytes_per_cell(folder: Path, vocab: Path, num_cells: int) -> float:
    """Return the bytes per cell that are read from the Arrow file and written into a batch."""
    collator = CellCollator(TahoeX1Tokenizer(str(vocab), context_length=data.CONTEXT))
    batch = next(iter(CellBatches(folder / "arrow", collator, batch_size=BATCH)))
    written = sum(tensor.numel() * tensor.element_size() for tensor in batch.values()) / BATCH
    return data.bytes_per_cell(folder, num_cells, None)["arrow"] + written


def measure(suite: Suite) -> list[Row]:
    """Return the rows of this part."""
    num_cells = suite.pick(8000, 2000)
    folder = suite.folder / "feeding"
    folder.mkdir()
    with bound_to(len(ALL_CORES)):
        vocab, origin = data.make_files(folder, num_cells)
        work = data.measurements(folder, vocab, BATCH, num_cells)
        gigabytes = {"copy": bytes_per_cell(folder, vocab, num_cells) / 1e9}
        others = {name: make() for name, make in loaders_of(folder).items() if not loaders.missing(name)}
    tasks: dict[str, Task] = {}
    for _, cores, ours, theirs in PAIRS:
        if cores <= len(ALL_CORES):
            tasks[theirs] = Task(_bound(cores, work[theirs][1]))
            tasks[ours] = Task(_bound(cores, work[ours][1]), suite.limits[f"copy {cores}"], gigabytes)
    tasks |= {name: Task(_bound(len(ALL_CORES), work)) for name, work in others.items()}
    series = in_turn(tasks, suite.rounds)
    rows = []
    for name, _, ours, theirs in PAIRS:
        if ours not in series:
            rows.append(Row("feeding", name, not_measured="this process may use one core only"))
            continue
        remark = f"{origin}, {num_cells:,} cells, batches of {BATCH}, context {data.CONTEXT}"
        rows.append(Row("feeding", name, "cells/s", series[ours], series[theirs], remark))
    return [*rows, *_beside_loaders(series, remark)]


def loaders_of(folder: Path) -> dict[str, Callable[[], Callable[[], float]]]:
    """Return, by name, what makes other loaders ready for the cells of `make_files`."""
    file = folder / "cells.h5ad"
    return {
        loaders.SCDATASET: lambda: loaders.of_scdataset(file, BATCH),
        loaders.ANNBATCH: lambda: loaders.of_annbatch(file, folder / "annbatch.zarr", BATCH),
    }


def _beside_loaders(series: dict[str, Series], remark: str) -> list[Row]:
    """Return rows of ours, finished batches on all cores, beside loaders that hand out counts."""
    ours = next(each for _, _, each, _ in reversed(PAIRS) if each in series)
    rows = []
    for name in (loaders.SCDATASET, loaders.ANNBATCH):
        title, reason = f"finished batches, beside counts from {name}", loaders.missing(name)
        if reason:
            rows.append(Row("feeding", title, not_measured=reason))
        else:
            rows.append(Row("feeding", title, "cells/s", series[ours], series[name], remark))
    return rows


def _bound(cores: int, work: Callable[[], float]) -> Callable[[], float]:
    def measure() -> float:
        with bound_to(cores):
            return work()

    return measure
