"""Measure an index of embeddings: building it, its recall, and looking for cells in it.

    python -m benchmarks.nearest [--cells 1000000] [--width 512] [--queries 1000] [--folder DIR] [--json FILE]

The embeddings are made: a mixture of cell types, each a cloud of a few dimensions with noise in all of them, of length
1. Each step runs in a process of its own, whose seconds, CPU seconds and memory are told apart. CPU seconds hardly
change with busy neighbours; divided by the cores they say what a free machine would take.
"""

import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from benchmarks.measuring import progress

TYPES, DIMENSIONS, NOISE = 60, 24, 0.15
RECORD = {"model": "made", "revision": "", "hidden_layer": 1, "normalized": "L2", "seed": 0}
KEY, GROUP = "X_tahoe_x1", 4096


def made_embeddings(cells: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings `(cells, width)` and the numbers of their types."""
    random = np.random.default_rng(0)  # the types are the same for all seeds
    centres = random.normal(size=(TYPES, width)).astype(np.float32)
    axes = random.normal(size=(TYPES, DIMENSIONS, width)).astype(np.float32) / DIMENSIONS**0.5
    random = np.random.default_rng(seed)
    types = random.integers(0, TYPES, cells)
    found = centres[types] + NOISE * random.normal(size=(cells, width)).astype(np.float32)
    for kind in range(TYPES):
        own = types == kind
        found[own] += 0.8 * random.normal(size=(int(own.sum()), DIMENSIONS)).astype(np.float32) @ axes[kind]
    return found / np.linalg.norm(found, axis=1, keepdims=True), types


def write_embeddings(path: Path, cells: int, width: int, seed: int) -> None:
    """Write embeddings as `tahoex1 embed` does."""
    kind = pa.list_(pa.float32(), width)
    schema = pa.schema([("cell", pa.string()), ("cell_type", pa.string()), ("n_genes", pa.int64()), (KEY, kind)])
    schema = schema.with_metadata({"tahoe_x1": json.dumps(RECORD)})
    with pq.ParquetWriter(path, schema, use_dictionary=["cell_type"], write_statistics=False) as writer:
        for start in range(0, cells, GROUP):
            number = min(GROUP, cells - start)
            values, types = made_embeddings(number, width, seed + start)
            columns = [
                pa.array([f"cell-{seed}-{start + row}" for row in range(number)]),
                pa.array([f"type {each}" for each in types]),
                pa.array(types * 10),
                pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), type=kind),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def build(path: Path, folder: Path) -> dict[str, Any]:
    """Build the index."""
    from tahoex1_hf.indexing.building import build_index

    found = build_index(path, folder, progress=False)
    return {"recall": found.recall, "partitions": found.partitions, "probes": found.probes}


def look(path: Path, folder: Path, output: Path, **options: Any) -> dict[str, Any]:
    """Look for cells in the index."""
    from tahoex1_hf.indexing.querying import query_index

    found = query_index(path, folder, output, progress=False, **options)
    return {"recall": found.recall, "passing": found.passing}


def _child(queue: Any, work: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    start = time.perf_counter()
    found = work(*arguments, **options) or {}
    used = resource.getrusage(resource.RUSAGE_SELF)
    found |= {"seconds": round(time.perf_counter() - start, 1), "cpu": round(used.ru_utime + used.ru_stime, 1)}
    queue.put({**found, "memory_gb": round(used.ru_maxrss / 2**20, 2)})


def measured(work: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
    """Do a step in a new process; return what it returns, seconds, CPU seconds (imports included) and peak memory."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue, work, arguments, options))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{work.__name__} ended with {process.exitcode}")
    found = dict(queue.get())
    progress(f"{work.__name__}: {found}")
    return found


def agreement(found: Path, truth: Path) -> float:
    """Return the share of the rows of one table of neighbours that are in another."""
    sets = []
    for path in (found, truth):
        table = pq.read_table(path, columns=["query", "row"])
        sets.append(set(zip(table["query"].to_pylist(), table["row"].to_pylist(), strict=True)))
    return len(sets[0] & sets[1]) / len(sets[1])


def measure(folder: Path, cells: int, width: int, queries: int) -> dict[str, dict[str, Any]]:
    """Do all steps, and return what each took."""
    source, asked, index = folder / "embeddings.parquet", folder / "queries.parquet", folder / "index"
    measured(write_embeddings, source, cells, width, 0)
    measured(write_embeddings, asked, queries, width, 10**9)
    filtered = {"where": "cell_type = 'type 7' OR cell_type = 'type 8' OR n_genes > 300"}
    steps = {
        "build": measured(build, source, index),
        "query": measured(look, asked, index, folder / "found.parquet"),
        "query, filtered": measured(look, asked, index, folder / "filtered.parquet", **filtered),
        "query, exact": measured(look, asked, index, folder / "exact.parquet", exact=True),
        "query, filtered, exact": measured(look, asked, index, folder / "all.parquet", exact=True, **filtered),
    }
    for name, found, truth in (("query", "found", "exact"), ("query, filtered", "filtered", "all")):
        paths = (folder / f"{each}.parquet" for each in (found, truth))
        steps[name]["recall of these cells"] = agreement(*paths)
    size = sum(path.stat().st_size for path in index.rglob("*") if path.is_file())
    steps["build"]["disk_gb"] = round(size / 2**30, 2)
    return steps


def main(
    cells: Annotated[int, typer.Option(help="Cells of the index.")] = 1_000_000,
    width: Annotated[int, typer.Option(help="Dimensions.")] = 512,
    queries: Annotated[int, typer.Option(help="Cells to look for.")] = 1000,
    folder: Annotated[Path | None, typer.Option(help="Folder to work in.", show_default="a temporary one")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the results.")] = None,
) -> None:
    """Measure building an index, and looking for cells in it."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) if folder is None else folder
        place.mkdir(parents=True, exist_ok=True)
        steps = measure(place, cells, width, queries)
    for name, step in steps.items():
        print(f"{name}: " + ", ".join(f"{what} {value}" for what, value in step.items()))
    if json_file is not None:
        json_file.write_text(
            json.dumps({"cells": cells, "width": width, "queries": queries, **steps}, indent=1) + "\n"
        )


if __name__ == "__main__":
    typer.run(main)
