"""Inference without padding gives the numbers of the padded forward pass, for every shape of model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anndata import read_h5ad
from flash_stand_in import FlashStandIn, flash_on_cpu  # noqa: F401 - a fixture
from helpers import SHAPES, largest_difference, make_batch, tiny_config, tiny_model

from tahoex1_hf import TahoeX1Model, TahoeX1Tokenizer
from tahoex1_hf.inference.encoder import CellEncoder, length_sorted_batches
from tahoex1_hf.inference.ragged import _distinct, can_run_ragged, ragged_forward
from tahoex1_hf.observed_attention_tahoe_x1 import PackedAttention, equal_runs

CLOSE = 1e-5  # absolute, on float32 outputs of order one
LENGTHS = (14, 14, 14, 12, 9, 9, 6, 3)


def both(shape: str, all_tokens: bool, lengths: tuple[int, ...] = LENGTHS, **changes: Any) -> tuple:
    """Return padded and ragged results: cell embeddings and hidden states of the tokens."""
    config = tiny_config(**{**SHAPES[shape], **changes})
    model = tiny_model(config, TahoeX1Model)
    batch = make_batch(config, lengths, targets=False)
    valid = batch["attention_mask"].bool()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    with torch.inference_mode():
        padded = model(**batch)
        pooled, hidden = ragged_forward(
            model,
            batch["input_ids"][valid],
            batch["expression_values"][valid],
            offsets,
            batch.get("drug_ids"),
            all_tokens,
        )
    return padded.pooler_output, pooled, padded.last_hidden_state[valid], hidden


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("all_tokens", [True, False])
def test_ragged_equals_padded(shape: str, all_tokens: bool) -> None:
    expected, pooled, expected_hidden, hidden = both(shape, all_tokens)
    assert largest_difference(pooled, expected) < CLOSE
    if all_tokens:
        assert largest_difference(hidden, expected_hidden) < CLOSE
    else:
        assert hidden is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("all_tokens", [True, False])
def test_flash_takes_all_cells_in_one_call_a_layer(flash_on_cpu: FlashStandIn, shape: str, all_tokens: bool) -> None:  # noqa: F811
    expected, pooled, expected_hidden, hidden = both(shape, all_tokens, num_hidden_layers=3)
    # The padded pass attends by itself; of the calls, the last is that of <cls> where nothing else is asked for.
    tokens, longest = sum(LENGTHS), max(LENGTHS)
    calls = [(tokens, tokens, (longest, longest))] * 3
    if not all_tokens and tiny_config(**SHAPES[shape]).cell_pooling == "cls":
        calls[-1] = (len(LENGTHS), tokens, (1, longest))
    assert flash_on_cpu.calls == calls
    assert largest_difference(pooled, expected) < CLOSE
    if hidden is not None:
        assert largest_difference(hidden, expected_hidden) < CLOSE


@pytest.mark.parametrize(
    "values",
    [[3.0, -2.0, 50.0, 3.0, 0.0, -0.0], [1.5, 2.0, 1.5], [7.0], [1e30, 1.0], [float("inf"), 1.0], [2.0**40, 0.0]],
)
def test_distinct_values_are_those_of_torch(values: list[float]) -> None:
    for mine, theirs in zip(
        _distinct(torch.tensor(values)), torch.unique(torch.tensor(values), return_inverse=True), strict=True
    ):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_short_last_layer_is_exact(norm_position: str, layers: int) -> None:
    changes = {"norm_position": norm_position, "num_hidden_layers": layers}
    expected, pooled, _, hidden = both("plain", False, **changes)
    assert hidden is None
    assert largest_difference(pooled, expected) < CLOSE


@pytest.mark.parametrize("lengths", [(5,), (4, 4, 4), (2, 14, 3, 9, 14)])
def test_lengths_in_any_order(lengths: tuple[int, ...]) -> None:
    expected, pooled, _, _ = both("drugs", False, lengths)
    assert largest_difference(pooled, expected) < CLOSE


def test_the_last_layers_feed_forward_block_runs_on_cls_alone() -> None:
    config = tiny_config(num_hidden_layers=3)
    model = tiny_model(config, TahoeX1Model)
    batch = make_batch(config, LENGTHS, targets=False)
    valid = batch["attention_mask"].bool()
    rows = []
    for layer in model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda module, arguments, output: rows.append(len(output)))
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    with torch.inference_mode():
        ragged_forward(model, batch["input_ids"][valid], batch["expression_values"][valid], offsets)
    assert rows == [sum(LENGTHS), sum(LENGTHS), len(LENGTHS)]


def test_values_that_are_all_different() -> None:
    config = tiny_config()
    model, batch = tiny_model(config, TahoeX1Model), make_batch(config, LENGTHS, targets=False)
    valid = batch["attention_mask"].bool()
    batch["expression_values"] = torch.rand(valid.shape)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    pooled, _ = ragged_forward(model, batch["input_ids"][valid], batch["expression_values"][valid], offsets)
    with torch.no_grad():
        assert largest_difference(pooled, model(**batch).pooler_output) < CLOSE


def test_an_adapter_of_keys_and_values_is_applied() -> None:
    peft = pytest.importorskip("peft")
    config = tiny_config()
    model, batch = tiny_model(config, TahoeX1Model), make_batch(config, LENGTHS, targets=False)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    valid = batch["attention_mask"].bool()
    cells = batch["input_ids"][valid], batch["expression_values"][valid], offsets
    before, _ = ragged_forward(model, *cells)
    settings = peft.LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings).eval()
    pooled, _ = ragged_forward(adapted.base_model.model, *cells)
    with torch.no_grad():
        assert largest_difference(pooled, adapted(**batch).pooler_output) < CLOSE
    assert largest_difference(pooled, before) > 100 * CLOSE


@pytest.mark.parametrize("heads", [4, 2])
def test_jagged_attention_equals_attention_by_cell(heads: int) -> None:
    """The attention that CUDA runs, here computed by plain torch."""
    boundaries = torch.tensor([0, 5, 9, 9 + 1, 20])
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, n, 20, 8, requires_grad=True) for n in (4, heads, heads))
    results = []
    for attention in (
        PackedAttention.make(boundaries, None, None, torch.device("cpu")),
        PackedAttention(boundaries, runs=None, longest=10),
    ):
        output, _ = attention(query, key, value, 0.3)
        assert output.shape == (1, 20, 4, 8)
        results.append((output, *torch.autograd.grad(output.square().sum(), (query, key, value))))
    for by_cell, jagged in zip(*results, strict=True):
        assert largest_difference(by_cell, jagged) < 1e-4  # gradients of up to 20


def test_which_models_it_serves() -> None:
    cpu = torch.device("cpu")
    assert can_run_ragged(tiny_model(tiny_config(), TahoeX1Model), cpu)
    assert can_run_ragged(tiny_model(tiny_config(), TahoeX1Model), torch.device("cuda"))
    assert not can_run_ragged(tiny_model(tiny_config(), TahoeX1Model), torch.device("mps"))
    assert not can_run_ragged(tiny_model(tiny_config(), TahoeX1Model, attention="eager"), cpu)
    assert not can_run_ragged(tiny_model(tiny_config(cell_pooling="mean_with_padding"), TahoeX1Model), cpu)


def test_equal_runs() -> None:
    assert equal_runs([7, 7, 5, 7]) == [(2, 7), (1, 5), (1, 7)]


@pytest.mark.parametrize("budget", [1, 14, 15, 30, 10**6])
def test_unpadded_batches_are_as_full_as_can_be(budget: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 15, 200)
    batches = list(length_sorted_batches(lengths, budget, padded=False))
    assert sorted(np.concatenate(batches)) == list(range(200))
    for batch, after in zip(batches, [*batches[1:], None], strict=True):
        assert lengths[batch].sum() <= budget or len(batch) == 1
        if after is not None:
            assert lengths[batch].sum() + lengths[after[0]] > budget


def test_the_encoder_takes_it_and_falls_back(golden: Path) -> None:
    adata = read_h5ad(golden / "a_70m_like" / "adata.h5ad")
    vocab = golden / "a_70m_like" / "model" / "vocab.json"
    tokenizer = TahoeX1Tokenizer(str(vocab), context_length=64)
    config = tiny_config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    cells = tokenizer.encode_counts(adata.X, tokenizer.match_genes(adata.var["ensembl_id"]))
    assert len(set(cells.lengths.tolist())) > 5
    results = []
    for attention in ("sdpa", "eager"):
        model = tiny_model(config, TahoeX1Model, attention)
        encoder = CellEncoder(model, tokenizer, device="cpu", batch_tokens=500, dtype="float32")
        results.append(encoder.embed(cells))
    assert largest_difference(results[0], results[1]) < CLOSE
