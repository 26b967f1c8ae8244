# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Hand embeddings of cells over to Arc's STATE, in the layout that it reads, with a split into lines to learn from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tahoex1_hf.benchmarking.screens import Screen
from tahoex1_hf.common.files import WholeFile

DATASET = "screen"
TAHOE, VARIABLE = "X_tahoe_x1", "X_hvg"  # slots of obsm; STATE knows the second by its name
PERTURBATION, LINE, BATCH = "perturbation", "cell_type", "batch"  # columns of obs
_HELD_OUT = 5  # of this many perturbations of a few-shot line one is held out for testing


@dataclass(frozen=True)
class StateSplit:
    """What STATE is tested on.

    Attributes:
        zero_shot: Lines of which only the controls are seen in training.
        few_shot: Line -> part (`val`, `test`) -> perturbations of it that are held out.
    """

    zero_shot: list[str]
    few_shot: dict[str, dict[str, list[str]]]

    def toml(self, data: Path) -> str:
        """Return the split as the TOML that STATE reads, for the files in a folder."""
        lines = ["[datasets]", f"{DATASET} = {_text(str(data.resolve()))}", "", "[training]", f'{DATASET} = "train"']
        lines += ["", "[zeroshot]", *(f'{_text(f"{DATASET}.{line}")} = "test"' for line in self.zero_shot)]
        for line, parts in self.few_shot.items():
            lines += ["", f"[fewshot.{_text(f'{DATASET}.{line}')}]"]
            lines += [f"{part} = [{', '.join(map(_text, names))}]" for part, names in parts.items()]
        return "\n".join(lines) + "\n"


def _text(value: str) -> str:
    """Return a TOML string, whose escapes are those of JSON."""
    return json.dumps(value, ensure_ascii=False)


def make_split(screen: Screen, zero_shot: Sequence[str], few_shot: Sequence[str], seed: int) -> StateSplit:
    """Hold lines out, and in few-shot lines a fifth of the perturbations, at random.

    Raises:
        ValueError: If there is no such line, nothing to test on, or no line to learn from.
    """
    for option, lines in (("--zero-shot", zero_shot), ("--few-shot", few_shot)):
        if strange := [line for line in lines if line not in screen.lines]:
            raise ValueError(f"{option} {strange[0]} is no line; there are {', '.join(screen.lines)}.")
    if not zero_shot and not few_shot:
        raise ValueError("state needs a line to test on: --zero-shot LINE, --few-shot LINE or both.")
    if both := sorted(set(zero_shot) & set(few_shot)):
        raise ValueError(f"{both[0]} cannot be both --zero-shot and --few-shot.")
    if set(zero_shot) >= set(screen.lines):
        raise ValueError("--zero-shot leaves no line to learn from.")
    random, parts = np.random.default_rng(seed), {}
    for line in few_shot:
        own = screen.tested[screen.line_of[screen.tested] == screen.lines.index(line)]
        if len(own) < 3:
            raise ValueError(f"--few-shot {line} has {len(own)} perturbations; it needs three.")
        names = [screen.names[group] for group in random.permutation(own).tolist()]
        tested = max(1, len(names) // _HELD_OUT)
        parts[line] = {"val": sorted(names[:1]), "test": sorted(names[1 : 1 + tested])}
    return StateSplit(list(zero_shot), parts)


def write_handoff(
    screen: Screen, slot: str, embeddings: np.ndarray, variable: np.ndarray, split: StateSplit, folder: Path
) -> Path:
    """Write `data/screen.h5ad` and `split.toml` into a folder.

    Args:
        screen: Cells, lines and perturbations.
        slot: Slot of obsm for the embeddings.
        embeddings: Embeddings of the cells, shape `(cells, width)`.
        variable: Columns of the highly variable genes, whose log-normalised counts go into `X_hvg`.
        split: Split.
        folder: Folder to write into.

    Returns:
        The TOML file.
    """
    import pandas as pd
    from anndata import AnnData

    values = screen.cells.values
    names = np.array(screen.names)[screen.groups]
    lines = np.array(screen.lines)[screen.line_of[screen.groups]]
    obs = pd.DataFrame({PERTURBATION: names, LINE: lines, BATCH: "none"}, index=screen.cells.adata.obs_names)
    adata = AnnData(values, obs=obs.astype("category"), var=screen.cells.adata.var[[]].copy())
    adata.var["highly_variable"] = np.isin(np.arange(values.shape[1]), variable)
    adata.obsm[VARIABLE] = values[:, variable].toarray().astype(np.float32)
    adata.obsm[slot] = np.asarray(embeddings, dtype=np.float32)
    adata.uns["log1p"] = {}  # STATE asks whether the counts are logarithms
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    with WholeFile(data / f"{DATASET}.h5ad") as partial:
        adata.write_h5ad(partial, compression="gzip")
    with WholeFile(folder / "split.toml") as partial:
        partial.write_text(split.toml(data), encoding="utf-8")
    return folder / "split.toml"
