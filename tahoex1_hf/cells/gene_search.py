# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The search for the genes of an input: find the column with their names, and tell ids from symbols."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.cells.errors import BadInput
from tahoex1_hf.cells.feature_types import gene_mask
from tahoex1_hf.cells.gene_names import looks_like_mouse, plain_id, plain_symbol, text_of
from tahoex1_hf.cells.gene_symbols import Table, released_symbols
from tahoex1_hf.cells.genes import GeneOptions, check_known
from tahoex1_hf.encoding_tahoe_x1 import GeneMatch

if TYPE_CHECKING:
    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

# Number of names of a column that are checked before all of its names are looked up.
_FEW = 200
# If at least the first share of the genes is in the vocabulary, no other columns are tried. A column replaces
# var_names if it has more known genes than they have, by at least the second share of all genes.
_MOST, _MORE = 0.95, 0.05


@dataclass(frozen=True)
class FoundGenes:
    """The genes of an input.

    Attributes:
        match: Token of each column of the counts; -1 if it is not a gene, or a gene that is not in the vocabulary.
        names: `(columns,)` names of the columns.
        is_gene: `(columns,)` bool, False for antibodies, peaks and guides.
        source: Description of the names by which the genes were recognised.
        notes: Messages to the user, each with its logging level.
    """

    match: GeneMatch
    names: Sequence[str]
    is_gene: np.ndarray
    source: str
    notes: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class _Reading:
    """Gene names that were looked up.

    Attributes:
        where: Column of the names, or var_names, for messages.
        texts: Names.
        tokens: `(names,)` int64 token of each name; -1 for unknown names.
        source: Description of the names: ids or symbols, and their column.
        note: Message to the user about the choice; empty if there is nothing to say.
    """

    where: str
    texts: list[str]
    tokens: np.ndarray
    source: str
    note: str = ""

    @property
    def known(self) -> int:
        """Number of names that are in the vocabulary."""
        return int((self.tokens >= 0).sum())


class _Finder:
    """The search for the genes of one input.

    Args:
        tokenizer: Tokenizer whose vocabulary decides which genes are known.
        var: Table with one row per column of the counts, with `columns`, and with access to a column by `[]`.
        names: Names of the columns of the counts.
        options: Options that say where the genes are.
    """

    def __init__(self, tokenizer: "TahoeX1Tokenizer", var: Any, names: Sequence[Any], options: GeneOptions):
        self.tokenizer, self.var, self.options = tokenizer, var, options
        is_gene = tokenizer.is_gene
        self.ids = {name: token for name, token in tokenizer.get_vocab().items() if is_gene[token]}
        self.names = [text_of(name) for name in names]
        self.columns = [str(name) for name in var.columns]
        mask, self.types = gene_mask(var, len(self.names))
        self.is_gene = mask
        self.kept = np.flatnonzero(mask)

    # Reading names ----------------------------------------------------------------------------------------

    def texts(self, where: str | None) -> list[str]:
        """Return the names of the genes in a column, or in var_names if `where` is None."""
        if where is None:
            return self.names if self.is_gene.all() else [self.names[number] for number in self.kept]
        values = list(self.var[where])
        return [text_of(values[number]) for number in self.kept]

    def id_token(self, name: str) -> int:
        """Return the token of an Ensembl id, or of another gene name in the vocabulary; -1 if it is unknown."""
        token = self.ids.get(name, -1)
        if token < 0:
            plain = plain_id(name)
            token = self.tokenizer.gene_token(name) if plain is None else self.ids.get(plain, -1)
        return token

    def chosen(self, genes: str | Sequence[str]) -> int:
        """Return the token of the last of some genes that is in the vocabulary; -1 if none is."""
        known = [
            token for gene in ([genes] if isinstance(genes, str) else genes) if (token := self.id_token(gene)) >= 0
        ]
        return known[-1] if known else -1

    def by_id(self, where: str | None) -> _Reading:
        """Read names as Ensembl ids."""
        texts = self.texts(where)
        tokens = np.array([self.id_token(name) for name in texts], dtype=np.int64)
        return _Reading(_place(where), texts, tokens, f"Ensembl ids in {_place(where)}")

    def by_symbol(self, where: str | None, table: Table, source: str) -> tuple[_Reading, float]:
        """Read names as symbols or Ensembl ids, and return the share of the names that could be read in this way.

        The share is set to less than half if the case of most names had to be changed and more than one name in five
        still has no meaning: in lower case, the symbols of fish genes look like human ones.
        """
        texts = self.texts(where)
        plain = [plain_symbol(name) or "" for name in texts]
        folded = _folded(table, plain)
        found = [table.get(name) or folded(name) for name in plain]
        tokens = [
            self.id_token(name) if genes is None else self.chosen(genes)
            for name, genes in zip(texts, found, strict=True)
        ]
        meant = sum(genes is not None or token >= 0 for genes, token in zip(found, tokens, strict=True)) / len(texts)
        exact = sum(name in table for name in plain) / len(texts)
        meant = meant if 2 * exact > meant or meant > 0.8 else min(meant, 0.4)
        return _Reading(_place(where), texts, np.array(tokens, dtype=np.int64), f"{source} in {_place(where)}"), meant

    def few(self, where: str | None) -> list[str]:
        """Return some names of a column, from evenly spaced rows."""
        values = self.names if where is None else self.var[where]
        places = self.kept[np.linspace(0, len(self.kept) - 1, min(_FEW, len(self.kept))).astype(np.int64)]
        taken = np.asarray(values, dtype=object)[places]
        return [text_of(name) for name in taken]

    def other_columns(self, is_one: Callable[[str], bool]) -> Iterator[str]:
        """Yield the text columns for which `is_one` is true for most names, judged by a few of them."""
        for name in self.columns:
            if getattr(self.var[name], "dtype", np.dtype(object)).kind in "OSUT" and len(self.kept):
                few = self.few(name)
                if 2 * sum(is_one(text) for text in few) > len(few):
                    yield name

    # The search -------------------------------------------------------------------------------------------

    def find(self) -> _Reading:
        """Return the reading of the names that finds the genes.

        Raises:
            BadInput: If no reading finds them; the message says what the names look like, and what to do.
        """
        column = self.options.gene_id_column
        if column is not None and column not in self.columns:
            raise BadInput(f"gene_id_column={column!r} (--gene-id-column) is not in var: it has {self.columns}.")
        if not len(self.kept):
            raise BadInput("it has no genes." if not self.types else f"it has no genes, only {self.types}.")
        if self.options.species == "mouse":
            return self._by_ortholog()
        own = self.options.symbols()
        if own is not None:
            reading, _ = self.by_symbol(column, own, "your table of symbols, applied to names")
            if 100 * reading.known < len(self.kept):
                raise self._nothing_found(reading, "The table gene_symbols (--gene-symbols) has other names.")
            return reading
        reading = self._best_ids()
        return reading if self._are_ids(reading) else self._by_released_symbols(reading)

    def _best_ids(self) -> _Reading:
        """Return the reading as Ensembl ids with the most known genes; var_names is preferred."""
        column, number = self.options.gene_id_column, len(self.kept)
        reading = self.by_id(column)
        if column is not None or reading.known >= _MOST * number:
            return reading
        others = [self.by_id(name) for name in self.other_columns(lambda name: self.id_token(name) >= 0)]
        best = max(others, key=lambda other: other.known, default=reading)
        if best.known <= reading.known + _MORE * number:
            return reading
        note = f"the Ensembl ids of its genes are in the column {best.where}: {best.known} of {number} are in the "
        return replace(best, note=f"{note}vocabulary (of var_names {reading.known}).")

    def _are_ids(self, reading: _Reading) -> bool:
        # Some columns of symbols hold an Ensembl id if a gene has no symbol, so some known ids prove nothing.
        pairs = zip(reading.texts, reading.tokens, strict=True)
        strange = [name for name, token in pairs if token < 0 and plain_id(name) is None]
        if 10 * len(strange) > len(self.kept):
            symbols = sum((plain_symbol(name) or "") in released_symbols() for name in strange)
            if 2 * symbols > len(strange):
                return False
        return 100 * reading.known >= len(self.kept) and 2 * len(strange) <= len(self.kept)

    def _by_released_symbols(self, ids: _Reading) -> _Reading:
        table, column = released_symbols(), self.options.gene_id_column
        if looks_like_mouse(self.few(column)):
            raise self._nothing_found(ids)
        tried = [self.by_symbol(column, table, "symbols, by the package's table,")]
        if column is None and tried[0][1] <= 0.5:
            others = self.other_columns(lambda name: (plain_symbol(name) or "") in table)
            tried += [self.by_symbol(name, table, "symbols, by the package's table,") for name in others]
        best, meant = max(tried, key=lambda each: each[0].known)
        if meant <= 0.5 or 100 * best.known < len(self.kept):
            raise self._nothing_found(ids)
        note = (
            f"its genes are named by symbol ({best.where}): {best.known} of {len(self.kept)} are in the package's "
            "table, made from Tahoe-100M's. For another table pass gene_symbols= (--gene-symbols)."
        )
        return replace(best, note=note)

    def _by_ortholog(self) -> _Reading:
        """Read names as mouse genes, and replace them by the human genes in the user's table."""
        genes, number = self.options.human_genes() or {}, len(self.kept)
        column = self.options.gene_id_column
        tried = []
        for where in [column] if column is not None else [None, *self.other_columns(lambda n: _mouse(n) in genes)]:
            texts = self.texts(where)
            choices = [[self.ids[gene] for gene in genes.get(_mouse(name), ()) if gene in self.ids] for name in texts]
            tokens = np.array([one[0] if len(one) == 1 else -1 for one in choices], dtype=np.int64)
            several = sum(len(one) > 1 for one in choices)
            shared = int((tokens >= 0).sum()) - len(np.unique(tokens[tokens >= 0]))
            note = (
                f"{(tokens >= 0).sum()} of {number} mouse genes have one human orthologue in the vocabulary and in "
                f"your table ({shared} share it with another, and their counts are added up); {several} have several "
                f"and {number - several - (tokens >= 0).sum()} none, and are left out."
            )
            source = f"mouse genes in {_place(where)}, by orthologues"
            tried.append(_Reading(_place(where), texts, tokens, source, note))
        best = max(tried, key=lambda each: each.known)
        if 100 * best.known < number:
            raise BadInput(
                f"{best.known} of {number} genes have a human orthologue in orthologs (--orthologs): the names are "
                f"like {best.texts[:3]}, those of the table like {list(genes)[:3]}."
            )
        return best

    def _nothing_found(self, reading: _Reading, more: str = "") -> BadInput:
        """Return an error that says what the names look like, and what to do."""
        unknown = [name for name, token in zip(reading.texts, reading.tokens, strict=True) if token < 0]
        vocabulary = [str(gene) for gene in list(self.ids)[:3]]
        start = f"{reading.known} of {len(reading.texts)} genes are in the vocabulary: {unknown[:3]}"
        foreign = [gene for name in unknown if (gene := plain_id(name)) is not None and not gene.startswith("ENSG")]
        mouse = 'species="mouse" (--species mouse) with orthologs= (--orthologs), a table of their human orthologues'
        if 2 * len(foreign) >= len(unknown):
            way = f"Pass {mouse}." if foreign[0].startswith("ENSMUSG") else "Map the genes to human orthologues first."
            return BadInput(f"{start} are Ensembl ids of another species, and the vocabulary is human. {way}")
        if self.options.gene_symbols is None and looks_like_mouse(unknown[:1000]):
            return BadInput(f"{start} look like symbols of mouse genes, and the vocabulary is human. Pass {mouse}.")
        if 2 * sum(plain_id(name) is None for name in unknown) > len(unknown):
            way = more or (
                "Pass gene_symbols= (--gene-symbols), a table symbol -> Ensembl id, or gene_id_column= "
                f"(--gene-id-column), a column with Ensembl ids; no column of var has them: {self.columns}."
            )
            return BadInput(
                f"{start} look like gene symbols, and the vocabulary has Ensembl ids ({vocabulary}). {way}"
            )
        return BadInput(f"{start} are unknown; the vocabulary has {vocabulary}. Pass human Ensembl gene ids.")

    def result(self, reading: _Reading) -> FoundGenes:
        """Return the genes that a reading found."""
        token_ids = np.full(len(self.is_gene), -1, dtype=np.int64)
        token_ids[self.kept] = reading.tokens
        known = reading.tokens[reading.tokens >= 0]
        matched = len(np.unique(known))
        unknown = [name for name, token in zip(reading.texts, reading.tokens, strict=True) if token < 0]
        notes = [(logging.INFO, reading.note)] if reading.note else []
        if self.types:
            others = ", ".join(f"{count} {kind}" for kind, count in self.types.items())
            notes.append((logging.INFO, f"features that are not Gene Expression are left out: {others}."))
        if len(known) > matched and self.options.species == "human":
            repeated = f"{len(known) - matched} gene columns repeat another gene: their counts are added up."
            notes.append((logging.WARNING, repeated))
        match = GeneMatch(
            token_ids,
            num_genes=len(token_ids),
            num_matched=matched,
            num_unknown=int((token_ids < 0).sum()),
            num_duplicates=len(known) - matched,
            unknown_examples=tuple(unknown[:5]),
        )
        return FoundGenes(match, self.names, self.is_gene, reading.source, tuple(notes))


def find_genes(tokenizer: "TahoeX1Tokenizer", var: Any, names: Sequence[Any], options: GeneOptions) -> FoundGenes:
    """Find the genes of an input.

    Without `gene_id_column` and `gene_symbols`, the names and all text columns are searched for Ensembl ids. If there
    are none, they are searched for symbols in the package's table. An id may come with a version, `_PAR_Y`, a number
    added by `make_unique`, a genome or a symbol.

    Args:
        tokenizer: Tokenizer whose vocabulary decides which genes are known.
        var: Table with one row per column of the counts, with `columns`, and with access to a column by `[]`.
        names: Names of the columns of the counts.
        options: Options that say where the genes are.

    Raises:
        BadInput: If a column does not exist, too few genes are found, or ids are mixed with symbols.
    """
    finder = _Finder(tokenizer, var, names, options)
    reading = finder.find()
    found = finder.result(reading)
    check_known(reading.tokens, reading.texts, options, mixed="symbol" not in reading.source)
    return found


def _place(where: str | None) -> str:
    return "var_names" if where is None else f"{where!r}"


def _mouse(name: str) -> str:
    return plain_id(name) or name


def _folded(table: Table, names: Sequence[str]) -> Callable[[str], str | Sequence[str] | None]:
    """Return a function that looks up a symbol without regard to case if all names are lower case or all upper case.

    Names in mixed case are not looked up in this way, since mouse symbols differ from human ones only in their case:
    the function then always returns None.
    """
    for change in (str.lower, str.upper):
        if all(name == change(name) for name in names):
            found: dict[str, str | Sequence[str] | None] = {}
            for symbol, genes in table.items():
                folded = change(symbol)
                found[folded] = None if folded in found and found[folded] != genes else genes
            return found.get
    return lambda name: None
