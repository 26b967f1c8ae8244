# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Gene embeddings of the three kinds that the original's benchmarks know.

- GE, gene encoder: the gene's row of the input table, after the table's norm.
- TE, transformer encoder: the output of the layers without any cell. Genes are put together as targets, which say
  nothing about expression, in rows of 30,000 tokens of the vocabulary in its own order, special tokens included.
- EA, expression aware: the mean output of the layers over the cells that express the gene; TE for genes that no cell
  expresses.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from tahoex1_hf.common.progress import progress_bar
from tahoex1_hf.inference.encoder import CellEncoder, GeneMeans
from tahoex1_hf.inference.ragged import targets_forward

logger = logging.getLogger(__name__)

KINDS = ("GE", "TE", "EA")

# The original's number. It decides the result, since genes do not see those of other rows.
_ROW_TOKENS = 30_000


class GeneEmbeddings(NamedTuple):
    """Embeddings of the genes of a matrix.

    Attributes:
        kinds: Kind -> `(genes, width)` float32; NaN for genes that the vocabulary lacks.
        not_expressed: `(genes,)` bool, genes that no cell expresses, whose EA is their TE; None without EA.
    """

    kinds: dict[str, np.ndarray]
    not_expressed: np.ndarray | None

    def provenance(self, names: Any) -> dict[str, Any]:
        """Describe what made the embeddings, in types that an h5ad file holds, given the names of the genes."""
        facts: dict[str, Any] = {"gene_embeddings": ",".join(self.kinds)}
        if self.not_expressed is not None:
            facts["genes_not_expressed"] = np.asarray(names, dtype=object)[self.not_expressed]
        return facts


def gene_kinds(wanted: bool | str | Sequence[str]) -> tuple[str, ...]:
    """Return the kinds that the argument `gene_embeddings` asks for: True is EA, text is kinds between commas.

    Raises:
        ValueError: For an unknown kind.
    """
    if isinstance(wanted, bool):
        return ("EA",) if wanted else ()
    names = wanted.split(",") if isinstance(wanted, str) else wanted
    asked = [name.strip().upper() for name in names]
    if not asked or set(asked) - set(KINDS):
        raise ValueError(f"gene_embeddings={wanted!r}: pass True, or some of {', '.join(KINDS)}.")
    return tuple(kind for kind in KINDS if kind in asked)


def gene_slot(key_added: str, kind: str) -> str:
    """Return the slot of `varm` for a kind of gene embeddings."""
    return key_added if kind == "EA" else f"{key_added}_{kind}"


def embed_genes(
    encoder: CellEncoder,
    token_ids: np.ndarray,
    kinds: Sequence[str],
    means: GeneMeans | None,
    progress: bool | None = False,
) -> GeneEmbeddings:
    """Return gene embeddings.

    TE of all 62,720 tokens of the released vocabulary, in rows of 30,000, is dear on a CPU: about eight minutes of one
    core for the 70M in float32, and two and a half in bfloat16, where it has that.

    Args:
        encoder: Model that embeds.
        token_ids: `(genes,)` tokens; -1 for genes that the vocabulary lacks.
        kinds: Kinds that are wanted.
        means: Sums over all cells, for EA.
        progress: Whether to show a progress bar for TE.
    """
    found: dict[str, np.ndarray] = {}
    not_expressed = None
    if "GE" in kinds:
        found["GE"] = _by_rows(encoder, token_ids, encoder.model.embeddings.gene_encoder)
    if "TE" in kinds:
        found["TE"] = _without_cells(encoder, token_ids, progress)
    if "EA" in kinds and means is not None:
        found["EA"] = values = means.means(token_ids)
        not_expressed = np.isnan(values[:, 0]) & (token_ids >= 0)
        number = np.flatnonzero(not_expressed)
        if len(number) and "TE" not in kinds:
            logger.info("%d genes are expressed in no cell: computing their embeddings without cells.", len(number))
        without = found["TE"][number] if "TE" in kinds else _without_cells(encoder, token_ids[number], progress)
        values[number] = without
    return GeneEmbeddings(found, not_expressed)


def _without_cells(encoder: CellEncoder, token_ids: np.ndarray, progress: bool | None) -> np.ndarray:
    """Return the TE embeddings of genes: `(genes, width)`."""
    total = len(_rows(encoder, token_ids)) * len(encoder.model.layers)
    with progress_bar(progress, total=total, unit="layer", desc="Genes without cells") as bar:
        return _by_rows(encoder, token_ids, lambda row: targets_forward(encoder.model, row, bar.update))


@torch.inference_mode()
def _by_rows(
    encoder: CellEncoder, token_ids: np.ndarray, forward: Callable[[torch.Tensor], torch.Tensor]
) -> np.ndarray:
    """Return the embeddings that `forward` gives to genes, each among the tokens of its row of the vocabulary."""
    embeddings = np.full((len(token_ids), encoder.width), np.nan, dtype=np.float32)
    for row, wanted, places in _rows(encoder, token_ids):
        with encoder.precision():
            states = forward(torch.from_numpy(row).to(encoder.device))
        embeddings[wanted] = states[torch.from_numpy(places).to(encoder.device)].float().cpu().numpy()
    return embeddings


def _rows(encoder: CellEncoder, token_ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return the rows of the vocabulary that hold genes: each row's tokens, numbers of the genes, and their places."""
    vocabulary = np.fromiter(encoder.tokenizer.get_vocab().values(), dtype=np.int64)
    found = []
    for start in range(0, len(vocabulary), _ROW_TOKENS):
        row = vocabulary[start : start + _ROW_TOKENS]
        place = np.full(encoder.config.vocab_size, -1)
        place[row] = np.arange(len(row))
        wanted = np.flatnonzero((token_ids >= 0) & (place[token_ids] >= 0))
        if len(wanted):
            found.append((row, wanted, place[token_ids[wanted]]))
    return found
