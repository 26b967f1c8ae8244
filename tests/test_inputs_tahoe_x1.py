"""The tokenizer is called as transformers' users call one: length limits, idle arguments, single cells."""

import json

import numpy as np
import pandas as pd
import pytest
from transformers import AutoTokenizer
from transformers.tokenization_utils_base import PaddingStrategy, TensorType, TruncationStrategy

from tahoex1_hf import TahoeX1Tokenizer
from tahoex1_hf.inputs_tahoe_x1 import is_one_cell


@pytest.fixture
def vocab_file(golden):
    return golden / "a_70m_like" / "model" / "vocab.json"


@pytest.fixture
def tokenizer(vocab_file):
    return TahoeX1Tokenizer(vocab_file)


@pytest.fixture
def cells(tokenizer):
    """Return three (genes, counts) pairs, of 30, 12 and 3 genes."""
    genes = [token for token in tokenizer.get_vocab() if token.startswith("ENSG")]
    return [(genes[start : start + n], list(range(1, n + 1))) for start, n in ((0, 30), (5, 12), (9, 3))]


def lengths(encoded) -> list[int]:
    return [len(ids) for ids in encoded["input_ids"]]


# The length limit ---------------------------------------------------------------------------------


def test_the_two_names_of_the_length_limit_are_one(tokenizer, cells) -> None:
    assert tokenizer.model_max_length == tokenizer.context_length == 1024
    tokenizer.model_max_length = 10
    assert tokenizer.context_length == 10
    assert lengths(tokenizer(cells)) == [10, 10, 4]
    tokenizer.context_length = 20
    assert tokenizer.model_max_length == 20
    tokenizer.context_length = None
    assert tokenizer.model_max_length > 1e20
    assert lengths(tokenizer(cells)) == [31, 13, 4]


def test_cls_is_counted_among_the_tokens_that_are_added(tokenizer, cells) -> None:
    """transformers' own ways of asking agree with what a cell becomes; there are no pairs of cells."""
    genes = tokenizer.convert_tokens_to_ids(list(cells[2][0]))
    assert tokenizer(cells[2])["input_ids"] == tokenizer.build_inputs_with_special_tokens(genes)
    assert tokenizer.num_special_tokens_to_add() == tokenizer.num_special_tokens_to_add(pair=True) == 1
    assert tokenizer.max_len_single_sentence == 1023
    ids = tokenizer.build_inputs_with_special_tokens(genes)
    asked = tokenizer(cells[2], return_special_tokens_mask=True)["special_tokens_mask"]
    assert asked == tokenizer.get_special_tokens_mask(genes) == [1, 0, 0, 0]
    assert asked == tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)


@pytest.mark.parametrize("name", ["model_max_length", "context_length"])
def test_either_name_is_loaded_and_saved(tokenizer, vocab_file, cells, tmp_path, name) -> None:
    assert TahoeX1Tokenizer(vocab_file, **{name: 8}).context_length == 8
    assert TahoeX1Tokenizer(vocab_file, **{name: 2048}).model_max_length == 2048
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, **{name: 8})
    assert lengths(loaded(cells)) == [8, 8, 4]
    setattr(loaded, name, 9)
    loaded.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["model_max_length"] == saved["context_length"] == 9
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.context_length, again.model_max_length) == (9, 9)
    for unlimited in ({"context_length": None}, {"model_max_length": int(1e30)}):
        assert AutoTokenizer.from_pretrained(tmp_path, **unlimited).context_length is None


def test_files_that_hold_two_limits(tokenizer, tmp_path, caplog) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    saved = json.loads(path.read_text())
    for context, other, expected in ((1024, int(1e30), 1024), (1024, 64, 64), (512, 64, 64), (64, 512, 64)):
        path.write_text(json.dumps(saved | {"context_length": context, "model_max_length": other}))
        assert AutoTokenizer.from_pretrained(tmp_path).context_length == expected
    assert "context_length=512 and model_max_length=64 differ: the smaller holds" in caplog.text


def test_a_limit_for_one_call(tokenizer, cells) -> None:
    assert lengths(tokenizer(cells, max_length=8, truncation=True)) == [8, 8, 4]
    assert lengths(tokenizer(cells, max_length=8)) == [8, 8, 4]
    assert tokenizer.context_length == 1024
    tokenizer.context_length = 8
    for truncation in (None, True, "longest_first", "only_first", TruncationStrategy.LONGEST_FIRST):
        assert lengths(tokenizer(cells, truncation=truncation)) == [8, 8, 4]
    for truncation in (False, "do_not_truncate", TruncationStrategy.DO_NOT_TRUNCATE):
        assert lengths(tokenizer(cells, truncation=truncation)) == [31, 13, 4]
    assert tokenizer.context_length == 8
    with pytest.raises(ValueError, match="truncation='only_second': pass True, or False"):
        tokenizer(cells, truncation="only_second")
    for wrong in (2, 8.0, "8"):
        with pytest.raises(ValueError, match=f"max_length={wrong!r}: pass a whole number of at least 3"):
            tokenizer(cells, max_length=wrong)


# Padding and form ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"padding": True}, 31),
        ({"padding": "longest", "pad_to_multiple_of": 8}, 32),
        ({"padding": PaddingStrategy.LONGEST, "max_length": 16}, 16),
        ({"padding": "max_length"}, 1024),
        ({"padding": PaddingStrategy.MAX_LENGTH, "max_length": 40}, 40),
        ({"padding": "max_length", "max_length": 20, "truncation": True, "pad_to_multiple_of": 8}, 24),
    ],
    ids=str,
)
def test_padding(tokenizer, cells, options, length) -> None:
    for form in ("np", "pt", TensorType.PYTORCH):
        batch = tokenizer(cells, return_tensors=form, **options)
        assert {entry.shape for entry in batch.values()} == {(3, length)}
        assert type(batch["input_ids"]).__module__ == ("numpy" if form == "np" else "torch")
    lists = tokenizer(cells, **options)
    assert lists["input_ids"] == batch["input_ids"].tolist()
    if options.get("max_length", 40) >= 31:
        assert batch["attention_mask"].sum(1).tolist() == [31, 13, 4]
        np.testing.assert_array_equal(batch["expression_values"][batch["attention_mask"] == 0], -2.0)


def test_nothing_is_padded_without_being_asked(tokenizer, cells) -> None:
    for padding in (False, None, "do_not_pad", PaddingStrategy.DO_NOT_PAD):
        assert lengths(tokenizer(cells, padding=padding)) == [31, 13, 4]
    tokenizer.context_length = None
    with pytest.raises(ValueError, match='padding="max_length" needs max_length='):
        tokenizer(cells, padding="max_length")


def test_what_else_may_be_returned(tokenizer, cells) -> None:
    more = tokenizer(cells, return_special_tokens_mask=True, return_length=True, return_attention_mask=False)
    assert more["length"] == [31, 13, 4]
    assert more["special_tokens_mask"] == [[1] + [0] * (n - 1) for n in more["length"]]
    assert "attention_mask" not in more
    padded = tokenizer(cells, padding=True, return_special_tokens_mask=True, return_tensors="np")
    np.testing.assert_array_equal(padded["special_tokens_mask"].sum(1), [1, 19, 28])


def test_one_pair_is_one_cell(tokenizer, cells) -> None:
    """As with one text, lists are those of the cell, and tensors have a row."""
    several = tokenizer(cells)
    for genes, counts in (cells[1], [np.array(cells[1][0]), np.array(cells[1][1])]):
        one = tokenizer((genes, counts))
        assert dict(one) == {name: entry[1] for name, entry in several.items()}
    assert tokenizer((pd.Series(cells[1][0], index=range(5, 17)), cells[1][1]))["input_ids"] == one["input_ids"]
    assert tokenizer(cells[1], return_tensors="pt")["input_ids"].shape == (1, 13)
    assert tokenizer(cells[1:2])["input_ids"] == [one["input_ids"]]
    assert is_one_cell(([], []))
    assert not is_one_cell([([], []), ([], [])])
    assert not is_one_cell([("a", "b"), ([1], [2])])


# Arguments for text -------------------------------------------------------------------------------


def test_arguments_for_text_at_values_that_ask_for_nothing(tokenizer, cells) -> None:
    idle = {"add_special_tokens": True, "padding_side": "right", "return_token_type_ids": False, "stride": 0}
    idle |= {"verbose": False, "is_split_into_words": False, "return_overflowing_tokens": False, "text_pair": None}
    assert dict(tokenizer(cells, **idle)) == dict(tokenizer(cells))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"add_special_tokens": False}, "every cell begins with <cls>"),
        ({"return_token_type_ids": True}, "return_token_type_ids=True is not possible, it is for text"),
        ({"text_pair": "TP53"}, "text_pair='TP53' is not possible"),
        ({"padding_side": "left"}, 'padding_side="left": <cls> and <drug> must stay first'),
    ],
    ids=str,
)
def test_arguments_that_cells_cannot_have(tokenizer, cells, wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer(cells, **wrong)


def test_a_side_that_is_set_later_is_refused_too(tokenizer, cells) -> None:
    tokenizer.padding_side = "left"
    for call in (tokenizer, tokenizer.pad):
        with pytest.raises(ValueError, match="cells are padded on the right"):
            call(cells)
