# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Sets of genes, such as the Hallmark pathways, as MSigDB publishes them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tahoex1_hf.cells.gene_names import plain_id
from tahoex1_hf.cells.gene_symbols import released_symbols
from tahoex1_hf.common.reading import reading


@dataclass(frozen=True, eq=False)
class GeneSets:
    """Genes that are in at least one set.

    Attributes:
        names: Ensembl ids, each once, in alphabetic order, shape `(genes,)`.
        members: Whether a gene is in a set, shape `(genes, sets)`.
        titles: Names of the sets.
        left_out: Reason -> number of genes that are left out.
    """

    names: np.ndarray
    members: np.ndarray
    titles: tuple[str, ...]
    left_out: dict[str, int]

    def some(self, kept: np.ndarray, reason: str) -> "GeneSets":
        """Return the genes for which `kept`, shape `(genes,)`, is true; the others are counted under a reason.

        Raises:
            ValueError: If no gene is left.
        """
        left_out = self.left_out | {reason: int((~kept).sum())}
        if not kept.any():
            raise ValueError(f"--gene-sets: no gene of the sets is left ({left_out}).")
        return GeneSets(self.names[kept], self.members[kept], self.titles, left_out)


def read_gene_sets(path: Path) -> GeneSets:
    """Read a `.gmt` file: a line for each set, with its name, a comment, and its genes, separated by tabs.

    Args:
        path: File whose genes are Ensembl ids or symbols; symbols are looked up in the package's table.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is no set, two sets have one name, or there are fewer than two sets.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--gene-sets {path} does not exist.")
    with reading(path):
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    symbols, sets, unknown = released_symbols(), {}, set()
    for number, (title, *rest) in enumerate(lines, 1):
        genes = {gene.strip() for gene in rest[1:] if gene.strip()}
        if not genes or title in sets:
            what = "is a second set of the name" if title in sets else "has no genes behind a name and a comment, in"
            raise ValueError(f"--gene-sets {path}: line {number} {what} {title[:60]!r}: a .gmt file is expected.")
        ids = {gene: plain_id(gene) or symbols.get(gene) for gene in genes}
        unknown |= {gene for gene, name in ids.items() if name is None}
        sets[title] = {name for name in ids.values() if name is not None}
    if len(sets) < 2:
        raise ValueError(f"--gene-sets {path} has {len(sets)} sets: at least two are needed.")
    names = sorted(set().union(*sets.values()))
    place = {name: row for row, name in enumerate(names)}
    members = np.zeros((len(names), len(sets)), dtype=bool)
    for column, genes in enumerate(sets.values()):
        members[[place[name] for name in genes], column] = True
    return GeneSets(np.array(names, dtype=str), members, tuple(sets), {"without an Ensembl id": len(unknown)})
