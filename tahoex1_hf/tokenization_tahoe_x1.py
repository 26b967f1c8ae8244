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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.tokenization_utils_base import LARGE_INTEGER, VERY_LARGE_INTEGER
from transformers.utils import logging

from .configuration_tahoe_x1 import (
    TOKENIZER_AUTO_MAP,
    TravelsWithCode,
    check_tokenizer_settings,
    copy_code,
    names_our_code,
    refuse_misspelt_settings,
)
from .encoding_tahoe_x1 import (
    DrugTable,
    GeneMatch,
    GeneRows,
    Vocabulary,
    bin_expression,
    count_hint,
    count_problem,
    kept_genes,
    log_normalize,
    matrix_rows,
    merge_repeats,
)
from .inputs_tahoe_x1 import (
    DEFAULT_CONTEXT,
    anndata_counts,
    are_pairs,
    cell_pieces,
    check_idle_arguments,
    check_padding_side,
    is_one_cell,
    length_limit,
    names_drug_column,
    truncates,
    with_length_limit,
    with_one_length,
)
from .padding_tahoe_x1 import (
    EncodedCells,
    Output,
    as_batch,
    concatenate_cells,
    pad_features,
    padding_rule,
    report_empty,
    wanted_length,
)

logger = logging.get_logger(__name__)

DRUG_TOKEN = "<drug>"
# Matrix elements read at once: bounds the memory of a dense or backed matrix to about 128 MB of float32.
_CHUNK_ELEMENTS = 2**25


class TahoeX1Tokenizer(TravelsWithCode, PreTrainedTokenizer):
    """Turn cells into gene tokens with expression values.

    Args:
        vocab_file: JSON object token -> id with Ensembl gene ids, `<pad>`, `<cls>` and, where used, `<eoc>`, `<drug>`.
        value_encoding: `"bins"` (quantile bins, all released models), `"log1p"` or `"raw"` (counts).
        num_bins: Number of quantile bins, the one for zeros included.
        right_binning: See `bin_expression`.
        target_sum: Sum of a cell before the logarithm, for `"log1p"`.
        context_length: Most tokens per cell, `<cls>` and `<drug>` included; None keeps every expressed gene.
        model_max_length: Transformers' name for the context length; the two are always the same.
        overflow: Genes kept of a longer cell: `"sample"`, at random, by the cell's content and the seed alone;
            `"highest"`, the highest counts, of equal ones the lowest token ids; `"first"`, by column.
        pad_value: Expression value of special tokens and of padding; negative.
        drug_to_id: Drug name -> id of the drug table; id 0 stands for no drug. Blanks around a name mean nothing.
        unknown_drugs: Rule for drugs that the table lacks: with `"pad"` their cells count as cells without a drug, as
            in the original, and a warning lists drugs and cells; with `"error"` they are refused.
        first_gene_raw: Whether to leave the first gene of each cell out of the encoding and give it its raw count, as
            the original did in drug models without drugs. Off by default; no effect where drugs are given.
        pad_token: Padding token.
        cls_token: Token whose output is the cell embedding.
        eos_token: End-of-cell token of the vocabulary, which the models do not use; None where it has none.
        **kwargs: Settings of `PreTrainedTokenizer`.

    Raises:
        ValueError: For a setting or a vocabulary that cannot work.
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
        context_length: int | None = DEFAULT_CONTEXT,
        overflow: str = "sample",
        pad_value: float = -2.0,
        drug_to_id: dict[str, int] | None = None,
        unknown_drugs: str = "pad",
        first_gene_raw: bool = False,
        pad_token: str = "<pad>",
        cls_token: str = "<cls>",
        eos_token: str | None = "<eoc>",
        model_max_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        self._vocabulary = Vocabulary.read(vocab_file)
        overflow = "highest" if overflow == "top" else overflow  # its earlier name
        context_length = length_limit(context_length, model_max_length)
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
        self.value_encoding, self.overflow = value_encoding, overflow
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
        eos_token = eos_token if str(eos_token) in self._vocabulary.ids else None
        # transformers saves the arguments that reach its constructor, and no others
        kwargs |= {"pad_token": pad_token, "cls_token": cls_token, "eos_token": eos_token, **options}
        super().__init__(model_max_length=context_length, **kwargs)
        # <cls> comes before the genes of every cell: so transformers counts it (`num_special_tokens_to_add`).
        self.special_tokens_pattern, self.prefix_tokens = "prefix_suffix", [self._vocabulary.ids[str(cls_token)]]
        check_padding_side(self.padding_side)

    # What transformers asks of a tokenizer --------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; with the package installed, also from a checkpoint in the original's layout."""
        name = pretrained_model_name_or_path
        kwargs = with_one_length(kwargs)
        if cls._locate_checkpoint is not None:
            name, kwargs = cls._locate_checkpoint(name, "tokenizer_config.json", kwargs)
        return super().from_pretrained(name, *args, **kwargs)

    @property
    def context_length(self) -> int | None:
        """Most tokens of a cell, None for every expressed gene; transformers' name is `model_max_length`."""
        return None if self.model_max_length > LARGE_INTEGER else int(self.model_max_length)

    @context_length.setter
    def context_length(self, length: int | None) -> None:
        self.model_max_length = VERY_LARGE_INTEGER if length is None else length

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
        path = os.path.join(save_directory, f"{filename_prefix}-vocab.json" if filename_prefix else "vocab.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(dict(sorted(self._vocabulary.ids.items(), key=lambda item: item[1])), file, indent=0)
        return (path,)

    def _save_pretrained(self, save_directory: Any, file_names: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
        files = super()._save_pretrained(save_directory, file_names, *args, **kwargs)
        auto_map = getattr(self, "_auto_map", None) or self.init_kwargs.get("auto_map")
        return (*files, *copy_code(save_directory)) if names_our_code(auto_map) else files

    def _code_names(self) -> tuple[Any, dict[str, Any]]:
        return self, {"_auto_map": {name: list(classes) for name, classes in TOKENIZER_AUTO_MAP.items()}}

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
            gene_symbols: Gene symbol -> Ensembl id, for names that are symbols.

        Returns:
            The token of every column. Columns with the same token count as one gene.

        Raises:
            ValueError: If less than one in a hundred of the genes is known, or most are symbols; the message says why.
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
            genes: The tokens of its columns, from `match_genes`.
            drugs: Drug of all cells, or one per cell (None or "" for no drug); every cell then gets a drug token.
            first_cell: Number of the first row in the data set, for messages.
            seed: Seed of the sampling.
            source: The AnnData that the rows come from; messages then say where its raw counts are.

        Returns:
            The cells without padding.

        Raises:
            ValueError: For counts that are negative, NaN or infinite, for a wrong shape, and for unknown drugs.
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
            rows: The cells' genes, and their counts, none of them zero.
            repeats: Whether a gene may occur several times in a cell; its counts are then added up.
            drug_ids: `(cells,)` int64, in which case every cell gets a drug token.
            first_cell: As for `encode_counts`.
            seed: As for `encode_counts`.
            warn: Function that is called with a sentence about counts that look wrong.
            advice: Function that returns a sentence about what to do then.

        Returns:
            The cells without padding.

        Raises:
            ValueError: For counts that are negative, NaN or infinite.
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
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_length: bool = False,
        **idle: Any,
    ) -> BatchEncoding:
        """Tokenize cells.

        Args:
            cells: An AnnData (backed ones are read in pieces), a `(cells, genes)` count matrix (CSR, CSC, dense), a
                list of (genes, counts) pairs, one per cell, with Ensembl ids or token ids as genes, or one such pair.
            gene_ids: Ensembl id of every column of a matrix.
            gene_id_column: Column of `adata.var` with the Ensembl ids; by default `adata.var_names`.
            layer: Layer of the AnnData with the counts; by default `adata.X`.
            gene_symbols: Gene symbol -> Ensembl id, for genes named by symbol.
            drugs: Drug of all cells, one per cell (None or "" for no drug), or a column of `adata.obs`.
            first_cell: Number of the first cell in its data set, for messages.
            seed: Seed of the sampling.
            padding: Pad to the longest cell (True or `"longest"`), or to `max_length` (`"max_length"`).
            truncation: Whether longer cells are cut to `max_length`, by the rule `overflow`; they are by default.
            max_length: Most tokens of a cell; by default the tokenizer's `context_length`.
            pad_to_multiple_of: Round the padded length up to a multiple of this.
            padding_side: `"right"`, the only side.
            return_tensors: `"pt"`, `"np"`, or None for lists.
            return_attention_mask: Whether to return it; by default yes.
            return_special_tokens_mask: Whether to return it: 1 at tokens that are no genes.
            return_length: Whether to return the number of tokens of each cell, as `length`.
            **idle: Arguments for text, at values that ask for nothing.

        Returns:
            `input_ids`, `expression_values` and `attention_mask`, each `(cells, length)` or a list per cell;
            `drug_ids` `(cells,)` where drugs were given. The lists of one pair are those of its cell.

        Raises:
            TypeError: For input that is not cells, and for an argument that no tokenizer has.
            ValueError: For genes, counts, drugs or options that cannot be used; the message says what to do.
        """
        check_idle_arguments(idle)
        check_padding_side(padding_side or self.padding_side)
        output = Output(
            padding_rule(padding),
            self.context_length if max_length is None else max_length,
            pad_to_multiple_of,
            return_tensors,
            return_attention_mask,
            return_special_tokens_mask,
            return_length,
        )
        is_anndata, is_matrix = hasattr(cells, "var_names"), hasattr(cells, "shape")
        if not is_anndata and (gene_id_column is not None or layer is not None):
            raise ValueError("gene_id_column= and layer= are for an AnnData: pass gene_ids= with a matrix.")
        if gene_ids is not None and (is_anndata or not is_matrix):
            raise ValueError("gene_ids= is for a matrix: an AnnData (see gene_id_column=) or pairs bring their genes.")
        one_cell = is_one_cell(cells)
        cells = [cells] if one_cell else cells
        source, genes = None, None
        if is_anndata:
            source, drugs = cells, self.resolve_drugs(cells, drugs)
            cells, genes = self.read_anndata(cells, gene_id_column, layer, gene_symbols)
        elif is_matrix:
            if gene_ids is None:
                raise ValueError("gene_ids= is missing: pass the Ensembl id of every column of the matrix.")
            genes = self.match_genes(gene_ids, gene_symbols=gene_symbols)
        elif not are_pairs(cells):
            self._refuse_text()
        pieces = cell_pieces(cells, genes, self._vocabulary, gene_symbols, _CHUNK_ELEMENTS)
        num_cells = len(cells) if isinstance(cells, (list, tuple)) else getattr(cells, "shape", (0,))[0]
        drug_ids = None if drugs is None else self.drug_ids(drugs, num_cells)
        limited = with_length_limit(self, max_length, truncates(truncation))
        encoded = limited._encode_pieces(pieces, drug_ids, first_cell, seed, lambda: count_hint(source, layer))
        pad_token_id = self._vocabulary.ids[str(self.pad_token)]
        return output.batch(encoded, pad_token_id, self.pad_value, self.is_gene, one_cell)

    def read_anndata(
        self,
        adata: Any,
        gene_id_column: str | None = None,
        layer: str | None = None,
        gene_symbols: Mapping[str, str] | None = None,
    ) -> tuple[Any, GeneMatch]:
        """Find the counts and the genes of an AnnData, without reading the counts.

        Args:
            adata: In memory or backed; left as it is.
            gene_id_column: Column of `adata.var` with the Ensembl ids; by default `adata.var_names`.
            layer: Layer with the counts; by default `adata.X`.
            gene_symbols: Gene symbol -> Ensembl id, for genes named by symbol.

        Returns:
            The `(cells, genes)` matrix, of which slices of rows can go to `encode_counts`, and its genes.

        Raises:
            ValueError: If the column or layer does not exist, or the genes are not in the vocabulary.
        """
        matrix = anndata_counts(adata, gene_id_column, layer)

        def advice() -> str:
            columns = [name for name in adata.var.columns if self._vocabulary.knows_most(adata.var[name][:200])]
            return f" Its var columns with Ensembl ids: {columns}; pass gene_id_column=." if columns else ""

        names = adata.var_names if gene_id_column is None else adata.var[gene_id_column]
        return matrix, self._vocabulary.match(names, gene_symbols, advice)

    def resolve_drugs(self, adata: Any, drugs: Any) -> Any:
        """Read drugs from a column of obs where a string names one; anything else stays as it is."""
        return adata.obs[drugs].tolist() if self.is_drug_column(drugs, adata.obs.columns) else drugs

    def is_drug_column(self, drugs: Any, columns: Iterable[str]) -> bool:
        """Return whether `drugs` names a column of obs and no drug; raise ValueError if it names both, or neither."""
        if self.drug_table is None:
            return False
        return names_drug_column(drugs, columns, self.drug_table)

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

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pad tokenized cells into one batch, as transformers' `DataCollatorWithPadding` asks for.

        Args:
            encoded_inputs: A list of mappings, one per cell, one mapping with a list per cell, or the mapping of one
                cell: `input_ids`, `expression_values`, optionally `attention_mask`, and whatever has one number, or
                equally many numbers, per cell (`drug_ids`, labels).
            padding: True or `"longest"`, or `"max_length"`; with False nothing is padded.
            max_length: Padded length for `"max_length"`, by default the context length; else ignored.
            pad_to_multiple_of: Round the padded length up to a multiple of this.
            padding_side: `"right"`, the only side.
            return_attention_mask: Whether to return it; by default yes.
            return_tensors: `"pt"`, `"np"`, or None for lists.
            verbose: Not used.

        Returns:
            The padded cells, `(cells, length)` each, and the other entries `(cells, ...)`.

        Raises:
            ValueError: For features without `input_ids` or `expression_values`, and for options that cannot be used.
        """
        check_padding_side(padding_side or self.padding_side)
        rule = padding_rule(padding)
        length = wanted_length(rule, self.context_length if max_length is None else max_length)
        fills = {"input_ids": self._vocabulary.ids[str(self.pad_token)], "expression_values": self.pad_value}
        batch = pad_features(encoded_inputs, fills, rule, length, pad_to_multiple_of)
        if return_attention_mask is False:
            batch.pop("attention_mask")
        return as_batch(batch, return_tensors)
