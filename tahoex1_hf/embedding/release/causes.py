# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Why public embeddings are farther from ours than they should be: causes, each tried, and ranked.

There are two kinds of evidence. A trial embeds some cells under another assumption, and says how much of the gap
between the public embeddings and our own floor closes; a cause that closes it is found. Not everything can be guessed
(a gene table may be wrong in any way), so a doubt asks whether what we take for true is of any use: when the genes are
shuffled, the embeddings of a right gene table move away from the public ones, those of a wrong one do not.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tahoex1_hf.common.progress import progress_bar
from tahoex1_hf.embedding.release.bench import Bench
from tahoex1_hf.embedding.release.comparing import cosines

logger = logging.getLogger(__name__)

DRUGS, GENES, LAYER = "drug names", "gene table", "layer"
VALUES, CONTEXT, SIZE = "normalisation", "context length", "size or weights"

FOUND = 0.5
"""Share of the gap that must close for a cause to count as found."""

LEAST = 0.1
"""Least weight of a cause that is worth telling of."""

_CONTEXTS = (1024, 2048, 4096)
_SEARCHED = 8  # most cells that are embedded with every drug of the table
_NO_DIFFERENCE = 1e-6  # what shuffling a factor must change at least for the doubt to mean anything


@dataclass(frozen=True)
class Trial:
    """Embeddings under another assumption.

    Attributes:
        assumption: What was assumed.
        mean: Mean cosine with the public embeddings.
        closed: Share of the gap to our floor that it closes; below 0 where it widens it.
    """

    assumption: str
    mean: float
    closed: float


@dataclass(frozen=True)
class Cause:
    """A cause that was tried.

    Attributes:
        name: Name of the cause.
        doubt: Share of what we know of it that is of no use for the public embeddings, 0 to 1; None where that
            cannot be asked.
        trials: Other assumptions, the best first.
    """

    name: str
    doubt: float | None
    trials: list[Trial]

    @property
    def closed(self) -> float:
        """Largest share of the gap that an assumption closes."""
        return max((trial.closed for trial in self.trials), default=0.0)

    @property
    def found(self) -> bool:
        """Whether an assumption closes most of the gap."""
        return self.closed >= FOUND

    @property
    def weight(self) -> float:
        """Number by which causes are ranked: what the best trial closes, or half of the doubt, if that is more."""
        return max(self.closed, FOUND * (self.doubt or 0.0))

    @property
    def likely(self) -> bool:
        """Whether there is evidence worth telling of."""
        return self.weight >= LEAST

    def sentence(self) -> str:
        """Say what was found."""
        if self.trials and self.closed >= FOUND * (self.doubt or 0.0):
            best = self.trials[0]
            return f"{self.name}: {best.assumption} closes {best.closed:.0%} of the gap"
        if self.doubt is None:
            return f"{self.name}: no assumption that was tried closes the gap"
        return f"{self.name}: {self.doubt:.0%} of what we take for true is of no use for the public embeddings"


def try_causes(bench: Bench, progress: bool) -> list[Cause]:
    """Try every cause, and return them, the likeliest first."""
    assumptions: list[tuple[str, str, Callable[[], np.ndarray]]] = [
        *_of_drugs(bench),
        *_of_genes(bench),
        *_of_layers(bench),
        *_of_values(bench),
        *_of_contexts(bench),
    ]
    trials: dict[str, list[Trial]] = {name: [] for name in (DRUGS, GENES, LAYER, VALUES, CONTEXT, SIZE)}
    with progress_bar(progress, total=len(assumptions) + 3, unit="trial", desc="Looking for the cause") as bar:
        for name, text, embed in assumptions:
            mean = float(cosines(bench.public, embed()).mean())
            trials[name].append(Trial(text, mean, bench.closed(mean)))
            bar.update()
        doubts = _doubts(bench, bar.update)
    closed = max((each.closed for some in trials.values() for each in some), default=0.0)
    if bench.drugs is not None and closed < FOUND and (doubts[SIZE] or 0) < FOUND:
        trials[DRUGS].append(_search_drugs(bench, progress))
    causes = [Cause(name, doubts.get(name), sorted(some, key=lambda t: -t.closed)) for name, some in trials.items()]
    return sorted(causes, key=lambda cause: -cause.weight)


# Assumptions -----------------------------------------------------------------------------------------

_Assumptions = Iterator[tuple[str, str, Callable[[], np.ndarray]]]


def _trial(name: str, text: str, bench: Bench, **changes: Any) -> tuple[str, str, Callable[[], np.ndarray]]:
    return name, text, lambda: bench.embed(**changes)


def _of_drugs(bench: Bench) -> _Assumptions:
    if bench.drugs is None:
        return
    yield _trial(DRUGS, "no drug token", bench, drugs=None)
    yield _trial(DRUGS, "a drug token without a drug, for every cell", bench, drugs=[None] * bench.cells.num_rows)
    for step, text in ((1, "below"), (-1, "above")):
        moved = bench.with_drugs_moved(step)
        yield _trial(DRUGS, f"the drug that stands {text} the cell's own in the drug table", bench, drugs=moved)


def _of_genes(bench: Bench) -> _Assumptions:
    for how, text in (
        ("ids", "the numbers of the cells' genes as ids of the vocabulary, without the gene table"),
        ("+1", "a gene table that is off by one"),
        ("-1", "a gene table that is off by one, the other way"),
    ):
        yield GENES, text, partial(_with_gene_table, bench, how)


def _with_gene_table(bench: Bench, how: str) -> np.ndarray:
    return bench.embed(gene_metadata=bench.gene_table(how))


def _of_layers(bench: Bench) -> _Assumptions:
    last = bench.model.config.num_hidden_layers
    yield (
        LAYER,
        f"the output of layer {last} (the last) without the final norm",
        lambda: bench.embed(model=bench.without_final_norm()),
    )
    for layer in range(last - 1, 0, -1):
        yield _trial(LAYER, f"the output of layer {layer} of {last}", bench, hidden_layer=layer)
    if bench.model.config.cell_pooling == "cls":
        yield LAYER, "the mean over all tokens in place of <cls>", lambda: bench.embed(model=bench.pooled_by_mean())


def _of_values(bench: Bench) -> _Assumptions:
    own = bench.tokenizer
    if own.value_encoding == "bins":
        other = bench.with_settings(right_binning=not own.right_binning)
        yield _trial(VALUES, "the other side of the edges of the bins (right_binning)", bench, tokenizer=other)
    for encoding, text in (("log1p", "log1p of normalised counts"), ("raw", "raw counts"), ("bins", "bins")):
        if encoding != own.value_encoding:
            other = bench.with_settings(value_encoding=encoding)
            yield _trial(VALUES, f"{text} in place of {own.value_encoding}", bench, tokenizer=other)


def _of_contexts(bench: Bench) -> _Assumptions:
    own, longest = bench.tokenizer.context_length, int(bench.num_genes().max()) + 2
    for length in _CONTEXTS:
        if own is not None and length != own and min(length, own) < longest:
            other = bench.with_settings(context_length=length)
            yield _trial(CONTEXT, f"{length} tokens in place of {own}", bench, tokenizer=other)


def _search_drugs(bench: Bench, progress: bool) -> Trial:
    """Embed the farthest cells of some drugs with every drug, and say which drug is nearest."""
    table = bench.tokenizer.drug_table
    assert table is not None
    names = bench.names
    lost = cosines(bench.other_run, bench.samples[1]) - cosines(bench.public, bench.samples[1])
    far = np.lexsort([-lost, ~bench.fits()])  # cells that fit first: what is lost there is not lost with a sample
    farthest: dict[str | None, int] = {}
    for number in far.tolist():
        farthest.setdefault(names[number], number)
    cells = list(farthest.values())[:_SEARCHED]
    candidates: list[str | None] = [None, *(name for name, number in table.ids.items() if number)]
    found = np.empty((len(candidates), len(cells)))
    rows = bench.cells.take(cells)
    with progress_bar(progress, total=len(candidates), unit="drug", desc="Trying every drug") as bar:
        for at, name in enumerate(candidates):
            embeddings = bench.embed(cells=rows, drugs=[name] * len(cells))
            found[at] = cosines(bench.public[cells], embeddings)
            bar.update()
    own = np.array([found[candidates.index(table_name)][at] for at, table_name in enumerate(_own(bench, cells))])
    floor = cosines(bench.other_run[cells], bench.samples[1][cells]).mean()
    others = found.max(0) > own + _NO_DIFFERENCE
    pairs = [
        f"{names[cell]!r} as {candidates[at] or 'no drug'!r}"
        for cell, at, other in zip(cells, found.argmax(0).tolist(), others.tolist(), strict=True)
        if other
    ]
    text = f"other drugs, found among all for {len(cells)} cells ({', '.join(pairs) or 'each has its own'})"
    mean = float(found.max(0).mean())
    return Trial(text, mean, (mean - float(own.mean())) / max(float(floor - own.mean()), 1e-12))


def _own(bench: Bench, cells: list[int]) -> list[str | None]:
    """Return the name under which the drug table has the drug of each of some cells."""
    table = bench.tokenizer.drug_table
    assert table is not None
    names = {number: name for name, number in table.ids.items() if number}
    return [names.get(table.find(bench.names[cell]) or 0) for cell in cells]


# Doubts ----------------------------------------------------------------------------------------------


def _doubts(bench: Bench, on_trial: Callable[[], object]) -> dict[str, float | None]:
    """Ask of each factor whether what we know of it is of use for the public embeddings."""
    order = np.random.default_rng(0).permutation(bench.public.shape[1])
    doubts = {SIZE: _doubt(bench, bench.samples[1][:, order])}
    on_trial()
    doubts[GENES] = _doubt(bench, _with_gene_table(bench, "shuffled"))
    if (doubts[GENES] or 0) < FOUND:  # counts of the wrong genes say nothing
        doubts[VALUES] = _doubt(bench, bench.embed(cells=bench.with_counts_shuffled()))
    on_trial()
    doubts[DRUGS] = None
    if bench.drugs is not None and bench.tokenizer.drug_table is not None:
        step = max(1, len(bench.tokenizer.drug_table.ids) // 2)
        doubts[DRUGS] = _doubt(bench, bench.embed(drugs=bench.with_drugs_moved(step)))
    on_trial()
    if (doubts[SIZE] or 0) >= FOUND:  # then nothing of ours is of use, and the others say nothing
        return {SIZE: doubts[SIZE]}
    return doubts


def _doubt(bench: Bench, destroyed: np.ndarray) -> float | None:
    """Return how little a factor is of use, given our embeddings without what we know of it."""
    own = bench.floor - float(cosines(bench.other_run, destroyed).mean())
    public = bench.base - float(cosines(bench.public, destroyed).mean())
    if own < _NO_DIFFERENCE:
        return None
    return float(np.clip(1 - public / own, 0, 1))
