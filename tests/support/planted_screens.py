"""Screens of drugs with known truth: cells around their line's place, and shifts that some drugs share."""

from pathlib import Path

import numpy as np
import pandas as pd
from embeddings import write_embeddings

WIDTH = 24
MECHANISMS = {"a1": "A", "a2": "A", "b1": "B", "b2": "B", "n1": "", "n2": "unclear", "n3": "unclear"}


def planted(
    drugs: dict[str, str],
    size: float,
    cells: int = 40,
    controls: int = 120,
    seed: int = 0,
    lines: tuple[str, ...] = ("L1", "L2"),
) -> tuple[np.ndarray, pd.DataFrame]:
    """Return values of cells and their columns.

    Each plate moves its cells by as much as a drug does, and each line lies elsewhere. A drug shifts cells along the
    direction of its mechanism, or not at all if that is not A or B.
    """
    truth = np.random.default_rng(5)
    directions = {kind: truth.normal(size=WIDTH) / WIDTH**0.5 for kind in ("A", "B")}
    places = {line: truth.normal(size=WIDTH) * 3 for line in ("L1", "L2", "L3")}
    random = np.random.default_rng(seed)
    values, rows = [], []
    for line in lines:
        for plate in ("p1", "p2"):
            moved = places[line] + random.normal(size=WIDTH) * size / WIDTH**0.5
            for drug in ("DMSO_TF", *drugs):
                number = controls if drug == "DMSO_TF" else cells
                shift = size * directions.get(drugs.get(drug, ""), np.zeros(WIDTH))
                values.append(moved + shift + random.normal(size=(number, WIDTH)))
                rows += [{"drug": drug, "line": line, "plate": plate, "dose": 0.5}] * number
    order = random.permutation(len(rows))
    return np.concatenate(values)[order].astype(np.float32), pd.DataFrame(rows).iloc[order].reset_index(drop=True)


def write_screen(path: Path, drugs: dict[str, str], size: float, seed: int = 0, **options: int) -> Path:
    """Write a screen as `tahoex1 embed` writes embeddings; the cells' names tell screens apart."""
    values, obs = planted(drugs, size, seed=seed, **options)  # type: ignore[arg-type]
    return write_embeddings(path, values, obs, prefix=f"s{seed}-")


def write_mechanisms(path: Path) -> Path:
    """Write the table of mechanisms."""
    pd.DataFrame(MECHANISMS.items(), columns=["drug", "moa-fine"]).to_csv(path, index=False)
    return path
