# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Tokenized cells, and batches of them in the forms that users of transformers expect: padded, as lists or tensors.

This file travels to the Hugging Face Hub beside the weights: it imports only numpy, torch and transformers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import BatchEncoding
from transformers.utils import logging

logger = logging.get_logger(__name__)


@dataclass
class EncodedCells:
    """Tokenized cells without padding; cell `i` is `[offsets[i]:offsets[i + 1]]` of the flat arrays.

    Attributes:
        input_ids: `(total,)` int64 token ids, special tokens included.
        expression_values: `(total,)` float32 bins, log1p values or counts; `pad_value` at special tokens.
        offsets: `(num_cells + 1,)` int64.
        drug_ids: `(num_cells,)` int64, 0 for no drug; None where no drugs were given.
        cell_numbers: `(num_cells,)` int64 number of every cell in its data set.
        empty_cells: Rows (0 to num_cells - 1) of the cells in which no known gene is expressed.
        obs: DataFrame with the requested columns of obs, one row per cell; None where none were requested.
        samples: Second and later samples of the cells longer than the context, whose `cell_numbers` say which these
            are; empty if one sample was requested.
    """

    input_ids: np.ndarray
    expression_values: np.ndarray
    offsets: np.ndarray
    drug_ids: np.ndarray | None
    cell_numbers: np.ndarray
    empty_cells: np.ndarray
    obs: Any = None
    samples: "Sequence[EncodedCells]" = ()

    @property
    def num_cells(self) -> int:
        """Number of cells."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """`(num_cells,)` int64 tokens per cell, special tokens included."""
        return np.diff(self.offsets)

    def as_lists(self, more: Mapping[str, tuple[np.ndarray, Any]] | None = None) -> dict[str, list[Any]]:
        """Return a list per cell of `input_ids`, `expression_values` and `attention_mask`; and `drug_ids`, if any.

        Args:
            more: Further entries, as for `padded`.
        """
        cuts = self.offsets[1:-1]
        parts = {"input_ids": self.input_ids, "expression_values": self.expression_values}
        parts |= {name: flat for name, (flat, _) in (more or {}).items()}
        lists = {name: [part.tolist() for part in np.split(flat, cuts)] for name, flat in parts.items()}
        lists["attention_mask"] = [[1] * int(length) for length in self.lengths]
        if not self.num_cells:
            lists = {name: [] for name in lists}
        return lists if self.drug_ids is None else {**lists, "drug_ids": self.drug_ids.tolist()}

    def padded(
        self,
        rows: Sequence[int] | np.ndarray | None = None,
        *,
        pad_token_id: int,
        pad_value: float,
        pad_to_multiple_of: int | None = None,
        max_length: int | None = None,
        more: Mapping[str, tuple[np.ndarray, Any]] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Pad cells on the right.

        Args:
            rows: Which cells, in which order; None takes all.
            pad_token_id: Id put into the padding.
            pad_value: Expression value put into the padding.
            pad_to_multiple_of: Round the padded length up to a multiple of this.
            max_length: Padded length; by default that of the longest cell.
            more: Further entries by name: `(total,)` values, and what is put into the padding.

        Returns:
            `input_ids`, `attention_mask` (int64) and `expression_values` (float32), each `(cells, length)`; `drug_ids`
            `(cells,)` where the cells have them.

        Raises:
            ValueError: For a cell longer than `max_length`.
        """
        chosen = np.arange(self.num_cells) if rows is None else np.asarray(rows, dtype=np.int64)
        fills = {
            "input_ids": (self.input_ids, pad_token_id),
            "expression_values": (self.expression_values, np.float32(pad_value)),
            "attention_mask": (np.ones(len(self.input_ids), dtype=np.int64), 0),
            **(more or {}),
        }
        length = padded_length(self.lengths[chosen], pad_to_multiple_of, max_length)
        batch = pad_ragged(fills, self.offsets, chosen, length)
        if self.drug_ids is not None:
            batch["drug_ids"] = torch.from_numpy(self.drug_ids[chosen])
        return batch


def concatenate_cells(parts: Sequence[EncodedCells]) -> EncodedCells:
    """Join tokenized cells, one after the other."""
    cells = np.cumsum([0, *(part.num_cells for part in parts)])
    drug_ids = [part.drug_ids for part in parts if part.drug_ids is not None]
    return EncodedCells(
        input_ids=np.concatenate([part.input_ids for part in parts]),
        expression_values=np.concatenate([part.expression_values for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))]),
        drug_ids=np.concatenate(drug_ids) if drug_ids else None,
        cell_numbers=np.concatenate([part.cell_numbers for part in parts]),
        empty_cells=np.concatenate([part.empty_cells + n for part, n in zip(parts, cells[:-1], strict=True)]),
    )


def padded_length(lengths: np.ndarray, multiple: int | None, max_length: int | None = None) -> int:
    """Return the longest length, or `max_length`, which must not be less, rounded up to a multiple."""
    if multiple is not None and multiple < 1:
        raise ValueError(f"pad_to_multiple_of={multiple}: pass a positive number or None.")
    longest = int(lengths.max(initial=0))
    length = longest if max_length is None else max_length
    length = length if multiple is None else -(-length // multiple) * multiple
    if longest > length:
        raise ValueError(f"max_length={max_length} is shorter than a cell of {longest} tokens.")
    return length


def pad_ragged(
    fills: Mapping[str, tuple[np.ndarray, Any]], offsets: np.ndarray, rows: np.ndarray, length: int
) -> dict[str, torch.Tensor]:
    """Gather `{name: (flat array, fill)}` into `(rows, length)` tensors with one index for all."""
    steps = np.arange(length)
    inside = steps[None, :] < np.diff(offsets)[rows][:, None]
    index = (offsets[:-1][rows][:, None] + steps[None, :])[inside]
    batch = {}
    for name, (flat, fill) in fills.items():
        padded = np.full(inside.shape, fill, dtype=flat.dtype)
        padded[inside] = flat[index]
        batch[name] = torch.from_numpy(padded)
    return batch


def report_empty(encoded: EncodedCells) -> None:
    """Warn of cells in which no known gene is expressed."""
    if len(encoded.empty_cells):
        numbers = encoded.cell_numbers[encoded.empty_cells[:5]].tolist()
        logger.warning(
            f"{len(encoded.empty_cells)} of {encoded.num_cells} cells express no gene of the vocabulary and consist "
            f"of special tokens only (the first: {numbers})."
        )


# Values in the padding of further entries with one number per token.
_TOKEN_FILLS = {"attention_mask": 0, "special_tokens_mask": 1, "target_mask": False}
_TOKEN_DTYPES = {
    "input_ids": np.int64,
    "expression_values": np.float32,
    "attention_mask": np.int64,
    "special_tokens_mask": np.int64,
    "target_mask": np.bool_,
}


def padding_rule(padding: Any) -> str:
    """Return "longest", "max_length" or "do_not_pad" for the values of `padding` that transformers allows.

    Raises:
        ValueError: For anything else.
    """
    padding = getattr(padding, "value", padding)  # of transformers' PaddingStrategy
    rule = padding
    if padding is None or isinstance(padding, bool):
        rule = "longest" if padding else "do_not_pad"
    if rule not in ("longest", "max_length", "do_not_pad"):
        raise ValueError(f'padding={padding!r}: pass True or "longest", "max_length", or False.')
    return str(rule)


def wanted_length(rule: str, length: int | None) -> int | None:
    """Return the padded length, None for that of the longest cell."""
    if rule == "max_length" and length is None:
        raise ValueError('padding="max_length" needs max_length=: this tokenizer keeps every gene of a cell.')
    return length if rule == "max_length" else None


@dataclass(frozen=True)
class Output:
    """The form in which a tokenizer returns cells; the arguments are those of its call."""

    rule: str
    max_length: int | None = None
    multiple: int | None = None
    tensors: Any = None
    attention_mask: bool | None = None
    special_tokens_mask: bool = False
    length: bool = False

    def batch(
        self, encoded: EncodedCells, pad_token_id: int, pad_value: float, is_gene: np.ndarray, one_cell: bool = False
    ) -> BatchEncoding:
        """Return the cells in this form.

        Args:
            encoded: The cells.
            pad_token_id: Id put into the padding.
            pad_value: Expression value put into the padding.
            is_gene: `(largest id + 1,)` bool, which ids are genes.
            one_cell: Whether lists are to be those of the only cell.
        """
        if self.multiple is not None and self.rule == "do_not_pad":
            raise ValueError(f"pad_to_multiple_of={self.multiple} needs padding=True.")
        more: dict[str, Any] = {}
        if self.special_tokens_mask:
            more["special_tokens_mask"] = ((~is_gene[encoded.input_ids]).astype(np.int64), 1)
        batch: dict[str, Any] = {}
        if self.rule == "do_not_pad" and (self.tensors is None or len(set(encoded.lengths.tolist())) > 1):
            batch.update(encoded.as_lists(more))
        else:
            padded = encoded.padded(
                pad_token_id=pad_token_id,
                pad_value=pad_value,
                pad_to_multiple_of=self.multiple,
                max_length=wanted_length(self.rule, self.max_length),
                more=more,
            )
            batch.update(padded)
        if self.attention_mask is False:
            batch.pop("attention_mask")
        if self.length:
            batch["length"] = torch.from_numpy(encoded.lengths)
        lists = as_batch(batch, self.tensors)
        only_cell = one_cell and self.tensors is None
        return BatchEncoding({name: entry[0] for name, entry in lists.items()}) if only_cell else lists


def pad_features(
    features: Any, fills: Mapping[str, Any], rule: str, max_length: int | None = None, multiple: int | None = None
) -> dict[str, Any]:
    """Pad tokenized cells that came back one by one, as a data loader gives them.

    Args:
        features: A list of mappings, one per cell; one mapping with a list per cell; or the mapping of a single cell.
        fills: Values in the padding of `input_ids` and `expression_values`.
        rule: As `padding_rule` returns it.
        max_length: Padded length for "max_length".
        multiple: Round the padded length up to a multiple of this.

    Returns:
        The padded entries `(cells, length)`, or lists where there is no padding and the lengths differ; the others
        `(cells, ...)`. A single cell has no dimension for cells.

    Raises:
        ValueError: For features without an entry of `fills`, for entries that cannot be batched, and for a cell longer
            than `max_length`.
    """
    if not isinstance(features, Mapping) and not len(features):
        raise ValueError("encoded_inputs is empty: pass at least one cell.")
    columns = dict(features) if isinstance(features, Mapping) else {k: [f[k] for f in features] for k in features[0]}
    missing = [name for name in fills if name not in columns]
    if missing:
        raise ValueError(f"encoded_inputs lacks {missing}: pass what the tokenizer returned for each cell.")
    single = len(columns["input_ids"]) > 0 and np.ndim(columns["input_ids"][0]) == 0
    if single:
        columns = {name: [column] for name, column in columns.items()}
    lengths = np.array([len(ids) for ids in columns["input_ids"]], dtype=np.int64)
    columns.setdefault("attention_mask", [np.ones(n, dtype=np.int64) for n in lengths])
    every_fill = {**_TOKEN_FILLS, **fills}
    by_token = {name: columns.pop(name) for name in _TOKEN_DTYPES if name in columns}
    rows: dict[str, list[np.ndarray]] = {
        name: [np.asarray(row, dtype=_TOKEN_DTYPES[name]) for row in by_token[name]] for name in by_token
    }
    for name, parts in rows.items():
        if [len(part) for part in parts] != lengths.tolist():
            raise ValueError(f"encoded_inputs: {name} and input_ids of the same cell differ in length.")
    batch: dict[str, Any]
    if rule == "do_not_pad" and len(set(lengths.tolist())) > 1:
        batch = {name: [part.tolist() for part in parts] for name, parts in rows.items()}
    else:
        limit, step = (max_length, multiple) if rule == "max_length" else (None, multiple)
        length = padded_length(lengths, None if rule == "do_not_pad" else step, limit)
        flat = {name: (np.concatenate(parts), every_fill[name]) for name, parts in rows.items()}
        batch = dict(pad_ragged(flat, np.concatenate([[0], np.cumsum(lengths)]), np.arange(len(lengths)), length))
    batch.update({name: _column(name, column) for name, column in columns.items()})
    return {name: column[0] for name, column in batch.items()} if single else batch


def _column(name: str, column: Any) -> torch.Tensor:
    """Batch an entry with a number, or equally many numbers, per cell."""
    rows: list[np.ndarray] = [np.asarray(row) for row in column]
    if len({row.shape for row in rows}) > 1:
        raise ValueError(
            f"encoded_inputs: {name} has another length in each cell, and what its padding should hold is not known: "
            "leave it out, or pad it beforehand (labels of genes: transformers' DataCollatorForTokenClassification)."
        )
    array = np.stack(rows)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"encoded_inputs: {name} is not made of numbers ({array.dtype}): leave it out of the cells.")
    return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array)


def as_batch(batch: Mapping[str, Any], return_tensors: Any) -> BatchEncoding:
    """Return a batch in the form that `return_tensors` names: "pt", "np" or None for lists.

    Raises:
        ValueError: For another name, and for tensors of cells of different lengths.
    """
    form = getattr(return_tensors, "value", return_tensors)  # of transformers' TensorType
    if form not in (None, "pt", "np"):
        raise ValueError(f'return_tensors={form!r}: pass "pt", "np" or None.')
    if form is not None and any(isinstance(entry, list) for entry in batch.values()):
        raise ValueError(f"return_tensors={form!r} with cells of different lengths: pass padding=True.")
    if form == "pt":
        return BatchEncoding(dict(batch))
    entries = {name: entry.numpy() if isinstance(entry, torch.Tensor) else entry for name, entry in batch.items()}
    if form == "np":
        return BatchEncoding(entries)
    return BatchEncoding(
        {name: entry.tolist() if hasattr(entry, "tolist") else entry for name, entry in entries.items()}
    )
