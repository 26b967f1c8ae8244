"""Write the tables of speed in README.md and docs/speed.md from what was measured, which lies in docs/benchmarks.

A whole run writes `results.json`; a run of one part alone writes a file of the part's name, which then stands for that
part. Nothing else says what was measured: tests/benchmarks/test_pages.py holds the pages against these files.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.table import number

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "benchmarks"
RESULTS, GPU = "results.json", "gpu-cost.jsonl"
Rows = Mapping[tuple[str, str], Mapping[str, Any]]

_SHARES = {"useful": 0, "copy": 0, "performed": 1}  # the order in which shares of the limit are given
_RAGGED = "ragged (200-2,048 tokens), float32"
_RAGGED_BF16 = "ragged (200-2,048 tokens), bfloat16"
_TWO_CORES = "2 cores (2 threads, reference: 2 workers)"


@dataclass(frozen=True)
class Line:
    """A line of a table.

    Attributes:
        text: Its first column; `{machine}` stands for the cores and the instructions of the machine.
        part: Part of the suite.
        name: Name of the row there.
    """

    text: str
    part: str
    name: str


README = (
    Line("counts to tokens, cells of 2,500 genes, 1 CPU core", "tokenizing", "compiled, 1 core"),
    Line("embedding cells of 200 to 2,048 tokens, float32, {machine}", "embedding", _RAGGED),
    Line("the same in bf16, beside the reference in float32", "embedding", _RAGGED_BF16),
    Line("training batches from disk, 2 CPU cores", "feeding", _TWO_CORES),
    Line("a training step, 4 cells of 1,024 tokens, bf16, beside fused attention, {machine}", "training",
         "4 cells of 1,024 tokens, packed_bfloat16, beside fused attention"),
)  # fmt: skip
ON_GPU = "embed 70M, 1,024 tokens"

ALL = (
    Line("counts (CSR, 2,500 genes, context 2,048) to tokens, 1 core", "tokenizing", "compiled, 1 core"),
    Line("the same on 2 cores (reference on 1)", "tokenizing", "compiled, 2 cores"),
    Line("embedding, ragged cells of 200 to 2,048 tokens, float32", "embedding", _RAGGED),
    Line("the same, bf16", "embedding", _RAGGED_BF16),
    Line("the same, int8 weights", "embedding", "ragged (200-2,048 tokens), int8"),
    Line("embedding, short cells of 200 to 400 tokens, float32", "embedding", "short (200-400 tokens), float32"),
    Line("the same, bf16", "embedding", "short (200-400 tokens), bfloat16"),
    Line("embedding, long cells of 2,048 tokens, float32", "embedding", "long (2,048 tokens), float32"),
    Line("the same, bf16", "embedding", "long (2,048 tokens), bfloat16"),
    Line("embeddings of cells and genes, ragged, float32", "genes", "cells and gene means, ragged, float32"),
    Line("training batches from disk, 1 core", "feeding", "1 core"),
    Line("the same on 2 cores", "feeding", _TWO_CORES),
)
TRAINING = (
    Line("4 cells of 1,024 tokens, packed, float32", "training", "4 cells of 1,024 tokens, packed"),
    Line("the same, bf16", "training", "4 cells of 1,024 tokens, packed_bfloat16"),
    Line("4 ragged cells (mean 667 tokens), packed, float32", "training", "4 ragged cells, mean 667 tokens, packed"),
    Line("the same, bf16", "training", "4 ragged cells, mean 667 tokens, packed_bfloat16"),
)
GPU_LINES = (
    ("embedding, 70M, cells of 1,024 tokens", ON_GPU),
    ("embedding, 70M, cells of 64 to 2,048 tokens", "embed 70M, 64 to 2,048 tokens"),
    ("embedding, 3B, cells of 565 to 2,048 tokens", "embed 3B, 565 to 2,048 tokens"),
    ("training, 70M, masked attention, 64 cells of 1,024", "train 70M observed_or_self, 64 cells of equal lengths"),
    ("the same, cells of 64 to 1,024 tokens", "train 70M observed_or_self, 64 cells of ragged lengths"),
    ("training, 70M, full attention, 64 cells of 1,024", "train 70M full, 64 cells of equal lengths"),
    ("training, 1.3B, masked attention, 24 cells of 1,024", "train 1.3B observed_or_self, 24 cells of equal lengths"),
)


def read_rows(folder: Path = RECORD) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what was measured by part and name, with its machine; the file of a part stands for that part."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    files = [folder / RESULTS, *sorted(path for path in folder.glob("*.json") if path.name != RESULTS)]
    for path in files:
        report = json.loads(path.read_text(encoding="utf-8"))
        own = [row for row in report["rows"] if path.name == RESULTS or row["part"] == path.stem]
        if path.name != RESULTS:
            found = {key: row for key, row in found.items() if key[0] != path.stem}
        for row in own:
            found[row["part"], row["name"]] = row | {"machine": report["machine"]}
    return found


def read_gpu(folder: Path = RECORD) -> dict[str, dict[str, Any]]:
    """Return what was measured on a GPU, by its name; nothing if the check was not run."""
    path = folder / GPU
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {row["what"]: row for row in map(json.loads, lines)}


def readme_table(rows: Rows, gpu: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the README's table."""
    lines = ["| | here | ratio |", "|---|---|---|"]
    for line in README:
        row = rows.get((line.part, line.name), {"not_measured": "no such row"})
        text = line.text.format(machine=_machine(row))
        lines.append(f"| {text} | {_rate(row)} | {_ratio(row)} |")
    if row := gpu.get(ON_GPU, {}):
        rate = f"{number(row['cells_per_s'])} cells/s"
        lines.append(f"| embedding cells of 1,024 tokens, bf16, one H100 | {rate} | not measured |")
    return "\n".join(lines)


def suite_table(rows: Rows) -> str:
    """Return the table of everything beside the original's algorithm."""
    lines = ["| | ours | ratio to the reference | of the hardware's limit |", "|---|---|---|---|"]
    for line in ALL:
        row = rows.get((line.part, line.name), {"not_measured": "no such row"})
        lines.append(f"| {line.text} | {_rate(row)} | {_ratio(row)} | {_shares(row)} |")
    return "\n".join(lines)


def training_table(rows: Rows) -> str:
    """Return the table of training steps."""
    lines = ["| | cells/s | ratio: written out | fused | of the matrix product's rate |", "|---|---|---|---|---|"]
    for line in TRAINING:
        row, beside = (
            rows.get((line.part, line.name + end), {"not_measured": "no such row"})
            for end in ("", ", beside fused attention")
        )
        lines.append(f"| {line.text} | {_rate(row, '')} | {_ratio(row)} | {_ratio(beside)} | {_shares(row)} |")
    return "\n".join(lines)


def gpu_table(gpu: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of a GPU."""
    lines = ["| | cells/s | utilisation | memory |", "|---|---|---|---|"]
    for text, name in GPU_LINES:
        if row := gpu.get(name, {}):
            memory = f"{row['peak_gb']:.3g} GB"
            lines.append(f"| {text} | {number(row['cells_per_s'])} | {100 * row['mfu']:.0f} % | {memory} |")
    return "\n".join(lines)


def _machine(row: Mapping[str, Any]) -> str:
    if "machine" not in row:
        return "a CPU"
    machine = row["machine"]
    return f"{machine['cores']} CPU cores with {machine['torch_cpu_capability'].replace('AVX512', 'AVX-512')}"


def _rate(row: Mapping[str, Any], unit: str = " cells/s") -> str:
    return "not measured" if "not_measured" in row else f"{number(row['median'])}{unit}"


def _ratio(row: Mapping[str, Any]) -> str:
    if row.get("ratio") is None:
        return "not measured"
    return f"{row['ratio']:.1f} ×" + (" (1 round)" if len(row["rounds"]) == 1 else "")


def _shares(row: Mapping[str, Any]) -> str:
    shares = sorted(row.get("fractions", {}).items(), key=lambda each: _SHARES[each[0]])
    return " / ".join(f"{100 * value:.0f} %" for _, value in shares)


# Page -> mark of the table -> function of the rows and of the GPU's rows that returns it.
PAGES: dict[str, dict[str, Callable[[Rows, Mapping[str, Mapping[str, Any]]], str]]] = {
    "README.md": {"speed": readme_table},
    "docs/speed.md": {
        "suite": lambda rows, gpu: suite_table(rows),
        "gpu": lambda rows, gpu: gpu_table(gpu),
        "training": lambda rows, gpu: training_table(rows),
    },
}


def with_tables(name: str, text: str, folder: Path = RECORD) -> str:
    """Return a page's text with its tables written anew.

    Args:
        name: Name of the page, a key of `PAGES`.
        text: Text of the page, in which each table stands between two comments with its mark.
        folder: Folder with what was measured.

    Raises:
        ValueError: If the comments of a table are not there.
    """
    rows, gpu = read_rows(folder), read_gpu(folder)
    for mark, made in PAGES[name].items():
        begin, end = f"<!-- measured: {mark} -->", "<!-- end -->"
        place = re.compile(rf"(?<={re.escape(begin)}\n).*?(?=\n{re.escape(end)})", flags=re.DOTALL)
        table = made(rows, gpu)
        text, found = place.subn(table.replace("\\", r"\\"), text)  # a backslash is no reference to a group
        if found != 1:
            raise ValueError(f"{name} must hold {begin}, the table and {end}, each on a line of its own, once.")
    return text


def write_pages(root: Path = ROOT, folder: Path = RECORD) -> list[str]:
    """Write the tables of all pages anew; return the names of those that changed."""
    changed = []
    for name in PAGES:
        path = root / name
        before = path.read_text(encoding="utf-8")
        after = with_tables(name, before, folder)
        if after != before:
            path.write_text(after, encoding="utf-8")
            changed.append(name)
    return changed
