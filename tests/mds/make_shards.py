"""Write the shards of this folder with the real mosaicml-streaming, which pins transformers<5.

In a separate environment, from the root of the repository:

    python -m venv mds-venv && mds-venv/bin/pip install torch==2.14.1 mosaicml-streaming==0.13.0
    mds-venv/bin/python tests/mds/make_shards.py

The shards were written with Python 3.11.7, mosaicml-streaming 0.13.0, torch 2.14.1 and numpy 2.1.3. `cells.json` holds
the cells that went into them, `vocab.json` the ids that they use.
"""

import json
import random
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
NUM_GENES = 60
CLS, CLS_VALUE = 1, -2.0


def vocabulary() -> dict[str, int]:
    """Return a vocabulary with special tokens first, as in the original's, and fillers last."""
    names = ["<pad>", "<cls>", "<eoc>", *(f"ENSG{1000 + i:011d}" for i in range(NUM_GENES)), "<junk0>", "<junk1>"]
    return {name: i for i, name in enumerate(names)}


def make_cells(count: int) -> list[dict[str, Any]]:
    """Make cells of up to 30 genes; the second expresses none, the third has a stored zero and a gene twice."""
    random.seed(17)
    cells = []
    for number in range(count):
        genes = random.sample(range(3, 3 + NUM_GENES), random.randint(1, 30))
        counts = [float(random.choice([1, 1, 1, 2, 3, 7, 300])) for _ in genes]
        if number == 1:
            genes, counts = [], []
        if number == 2:
            genes, counts = [5, 9, 4, 9], [2.0, 1.0, 0.0, 3.0]
        cells.append(
            {
                "genes": [CLS, *genes],
                "expressions": [CLS_VALUE, *counts],
                "id": 1000 + number,
                "drug": random.choice(["DMSO_TF", "Trametinib", "β-Estradiol"]),
                "sample": f"smp_{number % 4}",
            }
        )
    return cells


def as_upstream(cells: list[dict[str, Any]], folder: Path) -> None:
    """Write the original's layout: torch tensors of a datasets.Dataset, chunk folders and their merged index."""
    import torch
    from streaming import MDSWriter
    from streaming.base.util import merge_index

    columns = {"expressions": "pkl", "genes": "pkl", "id": "int64", "drug": "str", "sample": "str"}
    half = len(cells) // 2
    for number, part in enumerate((cells[:half], cells[half:])):
        with MDSWriter(
            out=str(folder / f"chunk_{number}"),
            columns=columns,
            compression="zstd",
            hashes=["sha1", "xxh64"],
            size_limit=12_000,
        ) as writer:
            for cell in part:
                tensors = {name: torch.tensor(cell[name]) for name in ("genes", "expressions", "id")}
                writer.write({**cell, **tensors})
    merge_index(str(folder), keep_local=True)


def as_plain(cells: list[dict[str, Any]], folder: Path) -> None:
    """Write shards without compression or hashes, with every kind of pickle in turn and all encodings of metadata."""
    import torch
    from streaming import MDSWriter

    kinds = [
        (lambda ids: torch.tensor(ids, dtype=torch.int32), lambda x: torch.tensor(x, dtype=torch.bfloat16)),
        (lambda ids: np.array(ids), np.array),
        (lambda ids: ids, lambda x: x),
        (lambda ids: torch.tensor([ids]), lambda x: [torch.tensor(x)]),
        (lambda ids: torch.tensor([0, *ids, 0])[1:-1], lambda x: np.array(x + x, dtype=np.float16)[: len(x)]),
        (lambda ids: torch.tensor([[i, 0] for i in ids])[:, 0], lambda x: np.array([[v, 0] for v in x])[:, 0]),
        (lambda ids: tuple(np.int64(i) for i in ids), lambda x: [np.float32(v) for v in x]),
    ]
    columns = {
        "genes": "pkl",
        "expressions": "pkl",
        "id": "str",
        "plate": "int",
        "depth": "uint16",
        "dose": "float32",
        "half": "float16",
        "digits": "str_int",
        "ratio": "str_float",
        "price": "str_decimal",
        "note": "json",
        "code": "bytes",
        "score": "pkl",
        "picture": "png",
        "tags": "json",
    }
    with MDSWriter(out=str(folder), columns=columns, size_limit=20_000) as writer:
        for number, cell in enumerate(cells):
            as_ids, as_counts = kinds[number % len(kinds)]
            sample = {
                "genes": as_ids(cell["genes"]),
                "expressions": as_counts(cell["expressions"]),
                "id": f"cell-{number}",
                "plate": -number,
                "depth": 60_000 + number,
                "dose": number / 4,
                "half": 0.5,
                "digits": 10**30 + number,
                "ratio": 0.1,
                "price": Decimal("1.10"),
                "note": f"note {number}",
                "code": b"\x00\xff",
                "score": np.float64(number / 8),
                "picture": b"no picture",  # bytes are written as they are
                "tags": ["a", "b"],
            }
            writer.write(sample)


def as_arrays(cells: list[dict[str, Any]], folder: Path) -> None:
    """Write the encodings of arrays, with and without type and shape; gz and other hashes."""
    from streaming import MDSWriter

    columns = {"genes": "ndarray:int32", "expressions": "ndarray", "id": "int", "umis": "ndarray:float64:1"}
    with MDSWriter(
        out=str(folder), columns=columns, compression="gz:3", hashes=["sha256", "xxh128"], size_limit=6_000
    ) as writer:
        for number, cell in enumerate(cells):
            counts = np.array(cell["expressions"], dtype=[np.float64, np.float32, np.float16, np.int16][number % 4])
            umis = np.array([float(sum(cell["expressions"]) + 2)])
            genes = np.array(cell["genes"], dtype=np.int32)
            writer.write({"genes": genes, "expressions": counts, "id": cell["id"], "umis": umis})


def main() -> None:
    cells = make_cells(42)
    (HERE / "vocab.json").write_text(json.dumps(vocabulary(), indent=0) + "\n")
    (HERE / "cells.json").write_text("[\n" + ",\n".join(map(json.dumps, cells)) + "\n]\n")
    for name, write in {"upstream": as_upstream, "plain": as_plain, "arrays": as_arrays}.items():
        shutil.rmtree(HERE / name, ignore_errors=True)
        write(cells, HERE / name)


if __name__ == "__main__":
    main()
