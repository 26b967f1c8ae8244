"""Predictions of hidden expression are those of the model's own forward pass, in the tokenizer's unit."""

import copy

import numpy as np
import pytest
import torch
from cells import NUM_GENES, make_cells, write_vocab
from helpers import tiny_config, tiny_model

from tahoex1_hf import TahoeX1ForPreTraining, TahoeX1Tokenizer
from tahoex1_hf.inference.encoder import CellEncoder
from tahoex1_hf.inference.expression import ExpressionPredictor, halves
from tahoex1_hf.padding_tahoe_x1 import EncodedCells


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TahoeX1Tokenizer:
    return TahoeX1Tokenizer(str(write_vocab(tmp_path_factory.mktemp("vocab"))), context_length=40)


@pytest.fixture(scope="module")
def cells(tokenizer: TahoeX1Tokenizer) -> EncodedCells:
    adata = make_cells(12)
    return tokenizer.encode_counts(adata.X, tokenizer.match_genes(adata.var_names))


def model_of(**changes: object) -> TahoeX1ForPreTraining:
    config = tiny_config(vocab_size=NUM_GENES + 3, attention_mask_style="observed_or_self", **changes)
    return tiny_model(config, TahoeX1ForPreTraining)


@pytest.mark.parametrize("scaled", [False, True])
def test_predictions_are_the_models_whatever_shares_a_batch(
    tokenizer: TahoeX1Tokenizer, cells: EncodedCells, scaled: bool
) -> None:
    model = model_of(scale_targets=scaled)
    hidden = np.random.default_rng(0).random(len(cells.input_ids)) < 0.4
    hidden[cells.offsets[:-1]] = False
    hidden[cells.offsets[3] : cells.offsets[4]] = False  # nothing of this cell is asked for
    found = [
        ExpressionPredictor(
            CellEncoder(model, tokenizer, batch_tokens=tokens, device="cpu", dtype="float32"), model.expression_decoder
        ).predict(cells, hidden)
        for tokens in (30, 10_000)
    ]
    more = {"target_mask": (hidden, False)}
    batch = cells.padded(pad_token_id=tokenizer.pad_token_id, pad_value=tokenizer.pad_value, more=more)
    with torch.no_grad():
        expected = model(**batch).expression_predictions[batch["attention_mask"].bool()].numpy()
    # The original trains on 2 (bin - 1) / 49 - 1.
    expected = (expected + 1) * 49 / 2 + 1 if scaled else expected
    for predicted in found:
        assert np.isnan(predicted[~hidden]).all()
        np.testing.assert_allclose(predicted[hidden], expected[hidden], atol=2e-4 if scaled else 1e-5)


def test_what_cannot_be_predicted_is_said(tokenizer: TahoeX1Tokenizer) -> None:
    model = model_of()
    cut = CellEncoder(model, tokenizer, device="cpu", hidden_layer=1)
    with pytest.raises(ValueError, match="hidden_layer=1: expression is predicted from the output of the last layer"):
        ExpressionPredictor(cut, model.expression_decoder)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation='eager': load the model"):
        ExpressionPredictor(CellEncoder(model, tokenizer, device="cpu"), model.expression_decoder)
    padded = copy.deepcopy(model_of())
    padded.config.cell_pooling = "mean_with_padding"
    with pytest.raises(ValueError, match="mean_with_padding"):
        ExpressionPredictor(CellEncoder(padded, tokenizer, device="cpu"), padded.expression_decoder)


def test_halves_follow_from_seed_content_and_gene() -> None:
    tokens, contents = np.arange(2000), np.array([5, 5, 6], dtype=np.uint64)
    one, same, other = (halves(np.full(2000, cell), tokens, contents, 0) for cell in range(3))
    np.testing.assert_array_equal(one, same)
    for different in (other, halves(np.zeros(2000, dtype=int), tokens, contents, 1)):
        assert 0.45 < (one != different).mean() < 0.55
    assert 0.45 < one.mean() < 0.55
    order = np.random.default_rng(0).permutation(2000)
    np.testing.assert_array_equal(halves(np.zeros(2000, dtype=int), tokens[order], contents, 0), one[order])
