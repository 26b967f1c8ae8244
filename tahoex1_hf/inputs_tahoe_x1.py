# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The arguments of a cell tokenizer: cells in all their forms, and the arguments that users of transformers pass.

This file travels to the Hugging Face Hub beside the weights: it imports only numpy, transformers and the files that
travel with it.
"""

from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from typing import Any

import numpy as np
from transformers.tokenization_utils_base import LARGE_INTEGER
from transformers.utils import logging

from .configuration_tahoe_x1 import similar_names
from .encoding_tahoe_x1 import DrugTable, GeneMatch, GeneRows, Vocabulary, as_counts, matrix_rows, to_csr

logger = logging.get_logger(__name__)

DEFAULT_CONTEXT = 1024  # tokens

# Arguments of transformers' tokenizers that change nothing for cells, with the values that are accepted.
_IDLE_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True, None),
    "is_split_into_words": (False, None),
    "return_offsets_mapping": (False, None),
    "return_overflowing_tokens": (False, None),
    "return_token_type_ids": (False, None),
    "split_special_tokens": (False, None),
    "stride": (0, None),
    "text_pair": (None,),
    "text_pair_target": (None,),
    "text_target": (None,),
    "verbose": (True, False, None),
}


def check_idle_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise an error for arguments of text tokenizers that ask for something which cells do not have.

    Raises:
        TypeError: If no tokenizer has such an argument.
        ValueError: If it means nothing for cells.
    """
    for name, value in arguments.items():
        if name not in _IDLE_ARGUMENTS:
            raise TypeError(f"TahoeX1Tokenizer got an unexpected keyword argument {name!r}.")
        if not any(value is idle or value == idle for idle in _IDLE_ARGUMENTS[name]):
            why = (
                "every cell begins with <cls>, whose output is the cell's embedding"
                if name == "add_special_tokens"
                else "it is for text, and cells are sets of genes"
            )
            raise ValueError(f"{name}={value!r} is not possible, {why}: leave it out.")


def check_padding_side(side: str | None) -> None:
    """Raise ValueError for padding on the left."""
    if side not in (None, "right"):
        raise ValueError(f'padding_side="{side}": <cls> and <drug> must stay first, so cells are padded on the right.')


def truncates(truncation: Any) -> bool:
    """Return whether cells are cut to the length limit, for what transformers' users pass as `truncation`.

    Raises:
        ValueError: For rules that are for pairs of texts.
    """
    truncation = getattr(truncation, "value", truncation)  # of transformers' TruncationStrategy
    if truncation in (None, True, "longest_first", "only_first"):
        return True
    if truncation in (False, "do_not_truncate"):
        return False
    raise ValueError(f"truncation={truncation!r}: pass True, or False for every expressed gene of every cell.")


def is_one_cell(cells: Any) -> bool:
    """Return whether the cells given to a tokenizer are one (genes, counts) pair, and not a list of them."""
    if not isinstance(cells, (list, tuple)) or len(cells) != 2:
        return False
    genes, counts = cells
    if isinstance(genes, (str, bytes)) or not all(hasattr(part, "__len__") for part in cells):
        return False
    return all(np.ndim(next(iter(part), 0)) == 0 for part in cells) and len(genes) == len(counts)


def length_limit(context_length: int | None, model_max_length: int | None) -> int | None:
    """Return the context length, for which there are two arguments: ours, and that of transformers.

    If both are given and differ, the one that is not the default is taken, or of two such the smaller.
    """
    if model_max_length is None or model_max_length > LARGE_INTEGER:  # transformers writes 1e30 for none
        return context_length
    if context_length == DEFAULT_CONTEXT or context_length == model_max_length:
        return model_max_length
    if context_length is None:
        return model_max_length
    logger.warning_once(
        f"context_length={context_length} and model_max_length={model_max_length} differ: the smaller holds."
    )
    return min(context_length, model_max_length)


def with_one_length(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `from_pretrained` that set the length limit by one name, whatever the file says."""
    arguments = dict(kwargs)
    given = arguments.pop("model_max_length", None)
    if given is not None:
        unlimited = given > LARGE_INTEGER
        length = length_limit(arguments.get("context_length", DEFAULT_CONTEXT), given)
        arguments["context_length"] = arguments.get("context_length") if unlimited else length
    if "context_length" in arguments:
        arguments["model_max_length"] = None
    return arguments


def with_length_limit(tokenizer: Any, max_length: int | None, cut: bool) -> Any:
    """Return a tokenizer, or a copy with another context length, where one call asks for it.

    Raises:
        ValueError: For a length that leaves no room for a gene.
    """
    if max_length is not None and (type(max_length) is not int or max_length < 3):
        raise ValueError(f"max_length={max_length!r}: pass a whole number of at least 3.")
    if cut and max_length is None:
        return tokenizer
    tokenizer = copy(tokenizer)
    tokenizer.context_length = max_length if cut else None
    return tokenizer


def are_pairs(cells: Any) -> bool:
    """Return whether cells are a list of (genes, counts) pairs."""
    if not isinstance(cells, (list, tuple)):
        return False
    return all(isinstance(cell, (list, tuple)) and len(cell) == 2 for cell in cells)


def ragged_rows(cells: Any, vocabulary: Vocabulary, symbols: Mapping[str, str] | None) -> GeneRows:
    """Look up the genes of (genes, counts) pairs, and leave out those that are unknown or not expressed.

    Raises:
        ValueError: For pairs of unequal parts, and for genes that are not those of the vocabulary.
    """
    names = [np.asarray(genes) for genes, _ in cells]
    counts = [as_counts(values) for _, values in cells]
    for number, (genes, values) in enumerate(zip(names, counts, strict=True)):
        if genes.ndim != 1 or genes.shape != values.shape:
            raise ValueError(
                f"cells[{number}]: genes of shape {genes.shape} and counts of shape {values.shape}; pass a list "
                "of (genes, counts) pairs, with two equally long sequences in each."
            )
    texts = dict.fromkeys(str(name) for genes in names if genes.dtype.kind in "UO" for name in genes)
    match = vocabulary.match(texts, symbols).token_ids if texts else ()
    lookup = dict(zip(texts, match, strict=True))
    tokens = np.concatenate([np.zeros(0, dtype=np.int64), *(vocabulary.cell_tokens(genes, lookup) for genes in names)])
    offsets = np.concatenate([[0], np.cumsum([len(genes) for genes in names], dtype=np.int64)])
    rows = GeneRows(tokens, np.concatenate([np.zeros(0, dtype=np.float32), *counts]), offsets)
    return rows.select((rows.tokens >= 0) & (rows.counts != 0))


def cell_pieces(
    cells: Any, genes: GeneMatch | None, vocabulary: Vocabulary, symbols: Mapping[str, str] | None, elements: int
) -> Iterator[tuple[GeneRows, bool]]:
    """Yield cells piece by piece, and whether a gene may occur several times in one.

    Args:
        cells: A matrix of counts, or (genes, counts) pairs.
        genes: The genes of a matrix's columns; None for pairs.
        vocabulary: Tokens of the genes of pairs.
        symbols: Gene symbol -> Ensembl id.
        elements: Most elements of the matrix that are read at once.
    """
    if genes is None:
        yield ragged_rows(cells, vocabulary, symbols), True
        return
    if getattr(cells, "format", "csr") != "csr":  # in which the counts of a row are all over the matrix
        cells = to_csr(cells.to_memory() if hasattr(cells, "to_memory") else cells)
    step = max(1, elements // genes.num_genes)
    for start in range(0, max(1, cells.shape[0]), step):
        yield matrix_rows(cells[start : start + step], genes)


def anndata_counts(adata: Any, gene_id_column: str | None, layer: str | None) -> Any:
    """Return the matrix of an AnnData with the counts.

    Raises:
        ValueError: If the layer or the column of var does not exist.
    """
    if gene_id_column is not None and gene_id_column not in adata.var.columns:
        raise ValueError(f"gene_id_column={gene_id_column!r} is not in adata.var: it has {list(adata.var.columns)}.")
    layers = [name for name in adata.layers if name is not None]  # since anndata 0.13, X is among them
    if layer is not None and layer not in layers:
        raise ValueError(f"layer={layer!r} is not in adata.layers: it has {layers}.")
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        raise ValueError(f"adata.X is empty: name the counts with layer=, one of {layers}.")
    return matrix


def names_drug_column(drugs: Any, columns: Iterable[str], table: DrugTable) -> bool:
    """Return whether `drugs` names a column of obs and no drug; raise ValueError if it names both, or neither."""
    if not isinstance(drugs, str) or drugs == "":
        return False
    columns, is_drug = list(columns), table.find(drugs) is not None
    if drugs in columns and is_drug:
        raise ValueError(f"drugs={drugs!r} is a column of adata.obs and a drug: pass a list, one drug per cell.")
    if drugs not in columns and not is_drug:
        similar = similar_names(drugs, [*columns, *table.ids])
        place = "a column of adata.obs nor in the drug table"
        raise ValueError(f"drugs={drugs!r} is neither {place}{similar} Names: see tokenizer.drug_to_id.")
    return drugs in columns
