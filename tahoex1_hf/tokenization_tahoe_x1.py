# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Cell tokenizer of the Tahoe-x1 models: count matrices in, gene tokens with expression values out.

This file travels to the Hugging Face Hub beside the weights: it imports only numpy, torch, transformers and
the files that travel with it.

- A token is a gene (Ensembl id without version). A cell is `<cls>`, optionally `<drug>`, then its expressed known
  genes in column order; the order means nothing to the model, which has no positional encoding.
- Counts become quantile bins (`bin_expression`) or log1p values (`log_normalize`) over the whole cell, before it is
  cut to the context length, so a value says where a gene stands in its cell and not in the sample.
- What a cell becomes depends on its genes, its counts and the seed alone: never on its place in the file, the batch,
  the chunk or the way in which the matrix is stored.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.utils import logging

from .configuration_tahoe_x1 import check_tokenizer_settings, refuse_misspelt_settings, similar_names
from .encoding_tahoe_x1 import (
    DrugTable,
    GeneMatch,
    GeneRows,
    Vocabulary,
    as_counts,
    bin_expression,
    count_hint,
    count_problem,
    kept_genes,
    log_normalize,
    matrix_rows,
    merge_repeats,
    to_csr,
)
from .packing_tahoe_x1 import EncodedCells, as_batch, concatenate_cells, pad_features

logger = logging.get_logger(__name__)

DRUG_TOKEN = "<drug>"
# Matrix elements read at once: bounds the memory of a dense or backed matrix to about 128 MB of float32.
_CHUNK_ELEMENTS = 2**25


def report_empty(encoded: EncodedCells) -> None:
    """Warn of cells in which no known gene is expressed."""
    if len(encoded.empty_cells):
        numbers = encoded.cell_numbers[encoded.empty_cells[:5]].tolist()
        logger.warning(
            f"{len(encoded.empty_cells)} of {encoded.num_cells} cells express no gene of the vocabulary and consist "
            f"of special tokens only (the first: {numbers})."
        )


class TahoeX1Tokenizer(PreTrainedTokenizer):
    """Turn cells into gene tokens with expression values.

    Args:
        vocab_file: JSON object token -> id with Ensembl gene ids, `<pad>`, `<cls>` and, where used, `<eoc>`, `<drug>`.
        value_encoding: `"bins"` (quantile bins, all released models), `"log1p"` or `"raw"` (counts).
        num_bins: number of quantile bins, the one for zeros included.
        right_binning: see `bin_expression`.
        target_sum: sum of a cell before the logarithm, for `"log1p"`.
        context_length: most tokens per cell, `<cls>` and `<drug>` included; None keeps every expressed gene.
        overflow: genes kept of a longer cell: `"sample"`, at random, by the cell's content and the seed alone;
            `"highest"`, the highest counts, of equal ones the lowest token ids; `"first"`, by column.
        pad_value: expression value of special tokens and of padding; negative.
        drug_to_id: drug name -> id of the drug table; id 0 stands for no drug. Blanks around a name mean nothing.
        unknown_drugs: what becomes of drugs that the table lacks: `"pad"`, their cells count as cells without a drug,
            as in the original, and a warning lists drugs and cells; `"error"`, they are refused.
        first_gene_raw: upstream compatibility, off by default. Embedding a drug model without drugs, upstream left
            the first gene of each cell out of the encoding and gave it its raw count. No effect where drugs are given.
        pad_token: padding token.
        cls_token: token whose output is the cell embedding.
        eos_token: end-of-cell token of the vocabulary, which the models do not use; None where it has none.
        **kwargs: settings of `PreTrainedTokenizer`.

    Raises:
        ValueError: for a setting or a vocabulary that cannot work.
    """

    vocab_files_names = {"vocab_file": "vocab.json"}
    model_input_names = ["input_ids", "expression_values", "attention_mask"]
    _locate_checkpoint: Callable | None = None  # set by the package, for checkpoints in the original's layout

    def __init__(
        self,
        vocab_file: str | os.PathLike,
        *,
        value_encoding: str = "bins",
        num_bins: int = 51,
        right_binning: bool = False,
        target_sum: float = 10000.0,
        context_length: int | None = 1024,
        overflow: str = "sample",
        pad_value: float = -2.0,
        drug_to_id: dict[str, int] | None = None,
        unknown_drugs: str = "pad",
        first_gene_raw: bool = False,
        pad_token: str = "<pad>",
        cls_token: str = "<cls>",
        eos_token: str | None = "<eoc>",
        **kwargs: Any,
    ) -> None:
        self._vocabulary = Vocabulary.read(vocab_file)
        overflow = "highest" if overflow == "top" else overflow  # its earlier name
        options = {
            "value_encoding": value_encoding,
            "num_bins": num_bins,
            "right_binning": right_binning,
            "target_sum": target_sum,
            "context_length": context_length,
            "overflow": overflow,
            "pad_value": pad_value,
            "drug_to_id": drug_to_id,
            "unknown_drugs": unknown_drugs,
            "first_gene_raw": first_gene_raw,
        }
        refuse_misspelt_settings(kwargs, options)
        check_tokenizer_settings(options)
        self.value_encoding, self.context_length, self.overflow = value_encoding, context_length, overflow
        self.num_bins, self.right_binning, self.first_gene_raw = num_bins, right_binning, first_gene_raw
        self.target_sum, self.pad_value = float(target_sum), float(pad_value)
        self.drug_to_id, self.unknown_drugs = drug_to_id, unknown_drugs
        for role, token in (("pad_token", pad_token), ("cls_token", cls_token)):
            if str(token) not in self._vocabulary.ids:
                raise ValueError(f"{role}={str(token)!r} is not in {vocab_file}: name the token that it has instead.")
        if drug_to_id is not None and DRUG_TOKEN not in self._vocabulary.ids:
            raise ValueError(
                f"drug_to_id needs the token {DRUG_TOKEN!r}, which {vocab_file} lacks: use the vocabulary of a model "
                "with drug token, or leave drug_to_id out."
            )
        if eos_token is not None and str(eos_token) not in self._vocabulary.ids:
            eos_token = None
        # transformers saves the arguments that reach its constructor, and no others
        super().__init__(pad_token=pad_token, cls_token=cls_token, eos_token=eos_token, **options, **kwargs)
        if self.padding_side != "right":
            raise ValueError(
                'padding_side="left": <cls> and <drug> must stay first, so cells are padded on the right.'
            )

    # What transformers asks of a tokenizer --------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; with the package installed, also from a checkpoint in the original's layout."""
        name = pretrained_model_name_or_path
        if cls._locate_checkpoint is not None:
            name, kwargs = cls._locate_checkpoint(name, "tokenizer_config.json", kwargs)
        return super().from_pretrained(name, *args, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary file."""
        return len(self._vocabulary.ids)

    @property
    def is_gene(self) -> np.ndarray:
        """`(largest id + 1,)` bool, which ids are genes: neither special tokens nor fillers."""
        return self._vocabulary.is_gene

    @property
    def drug_to_id(self) -> dict[str, int] | None:
        """Drug name -> id of the drug table, None without one."""
        return None if self.drug_table is None else self.drug_table.ids

    @drug_to_id.setter
    def drug_to_id(self, ids: Mapping[str, int] | None) -> None:
        self.drug_table = None if ids is None else DrugTable(ids)

    def get_vocab(self) -> dict[str, int]:
        """Return token -> id, a copy."""
        return dict(self._vocabulary.ids)

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._vocabulary.ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._vocabulary.tokens[int(index)]

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        missing = [str(token) for token in new_tokens if str(token) not in self._vocabulary.ids]
        if missing:
            raise ValueError(f"{missing} cannot be added: the model has embeddings for its vocabulary file only.")
        return super()._add_tokens(new_tokens, special_tokens=special_tokens)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write `vocab.json`, and return its path."""
        name = f"{filename_prefix}-" if filename_prefix else ""
        path = os.path.join(save_directory, name + self.vocab_files_names["vocab_file"])
        with open(path, "w", encoding="utf-8") as file:
            json.dump(dict(sorted(self._vocabulary.ids.items(), key=lambda item: item[1])), file, indent=0)
        return (path,)

    def _refuse_text(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "TahoeX1Tokenizer reads cells, not text: call it with an AnnData, with a matrix of counts and gene_ids=, "
            "or with a list of (genes, counts) pairs."
        )

    tokenize = _tokenize = encode = _encode_plus = _refuse_text

    # Genes ----------------------------------------------------------------------------------------

    def match_genes(self, gene_ids: Iterable[str], *, gene_symbols: Mapping[str, str] | None = None) -> GeneMatch:
        """Look up genes in the vocabulary.

        Args:
            gene_ids: Ensembl ids, one per matrix column; a version suffix (`.12`) is ignored.
            gene_symbols: gene symbol -> Ensembl id, for names that are symbols.

        Returns:
            The token of every column. Columns with the same token count as one gene.

        Raises:
            ValueError: if less than one in a hundred of the genes is known, or most are symbols; the message says why.
        """
        return self._vocabulary.match(gene_ids, gene_symbols)

    def gene_token(self, name: str, gene_symbols: Mapping[str, str] | None = None) -> int:
        """Return the id of a gene's token, -1 where the vocabulary has none."""
        return self._vocabulary.gene_token(name, gene_symbols)

    # Cells ----------------------------------------------------------------------------------------

    def encode_counts(
        self,
        counts: Any,
        genes: GeneMatch,
        *,
        drugs: str | Sequence[str | None] | None = None,
        first_cell: int = 0,
        seed: int = 0,
        source: Any = None,
    ) -> EncodedCells:
        """Tokenize one chunk of a count matrix.

        Args:
            counts: `(cells, genes)` counts as CSR, CSC or dense matrix; left as it is.
            genes: the tokens of its columns, from `match_genes`.
            drugs: drug of all cells, or one per cell (None or "" for no drug); every cell then gets a drug token.
            first_cell: number of the first row in the data set, for messages.
            seed: seed of the sampling.
            source: the AnnData that the rows come from; messages then say where its raw counts are.

        Returns:
            The cells without padding.

        Raises:
            ValueError: for counts that are negative, NaN or infinite, for a wrong shape, and for unknown drugs.
        """
        rows, repeats = matrix_rows(counts, genes)
        drug_ids = None if drugs is None else self.drug_ids(drugs, len(rows.offsets) - 1)
        encoded = self.encode_rows(
            rows,
            repeats=repeats,
            drug_ids=drug_ids,
            first_cell=first_cell,
            seed=seed,
            warn=logger.warning_once,
            advice=lambda: count_hint(source, None),
        )
        report_empty(encoded)
        return encoded

    def encode_rows(
        self,
        rows: GeneRows,
        *,
        repeats: bool = False,
        drug_ids: np.ndarray | None = None,
        first_cell: int = 0,
        seed: int = 0,
        warn: Callable[[str], object] = logger.warning,
        advice: Callable[[], str] = str,
    ) -> EncodedCells:
        """Tokenize cells whose genes are token ids already.

        Args:
            rows: the cells' genes, and their counts, none of them zero.
            repeats: a gene may stand several times in a cell; its counts are added up.
            drug_ids: `(cells,)` int64, in which case every cell gets a drug token.
            first_cell: as for `encode_counts`.
            seed: as for `encode_counts`.
            warn: called with what is odd about the counts.
            advice: what can be done about it.

        Returns:
            The cells without padding.

        Raises:
            ValueError: for counts that are negative, NaN or infinite.
        """
        for name, number in (("first_cell", first_cell), ("seed", seed)):
            if not 0 <= number < 2**63:
                raise ValueError(f"{name}={number}: pass a non-negative integer.")
        error, warning = count_problem(rows, first_cell, self._vocabulary.tokens)
        if error is not None:
            raise ValueError(error + advice())
        if warning is not None and self.value_encoding != "raw":
            warn(warning + advice())
        if repeats:
            rows = merge_repeats(rows)
        num_cells = len(rows.offsets) - 1
        numbers = first_cell + np.arange(num_cells, dtype=np.int64)
        raw_first = self.first_gene_raw and drug_ids is None
        values = self._encode_values(rows, raw_first)
        special = 1 if drug_ids is None else 2
        room = None if self.context_length is None else self.context_length - special
        keep = None if room is None else kept_genes(rows, seed, room, self.overflow, keep_first=raw_first)
        if keep is not None:
            values, rows = values[keep], rows.select(keep)
        offsets = rows.offsets + special * np.arange(num_cells + 1)
        places = np.arange(len(values)) + special * (rows.cells() + 1)
        input_ids = np.full(offsets[-1], self._vocabulary.ids[str(self.cls_token)], dtype=np.int64)
        expression_values = np.full(offsets[-1], self.pad_value, dtype=np.float32)
        input_ids[places], expression_values[places] = rows.tokens, values
        if drug_ids is not None:
            input_ids[offsets[:-1] + 1] = self._vocabulary.ids[DRUG_TOKEN]
        empty = np.flatnonzero(np.diff(rows.offsets) == 0)
        return EncodedCells(input_ids, expression_values, offsets, drug_ids, numbers, empty)

    def _encode_values(self, rows: GeneRows, raw_first: bool) -> np.ndarray:
        if self.value_encoding == "raw":
            return rows.counts
        if raw_first:
            rest = np.ones(len(rows.counts), dtype=bool)
            rest[rows.offsets[:-1][np.diff(rows.offsets) > 0]] = False
            values = rows.counts.copy()
            values[rest] = self._encode_values(rows.select(rest), raw_first=False)
            return values
        if self.value_encoding == "log1p":
            return log_normalize(rows.counts, rows.offsets, self.target_sum)
        return bin_expression(rows.counts, rows.offsets, self.num_bins, self.right_binning)

    def drug_ids(
        self, drugs: str | Sequence[str | None], num_cells: int, unknown_drugs: str | None = None
    ) -> np.ndarray:
        """Return `(num_cells,)` int64 ids of one drug for all cells, which must be known, or of one per cell."""
        if self.drug_table is None:
            raise ValueError(
                "drugs was given, but this tokenizer has no drug table: use a drug model, or leave drugs out."
            )
        names = [drugs] if isinstance(drugs, str) else list(drugs)
        if not isinstance(drugs, str) and len(names) != num_cells:
            raise ValueError(
                f"drugs has {len(names)} entries for {num_cells} cells: pass one per cell, or one string."
            )
        ids, unknown = self.drug_table.look_up(names)
        rule = "error" if isinstance(drugs, str) else unknown_drugs or self.unknown_drugs
        self.drug_table.settle(unknown, rule, warn="new")
        return np.repeat(ids, num_cells) if isinstance(drugs, str) else ids

    # Calling the tokenizer ------------------------------------------------------------------------

    def __call__(
        self,
        cells: Any,
        *,
        gene_ids: Sequence[str] | np.ndarray | None = None,
        gene_id_column: str | None = None,
        layer: str | None = None,
        gene_symbols: Mapping[str, str] | None = None,
        drugs: str | Sequence[str | None] | None = None,
        first_cell: int = 0,
        seed: int = 0,
        padding: bool | str = False,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Tokenize cells.

        Args:
            cells: an AnnData (backed ones are read in pieces), a `(cells, genes)` count matrix (CSR, CSC, dense), or a
                list of (genes, counts) pairs, one per cell, with Ensembl ids or token ids as genes.
            gene_ids: Ensembl id of every column of a matrix.
            gene_id_column: column of `adata.var` with the Ensembl ids; by default `adata.var_names`.
            layer: layer of the AnnData with the counts; by default `adata.X`.
            gene_symbols: gene symbol -> Ensembl id, for genes named by symbol.
            drugs: drug of all cells, one per cell (None or "" for no drug), or a column of `adata.obs`.
            first_cell: number of the first cell in its data set, for messages.
            seed: seed of the sampling.
            padding: pad to the longest cell (True or `"longest"`).
            pad_to_multiple_of: round the padded length up to a multiple of this.
            return_tensors: `"pt"`, `"np"`, or None for lists.

        Returns:
            `input_ids`, `expression_values` and `attention_mask`, each `(cells, length)` or a list per cell;
            `drug_ids` `(cells,)` where drugs were given.

        Raises:
            TypeError: for input that is not cells.
            ValueError: for genes, counts, drugs or options that cannot be used; the message says what to do.
        """
        is_anndata, is_matrix = hasattr(cells, "var_names"), hasattr(cells, "shape")
        if not is_anndata and (gene_id_column is not None or layer is not None):
            raise ValueError("gene_id_column= and layer= are for an AnnData: pass gene_ids= with a matrix.")
        if gene_ids is not None and (is_anndata or not is_matrix):
            raise ValueError("gene_ids= is for a matrix: an AnnData (see gene_id_column=) or pairs bring their genes.")
        source, genes = None, None
        if is_anndata:
            source, drugs = cells, self.resolve_drugs(cells, drugs)
            cells, genes = self.read_anndata(cells, gene_id_column, layer, gene_symbols)
        elif is_matrix:
            if gene_ids is None:
                raise ValueError("gene_ids= is missing: pass the Ensembl id of every column of the matrix.")
            genes = self.match_genes(gene_ids, gene_symbols=gene_symbols)
        pieces = self._pieces(cells, genes, gene_symbols)
        num_cells = len(cells) if isinstance(cells, (list, tuple)) else getattr(cells, "shape", (0,))[0]
        drug_ids = None if drugs is None else self.drug_ids(drugs, num_cells)
        encoded = self._encode_pieces(pieces, drug_ids, first_cell, seed, lambda: count_hint(source, layer))
        return self._to_batch(encoded, padding, pad_to_multiple_of, return_tensors)

    def read_anndata(
        self,
        adata: Any,
        gene_id_column: str | None = None,
        layer: str | None = None,
        gene_symbols: Mapping[str, str] | None = None,
    ) -> tuple[Any, GeneMatch]:
        """Find the counts and the genes of an AnnData, without reading the counts.

        Args:
            adata: in memory or backed; left as it is.
            gene_id_column: column of `adata.var` with the Ensembl ids; by default `adata.var_names`.
            layer: layer with the counts; by default `adata.X`.
            gene_symbols: gene symbol -> Ensembl id, for genes named by symbol.

        Returns:
            The `(cells, genes)` matrix, of which slices of rows can go to `encode_counts`, and its genes.

        Raises:
            ValueError: for a column or layer that is not there, and for genes that are not in the vocabulary.
        """
        if gene_id_column is not None and gene_id_column not in adata.var.columns:
            raise ValueError(
                f"gene_id_column={gene_id_column!r} is not in adata.var: it has {list(adata.var.columns)}."
            )
        layers = [name for name in adata.layers if name is not None]  # since anndata 0.13, X is among them
        if layer is not None and layer not in layers:
            raise ValueError(f"layer={layer!r} is not in adata.layers: it has {layers}.")
        matrix = adata.X if layer is None else adata.layers[layer]
        if matrix is None:
            raise ValueError(f"adata.X is empty: name the counts with layer=, one of {layers}.")

        def advice() -> str:
            columns = [name for name in adata.var.columns if self._vocabulary.knows_most(adata.var[name][:200])]
            return f" Its var columns with Ensembl ids: {columns}; pass gene_id_column=." if columns else ""

        names = adata.var_names if gene_id_column is None else adata.var[gene_id_column]
        return matrix, self._vocabulary.match(names, gene_symbols, advice)

    def resolve_drugs(self, adata: Any, drugs: Any) -> Any:
        """Read drugs from a column of obs where a string names one; anything else stays as it is."""
        return adata.obs[drugs].tolist() if self.is_drug_column(drugs, adata.obs.columns) else drugs

    def is_drug_column(self, drugs: Any, columns: Iterable[str]) -> bool:
        """Return whether `drugs` names one of the columns of obs. Raise ValueError where that is in doubt."""
        if not isinstance(drugs, str) or self.drug_table is None or drugs == "":
            return False
        columns, is_drug = list(columns), self.drug_table.find(drugs) is not None
        if drugs in columns and is_drug:
            raise ValueError(f"drugs={drugs!r} is a column of adata.obs and a drug: pass a list, one drug per cell.")
        if drugs not in columns and not is_drug:
            similar = similar_names(drugs, [*columns, *self.drug_table.ids])
            place = "a column of adata.obs nor in the drug table"
            raise ValueError(f"drugs={drugs!r} is neither {place}{similar} Names: see tokenizer.drug_to_id.")
        return drugs in columns

    def _pieces(
        self, cells: Any, genes: GeneMatch | None, symbols: Mapping[str, str] | None
    ) -> Iterator[tuple[GeneRows, bool]]:
        if genes is None:
            yield self._ragged_rows(cells, symbols), True
            return
        if getattr(cells, "format", "csr") != "csr":  # there, a row is scattered all over the matrix
            cells = to_csr(cells.to_memory() if hasattr(cells, "to_memory") else cells)
        step = max(1, _CHUNK_ELEMENTS // genes.num_genes)
        for start in range(0, max(1, cells.shape[0]), step):
            yield matrix_rows(cells[start : start + step], genes)

    def _ragged_rows(self, cells: Any, symbols: Mapping[str, str] | None) -> GeneRows:
        if not isinstance(cells, (list, tuple)) or any(
            not isinstance(cell, (list, tuple)) or len(cell) != 2 for cell in cells
        ):
            self._refuse_text()
        names = [np.asarray(genes) for genes, _ in cells]
        counts = [as_counts(values) for _, values in cells]
        for number, (genes, values) in enumerate(zip(names, counts, strict=True)):
            if genes.ndim != 1 or genes.shape != values.shape:
                raise ValueError(
                    f"cells[{number}]: genes of shape {genes.shape} and counts of shape {values.shape}; pass a list "
                    "of (genes, counts) pairs, with two equally long sequences in each."
                )
        texts = dict.fromkeys(str(name) for genes in names if genes.dtype.kind in "UO" for name in genes)
        match = self.match_genes(texts, gene_symbols=symbols).token_ids if texts else ()
        lookup = dict(zip(texts, match, strict=True))
        tokens = np.concatenate(
            [np.zeros(0, dtype=np.int64), *(self._vocabulary.cell_tokens(genes, lookup) for genes in names)]
        )
        offsets = np.concatenate([[0], np.cumsum([len(genes) for genes in names], dtype=np.int64)])
        rows = GeneRows(tokens, np.concatenate([np.zeros(0, dtype=np.float32), *counts]), offsets)
        return rows.select((rows.tokens >= 0) & (rows.counts != 0))

    def _encode_pieces(
        self,
        pieces: Iterable[tuple[GeneRows, bool]],
        drug_ids: np.ndarray | None,
        first_cell: int,
        seed: int,
        advice: Callable[[], str],
    ) -> EncodedCells:
        said: set[str] = set()
        parts: list[EncodedCells] = []
        done = 0

        def warn(message: str) -> None:  # once per call, however many pieces there are
            if message not in said:
                logger.warning(message)
            said.add(message)

        for rows, repeats in pieces:
            num_cells = len(rows.offsets) - 1
            parts.append(
                self.encode_rows(
                    rows,
                    repeats=repeats,
                    drug_ids=None if drug_ids is None else drug_ids[done : done + num_cells],
                    first_cell=first_cell + done,
                    seed=seed,
                    warn=warn,
                    advice=advice,
                )
            )
            done += num_cells
        encoded = parts[0] if len(parts) == 1 else concatenate_cells(parts)
        report_empty(encoded)
        return encoded

    # Output ---------------------------------------------------------------------------------------

    def _to_batch(
        self, encoded: EncodedCells, padding: bool | str, multiple: int | None, return_tensors: str | None
    ) -> BatchEncoding:
        if padding not in (True, False, "longest"):
            raise ValueError(f"padding={padding!r}: pass True (to the longest cell) or False.")
        if multiple is not None and not padding:
            raise ValueError(f"pad_to_multiple_of={multiple} needs padding=True.")
        if not padding and return_tensors is None:
            return BatchEncoding(encoded.as_lists())
        if not padding and len(set(encoded.lengths.tolist())) > 1:
            raise ValueError(f"return_tensors={return_tensors!r} with cells of different lengths: pass padding=True.")
        pad_id = self._vocabulary.ids[str(self.pad_token)]
        batch = encoded.padded(pad_token_id=pad_id, pad_value=self.pad_value, pad_to_multiple_of=multiple)
        return as_batch(batch, return_tensors)

    def pad(  # type: ignore[override]
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Pad tokenized cells into one batch, as transformers' `DataCollatorWithPadding` asks for.

        Args:
            encoded_inputs: a list of mappings, one per cell, or one mapping with a list per cell: `input_ids`,
                `expression_values`, optionally `attention_mask`, and whatever has one number per cell (`drug_ids`).
            padding: True or `"longest"`, or `"max_length"`.
            max_length: padded length for `"max_length"`.
            pad_to_multiple_of: round the padded length up to a multiple of this.
            return_tensors: `"pt"`, `"np"`, or None for lists.

        Returns:
            The padded cells, `(cells, length)` each, and the other entries `(cells,)`.

        Raises:
            ValueError: for features without `input_ids` or `expression_values`, and for options that cannot be used.
        """
        if padding not in (True, "longest", "max_length") or (padding == "max_length") != (max_length is not None):
            raise ValueError(
                f'padding={padding!r}, max_length={max_length}: pass True or "longest" alone, or "max_length" '
                "together with max_length=."
            )
        fills = {"input_ids": self._vocabulary.ids[str(self.pad_token)], "expression_values": self.pad_value}
        batch = pad_features(encoded_inputs, fills, max_length, pad_to_multiple_of)
        return as_batch(batch, return_tensors)
