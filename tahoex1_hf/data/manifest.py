# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The manifest of a prepared dataset (input, cells left out with the reasons, content), and its card."""

import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import pyarrow as pa

import tahoex1_hf
from tahoex1_hf.cells.readers.manifests import FORMAT, FORMAT_VERSION
from tahoex1_hf.common.digests import json_digest
from tahoex1_hf.common.names import short_names
from tahoex1_hf.data.output_folder import without_paths
from tahoex1_hf.data.pieces import DROP_RULES, SPLITS, PieceStatistics
from tahoex1_hf.data.shards import DatasetSchema, ShardRecord
from tahoex1_hf.data.sources.base import FileReport

_LIBRARIES = ("anndata", "h5py", "numpy", "pandas", "pyarrow", "scipy", "zarr")


@dataclass
class FileOutcome:
    """The outcome of a file: its pieces and the sums of their statistics, or the reason why it was skipped."""

    source: int
    path: str
    report: FileReport | None
    reason: str | None
    pieces: list[str] = field(default_factory=list)
    statistics: PieceStatistics = field(default_factory=PieceStatistics)

    @property
    def cells_kept(self) -> int:
        """Number of cells that are in the dataset."""
        return sum(self.statistics.cells.values())

    def add(self, path: str, piece: PieceStatistics) -> None:
        """Add a piece and its statistics."""
        self.pieces.append(path)
        total = self.statistics
        for split in SPLITS:
            total.cells[split] += piece.cells[split]
            total.genes[split] += piece.genes[split]
        for rule in DROP_RULES:
            total.dropped[rule] += piece.dropped[rule]
        total.cells_in += piece.cells_in
        total.counts += piece.counts
        total.unknown_counts += piece.unknown_counts
        total.max_count = max(total.max_count, piece.max_count)
        total.whole_numbers &= piece.whole_numbers
        total.join_misses += piece.join_misses


def build_manifest(
    identity: dict[str, Any],
    outcomes: list[FileOutcome],
    schema: DatasetSchema,
    shards: dict[str, list[ShardRecord]],
    full_paths: bool,
) -> dict[str, Any]:
    """Put together `manifest.json`.

    Raises:
        RuntimeError: If the numbers of cells do not add up, which would be a fault of this program.
    """
    paths = [outcome.path for outcome in outcomes]
    names = paths if full_paths else short_names(paths)
    files = [{"path": name, **_file_entry(outcome)} for name, outcome in zip(names, outcomes, strict=True)]
    cells = {split: sum(shard.cells for shard in shards[split]) for split in SPLITS}
    dropped = {rule: sum(outcome.statistics.dropped[rule] for outcome in outcomes) for rule in DROP_RULES}
    cells_in = sum(outcome.statistics.cells_in for outcome in outcomes)
    if cells_in != sum(cells.values()) + sum(dropped.values()):
        raise RuntimeError(f"{cells_in} cells went in, {cells} came out and {dropped} were dropped.")
    totals = {
        "cells_in": cells_in,
        "cells_out": sum(cells.values()),
        "dropped": dropped,
        "files_read": sum(outcome.reason is None for outcome in outcomes),
        "files_skipped": sum(outcome.reason is not None for outcome in outcomes),
    }
    sources = [
        {
            "kind": source["kind"],
            "files": [entry for entry, outcome in zip(files, outcomes, strict=True) if outcome.source == n],
        }
        for n, source in enumerate(identity["configuration"]["sources"])
    ]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **(identity if full_paths else without_paths(identity)),
        "identity_sha256": json_digest(identity),
        "totals": totals,
        "columns": {field.name: _type_name(field.type) for field in schema.arrow()},
        "splits": {
            split: {"cells": cells[split], "shards": [asdict(shard) for shard in shards[split]]} for split in SPLITS
        },
        "sources": sources,
        "versions": {
            "tahoex1_hf": tahoex1_hf.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
    }


def _file_entry(outcome: FileOutcome) -> dict[str, Any]:
    report, statistics = outcome.report, outcome.statistics
    if outcome.reason is not None:
        return {"skipped": outcome.reason}
    assert report is not None  # a file is either reported on or skipped
    entry: dict[str, Any] = {
        "fingerprint": report.fingerprint,
        "cells_in": statistics.cells_in,
        "cells_out": dict(statistics.cells),
        "dropped": {rule: statistics.dropped[rule] for rule in DROP_RULES if statistics.dropped[rule]},
        "genes": report.num_genes,
        "genes_known": report.num_genes_known,
        "unknown_genes": report.unknown_genes,
        "counts_kept": statistics.counts,
        "counts_of_unknown_genes": statistics.unknown_counts,
        "max_count": statistics.max_count,
        "whole_numbers": statistics.whole_numbers,
    }
    return {**entry, "cells_without_joined_row": statistics.join_misses} if statistics.join_misses else entry


def _type_name(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"list<{kind.value_type}>"
    return f"dictionary<{kind.value_type}>" if pa.types.is_dictionary(kind) else str(kind)


def dataset_card(manifest: dict[str, Any]) -> str:
    """Return the dataset's `README.md`, whose head tells `datasets` and the Hub where the splits are."""
    splits = {split: part for split, part in manifest["splits"].items() if part["shards"]}
    extension = manifest["configuration"]["format"]
    data_files = "".join(f"  - split: {split}\n    path: data/{split}-*.{extension}\n" for split in splits)
    totals = manifest["totals"]
    sources = "".join(
        f"| {source['kind']} | {sum('skipped' not in file for file in source['files'])} | "
        f"{sum(file.get('cells_in', 0) for file in source['files']):,} | "
        f"{sum(sum(file.get('cells_out', {}).values()) for file in source['files']):,} |\n"
        for source in manifest["sources"]
    )
    columns = "".join(f"- `{name}`: {kind}\n" for name, kind in manifest["columns"].items())
    dropped = ", ".join(f"{rule} {count:,}" for rule, count in totals["dropped"].items() if count) or "none"
    return f"""---
configs:
- config_name: default
  data_files:
{data_files}tags:
- biology
- single-cell
- transcriptomics
---
# Cells prepared for training Tahoe-x1

{", ".join(f"{part['cells']:,} cells ({split})" for split, part in splits.items())}, in random order, as raw counts
(`tahoex1 prepare`, seed {manifest["configuration"]["seed"]}). `genes` holds ids of `vocab.json`, without `<cls>`.

```python
from datasets import load_dataset

cells = load_dataset("PATH_OF_THIS_FOLDER", split="{next(iter(splits))}")
```

## Columns

{columns}
## Sources

| kind | files | cells read | cells kept |
|---|---|---|---|
{sources}
Cells dropped: {dropped}. Files skipped: {totals["files_skipped"]}. `manifest.json` has every file with its numbers,
the settings, the versions and a checksum of every shard.
"""
