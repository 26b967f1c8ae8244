"""Cells that come back one by one become batches, as transformers' collators and Trainer ask for them."""

import numpy as np
import pytest
import torch
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, default_data_collator

from tahoex1_hf import TahoeX1Tokenizer


@pytest.fixture(scope="module")
def tokenizer(golden):
    return TahoeX1Tokenizer(golden / "a_70m_like" / "model" / "vocab.json")


@pytest.fixture(scope="module")
def encoded(tokenizer):
    genes = [token for token in tokenizer.get_vocab() if token.startswith("ENSG")]
    return tokenizer([(genes[start : start + n], list(range(1, n + 1))) for start, n in ((0, 30), (5, 12), (9, 3))])


def one_by_one(encoded, convert=list, **more) -> list[dict]:
    cells = [{name: convert(entry[i]) for name, entry in encoded.items()} for i in range(3)]
    return [cell | {name: column[i] for name, column in more.items()} for i, cell in enumerate(cells)]


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor])
def test_every_form_of_features_gives_the_same_batch(tokenizer, encoded, convert) -> None:
    wanted = tokenizer.pad(one_by_one(encoded), return_tensors="pt")
    assert wanted["input_ids"].shape == (3, 31)
    columns = {name: [convert(row) for row in entry] for name, entry in encoded.items()}
    for features in (one_by_one(encoded, convert), columns, encoded, wanted):
        batch = tokenizer.pad(features, return_tensors="pt")
        assert {name: entry.dtype for name, entry in batch.items()} == {
            "input_ids": torch.int64,
            "expression_values": torch.float32,
            "attention_mask": torch.int64,
        }
        assert all(torch.equal(batch[name], wanted[name]) for name in wanted)
    assert batch.to("cpu")["input_ids"] is not None


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 31),
        ({"max_length": 7}, 31),  # ignored without padding="max_length", as in transformers
        ({"padding": "longest", "pad_to_multiple_of": 8}, 32),
        ({"padding": "max_length"}, 1024),
        ({"padding": "max_length", "max_length": 33, "pad_to_multiple_of": 8}, 40),
    ],
    ids=str,
)
def test_the_collator_pads_as_it_is_asked(tokenizer, encoded, options, length) -> None:
    for features in (one_by_one(encoded, label=[0, 1, 1]), one_by_one(encoded, labels=[0, 1, 1])):
        batch = DataCollatorWithPadding(tokenizer, **options)(features)
        assert batch["input_ids"].shape == batch["expression_values"].shape == (3, length)
        assert batch["attention_mask"].sum(1).tolist() == [31, 13, 4]
        assert batch["labels"].tolist() == [0, 1, 1]
        assert batch["labels"].dtype == torch.int64
        assert "label" not in batch
    arrays = DataCollatorWithPadding(tokenizer, return_tensors="np", **options)(features)
    assert isinstance(arrays["input_ids"], np.ndarray)
    np.testing.assert_array_equal(arrays["input_ids"], batch["input_ids"])
    batch_of_one = DataCollatorWithPadding(tokenizer, **options)(features[1:2])
    assert batch_of_one["attention_mask"].sum().item() == 13


def test_labels_of_every_kind(tokenizer, encoded) -> None:
    for labels, dtype, shape in (
        ([0.5, 1.5, 2.0], torch.float32, (3,)),
        (list(np.array([0.5, 1.5, 2.0])), torch.float32, (3,)),
        ([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], torch.float32, (3, 2)),
        ([True, False, True], torch.bool, (3,)),
        ([torch.tensor(0), torch.tensor(1), torch.tensor(2)], torch.int64, (3,)),
    ):
        batch = tokenizer.pad(one_by_one(encoded, labels=labels), return_tensors="pt")
        assert (batch["labels"].dtype, batch["labels"].shape) == (dtype, shape)


def test_entries_with_one_number_per_token(tokenizer, encoded) -> None:
    lengths = [31, 13, 4]
    masks = {
        "special_tokens_mask": [[1] + [0] * (n - 1) for n in lengths],
        "target_mask": [[False] + [True] * (n - 1) for n in lengths],
    }
    batch = tokenizer.pad(one_by_one(encoded, **masks), return_tensors="np")
    np.testing.assert_array_equal(batch["special_tokens_mask"].sum(1), [1, 19, 28])
    np.testing.assert_array_equal(batch["target_mask"].sum(1), [30, 12, 3])
    assert batch["target_mask"].dtype == bool
    labels = [[-100, *range(n - 1)] for n in lengths]
    batch = DataCollatorForTokenClassification(tokenizer)(one_by_one(encoded, labels=labels))
    assert batch["labels"].shape == (3, 31)
    assert batch["labels"][2].tolist() == [-100, 0, 1, 2] + [-100] * 27


def test_without_padding(tokenizer, encoded) -> None:
    lists = tokenizer.pad(one_by_one(encoded), padding=False)
    assert lists["input_ids"] == encoded["input_ids"]
    with pytest.raises(ValueError, match="cells of different lengths: pass padding=True"):
        tokenizer.pad(one_by_one(encoded), padding=False, return_tensors="pt")
    equal = [one_by_one(encoded)[0]] * 2
    assert tokenizer.pad(equal, padding="do_not_pad", return_tensors="pt")["input_ids"].shape == (2, 31)


def test_a_single_cell_has_no_dimension_for_cells(tokenizer, encoded) -> None:
    cell = one_by_one(encoded, labels=[3, 4, 5])[1]
    padded = tokenizer.pad(cell, padding="max_length", max_length=16)
    assert padded["input_ids"] == [*cell["input_ids"], *[tokenizer.pad_token_id] * 3]
    assert padded["labels"] == 4
    assert tokenizer.pad(cell, return_tensors="pt")["input_ids"].shape == (13,)


def test_the_default_collator_takes_padded_cells(tokenizer, encoded) -> None:
    padded = tokenizer.pad(encoded, padding="max_length", max_length=40)
    batch = default_data_collator(one_by_one(padded, label=[0, 1, 2]))
    assert batch["input_ids"].shape == (3, 40)
    assert tokenizer.pad(encoded, return_attention_mask=False).keys() == {"input_ids", "expression_values"}
